import math

import pytest
import torch

from tasks.ppo.losses import explained_variance, masked_mean, policy_loss, value_loss

ONE = torch.ones(1, 1, dtype=torch.bool)


def tokens(seed=0, batch=4, width=6):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) < torch.randint(1, width + 1, (batch,), generator=g)[:, None]
    return torch.randn(batch, width, generator=g) - 3, torch.randn(batch, width, generator=g), mask


def test_a_masked_mean_counts_real_tokens_only():
    x = torch.tensor([[1.0, 3.0, 99.0], [5.0, 99.0, 99.0]])
    assert masked_mean(x, torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()).item() == 3.0


def test_at_ratio_one_the_policy_loss_is_minus_the_mean_advantage():
    logprobs, advantages, mask = tokens()
    loss, clipfrac, ratio = policy_loss(logprobs, logprobs, advantages, mask, 0.2)
    assert loss.item() == pytest.approx(-advantages[mask].mean().item(), abs=1e-6)
    assert (clipfrac.item(), ratio.item()) == (0.0, 1.0)


def test_at_ratio_one_the_gradient_is_that_of_the_policy_gradient():
    logprobs, advantages, mask = tokens()
    logprobs.requires_grad_()
    policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2)[0].backward()
    assert torch.allclose(logprobs.grad, -advantages * mask / mask.sum())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 2.0, -2.4, 0.0),  # good and already likelier by more than the clip: no more
        (0.5, -2.0, 1.6, 0.0),  # bad and already rarer by more than the clip: no more
        (0.5, 2.0, -1.0, -1.0),  # good but rarer: pulled back, -A ratio
        (1.5, -2.0, 3.0, 3.0),  # bad but likelier: pulled back
        (1.1, 2.0, -2.2, -2.2),
    ],
)
def test_the_clip_by_hand(ratio, advantage, loss, gradient):
    logprobs = torch.full((1, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
    value, clipfrac, mean_ratio = policy_loss(
        logprobs, torch.zeros(1, 1).double(), torch.full((1, 1), advantage).double(), ONE, 0.2
    )
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(gradient)  # d(-A r)/d log r = -A r
    assert clipfrac.item() == (gradient == 0)
    assert mean_ratio.item() == pytest.approx(ratio)


def test_padding_changes_neither_loss_nor_gradient():
    logprobs, advantages, mask = tokens(1)
    results = []
    for garbage in (0.0, 1e4):
        new = logprobs.masked_fill(~mask, garbage).requires_grad_()
        loss = policy_loss(new, torch.zeros_like(new) - 3, advantages.masked_fill(~mask, garbage), mask, 0.2)[0]
        loss.backward()
        results.append((loss.item(), new.grad))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (1.0, 1.0, 3.0, 2.0, -2.0),  # half the squared error
        (1.5, 1.0, 3.0, 0.5 * 1.8**2, 0.0),  # already moved towards the return by more than the clip: no more
        (0.5, 1.0, 3.0, 0.5 * 2.5**2, -2.5),  # moved away: pulled back
    ],
)
def test_the_value_clip_by_hand(value, old, target, loss, gradient):
    values = torch.full((1, 1), value, requires_grad=True)
    result, clipfrac = value_loss(values, torch.full((1, 1), old), torch.full((1, 1), target), ONE, 0.2)
    result.backward()
    assert result.item() == pytest.approx(loss, abs=1e-6)
    assert values.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert clipfrac.item() == (gradient == 0)


def test_explained_variance_of_a_perfect_a_constant_and_a_wrong_critic():
    returns, _, mask = tokens(2)
    assert explained_variance(returns, returns, mask) == pytest.approx(1)
    assert explained_variance(returns + 5, returns, mask) == pytest.approx(1, abs=1e-5)
    assert explained_variance(torch.zeros_like(returns), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3, abs=1e-5)  # var(2R) = 4 var(R)
