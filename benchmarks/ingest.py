"""How fast a dump becomes preference pairs: our engine beside the usual way, on the same file, one after the other.

    python benchmarks/ingest.py big.xml                        # made by ../shared/data/make_big_dump.py 128 big.xml
    python benchmarks/ingest.py big.xml --questions answered   # ours keeps every answered question, as it does by default
    python benchmarks/ingest.py big.xml --workers 2 --only ours

*The usual way* is how `lvwerra/stack-exchange-paired` was made: the whole file is parsed into memory, answers are grouped by
question and scored, at most ten pairs a question are sampled, and markdownify converts the question and both answers of every pair,
as it comes; then Parquet. It gets the fastest whole-file parser of the standard library and as little else as possible. With
`--kind` it converts each question once for all its pairs, which the original did not. By default ours is asked for the same work,
questions with pairs and the answers in them (`ingest.questions=paired`).

Each runs in a process of its own; seconds are those of its work (user and system, its workers included), without the time that
Python takes to start and to import; peak memory is that of the largest process, all in. Ours is short: it runs `--rounds` times,
half of them before the usual way and half behind it; the round of the median CPU time counts, and `rounds_cpu_s` has them all.
One JSON line on stdout:

    {"ours": {"mb_per_cpu_s", "mb_per_s", "peak_bytes", "pairs", "cpu_s", "seconds"}, "usual": {the same},
     "ratio_cpu", "file", "bytes", "workers", "questions", "commit"}
"""

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MOST_PAIRS = 10


def usual(dump: Path, out: Path, kind: bool) -> int:
    """Whole-file parse, markdownify per pair; the number of pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tasks.ingest.markdown import markdownify_original as markdownify

    questions, answers = {}, defaultdict(list)
    for row in ElementTree.parse(dump).getroot():
        if row.get("PostTypeId") == "1":
            questions[row.get("Id")] = row
        elif row.get("PostTypeId") == "2":
            answers[row.get("ParentId")].append(row)
    sample = random.Random(0)
    records: list[dict[str, Any]] = []
    for qid, question in questions.items():
        scored = []
        for answer in answers.get(qid, ()):
            votes = int(answer.get("Score", "0"))
            accepted = answer.get("Id") == question.get("AcceptedAnswerId")
            scored.append((-1 if votes < 0 else round(math.log2(1 + votes)) + accepted, answer))
        pairs = [(a, b) if a[0] > b[0] else (b, a) for a, b in combinations(scored, 2) if a[0] != b[0]]
        if not pairs:
            continue
        text = markdownify(question.get("Body", "")) if kind else None
        for (_, better), (_, worse) in sample.sample(pairs, MOST_PAIRS) if len(pairs) > MOST_PAIRS else pairs:
            records.append(
                {
                    "qid": int(qid or 0),
                    "question": markdownify(question.get("Body", "")) if text is None else text,
                    "date": question.get("CreationDate", "")[:10].replace("-", "/"),
                    "metadata": [f"https://example.test/questions/{qid}", "https://example.test", ""],
                    "response_j": markdownify(better.get("Body", "")),
                    "response_k": markdownify(worse.get("Body", "")),
                }
            )
    pq.write_table(pa.Table.from_pylist(records), out / "pairs.parquet", compression="zstd")
    return len(records)


def ours(dump: Path, out: Path, workers: int, questions: str) -> int:
    from tasks.compute import Compute
    from tasks.ingest.config import IngestConfig
    from tasks.ingest.ingest import ingest
    from tasks.progress import Progress

    config = IngestConfig.model_validate({"dump": (str(dump),), "questions": questions})
    (out / "made").mkdir()
    return int(ingest(config, out=out / "made", compute=Compute(workers=workers), progress=Progress("ingest"))["pairs"])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one contestant here and tell what it took."""
    # Imported before the clock starts, for both; Arrow imports more when it first writes a file.
    import pyarrow as pa
    import pyarrow.parquet as pq

    import tasks.ingest.ingest  # noqa: F401
    from tasks.ingest.markdown import markdownify_original

    markdownify_original("<p>warm</p>")
    with tempfile.TemporaryFile() as file:
        pq.write_table(pa.table({"warm": [1]}), file)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        out = Path(name)
        before, started = _cpu_seconds(), time.perf_counter()
        if arguments.contestant == "usual":
            pairs = usual(arguments.dump, out, arguments.kind)
        else:
            pairs = ours(arguments.dump, out, arguments.workers, arguments.questions)
        seconds, cpu = time.perf_counter() - started, _cpu_seconds() - before
    size = arguments.dump.stat().st_size / 1e6
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "mb_per_cpu_s": round(size / cpu, 3),
        "mb_per_s": round(size / seconds, 3),
        "peak_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        "pairs": pairs,
        "cpu_s": round(cpu, 2),
        "seconds": round(seconds, 2),
    }


def _cpu_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _run(arguments: argparse.Namespace, contestant: str) -> dict[str, Any]:
    command = [sys.executable, __file__, str(arguments.dump), "--contestant", contestant]
    command += ["--workers", str(arguments.workers), "--questions", arguments.questions]
    command += ["--kind"] if arguments.kind else []
    command += ["--scratch", str(arguments.scratch)] if arguments.scratch else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{contestant}: {found}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path, help="a Posts.xml, unpacked")
    parser.add_argument("--workers", type=int, default=1, help="processes of ours (default 1)")
    parser.add_argument("--questions", choices=["paired", "answered"], default="paired", help="what ours keeps (default paired)")
    parser.add_argument("--kind", action="store_true", help="let the usual way convert each question once")
    parser.add_argument("--rounds", type=int, default=3, help="how often ours runs (default 3)")
    parser.add_argument("--only", choices=["ours", "usual"], help="one of them; no ratio then")
    parser.add_argument("--scratch", type=Path, help="folder for what is made (default: the system's)")
    parser.add_argument("--contestant", choices=["ours", "usual"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.dump.is_file() or arguments.dump.suffix != ".xml":
        parser.error(f"{arguments.dump}: give an unpacked Posts.xml; ../shared/data/make_big_dump.py makes one of any size")
    if arguments.contestant:
        print(json.dumps(measure(arguments)))
        return
    ours = [_run(arguments, "ours") for _ in range((arguments.rounds + 1) // 2)] if arguments.only != "usual" else []
    result: dict[str, Any] = {"usual": _run(arguments, "usual")} if arguments.only != "ours" else {}
    if ours:
        ours += [_run(arguments, "ours") for _ in range(arguments.rounds // 2)]
        ours.sort(key=lambda one: one["cpu_s"])
        result = {"ours": ours[len(ours) // 2] | {"rounds_cpu_s": [one["cpu_s"] for one in ours]}, **result}
    if not arguments.only:
        if result["ours"]["pairs"] != result["usual"]["pairs"]:
            sys.exit(f"the pairs differ, so the rates cannot be compared: {result}")
        result["ratio_cpu"] = round(result["ours"]["mb_per_cpu_s"] / result["usual"]["mb_per_cpu_s"], 2)
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result |= {"file": arguments.dump.name, "bytes": arguments.dump.stat().st_size, "workers": arguments.workers}
    result |= {"questions": arguments.questions, "commit": commit.stdout.strip()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
