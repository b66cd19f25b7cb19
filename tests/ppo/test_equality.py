"""What was made fast gives the numbers of the plain computation: one document at a time, the whole model, autograd's gradients."""

import pytest
import torch
from torch.nn import functional as F

from tasks.compute import Compute
from tasks.models import causal_lm, checkpoint_gradients, use
from tasks.ppo.config import PPOConfig
from tasks.ppo.forward import response_mask
from tasks.ppo.losses import importance
from tasks.ppo.models import forward_rollout, load, policy_pass, sample_responses, score, value_pass
from tasks.ppo.update import Batch, backward
from tasks.rollout import Rollout

QUERIES = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16, 17], [20], [30, 31, 32, 33, 34, 35, 36]]
RESPONSES = [[40, 41, 42, 43, 44], [50], [60, 61, 62, 63, 64, 65, 66], [70, 71, 0]]
ROLLOUT = Rollout(QUERIES, RESPONSES, [False, False, False, True])
WIDTH = 7

TOLERANCE = {("fp32", "none"): 1e-5, ("fp32", "8bit"): 1e-5, ("fp32", "4bit"): 1e-5, ("bf16", "none"): 0.03}
"""Of log-probabilities, values and losses, absolute; of gradients, as a share of the largest."""


@pytest.fixture
def make(tiny_model, planted_reward):
    """PPO on the tiny model with adapters that do something."""

    def make(value="policy_trunk", **changes):
        config = PPOConfig(
            steps=1, batch_size=4, minibatch_size=4, max_query_tokens=32, max_new_tokens=7, value_warmup_steps=0, eval_every=1,
            eval_queries=1, value=value, temperature=0.8, lora={"r": 4, "alpha": 8, "dropout": 0.0}, **changes,
        )  # fmt: skip
        compute = Compute(device="cpu", threads=1)
        ppo = load(config, tiny_model, planted_reward, torch.device("cpu"), compute)
        g = torch.Generator().manual_seed(0)
        for name, parameter in ppo.model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=g))
        return ppo

    return make


def plain_states(ppo, i):
    """Of one text by the model's own forward pass, without packing; the rows that predict its response."""
    output = causal_lm(ppo.model)(torch.tensor([QUERIES[i] + RESPONSES[i]]), output_hidden_states=True)
    rows = slice(len(QUERIES[i]) - 1, -1)
    return output.hidden_states[-1][0, rows], output.logits[0, rows].float()


def plain_numbers(ppo, i):
    """Log-probabilities, entropies and values of one response."""
    with use(ppo.model, "policy"):
        states, logits = plain_states(ppo, i)
    if not ppo.shared:
        with use(ppo.model, "value"):
            states, _ = plain_states(ppo, i)
    logp = F.log_softmax(logits / ppo.config.temperature, -1)
    tokens = torch.tensor(RESPONSES[i])[:, None]
    values = F.linear(states.float(), ppo.value_head.weight, ppo.value_head.bias)[:, 0]
    return logp.gather(1, tokens)[:, 0], -(logp.exp() * logp).sum(-1), values


def batch():
    g = torch.Generator().manual_seed(1)
    mask = response_mask(RESPONSES, WIDTH, "cpu")
    old_logprobs, old_values, advantages, returns = (torch.randn(4, WIDTH, generator=g) * mask for _ in range(4))
    return Batch(ROLLOUT, mask, old_logprobs - 5, old_values, advantages, returns)


def plain_loss(ppo, batch, counts=(1, 1, 1, 1)):
    """The losses as the recipe writes them, token by token over the whole minibatch; counts: of each response's tokens."""
    clip, policy_terms, value_terms = 0.2, [], []
    for i, response in enumerate(RESPONSES):
        logprobs, _, values = plain_numbers(ppo, i)
        for t in range(len(response)):
            ratio, advantage = torch.exp(logprobs[t] - batch.old_logprobs[i, t]), batch.advantages[i, t]
            worse = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
            policy_terms.append(counts[i] * worse)
            old, target = batch.old_values[i, t], batch.returns[i, t]
            near = torch.max(torch.min(values[t], old + clip), old - clip)
            value_terms.append(0.5 * torch.max((values[t] - target) ** 2, (near - target) ** 2))
    return sum(policy_terms) / len(policy_terms), sum(value_terms) / len(value_terms)


def gradients(ppo):
    parameters = ppo.policy_parameters() + ppo.value_parameters()
    found = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return found


def close(actual, expected, tolerance):
    return float((actual - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("numerics", TOLERANCE)
@pytest.mark.parametrize("value", ["policy_trunk", "adapter"])
def test_a_pass_over_a_rollout_is_the_whole_models(make, value, numerics):
    dtype, quantization = numerics
    ppo, tolerance = make(value, dtype=dtype, quantization=quantization), TOLERANCE[numerics]
    logprobs, entropies, *values = policy_pass(ppo, ROLLOUT, WIDTH)
    values = values or [value_pass(ppo, ROLLOUT, WIDTH)]
    with torch.no_grad():
        for i, response in enumerate(RESPONSES):
            expected = plain_numbers(ppo, i)
            for table, row in zip((logprobs, entropies, values[0]), expected):
                assert close(table[i, : len(response)], row, tolerance)
                assert not table[i, len(response) :].any()


@pytest.mark.parametrize("numerics", TOLERANCE)
@pytest.mark.parametrize("value", ["policy_trunk", "adapter"])
def test_losses_and_gradients_of_the_update_are_the_plain_ones(make, value, numerics):
    dtype, quantization = numerics
    ppo, tolerance = make(value, dtype=dtype, quantization=quantization), TOLERANCE[numerics]
    metrics = backward(ppo, batch(), [0, 1, 2, 3], policy=True)
    ours = gradients(ppo)
    policy_loss, value_loss = plain_loss(ppo, batch())
    (policy_loss + 0.1 * value_loss).backward()
    theirs = gradients(ppo)
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())
    assert metrics["policy/loss"] == pytest.approx(policy_loss.item(), rel=tolerance, abs=tolerance)
    assert metrics["val/loss"] == pytest.approx(value_loss.item(), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("value", ["policy_trunk", "adapter"])
def test_micro_batches_of_any_size_give_the_same_gradients(make, value):
    ppo, found = make(value), []
    for ppo.micro_batch_tokens in (1, 18, 16_384):
        metrics = backward(ppo, batch(), [3, 0, 2, 1], policy=True)
        found.append((gradients(ppo), metrics, len(ppo.micro_batches(ROLLOUT, [3, 0, 2, 1]))))
    whole = found[-1]
    for flat, metrics, _ in found:
        assert float((flat - whole[0]).abs().max()) <= 1e-5 * float(whole[0].abs().max())
        assert metrics == pytest.approx(whole[1], rel=1e-5)
    assert [passes for *_, passes in found] == [4, 2, 1]


@pytest.mark.parametrize("value", ["policy_trunk", "adapter"])
def test_layers_that_run_again_give_the_same_gradients(make, value):
    ppo = make(value)
    backward(ppo, batch(), [0, 1, 2, 3], policy=True)
    kept = gradients(ppo)
    checkpoint_gradients(ppo.model)
    backward(ppo, batch(), [0, 1, 2, 3], policy=True)
    assert torch.equal(gradients(ppo), kept)


def test_the_critic_alone_leaves_the_policys_trunk_without_gradients(make):
    for value in ("policy_trunk", "adapter"):
        ppo = make(value)
        metrics = backward(ppo, batch(), [0, 1, 2, 3], policy=False)
        assert all(parameter.grad is None for parameter in ppo.policy_parameters())
        assert all(parameter.grad is not None for parameter in ppo.value_parameters())
        assert set(metrics) == {"val/loss", "val/clipfrac"}


@pytest.mark.parametrize("value", ["policy_trunk", "adapter"])
def test_what_the_sampler_says_of_its_tokens_is_what_a_forward_pass_says(make, value):
    ppo = make(value)
    rollout = sample_responses(ppo, QUERIES, seed=3)
    width = max(map(len, rollout.responses))
    for sampled, passed in zip(forward_rollout(ppo, rollout, width, True), forward_rollout(ppo, rollout, width, False)):
        assert float((sampled - passed).abs().max()) <= 1e-5


def test_scores_are_those_of_each_text_alone(make):
    ppo = make()
    with torch.no_grad(), use(ppo.model, "reward"):
        for i, found in enumerate(score(ppo, ppo.reward, ROLLOUT).tolist()):
            states = causal_lm(ppo.model)(torch.tensor([QUERIES[i] + RESPONSES[i]]), output_hidden_states=True).hidden_states[-1]
            assert found == pytest.approx(float(ppo.reward.head(states[0, -1])), abs=1e-5)


def test_tokens_of_another_engine_count_by_their_importance(make):
    ppo, weighed = make(), batch()
    engine = weighed.old_logprobs + torch.tensor([[2.0], [-2.0], [0.5], [0.0]])
    weighed.weights = importance(weighed.old_logprobs, engine, cap=2.0)
    backward(ppo, weighed, [0, 1, 2, 3], policy=True)
    ours = gradients(ppo)
    policy_loss, value_loss = plain_loss(ppo, batch(), counts=(0.1353353, 2.0, 0.6065307, 1.0))  # e^-2, the cap, e^-0.5, 1
    (policy_loss + 0.1 * value_loss).backward()
    theirs = gradients(ppo)
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
