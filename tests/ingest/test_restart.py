"""A run that was killed goes on where it was: the same records, no row twice, nothing that was finished done again."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks import scratch

CHILD = """
import json, os, signal, sys
from pathlib import Path
from tasks.compute import Compute
from tasks.ingest import engines, ingest as step
from tasks.ingest.config import IngestConfig
from tasks.progress import Progress

dump, out, kept, workers, kill_at, when = sys.argv[1:]
step.BLOCK_BYTES = step.PARTITION_BYTES = (6_000, 6_000, 1_000)
engines.POOL_BYTES = 0
renamed = []
rename = Path.rename

def counting(self, target):
    here = Path(target).name
    if len(renamed) == int(kill_at) and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    renamed.append(here)
    result = rename(self, target)
    if len(renamed) == int(kill_at) and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return result

Path.rename = counting
Path(out).mkdir(parents=True)
config = IngestConfig(dump=(dump,), max_quarantine=1)
step.ingest(config, out=Path(out), compute=Compute(workers=int(workers)), progress=Progress("ingest"), kept=Path(kept))
print(json.dumps(renamed))
"""


def start(dump: Path, out: Path, kept: Path, workers: int = 1, kill_at: int = -1, when: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(dump), str(out / "made"), str(kept), str(workers), str(kill_at), when]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen[str]) -> list[str]:
    """Names of the folders that the run finished."""
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    return list(json.loads(out.splitlines()[-1]))


def digests(out: Path) -> dict[str, str]:
    found = {str(p.relative_to(out / "made")): hashlib.sha256(p.read_bytes()).hexdigest() for p in out.rglob("*.parquet")}
    assert found
    return found


@pytest.fixture
def dump(site) -> Path:
    """A table that is cut into five blocks and as many partitions, with a row that nobody can read in it."""
    rows = site.plain(40)
    return site.write([*rows[:90], site.answer(999, 10).replace("Answer", "Answer <"), *rows[90:]])


def test_killed_after_any_unit_of_work_the_run_goes_on_behind_it(site, dump, tmp_path):
    whole = finish(start(dump, tmp_path / "whole", tmp_path / "kept-whole"))
    assert sorted(whole) == [f"{n:05}" for n in range(5)] + [f"posts-{n:05}" for n in range(5)]
    expected = digests(tmp_path / "whole")
    assert not (tmp_path / "kept-whole").exists()
    for kill_at, when in [(0, "before"), (3, "before"), (5, "after"), (8, "after"), (10, "after")]:
        kept = tmp_path / f"kept-{kill_at}-{when}"
        killed = start(dump, tmp_path / f"killed-{kill_at}-{when}", kept, kill_at=kill_at, when=when)
        assert killed.wait(timeout=120) == -signal.SIGKILL
        again = finish(start(dump, tmp_path / f"again-{kill_at}-{when}", kept))
        assert digests(tmp_path / f"again-{kill_at}-{when}") == expected, (kill_at, when)
        assert again == whole[kill_at:], (kill_at, when)
        assert not kept.exists()


def test_killed_with_its_workers_at_any_moment_it_gives_the_same_records(site, dump, tmp_path):
    finish(start(dump, tmp_path / "whole", tmp_path / "kept-whole"))
    for turn, pause in enumerate((0.4, 0.9, 1.4)):
        killed = start(dump, tmp_path / f"killed-{turn}", tmp_path / "kept", workers=2)
        time.sleep(pause)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait(timeout=120)
    finish(start(dump, tmp_path / "again", tmp_path / "kept", workers=2))
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")


def leave(kept: Path, private: Path, plan: dict, error: BaseException) -> None:
    """A run that ends in the middle, with half its work done."""
    with scratch.scratch(kept, private, plan) as folder:
        (folder / "work").write_text("half")
        raise error


def test_scratch_of_another_plan_is_not_believed(tmp_path):
    kept = tmp_path / "kept"
    for plan in ({"a": 1}, {"a": 2}):
        with pytest.raises(KeyboardInterrupt):
            leave(kept, tmp_path, plan, KeyboardInterrupt())
    with scratch.scratch(kept, tmp_path, {"a": 2}) as folder:
        assert (folder / "work").read_text() == "half"
    assert not kept.exists()
    with pytest.raises(KeyboardInterrupt):
        leave(kept, tmp_path, {"a": 1}, KeyboardInterrupt())
    with scratch.scratch(kept, tmp_path, {"a": 2}) as folder:
        assert not (folder / "work").exists()


def test_scratch_from_before_the_machine_was_started_anew_is_not_believed(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        leave(tmp_path / "kept", tmp_path, {}, KeyboardInterrupt())
    monkeypatch.setattr(scratch.psutil, "boot_time", time.time)
    with scratch.scratch(tmp_path / "kept", tmp_path, {}) as folder:
        assert not (folder / "work").exists()


def test_two_runs_at_once_do_not_share_their_scratch(tmp_path):
    kept = tmp_path / "kept"
    with scratch.scratch(kept, tmp_path, {}) as first, scratch.scratch(kept, tmp_path, {}) as second:
        assert first == kept
        assert second != kept


def test_what_the_user_gave_wrong_leaves_no_scratch(tmp_path):
    with pytest.raises(ValueError, match="rubbish"):
        leave(tmp_path / "kept", tmp_path, {}, ValueError("rubbish"))
    assert not (tmp_path / "kept").exists()
