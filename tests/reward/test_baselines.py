"""Baselines on sites whose preferences are planted."""

import random

import pytest

from tasks.reward.accuracy import accuracy, differences, flatten
from tasks.reward.baselines import TfidfBradleyTerry, baselines, markup
from tasks.reward.data import Question

WORDS = [
    "oil",
    "grease",
    "clamp",
    "bolt",
    "torque",
    "wheel",
    "chain",
    "brush",
    "solder",
    "flux",
    "resin",
    "wax",
    "blade",
    "file",
    "rasp",
    "plane",
    "saw",
    "drill",
]


def lexical(n: int, seed: int) -> list[Question]:
    """The answer with the word "measure" is preferred; it is as long as the other, and either may come first."""
    rng = random.Random(seed)
    questions = []
    for qid in range(n):
        words = [rng.choices(WORDS, k=9) for _ in range(2)]
        good = rng.randrange(2)
        words[good][rng.randrange(9)] = "measure"
        questions.append(Question("toy.test", qid, "How?", [" ".join(w) for w in words], [0, -1], [(good, 1 - good)], [1]))
    return questions


def question_dependent(n: int, seed: int) -> list[Question]:
    """The answer that names the question's tool is preferred, and the other answer's tool would be right elsewhere."""
    rng = random.Random(seed)
    questions = []
    for qid in range(n):
        tool, other = rng.sample(WORDS, 2)
        answers = [f"Use the {tool} now.", f"Use the {other} now."]
        questions.append(Question("toy.test", qid, f"What is like a {tool}?", answers, [0, -1], [(0, 1)], [1]))
    return questions


def tfidf_accuracy(train: list[Question], test: list[Question]) -> float:
    model = TfidfBradleyTerry().fit(train)
    scores = [model.scores(q.answers).tolist() for q in test]
    return accuracy(differences([q.pairs for q in test], scores), flatten(test))["accuracy"]


def test_tfidf_finds_a_preference_for_a_word():
    assert tfidf_accuracy(lexical(200, seed=0), lexical(100, seed=1)) > 0.97


def test_tfidf_does_not_find_a_preference_that_depends_on_the_question():
    assert tfidf_accuracy(question_dependent(300, seed=0), question_dependent(300, seed=1)) == pytest.approx(0.5, abs=0.09)


def test_tfidf_treats_both_orders_of_the_answers_alike():
    train = lexical(60, seed=0)
    turned = [
        Question(q.site, q.qid, q.text, q.answers[::-1], [0, -1], [(1 - j, 1 - k) for j, k in q.pairs], q.gaps) for q in train
    ]
    texts = ["measure the bolt", "oil the chain"]
    assert TfidfBradleyTerry().fit(train).scores(texts) == pytest.approx(TfidfBradleyTerry().fit(turned).scores(texts), abs=1e-3)


def test_tfidf_fits_a_single_pair():
    assert tfidf_accuracy(lexical(1, seed=0), lexical(1, seed=0)) == 1.0


def test_one_markdown_construct_counts_once():
    counts = {
        "Oil the chain.": 0,
        "2 * 3 is 6, a_b is a name, and 1.5 is not a list": 0,
        "# Title\n\nText": 1,
        "- one\n- two\n  1. three": 3,
        "Run `ls -l` and `pwd`.": 2,
        "```\ncode\n```": 2,
        "**bold** and *slanted*": 3,
        "> quoted\n\n[link](https://example.org) ![image](a.png)": 3,
        "2<sup>10</sup>": 2,
    }
    assert {text: markup(text) for text in counts} == counts


def test_each_baseline_wins_where_its_rule_is_the_truth():
    long_plain, short_marked = "Oil the chain and then turn the wheel by hand.", "**Oil** `it`."
    longer = Question("toy.test", 1, "How?", [short_marked, long_plain], [0, -1], [(1, 0)], [1])
    marked = Question("toy.test", 2, "How?", [short_marked, long_plain], [0, -1], [(0, 1)], [1])
    result = baselines(lexical(20, seed=0), [longer], None)
    assert (result["longer_wins"]["accuracy"], result["markup_wins"]["accuracy"], result["earlier_wins"]["accuracy"]) == (1, 0, 0)
    result = baselines(lexical(20, seed=0), [marked], None)
    assert (result["longer_wins"]["accuracy"], result["markup_wins"]["accuracy"], result["earlier_wins"]["accuracy"]) == (0, 1, 1)


def test_the_best_baseline_is_one_that_reads_the_text():
    # the earlier answer always wins here, and nothing in the text tells
    evaluated = [Question("toy.test", n, "How?", ["Same words.", "Same words."], [0, -1], [(0, 1)], [1]) for n in range(5)]
    result = baselines(lexical(20, seed=0), evaluated, best_possible=0.8)
    assert result["earlier_wins"]["accuracy"] == 1.0
    assert result["best"]["name"] != "earlier_wins"
    assert result["best"]["accuracy"] == 0.5
    assert result["best_possible"] == 0.8
    assert "best_possible" not in baselines(lexical(20, seed=0), evaluated, None)
