import math

import pytest
import torch

from tasks.mismatch import mismatch
from tasks.models import load_model, load_tokenizer
from tasks.ppo.forward import policy_forward, stack
from tasks.ppo.losses import importance
from tasks.rollout import generate

MASK = torch.tensor([[True, True], [True, False]])


def test_where_the_two_agree_every_token_counts():
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    assert mismatch(logprobs, logprobs, MASK) == {
        "sampling/mean_difference": 0.0, "sampling/max_difference": 0.0, "sampling/ess": 1.0
    }  # fmt: skip


def test_mismatch_by_hand():
    # weights p / p_sampler: 2, 1, 1/2; what stands outside the mask says nothing. (3.5)^2 / (3 * 5.25) = 7/9
    ours, theirs = torch.tensor([[0.5, 0.2], [0.1, 0.9]]).log(), torch.tensor([[0.25, 0.2], [0.2, 0.0]]).log()
    found = mismatch(ours, theirs, MASK)
    assert found["sampling/max_difference"] == pytest.approx(math.log(2))
    assert found["sampling/mean_difference"] == pytest.approx(2 * math.log(2) / 3)
    assert found["sampling/ess"] == pytest.approx(7 / 9)


def test_a_token_that_the_trainer_holds_for_impossible_is_no_rounding():
    with pytest.raises(ValueError, match="1 of 3 sampled tokens"):
        mismatch(torch.tensor([[-1.0, -math.inf], [-1.0, 0.0]]), torch.full((2, 2), -1.0), MASK)


@pytest.fixture(scope="module")
def engine(tiny_model):
    """A second engine in truth: the same base rounded to bf16, sampled in batches of its own; and the trainer's fp32 passes."""
    tokenizer = load_tokenizer(tiny_model / "model")
    trainer, rounded = load_model(tiny_model / "model", "fp32", "cpu"), load_model(tiny_model / "model", "bf16", "cpu")
    rollout = generate(
        rounded, tokenizer, [[5, 6, 7]] * 1_500, max_new_tokens=2, temperature=1.0, seed=0, device="cpu", batch_size=500
    )
    with torch.no_grad():
        ours, _ = policy_forward(trainer, rollout.queries, rollout.responses, 1.0, 2, "cpu")
    mask = torch.arange(2) < torch.tensor([len(r) for r in rollout.responses])[:, None]
    return rollout, ours, stack(rollout.logprobs, 2, torch.device("cpu")), mask


def test_a_bf16_engine_differs_from_an_fp32_trainer_and_the_report_says_by_how_much(engine):
    _, ours, theirs, mask = engine
    found = mismatch(ours, theirs, mask)
    assert 1e-4 < found["sampling/mean_difference"] < found["sampling/max_difference"] < 0.5
    assert 0.95 < found["sampling/ess"] < 1


def test_weighted_by_importance_an_engines_tokens_stand_for_the_trainers(tiny_model):
    # an engine that is far off: its first token is drawn at temperature 1.5, the trainer's is at 1
    tokenizer, model = load_tokenizer(tiny_model / "model"), load_model(tiny_model / "model", "fp32", "cpu")
    queries = [[5, 6, 7]] * 10_000
    rollout = generate(model, tokenizer, queries, max_new_tokens=1, temperature=1.5, seed=0, device="cpu", batch_size=5_000)
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([[5, 6, 7]])).logits[0, -1], -1)
    drawn = torch.tensor([r[0] for r in rollout.responses])
    weights = importance(p[drawn].log(), torch.cat(rollout.logprobs), cap=1e9)
    likely = p.argsort(descending=True)[:10]
    wanted, plain = float(p[likely].sum()), float(torch.isin(drawn, likely).float().mean())
    weighted = float((weights * torch.isin(drawn, likely)).mean())
    assert abs(plain - wanted) > 0.03
    assert abs(weighted - wanted) < 0.02
    assert weights.mean().item() == pytest.approx(1, abs=0.02)
    assert importance(p[drawn].log(), torch.cat(rollout.logprobs), cap=2.0).max() <= 2
