"""REPORT.md of `promote`: the decision, and what it rests on."""

from typing import Any

from tasks.pages import SHORT, code, escape, plain, table


def markdown(decision: dict[str, Any]) -> str:
    """decision.json for people."""
    pointer, champion = decision["pointer"], decision.get("champion")
    stays = f"the {pointer} stays" if champion else f"no {pointer} yet"
    headline = f"there is a new {pointer}" if decision["moved"] else stays
    rows = [
        *([("measured against", escape(str(decision["against"])))] if "against" in decision else []),
        ("may become champion", plain(decision["allowed"])),
        ("pointer moved", plain(decision["moved"])),
        ("candidate", code(str(decision["candidate"]["key"])[:SHORT])),
        ("champion before", code(str(champion["key"])[:SHORT]) if champion else "none"),
    ]
    return f"# promote: {headline}\n\n{escape(decision['reason'])}\n\n{table(('verdict', escape(str(decision['word']))), rows)}\n"
