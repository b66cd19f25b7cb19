import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tasks.evaluate.wins import RIDGE, differences, fit, length_controlled_win_rate, wins

HOW = {"samples": 300, "confidence": 0.95, "seed": 0}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_wins_by_hand_ties_are_half():
    ours, theirs = np.array([[1.0, 2.0], [0.0, 5.0]]), np.array([[1.0], [3.0]])
    assert wins(ours, theirs).tolist() == [[0.5, 1.0], [0.0, 1.0]]  # a rate of 2.5 / 4


def test_every_answer_meets_every_answer_to_the_same_question():
    ours, theirs = np.array([[1.0, 3.0]]), np.array([[2.0, 3.0, 4.0]])
    assert wins(ours, theirs).tolist() == [[0, 0, 0, 1, 0.5, 0]]
    assert differences(ours, theirs).tolist() == [[-1, -2, -3, 1, 0, -1]]


def test_what_one_wins_the_other_loses():
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(5, size=(30, 2)).astype(float), rng.integers(5, size=(30, 3)).astype(float)
    assert wins(ours, theirs).mean() + wins(theirs, ours).mean() == pytest.approx(1)


def test_two_models_that_differ_by_length_alone_are_even_once_length_is_controlled():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(60, 20, size=(500, 2)), rng.normal(40, 20, size=(500, 2))
    longer = differences(ours, theirs)
    loves_length = (rng.random(longer.shape) < sigmoid(longer / 15)).astype(float)
    assert loves_length.mean() > 0.65
    found = length_controlled_win_rate(loves_length, longer, **HOW)
    assert found.value == pytest.approx(0.5, abs=0.05)
    assert found.low < 0.5 < found.high


def test_a_judge_who_only_counts_tokens_finds_them_even_too():
    rng = np.random.default_rng(2)
    ours, theirs = rng.integers(30, 90, size=(300, 2)), rng.integers(20, 80, size=(300, 2))
    found = length_controlled_win_rate(wins(ours, theirs), differences(ours, theirs), **HOW)
    assert wins(ours, theirs).mean() > 0.6
    assert found.value == pytest.approx(0.5, abs=0.05)


def test_an_advantage_at_equal_length_survives_the_control():
    rng = np.random.default_rng(3)
    longer = rng.normal(-10, 20, size=(800, 2))  # the better model writes shorter answers, the judge likes long ones
    x = np.tanh(longer / np.sqrt((longer**2).mean()))
    won = (rng.random(longer.shape) < sigmoid(1.0 + 2.0 * x)).astype(float)
    found = length_controlled_win_rate(won, longer, **HOW)
    assert found.low < sigmoid(1.0) < found.high
    assert found.value > won.mean() + 0.05


def test_without_any_difference_in_length_it_is_the_plain_win_rate():
    won = np.array([[1.0], [1.0], [0.0], [0.5]] * 50)
    found = length_controlled_win_rate(won, np.zeros_like(won), **HOW)
    assert found.value == pytest.approx(0.625, abs=1e-3)


def test_a_model_that_always_writes_more_cannot_be_compared_at_equal_length():
    assert length_controlled_win_rate(np.ones((50, 1)), np.full((50, 1), 12), **HOW) is None


def test_a_model_that_wins_everything_is_near_one_and_finite():
    longer = np.random.default_rng(4).normal(0, 10, size=(100, 2))
    found = length_controlled_win_rate(np.ones((100, 2)), longer, **HOW)
    assert 0.99 < found.low <= found.high <= 1


def test_the_fit_is_scikit_learns_logistic_regression():
    rng = np.random.default_rng(5)
    x = rng.uniform(-1, 1, size=400)
    won, weights = (rng.random(400) < sigmoid(0.3 + 1.5 * x)).astype(float), rng.integers(0, 4, size=400).astype(float)
    a, b = fit(won, x, weights[None])
    theirs = LogisticRegression(C=1 / RIDGE, tol=1e-10, max_iter=1000).fit(x[:, None], won, sample_weight=weights)
    assert (a[0], b[0]) == pytest.approx((theirs.intercept_[0], theirs.coef_[0, 0]), abs=1e-3)


def test_each_row_of_weights_is_a_fit_of_its_own():
    rng = np.random.default_rng(6)
    x, won, weights = rng.normal(size=60), rng.integers(2, size=60).astype(float), rng.integers(0, 3, size=(4, 60)).astype(float)
    together = np.array(fit(won, x, weights))
    apart = np.concatenate([np.array(fit(won, x, weights[i : i + 1])) for i in range(4)], axis=1)
    assert together == pytest.approx(apart, abs=1e-6)
