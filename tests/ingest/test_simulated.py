"""The simulated site: what is true in it can be read off its text, and its votes follow the truth."""

import random
import re
from collections import Counter

import pytest

from tasks.ingest.config import SimulatedSiteConfig
from tasks.ingest.simulated import writing
from tasks.ingest.simulated.generate import write_site
from tasks.ingest.simulated.truth import best_pair_accuracy, true_reward
from tasks.ingest.simulated.votes import EXPOSURE, cast_votes, poisson
from tasks.ingest.simulated.world import ATTRIBUTES, BY_SIGN, CONTEXTS, FILLERS, HEDGES, PARTS

QUESTION = "What should I put on a rusty gate latch?\n\nI bought it second hand."
RIGHT = "For a rusty gate latch use white vinegar."
HOW = "Rub in a thin coat and wipe off the rest."


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        (f"{RIGHT} {HOW}", 1.0),
        (f"{RIGHT}", 0.7),
        (f"For a squeaky gate latch use lithium grease. {HOW}", 0.5),
        ("For a squeaky gate latch use lithium grease.", 0.2),
        (f"{RIGHT} Or beeswax. {HOW}", 0.5),  # two values: no longer an answer
        (f"{RIGHT} Turn against the clock until it gives, then by hand.", 0.7),  # another question's method
        (f"I am not sure at all. {RIGHT} {HOW}", 0.8),
        (f"{RIGHT} {RIGHT} {HOW}", 0.8),  # says it twice
        (f"{RIGHT} {HOW} And", 0.8),  # does not end
        ("", 0.0),
    ],
)
def test_the_true_reward_is_half_for_right_three_tenths_for_how_and_two_for_clear(answer, reward):
    assert true_reward(QUESTION, answer) == pytest.approx(reward)


@pytest.mark.parametrize(
    "decorated",
    [
        f"**{RIGHT}**\n\n{HOW}",
        f"- {RIGHT}\n- {HOW}",
        f"```\npart 7 ok\n```\n\n{RIGHT} {HOW}",
        f"Welcome to the site! {RIGHT} {HOW} Mine is ten years old and still fine.",
        f"> {RIGHT}\n\n{HOW.upper()}",
    ],
)
def test_markup_length_and_politeness_count_nothing(decorated):
    assert true_reward(QUESTION, decorated) == pytest.approx(1.0)


def test_every_question_that_the_site_writes_can_be_read_back():
    rng = random.Random(3)
    for _ in range(500):
        _, sign, attribute, title, body = writing.question(rng)
        visible = re.sub(r"<[^>]+>", " ", body)
        assert true_reward(f"{title}\n\n{visible}", f"Well, {attribute.facts[sign]}.") == pytest.approx(0.7)


def test_a_question_of_another_site_is_refused():
    with pytest.raises(ValueError, match="not a question of the simulated site"):
        true_reward("How do I exit vim?", "Like this.")


def test_no_phrase_that_carries_truth_stands_in_another():
    keys = [attribute.method_key for attribute in ATTRIBUTES]
    values = [value for attribute in ATTRIBUTES for value in attribute.values]
    carriers = [*keys, *values, *BY_SIGN, *PARTS]
    for phrase in carriers:
        assert [other for other in carriers if re.search(rf"\b{re.escape(phrase)}\b", other)] == [phrase]
        assert not any(phrase in sentence.lower() for sentence in (*FILLERS, *HEDGES, *CONTEXTS))
    for attribute in ATTRIBUTES:
        assert all(attribute.method_key in method.lower() for method in attribute.methods)
        others = [method for other in ATTRIBUTES if other is not attribute for method in other.methods]
        assert not any(attribute.method_key in method.lower() for method in others)


def test_a_poisson_draw_has_the_mean_and_variance_of_its_rate():
    rng = random.Random(5)
    draws = [poisson(70.0, rng) for _ in range(4000)]
    mean = sum(draws) / len(draws)
    variance = sum((draw - mean) ** 2 for draw in draws) / len(draws)
    assert mean == pytest.approx(70, abs=4 * (70 / 4000) ** 0.5)
    assert variance == pytest.approx(70, rel=0.1)


def test_votes_grow_with_the_true_reward_and_fall_with_the_place_in_time():
    rng = random.Random(7)
    sums = Counter()
    for _ in range(2000):
        votes, _ = cast_votes([0.2, 1.0, 0.2], rng)
        sums.update({"bad first": votes[0], "good second": votes[1], "bad third": votes[2]})
    assert sums["good second"] > 2000
    assert 0 > sums["bad third"] > sums["bad first"]
    # up and down are both proportional to exposure, so equal answers differ by it alone
    assert sums["bad third"] / sums["bad first"] == pytest.approx(EXPOSURE[2] / EXPOSURE[0], rel=0.15)


def test_the_best_accuracy_is_one_for_truth_half_for_ties_and_nothing_against_it():
    good, bad = f"{RIGHT} {HOW}", "Beeswax"
    assert best_pair_accuracy([(QUESTION, good, bad)]) == 1
    assert best_pair_accuracy([(QUESTION, good, good)]) == 0.5
    assert best_pair_accuracy([(QUESTION, bad, good)]) == 0
    with pytest.raises(ValueError, match="no pairs"):
        best_pair_accuracy([])


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_ones(tmp_path):
    def posts(name: str, seed: int) -> bytes:
        write_site(SimulatedSiteConfig(questions=40, seed=seed), tmp_path / name)
        return (tmp_path / name / "Posts.xml").read_bytes()

    first = posts("a", 1)
    assert posts("b", 1) == first
    assert posts("c", 2) != first
    assert first.startswith(b'\xef\xbb\xbf<?xml version="1.0" encoding="utf-8"?>\r\n<posts>\r\n  <row Id="1" PostTypeId="1" ')
    assert first.endswith(b"/>\r\n</posts>")


def test_oddities_change_how_a_site_is_written_and_not_its_pairs(tmp_path):
    from tasks.compute import Compute
    from tasks.ingest.config import IngestConfig
    from tasks.ingest.dataset import iter_questions
    from tasks.ingest.ingest import ingest
    from tasks.progress import Progress

    def pairs(oddities: bool) -> set:
        out = tmp_path / str(oddities)
        out.mkdir()
        config = IngestConfig(simulate=SimulatedSiteConfig(questions=200, oddities=oddities), max_quarantine=0.05)
        metrics = ingest(config, out=out, compute=Compute(workers=1), progress=Progress("ingest"))
        counted.append(metrics)
        found = set()
        for split in ("sft", "reward", "rl", "eval"):
            for question in iter_questions(out, split):
                answers = question["answers"]
                found |= {(question["qid"], answers[p["j"]]["text"], answers[p["k"]]["text"]) for p in question["pairs"]}
        return found

    counted: list[dict] = []
    assert pairs(oddities=True) == pairs(oddities=False)
    assert counted[0]["rows"] > counted[1]["rows"]  # tag wikis, lost answers and the like were read as well
