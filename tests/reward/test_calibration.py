"""Calibration: a hand example, and synthetic votes whose probabilities are known."""

import math

import numpy as np
import pytest

from tasks.reward.calibration import (
    calibrate,
    confidence,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
)


def votes(n: int, scale: float, seed: int = 0) -> np.ndarray:
    """Score differences of n pairs, chosen first; the votes follow sigmoid(difference), the model says `scale` times as much."""
    rng = np.random.default_rng(seed)
    true = rng.normal(0, 1.5, size=n)
    turned = rng.random(n) >= 1 / (1 + np.exp(-true))
    return scale * np.where(turned, -true, true)


def test_the_error_of_four_pairs_by_hand():
    # bin [.5, .55): confidence .5, accuracy .5 -> 0; bin [.9, .95): confidence .92, accuracy .5 -> .42, half of all pairs
    error = expected_calibration_error(np.array([0.5, 0.5, 0.92, 0.92]), np.array([1.0, 0.0, 1.0, 0.0]))
    assert error == pytest.approx(0.21)


def test_certainty_falls_into_the_last_bin():
    assert reliability(np.array([1.0]), np.array([1.0])) == [{"confidence": 1.0, "accuracy": 1.0, "n": 1}]


def test_confidence_is_that_of_the_answer_the_model_prefers():
    assert confidence(np.array([math.log(3), -math.log(3), 0.0])).tolist() == pytest.approx([0.75, 0.75, 0.5])
    assert confidence(np.array([-1e9])).tolist() == [1.0]


def test_votes_that_follow_the_scores_are_calibrated():
    difference = votes(20_000, scale=1.0)
    assert expected_calibration_error(confidence(difference), (difference > 0).astype(float)) < 0.015
    assert fit_temperature(difference) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("scale", [0.4, 3.0])
def test_the_temperature_undoes_a_scale_of_the_scores(scale):
    result = calibrate(votes(20_000, scale), np.arange(20_000))
    assert result["temperature"] == pytest.approx(scale, rel=0.06)
    assert result["ece"] > 0.08
    assert result["ece_with_temperature"] < 0.025
    assert result["nll_with_temperature"] < result["nll"]


def test_scores_that_say_nothing_get_the_highest_temperature_and_log_two():
    difference = np.tile([1.0, -1.0], 50)
    assert fit_temperature(difference) > 90
    assert negative_log_likelihood(difference, 1e9) == pytest.approx(math.log(2))


def test_the_temperature_is_fitted_on_other_questions_than_it_is_measured_on():
    result = calibrate(votes(300, 1.0), np.repeat(np.arange(100), 3))
    assert result["n_pairs_fitted"] == result["n_pairs_held_out"] == 150
    assert sum(row["n"] for row in result["bins"]) == 150


def test_one_question_is_too_few_and_the_remedy_is_said():
    with pytest.raises(ValueError, match="max_eval_questions"):
        calibrate(np.array([1.0, 2.0]), np.array([0, 0]))
