"""Requests to S3: what goes wrong is one line, at once or after the time that was set, and no secret is in it."""

import logging
import pickle
import threading
import time
import traceback

import pytest

from tasks import s3
from tasks.artifacts import Identity, Store, StoreError
from tasks.s3 import Bucket, Limits, Taken, Unreachable
from tests.s3_server import SECRET, TOKEN, Fault, FaultyProxy, S3Server, use

IDENTITY = Identity(step="sft", version=1, config={})


@pytest.fixture(scope="module")
def server():
    server = S3Server()
    server.send("PUT", "bucket")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def proxy(server):
    proxy = FaultyProxy(server)
    yield proxy
    proxy.stop()


@pytest.fixture(autouse=True)
def setting(proxy, tmp_path, monkeypatch):
    proxy.hurt()
    use(monkeypatch, proxy.url, tmp_path / "cache")
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    monkeypatch.setattr(s3, "LIMITS", Limits(connect=1, read=0.3, attempts=2, deadline=5, patience=0))


def anything(method: str, path: str) -> bool:
    return True


# ---- addresses


def test_an_address_is_a_bucket_and_a_prefix():
    assert Store("s3://bucket/a/b/").uri == "s3://bucket/a/b"
    assert Store("s3://bucket").uri == "s3://bucket"
    assert Bucket("s3://bucket/a").address("x/y.json") == "s3://bucket/a/x/y.json"


@pytest.mark.parametrize(
    "address",
    [f"s3://AKIACANARY:{SECRET}@bucket/a", "s3://", "s3:///a", "s3://Bucket/a", "s3://b", "s3://bucket/a?b=c", "s3://bucket/../a",
     "s3://bucket/a//b", "s3://bucket/a b", "s3://bucket/a*#"],
)  # fmt: skip
def test_what_is_no_plain_address_is_refused_without_repeating_it(address):
    with pytest.raises(ValueError, match="s3://bucket/prefix") as caught:
        Store(address)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_cache_has_a_folder_for_each_address(monkeypatch, tmp_path):
    assert Store("s3://bucket/a").root == Store("s3://bucket/a/").root != Store("s3://bucket/b").root
    assert Store("s3://bucket/a").root.is_relative_to(tmp_path / "cache" / "store")
    monkeypatch.delenv("STACKRLHF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Store("s3://bucket/a").root.is_relative_to(tmp_path / "xdg" / "stackrlhf" / "store")


# ---- objects


def test_a_conditional_write_is_done_once_and_replaced_only_by_who_saw_the_last_one():
    bucket = Bucket("s3://bucket/conditions")
    assert bucket.get("x") is None
    bucket.put("x", b"one", replaces=None)
    with pytest.raises(Taken):
        bucket.put("x", b"two", replaces=None)
    content, etag = bucket.get("x")
    bucket.put("x", b"three", replaces=etag)
    with pytest.raises(Taken):
        bucket.put("x", b"four", replaces=etag)
    with pytest.raises(Taken):
        bucket.put("not there", b"four", replaces=etag)
    assert (content, bucket.get("x")[0]) == (b"one", b"three")


def test_a_list_longer_than_a_page_is_whole(server, monkeypatch):
    monkeypatch.setattr(s3, "PAGE", 3)
    for number in range(10):
        server.send("PUT", f"bucket/pages/{number}/x", b"12345")
    bucket = Bucket("s3://bucket/pages")
    assert {name: listed.bytes for name, listed in bucket.list("").items()} == {f"{number}/x": 5 for number in range(10)}
    assert list(bucket.list("7")) == ["7/x"]
    assert list(bucket.children("")) == [str(number) for number in range(10)]
    bucket.delete(bucket.list(""))
    assert bucket.list("") == {}


def test_a_large_file_is_sent_in_parts_and_read_in_one_piece(server, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(s3, "PART", 5 * 2**20)  # S3's smallest
    content = bytes(range(256)) * 4096 * 11  # 11 MiB
    (tmp_path / "large").write_bytes(content)
    bucket = Bucket("s3://bucket/parts")
    bucket.upload(tmp_path / "large", "x")
    assert [method for method, path in proxy.seen if "partNumber" in path] == ["PUT"] * 3
    proxy.hurt()
    bucket.download("x", tmp_path / "back", len(content))
    assert (tmp_path / "back").read_bytes() == content
    assert len(proxy.seen) == 1
    assert b"Range" not in proxy.heard[-1]


# ---- errors


def caught_by(work) -> Exception:
    with pytest.raises((ValueError, StoreError)) as caught:
        work()
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_bucket_that_is_not_there_is_named_with_its_endpoint(proxy):
    error = caught_by(lambda: Store("s3://nobucket/x").find(IDENTITY))
    assert isinstance(error, ValueError)
    assert str(error) == (f"store s3://nobucket/x: there is no bucket nobucket at {proxy.url}: make it, or name another --store")


def test_no_access_says_what_was_tried_and_which_rights_are_needed(proxy):
    proxy.hurt(Fault("403"), anything)
    error = caught_by(lambda: Store("s3://bucket/x").find(IDENTITY))
    assert isinstance(error, ValueError)
    for words in ("reading s3://bucket/x/sft/", "no access (AccessDenied)", "list, get, put and delete"):
        assert words in str(error)


def test_without_credentials_it_says_how_to_give_them(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    error = caught_by(lambda: Store("s3://bucket/x").find(IDENTITY))
    assert isinstance(error, ValueError)
    assert "no AWS credentials" in str(error)
    assert "AWS_PROFILE" in str(error)


def test_an_endpoint_where_nobody_listens_is_told_at_once_even_if_outages_are_waited_out(monkeypatch):
    monkeypatch.setattr(s3, "LIMITS", Limits(connect=1, read=0.5, attempts=2, deadline=5, patience=600))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:9")
    started = time.monotonic()
    error = caught_by(lambda: Store("s3://bucket/x").find(IDENTITY))
    assert time.monotonic() - started < 5
    assert "no usable answer from http://127.0.0.1:9 " in str(error)
    assert "AWS_ENDPOINT_URL" in str(error)
    assert SECRET not in "".join(traceback.format_exception(error))


def test_an_endpoint_that_is_no_address_is_told_without_repeating_it(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"user:{SECRET}@host")
    error = caught_by(lambda: Store("s3://bucket/x").find(IDENTITY))
    assert isinstance(error, ValueError)
    assert str(error).endswith("is AWS_ENDPOINT_URL an address such as http://host:9000?")
    assert SECRET not in str(error)


def test_an_endpoint_that_hangs_is_given_up_after_the_time_that_was_set(proxy):
    proxy.hurt(Fault("hang-before", seconds=8), anything)
    started = time.monotonic()
    assert isinstance(caught_by(lambda: Store("s3://bucket/x").find(IDENTITY)), Unreachable)
    assert time.monotonic() - started < 4


def test_an_endpoint_that_drips_is_ended_by_the_deadline(proxy, monkeypatch):
    monkeypatch.setattr(s3, "LIMITS", Limits(connect=1, read=30, attempts=2, deadline=1, patience=0))
    proxy.hurt(Fault("hang-before", seconds=8), anything)
    started = time.monotonic()
    assert isinstance(caught_by(lambda: Store("s3://bucket/x").find(IDENTITY)), Unreachable)
    assert time.monotonic() - started < 4


def test_an_outage_in_the_middle_of_a_run_is_waited_out_with_a_warning(proxy, monkeypatch, caplog):
    monkeypatch.setattr(s3, "LIMITS", Limits(connect=1, read=0.5, attempts=2, deadline=5, patience=20))
    store = Store("s3://bucket/outage")
    assert store.find(IDENTITY) is None
    proxy.hurt(Fault("503"), anything)
    threading.Timer(1.0, proxy.hurt).start()
    assert store.find(IDENTITY) is None
    assert "answered SlowDown: run again later; trying again for 20 s" in caplog.text


# ---- secrets


def test_no_secret_is_logged_kept_pickled_or_told(server, proxy, caplog, tmp_path):
    """Not even where all loggers are at DEBUG, and things go wrong. The token, which is sent, shows that the test would see it."""
    caplog.set_level(logging.DEBUG)
    told = []
    store = Store("s3://bucket/secrets")
    for fault in (None, Fault("cut-before"), Fault("403"), Fault("500")):
        proxy.hurt(fault)
        try:
            with store.attempt(IDENTITY.key) as out:
                (out / "a.json").write_text(repr(fault))
                store.publish(out, IDENTITY, metrics={}, seconds=0, peak_memory_bytes=0, replace=True)
        except (ValueError, StoreError) as error:
            told += traceback.format_exception(error)
            told.append(repr(error))
        proxy.hurt()
        told.append(repr(store.load(IDENTITY)))
    told += [repr(store), str(vars(store)), repr(pickle.dumps(store)), repr(store._place.bucket)]
    told += [path.read_text() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    told += [server.send("GET", f"bucket/{name}").decode() for name in server.objects("bucket") if name.startswith("secrets/")]
    everything = "\n".join([*told, caplog.text])
    assert len(caplog.records) > 10
    assert len(told) > 50  # tracebacks among them
    assert TOKEN.encode() in b"".join(proxy.heard)
    assert SECRET not in everything
    assert TOKEN not in everything
    assert pickle.loads(pickle.dumps(store)).load(IDENTITY) == store.load(IDENTITY)
