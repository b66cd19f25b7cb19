"""The store on S3: whatever goes wrong with a request or a process, nothing is half, and a run again is right.

The server is real, and so is the proxy that hurts what passes (tests/s3_server.py). What both kinds of store promise is in
test_artifacts.py."""

import itertools
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tasks import s3
from tasks.artifacts import Identity, Manifest, Store, StoreError
from tasks.s3 import Limits, Unreachable
from tests.s3_server import Fault, FaultyProxy, S3Server, is_read, is_write, use

IDENTITY = Identity(step="sft", version=1, config={"steps": 3}, inputs={"base": "b" * 64})
FILES = {"model/weights.safetensors": b"hello" * 100, "curves.json": b'{"text": "hello"}'}
BUCKET = "store"


@pytest.fixture(scope="module")
def server():
    server = S3Server()
    server.send("PUT", BUCKET)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def proxy(server):
    proxy = FaultyProxy(server)
    yield proxy
    proxy.stop()


@pytest.fixture(autouse=True)
def setting(request, proxy, tmp_path, monkeypatch):
    """Short pauses; and where replies do not come, a short wait for them."""
    hangs = any(word in request.node.name for word in ("hang", "gave_up"))
    proxy.hurt()
    use(monkeypatch, proxy.url, tmp_path / "cache")
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    monkeypatch.setattr(s3, "LIMITS", Limits(connect=5, read=0.4 if hangs else 10, attempts=2, deadline=30, patience=0))


class Machines:
    """Machines that share a store and nothing else: each has a cache of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self._folder, self._monkeypatch = folder, monkeypatch
        self._numbers = itertools.count()

    def store(self, prefix: str = "shared") -> Store:
        self._monkeypatch.setenv("STACKRLHF_CACHE", str(self._folder / f"machine-{next(self._numbers)}"))
        return Store(f"s3://{BUCKET}/{self._folder.name}/{prefix}")


@pytest.fixture
def machines(tmp_path, monkeypatch) -> Machines:
    return Machines(tmp_path, monkeypatch)


def publish(store: Store, identity: Identity = IDENTITY, files: dict[str, bytes] = FILES, **more) -> Manifest:
    with store.attempt(identity.key) as out:
        for name, content in files.items():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(content)
        return store.publish(out, identity, **{"metrics": {"loss": 1.5}, "seconds": 2.0, "peak_memory_bytes": 7} | more)


def other(word: bytes) -> dict[str, bytes]:
    return FILES | {"curves.json": word}


@pytest.fixture(scope="module")
def digest(tmp_path_factory) -> str:
    """Of FILES, as a store in a folder has it."""
    return publish(Store(tmp_path_factory.mktemp("local") / "store")).digest


def below(server: S3Server, store: Store) -> list[str]:
    prefix = store.uri.removeprefix(f"s3://{BUCKET}/") + "/"
    return [name.removeprefix(prefix) for name in server.objects(BUCKET) if name.startswith(prefix)]


def assert_whole_or_nothing(store: Store, digest: str) -> None:
    """As another machine sees it."""
    found = store.load(IDENTITY)
    assert found is None or found.digest == digest
    assert [check.problem for check in store.verify() if check.problem] == []


def assert_tidy(server: S3Server, store: Store, manifest: Manifest) -> None:
    """After a collection of garbage nothing is left but this artifact."""
    store.collect(hours=-1)  # what is of this very second, too
    at = f"sft/{IDENTITY.key}"
    assert below(server, store) == sorted(
        [f"{at}/manifest.json", *(f"{at}/data/{manifest.attempt}/{name}" for name in manifest.files)]
    )
    assert server.uploads(BUCKET) == 0
    assert list((store.root / "tmp").iterdir()) == []


def in_a_child(work: Callable[[], object]) -> int:
    """The pid of a forked process that does `work`."""
    pid = os.fork()
    if pid == 0:
        try:
            logging.disable(logging.CRITICAL)
            work()
        finally:
            os._exit(0)
    return pid


# ---- what is where


def test_data_first_the_manifest_last_and_only_where_none_is(server, proxy, machines):
    store = machines.store()
    manifest = publish(store)
    writes = [path.partition("?")[0] for method, path in proxy.seen if method == "PUT"]
    at = f"/{store.uri.removeprefix('s3://')}/sft/{IDENTITY.key}"
    assert sorted(writes[:2]) == [f"{at}/data/{manifest.attempt}/{name}" for name in sorted(FILES)]
    assert writes[2:] == [f"{at}/manifest.json"]
    assert [head for head in proxy.heard if b"manifest.json" not in head and b"If-None-Match: *" in head] != []
    stored = server.send("GET", f"{store.uri.removeprefix('s3://')}/sft/{IDENTITY.key}/manifest.json")
    assert Manifest.parse(stored.decode()) == manifest


def test_another_machine_gets_it_as_it_was_made(machines):
    made = publish(machines.store())
    elsewhere = machines.store()
    assert elsewhere.load(IDENTITY) == made
    folder = elsewhere.open(elsewhere.artifact(made))
    assert {name: (folder / name).read_bytes() for name in made.files} == FILES
    assert elsewhere.artifact(made).uri == f"{elsewhere.uri}/sft/{IDENTITY.key}"
    assert elsewhere.list() == [made]


def test_what_is_in_the_cache_is_not_sent_again_but_the_manifest_is_asked_for(proxy, machines):
    store = machines.store()
    made = publish(store)
    proxy.hurt()
    assert store.load(IDENTITY) == made
    store.open(store.artifact(made))
    read = [path.partition("?")[0].rsplit("/", 1)[1] for method, path in proxy.seen if is_read(method, path)]
    assert read == ["manifest.json"] * 2


def test_nothing_is_sent_where_a_good_one_stands(proxy, machines):
    first = publish(machines.store())
    proxy.hurt()
    assert publish(machines.store(), files=other(b"[]")) == first
    assert [path for method, path in proxy.seen if is_write(method, path)] == []


# ---- R4: faults of requests

LOST = ["cut-before", "cut-after", "500", "503", "500-after", "hang-before", "hang-after"]


@pytest.mark.parametrize("kind", LOST)
def test_one_fault_at_any_write_is_made_good_at_once(server, proxy, machines, digest, kind):
    for at in (1, 2, 3):  # a file, another, the manifest
        store = machines.store(f"at-{at}")
        proxy.hurt(Fault(kind), at=at, times=1)
        made = publish(store)
        proxy.hurt()
        assert made.digest == digest
        assert machines.store(f"at-{at}").load(IDENTITY) == made
        assert_tidy(server, store, made)


@pytest.mark.parametrize("kind", ["cut-before", "cut-after", "500", "500-after", "hang-after"])
def test_faults_from_any_write_on_are_one_line_and_leave_nothing_half(server, proxy, machines, digest, kind):
    for at in (1, 2, 3) if kind != "hang-after" else (3,):  # a file, another, the manifest
        store = machines.store(f"at-{at}")
        proxy.hurt(Fault(kind), at=at)
        made = None
        if at == 3 and kind.endswith("after"):  # the manifest is read back, and is ours
            made = publish(store)
        else:
            with pytest.raises(Unreachable) as caught:
                publish(store)
            assert str(caught.value).startswith(f"store {store.uri}: ")
            assert "\n" not in str(caught.value)
        proxy.hurt()
        assert_whole_or_nothing(machines.store(f"at-{at}"), digest)
        again = publish(machines.store(f"at-{at}"))
        assert again.digest == digest
        assert made is None or again == made
        assert_tidy(server, store, again)


@pytest.mark.parametrize(
    ("kind", "at", "times"),
    [("cut-after", 1, 1), ("cut-after", 2, 1), ("cut-after", 5, 1), ("500-after", 5, 1),
     ("cut-before", 1, 1000), ("cut-before", 2, 1000), ("cut-before", 5, 1000), ("cut-after", 5, 1000)],
)  # fmt: skip
def test_faults_in_an_upload_of_parts_leave_nothing_half_and_nothing_dangling(
    server, proxy, machines, monkeypatch, kind, at, times
):
    """Write 1 begins it, 2 to 4 are its parts, 5 ends it."""
    monkeypatch.setattr(s3, "PART", 5 * 2**20)
    large = {"model.safetensors": bytes(range(256)) * 41_000}  # 10.5 MB
    proxy.hurt(Fault(kind), at=at, times=times)
    store = machines.store()
    if times == 1:
        publish(store, files=large)
    else:
        with pytest.raises(Unreachable):
            publish(store, files=large)
    proxy.hurt()
    elsewhere = machines.store()
    assert (elsewhere.load(IDENTITY) is not None) == (times == 1)
    again = publish(elsewhere, files=large)
    assert (elsewhere.open(elsewhere.artifact(again)) / "model.safetensors").read_bytes() == large["model.safetensors"]
    assert_tidy(server, store, again)


def test_a_manifest_that_arrives_after_its_writer_gave_up_still_finds_its_data(server, proxy, machines, digest):
    store = machines.store()
    proxy.hurt(Fault("late", seconds=3), lambda method, path: method == "PUT" and "manifest.json" in path)
    with pytest.raises(Unreachable):
        publish(store)
    proxy.hurt()
    assert machines.store().load(IDENTITY) is None
    elsewhere, until = machines.store(), time.monotonic() + 15
    while (found := elsewhere.load(IDENTITY)) is None and time.monotonic() < until:
        time.sleep(0.1)
    assert found is not None
    assert found.digest == digest


@pytest.mark.parametrize("kind", ["flip", "bare-flip", "bare-short", "cut-body", "cut-before", "500", "hang-before"])
def test_one_fault_at_any_read_is_no_damage(proxy, machines, caplog, kind):
    made = publish(machines.store())
    for at in itertools.count(1):
        proxy.hurt(Fault(kind), is_read, at=at, times=1)
        store = machines.store()
        assert store.load(IDENTITY) == made
        folder = store.open(store.artifact(made))
        assert {name: (folder / name).read_bytes() for name in made.files} == FILES
        if proxy.count < at:
            break
    assert at >= 5  # manifest and two files, manifest again, and the round without a fault
    assert "damaged" not in caplog.text


def test_a_passing_fault_does_not_replace_what_is_good(proxy, machines):
    made = publish(machines.store())
    proxy.hurt(Fault("bare-flip"), is_read, times=1)
    assert publish(machines.store(), files=other(b"[1]")) == made


@pytest.mark.parametrize(("kind", "at"), [("cut-before", 1), ("cut-before", 2), ("cut-body", 1), ("cut-body", 2), ("500", 2)])
def test_a_store_that_cannot_be_read_is_no_damage_either(proxy, machines, kind, at):
    publish(machines.store())
    proxy.hurt(Fault(kind), is_read, at=at)
    with pytest.raises(Unreachable):
        machines.store().load(IDENTITY)


@pytest.mark.parametrize(
    ("kind", "why"), [("flip", "its checksum is not the server's"), ("bare-flip", "its sha256 is not the manifest's")]
)
def test_reads_that_are_always_wrong_are_damage_and_named(proxy, machines, caplog, kind, why):
    publish(machines.store())
    proxy.hurt(Fault(kind), lambda method, path: is_read(method, path) and "weights" in path)
    assert machines.store().load(IDENTITY) is None
    assert f"model/weights.safetensors: {why}; sft runs again" in caplog.text


# ---- others write at the same time


def at_the_manifest(action: Callable[[], object], kind: str = "call"):
    return Fault(kind, action=action), lambda method, path: method == "PUT" and "manifest.json" in path


def test_where_another_was_faster_theirs_is_used_and_ours_is_dropped(server, proxy, machines, caplog):
    slow, fast = machines.store(), machines.store()
    won = []

    def overtake() -> None:
        if not won:
            won.append(None)
            won[0] = publish(fast, files=other(b"[1]"))

    proxy.hurt(*at_the_manifest(overtake), times=1)
    got = publish(slow)
    proxy.hurt()
    assert got == won[0]
    assert (slow.open(slow.artifact(got)) / "curves.json").read_bytes() == b"[1]"
    assert "published meanwhile with another content" in caplog.text
    assert len(below(server, slow)) == 3  # without any collection


def test_two_refreshes_at_once_end_in_one_of_them_and_both_know_which(server, proxy, machines):
    slow, fast = machines.store(), machines.store()
    publish(slow)
    published = []
    proxy.hurt(*at_the_manifest(lambda: published.append(publish(fast, files=other(b"[1]"), replace=True))), times=1)
    last = publish(slow, files=other(b"[2]"), replace=True)
    proxy.hurt()
    assert len(published) == 1
    assert machines.store().load(IDENTITY) == last
    assert (slow.open(slow.artifact(last)) / "curves.json").read_bytes() == b"[2]"
    with pytest.raises(StoreError, match="recomputed by another run"):
        fast.open(fast.artifact(published[0]))
    assert_tidy(server, slow, last)


def test_four_refreshes_at_once_leave_one_whole_artifact(server, machines, digest):
    store = machines.store()
    publish(store)
    for pid in [in_a_child(lambda n=n: publish(store, files=other(b"%d" % n), replace=True)) for n in range(4)]:
        os.waitpid(pid, 0)
    found = machines.store().load(IDENTITY)
    assert found is not None
    assert found.digest != digest
    assert_tidy(server, store, found)


def test_no_manifest_is_written_for_files_that_are_gone(server, proxy, machines):
    store = machines.store()
    lost = []

    def lose() -> None:
        lost.extend(name for name in below(server, store) if name.endswith("curves.json"))
        server.send("DELETE", f"{store.uri.removeprefix('s3://')}/{lost[0]}")

    proxy.hurt(Fault("call", action=lose), lambda method, path: "list-type" in path, times=1)
    with pytest.raises(StoreError, match=r"curves\.json: is missing, though it was just written there: run again"):
        publish(store)
    assert [name.rsplit("/", 1)[1] for name in below(server, store)] == ["weights.safetensors"]


@pytest.mark.parametrize("kind", ["call", "call-after"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_killed_at_any_write_there_is_a_whole_artifact_or_none(server, proxy, machines, digest, kind, at):
    store = machines.store()
    victim = []
    proxy.hurt(Fault(kind, action=lambda: (os.kill(victim[0], signal.SIGKILL), time.sleep(0.05))), at=at, times=1)
    reader, writer = os.pipe()

    def work() -> None:
        os.read(reader, 1)  # until its pid is known
        publish(store)

    victim.append(in_a_child(work))
    os.write(writer, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(victim[0], 0)[1]) == -signal.SIGKILL
    os.close(reader), os.close(writer)
    proxy.hurt()
    assert_whole_or_nothing(machines.store(), digest)
    again = publish(machines.store())
    assert again.digest == digest
    assert_tidy(server, store, again)


# ---- R6: damage in the bucket


def damage(server: S3Server, at: str, manifest: Manifest):
    """Ways to damage what lies in the bucket: (words that the warning must have, how)."""
    data = f"{at}/data/{manifest.attempt}"
    weights, curves, listed = f"{data}/model/weights.safetensors", f"{data}/curves.json", f"{at}/manifest.json"

    def flip(name: str, where: int) -> None:
        content = bytearray(server.send("GET", name))
        content[where] ^= 1
        server.send("PUT", name, bytes(content))

    def evil(**changes: object) -> None:
        server.send("PUT", listed, manifest.model_copy(update=changes).text().encode())

    entry = manifest.files["curves.json"]
    yield "weights.safetensors: its sha256", lambda: flip(weights, 0)
    yield "weights.safetensors: its sha256", lambda: flip(weights, 499)
    yield "weights.safetensors: 499 bytes, not 500", lambda: server.send("PUT", weights, FILES["model/weights.safetensors"][:-1])
    yield "weights.safetensors: is missing", lambda: server.send("DELETE", weights)
    yield "extra.json: not in the manifest", lambda: server.send("PUT", f"{data}/extra.json", b"{}")
    yield "curves.json: 500 bytes, not 17", lambda: server.send("PUT", curves, FILES["model/weights.safetensors"])
    yield "manifest.json", lambda: server.send("PUT", listed, b"[]")
    yield "manifest.json", lambda: server.send("PUT", listed, b"")
    yield "manifest.json: its seal", lambda: server.send("PUT", listed, manifest.text().rstrip("\n").encode())
    for where in range(0, len(manifest.text()), 900):
        yield "manifest.json", lambda where=where: flip(listed, where)
    yield "leaves the artifact's folder", lambda: evil(files={**manifest.files, "../../../escaped.json": entry})
    yield "run code", lambda: evil(files={**manifest.files, "x.pkl": entry})
    yield "attempt is '../../escaped'", lambda: evil(attempt="../../escaped")
    yield "attempt is None", lambda: evil(attempt=None)
    yield "it belongs to", lambda: evil(identity=IDENTITY.model_copy(update={"version": 2}))


def test_all_damage_is_noticed_named_and_replaced_by_the_next_run(server, machines, caplog, tmp_path, monkeypatch, digest):
    use(monkeypatch, server.url, tmp_path / "cache")
    reference = publish(machines.store("reference"))
    cases = len(list(damage(server, "", reference)))
    assert cases > 15
    for number in range(cases):
        store = machines.store(str(number))
        made = publish(store)
        at = f"{store.uri.removeprefix('s3://')}/sft/{IDENTITY.key}"
        words, hurt = list(damage(server, at, made))[number]
        hurt()
        caplog.clear()
        elsewhere = machines.store(str(number))
        assert elsewhere.load(IDENTITY) is None, f"case {number} was served"
        assert words in caplog.text
        assert f"s3://{at}" in caplog.text
        assert [words in (check.problem or "") for check in store.verify()] == [True]  # also where the cache is good
        with pytest.raises(StoreError, match="run again"):
            elsewhere.open(store.artifact(made))
        again = publish(elsewhere)
        assert again.digest == digest
        assert store.load(IDENTITY) == again
        assert [check.problem for check in store.verify()] == [None]
        assert list(tmp_path.rglob("*escaped*")) == []


def test_a_look_without_reading_data_notices_an_object_that_was_cut(server, proxy, machines):
    store = machines.store()
    made = publish(store)
    at = f"{store.uri.removeprefix('s3://')}/sft/{IDENTITY.key}/data/{made.attempt}/curves.json"
    proxy.hurt()
    assert machines.store().find(IDENTITY) == made
    assert [path for _, path in proxy.seen if "/data/" in path and "prefix" not in path] == []
    server.send("PUT", at, b"{}")
    assert machines.store().find(IDENTITY) is None


# ---- the cache


def test_damage_in_the_cache_is_mended_from_the_bucket(machines, caplog):
    store = machines.store()
    made = publish(store)
    folder = store.open(store.artifact(made))
    curves, listed = folder / "curves.json", folder / "manifest.json"
    hurts = [
        lambda: curves.write_bytes(b'{"text": "hellO"}'),
        lambda: curves.write_bytes(b""),
        curves.unlink,
        lambda: (folder / "extra.json").write_text("{}"),
        lambda: listed.write_text("{}"),
        listed.unlink,
        lambda: (curves.unlink(), curves.symlink_to("/etc/passwd")),
        lambda: listed.write_text(made.model_copy(update={"seconds": 3.0}).text()),  # whole, but not the bucket's
    ]
    for number, hurt in enumerate(hurts):
        hurt()
        caplog.clear()
        assert store.load(IDENTITY) == made, f"case {number}"
        assert ("damaged in the cache" in caplog.text) == (number < 7)
        assert {name: (folder / name).read_bytes() for name in made.files} == FILES
        assert not (folder / "extra.json").exists()
        assert Manifest.parse(listed.read_text()) == made
    assert list((store.root / "tmp").iterdir()) == []


def test_two_machines_never_disagree(machines):
    one, two = machines.store(), machines.store()
    old = publish(one)
    assert two.load(IDENTITY) == old
    new = publish(two, files=other(b"[2]"), replace=True)
    for store in (one, two):
        assert store.load(IDENTITY) == new
        assert store.find(IDENTITY) == new
        assert (store.open(store.artifact(new)) / "curves.json").read_bytes() == b"[2]"
        assert not store.unchanged(store.artifact(old))
        with pytest.raises(StoreError, match="recomputed by another run"):
            store.open(store.artifact(old))


def test_many_processes_that_need_the_same_artifact_each_get_it_whole(machines, tmp_path):
    made = publish(machines.store())
    store = machines.store()

    def work(number: int) -> None:
        folder = store.open(store.artifact(made))
        assert {name: (folder / name).read_bytes() for name in made.files} == FILES
        (tmp_path / f"done-{number}").touch()

    for pid in [in_a_child(lambda n=n: work(n)) for n in range(6)]:
        os.waitpid(pid, 0)
    assert len(list(tmp_path.glob("done-*"))) == 6
    assert len(list((store.root / "sft" / IDENTITY.key).iterdir())) == 1
    assert list((store.root / "tmp").iterdir()) == []


def test_a_cache_without_room_is_told_with_path_and_bytes(machines, tmp_path):
    """The system's own limit on a file's size stands for a full disk."""
    made = publish(machines.store())
    store = machines.store()

    def work() -> None:
        import resource

        store.find(IDENTITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
        try:
            store.open(store.artifact(made))
        except StoreError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            (tmp_path / "said").write_text(str(error))

    os.waitpid(in_a_child(work), 0)
    said = (tmp_path / "said").read_text()
    assert str(store.root) in said
    assert "File too large; 517 bytes are needed there" in said
    assert "STACKRLHF_CACHE" in said


# ---- garbage


def test_young_data_and_what_a_damaged_manifest_may_name_are_left_alone(server, proxy, machines):
    store = machines.store()
    proxy.hurt(*at_the_manifest(lambda: None), times=1)
    proxy.hurt(Fault("500"), lambda method, path: method == "PUT" and "manifest.json" in path)
    with suppress(Unreachable):
        publish(store)
    proxy.hurt()
    assert len(below(server, store)) == 2
    store.collect()
    assert len(below(server, store)) == 2
    at = f"{store.uri.removeprefix('s3://')}"
    server.send("PUT", f"{at}/sft/{IDENTITY.key}/manifest.json", b"[]")
    store.collect(hours=-1)
    assert len(below(server, store)) == 3
    server.send("DELETE", f"{at}/sft/{IDENTITY.key}/manifest.json")
    store.collect(hours=-1)
    assert below(server, store) == []


def test_what_others_keep_in_the_bucket_is_left_alone(server, machines):
    store = machines.store()
    at = f"{store.uri.removeprefix('s3://')}"
    theirs = ["notes.txt", f"sft/{IDENTITY.key}/notes.txt", "logs/2026/data/x/y", f"logs/{'0' * 64}/data/{'z' * 32}/x"]
    for name in theirs:
        server.send("PUT", f"{at}/{name}", b"x")
    upload = server.send("POST", f"{at}/sft/big.bin", query="?uploads").decode()
    publish(store)
    store.collect(hours=-1)
    assert set(theirs) < set(below(server, store))
    assert server.uploads(BUCKET) == 1
    identifier = upload.partition("<UploadId>")[2].partition("<")[0]
    server.send("DELETE", f"{at}/sft/big.bin", query=f"?uploadId={identifier}")


def test_a_cached_copy_that_was_replaced_is_dropped_when_it_is_old(machines):
    one, two = machines.store(), machines.store()
    old = publish(one)
    new = publish(two, files=other(b"[2]"), replace=True)
    assert one.load(IDENTITY) == new
    cached = one.root / "sft" / IDENTITY.key
    one.collect()
    assert sorted(path.name for path in cached.iterdir()) == sorted([str(old.attempt), str(new.attempt)])
    one.collect(hours=-1)
    assert [path.name for path in cached.iterdir()] == [new.attempt]


# ---- pointers


@pytest.mark.parametrize(
    ("kind", "times"),
    [*((kind, 1) for kind in LOST), ("cut-before", 1000), ("500", 1000), ("500-after", 1000)],
)
def test_a_pointer_whose_reply_was_lost_moved_once_or_not_at_all(proxy, machines, kind, times):
    store = machines.store()
    assert store.move_pointer("champion", {"key": "old"}, 0)
    proxy.hurt(Fault(kind), at=1, times=times)
    lost = times > 1 and not kind.endswith("after")
    if lost:
        with pytest.raises(Unreachable):
            store.move_pointer("champion", {"key": "new"}, 1)
    else:
        assert store.move_pointer("champion", {"key": "new"}, 1)
    proxy.hurt()
    assert store.pointer("champion").to["key"] == ("old" if lost else "new")
    assert not store.move_pointer("champion", {"key": "later"}, 0)


def test_a_pointer_that_another_moved_in_the_same_moment_is_theirs(proxy, machines):
    slow, fast = machines.store(), machines.store()
    moved = []
    proxy.hurt(Fault("call", action=lambda: moved.append(fast.move_pointer("champion", {"key": "fast"}, 0))), times=1)
    assert not slow.move_pointer("champion", {"key": "slow"}, 0)
    proxy.hurt()
    assert moved == [True]
    assert [(p.number, p.to["key"]) for p in slow.pointer_history("champion")] == [(1, "fast")]


def test_a_damaged_pointer_is_passed_over_and_a_passing_fault_is_none(server, proxy, machines, caplog):
    store = machines.store()
    store.move_pointer("champion", {"key": "a"}, 0)
    store.move_pointer("champion", {"key": "b"}, 1)
    proxy.hurt(Fault("bare-flip"), is_read, times=1)
    assert store.pointer("champion").to["key"] == "b"
    at = f"{store.uri.removeprefix('s3://')}/pointers/champion/00000002.json"
    content = json.loads(server.send("GET", at))
    server.send("PUT", at, json.dumps(content | {"to": {"key": "c"}}).encode())
    proxy.hurt()
    assert store.pointer("champion").to["key"] == "a"
    assert f"damaged pointer s3://{at}" in caplog.text
    assert store.pointer_number("champion") == 2
