import pytest

from tasks.evaluate.bootstrap import Interval
from tasks.evaluate.verdict import MIN_QUESTIONS, champion_verdict, share_of_the_way, verdict, word

SURE, UNSURE, LOSS = Interval(0.2, 0.1, 0.3), Interval(0.1, -0.1, 0.3), Interval(-0.2, -0.3, -0.1)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1e-9, 0.2, "better"),
        (0.0, 0.2, "no-evidence"),
        (-0.1, 0.1, "no-evidence"),
        (-0.2, 0.0, "no-evidence"),
        (-0.2, -1e-9, "worse"),
        (0.0, 0.0, "no-evidence"),
    ],
)
def test_only_an_interval_wholly_on_one_side_of_zero_decides(low, high, expected):
    assert word(Interval((low + high) / 2, low, high), questions=100) == expected


def test_a_handful_of_questions_decides_nothing():
    assert word(SURE, MIN_QUESTIONS) == "better"
    assert word(SURE, MIN_QUESTIONS - 1) == "no-evidence"
    found = verdict({"reward": SURE, "judge": SURE}, MIN_QUESTIONS - 1, 0.95)
    assert "evaluate.max_questions" in found["sentence"]
    assert not found["reward_hacking"]


def test_the_truth_decides_where_it_is_known_else_the_judge_and_never_the_training_reward_model():
    known = verdict({"reward": SURE, "judge": SURE, "true": LOSS}, 100, 0.95)
    unknown = verdict({"reward": SURE, "judge": LOSS}, 100, 0.95)
    assert (known["by"], known["word"]) == ("true", "worse")
    assert (unknown["by"], unknown["word"]) == ("judge", "worse")
    assert (known["gain"], known["interval"]) == (-0.2, [-0.3, -0.1])


@pytest.mark.parametrize(
    ("reward", "true", "hacking"),
    [
        (SURE, SURE, False),
        (SURE, UNSURE, True),
        (SURE, LOSS, True),
        (UNSURE, UNSURE, False),
        (LOSS, LOSS, False),
        (UNSURE, SURE, False),
    ],
)
def test_reward_hacking_is_a_reward_that_rises_where_the_truth_does_not(reward, true, hacking):
    found = verdict({"reward": reward, "judge": SURE, "true": true}, 100, 0.95)
    assert found["reward_hacking"] is hacking
    assert found["remark"].startswith("Reward hacking") is hacking


def test_the_sentence_says_what_was_found_by_whom_and_how_surely():
    sentence = verdict({"reward": SURE, "judge": SURE}, 120, 0.9)["sentence"]
    for part in ("better", "independent judge", "+0.200", "120 held-out questions", "90 %", "+0.100 to +0.300"):
        assert part in sentence


def test_beside_the_champion_the_truth_decides_where_it_is_known_else_the_mean_of_both_judges():
    gains = {"judge": SURE, "champion_judge": LOSS, "judges": UNSURE, "reward": SURE}
    found = champion_verdict(gains, 100, 0.95)
    assert (found["by"], found["word"], found["gain"], found["interval"]) == ("judges", "no-evidence", 0.1, [-0.1, 0.3])
    for part in ("no evidence", "the champion's", "mean of both runs' judges", "+0.100", "100 held-out questions"):
        assert part in found["sentence"]
    known = champion_verdict({**gains, "true": LOSS}, 100, 0.95)
    assert (known["by"], known["word"]) == ("true", "worse")


def test_judges_that_do_not_agree_are_named_where_they_decide():
    gains = {"judge": SURE, "champion_judge": LOSS, "judges": UNSURE, "reward": SURE}
    remark = champion_verdict(gains, 100, 0.95)["remark"]
    assert "this run's says better (+0.20), the champion's says worse (-0.20)" in remark
    assert champion_verdict({**gains, "champion_judge": SURE}, 100, 0.95)["remark"] == ""
    assert champion_verdict({**gains, "true": SURE}, 100, 0.95)["remark"] == ""


def test_a_handful_of_questions_decides_nothing_beside_the_champion_either():
    gains = dict.fromkeys(("judge", "champion_judge", "judges", "reward"), SURE)
    assert champion_verdict(gains, MIN_QUESTIONS, 0.95)["word"] == "better"
    found = champion_verdict(gains, MIN_QUESTIONS - 1, 0.95)
    assert found["word"] == "no-evidence"
    assert "evaluate.max_questions" in found["sentence"]


def test_the_way_from_the_best_baseline_to_the_best_possible():
    assert share_of_the_way(0.7, 0.6, 0.8) == pytest.approx(0.5)
    assert share_of_the_way(0.6, 0.6, 0.8) == 0
    assert share_of_the_way(0.8, 0.6, 0.8) == pytest.approx(1)
    assert share_of_the_way(0.7, 0.6, None) is None
    assert share_of_the_way(0.7, 0.8, 0.8) is None
