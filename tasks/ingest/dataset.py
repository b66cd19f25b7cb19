"""Reading what `ingest` wrote: the door through which every later step gets its questions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq


def question_files(folder: Path, split: str) -> list[Path]:
    """The Parquet files of one split, over all sites, in a fixed order."""
    files = sorted(folder.glob(f"questions/site=*/split={split}/*.parquet"))
    if not files:
        raise ValueError(f"no questions of split {split!r} under {folder}: the dump is too small for four splits")
    return files


def iter_questions(folder: Path, split: str, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The questions of a split, one dict each, in a fixed order; one row group in memory at a time.

    The columns are those of docs/data.md; `answers` is a list of dicts and `pairs` a list of {"j", "k"}: answers[j] is
    the one that people preferred to answers[k]. Of the splits that are learnt from, what is `contaminated` is left out.
    """
    for path in question_files(folder, split):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=None if columns is None else [*columns, "contaminated"])
                if split != "eval":
                    table = table.filter(pc.invert(table["contaminated"]))
                yield from (table if columns is None else table.select(columns)).to_pylist()


def best_answer(question: dict[str, Any]) -> dict[str, Any]:
    """The answer with the highest pm_score; among equals the accepted one, then more votes, then the earlier id."""
    return min(question["answers"], key=lambda a: (-a["pm_score"], not a["selected"], -a["votes"], a["answer_id"]))
