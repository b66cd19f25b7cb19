"""The rows of a dump that `ingest` could not read, out of its artifact: where each stands, what is wrong with it, how it starts."""

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flows.show import console, printable, table
from tasks.artifacts import Store

SHOWN = 20  # rows in the table unless --limit says otherwise
START = 60  # characters of a row in the table
BATCH = 200  # rows read at once; each holds 64,000 bytes at most


def quarantine(arguments: argparse.Namespace) -> int:
    """A summary by reason and the first rows; with --json one object a row and nothing else."""
    files, where = _find(Store(arguments.store), arguments.artifact)
    wanted = arguments.reason or ""
    if arguments.json:
        for row in islice(_rows(files, wanted), arguments.limit):
            print(json.dumps({**row, "raw": row["raw"].decode("utf-8", "backslashreplace")}))
        return 0
    kinds, places = Counter[str](), defaultdict[str, set[tuple[str, str]]](set)
    for row in _rows(files, wanted, ["site", "file", "reason"]):
        kind = _kind(row["reason"])
        kinds[kind] += 1
        places[kind].add((row["site"], row["file"]))
    if not kinds:
        print(f"{where}: no row is in quarantine" + (f" for a reason with {wanted!r} in it" if wanted else ""))
        return 0
    out, total = console(sys.stdout), kinds.total()
    summary = [(str(count), printable(kind), str(len(places[kind]))) for kind, count in kinds.most_common()]
    print(f"{total} {'row' if total == 1 else 'rows'} in quarantine, {where}")
    out.print(table("", ("rows", "reason", "files"), summary))
    print()
    limit = SHOWN if arguments.limit is None else arguments.limit
    shown = [
        (*map(printable, (row["site"], row["file"])), str(row["line"]), str(row["offset"]), printable(row["reason"]), _start(row))
        for row in islice(_rows(files, wanted), limit)
    ]
    out.print(table("", ("site", "file", "line", "offset", "reason", "starts with"), shown))
    if total > limit:
        out.print(f"and {total - limit} more: --limit {total} shows them all, --json whole", markup=False)
    return 0


def _find(store: Store, asked: str | None) -> tuple[list[Path], str]:
    """The Parquet files to show, and words for where they are; ValueError where there are none."""
    key = (asked or "").removeprefix("ingest/")
    manifests = store.manifests("ingest")
    found = [manifest for manifest in manifests if manifest.key.startswith(key)]
    if found:
        if asked and len({manifest.key for manifest in found}) > 1:
            raise ValueError(f"{asked} is the beginning of {len(found)} keys of ingest: give more of it")
        artifact = store.artifact(found[-1])
        # Not store.open() where a look will do: it reads every byte of the artifact, which may be the whole of Stack Overflow.
        folder = Path(artifact.uri) if Path(artifact.uri).is_dir() else store.open(artifact)
        return _files(folder), f"ingest {artifact.key[:12]} of {store.uri}"
    if asked and Path(asked).expanduser().exists():
        return _files(Path(asked).expanduser()), asked
    if asked:
        known = ", ".join(manifest.key[:12] for manifest in manifests[-3:])
        raise ValueError(
            f"{asked}: no file, no folder and no ingest artifact of {store.uri}"
            + (f": it holds {known}" if known else ", which holds none: run the pipeline first (stackrlhf run --until ingest)")
        )
    raise ValueError(
        f"{store.uri} holds no ingest artifact: run the pipeline first (stackrlhf run --until ingest), or name another --store"
    )


def _files(place: Path) -> list[Path]:
    """The quarantine's files in an artifact's folder, in its folder quarantine/, or the one file given."""
    folder = place / "quarantine" if (place / "quarantine").is_dir() else place
    files = sorted(folder.glob("*.parquet")) if folder.is_dir() else [folder]
    if not files:
        raise ValueError(f"{place}: no quarantine/*.parquet in it: give the folder of an ingest artifact")
    for file in files:
        try:
            names = set(pq.read_schema(file).names)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file}: not a Parquet file that can be read ({error})") from error
        if not {"site", "file", "offset", "line", "reason", "raw"} <= names:
            raise ValueError(f"{file}: not a table of quarantined rows: give the folder of an ingest artifact, or its quarantine/")
    return files


def _rows(files: Sequence[Path], wanted: str, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Row after row, in the memory of a batch; those whose reason holds `wanted`."""
    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH, columns=columns):
                yield from (row for row in batch.to_pylist() if wanted in row["reason"])


def _kind(reason: str) -> str:
    """A reason without what differs from row to row: what follows a colon, and numbers."""
    return re.sub(r"(?<![\w-])\d+", "N", reason.split(": ", 1)[0])


def _start(row: dict[str, Any]) -> str:
    text = printable(row["raw"][: 4 * START].decode("utf-8", "backslashreplace"))
    return text if len(text) <= START else text[:START] + "..."
