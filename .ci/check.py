"""Are the two runs of `stackrlhf run --json` on the real dump what they must be?  python .ci/check.py FIRST SECOND"""

import json
import sys
from pathlib import Path

STEPS = ["ingest", "base", "sft", "reward", "ppo", "evaluate", "promote"]
COUNTS = {"questions/read": 1029, "answers/read": 2277, "questions_with_pairs": 526, "pairs": 1789}
"""Of beer.stackexchange.com of June 2020, as stated in the README of the dumps."""

first, second = (json.loads(Path(name).read_text()) for name in sys.argv[1:])
wrong = []


def expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        wrong.append(f"{what}: {found!r}, expected {wanted!r}")


expect("steps", list(first["steps"]), STEPS)
for name, wanted in COUNTS.items():
    expect(name, first["steps"]["ingest"]["metrics"].get(name), wanted)
for step in STEPS:
    expect(f"first run, {step}", first["steps"][step]["state"], "ran")
    expect(f"key of {step}", second["steps"][step]["key"], first["steps"][step]["key"])
    expect(f"second run, {step}", second["steps"][step]["state"], "stored")
if first["verdict"]["word"] not in {"better", "no-evidence", "worse"}:
    wrong.append(f"verdict: {first['verdict']}")
expect("verdict of the second run", second["verdict"], first["verdict"])
if not Path(first["report"]).is_file() or "<html" not in Path(first["report"]).read_text(encoding="utf-8").lower():
    wrong.append(f"report: {first['report']} is no HTML page")

if wrong:
    sys.exit("the pipeline on the real dump is not right:\n" + "\n".join(f"  {line}" for line in wrong))
counts = ", ".join(f"{name} {wanted}" for name, wanted in COUNTS.items())
print(f"{counts}; verdict {first['verdict']['word']}; the second run all stored")
