import json

import numpy as np
import pytest

from tasks.evaluate.answers import Answers
from tasks.evaluate.tables import agreement, headline, reward_model_table


def row(page, name: str) -> dict:
    return next(row for row in page.tables["models"] if row["name"] == name)


def test_the_gain_is_the_difference_of_the_mean_scores(page):
    for name in ("human", "base", "best-of-n", "ppo"):
        for scorer in ("reward", "judge", "true"):
            expected = row(page, name)["scores"][scorer]["value"] - row(page, "sft")["scores"][scorer]["value"]
            assert row(page, name)["gain"][scorer]["value"] == pytest.approx(expected)
    assert row(page, "ppo")["gain"]["true"]["value"] == pytest.approx(0.3, abs=0.03)


def test_nobody_is_compared_with_himself(page):
    assert row(page, "sft")["gain"] is row(page, "sft")["win_rate"] is None
    assert row(page, "human")["win_rate_against_human"] is None
    assert row(page, "human")["eos_rate"] is None


def test_everything_that_goes_into_json_is_finite(page):
    json.dumps(page.tables, allow_nan=False)
    json.dumps(page.verdict, allow_nan=False)


def scored(**scores: list) -> Answers:
    arrays = {name: np.array(values, dtype=float) for name, values in scores.items()}
    return Answers([], [], np.zeros(0), arrays)


def test_agreement_with_the_truth_by_hand():
    sft = scored(true=[[0.0, 1.0]], judge=[[0.0, 1.0]], reward=[[1.0, 1.0]])
    ppo = scored(true=[[1.0]], judge=[[-1.0]], reward=[[2.0]])
    # truth: b > a and c > a, b = c. The judge has the first right and the second wrong; reward ties the first, has the second right
    assert agreement({"sft": sft, "ppo": ppo}) == {"judge": 0.5, "reward": 0.75}


def test_without_the_truth_there_is_nothing_to_agree_with():
    answers = scored(judge=[[0.0]], reward=[[0.0]])
    assert agreement({"sft": answers}) == {}


def test_the_reward_models_accuracy_stands_beside_the_trivial_rules(tmp_path):
    (tmp_path / "accuracy.json").write_text(
        json.dumps({"reward": {"accuracy": 0.7, "interval": [0.6, 0.8]}, "judge": {"accuracy": 0.69, "interval": [0.6, 0.8]}})
    )
    rule = {"accuracy": 0.6, "interval": [0.5, 0.7]}
    (tmp_path / "baselines.json").write_text(json.dumps({"longer_wins": rule, "best": {"name": "longer_wins", **rule}}))
    table = reward_model_table(tmp_path, best_possible=0.8)
    assert (table["accuracy"], table["judge"]["accuracy"], table["best_baseline"]) == (0.7, 0.69, 0.6)
    assert table["baselines"] == {"longer_wins": rule}
    assert table["share_of_the_way"] == pytest.approx(0.5)


def test_a_reward_model_without_measurements_has_none(tmp_path):
    table = reward_model_table(tmp_path, best_possible=None)
    assert table["accuracy"] is table["share_of_the_way"] is None
    assert table["baselines"] == {}


def test_the_headline_is_flat_and_without_holes(page):
    numbers = headline(page.verdict, page.tables)
    assert numbers["verdict"] == "better"
    assert numbers["by"] == "true"
    assert numbers["gain_low"] <= numbers["gain"] <= numbers["gain_high"]
    assert {"true_gain", "judge_gain", "reward_gain", "win_rate", "reward_accuracy", "best_baseline", "best_possible"} <= set(
        numbers
    )
    assert all(isinstance(value, str | int | float) for value in numbers.values())
    assert "champion" not in numbers


def test_the_headline_tells_the_verdict_beside_the_champion(page_with_champion):
    numbers = headline(page_with_champion.verdict, page_with_champion.tables)
    assert (numbers["verdict"], numbers["champion"]) == ("better", "no-evidence")
    assert numbers["champion_low"] <= numbers["champion_gain"] <= numbers["champion_high"]
