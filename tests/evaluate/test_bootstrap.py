import numpy as np
import pytest
from scipy import stats

from tasks.evaluate.bootstrap import gain_interval, mean_interval, percentile_interval, resample_counts

HOW = {"samples": 4000, "confidence": 0.95, "seed": 0}


def width(interval) -> float:
    return interval.high - interval.low


def test_on_a_normal_sample_the_interval_is_that_of_students_t():
    values = np.random.default_rng(1).normal(3, 2, size=300)
    found = mean_interval(values, **HOW)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(low, abs=0.05 * (high - low))
    assert found.high == pytest.approx(high, abs=0.05 * (high - low))


def test_a_95_percent_interval_holds_the_truth_in_about_95_of_100_samples():
    rng = np.random.default_rng(2)
    held = 0
    for seed in range(400):
        found = mean_interval(rng.exponential(1.0, size=80), samples=400, confidence=0.95, seed=seed)
        held += found.low <= 1.0 <= found.high
    assert 0.90 <= held / 400 <= 0.98


def test_ten_answers_that_say_the_same_are_no_more_evidence_than_one():
    rng = np.random.default_rng(3)
    one_each = rng.normal(size=100)
    answers = np.repeat(one_each[:, None], 10, axis=1)  # as everywhere here: (questions, answers), a mean a question
    clustered = mean_interval(answers.mean(1), **HOW)
    naive = mean_interval(answers.ravel(), **HOW)
    assert width(clustered) == pytest.approx(width(mean_interval(one_each, **HOW)))
    assert width(clustered) / width(naive) == pytest.approx(10**0.5, rel=0.1)


def test_pairing_removes_the_difficulty_that_both_share():
    rng = np.random.default_rng(4)
    difficulty = rng.normal(0, 5, size=200)
    ours, theirs = difficulty + 0.5 + rng.normal(0, 0.2, size=200), difficulty + rng.normal(0, 0.2, size=200)
    paired = gain_interval(ours, theirs, **HOW)
    assert paired.low > 0.4
    assert paired.high < 0.6
    assert width(mean_interval(ours, **HOW)) > 10 * width(paired)  # unpaired, half a point would drown


def test_the_gain_turned_round_is_its_negative():
    rng = np.random.default_rng(5)
    ours, theirs = rng.normal(size=50), rng.normal(size=50)
    there, back = gain_interval(ours, theirs, **HOW), gain_interval(theirs, ours, **HOW)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))


def test_a_constant_has_no_uncertainty():
    assert mean_interval(np.full(7, 0.1), **HOW) == pytest.approx((0.1, 0.1, 0.1), abs=1e-15)


def test_each_resample_draws_as_many_questions_as_there_are():
    counts = resample_counts(13, 500, seed=0)
    assert counts.shape == (500, 13)
    assert (counts.sum(1) == 13).all()
    assert counts.mean() == 1
    assert counts.var() == pytest.approx(1 - 1 / 13, rel=0.05)  # binomial(13, 1/13)


def test_more_confidence_is_a_wider_interval():
    values = np.random.default_rng(6).normal(size=60)
    widths = [width(mean_interval(values, samples=2000, confidence=c, seed=0)) for c in (0.6, 0.9, 0.99)]
    assert widths == sorted(widths)


def test_the_middle_half_of_0_to_100_is_25_to_75():
    assert percentile_interval(np.arange(101.0), 0.5) == (25.0, 75.0)


def test_the_same_seed_gives_the_same_interval_also_in_several_chunks(monkeypatch):
    values = np.random.default_rng(7).normal(size=40)
    assert mean_interval(values, **HOW) == mean_interval(values, **HOW)
    whole = mean_interval(values, **HOW)
    monkeypatch.setattr("tasks.evaluate.bootstrap.CELLS", 40 * 100)
    assert mean_interval(values, **HOW) == pytest.approx(whole, abs=0.05)


@pytest.mark.parametrize("values", [np.array([]), np.ones((2, 2)), np.array([1.0, np.nan]), np.array([1.0, np.inf])])
def test_what_is_not_one_finite_number_per_question_is_refused(values):
    with pytest.raises(ValueError, match="question"):
        mean_interval(values, **HOW)


def test_scores_of_different_questions_cannot_be_paired():
    with pytest.raises(ValueError, match="same questions"):
        gain_interval(np.ones(3), np.ones(4), **HOW)
