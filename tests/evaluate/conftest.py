"""Invented answers of everybody, and the report made of them."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tasks.evaluate import plots
from tasks.evaluate.answers import Answers
from tasks.evaluate.bootstrap import Interval
from tasks.evaluate.config import EvaluateConfig
from tasks.evaluate.duel import Pair
from tasks.evaluate.evaluate import side_by_side
from tasks.evaluate.report import Report
from tasks.evaluate.tables import Divergence, duel_table, gain_of, tabulate
from tasks.evaluate.verdict import champion_verdict, verdict
from tests.evaluate.folders import simulated_eval, trained

QUESTIONS = 20
HOSTILE = '<script>alert("x")</script><img src=http://evil.test/a.png onerror=alert(1)> {{ 7 * 7 }} " onmouseover="x'


@pytest.fixture(scope="session")
def evaluate_config() -> EvaluateConfig:
    return EvaluateConfig(
        max_questions=QUESTIONS, samples_per_question=2, best_of=2, max_query_tokens=32, max_new_tokens=16, bootstrap_samples=200,
        shown_samples=3,
    )  # fmt: skip


@pytest.fixture(scope="session")
def everyone() -> dict[str, Answers]:
    """PPO's true reward is 0.3 above SFT's; everybody's text is hostile."""
    rng = np.random.default_rng(0)

    def write(true: float, samples: int = 2) -> Answers:
        shape = (QUESTIONS, samples)
        ids = [[rng.integers(9, size=rng.integers(4, 12)).tolist() for _ in range(samples)] for _ in range(QUESTIONS)]
        scores = {name: true + 0.05 * rng.normal(size=shape) for name in ("reward", "judge", "true")}
        return Answers([[HOSTILE] * samples] * QUESTIONS, ids, np.ones(shape, dtype=bool), scores)

    return {"human": write(0.9, 1), "base": write(0.2), "sft": write(0.4), "best-of-n": write(0.6), "ppo": write(0.7)}


@pytest.fixture(scope="session")
def page(everyone, evaluate_config, tmp_path_factory) -> Report:
    """A report in which everything that people wrote is hostile."""
    divergence = Divergence(
        {"ppo": np.full((QUESTIONS, 2), 3.0)}, {"best-of-n": math.log(2) - 0.5}, {"base": 9.0, "sft": 5.0, "ppo": 6.0}
    )
    tables = tabulate(evaluate_config, everyone, divergence)
    rule = {"accuracy": 0.6, "interval": [0.55, 0.65]}
    tables["champion"] = None
    tables["reward_model"] = {
        "accuracy": 0.7, "interval": [0.65, 0.75],
        "judge": {"accuracy": 0.69, "interval": [0.6, 0.75]}, "baselines": {"longer_wins": rule},
        "best_baseline": 0.6, "best_baseline_name": "longer_wins", "best_possible": 0.8, "share_of_the_way": 0.5,
    }  # fmt: skip
    found = verdict(
        {name: gain_of(evaluate_config, everyone, "ppo", name) for name in ("reward", "judge", "true")}, QUESTIONS, 0.95
    )
    curve = [{"step": step, "loss": 1 / step, "objective/kl": step / 10, "objective/scores": 0.1} for step in range(1, 60)]
    figures = plots.draw(
        tmp_path_factory.mktemp("plots"),
        curves={"base": curve, "sft": curve, "reward": [{**row, "model": "reward"} for row in curve], "ppo": curve},
        calibration={"reward": {"bins": [{"confidence": 0.6, "accuracy": 0.58, "n": 5}], "ece": 0.02}},
        tables=tables, scores={name: answers.scores for name, answers in everyone.items()}, by=found["by"],
    )  # fmt: skip
    answer = {
        "answer_id": 1, "text": HOSTILE, "pm_score": 1, "votes": 1, "selected": False,
        "author": HOSTILE, "author_profile": "https://x.test/users/1", "licence": "CC BY-SA 4.0",
    }  # fmt: skip
    questions = [{"site": "x.test", "qid": q, "title": HOSTILE, "question": HOSTILE, "answers": [answer]} for q in range(QUESTIONS)]
    return Report(
        verdict=found | {"samples_per_question": 2, "champion": None},
        tables=tables,
        samples=side_by_side(questions, everyone, 3, seed=1),
        figures=figures,
        card={"simulated": True, "title": HOSTILE, "counts": {"questions": 1234}},
        manifests={
            "sft": {"step": "sft", "key": "0123abcd", "version": 1, "config": {"note": HOSTILE}, "seconds": 75},
            "ppo": None,
        },
        config=evaluate_config.identity(),
        notice=HOSTILE,
    )


@pytest.fixture(scope="session")
def page_with_champion(page, everyone, evaluate_config) -> Report:
    """The same beside a champion that this run's judge thinks worse than PPO, and its own judge better; the two cancel."""
    rng = np.random.default_rng(1)
    candidate, champion = replace(everyone["ppo"], scores={}), replace(everyone["sft"], scores={})
    for answers, lean in ((candidate, 0.2), (champion, -0.2)):
        own = lean + 0.05 * rng.normal(size=(2, QUESTIONS, 2))
        answers.scores |= {"reward": own[0], "judge": own[0], "champion_judge": -own[1], "judges": (own[0] - own[1]) / 2}
    table = duel_table(evaluate_config, Pair(candidate, champion))
    found = champion_verdict({name: Interval(**row["gain"]) for name, row in table.items()}, QUESTIONS, 0.95)
    row = next(row for row in page.tables["models"] if row["name"] == "ppo") | {"name": "champion", "label": "Champion"}
    return replace(
        page,
        verdict={**page.verdict, "champion": found | {"key": "f00d" * 16}},
        tables={**page.tables, "models": [*page.tables["models"], row], "champion": table},
        samples=[{**one, "answers": {**one["answers"], "champion": one["answers"]["sft"]}} for one in page.samples],
    )


@pytest.fixture(scope="session")
def models(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """The tiny model as base and as sft, a reward model and a judge that prefer other things, and a policy that learned nothing."""
    made = trained(tmp_path_factory.mktemp("models"), tiny_model)
    (made["ppo"] / "curves.json").write_text(
        '[{"step": 0, "eval/score": 0.0}, {"step": 1, "eval/score": 0.1, "objective/kl": 0.0}]'
    )
    return made


@pytest.fixture(scope="session")
def simulated_site(tmp_path_factory) -> Path:
    return simulated_eval(tmp_path_factory.mktemp("simulated"))
