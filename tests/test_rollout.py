"""Sampling: against transformers' own generate, against the softmax, and against the forward pass."""

import pytest
import torch

from tasks.models import add_lora, hidden_states, load_model, load_tokenizer, logits, pad_right, use
from tasks.rollout import generate, row_uniforms, sample
from tasks.sft.config import LoRAConfig

QUERIES = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32, 33], [40, 41], [50, 51, 52, 53, 54, 55]]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model / "model")


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model / "model", "fp32", "cpu")


@pytest.fixture(scope="module")
def adapted(tiny_model):
    """The tiny model with an adapter that changes it."""
    peft = add_lora(load_model(tiny_model / "model", "fp32", "cpu"), LoRAConfig(r=4, alpha=8, dropout=0.5), "policy", 0)
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return peft  # in training mode: generate must switch its dropout off


def sampled(model, tokenizer, queries=QUERIES, **changes):
    return generate(model, tokenizer, queries, **{"max_new_tokens": 40, "temperature": 1.0, "seed": 3, "device": "cpu", **changes})


def test_greedy_is_transformers_own_greedy(model, tokenizer):
    ours = sampled(model, tokenizer, temperature=0.0)
    for query, response in zip(QUERIES, ours.responses):
        theirs = model.generate(torch.tensor([query]), do_sample=False, max_new_tokens=40, eos_token_id=tokenizer.eos_token_id)
        assert response == theirs[0, len(query) :].tolist()


def test_greedy_uses_the_active_adapter_without_its_dropout(adapted, model, tokenizer):
    ours = sampled(adapted, tokenizer, temperature=0.0)
    adapted.eval()
    for query, response in zip(QUERIES, ours.responses):
        theirs = adapted.generate(
            input_ids=torch.tensor([query]), do_sample=False, max_new_tokens=40, eos_token_id=tokenizer.eos_token_id
        )
        assert response == theirs[0, len(query) :].tolist()
    with use(adapted, None):
        off = sampled(adapted, tokenizer, temperature=0.0)
    assert off.responses == sampled(model, tokenizer, temperature=0.0).responses != ours.responses


def test_the_first_token_is_distributed_as_the_softmax(model, tokenizer):
    from scipy.stats import chisquare

    n, temperature = 4000, 0.6
    rollout = sampled(model, tokenizer, [[5, 6, 7]] * n, max_new_tokens=1, temperature=temperature, batch_size=1000)
    counts = torch.bincount(torch.tensor([r[0] for r in rollout.responses]), minlength=model.config.vocab_size).double()
    with torch.no_grad():
        expected = n * torch.softmax(model(torch.tensor([[5, 6, 7]])).logits[0, -1].double() / temperature, 0)
    common = expected >= 5
    observed = [*counts[common].tolist(), counts[~common].sum().item()]
    assert chisquare(observed, [*expected[common].tolist(), expected[~common].sum().item()]).pvalue > 1e-3


def test_a_token_without_probability_is_never_drawn():
    scores = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).repeat(5, 1)
    uniforms = torch.tensor([0.0, 0.4999999, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert sample(scores, uniforms, 1.0).tolist() == [1, 1, 3, 3, 3]


def test_a_forward_pass_with_the_same_random_numbers_draws_the_same_tokens(model, tokenizer):
    rollout = sampled(model, tokenizer, temperature=0.8)
    for row, (query, response) in enumerate(zip(rollout.queries, rollout.responses)):
        ids, mask = pad_right([query + response], tokenizer.pad_token_id, "cpu")
        with torch.no_grad():
            rows = logits(model, hidden_states(model, ids, mask))[0, len(query) - 1 : -1]
        assert sample(rows, row_uniforms(3, row, len(response)), 0.8).tolist() == response


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_response_does_not_depend_on_its_batch(model, tokenizer, batch_size):
    queries = QUERIES * 4
    alone, together = sampled(model, tokenizer, queries, batch_size=batch_size), sampled(model, tokenizer, queries)
    assert alone == together
    lengths = {len(r) for r in together.responses}
    assert len(lengths) > 5  # so rows were dropped while others ran on


def test_a_response_does_not_depend_on_its_neighbours_queries(model, tokenizer):
    others = [[60 + i] * 11 for i in range(5)]
    assert sampled(model, tokenizer, [QUERIES[0], *others]).responses[0] == sampled(model, tokenizer).responses[0]


def test_equal_queries_get_different_responses_and_another_seed_gives_others(model, tokenizer):
    rollout = sampled(model, tokenizer, [QUERIES[0]] * 8)
    assert len({tuple(r) for r in rollout.responses}) == 8
    assert sampled(model, tokenizer, [QUERIES[0]] * 8, seed=4).responses != rollout.responses


def test_eos_ends_a_response_and_is_kept_at_its_end(model, tokenizer):
    rollout = sampled(model, tokenizer, QUERIES * 10)
    eos = tokenizer.eos_token_id
    assert 0 < sum(rollout.finished) < len(rollout.finished)
    for response, finished in zip(rollout.responses, rollout.finished):
        assert eos not in response[:-1]
        assert finished == (response[-1] == eos)
        assert finished or len(response) == 40


def test_what_does_not_fit_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="max_new_tokens=255 do not fit 256 positions"):
        sampled(model, tokenizer, max_new_tokens=255)
    with pytest.raises(ValueError, match="query 1 is empty"):
        sampled(model, tokenizer, [[3], []])
