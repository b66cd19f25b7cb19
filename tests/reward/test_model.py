"""The reward model's scores are properties of the text alone, and survive a stay on disk."""

import json
import math
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from tasks.models import adapter_parameters, add_lora, hidden_states, load_model, use
from tasks.reward.model import RewardModel, ScoreHead, _passes, load_reward, save, similar_lengths
from tasks.sft.config import LoRAConfig


def texts(n: int, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Queries and responses of mixed lengths; the ids hold eos (0) and pad (1) too, which must not matter."""
    rng = random.Random(seed)
    return (
        [[rng.randrange(300) for _ in range(rng.randint(3, 20))] for _ in range(n)],
        [[rng.randrange(300) for _ in range(rng.randint(1, 60))] for _ in range(n)],
    )


def reward_model(
    tiny_model, name: str = "reward", dropout: float = 0.0, dtype: str = "fp32", quantization: str = "none"
) -> RewardModel:
    """A reward model whose adapter does something: B is not zero."""
    base = load_model(tiny_model / "model", dtype, "cpu", quantization)
    model = add_lora(base, LoRAConfig(r=4, alpha=8, dropout=dropout), name, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return RewardModel(model, name, ScoreHead(32, seed=7), mean=0.25, std=2.0)


@pytest.fixture(scope="module")
def reward(tiny_model) -> RewardModel:
    return reward_model(tiny_model)


def test_the_head_starts_at_zero_bias_and_a_spread_of_one_over_root_of_width_plus_one():
    head = ScoreHead(40_000)
    assert head.bias.item() == 0.0
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(40_001), rel=0.02)
    assert head.weight.mean().item() == pytest.approx(0, abs=1e-4)
    assert not torch.equal(ScoreHead(8, seed=1).weight, ScoreHead(8, seed=2).weight)
    torch.testing.assert_close(ScoreHead(8, seed=1).weight, ScoreHead(8, seed=1).weight)


def test_the_head_computes_in_fp32_on_a_bf16_trunk():
    hidden = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    head = ScoreHead(8)
    expected = (hidden.double() @ head.weight.double().T).float()
    assert head(hidden).dtype == torch.float32
    torch.testing.assert_close(head(hidden), expected)


def test_the_score_is_the_head_on_the_last_tokens_hidden_state_as_transformers_gives_it(reward):
    queries, responses = texts(3)
    for query, response, score in zip(queries, responses, reward.scores(queries, responses), strict=True):
        with torch.no_grad(), use(reward.model, "reward"):
            output = reward.model(input_ids=torch.tensor([query + response]), output_hidden_states=True)
        assert score.item() == pytest.approx((output.hidden_states[-1][0, -1] @ reward.head.weight[0]).item(), abs=1e-5)


def test_a_score_does_not_depend_on_the_texts_beside_it(reward):
    queries, responses = texts(20)
    together = reward.scores(queries, responses)
    alone = torch.cat([reward.scores([q], [r]) for q, r in zip(queries, responses, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.std() > 0.1  # not a constant


@pytest.mark.parametrize("padding", [0, 1, 40])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_score_equals_that_of_a_padded_batch_whatever_its_padding(reward, side, padding):
    queries, responses = texts(6)
    sequences = [q + r for q, r in zip(queries, responses, strict=True)]
    width = max(map(len, sequences)) + padding
    fill = [[1] * (width - len(s)) for s in sequences]
    rows = [s + f if side == "right" else f + s for s, f in zip(sequences, fill, strict=True)]
    ones = [[1] * len(s) for s in sequences]
    mask = [o + [0] * len(f) if side == "right" else [0] * len(f) + o for o, f in zip(ones, fill, strict=True)]
    with torch.no_grad(), use(reward.model, "reward"):
        hidden = hidden_states(reward.model, torch.tensor(rows), torch.tensor(mask))
    last = [len(s) - 1 if side == "right" else width - 1 for s in sequences]
    expected = hidden[range(6), last] @ reward.head.weight[0].detach()
    torch.testing.assert_close(reward.scores(queries, responses), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [3, 30, 150])
def test_a_score_does_not_depend_on_the_length_of_the_text_beside_it(reward, length):
    beside = reward.scores([[5, 6, 7], [11] * length], [[8, 9], [12] * length])
    torch.testing.assert_close(beside[:1], reward.scores([[5, 6, 7]], [[8, 9]]), atol=1e-5, rtol=0)


def test_scores_come_back_in_the_order_of_the_texts(reward):
    queries, responses = texts(20)
    order = list(range(20))
    random.Random(1).shuffle(order)
    shuffled = reward.scores([queries[i] for i in order], [responses[i] for i in order])
    torch.testing.assert_close(shuffled, reward.scores(queries, responses)[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [1, 100, 400])
def test_the_size_of_a_micro_batch_changes_no_score(reward, tokens):
    queries, responses = texts(20)
    small = RewardModel(reward.model, "reward", reward.head, micro_batch_tokens=tokens)
    torch.testing.assert_close(small.scores(queries, responses), reward.scores(queries, responses), atol=1e-5, rtol=0)


def test_pad_and_eos_ids_inside_a_text_are_tokens_like_any_other(reward):
    eos, pad = 0, 1
    plain, with_pad, with_eos = reward.scores([[5, 6]] * 3, [[7], [7, pad], [7, eos]])
    assert len({round(score.item(), 4) for score in (plain, with_pad, with_eos)}) == 3


def test_groups_of_similar_length_hold_every_index_once_and_keep_to_the_limit():
    lengths = [random.Random(0).randint(1, 500) for _ in range(100)] + [9000]
    groups = list(similar_lengths(lengths, max_tokens=4096))
    assert sorted(i for group in groups for i in group) == list(range(101))
    assert all(len(group) * max(lengths[i] for i in group) <= 4096 for group in groups if len(group) > 1)


@pytest.mark.parametrize("tokens", [1, 60, 100_000])
def test_responses_to_one_query_score_as_each_alone(reward, tokens):
    queries, responses = texts(12)
    queries = [queries[i] for i in (0, 1, 2, 0, 1, 0, 3, 0, 1, 0, 0, 3)]
    grouped = RewardModel(reward.model, "reward", reward.head, micro_batch_tokens=tokens).scores(queries, responses)
    alone = torch.cat([reward.scores([q], [r]) for q, r in zip(queries, responses, strict=True)])
    torch.testing.assert_close(grouped, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "quantization", "tolerance"), [("fp32", "none", 1e-5), ("fp32", "8bit", 1e-5), ("bf16", "none", 0.1)]
)
def test_gradients_of_a_tree_are_those_of_its_texts_one_by_one(tiny_model, dtype, quantization, tolerance):
    """bf16 rounds each hidden state to 8 bits: a tenth of the gradient's spread; the other two are as exact as fp32."""
    reward = reward_model(tiny_model, dtype=dtype, quantization=quantization)
    _, responses = texts(5)
    weights = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3])
    query, gradients, scores = [5, 6, 7, 8, 9, 10], [], []
    for one_by_one in (False, True):
        parameters = [*adapter_parameters(reward.model, "reward"), *reward.head.parameters()]
        for parameter in parameters:
            parameter.grad = None
        parts = [[i] for i in range(5)] if one_by_one else [list(range(5))]
        scores.append(torch.cat([reward.forward([query] * len(p), [responses[i] for i in p]) for p in parts]))
        (scores[-1] * weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    assert (scores[0] - scores[1]).abs().max() < tolerance * max(1, scores[1].std())
    assert (gradients[0] - gradients[1]).std() < tolerance * gradients[1].std()
    assert gradients[1].std() > 1e-3


def test_a_pass_holds_no_more_tokens_than_it_may_and_each_text_stands_in_one():
    queries, responses = texts(40)
    queries = [queries[i % 7] for i in range(40)]
    passes = list(_passes(queries, responses, 150))
    assert sorted(i for trees in passes for rows in trees for i in rows) == list(range(40))
    sizes = [sum(len(queries[rows[0]]) + sum(len(responses[i]) for i in rows) for rows in trees) for trees in passes]
    assert max(sizes) <= 150
    assert all(len({tuple(queries[i]) for i in rows}) == 1 for trees in passes for rows in trees)
    assert len(passes) < sum(map(len, responses)) / 150 + 7


def test_no_texts_have_no_scores(reward):
    assert reward.scores([], []).shape == (0,)


def test_scoring_has_no_dropout_and_leaves_the_model_in_its_mode(tiny_model):
    reward = reward_model(tiny_model, dropout=0.5)
    queries, responses = texts(5)
    reward.model.train()
    torch.testing.assert_close(reward.scores(queries, responses), reward.scores(queries, responses), atol=0, rtol=0)
    assert reward.model.training
    assert not torch.equal(reward.forward(queries, responses), reward.forward(queries, responses))  # training does have it


def test_normalised_scores_subtract_the_mean_and_divide_by_the_spread(reward):
    assert reward.normalise(torch.tensor([0.25, 2.25])).tolist() == [0.0, 1.0]


def test_saved_and_loaded_it_gives_the_same_scores(reward, tiny_model, tmp_path):
    save(reward, tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} == {
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "head.safetensors", "score.json",
    }  # fmt: skip
    loaded = load_reward(load_model(tiny_model / "model", "fp32", "cpu"), tmp_path, "reward")
    queries, responses = texts(12)
    assert torch.equal(loaded.scores(queries, responses), reward.scores(queries, responses))
    assert (loaded.mean, loaded.std) == (0.25, 2.0)
    assert not any(p.requires_grad for p in [*loaded.model.parameters(), *loaded.head.parameters()])


def test_reward_model_and_judge_share_a_trunk_without_disturbing_each_other(reward, tiny_model, tmp_path):
    save(reward, tmp_path)
    judge = load_reward(reward.model, tmp_path, "judge", trainable=True)
    queries, responses = texts(6)
    with torch.no_grad():
        for parameter in adapter_parameters(judge.model, "judge"):
            parameter.mul_(0.5)
    fresh = reward_model(tiny_model)
    assert torch.equal(RewardModel(judge.model, "reward", reward.head).scores(queries, responses), fresh.scores(queries, responses))
    assert not torch.allclose(judge.scores(queries, responses), fresh.scores(queries, responses))
    assert all(p.requires_grad for p in judge.head.parameters())


@pytest.fixture
def saved(reward, tmp_path):
    save(reward, tmp_path)
    return tmp_path


def refused(tiny_model, folder, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        load_reward(load_model(tiny_model / "model", "fp32", "cpu"), folder, "reward")
    assert "\n" not in str(error.value)


def test_a_reward_model_without_its_head_is_refused(saved, tiny_model):
    (saved / "head.safetensors").unlink()
    refused(tiny_model, saved, "head.safetensors is missing: without its head")


def test_a_head_of_another_width_is_refused(saved, tiny_model):
    ScoreHead(16).save(saved)
    refused(tiny_model, saved, "reads 16 features, but the model has 32")


def test_a_head_with_other_tensors_or_infinite_weights_is_refused(saved, tiny_model):
    tensors = load_file(saved / "head.safetensors")
    save_file({"weight": tensors["weight"]}, saved / "head.safetensors")
    refused(tiny_model, saved, "not a finite head weight")
    save_file({**tensors, "bias": torch.tensor([float("nan")])}, saved / "head.safetensors")
    refused(tiny_model, saved, "not a finite head weight")
    (saved / "head.safetensors").write_bytes(b"not safetensors")
    refused(tiny_model, saved, "cannot be read")


def test_a_missing_adapter_is_refused(saved, tiny_model):
    shutil.rmtree(saved / "adapter")
    refused(tiny_model, saved, "adapter is missing")


@pytest.mark.parametrize("scale", ["", "{}", '{"mean": 0, "std": 0}', '{"mean": NaN, "std": 1}', '{"mean": null, "std": 1}'])
def test_a_score_scale_that_cannot_normalise_is_refused(saved, tiny_model, scale):
    (saved / "score.json").write_text(scale)
    refused(tiny_model, saved, "score.json")


def test_another_class_of_model_is_refused(saved, tiny_model):
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_model / "model", num_labels=1)
    with pytest.raises(ValueError, match="not on a LlamaForSequenceClassification"):
        load_reward(classifier, saved, "reward")


def test_the_stored_scale_is_plain_json(saved):
    assert json.loads((saved / "score.json").read_text()) == {"mean": 0.25, "std": 2.0}
