"""May this candidate become champion? Only on the verdict *better*; the pointer itself is moved by the store."""

import json
from pathlib import Path
from typing import Any

from tasks.promote.config import PromoteConfig

WORDS = ("better", "no-evidence", "worse")


def decide(
    config: PromoteConfig, verdict: dict[str, Any], champion: dict[str, Any] | None, candidate: dict[str, Any]
) -> dict[str, Any]:
    """The decision as JSON. `allowed`: the verdict permits it; `moved`: the pointer has to be moved now.

    `champion` (None: there is none yet) and `candidate` name artifacts; they are the same when their "key" is.
    """
    word = verdict.get("word")
    if word not in WORDS:
        raise ValueError(
            f"verdict.json has the word {word!r}, not one of {', '.join(WORDS)}: run evaluate again (--refresh evaluate)"
        )
    low, high = verdict["interval"]
    if (word == "better" and not low > 0) or (word == "worse" and not high < 0):
        raise ValueError(f"verdict.json says {word}, but its interval is {low} to {high}: run evaluate again (--refresh evaluate)")
    held = champion["key"] if champion else None
    measured = f"gain {verdict['gain']:+.3f} by {verdict['by']}, interval {low:+.3f} to {high:+.3f}"
    if word != "better":
        moved, reason = (
            False,
            f"The {config.pointer} stays {held or 'unset'}: the verdict is {word} ({measured}), and only better may move it.",
        )
    elif held == candidate["key"]:
        moved, reason = False, f"{held} is the {config.pointer} already ({measured})."
    else:
        moved, reason = (
            True,
            f"{candidate['key']} becomes {config.pointer} in place of {held or 'none'}: the verdict is better ({measured}).",
        )
    return {
        "pointer": config.pointer,
        "word": word,
        "allowed": word == "better",
        "moved": moved,
        "reason": reason,
        "champion": champion,
        "candidate": candidate,
    }


def promote(
    config: PromoteConfig, *, evaluate: Path, champion: dict[str, Any] | None, candidate: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Read evaluate's verdict, decide, and write decision.json under `out`."""
    path = evaluate / "verdict.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {evaluate} is no artifact of evaluate")
    decision = decide(config, json.loads(path.read_text(encoding="utf-8")), champion, candidate)
    (out / "decision.json").write_text(json.dumps(decision, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return {"word": decision["word"], "allowed": decision["allowed"], "moved": decision["moved"], "reason": decision["reason"]}
