"""Collecting garbage: what goes, what stays, and that a reader or writer at the same moment sees whole artifacts or none."""

import fcntl
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flows import gc
from flows.cli import main
from tasks import artifacts
from tasks.artifacts import Artifact, Identity, Manifest, Store
from tests.s3_server import S3Server, use

ROOT = Path(__file__).parents[2]
INPUTS = {
    "ingest": (),
    "base": (),
    "sft": ("base", "ingest"),
    "reward": ("sft", "ingest"),
    "ppo": ("sft", "reward", "ingest"),
    "evaluate": ("base", "sft", "reward", "ppo", "ingest"),
    "promote": ("evaluate",),
}


@pytest.fixture(scope="module")
def server():
    server = S3Server()
    server.send("PUT", "artifacts")
    yield server
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path, monkeypatch) -> Store:
    """Everything in it is a year old, one minute after the other."""
    minutes = itertools.count()
    monkeypatch.setattr(artifacts, "now", lambda: f"2025-11-22T{next(minutes) // 60:02d}:{next(minutes) % 60:02d}:00.000000+00:00")
    if request.param == "folder":
        return Store(tmp_path / "store")
    use(monkeypatch, request.getfixturevalue("server").url, tmp_path / "cache")
    return Store(f"s3://artifacts/{tmp_path.name}")


def publish(store: Store, identity: Identity) -> Manifest:
    with store.attempt(identity.key) as out:
        (out / "a.json").write_text(json.dumps(identity.model_dump()))
        (out / "b.json").write_text("[]")
        return store.publish(out, identity, metrics={}, seconds=1, peak_memory_bytes=1)


def pipeline(store: Store, ppo: int, dump: str = "beer.7z", met: dict[str, Artifact] | None = None) -> dict[str, Artifact]:
    """A run whose only setting is PPO's; what is there already stays. `met`: the champion's run."""
    made: dict[str, Artifact] = {}
    for step, inputs in INPUTS.items():
        identity = Identity(
            step=step,
            version=1,
            config={"steps": ppo} if step == "ppo" else {},
            inputs={name: made[name].key for name in inputs}
            | ({f"champion_{name}": met[name].key for name in ("ppo", "sft", "reward")} if met and step == "evaluate" else {}),
            external={dump: f"digest of {dump}"} if step == "ingest" else {},
        )
        manifest = store.manifest(step, identity.key) or publish(store, identity)
        made[step] = store.artifact(manifest)
    return made


def held(store: Store) -> set[tuple[str, str]]:
    return {(m.step, m.key) for m in store.list()}


def where(*runs: dict[str, Artifact]) -> set[tuple[str, str]]:
    return {(artifact.step, artifact.key) for run in runs for artifact in run.values()}


def run(capsys, store: Store, *more: str) -> dict:
    assert main(["store", "gc", "--store", store.uri, "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_newest_runs_of_each_lineage_stay_with_all_that_went_into_them(store, capsys):
    runs = [pipeline(store, steps) for steps in (1, 2, 3)]
    other = pipeline(store, 1, "coffee.7z")
    before = held(store)
    would = run(capsys, store, "--keep", "2", "--dry-run")
    assert held(store) == before
    did = run(capsys, store, "--keep", "2")
    assert held(store) == where(*runs[1:], other)
    assert [one["name"] for one in did["removed"]] == [one["name"] for one in would["removed"]]
    assert [one["name"].split("/")[0] for one in did["removed"]] == ["promote", "evaluate", "ppo"]
    assert did["bytes"] == sum(one["bytes"] for one in did["removed"]) > 0
    assert all(check.problem is None for check in store.verify())
    assert run(capsys, store, "--keep", "2")["removed"] == []


def test_the_champion_that_a_kept_run_met_stays_and_is_no_run_of_its_own(store, capsys):
    first = pipeline(store, 1)
    second = pipeline(store, 2, met=first)
    run(capsys, store, "--keep", "1")
    assert held(store) == where(first, second) - {("evaluate", first["evaluate"].key), ("promote", first["promote"].key)}


def test_without_keep_no_artifact_goes(store, capsys):
    runs = [pipeline(store, steps) for steps in (1, 2)]
    assert run(capsys, store)["removed"] == []
    assert held(store) == where(*runs)


def test_what_the_champion_or_one_before_it_needs_stays(store, capsys):
    runs = [pipeline(store, steps) for steps in (1, 2, 3, 4)]
    for number, one in enumerate(runs[:2]):
        named = {step: {"key": one[step].key, "digest": one[step].digest} for step in ("ppo", "sft", "reward", "evaluate")}
        assert store.move_pointer("champion", {"key": one["ppo"].key, "evaluate": one["evaluate"].key, "artifacts": named}, number)
    run(capsys, store, "--keep", "1")
    gone = where(runs[2]) - where(runs[3]) | {("promote", one["promote"].key) for one in runs[:2]}
    assert held(store) == where(*runs) - gone


def test_what_a_living_attempt_opened_stays_until_it_ends(store, capsys):
    old, _ = pipeline(store, 1), pipeline(store, 2)
    mine = Store(store.uri)
    mine.open(old["ppo"])
    with mine.attempt("f" * 64):
        run(capsys, store, "--keep", "1")
        assert (store.manifest("ppo", old["ppo"].key), store.manifest("evaluate", old["evaluate"].key)) != (None, None)
        assert store.manifest("evaluate", old["evaluate"].key) is None
    run(capsys, store, "--keep", "1")
    assert store.manifest("ppo", old["ppo"].key) is None


def test_what_was_made_within_the_hour_stays(store, capsys, monkeypatch):
    monkeypatch.undo() if not store.uri.startswith("s3") else monkeypatch.setattr(artifacts, "now", NOW)
    old, _ = pipeline(store, 1), pipeline(store, 2)
    run(capsys, store, "--keep", "1")
    assert where(old) <= held(store)


NOW = artifacts.now


def test_a_use_that_begins_while_it_is_removed_brings_it_back(store, monkeypatch):
    old = pipeline(store, 1)
    manifest = store.manifest("ppo", old["ppo"].key)
    used = iter([set(), {f"ppo/{manifest.key}"}] if store.uri.startswith("s3") else [{f"ppo/{manifest.key}"}])
    monkeypatch.setattr(store._place, "in_use", lambda *_: next(used))
    assert not store.remove(manifest)
    assert store.load(manifest.identity) == manifest


def test_a_reader_at_the_same_moment_finds_a_whole_artifact_or_none(store, caplog):
    """Artifacts are made, read and removed by three threads at once; a half one would be a warning, or an error."""
    identity = Identity(step="ppo", version=1, config={})
    ends = threading.Event()
    seen: list[bool] = []
    errors: list[BaseException] = []

    def read() -> None:
        reader = Store(store.uri)
        try:
            while not ends.is_set():
                found = reader.load(identity)
                seen.append(found is not None)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        for thread in threads:
            thread.start()
        for _ in range(25 if store.uri.startswith("/") else 8):
            manifest = publish(store, identity)
            if len(seen) % 3:
                ends.wait(0.02)
            store.remove(manifest)
        ends.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert set(seen) == {True, False}
    in_the_bucket = [record for record in caplog.records if "damaged" in record.getMessage() and "cache" not in record.getMessage()]
    assert [record.getMessage() for record in in_the_bucket] == []


def test_a_writer_at_the_same_moment_leaves_a_whole_artifact(tmp_path):
    """Another process publishes the same key again and again while this one removes it."""
    store = Store(tmp_path / "store")
    code = (
        "import sys\nfrom tests.flows.test_commands_gc import publish\nfrom tasks.artifacts import Identity, Store\n"
        "for _ in range(60): publish(Store(sys.argv[1]), Identity(step='ppo', version=1, config={}))\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, store.uri], cwd=ROOT)
    removed = 0
    while writer.poll() is None:
        removed += sum(store.remove(manifest) for manifest in store.manifests("ppo"))
    assert writer.wait() == 0
    assert removed > 1
    assert [check.problem for check in store.verify()] in ([], [None])
    assert list((store.root / "tmp").iterdir()) == []


def test_checkpoints_of_a_stored_step_go_and_those_of_others_or_in_use_stay(store, capsys):
    made = pipeline(store, 1)
    folders = {name: store.root / "tmp" / f"{key}.kept" for name, key in (("ppo", made["ppo"].key), ("sft", made["sft"].key))}
    folders["none"] = store.root / "tmp" / f"{'e' * 64}.kept"
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "big.bin").write_bytes(b"x" * 1000)
    lock = os.open(folders["sft"] / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    did = run(capsys, store)
    os.close(lock)
    assert [(one["kind"], one["bytes"]) for one in did["removed"]] == [("checkpoints", 1000)]
    assert {name for name, folder in folders.items() if folder.exists()} == {"sft", "none"}


def test_what_a_dead_attempt_left_goes(store, capsys):
    folder = store.root / "tmp" / f"{'d' * 64}.1.x"
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "half.json").write_text("[" * 500)
    assert run(capsys, store)["removed"] == []  # whose it is nobody knows, so it has to be old
    did = run(capsys, store, "--hours", "0")
    assert [one["bytes"] for one in did["removed"]] == [500]
    assert not folder.exists()


def test_on_s3_what_no_manifest_names_and_uploads_that_were_not_ended_go(server, tmp_path, monkeypatch, capsys):
    use(monkeypatch, server.url, tmp_path / "cache")
    store = Store(f"s3://artifacts/{tmp_path.name}")
    manifest = publish(store, Identity(step="sft", version=1, config={}))
    at = f"artifacts/{tmp_path.name}/sft/{manifest.key}/data/{'a' * 32}"
    server.send("PUT", f"{at}/half.json", b"x" * 700)
    server.send("POST", f"{at}/big.safetensors", query="?uploads")
    assert server.uploads("artifacts") == 1
    did = run(capsys, store, "--hours", "0")
    assert did["bytes"] == 700
    assert len(did["removed"]) == 2
    assert server.uploads("artifacts") == 0
    assert store.load(manifest.identity) == manifest


def test_what_is_wrong_is_one_line(capsys):
    for argv in (["--keep", "0"], ["--hours", "soon"]):
        with pytest.raises(SystemExit) as end:
            main(["store", "gc", *argv])
        assert end.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert gc.POINTED >= 1
