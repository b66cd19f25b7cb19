"""The rows that could not be read, shown; and what the command's exit code says of a dump that is not as it should be."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.cli import main
from tasks.artifacts import Identity, Store


def run(capsys, *argv: Any) -> tuple[int, str, str]:
    try:
        code = main([str(one) for one in argv])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


def bad(number: int, reason: str, raw: bytes, file: str = "wood.test.7z/Posts.xml", site: str = "wood.test") -> dict[str, Any]:
    digest = hashlib.sha256(raw).hexdigest()
    return {"site": site, "file": file, "offset": 1000 * number, "line": number, "reason": reason, "raw": raw, "sha256": digest}


ROWS = [
    bad(7, "raw < in Body", b'<row Id="7" Body="1 < 2" />'),
    bad(8, "invalid UTF-8 at byte 8044", b'<row Id="8" Body="caf\xe9" />'),
    bad(9, "invalid UTF-8 at byte 9044", '<row Id="9" Body="é \u202e\x1b[31m" \r\n/>'.encode()),
    bad(3, "Id is not a whole number: 'x: 3'", b'<row Id="x: 3" />', file="wood.test.7z/Users.xml"),
    bad(4, "raw < in Body", b"<row " + b"x" * 64_000, site="steel.test"),
]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True)
    kinds = {"offset": pa.int64(), "line": pa.int64(), "raw": pa.binary()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in ROWS[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def publish(store: Store, rows: list[dict[str, Any]], name: str = "a") -> str:
    """An ingest artifact with these rows in quarantine; its key."""
    identity = Identity(step="ingest", version=1, config={"name": name})
    with store.attempt(identity.key) as out:
        write(out / "quarantine" / "part-00000.parquet", rows)
        store.publish(out, identity, metrics={"rows": 100}, seconds=1, peak_memory_bytes=0)
    return identity.key


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def test_the_newest_artifacts_rows_are_summed_up_by_reason_and_shown(store, capsys):
    publish(store, [], "older")
    key = publish(store, ROWS)
    code, out, err = run(capsys, "quarantine", "--store", store.root)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("5 rows in quarantine")
    assert key[:12] in lines[0]
    counts = {line.split("  ")[1].strip(): (int(line.split()[0]), int(line.split()[-1])) for line in map(str.strip, lines[2:5])}
    assert counts == {"raw < in Body": (2, 2), "invalid UTF-8 at byte N": (2, 1), "Id is not a whole number": (1, 1)}
    shown = next(line for line in lines if "8044" in line)
    for part in ("wood.test", "wood.test.7z/Posts.xml", " 8 ", " 8000 ", r'<row Id="8" Body="caf\xe9" />'):
        assert part in shown
    assert r'Body="é \u202e\x1b[31m" \r\n/>' in out  # what steers a terminal is shown, not done
    assert "\x1b" not in out
    assert max(map(len, lines)) <= 160


def test_json_has_every_row_whole(store, capsys):
    publish(store, ROWS)
    code, out, err = run(capsys, "quarantine", "--store", store.root, "--json")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [{**row, "raw": None} for row in rows] == [{**row, "raw": None} for row in ROWS]
    assert rows[1]["raw"] == '<row Id="8" Body="caf\\xe9" />'
    assert rows[2]["raw"] == ROWS[2]["raw"].decode()
    assert len(rows[4]["raw"]) == 64_005


def test_limit_and_reason_choose_rows(store, capsys):
    publish(store, ROWS)
    where = ("quarantine", "--store", store.root)
    assert [json.loads(line)["line"] for line in run(capsys, *where, "--json", "--limit", 2)[1].splitlines()] == [7, 8]
    assert [json.loads(line)["line"] for line in run(capsys, *where, "--json", "--reason", "UTF-8")[1].splitlines()] == [8, 9]
    out = run(capsys, *where, "--limit", 1)[1]
    assert "and 4 more: --limit 5 shows them all" in out
    assert ("8044" in out, "raw <" in out) == (False, True)
    out = run(capsys, *where, "--reason", "whole number")[1]
    assert out.startswith("1 row ")
    assert "UTF-8" not in out
    code, out, _ = run(capsys, *where, "--reason", "no such thing")
    assert (code, len(out.splitlines())) == (0, 1)
    assert "no row is in quarantine for a reason with 'no such thing' in it" in out
    assert run(capsys, *where, "--limit", 0)[0] == 2


def test_twenty_rows_are_shown_unless_more_are_asked_for(store, capsys):
    publish(store, [bad(n, "not a row", b"rubbish") for n in range(1, 31)])
    where = ("quarantine", "--store", store.root)
    assert run(capsys, *where)[1].count("rubbish") == 20
    assert run(capsys, *where, "--limit", 30)[1].count("rubbish") == 30
    assert len(run(capsys, *where, "--json")[1].splitlines()) == 30


def test_an_artifact_is_named_by_its_key_its_folder_or_its_file(store, capsys):
    older, newer = publish(store, ROWS[:1], "older"), publish(store, ROWS[:3], "newer")
    folder = store.folder("ingest", older)
    for name in (
        older,
        older[:9],
        f"ingest/{older[:9]}",
        folder,
        folder / "quarantine",
        folder / "quarantine" / "part-00000.parquet",
    ):
        code, out, _ = run(capsys, "quarantine", name, "--store", store.root, "--json")
        assert (code, len(out.splitlines())) == (0, 1), name
    assert len(run(capsys, "quarantine", newer, "--store", store.root, "--json")[1].splitlines()) == 3


def test_rows_of_several_files_are_shown_one_file_after_the_other(tmp_path, capsys):
    for number, rows in enumerate((ROWS[:2], ROWS[2:])):
        write(tmp_path / "made" / str(number) / "x.parquet", rows)
        (tmp_path / "quarantine").mkdir(exist_ok=True)
        (tmp_path / "made" / str(number) / "x.parquet").rename(tmp_path / "quarantine" / f"part-0000{number}.parquet")
    out = run(capsys, "quarantine", tmp_path, "--json")[1]
    assert [json.loads(line)["line"] for line in out.splitlines()] == [7, 8, 9, 3, 4]


def test_an_empty_quarantine_is_said_in_one_line(store, capsys):
    key = publish(store, [])
    code, out, err = run(capsys, "quarantine", "--store", store.root)
    assert (code, err, len(out.splitlines())) == (0, "", 1)
    assert "no row is in quarantine" in out
    assert key[:12] in out
    assert run(capsys, "quarantine", "--store", store.root, "--json")[:2] == (0, "")


def test_what_is_not_there_is_one_line_and_exit_2(store, capsys, tmp_path):
    def wrong(*argv: Any) -> str:
        code, out, err = run(capsys, "quarantine", *argv, "--store", store.root)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        return err

    assert "holds no ingest artifact: run the pipeline first" in wrong()
    assert "holds none: run the pipeline first" in wrong("abcdef")
    key = publish(store, ROWS)
    assert f"it holds {key[:12]}" in wrong("zzz")
    (tmp_path / "empty").mkdir()
    assert "no quarantine/*.parquet in it" in wrong(tmp_path / "empty")
    (tmp_path / "x.parquet").write_text("not Parquet")
    assert "not a Parquet file" in wrong(tmp_path / "x.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    assert "not a table of quarantined rows" in wrong(tmp_path / "other.parquet")
    keys = [publish(store, [], str(n)) for n in range(17)]  # 17 keys begin with 16 digits, so two begin alike
    both = next(k[0] for n, k in enumerate(keys) if any(k[0] == other[0] for other in keys[:n]))
    assert "give more of it" in wrong(both)


# ---- the exit code of a run, by what the dump is like

DAY = 'CreationDate="2015-01-02T03:04:05.678"'


def dump(path: Path, *odd: str, cut: int = 0) -> Path:
    """Twelve questions with two answers each, of which all make a pair, and the odd rows."""
    rows = []
    for n in range(10, 130, 10):
        rows.append(f'<row Id="{n}" PostTypeId="1" {DAY} Score="1" Title="Question {n}?" Body="Text." />')
        rows += [f'<row Id="{n + a}" PostTypeId="2" ParentId="{n}" {DAY} Score="{9 * a}" Body="Answer {a}." />' for a in (1, 2)]
    data = "<posts>\n" + "".join(f"  {row}\n" for row in [*rows, *odd]) + "</posts>\n"
    path.write_text(data[: len(data) - cut])
    return path


def ingest(capsys, store: Store, path: Path, *more: str) -> tuple[int, str, str]:
    return run(
        capsys, "run", "--preset", "ci", "--dump", path, "--until", "ingest", "--workers", 1, "--store", store.root, *more
    )  # fmt: skip


@pytest.mark.usefixtures("prefect_server")
def test_a_run_with_bad_rows_within_the_threshold_is_done_and_quarantine_shows_them(store, capsys, tmp_path):
    odd = f'<row Id="901" PostTypeId="2" ParentId="10" {DAY} Score="1" Body="1 < 2" />'
    path = dump(tmp_path / "wood.test.xml", odd)
    code, _, err = ingest(capsys, store, path, "--set", "ingest.max_quarantine=0.1")
    assert code == 0, err
    (row,) = map(json.loads, run(capsys, "quarantine", "--store", store.root, "--json")[1].splitlines())
    assert (row["site"], row["file"], row["line"], row["raw"]) == ("wood.test", "wood.test.xml", 38, odd)
    assert path.read_bytes()[row["offset"] :].startswith(odd.encode())
    out = run(capsys, "quarantine", "--store", store.root)[1]
    assert out.startswith("1 row in quarantine")
    assert f" {row['offset']} " in out


@pytest.mark.usefixtures("prefect_server")
def test_a_dump_that_is_wrong_in_itself_exits_with_2_and_is_told_in_one_line(store, capsys, tmp_path):
    for path, parts in (
        (dump(tmp_path / "cut.test.xml", cut=30), ["the dump is cut: 35 rows", "ingest.allow_incomplete=true"]),
        (dump(tmp_path / "bad.test.xml", "rubbish"), ["1 of 37 rows could not be read", "line 38", "ingest.max_quarantine"]),
    ):
        code, out, err = ingest(capsys, store, path, "--json")
        assert code == 2, err
        said = json.loads(out)
        assert said["steps"]["ingest"]["state"] == "failed"
        last = err.strip().splitlines()[-1]
        for part in [path.name, *parts]:
            assert part in last
            assert part in said["error"]
        assert "Traceback" not in err
    assert not store.manifests("ingest")
    assert ingest(capsys, store, tmp_path / "cut.test.xml", "--set", "ingest.allow_incomplete=true")[0] == 0
    assert "no row is in quarantine" in run(capsys, "quarantine", "--store", store.root)[1]


@pytest.mark.usefixtures("prefect_server")
def test_a_step_that_fails_of_itself_exits_with_1(store, capsys, tmp_path, monkeypatch):
    from tasks.ingest import ingest as step

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(step, "ingest", fail)
    code, _, err = ingest(capsys, store, dump(tmp_path / "wood.test.xml"))
    assert code == 1
    assert err.strip().splitlines()[-1].startswith("stackrlhf: ingest failed: KeyError: 'ours' (traceback: ")
