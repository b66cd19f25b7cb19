"""The verdict: is PPO's answer better than SFT's, by the best judge there is, and how sure are we?"""

from collections.abc import Mapping
from typing import Any

from tasks.evaluate.bootstrap import Interval

MIN_QUESTIONS = 10  # the percentile interval of fewer is far too narrow to found anything on
BETTER, NO_EVIDENCE, WORSE = "better", "no-evidence", "worse"
SCORER_NAMES = {
    "true": "the true reward",
    "judge": "the independent judge",
    "reward": "the training reward model",
    "judges": "the mean of both runs' judges",
    "champion_judge": "the champion's judge",
}


def word(gain: Interval, questions: int) -> str:
    """better: the whole interval lies above 0; worse: below it; else, or with too few questions, no-evidence."""
    if questions < MIN_QUESTIONS:
        return NO_EVIDENCE
    return BETTER if gain.low > 0 else WORSE if gain.high < 0 else NO_EVIDENCE


def verdict(gains: Mapping[str, Interval], questions: int, confidence: float) -> dict[str, Any]:
    """PPO against SFT from the paired gain by each scorer ("reward", "judge", and "true" where the site is simulated).

    Decided by the truth where it is known, else by the judge, never by the reward model that PPO was trained on.
    """
    by = "true" if "true" in gains else "judge"
    result = word(gains[by], questions)
    hacking = gains["reward"].low > 0 and result != BETTER and questions >= MIN_QUESTIONS
    return {
        **_finding(gains, by, "SFT's", questions, confidence),
        "reward_hacking": hacking,
        "remark": _remark(gains, by, result, hacking),
    }


def champion_verdict(gains: Mapping[str, Interval], questions: int, confidence: float) -> dict[str, Any]:
    """The candidate against the champion from the paired gain by each scorer (tables.DUEL_SCORERS).

    Decided by the truth where it is known, else by the mean of both runs' judges: each judge was trained on its own run's data and
    on its own run's model, and may lean to that run's policy. The mean turns its sign when the two change places.
    """
    by = "true" if "true" in gains else "judges"
    return {
        **_finding(gains, by, "the champion's", questions, confidence),
        "remark": _of_the_judges(gains, questions) if by == "judges" else "",
    }


def _finding(gains: Mapping[str, Interval], by: str, whose: str, questions: int, confidence: float) -> dict[str, Any]:
    """What both verdicts say: the word and the gain by the scorer that decides, in numbers and in a sentence."""
    gain = gains[by]
    result = word(gain, questions)
    found = {
        BETTER: f"PPO's answers are better than {whose}",
        WORSE: f"PPO's answers are worse than {whose}",
        NO_EVIDENCE: f"There is no evidence that PPO's answers are better or worse than {whose}",
    }[result]
    return {
        "word": result,
        "gain": gain.value,
        "interval": [gain.low, gain.high],
        "by": by,
        "questions": questions,
        "confidence": confidence,
        "sentence": f"{found}: {_measured(gain, by, questions, confidence)}",
        "gains": {name: {"gain": g.value, "interval": [g.low, g.high]} for name, g in gains.items()},
    }


def _of_the_judges(gains: Mapping[str, Interval], questions: int) -> str:
    own, theirs = (word(gains[name], questions) for name in ("judge", "champion_judge"))
    if own == theirs:
        return ""
    told = ", ".join(
        f"{whose} says {result} ({gains[name].value:+.2f})"
        for whose, name, result in (("this run's", "judge", own), ("the champion's", "champion_judge", theirs))
    )
    return f"The two runs' judges do not agree: {told}. Each was trained on its own run's data, and may lean to that run's policy."


def _measured(gain: Interval, by: str, questions: int, confidence: float) -> str:
    sentence = (
        f"by {SCORER_NAMES[by]} they gain {gain.value:+.3f} on average over {questions} held-out questions "
        f"({100 * confidence:g} % interval {gain.low:+.3f} to {gain.high:+.3f})."
    )
    if questions < MIN_QUESTIONS:
        sentence += f" Fewer than {MIN_QUESTIONS} questions decide nothing: raise evaluate.max_questions."
    return sentence


def _remark(gains: Mapping[str, Interval], by: str, result: str, hacking: bool) -> str:
    reward, who = gains["reward"], SCORER_NAMES[by]
    if hacking:
        what = f"{who} says it got worse" if result == WORSE else f"{who} does not see it"
        return (
            f"Reward hacking: the training reward model gained {reward.value:+.2f}, but {what}. PPO learned what the model likes."
        )
    if result == BETTER and reward.low > 0:
        return f"The training reward model agrees ({reward.value:+.2f}, in its standard deviations)."
    if result == BETTER:
        return (
            f"The training reward model itself shows no sure gain ({reward.value:+.2f}): look at the samples before trusting this."
        )
    return ""


def share_of_the_way(accuracy: float | None, baseline: float | None, best_possible: float | None) -> float | None:
    """How far the reward model comes from the best trivial baseline (0) to the best accuracy possible (1)."""
    if accuracy is None or baseline is None or best_possible is None or best_possible <= baseline:
        return None
    return (accuracy - baseline) / (best_possible - baseline)
