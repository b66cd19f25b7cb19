import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.ppo.advantages import gae, whiten


def rollout(seed, batch=5, width=9):
    """Random rewards and values with masks of every length from 1 on; numbers beyond the mask are garbage."""
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, batch, width, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (batch,), generator=g)
    return rewards, values, torch.arange(width) < lengths[:, None]


def double_sum(rewards, values, gamma, lam):
    """GAE(gamma, lambda) as the paper's equation 16 has it: sum over l of (gamma lambda)^l delta_{t+l}."""
    T = len(rewards)
    v = [*values, 0.0]
    return [sum((gamma * lam) ** k * (rewards[t + k] + gamma * v[t + k + 1] - v[t + k]) for k in range(T - t)) for t in range(T)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 1), st.floats(0, 1))
def test_gae_is_the_papers_sum(seed, gamma, lam):
    rewards, values, mask = rollout(seed)
    advantages = gae(rewards, values, mask, gamma, lam)
    for i, n in enumerate(mask.sum(-1).tolist()):
        expected = double_sum(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, lam)
        assert advantages[i, :n].tolist() == pytest.approx(expected, abs=1e-9)
        assert not advantages[i, n:].any()


def test_three_tokens_by_hand():
    # deltas: 1 + .5*3 - 2 = .5;  0 + .5*1 - 3 = -2.5;  4 - 1 = 3.   A2 = 3;  A1 = -2.5 + .25*3 = -1.75;  A0 = .5 - .25*1.75
    rewards, values = torch.tensor([[1.0, 0.0, 4.0]]), torch.tensor([[2.0, 3.0, 1.0]])
    advantages = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.0625, -1.75, 3.0]]


def test_with_lambda_one_the_advantage_is_return_minus_value():
    rewards, values, mask = rollout(1)
    to_go = (rewards * mask).flip(-1).cumsum(-1).flip(-1)
    assert torch.allclose(gae(rewards, values, mask, 1.0, 1.0), (to_go - values) * mask)


def test_with_lambda_zero_the_advantage_is_the_td_error():
    rewards, values, mask = rollout(2)
    inside = values * mask
    following = torch.cat([inside[:, 1:], torch.zeros(5, 1)], dim=1)
    assert torch.allclose(gae(rewards, values, mask, 0.9, 0.0), (rewards + 0.9 * following - values) * mask)


def test_gae_leaves_its_inputs_alone():
    rewards, values, mask = rollout(3)
    before = rewards.clone(), values.clone(), mask.clone()
    gae(rewards, values, mask, 1.0, 0.95)
    assert all(torch.equal(a, b) for a, b in zip(before, (rewards, values, mask)))


def test_whitened_advantages_have_mean_zero_and_deviation_one_over_the_batch():
    x, _, mask = rollout(4, batch=20)
    white = whiten(3 * x + 7, mask)[mask]
    assert white.mean().item() == pytest.approx(0, abs=1e-12)
    assert white.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_whitening_ignores_what_the_mask_hides():
    x, _, mask = rollout(5)
    assert torch.allclose(whiten(x, mask), whiten(x.masked_fill(~mask, 1e6), mask))
    assert not whiten(x, mask)[~mask].any()


def test_whitening_over_the_batch_keeps_the_better_answer_better():
    # one good and one bad answer; StackLLaMA's trainer whitened each apart, after which both had mean 0
    advantages = torch.tensor([[2.0, 2.2, 1.8], [-2.0, -1.8, -2.2]])
    mask = torch.ones(2, 3, dtype=torch.bool)
    whole = whiten(advantages, mask).mean(-1)
    apart = torch.cat([whiten(advantages[i : i + 1], mask[i : i + 1]) for i in range(2)]).mean(-1)
    assert whole[0] > 0.9
    assert whole[1] < -0.9
    assert apart.abs().max() < 1e-6
