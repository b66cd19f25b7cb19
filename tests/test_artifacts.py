"""The store: nothing half, nothing damaged served, the first writer wins. What every store promises is asked of a folder and of
S3; for the folder, faults are injected at every call to the disk (for S3, see test_s3_store.py)."""

import errno
import hashlib
import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tasks import manifest
from tasks.artifacts import Identity, Manifest, Store, StoreError, canonical, clean_metrics, file_digest
from tests.s3_server import S3Server, use

IDENTITY = Identity(
    step="sft", version=1, config={"steps": 3, "lr": 0.5, "lora": {"r": 8}}, inputs={"base": "b" * 64}, external={"dump": "d"}
)
MKDIR = os.mkdir
CALLS = ("open", "write", "fsync", "rename", "mkdir", "link")


def fill(out: Path, text: str = "hello") -> None:
    MKDIR(out / "model")  # the step's own calls are not the store's
    (out / "model" / "weights.safetensors").write_bytes(text.encode() * 100)
    (out / "curves.json").write_text(json.dumps({"text": text}))


def publish(store: Store, identity: Identity = IDENTITY, text: str = "hello", **more) -> Manifest:
    with store.attempt(identity.key) as out:
        fill(out, text)
        return store.publish(out, identity, **{"metrics": {"loss": 1.5}, "seconds": 2.0, "peak_memory_bytes": 7} | more)


@pytest.fixture(scope="module")
def server():
    server = S3Server()
    server.send("PUT", "artifacts")
    yield server
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path, monkeypatch) -> Store:
    if request.param == "folder":
        return Store(tmp_path / "store")
    use(monkeypatch, request.getfixturevalue("server").url, tmp_path / "cache")
    return Store(f"s3://artifacts/{tmp_path.name}")


@pytest.fixture
def folder_store(tmp_path) -> Store:
    return Store(tmp_path / "store")


# ---- identity


def test_the_key_is_the_digest_of_the_parts_in_canonical_json():
    text = '{"config":{"a":1},"external":{},"inputs":{"x":"k"},"step":"s","version":2}'
    assert Identity(step="s", version=2, config={"a": 1}, inputs={"x": "k"}).key == hashlib.sha256(text.encode()).hexdigest()


def test_equal_numbers_give_equal_keys_and_unequal_ones_do_not():
    key = lambda value: Identity(step="s", version=1, config={"a": value}).key
    assert key(32) == key(32.0)
    assert key(0.1) != key(0.2)
    assert key(1) != key("1")


def test_every_part_is_in_the_key():
    parts = {"step": "s", "version": 1, "config": {"a": 1}, "inputs": {"x": "k"}, "external": {"d": "e"}}
    changes = {"step": "t", "version": 2, "config": {"a": 2}, "inputs": {"x": "l"}, "external": {"d": "f"}}
    keys = {Identity(**(parts | {name: value})).key for name, value in [("step", "s"), *changes.items()]}
    assert len(keys) == 6


def test_not_a_number_has_no_place_in_a_key():
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"a": float("nan")})


# ---- publish and load


def test_what_is_published_is_found_with_all_that_was_said_of_it(store):
    made = publish(store)
    found = store.load(IDENTITY)
    assert found == made
    assert (found.metrics, found.seconds, found.peak_memory_bytes, found.identity) == ({"loss": 1.5}, 2.0, 7, IDENTITY)
    assert found.files["model/weights.safetensors"].bytes == 500
    assert (store.open(store.artifact(made)) / "curves.json").read_text() == '{"text": "hello"}'
    assert store.list() == [made]
    assert list((store.root / "tmp").iterdir()) == []


def test_the_digest_is_of_the_content_alone_and_leaves_reports_for_people_out(tmp_path):
    digests = set()
    for number in range(2):
        store = Store(tmp_path / str(number))
        with store.attempt(IDENTITY.key) as out:
            fill(out)
            (out / "REPORT.md").write_text(f"took {number} s")
            digests.add(store.publish(out, IDENTITY, metrics={}, seconds=number, peak_memory_bytes=0).digest)
    assert len(digests) == 1
    assert publish(Store(tmp_path / "2"), text="other").digest not in digests


def test_what_is_not_published_leaves_nothing(store):
    with suppress(RuntimeError), store.attempt(IDENTITY.key) as out:
        fill(out)
        raise RuntimeError("boom")
    assert store.load(IDENTITY) is None
    assert list((store.root / "tmp").iterdir()) == []


@pytest.mark.parametrize("name", ["training_args.bin", "model.pkl", "optimizer.pt", "x.npy", "run.py", "manifest.json", "noending"])
def test_files_that_can_run_code_or_fool_the_store_are_refused(store, name):
    with store.attempt(IDENTITY.key) as out:
        (out / name).write_bytes(b"x")
        with pytest.raises(StoreError, match=name):
            store.publish(out, IDENTITY, metrics={}, seconds=0, peak_memory_bytes=0)
    assert store.load(IDENTITY) is None


def test_a_link_is_refused(store, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    with store.attempt(IDENTITY.key) as out:
        (out / "link.json").symlink_to(tmp_path / "secret.json")
        with pytest.raises(StoreError, match="not a plain file"):
            store.publish(out, IDENTITY, metrics={}, seconds=0, peak_memory_bytes=0)


def test_the_first_writer_wins(store, caplog):
    first = publish(store, text="first")
    second = publish(store, text="second")
    assert second == first
    assert "published meanwhile" in caplog.text
    assert store.load(IDENTITY) == first


def test_a_store_of_another_kind_is_refused_in_one_line():
    with pytest.raises(
        ValueError, match=r"store gs://.* not supported: give a local folder, such as ./store, or s3://bucket/prefix"
    ):
        Store("gs://bucket/store")


def test_numbers_of_libraries_become_pythons_and_nan_a_word():
    import numpy as np

    assert clean_metrics({"a": np.float32(0.5), "b": float("nan"), "c": "x", "d": np.int64(3)}) == {
        "a": 0.5,
        "b": "nan",
        "c": "x",
        "d": 3,
    }
    with pytest.raises(TypeError, match="metric x is a list"):
        clean_metrics({"x": [1]})


# ---- everything is on the disk before it is in its place


def test_every_file_and_folder_is_synced_before_the_rename_and_the_parent_after_it(folder_store, monkeypatch):
    real_fsync, real_rename, log = os.fsync, os.rename, []
    monkeypatch.setattr(os, "fsync", lambda fd: (log.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append("rename"), real_rename(a, b))[1])
    publish(folder_store)
    before, after = log[: log.index("rename")], log[log.index("rename") + 1 :]
    names = [path.split("/files", 1)[1] for path in before if "/files" in path]
    assert {"/model/weights.safetensors", "/curves.json", "/manifest.json", "/model", ""} <= set(names)
    assert (
        names.index("/manifest.json") < names.index("/model") < names.index("")
    )  # files, then the deepest folder, then its parent
    assert after == [str(folder_store.root / "sft")]


# ---- killed, or refused by the disk, at any call


def inject(action, at: int):
    """Let the calls of the store through, but do `action` instead of call number `at`; counts in the returned list."""
    seen = [0]

    def wrapped(name, real):
        def call(*args, **kwargs):
            seen[0] += 1
            if seen[0] == at:
                action(name, args)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))
    return seen


def in_a_child(work) -> int:
    """Exit status of `work` in a forked process; 0 when it returned."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            logging.disable(logging.CRITICAL)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_at_any_call_there_is_a_whole_artifact_or_none_and_the_next_run_gives_the_same(tmp_path):
    expected = publish(Store(tmp_path / "reference")).digest
    kills = 0
    for at in range(1, 200):
        store = Store(tmp_path / f"kill-{at}")

        def work(at=at, store=store):
            inject(lambda *_: os._exit(9), at)
            publish(store)

        status = in_a_child(work)
        assert status in (0, 9)
        found = store.load(IDENTITY)
        assert found is None or found.digest == expected
        assert not list((store.root / "tmp").glob("damaged.*"))  # never a half one
        assert publish(store).digest == expected
        assert list((store.root / "tmp").iterdir()) == []  # the dead attempt was collected
        if status == 0:
            break
        kills += 1
    assert kills >= 20  # every call was hit


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_an_error_of_the_disk_at_any_call_is_one_line_and_leaves_nothing_half(tmp_path, error):
    errors = 0
    for at in range(1, 200):
        store = Store(tmp_path / f"{error}-{at}")

        def work(at=at, store=store):
            def fail(name, args):
                raise OSError(error, os.strerror(error), str(args[0]))

            inject(fail, at)
            try:
                publish(store)
            except StoreError as caught:
                message = str(caught)
                assert str(store.root) in message
                assert os.strerror(error) in message
                assert "bytes" in message
                os._exit(7)

        status = in_a_child(work)
        assert status in (0, 7), f"call {at} gave something other than a StoreError"
        found = store.load(IDENTITY)
        assert found is None or found.identity == IDENTITY
        assert not list((store.root / "tmp").glob("damaged.*"))
        publish(store)
        if status == 0:
            break
        errors += 1
    assert errors >= 15


def test_a_full_disk_names_path_and_bytes_needed(folder_store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(StoreError, match=r"No space left on device; 5\d\d bytes are needed there"):
        publish(folder_store)


@pytest.mark.parametrize("writers", [2, 8])
def test_many_processes_that_publish_the_same_key_all_get_the_same_digest(store, tmp_path, writers):
    results = tmp_path / "results"
    results.mkdir()
    started = time.monotonic()
    pids = []
    for number in range(writers):
        pid = os.fork()
        if pid == 0:
            try:
                logging.disable(logging.CRITICAL)
                (results / str(number)).write_text(publish(store, text=f"writer {number}").digest)
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    digests = [path.read_text() for path in results.iterdir()]
    assert len(digests) == writers
    assert set(digests) == {store.load(IDENTITY).digest}
    assert time.monotonic() - started < 10


# ---- damage


def damage(folder: Path):
    """Ways to damage an artifact: (file that the warning must name, how)."""
    weights = folder / "model" / "weights.safetensors"
    listed = folder / "manifest.json"

    def flip(path, at):
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    for at in (0, 250, 499):
        yield weights.name, lambda at=at: flip(weights, at)
    for at in range(0, listed.stat().st_size, 61):
        yield "", lambda at=at: flip(listed, at)
    yield weights.name, lambda: weights.write_bytes(weights.read_bytes()[:-1])
    yield weights.name, weights.unlink
    yield "extra.json", lambda: (folder / "extra.json").write_text("{}")
    yield "manifest.json", listed.unlink
    yield "manifest.json", lambda: listed.write_text("")
    yield "manifest.json", lambda: listed.write_text("[]")
    yield "manifest.json", lambda: listed.write_text(listed.read_text().rstrip("\n"))
    yield "curves.json", lambda: ((folder / "curves.json").unlink(), (folder / "curves.json").symlink_to(listed))
    yield "curves.json", lambda: ((folder / "curves.json").unlink(), (folder / "curves.json").mkdir())
    twin = folder.parents[1] / "twin.json"
    yield "curves.json", lambda: (os.rename(folder / "curves.json", twin), (folder / "curves.json").symlink_to(twin))


def test_all_damage_is_noticed_named_moved_aside_and_made_anew(tmp_path, caplog):
    publish(Store(tmp_path / "count"))
    cases = len(list(damage(tmp_path / "count" / "sft" / IDENTITY.key)))
    assert cases > 30
    for number in range(cases):
        store = Store(tmp_path / str(number))
        good = publish(store)
        folder = store.folder("sft", IDENTITY.key)
        name, hurt = list(damage(folder))[number]
        hurt()
        caplog.clear()
        assert [check.problem is None for check in store.verify()] == [False]
        assert store.load(IDENTITY) is None, f"case {number} was served"
        assert str(folder / "").rstrip("/") in caplog.text
        assert name in caplog.text
        assert not folder.exists()
        assert len(list((store.root / "tmp").glob("damaged.*"))) == 1
        assert publish(store).digest == good.digest
        assert store.load(IDENTITY).digest == good.digest


def test_an_artifact_in_anothers_place_is_not_served(folder_store):
    other = IDENTITY.model_copy(update={"version": 2})
    publish(folder_store)
    os.rename(folder_store.folder("sft", IDENTITY.key), folder_store.folder("sft", other.key))
    assert folder_store.load(other) is None


@pytest.mark.parametrize("name", ["../../../secret.json", "/etc/secret.json", "model/../curves.json", "x.pkl"])
def test_a_manifest_that_lists_evil_names_is_not_served(folder_store, name, tmp_path):
    good = publish(folder_store)
    entry = good.files["curves.json"]
    evil = good.model_copy(update={"files": {**good.files, name: entry}})
    (folder_store.folder("sft", IDENTITY.key) / "manifest.json").write_text(evil.text())
    assert folder_store.load(IDENTITY) is None


def test_a_damaged_folder_does_not_block_the_writer(folder_store):
    publish(folder_store)
    (folder_store.folder("sft", IDENTITY.key) / "curves.json").unlink()
    assert publish(folder_store) == folder_store.load(IDENTITY)


def test_an_input_that_was_replaced_or_is_not_there_is_not_opened(store):
    artifact = store.artifact(publish(store))
    assert store.unchanged(artifact)
    publish(store, text="other", replace=True)
    assert not store.unchanged(artifact)
    with pytest.raises(StoreError, match="recomputed by another run"):
        store.open(artifact)
    with pytest.raises(StoreError, match="is not in"):
        store.open(artifact.model_copy(update={"key": "f" * 64}))


def test_an_input_that_was_damaged_is_not_opened(folder_store):
    artifact = folder_store.artifact(publish(folder_store))
    (folder_store.folder("sft", IDENTITY.key) / "curves.json").write_text("x")
    with pytest.raises(StoreError, match=r"curves\.json.*run again"):
        folder_store.open(artifact)
    with pytest.raises(StoreError, match="is not in"):
        folder_store.open(artifact)


# ---- refresh


def test_a_refresh_that_reproduces_the_content_changes_nothing(store):
    first = publish(store)
    assert publish(store, replace=True) == first


def test_a_refresh_with_another_content_replaces_the_artifact(store):
    first = publish(store)
    second = publish(store, text="other", replace=True)
    assert second.digest != first.digest
    assert store.load(IDENTITY) == second
    assert store.list() == [second]


def test_a_folder_that_was_replaced_is_kept_aside(folder_store):
    publish(folder_store)
    publish(folder_store, text="other", replace=True)
    assert len(list((folder_store.root / "tmp").glob("replaced.sft.*"))) == 1


def test_an_artifact_is_a_hit_only_for_the_inputs_that_it_was_made_from(store):
    publish(store, input_digests={"base": "old"})
    assert store.load(IDENTITY, {"base": "old"}) is not None
    assert store.load(IDENTITY, {"base": "new"}) is None
    again = publish(store, text="other", input_digests={"base": "new"})
    assert store.load(IDENTITY, {"base": "new"}) == again


def test_a_look_without_hashing_notices_a_file_that_was_cut(folder_store):
    publish(folder_store)
    assert folder_store.find(IDENTITY) is not None
    path = folder_store.folder("sft", IDENTITY.key) / "curves.json"
    path.write_bytes(path.read_bytes()[:-1])
    assert folder_store.find(IDENTITY) is None
    assert path.exists()  # it only looked


# ---- garbage


def test_a_living_attempt_is_left_alone_a_dead_one_is_collected(store):
    with store.attempt(IDENTITY.key) as out:
        store.collect()
        assert out.is_dir()

    def die():
        with store.attempt(IDENTITY.key):
            os._exit(3)

    assert in_a_child(die) == 3
    assert len(list((store.root / "tmp").iterdir())) == 1
    store.collect()
    assert list((store.root / "tmp").iterdir()) == []


def test_an_attempt_of_a_dead_process_whose_number_was_given_to_another_is_collected(store):
    with store.attempt(IDENTITY.key) as out:
        owner = out.parent / "owner.json"
        owner.write_text(json.dumps(json.loads(owner.read_text()) | {"started": "1"}))
        store.collect()
        assert not out.exists()


def test_attempts_of_other_machines_are_collected_only_when_old_and_damage_never(store):
    for name in ("k.1.a", "damaged.sft.k.b"):
        folder = store.root / "tmp" / name
        folder.mkdir(parents=True)
        (folder / "owner.json").write_text('{"machine": "elsewhere", "pid": 1, "started": "1"}')
    store.collect()
    assert len(list((store.root / "tmp").iterdir())) == 2
    old = time.time() - 8 * 86_400
    for path in (store.root / "tmp").rglob("*"):
        os.utime(path, (old, old))
    store.collect()
    assert [path.name for path in (store.root / "tmp").iterdir()] == ["damaged.sft.k.b"]


# ---- pointers


def test_a_pointer_moves_only_from_where_it_is_expected(store):
    assert store.pointer("champion") is None
    assert store.move_pointer("champion", {"key": "a"}, 0)
    assert not store.move_pointer("champion", {"key": "b"}, 0)
    assert not store.move_pointer("champion", {"key": "b"}, 5)
    assert store.move_pointer("champion", {"key": "b"}, 1)
    assert [(p.number, p.to["key"]) for p in store.pointer_history("champion")] == [(2, "b"), (1, "a")]


def test_of_many_who_move_a_pointer_at_once_one_wins(store):
    pids = []
    for number in range(8):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = 0 if store.move_pointer("champion", {"key": str(number)}, 0) else 5
            finally:
                os._exit(status)
        pids.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert sorted(statuses) == [0] + [5] * 7
    assert store.pointer("champion").to["key"] == str(statuses.index(0))


def test_killed_at_any_call_a_pointer_stands_where_it_stood_or_where_it_should(tmp_path):
    for at in range(1, 100):
        store = Store(tmp_path / str(at))
        store.move_pointer("champion", {"key": "old"}, 0)

        def work(at=at, store=store):
            inject(lambda *_: os._exit(9), at)
            store.move_pointer("champion", {"key": "new"}, 1)

        status = in_a_child(work)
        assert store.pointer("champion").to["key"] in ("old", "new")
        if status == 0:
            break
    assert store.pointer("champion").to["key"] == "new"
    assert at > 5


def test_a_damaged_pointer_file_is_passed_over_and_its_number_stays_taken(folder_store, caplog):
    folder_store.move_pointer("champion", {"key": "a"}, 0)
    folder_store.move_pointer("champion", {"key": "b"}, 1)
    path = folder_store.root / "pointers" / "champion" / "00000002.json"
    path.write_text(path.read_text().replace('"b"', '"c"'))
    assert folder_store.pointer("champion").to["key"] == "a"
    assert "00000002.json" in caplog.text
    assert folder_store.pointer_number("champion") == 2


# ---- what comes from outside


def test_a_file_that_changed_has_another_digest_and_where_it_lies_does_not_matter(tmp_path):
    one, two = tmp_path / "one.xml", tmp_path / "elsewhere" / "two.xml"
    two.parent.mkdir()
    one.write_text("x")
    two.write_text("x")
    before = file_digest(one)
    assert before == file_digest(two)
    one.write_text("changed")
    assert file_digest(one) != before


def test_other_code_has_another_fingerprint(monkeypatch, tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "ppo").mkdir()
    (tmp_path / "sft" / "train.py").write_text("a = 1")
    (tmp_path / "shared.py").write_text("b = 1")
    monkeypatch.setattr(manifest, "__file__", str(tmp_path / "manifest.py"))
    first = manifest.code_fingerprint("sft"), manifest.code_fingerprint("ppo")
    (tmp_path / "sft" / "train.py").write_text("a = 2")
    second = manifest.code_fingerprint("sft"), manifest.code_fingerprint("ppo")
    assert second[0] != first[0]
    assert second[1] == first[1]
    (tmp_path / "shared.py").write_text("b = 2")
    assert manifest.code_fingerprint("ppo") != second[1]
