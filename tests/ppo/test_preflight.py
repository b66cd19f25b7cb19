"""Each check holds for a healthy set-up, and goes red for the mistake that it is there to find."""

import json

import pytest
import torch
from torch import nn

from tasks.models import add_lora, load_model, load_tokenizer, pad_right, use
from tasks.ppo import preflight
from tasks.ppo.forward import policy_forward, response_mask
from tasks.reward.model import load_reward
from tasks.rollout import generate
from tasks.sft.config import LoRAConfig

QUERIES = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16], [20, 21], [30, 31, 32, 33, 34]]


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model / "model")


@pytest.fixture
def model(tiny_model):
    return add_lora(load_model(tiny_model / "model", "fp32", "cpu"), LoRAConfig(r=4, alpha=8, dropout=0.2), "policy", 0).eval()


@pytest.fixture
def rollout(model, tokenizer):
    return generate(model, tokenizer, QUERIES, max_new_tokens=20, temperature=0.8, seed=5, device="cpu")


def shift(model):
    """Make the adapter do something."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)


def logprobs(model, rollout, temperature=0.8):
    with torch.no_grad():
        return policy_forward(model, rollout.queries, rollout.responses, temperature, 20, "cpu")[0]


def test_a_new_adapter_has_ratio_one_and_no_kl(model, rollout):
    mask, new = response_mask(rollout.responses, 20, "cpu"), logprobs(model, rollout)
    with use(model, None):
        ref = logprobs(model, rollout)
    assert preflight.check_ratio(new, logprobs(model, rollout), mask, "fp32").value == 0
    check = preflight.check_kl(new, ref, mask, "fp32")
    assert (check.ok, check.value) == (True, 0.0)


def test_another_temperature_is_seen_in_the_ratio(model, rollout):
    mask = response_mask(rollout.responses, 20, "cpu")
    assert not preflight.check_ratio(logprobs(model, rollout), logprobs(model, rollout, 1.0), mask, "fp32").ok


def test_an_adapter_that_is_not_new_is_seen_in_the_kl(model, rollout):
    with use(model, None):
        ref = logprobs(model, rollout)
    shift(model)
    assert not preflight.check_kl(logprobs(model, rollout), ref, response_mask(rollout.responses, 20, "cpu"), "fp32").ok


def test_dropout_is_seen(model):
    assert preflight.check_dropout(model).ok
    assert not preflight.check_dropout(model.train()).ok


def test_a_reference_that_is_not_the_base_is_seen(tiny_model, model):
    probe = pad_right([[5, 6, 7, 8]], 1, "cpu")
    with torch.no_grad():
        base_logits = load_model(tiny_model / "model", "fp32", "cpu")(input_ids=probe[0]).logits
    shift(model)  # which an adapter that is off must not show
    assert preflight.check_reference(model, probe, base_logits).ok
    model.get_base_model().model.norm.weight.data[0] += 1e-3
    assert not preflight.check_reference(model, probe, base_logits).ok


def test_a_rollout_agrees_with_the_forward_pass(model, tokenizer, rollout):
    checks = preflight.check_rollout(model, tokenizer, rollout, 5, 0.8, "fp32")
    assert all(check.ok for check in checks), checks
    assert checks[0].value == 0


@pytest.mark.parametrize("mistake", ["temperature", "seed", "adapter"])
def test_a_rollout_of_something_else_is_seen(model, tokenizer, rollout, mistake):
    seed, temperature = (6 if mistake == "seed" else 5), (1.3 if mistake == "temperature" else 0.8)
    if mistake == "adapter":
        shift(model)
    resampled = preflight.check_rollout(model, tokenizer, rollout, seed, temperature, "fp32")[0]
    assert not resampled.ok


def test_a_policy_that_cannot_end_is_seen(model, tokenizer):
    base = model.get_base_model()
    head = nn.Linear(base.config.hidden_size, base.config.vocab_size)
    head.weight.data.copy_(base.lm_head.weight)
    head.bias.data.zero_()[tokenizer.eos_token_id] = -100
    base.lm_head = head.requires_grad_(False)
    rollout = generate(model, tokenizer, QUERIES, max_new_tokens=20, temperature=0.8, seed=5, device="cpu")
    resampled, whole, eos = preflight.check_rollout(model, tokenizer, rollout, 5, 0.8, "fp32")
    assert resampled.ok
    assert whole.ok
    assert not eos.ok


def test_a_head_that_is_more_than_linear_is_seen(model, tokenizer, rollout):
    def soften(module, args, output):
        output.logits = 30 * torch.tanh(output.logits / 30)

    model.get_base_model().register_forward_hook(soften)
    assert not preflight.check_rollout(model, tokenizer, rollout, 5, 0.8, "fp32")[1].ok


def test_scores_do_not_depend_on_the_batch_and_it_is_seen_if_they_do(model, planted_reward, rollout):
    reward = load_reward(model, planted_reward, "reward")
    assert preflight.check_scores(reward, rollout, "fp32").ok

    def padded(queries, responses):  # what a score read behind the padding amounts to
        return torch.tensor([float(max(map(len, responses)))] * len(responses))

    reward.scores = padded
    assert not preflight.check_scores(reward, rollout, "fp32").ok


def test_prompts_that_do_not_fit_are_seen():
    assert all(check.ok for check in preflight.check_prompts(QUERIES, 8, 24, 32))
    assert [check.ok for check in preflight.check_prompts(QUERIES, 7, 24, 31)] == [False, False]


def test_a_failed_check_is_written_and_says_what_and_why(tmp_path):
    checks = [preflight.at_most("a", 1.0, 2.0, "fine"), preflight.at_most("max |ratio - 1|", float("nan"), 1e-5, "dropout")]
    with pytest.raises(preflight.PreflightError, match=r"max \|ratio - 1\| is nan, limit 1e-05: dropout"):
        preflight.report(checks, tmp_path / "preflight.json")
    written = json.loads((tmp_path / "preflight.json").read_text())
    assert [(row["ok"], row["value"]) for row in written] == [(True, 1.0), (False, None)]
