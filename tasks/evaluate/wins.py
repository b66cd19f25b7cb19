"""Who wins, question by question; and who would win if both wrote equally long answers.

Scores and lengths are (Q, S): S answers to each of Q questions. Every answer of one model meets every answer of the other
to the same question.
"""

import numpy as np

from tasks.evaluate.bootstrap import Interval, percentile_interval, resample_counts

RIDGE = 0.01  # keeps the fit finite when one side wins everything; worth a hundredth of an answer
CELLS = 2_000_000
REFITS = 1_000  # resamples of the regression at most: each is a fit of its own


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1 where ours scores higher, 0 where theirs does, a half at a tie; (Q, S), (Q, R) -> (Q, S * R)."""
    return (np.sign(differences(ours, theirs)) + 1) / 2


def differences(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """ours - theirs in the order of `wins`; (Q, S), (Q, R) -> (Q, S * R)."""
    return (ours[:, :, None] - theirs[:, None, :]).reshape(len(ours), -1)


def fit(
    won: np.ndarray, x: np.ndarray, weights: np.ndarray, start: tuple[float, float] = (0.0, 0.0)
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted logistic regressions P(win) = sigmoid(a + b x), by Newton's method; (N,), (N,), (R, N) -> (R,), (R,)."""
    a, b = (np.full(len(weights), value) for value in start)
    for _ in range(100):
        p = 0.5 * (1 + np.tanh((a[:, None] + b[:, None] * x) / 2))
        residual, curvature = weights * (won - p), weights * p * (1 - p)
        grad_a, grad_b = residual.sum(1) - RIDGE * a, residual @ x - RIDGE * b
        h_aa, h_ab, h_bb = curvature.sum(1) + RIDGE, curvature @ x, curvature @ (x * x) + RIDGE
        determinant = h_aa * h_bb - h_ab**2
        step_a = np.clip((h_bb * grad_a - h_ab * grad_b) / determinant, -1, 1)
        step_b = np.clip((h_aa * grad_b - h_ab * grad_a) / determinant, -1, 1)
        a, b = a + step_a, b + step_b
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < 1e-6:
            break
    return a, b


def length_controlled_win_rate(
    won: np.ndarray, length_difference: np.ndarray, *, samples: int, confidence: float, seed: int
) -> Interval | None:
    """The win rate at equal length: sigmoid(a) of P(win) = sigmoid(a + b tanh(d / s)); (Q, P), (Q, P).

    d is our length minus theirs and s its root mean square. This is the idea of AlpacaEval 2 (Dubois et al. 2024,
    https://arxiv.org/abs/2404.04475) without its terms for the question. Ties count as half a win. None where equal
    length was not seen, because one side wrote the longer answer nearly always: no fit can tell there.
    """
    d = length_difference.ravel().astype(np.float64)
    if min((d >= 0).mean(), (d <= 0).mean()) < 0.02:
        return None
    scale = float(np.sqrt((d**2).mean())) or 1.0
    x, y = np.tanh(d / scale), won.ravel()
    a, b = fit(y, x, np.ones((1, len(y))))
    refits = min(samples, REFITS)
    counts = np.repeat(resample_counts(len(won), refits, seed), won.shape[1], axis=1).astype(np.float64)
    chunk = max(1, CELLS // len(y))
    start = (float(a[0]), float(b[0]))
    rates = [_sigmoid(fit(y, x, counts[i : i + chunk], start)[0]) for i in range(0, refits, chunk)]
    return Interval(float(_sigmoid(a)[0]), *percentile_interval(np.concatenate(rates), confidence))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
