"""Experiment trackers: the real libraries, and their own files read back."""

import contextlib
import json
import logging
import os
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tasks import trackers
from tasks.artifacts import Identity
from tasks.progress import Progress, Update
from tasks.trackers import check_installed, flat, named, reporting

PPO = Identity(step="ppo", version=1, config={"kl_coef": 0.05, "lora": {"r": 8, "alpha": 16}}, inputs={"ingest": "a" * 64})
ROOT = Path(__file__).parents[1]
NAME = f"ppo-{PPO.key[:12]}"


def needs(tracker):
    return pytest.mark.skipif(find_spec(tracker) is None, reason=f"{tracker} is not installed: pip install 'stackrlhf[{tracker}]'")


@pytest.fixture(autouse=True)
def nothing_of_the_user_s(monkeypatch):
    for name in os.environ:
        if name.startswith(("MLFLOW_", "WANDB_", "TRACKIO_", "STACKRLHF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(trackers, "HURRY_SECONDS", 60.0)  # on a busy machine the libraries take their time to load
    monkeypatch.setattr(trackers, "LAST_WORDS_SECONDS", 60.0)


def twice(tracker: str, folder: Path) -> None:
    """Three updates, a stop, and the step goes on from the second to its end."""
    progress = Progress("ppo")
    with contextlib.suppress(RuntimeError), reporting([tracker], PPO, folder):
        for step in (1, 2, 3):
            progress(step, 4, phase="ppo", **{"objective/kl": step / 2, "val/loss": 1.0 / step})
        raise RuntimeError("the machine was lost")
    with reporting([tracker], PPO, folder) as final:
        for step in (3, 4):
            progress(step, 4, phase="ppo", **{"objective/kl": step / 2, "policy/clipfrac": float("nan")})
        Progress("sft")(1, 1, phase="train", loss=9.0)  # another step, in the same process
        final({"score_after": 1.25, "word": "better"})


@needs("tensorboard")
def test_tensorboard_s_event_files_hold_curves_settings_and_result(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    twice("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard" / NAME)).Reload()
    assert set(events.Tags()["scalars"]) == {"ppo/objective/kl", "ppo/val/loss", "ppo/final/score_after"}
    assert {e.step: e.value for e in events.Scalars("ppo/objective/kl")} == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}
    assert [e.value for e in events.Scalars("ppo/final/score_after")] == [1.25]
    settings = events.Tensors("ppo/settings")[0].tensor_proto.string_val[0].decode()
    assert "| lora.alpha | 16 |" in settings
    assert f"| key | {PPO.key} |" in settings
    assert events.Tensors("ppo/final/word")[0].tensor_proto.string_val == [b"better"]


@needs("tensorboard")
def test_tensorboard_s_folder_is_the_environment_s(tmp_path, monkeypatch):
    monkeypatch.setenv("STACKRLHF_TENSORBOARD_DIR", str(tmp_path / "there"))
    with reporting(["tensorboard"], PPO, tmp_path / "here"):
        Progress("ppo")(1, 2, phase="ppo", loss=1.0)
    assert list((tmp_path / "there" / NAME).glob("events.out.*"))
    assert not (tmp_path / "here").exists()


@needs("mlflow")
def test_mlflow_s_database_holds_one_run_with_settings_curves_and_result(tmp_path):
    from mlflow import MlflowClient

    twice("mlflow", tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("stackrlhf")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == NAME
    assert run.info.status == "FINISHED"
    assert run.data.params == {"kl_coef": "0.05", "lora.r": "8", "lora.alpha": "16"}
    assert run.data.tags.items() >= {"step": "ppo", "key": PPO.key, "data": "a" * 12, "ppo/final/word": "better"}.items()
    assert run.data.metrics["ppo/final/score_after"] == 1.25
    history = client.get_metric_history(run.info.run_id, "ppo/objective/kl")
    assert {m.step: m.value for m in history} == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}


@needs("wandb")
def test_wandb_s_offline_files_hold_settings_curves_and_result(tmp_path):
    twice("wandb", tmp_path)
    files = sorted(tmp_path.glob(f"wandb/offline-run-*-{NAME}/*.wandb"))
    records = [record for file in files for record in wandb_records(file)]
    assert {r.run.run_id for r in records if r.HasField("run")} == {NAME}  # one run on the server, whenever they are sent

    def values(items):
        return {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}

    config = [values(r.run.config.update) for r in records if r.HasField("run")][-1]
    assert config.items() >= {"lora.r": 8, "kl_coef": 0.05, "tag.key": PPO.key}.items()
    rows = [values(r.history.item) for r in records if r.HasField("history")]
    assert {row["ppo/step"]: row["ppo/objective/kl"] for row in rows} == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}
    summary = values(update for r in records if r.HasField("summary") for update in r.summary.update)
    assert summary.items() >= {"ppo/final/score_after": 1.25, "ppo/final/word": "better"}.items()
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [1, 0]


def wandb_records(path: Path):
    """LevelDB's log format: blocks of 32 KiB, and in them records of checksum, length and kind (whole, first, middle, last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += -at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:
            yield Record.FromString(parts)
            parts = b""


@needs("trackio")
def test_trackio_s_database_holds_one_run_with_settings_curves_and_result(tmp_path):
    twice("trackio", tmp_path)
    database = sqlite3.connect(tmp_path / "trackio" / "stackrlhf.db")
    rows = [
        (run, step, json.loads(m)) for run, step, m in database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id")
    ]
    assert len({run for run, _, _ in rows}) == 1
    curve = {step: metrics["ppo/objective/kl"] for _, step, metrics in rows if "ppo/objective/kl" in metrics}
    assert curve == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}
    assert rows[-1][2] == {"ppo/final/score_after": 1.25, "ppo/final/word": "better"}
    [(name, config)] = database.execute("SELECT run_name, config FROM configs").fetchall()
    assert name == NAME
    assert json.loads(config).items() >= {"lora.r": 8, "tag.key": PPO.key}.items()


# ---- a tracker never costs the training


def test_one_that_is_not_installed_is_refused_before_anything_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.MODULES, "mlflow", "mlflow_that_nobody_installed")
    for attempt in (lambda: check_installed(["mlflow"]), lambda: reporting(["mlflow"], PPO, tmp_path).__enter__()):
        with pytest.raises(ValueError, match=r"report_to=mlflow.*pip install 'stackrlhf\[mlflow\]'") as refusal:
            attempt()
        assert "\n" not in str(refusal.value)


def test_without_trackers_nothing_is_started(tmp_path):
    before = psutil.Process().children()
    with reporting([], PPO, tmp_path) as final:
        Progress("ppo")(1, 2, loss=1.0)
        final({"score": 1.0})
    assert psutil.Process().children() == before


@needs("tensorboard")
def test_one_that_cannot_write_is_said_once_and_updates_do_not_wait(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STACKRLHF_TENSORBOARD_DIR", str(tmp_path / "file"))
    started = time.monotonic()
    with reporting(["tensorboard"], PPO, tmp_path) as final:
        for step in range(5 * trackers.WAITING_UPDATES):
            Progress("ppo")(step, 99_999, phase="ppo", loss=1.0)
        assert time.monotonic() - started < 5
        final({"score": 1.0})
    [record] = [r for r in caplog.records if r.name == "tasks.trackers"]
    assert record.levelno == logging.WARNING
    assert "tracker tensorboard failed: " in record.message
    assert str(tmp_path / "file") in record.message


@pytest.mark.parametrize(
    ("tracker", "environment"),
    [
        pytest.param("mlflow", {"MLFLOW_TRACKING_URI": "http://{deaf}"}, marks=needs("mlflow")),
        pytest.param(
            "wandb", {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://{deaf}", "WANDB_API_KEY": "0" * 40}, marks=needs("wandb")
        ),
    ],
)
def test_one_whose_server_never_answers_is_ended_with_all_it_started(tracker, environment, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "LAST_WORDS_SECONDS", 4.0)
    before = psutil.Process().children(recursive=True)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts, and never says a word
        for name, value in environment.items():
            monkeypatch.setenv(name, value.format(deaf=f"127.0.0.1:{deaf.getsockname()[1]}"))
        with reporting([tracker], PPO, tmp_path) as final:
            Progress("ppo")(1, 2, phase="ppo", loss=1.0)
            time.sleep(2)
            final({"score": 1.0})
            started = time.monotonic()
        assert time.monotonic() - started < 8
    assert [r.message for r in caplog.records if f"tracker {tracker}" in r.message and "not answer in time" in r.message]
    gone = time.monotonic() + 5
    while (left := set(psutil.Process().children(recursive=True)) - set(before)) and time.monotonic() < gone:
        time.sleep(0.1)
    assert not left


@needs("tensorboard")
def test_one_that_is_killed_costs_a_warning(tmp_path, caplog):
    with reporting(["tensorboard"], PPO, tmp_path) as final:
        Progress("ppo")(1, 2, phase="ppo", loss=1.0)
        [process] = [c for c in psutil.Process().children() if "tasks.tracker" in " ".join(c.cmdline())]
        process.kill()
        Progress("ppo")(2, 2, phase="ppo", loss=1.0)
        final({"score": 1.0})
    assert "tracker tensorboard failed" in caplog.text


@needs("tensorboard")
def test_it_ends_by_itself_when_the_training_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from tasks.trackers import reporting; from tasks.progress import Progress\n"
        "from tasks.artifacts import Identity\n"
        f"with reporting(['tensorboard'], Identity(step='ppo', version=1, config={{}}), Path({str(tmp_path)!r})):\n"
        "    Progress('ppo')(1, 2, phase='ppo', loss=1.5)\n"
        "    print('going', flush=True); time.sleep(60)"
    )
    training = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert training.stdout.readline() == "going\n"
    [tracker] = psutil.Process(training.pid).children()
    training.kill()
    training.wait()
    tracker.wait(30)
    assert list(tmp_path.glob("tensorboard/ppo-*/events.out.*"))  # what it had been told was kept


# ---- names, and what the trainings tell


def test_settings_are_flat_and_the_judge_s_numbers_stand_apart():
    assert flat({"a": 1, "lora": {"r": 8, "targets": ["q"]}}) == {"a": 1, "lora.r": 8, "lora.targets": ["q"]}
    assert named(Update("sft", "train", 3, 9, {"loss": 2.0})) == {"sft/loss": 2.0}
    assert named(Update("reward", "reward", 3, 9, {"loss": 2.0})) == {"reward/loss": 2.0}
    assert named(Update("reward", "judge", 3, 9, {"loss": 2.0, "accuracy": float("nan")})) == {"reward/judge/loss": 2.0}


@needs("tensorboard")
def test_a_training_reports_every_number_of_its_curves_and_ends_in_the_same_bits(tmp_path, tiny_model, toy_site):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tasks.compute import Compute
    from tasks.sft.config import LoRAConfig, SFTConfig
    from tasks.sft.train import train

    config = SFTConfig(
        steps=4, batch_size=2, seq_length=96, max_query_tokens=48, learning_rate=5e-3, warmup_steps=2, lora=LoRAConfig(r=4, alpha=8)
    )
    arguments = {"base": tiny_model, "data": toy_site, "compute": Compute(device="cpu", threads=1), "progress": Progress("sft")}
    identity = Identity(step="sft", version=1, config=config.model_dump(mode="json"))
    for name, report_to in (("silent", []), ("told", ["tensorboard"])):
        (tmp_path / name).mkdir()
        with reporting(report_to, identity, tmp_path) as final:
            final(train(config, out=tmp_path / name, **arguments))
    for file in ("model/model.safetensors", "curves.json"):
        assert (tmp_path / "silent" / file).read_bytes() == (tmp_path / "told" / file).read_bytes()
    events = EventAccumulator(str(next((tmp_path / "tensorboard").iterdir()))).Reload()
    told = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    for row in json.loads((tmp_path / "told" / "curves.json").read_text()):
        for name in row.keys() - {"step"}:
            assert told[f"sft/{name}"][row["step"]] == pytest.approx(row[name], rel=1e-6)  # event files hold 32 bits
    assert "sft/final/base_loss" in told
