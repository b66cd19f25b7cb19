"""May this candidate become champion? Only on the verdict *better*; the pointer itself is moved by the store.

Where there is a champion, the comparison with it decides; else that with the candidate's own sft. What is worse than its own sft
never becomes champion.
"""

import json
from pathlib import Path
from typing import Any

from tasks.promote.config import PromoteConfig
from tasks.promote.report import markdown

WORDS = ("better", "no-evidence", "worse")


def decide(
    config: PromoteConfig, verdict: dict[str, Any], champion: dict[str, Any] | None, candidate: dict[str, Any]
) -> dict[str, Any]:
    """The decision as JSON. `allowed`: the verdicts permit it; `moved`: the pointer has to stand on the candidate.

    `champion` (None: there is none yet) and `candidate` are entries of the pointer; they are the same when their "key" is.
    """
    held = champion["key"] if champion else None
    if held == candidate["key"]:
        raise ValueError(f"{held[:12]} is the {config.pointer} already, and cannot beat itself: run the pipeline again")
    own, beside = _checked(verdict, "its own sft"), verdict.get("champion")
    if (beside or {}).get("key") != held:
        met = (beside or {}).get("key")
        raise ValueError(
            f"verdict.json compares with the champion {met and met[:12]}, and the {config.pointer} is {held and held[:12]}: "
            "run evaluate again"
        )
    deciding = _checked(beside, "the champion") if beside else own
    allowed = deciding["word"] == "better" and own["word"] != "worse"
    return {
        "pointer": config.pointer,
        "against": "champion" if beside else "sft",
        "word": deciding["word"],
        "allowed": allowed,
        "moved": allowed,
        "reason": _reason(config.pointer, allowed, own, deciding, candidate["key"], held),
        "verdicts": {"sft": own, "champion": deciding if beside else None},
        "champion": champion,
        "candidate": candidate,
    }


def _checked(verdict: dict[str, Any], against: str) -> dict[str, Any]:
    """What a verdict says, if it is one."""
    word = verdict.get("word")
    if word not in WORDS:
        raise ValueError(
            f"verdict.json has the word {word!r} against {against}, not one of {', '.join(WORDS)}: "
            "run evaluate again (--refresh evaluate)"
        )
    low, high = verdict["interval"]
    if (word == "better" and not low > 0) or (word == "worse" and not high < 0):
        raise ValueError(
            f"verdict.json says {word} against {against}, but its interval is {low} to {high}: "
            "run evaluate again (--refresh evaluate)"
        )
    return {name: verdict[name] for name in ("word", "gain", "interval", "by")}


def _reason(pointer: str, allowed: bool, own: dict[str, Any], deciding: dict[str, Any], candidate: str, held: str | None) -> str:
    of_own = f"against its own sft the verdict is {_told(own)}"
    of_champion = f"against the {pointer} the verdict is {_told(deciding)}"
    if allowed:
        place = f"{candidate[:12]} becomes {pointer} in place of {held[:12] if held else 'none'}"
        return f"{place}: {of_champion}; {of_own}." if held else f"{place}: {of_own}."
    if not held:
        return f"The {pointer} stays unset: {of_own}, and only better may set it."
    if deciding["word"] == "better":
        return f"The {pointer} stays {held[:12]}: {of_champion}, but {of_own}, and what is worse than its sft is never promoted."
    return f"The {pointer} stays {held[:12]}: {of_champion}, and only better may move it; {of_own}."


def _told(verdict: dict[str, Any]) -> str:
    low, high = verdict["interval"]
    return f"{verdict['word']} (gain {verdict['gain']:+.3f} by {verdict['by']}, interval {low:+.3f} to {high:+.3f})"


def promote(
    config: PromoteConfig, *, evaluate: Path, champion: dict[str, Any] | None, candidate: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Read evaluate's verdict, decide, and write decision.json under `out`."""
    path = evaluate / "verdict.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {evaluate} is no artifact of evaluate")
    decision = decide(config, json.loads(path.read_text(encoding="utf-8")), champion, candidate)
    (out / "decision.json").write_text(json.dumps(decision, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (out / "REPORT.md").write_text(markdown(decision), encoding="utf-8")
    return {name: decision[name] for name in ("word", "against", "allowed", "moved", "reason")} | {"candidate": candidate["key"]}
