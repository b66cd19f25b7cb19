"""The command is told to end, or is killed, in the middle of a training: run again, it goes on and ends in the same artifact."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.cli import INTERRUPTED, main
from tasks.artifacts import Store
from tasks.progress import Update, listening

pytestmark = pytest.mark.usefixtures("prefect_server")

SMALL = ["--preset", "ci", "--set", "ingest.simulate.questions=60", "--set", "base.scratch.steps=2", "--threads", "1"]
SFT = [*SMALL, "--set", "sft.steps=12", "--set", "sft.lora.dropout=0.1", "--until", "sft", "--checkpoint-seconds", "0"]


def digest(store: Path) -> str:
    (manifest,) = (manifest for manifest in Store(store).list() if manifest.step == "sft")
    return manifest.digest


def kept(store: Path) -> list[Path]:
    return sorted((store / "tmp").glob("*.kept/step-????????"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A store with the steps before sft."""
    store = tmp_path_factory.mktemp("prepared") / "store"
    assert main(["run", *SMALL, "--until", "base", "--store", str(store)]) == 0
    return store


@pytest.fixture(scope="module")
def expected(prepared, tmp_path_factory) -> str:
    """Digest of the sft that nobody disturbed."""
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    shutil.copytree(prepared, store)
    assert main(["run", *SFT, "--store", str(store)]) == 0
    assert kept(store) == []
    return digest(store)


@pytest.fixture
def store(prepared, tmp_path) -> Path:
    shutil.copytree(prepared, tmp_path / "store")
    return tmp_path / "store"


def go_on(store: Path) -> list[str]:
    """Run again to the end; what the step says of where it was."""
    notes = []
    with listening(lambda update: notes.append(update.note)):
        assert main(["run", *SFT, "--store", str(store)]) == 0
    assert kept(store) == []
    return [note for note in notes if "resumed" in note]


def test_sigterm_ends_the_command_with_75_and_the_same_command_goes_on(store, expected, capsys):
    def terminate(update: Update) -> None:
        if update.step == "sft" and update.phase == "train" and update.done == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with listening(terminate):
        assert main(["run", *SFT, "--store", str(store), "--json"]) == INTERRUPTED
    said = capsys.readouterr()
    assert "interrupted (saved at step 5); what was finished is stored, run the same command to go on" in said.err.splitlines()[-1]
    assert json.loads(said.out)["steps"]["sft"]["state"] == "to-run"
    assert signal.getsignal(signal.SIGTERM) == before
    assert go_on(store) == ["resumed from step 5 of 12"]
    assert digest(store) == expected


def test_a_command_that_is_killed_by_9_goes_on_where_its_last_checkpoint_was(store, expected):
    from prefect.settings import PREFECT_API_URL

    command = [sys.executable, "-m", "flows.rlhf", *SFT, "--store", str(store)]
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value() or ""}  # a server of its own would cost it seconds
    killed = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2])
    until = time.monotonic() + 120
    while not kept(store) and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    killed.kill()
    _, error = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, error.decode()
    resumed = go_on(store)
    assert len(resumed) == 1
    assert resumed[0].startswith("resumed from step ")
    assert digest(store) == expected
