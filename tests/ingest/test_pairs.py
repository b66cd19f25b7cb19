"""Pairs and splits: drawn by hash, so that nothing else in the dump can change them."""

from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.ingest.pairs import candidates, draw, markup, split_of

SHARES = {"sft": 0.3, "reward": 0.3, "rl": 0.3, "eval": 0.1}
RECORDED = ["sft", "rl", "reward", "rl", "rl", "sft", "rl", "rl", "reward", "sft", "sft", "reward"]
scores = st.lists(st.integers(-1, 8), min_size=0, max_size=12)


def choose_pairs(site: str, qid: int, answers: list[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """The pairs of a question from its answers' (id, pm_score)."""
    return draw(site, qid, [number for number, _ in answers], candidates([score for _, score in answers]), most)


@given(scores, st.integers(1, 10**9), st.integers(1, 12))
def test_pairs_prefer_the_higher_score_stand_once_and_are_as_many_as_there_can_be(pm_scores, qid, most):
    answers = [(100 + place, score) for place, score in enumerate(pm_scores)]
    pairs = choose_pairs("wood.test", qid, answers, most)
    assert all(pm_scores[j] > pm_scores[k] for j, k in pairs)
    assert len(set(pairs)) == len(pairs)
    different = sum(a != b for a, b in combinations(pm_scores, 2))
    assert len(pairs) == min(most, different)


@given(scores, st.integers(1, 12))
def test_fewer_pairs_are_the_first_of_more(pm_scores, most):
    answers = [(100 + place, score) for place, score in enumerate(pm_scores)]
    assert choose_pairs("wood.test", 5, answers, most) == choose_pairs("wood.test", 5, answers, 100)[:most]


def test_every_pair_is_drawn_equally_often():
    """7 answers with 7 scores make 21 pairs, of which 10 are drawn: each in 10/21 of 3,000 questions, give or take 4 sigma."""
    answers = [(place, place) for place in range(7)]
    drawn = Counter(pair for qid in range(3_000) for pair in choose_pairs("wood.test", qid, answers, 10))
    expected, sigma = 3_000 * 10 / 21, (3_000 * 10 / 21 * 11 / 21) ** 0.5
    assert len(drawn) == 21
    assert all(abs(count - expected) < 4 * sigma for count in drawn.values())


def test_pairs_do_not_depend_on_other_sites_but_differ_between_them():
    answers = [(place, place) for place in range(7)]
    assert choose_pairs("a.test", 1, answers, 10) == choose_pairs("a.test", 1, answers, 10)
    assert choose_pairs("a.test", 1, answers, 10) != choose_pairs("b.test", 1, answers, 10)


@given(st.lists(st.integers(-1, 4), max_size=6))
def test_candidates_are_all_pairs_of_places_with_different_scores(scores):
    expected = [(j, k) for j, k in permutations(range(len(scores)), 2) if scores[j] > scores[k]]
    assert sorted(candidates(scores)) == sorted(expected)


def test_splits_have_their_shares():
    """20,000 questions: within 4 sigma of 30, 30, 30 and 10 percent."""
    count = Counter(split_of("wood.test", qid, SHARES) for qid in range(20_000))
    for split, share in SHARES.items():
        assert abs(count[split] - 20_000 * share) < 4 * (20_000 * share * (1 - share)) ** 0.5


def test_a_question_stays_in_its_split_for_ever():
    """Recorded; a change here moves questions of trained models from training into evaluation."""
    assert [split_of("beer.stackexchange.com", qid, SHARES) for qid in range(1, 13)] == RECORDED


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("Plain text - and a_b.", 0),
        ("Use `oil` and **wax**.", 6),
        ("# Head\n\n- one\n- two\n\n1. first\n> said", 5),
        ("[here](http://x.test) and ![pic](http://x.test/p.png)", 2),
        ("```python\nx\n```", 6),
    ],
)
def test_markup_counts_marks(text, marks):
    texts = ["* at first", text, "", "- \u00e9", text, "]", "("]
    ends = np.cumsum([0, *(len(one.encode()) for one in texts)])
    assert markup("".join(texts).encode(), ends).tolist() == [1, marks, 0, 1, marks, 0, 0]
