"""Accuracy by hand; the interval by its properties."""

import numpy as np
import pytest

from tasks.reward.accuracy import Pairs, accuracy, clustered_interval, differences, flatten, full_accuracy, wins
from tasks.reward.data import Question


def question(qid: int, pairs: list[tuple[int, int]], gaps: list[int], site: str = "a.test") -> Question:
    return Question(site, qid, "How?", ["x"] * 4, [0] * 4, pairs, gaps)


def test_a_win_counts_one_a_tie_half_and_a_loss_nothing():
    assert wins(np.array([0.1, 0.0, -2.0])).tolist() == [1.0, 0.5, 0.0]


def test_accuracy_by_gap_and_site_by_hand():
    questions = [question(1, [(0, 1), (0, 2), (1, 2)], [1, 5, 4]), question(2, [(1, 0)], [1], site="b.test")]
    # question 1: 3 > 1 right, 3 > 2 right, 1 > 2 wrong; question 2: a tie
    difference = differences([q.pairs for q in questions], [[3.0, 1.0, 2.0, 0.0], [7.0, 7.0, 0.0, 0.0]])
    assert difference.tolist() == [2.0, 1.0, -1.0, 0.0]
    result = full_accuracy(difference, flatten(questions))
    assert (result["accuracy"], result["n_pairs"], result["n_questions"], result["ties"]) == (2.5 / 4, 4, 2, 1)
    assert {gap: row["accuracy"] for gap, row in result["by_gap"].items()} == {"1": 0.75, "4+": 0.5}
    assert {site: row["accuracy"] for site, row in result["by_site"].items()} == {"a.test": 2 / 3, "b.test": 0.5}
    assert {gap: row["n_pairs"] for gap, row in result["by_gap"].items()} == {"1": 2, "4+": 2}


def test_scores_that_never_differ_are_right_half_of_the_time():
    pairs = flatten([question(n, [(0, 1)], [1]) for n in range(20)])
    result = accuracy(np.zeros(20), pairs)
    assert result["accuracy"] == 0.5
    assert result["interval"] == [0.5, 0.5]


def test_with_one_pair_a_question_the_interval_is_the_binomial_one():
    # 600 independent pairs, 420 won: 0.7 +- 1.96 * sqrt(0.7 * 0.3 / 600) = 0.7 +- 0.0367
    values = np.array([1.0] * 420 + [0.0] * 180)
    low, high = clustered_interval(values, np.arange(600))
    assert low == pytest.approx(0.7 - 0.0367, abs=0.004)
    assert high == pytest.approx(0.7 + 0.0367, abs=0.004)


def test_repeating_pairs_inside_their_questions_does_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    values, cluster = (rng.random(100) < 0.65).astype(float), np.arange(100)
    once = clustered_interval(values, cluster)
    tenfold = clustered_interval(np.repeat(values, 10), np.repeat(cluster, 10))
    assert tenfold == pytest.approx(once)
    as_if_independent = clustered_interval(np.repeat(values, 10), np.arange(1000))
    assert as_if_independent[1] - as_if_independent[0] < 0.5 * (tenfold[1] - tenfold[0])


def test_the_interval_covers_the_truth_about_nineteen_times_in_twenty():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        # the chance to win differs between questions, with mean 0.6: pairs of one question hang together
        chance = np.repeat(rng.beta(3, 2, size=80), 4)
        low, high = clustered_interval((rng.random(320) < chance).astype(float), np.repeat(np.arange(80), 4), draws=400, seed=trial)
        covered += low <= 0.6 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_labels_of_questions_do_not_matter_and_the_interval_can_be_had_again():
    values = np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    first = clustered_interval(values, np.array([0, 0, 1, 1, 2]))
    assert clustered_interval(values, np.array([7, 7, 30, 30, 99])) == first


def test_flatten_keeps_the_order_of_the_pairs():
    pairs: Pairs = flatten([question(5, [(0, 1), (2, 1)], [2, 1]), question(9, [(3, 0)], [3], site="b.test")])
    assert pairs.question.tolist() == [0, 0, 1]
    assert pairs.gap.tolist() == [2, 1, 3]
    assert pairs.site.tolist() == ["a.test", "a.test", "b.test"]
