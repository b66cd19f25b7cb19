"""Small dumps written by hand, and the way to the real ones where this machine has them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.compute import Compute
from tasks.ingest.config import IngestConfig
from tasks.ingest.ingest import ingest
from tasks.progress import Progress

HEAD = '\ufeff<?xml version="1.0" encoding="utf-8"?>\r\n'


def row(
    id: int, kind: int, score: int = 0, body: str = "&lt;p&gt;Text.&lt;/p&gt;&#xA;", parent: int | None = None, **more: Any
) -> str:
    """A row as dumps write it; values are given escaped."""
    cells = {"Id": id, "PostTypeId": kind, "AcceptedAnswerId": more.pop("accepted", None), "ParentId": parent}
    cells |= {"CreationDate": more.pop("created", "2015-01-02T03:04:05.678"), "Score": score, "Body": body}
    cells |= {"OwnerUserId": more.pop("owner", 7), **more}
    return "<row " + " ".join(f'{name}="{value}"' for name, value in cells.items() if value is not None) + " />"


def question(id: int, **more: Any) -> str:
    return row(id, 1, **{"Title": f"Question {id}?", "Tags": "&lt;oil&gt;&lt;wax&gt;", **more})


def answer(id: int, parent: int, score: int = 0, **more: Any) -> str:
    return row(id, 2, score, **{"parent": parent, "body": f"&lt;p&gt;Answer {id}.&lt;/p&gt;", **more})


def table(rows: list[str], root: str = "posts", end: str = "\r\n") -> bytes:
    return (HEAD.replace("\r\n", end) + f"<{root}>{end}" + "".join(f"  {r}{end}" for r in rows) + f"</{root}>").encode()


def plain_site(questions: int = 40) -> list[str]:
    """Question n has the id 10 n, and answers 10 n + 1, ... with votes 0, 1, 2, ...: two to five of them."""
    rows = []
    for n in range(1, questions + 1):
        answers = 2 + n % 4
        rows.append(question(10 * n, accepted=10 * n + 1))
        rows += [answer(10 * n + a, 10 * n, score=a - 1, owner=n % 5) for a in range(1, answers + 1)]
    return rows


class Site:
    """What a test needs to write a dump, to run ingest on it, and to read what came out."""

    question, answer, row, table, plain = (
        staticmethod(question),
        staticmethod(answer),
        staticmethod(row),
        staticmethod(table),
        staticmethod(plain_site),
    )

    def __init__(self, tmp: Path) -> None:
        self.tmp, self.runs = tmp, 0

    def write(self, rows: list[str] | bytes, name: str = "wood.test.xml", **more: Any) -> Path:
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rows if isinstance(rows, bytes) else table(rows, **more))
        return path

    def ingest(self, *dump: Path, workers: int = 1, **config: Any) -> tuple[Path, dict[str, Any]]:
        self.runs += 1
        out = self.tmp / f"out-{self.runs}"
        out.mkdir()
        config = {"max_quarantine": 1.0, **config}
        made = IngestConfig(dump=tuple(map(str, dump)), **config)
        return out, ingest(made, out=out, compute=Compute(workers=workers), progress=Progress("ingest"))

    @staticmethod
    def read(out: Path, table: str) -> list[dict[str, Any]]:
        paths = sorted(out.glob(f"{table}/**/*.parquet"))
        return pa.concat_tables([pq.ParquetFile(path).read() for path in paths]).to_pylist() if paths else []


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture(scope="session")
def real_dump() -> Callable[[str], Path]:
    """The path of a real dump such as 2020-06/beer.stackexchange.com.7z; skips where there is none."""
    places = [Path(os.environ["STACKRLHF_DUMPS"])] if "STACKRLHF_DUMPS" in os.environ else []
    places.append(Path(__file__).parents[3] / "shared" / "data" / "dumps")

    def find(name: str) -> Path:
        for place in places:
            if (place / name).exists():
                return place / name
        pytest.skip(
            f"no real dump {name}: set STACKRLHF_DUMPS to the folder that holds it (looked in {', '.join(map(str, places))})"
        )

    return find
