"""Estimating the KL divergence from samples, and steering it (rows 8 and 9)."""

from dataclasses import dataclass

from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log p - log q of tokens sampled from p: unbiased for KL(p || q), of either sign; any shape."""
    return logprobs - ref_logprobs


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(d) - 1 - d, d = log q - log p: unbiased, never negative, of less variance (http://joschu.net/blog/kl-approx.html)."""
    d = ref_logprobs - logprobs
    return d.expm1() - d


@dataclass
class AdaptiveKLController:
    """coef *= 1 + clip(kl / target - 1, -.2, .2) * n / horizon, n in episodes (Ziegler et al. 2019, 2.2; N P-11).

    With no target the coefficient stays as it is.
    """

    coef: float
    target: float | None
    """Nats per response."""
    horizon: int
    """Episodes."""

    def update(self, kl: float, episodes: int) -> None:
        """Steer after a rollout of so many episodes whose mean KL, nats per response, was `kl`."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * episodes / self.horizon
