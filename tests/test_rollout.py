"""Sampling: against transformers' own generate, against the softmax, and against the forward pass."""

import os
import traceback

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from tasks import distributed, packing
from tasks.distributed import World
from tasks.models import DTYPES, add_lora, causal_lm, hidden_states, load_model, load_tokenizer, logits, pad_right, use
from tasks.optim import fast_matmul
from tasks.packing import Document, collate
from tasks.reward.model import ScoreHead
from tasks.rollout import generate, generate_shared, row_uniforms, sample
from tasks.sft.config import LoRAConfig

QUERIES = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32, 33], [40, 41], [50, 51, 52, 53, 54, 55]]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model / "model")


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model / "model", "fp32", "cpu")


def with_adapter(model):
    """The model with an adapter that changes it; in training mode: generate must switch its dropout off."""
    peft = add_lora(model, LoRAConfig(r=4, alpha=8, dropout=0.5), "policy", 0)
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return peft.train()


@pytest.fixture(scope="module")
def adapted(tiny_model):
    return with_adapter(load_model(tiny_model / "model", "fp32", "cpu"))


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


# ---- what comes with the tokens


def plain_numbers(model, rollout, temperature, head):
    """Log-probabilities, entropies and values of every response by one ordinary forward pass each, from their definitions."""
    model.eval()
    for query, response in zip(rollout.queries, rollout.responses):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([query + response]), output_hidden_states=True)
        p = torch.softmax(output.logits[0, len(query) - 1 : -1].double() / temperature, -1)
        hidden = output.hidden_states[-1][0, len(query) - 1 : -1]
        yield p[range(len(response)), response].log(), -torch.xlogy(p, p).sum(-1), head(hidden)[:, 0].detach()


def furthest(rollout, expected) -> float:
    """The largest difference in any of the three."""
    found = zip(rollout.logprobs, rollout.entropies, rollout.values, strict=True)
    return max(float((a - b).abs().max()) for ours, theirs in zip(found, expected, strict=True) for a, b in zip(ours, theirs))


HEAD = ScoreHead(32, seed=3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_entropies_and_values_are_those_of_a_forward_pass(adapted, tokenizer, temperature):
    rollout = sampled(adapted, tokenizer, temperature=temperature, value_head=HEAD)
    assert all(row.dtype == torch.float32 for row in (*rollout.logprobs, *rollout.entropies, *rollout.values))
    assert furthest(rollout, plain_numbers(adapted, rollout, temperature, HEAD)) < 1e-5


def test_they_are_those_of_a_packed_forward_pass(adapted, tokenizer):
    rollout = sampled(adapted, tokenizer, value_head=HEAD)
    adapted.eval()
    batch = collate([Document(np.array(q + r, np.int32), len(q)) for q, r in zip(rollout.queries, rollout.responses)], "cpu")
    with torch.no_grad(), fast_matmul(adapted):
        hidden = packing.hidden_states(adapted, batch)
        everything = F.log_softmax(logits(adapted, hidden), -1)
    for i, (start, query, response) in enumerate(zip(batch.starts, rollout.queries, rollout.responses)):
        rows = slice(start + len(query) - 1, start + len(query) + len(response) - 1)
        assert torch.allclose(rollout.logprobs[i], everything[rows][range(len(response)), response], atol=1e-5)
        assert torch.allclose(rollout.values[i], HEAD(hidden[rows])[:, 0].detach(), atol=1e-5)


@pytest.mark.parametrize(("dtype", "quantization"), [("bf16", "none"), ("fp32", "8bit"), ("bf16", "8bit"), ("fp32", "4bit")])
def test_a_rounded_base_is_sampled_as_it_stands_and_near_what_training_computes(tiny_model, tokenizer, dtype, quantization):
    model = with_adapter(load_model(tiny_model / "model", dtype, "cpu", quantization))
    rollout = sampled(model, tokenizer, value_head=HEAD)
    difference = furthest(rollout, plain_numbers(model, rollout, 1.0, HEAD))
    # A forward pass in bf16 rounds what it computes, and this model's random weights are large; in fp32 only the base is rounded.
    assert difference < (0.3 if dtype == "bf16" else 1e-4)
    if dtype == "bf16" and quantization == "none":
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        assert furthest(rollout, plain_numbers(model, rollout, 1.0, HEAD)) < 1e-5  # nothing was rounded on the way


def test_without_room_for_a_folded_copy_the_same_is_sampled_from_the_layers_themselves(adapted, tokenizer):
    folded, apart = (sampled(adapted, tokenizer, value_head=HEAD, fold_bytes=limit) for limit in (2**30, 0))
    assert folded == apart
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(folded.logprobs + folded.values, apart.logprobs + apart.values))


def test_the_models_own_weights_stay_as_they_were(adapted, tokenizer):
    before = {name: tensor.clone() for name, tensor in adapted.train().state_dict().items()}
    sampled(adapted, tokenizer, max_new_tokens=3)
    assert adapted.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())


def test_a_changed_adapter_counts_in_the_next_rollout(tiny_model, tokenizer):
    model = with_adapter(load_model(tiny_model / "model", "fp32", "cpu"))
    sampled(model, tokenizer, max_new_tokens=3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(-1)
    rollout = sampled(model, tokenizer, value_head=HEAD)
    assert furthest(rollout, plain_numbers(model, rollout, 1.0, HEAD)) < 1e-5


def test_greedy_has_the_logprobs_of_temperature_one(model, tokenizer):
    rollout = sampled(model, tokenizer, temperature=0.0, value_head=HEAD)
    assert furthest(rollout, plain_numbers(model, rollout, 1.0, HEAD)) < 1e-5


def test_a_model_of_another_kind_goes_its_own_way(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    model = with_adapter(GPT2LMHeadModel(config).requires_grad_(False))
    greedy, rollout = sampled(model, tokenizer, temperature=0.0), sampled(model, tokenizer, value_head=HEAD)
    assert furthest(rollout, plain_numbers(model, rollout, 1.0, HEAD)) < 1e-5
    for query, response in zip(QUERIES, greedy.responses):
        theirs = causal_lm(model).generate(
            torch.tensor([query]), do_sample=False, max_new_tokens=40, eos_token_id=tokenizer.eos_token_id
        )
        assert response == theirs[0, len(query) :].tolist()


# ---- several processes


def test_a_share_of_the_rows_draws_what_all_would(model, tokenizer):
    whole = sampled(model, tokenizer)
    part = sampled(model, tokenizer, QUERIES[1::2], streams=[1, 3, 5])
    assert part.responses == whole.responses[1::2]


def in_processes(n: int, body, folder) -> None:
    """body(rank) in n forked processes that can talk to each other; all must end well."""
    children = []
    for rank in range(n):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # the threads of the parent's pool are not here
                dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=n)
                body(rank)
                dist.barrier()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * n


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_sample_what_one_does(adapted, tokenizer, tmp_path, monkeypatch, sharded):
    queries = QUERIES[:5]  # three for one, two for the other; in batches of one, so that one has to wait for the other
    alone = sampled(adapted, tokenizer, queries, value_head=HEAD)

    def body(rank: int) -> None:
        monkeypatch.setattr(distributed, "_world", World(rank, 2, sharded))
        shared = generate_shared(
            adapted, tokenizer, queries, max_new_tokens=40, temperature=1.0, seed=3, device="cpu", batch_size=1, value_head=HEAD
        )
        assert shared == alone
        for ours, theirs in ((shared.logprobs, alone.logprobs), (shared.values, alone.values)):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))

    in_processes(2, body, tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device, and torch sees none here")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_on_cuda_the_captured_steps_sample_what_the_plain_ones_do(tiny_model, tokenizer, dtype):
    from tasks.decoder import decoder_for

    model = with_adapter(load_model(tiny_model / "model", dtype, "cuda"))
    captured = decoder_for(causal_lm(model), 100, torch.device("cuda"))
    assert captured is not None
    assert captured.graphs  # the probe's step was captured
    head = HEAD.to("cuda")
    rollout = sampled(model, tokenizer, device="cuda", value_head=head)
    HEAD.to("cpu")
    reference = with_adapter(load_model(tiny_model / "model", dtype, "cpu"))
    for name, parameter in reference.named_parameters():
        assert parameter.dtype == DTYPES["fp32" if ".lora_" in name else dtype]
    assert furthest(rollout, plain_numbers(reference, rollout, 1.0, HEAD)) < (1e-3 if dtype == "fp32" else 0.3)
