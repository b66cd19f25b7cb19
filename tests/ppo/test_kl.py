import pytest
import torch

from tasks.ppo.kl import AdaptiveKLController, k1, k3


def distributions(seed=0, size=7):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, size, generator=g, dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize("estimator", [k1, k3])
@pytest.mark.parametrize("seed", range(5))
def test_both_estimators_are_unbiased(estimator, seed):
    logp, logq = distributions(seed)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logp), torch.distributions.Categorical(logits=logq)
    )
    assert (logp.exp() * estimator(logp, logq)).sum().item() == pytest.approx(exact.item())  # every outcome, by its probability


def test_k3_is_never_negative_and_varies_less():
    logp, logq = distributions(1)
    assert k3(logp, logq).min() >= 0
    assert k1(logp, logq).min() < 0

    def variance(x):
        return (logp.exp() * (x - (logp.exp() * x).sum()) ** 2).sum()

    assert variance(k3(logp, logq)) < variance(k1(logp, logq))
    assert k3(logp, logp).tolist() == [0.0] * 7


def test_the_controller_by_hand():
    controller = AdaptiveKLController(coef=0.2, target=6.0, horizon=10_000)
    controller.update(6.6, 500)  # error .1: 0.2 * (1 + .1 * .05)
    assert controller.coef == pytest.approx(0.201)
    controller.update(60.0, 500)  # error 9, clipped to .2: times 1.01
    assert controller.coef == pytest.approx(0.20301)
    controller.update(0.0, 1000)  # error -1, clipped to -.2: times .98
    assert controller.coef == pytest.approx(0.1989498)


def test_without_a_target_the_coefficient_stays():
    controller = AdaptiveKLController(coef=0.2, target=None, horizon=10_000)
    controller.update(100.0, 10_000)
    assert controller.coef == 0.2
