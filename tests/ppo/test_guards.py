import dataclasses

import pytest

from tasks.ppo.config import GuardConfig
from tasks.ppo.guards import CALM, GRACE, Guard, Health, repetition

WELL = Health(kl=2.0, entropy=2.0, eos_rate=0.9, length=40.0, repetition=0.05, fences=0.1)


def guard(**limits) -> Guard:
    watched = Guard(GuardConfig(**limits))
    assert watched.check(WELL) == []
    return watched


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kl": 31.0}, "above 30"),
        ({"kl": -1.5}, "sampling and scoring disagree"),
        ({"entropy": 0.01}, "entropy"),
        ({"eos_rate": 0.1}, "end by themselves"),
        ({"length": 101.0}, "length"),
        ({"length": 15.0}, "length"),
        ({"repetition": 0.6}, "repeat"),
        ({"fences": 0.45}, "code fence"),
        ({"kl": float("nan")}, "not finite"),
    ],
)
def test_each_way_to_go_wrong_is_seen(change, words):
    (found,) = guard().check(dataclasses.replace(WELL, **change))
    assert words in found


@pytest.mark.parametrize(
    "change", [{"kl": 29.0}, {"kl": -0.5}, {"length": 99.0}, {"length": 17.0}, {"fences": 0.35}, {"eos_rate": 0.25}]
)
def test_what_is_within_the_limits_is_well(change):
    assert guard().check(dataclasses.replace(WELL, **change)) == []


def test_a_limit_that_the_sft_policy_itself_breaks_does_not_stop_the_run_but_getting_worse_does():
    watched = Guard(GuardConfig())
    poor = dataclasses.replace(WELL, eos_rate=0.1, repetition=0.6)
    assert watched.check(poor) == []
    assert watched.check(poor) == []
    assert len(watched.check(dataclasses.replace(poor, eos_rate=0.04, repetition=0.85))) == 2


def test_alarms_escalate_from_kl_to_roll_back_to_stop():
    watched = guard()
    steps = [10, 10 + GRACE, 10 + 2 * GRACE, 10 + 3 * GRACE]
    assert [watched.act(step, ["bad"], 0.1) for step in steps] == ["raise_kl", "roll_back", "stop", "stop"]
    assert [alarm.action for alarm in watched.alarms[:3]] == ["raise_kl", "roll_back", "stop"]


def test_an_action_is_given_time_to_work():
    watched = guard()
    assert watched.act(10, ["bad"], 0.1) == "raise_kl"
    assert watched.act(11, ["bad"], 0.1) is None
    assert watched.act(12, [], 0.1) is None
    assert len(watched.alarms) == 1


def test_after_a_long_calm_the_mildest_action_comes_first_again():
    watched = guard()
    watched.act(10, ["bad"], 0.1)
    assert watched.act(11 + CALM, ["bad"], 0.1) == "raise_kl"


def test_without_a_kl_penalty_there_is_none_to_raise():
    assert guard().act(5, ["bad"], 0.0) == "roll_back"


def test_reward_up_and_judge_down_is_an_alarm_after_patience():
    watched = guard(patience=2)
    judge = [0.0, 0.1, -0.1, 0.05]
    assert watched.check_judge([0.0] * 4, judge) == []
    assert watched.check_judge([0.5] * 4, [x - 1 for x in judge]) == []
    (found,) = watched.check_judge([0.8] * 4, [x - 2 for x in judge])
    assert "2 evaluations in a row" in found


def test_a_fall_of_the_judges_score_within_its_noise_is_no_alarm():
    watched = guard(patience=1)
    assert watched.check_judge([0.0] * 4, [1.0, -1.0, 1.0, -1.0]) == []
    assert watched.check_judge([1.0] * 4, [-1.0, 1.0, -0.9, 0.8]) == []


def test_judge_and_reward_falling_together_is_no_alarm():
    watched = guard(patience=1)
    assert watched.check_judge([0.0] * 4, [0.0] * 4) == []
    assert watched.check_judge([-1.0] * 4, [-1.0] * 4) == []


def test_repetition_by_hand():
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)  # 5 4-grams, the last one repeats the first
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2, 3]) == 0
    assert repetition(list(range(50))) == 0
