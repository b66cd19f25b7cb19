"""The numbers of the report: who scores what, gains what, wins how often, and writes how."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks.evaluate.answers import Answers
from tasks.evaluate.bootstrap import Interval, gain_interval, mean_interval
from tasks.evaluate.config import EvaluateConfig
from tasks.evaluate.duel import Pair
from tasks.evaluate.texture import distinct_n, has_code_fence
from tasks.evaluate.verdict import share_of_the_way
from tasks.evaluate.wins import differences, length_controlled_win_rate, wins
from tasks.ppo.guards import repetition

DUEL_SCORERS = ("true", "judges", "judge", "champion_judge", "reward")


class Divergence(NamedTuple):
    """How far the models went from each other; by writer."""

    kl: dict[str, np.ndarray]
    """(Q, S) nats to the reference, on the writer's own answers."""
    kl_bound: dict[str, float]
    """What it cannot exceed, nats."""
    human_perplexity: dict[str, float]
    """Of the human's best answers, per token."""


def gain_of(config: EvaluateConfig, everyone: Mapping[str, Answers], name: str, scorer: str) -> Interval:
    """Paired gain of one writer over SFT by one scorer."""
    ours, theirs = (everyone[who].scores[scorer].mean(1) for who in (name, "sft"))
    return gain_interval(ours, theirs, samples=config.bootstrap_samples, confidence=config.confidence, seed=config.seed)


def tabulate(config: EvaluateConfig, everyone: Mapping[str, Answers], divergence: Divergence) -> dict[str, Any]:
    """tables.json: a row for each writer, and how well the learned judges agree with the truth."""
    rows = [_row(config, everyone, divergence, name) for name in everyone]
    return {
        "questions": len(everyone["sft"].texts),
        "confidence": config.confidence,
        "models": rows,
        "agreement": agreement(everyone),
    }


def duel_table(config: EvaluateConfig, pair: Pair) -> dict[str, Any]:
    """Candidate beside champion by each scorer, the one that decides first; lengths in the candidate's tokens."""
    candidate, champion = pair
    longer = differences(candidate.lengths, champion.lengths)
    how: Any = {"samples": config.bootstrap_samples, "confidence": config.confidence, "seed": config.seed}

    def row(scorer: str) -> dict[str, Any]:
        ours, theirs = candidate.scores[scorer], champion.scores[scorer]
        won = wins(ours, theirs)
        controlled = length_controlled_win_rate(won, longer, **how)
        return {
            "candidate": float(ours.mean()),
            "champion": float(theirs.mean()),
            "gain": _json(gain_interval(ours.mean(1), theirs.mean(1), **how)),
            "win_rate": _json(mean_interval(won.mean(1), **how)),
            "length_controlled_win_rate": controlled and _json(controlled),
        }

    return {scorer: row(scorer) for scorer in DUEL_SCORERS if scorer in candidate.scores}


def _row(config: EvaluateConfig, everyone: Mapping[str, Answers], divergence: Divergence, name: str) -> dict[str, Any]:
    answers, sft, human = everyone[name], everyone["sft"], everyone["human"]
    labels = {
        "human": "Human, best answer",
        "base": "Base, zero-shot",
        "sft": "SFT",
        "best-of-n": f"SFT, best of {config.best_of}",
        "ppo": "PPO",
        "champion": "Champion",
    }

    def mean(values: np.ndarray) -> dict[str, float]:
        return _json(
            mean_interval(values.mean(1), samples=config.bootstrap_samples, confidence=config.confidence, seed=config.seed)
        )

    row: dict[str, Any] = {"name": name, "label": labels[name], "scores": {s: mean(values) for s, values in answers.scores.items()}}
    row |= {"gain": None, "win_rate": None, "length_controlled_win_rate": None, "win_rate_against_human": None}
    if name != "sft":
        won = {s: wins(values, sft.scores[s]) for s, values in answers.scores.items()}
        longer = differences(answers.lengths, sft.lengths)
        row["gain"] = {s: _json(gain_of(config, everyone, name, s)) for s in answers.scores}
        row["win_rate"] = {s: mean(w) for s, w in won.items()}
        controlled = {
            s: length_controlled_win_rate(
                w, longer, samples=config.bootstrap_samples, confidence=config.confidence, seed=config.seed
            )
            for s, w in won.items()
        }
        row["length_controlled_win_rate"] = {s: found and _json(found) for s, found in controlled.items()}
    if name != "human":
        row["win_rate_against_human"] = {s: mean(wins(values, human.scores[s])) for s, values in answers.scores.items()}
    first = [texts[0] for texts in answers.texts]  # one a question, so that everybody's text is equally many answers
    return row | {
        "length": float(answers.lengths.mean()),
        "distinct_1": distinct_n(first, 1),
        "distinct_2": distinct_n(first, 2),
        "eos_rate": float(answers.finished.mean()) if name != "human" else None,
        "repeated_4grams": float(np.mean([repetition(ids) for texts in answers.ids for ids in texts])),
        "code_fence_rate": float(np.mean([has_code_fence(text) for texts in answers.texts for text in texts])),
        "kl": mean(divergence.kl[name]) if name in divergence.kl else None,
        "kl_bound": divergence.kl_bound.get(name),
        "human_perplexity": divergence.human_perplexity.get(name),
    }


def agreement(everyone: Mapping[str, Answers]) -> dict[str, float]:
    """Share of the pairs of answers to one question, whoever wrote them, that a learned scorer orders as the truth does.

    Pairs that are equally good in truth are left out; a tie of the scorer counts half. Empty where the truth is not known.
    """
    scorers = list(everyone["sft"].scores)
    if "true" not in scorers:
        return {}
    stacked = {scorer: np.concatenate([answers.scores[scorer] for answers in everyone.values()], axis=1) for scorer in scorers}
    i, j = np.triu_indices(stacked["true"].shape[1], k=1)
    order = {scorer: np.sign(values[:, i] - values[:, j]) for scorer, values in stacked.items()}
    known = order["true"] != 0
    if not known.any():
        return {}
    return {scorer: float((order[scorer][known] * order["true"][known] + 1).mean() / 2) for scorer in scorers if scorer != "true"}


def reward_model_table(reward: Path, best_possible: float | None) -> dict[str, Any]:
    """The reward model's accuracy on human pairs beside the trivial baselines and what is possible at all."""
    measured, trivial = read_json(reward / "accuracy.json") or {}, read_json(reward / "baselines.json") or {}
    own, judge, best = measured.get("reward", measured), measured.get("judge") or {}, trivial.get("best") or {}
    best_possible = trivial.get("best_possible", best_possible)
    rules = {name: rule for name, rule in trivial.items() if name != "best" and isinstance(rule, dict)}
    return {
        "accuracy": own.get("accuracy"),
        "interval": own.get("interval"),
        "judge": {"accuracy": judge.get("accuracy"), "interval": judge.get("interval")},
        "baselines": {name: {"accuracy": rule["accuracy"], "interval": rule.get("interval")} for name, rule in rules.items()},
        "best_baseline": best.get("accuracy"),
        "best_baseline_name": best.get("name"),
        "best_possible": best_possible,
        "share_of_the_way": share_of_the_way(own.get("accuracy"), best.get("accuracy"), best_possible),
    }


def headline(found: Mapping[str, Any], tables: Mapping[str, Any]) -> dict[str, Any]:
    """What the command and the dashboard show of this step."""
    by, model = found["by"], tables["reward_model"]
    row = next(row for row in tables["models"] if row["name"] == "ppo")
    controlled = row["length_controlled_win_rate"][by]
    numbers = {
        "gain": found["gain"],
        "gain_low": found["interval"][0],
        "gain_high": found["interval"][1],
        **{f"{scorer}_gain": gain["gain"] for scorer, gain in found["gains"].items()},
        "win_rate": row["win_rate"][by]["value"],
        "length_controlled_win_rate": controlled and controlled["value"],
        "win_rate_against_human": row["win_rate_against_human"][by]["value"],
        "kl": row["kl"]["value"],
        "length": row["length"],
        "eos_rate": row["eos_rate"],
        "reward_accuracy": model["accuracy"],
        "best_baseline": model["best_baseline"],
        "best_possible": model["best_possible"],
        "share_of_the_way": model["share_of_the_way"],
    }
    words = {}
    if beside := found["champion"]:
        words = {"champion": beside["word"]}
        low, high = beside["interval"]
        numbers |= {"champion_gain": beside["gain"], "champion_low": low, "champion_high": high}
    known = {name: value for name, value in numbers.items() if value is not None}
    return {
        "verdict": found["word"],
        **words,
        "by": by,
        "questions": found["questions"],
        "reward_hacking": found["reward_hacking"],
        **known,
    }


def read_json(path: Path) -> Any:
    """The file's content; None where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _json(found: Interval) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}
