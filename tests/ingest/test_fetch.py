"""Fetching over a real connection to servers on this machine, with everything going wrong that does go wrong."""

import base64
import email.utils
import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import py7zr
import pytest

from tasks.disk import cache_folder
from tasks.ingest import fetch, sources
from tasks.ingest.config import IngestConfig
from tasks.ingest.identity import digest
from tasks.progress import Progress, listening

DATA = random.Random(1).randbytes(3_000_000)
OTHER = random.Random(2).randbytes(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
XML = b"<posts>\n" + b'<row Id="1" PostTypeId="5" />\n' * 50 + b"</posts>"
USERS = b'<users>\n<row Id="1" DisplayName="Ann" />\n</users>'


class Server(ThreadingHTTPServer):
    """Serves `files` with ranges, as RFC 9110 wants it; each request takes the next of `faults`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[dict] = []
        self.asked: list[tuple[str, str | None, str | None]] = []  # path, Range, If-Range
        self.conditions: list[tuple[str | None, str | None]] = []  # If-None-Match, If-Modified-Since
        self.answered: list[int] = []
        self.headers: dict[str, str] = {}
        self.go_on = threading.Event()

    def handle_error(self, request, client_address): ...  # cut connections are meant here

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_): ...

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server = self.server
        wanted, if_range = self.headers["Range"], self.headers["If-Range"]
        server.asked.append((self.path, wanted, if_range))
        server.conditions.append((self.headers["If-None-Match"], self.headers["If-Modified-Since"]))
        fault = server.faults.pop(0) if server.faults else {}
        if "status" in fault:
            return self.answer(fault["status"], fault.get("headers", {}), b"sorry", "5")
        path = self.path.split("?")[0]
        if path not in server.files:
            return self.answer(404, {}, b"gone", "4")
        data = fault.get("data", server.files[path])
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        headers = {"ETag": etag, "Date": email.utils.formatdate(usegmt=True)} | server.headers | fault.get("headers", {})
        headers = {key: value for key, value in headers.items() if value is not None}
        if not fault.get("ignores_conditions"):
            tag, since = server.conditions[-1]  # a date counts only where no tag is given (RFC 9110, 13.2.2)
            if tag == headers.get("ETag") if tag else since and since == headers.get("Last-Modified"):
                return self.answer(304, {key: value for key, value in headers.items() if key in {"ETag", "Date"}}, b"", None)
        status, start = 200, 0
        current = if_range in {None, headers.get("ETag"), headers.get("Last-Modified")} or fault.get("ignores_if_range")
        if wanted and not fault.get("no_range") and current:
            start, status = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]), 206
            if start >= len(data):
                return self.answer(416, {"Content-Range": f"bytes */{len(data)}"}, b"", "0")
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if self.command == "HEAD":
            return self.answer(status, headers, b"", str(len(body)))
        self.answer(status, headers, body, fault.get("length", str(len(body))), fault)

    def answer(self, status, headers, body, length, fault=None):
        fault = fault or {}
        self.server.answered.append(status)
        self.send_response_only(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if status == 304:
            pass  # has no body
        elif length is not None:
            self.send_header("Content-Length", length)
        elif not fault.get("chunked"):
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if fault.get("chunked"):
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        cut = fault.get("cut")
        self.wfile.write(body[:cut])
        self.wfile.flush()
        if "stall" in fault:  # some bytes, then silence until the test says so
            self.server.go_on.wait(fault["stall"])
            self.wfile.write(body[cut:])
            cut = None
        if cut is not None or fault.get("closes"):
            if fault.get("reset"):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.close_connection = True


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    server.files["/a.test.7z"] = DATA
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("STACKRLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def get(server, path="/a.test.7z", **options):
    """(what was fetched, the lines that were told)."""
    told = []
    with listening(lambda update: told.append(update.note) if update.note else None):
        found = fetch.fetch(server.url(path), progress=Progress("ingest"), **{"wait": 0.01, "patience": 5.0} | options)
    return found.read_bytes(), told


def ranges(server):
    return [wanted for _, wanted, _ in server.asked]


def leftovers(cache):
    return sorted(p.suffix for p in cache.rglob("*") if p.is_file())


def test_a_file_is_fetched_once_and_told_of(server, cache):
    data, told = get(server)
    assert data == DATA
    assert "fetching http://127.0.0.1" in told[0]
    assert "(3.0 MB)" in told[0]
    assert SHA256 in told[-1]
    assert get(server) == (DATA, [])
    assert len(server.asked) == 1
    assert leftovers(cache) == [".7z", ".json", ".lock"]
    path = fetch.fetch(server.url("/a.test.7z"))
    assert fetch.digest(path) == SHA256
    assert fetch.digest(Path(__file__)) is None


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("STACKRLHF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "stackrlhf"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # to be ignored, says the XDG specification
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "stackrlhf"


@pytest.mark.parametrize("how", [{"closes": True}, {"reset": True}])
def test_after_a_cut_it_goes_on_where_it_was(server, how):
    server.faults = [{"cut": 1_000_000, **how}, {"cut": 500_000, **how}]
    assert get(server)[0] == DATA
    first, second, third = ranges(server)
    assert first is None
    begun = [int(wanted.removeprefix("bytes=").rstrip("-")) for wanted in (second, third)]
    # After a reset the kernel may throw away what was not read yet, so less can have come than was sent.
    assert 0 < begun[0] <= 1_000_000
    assert begun[0] < begun[1] <= 1_500_000
    assert all(guard == f'"{hashlib.md5(DATA).hexdigest()}"' for _, _, guard in server.asked[1:])


def test_a_cut_in_a_chunked_answer_is_noticed(server):
    server.faults = [{"length": None, "chunked": True, "cut": 900_000}]
    assert get(server)[0] == DATA
    assert len(server.asked) == 2


def test_a_server_without_ranges_starts_over(server):
    server.faults = [{"cut": 1_000_000}, {"no_range": True}]
    data, told = get(server)
    assert data == DATA
    assert any("the server sends it from the start" in line for line in told)


@pytest.mark.parametrize("ignores", [False, True])
def test_a_file_that_changed_in_between_is_not_mixed(server, ignores):
    server.faults = [{"cut": 1_000_000}, {"data": OTHER, "ignores_if_range": ignores}, {"data": OTHER}]
    assert get(server)[0] == OTHER


def test_a_date_guards_only_when_it_is_older_than_the_answer(server):
    now = time.time()
    old, fresh = (email.utils.formatdate(when, usegmt=True) for when in (now - 3600, now + 5))
    server.headers = {"ETag": None, "Last-Modified": old}
    server.faults = [{"cut": 1_000_000}]
    assert get(server)[0] == DATA
    assert server.asked[-1][1:] == ("bytes=1000000-", old)
    for headers in ({"ETag": None, "Last-Modified": fresh}, {"ETag": 'W/"weak"'}, {"ETag": None}):
        server.headers, server.faults, server.asked = headers, [{"cut": 1_000_000}], []
        assert get(server, f"/a.test.7z?{len(str(headers))}")[0] == DATA
        assert ranges(server) == [None, None], headers


def test_busy_servers_are_asked_again_and_given_the_time_that_they_want(server):
    server.faults = [{"status": 503, "headers": {"Retry-After": "1"}}, {"status": 429}, {"status": 500}]
    started = time.monotonic()
    data, told = get(server)
    assert data == DATA
    assert time.monotonic() - started >= 1
    assert sum("trying again" in line for line in told) == 3


def test_tries_that_bring_nothing_end(server):
    server.faults = [{"status": 503}] * 20
    with pytest.raises(ValueError, match=r"a.test.7z: the server answers 503 \(6 tries\)"):
        get(server)
    assert len(server.asked) == 6


def test_many_cuts_are_fine_as_long_as_each_try_brings_something(server):
    server.faults = [{"cut": 200_000}] * 14
    assert get(server)[0] == DATA
    assert len(server.asked) == 15


def test_a_server_that_falls_silent_is_left_and_asked_again(server):
    server.faults = [{"cut": 1_000_000, "stall": 3}]
    data, told = get(server, patience=0.3)
    assert data == DATA
    assert "sent nothing for 0.3 s" in "".join(told)
    assert ranges(server)[1] == "bytes=1000000-"


def test_a_content_length_that_is_too_large_is_not_believed(server):
    server.faults = [{"length": "3000100", "closes": True}] * 20
    with pytest.raises(ValueError, match=r"tries\)"):
        get(server)


def test_what_came_is_kept_when_it_is_given_up(server, cache):
    server.faults = [{"cut": 2_000_000}] + [{"status": 500}] * 6
    with pytest.raises(ValueError, match=r"2.0 MB are kept, run it again to go on"):
        get(server)
    server.faults = []
    assert get(server)[0] == DATA
    assert ranges(server)[-1] == "bytes=2000000-"


@pytest.mark.parametrize("status", [404, 410, 401, 403, 400, 451])
def test_a_refusal_is_one_line_at_once(server, status):
    server.faults = [{"status": status}]
    with pytest.raises(ValueError, match=rf"^http://127.0.0.1:\d+/a.test.7z: .*{status}") as error:
        get(server)
    assert "\n" not in str(error.value)
    assert len(server.asked) == 1


def test_a_refused_connection_is_one_line():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://user:secret@127.0.0.1:{unused.getsockname()[1]}/a.test.7z?token=secret"
    with pytest.raises(ValueError, match=r"no connection to 127.0.0.1:\d+ .*3 tries") as error:
        fetch.fetch(url, wait=0.01)
    assert "secret" not in str(error.value)


def test_a_web_page_is_not_taken_for_a_dump(server):
    server.faults = [{"headers": {"Content-Type": "text/html; charset=utf-8"}}]
    with pytest.raises(ValueError, match="sends a web page instead of the file"):
        get(server)


def test_a_body_that_the_server_packs_on_the_way_is_refused(server):
    server.faults = [{"headers": {"Content-Encoding": "gzip"}}]
    with pytest.raises(ValueError, match=r"packs it on the way \(gzip\)"):
        get(server)
    # Some servers call a .gz so because of its name; its bytes are the file's.
    packed = gzip.compress(XML)
    server.files["/a.test.xml.gz"] = packed
    server.faults = [{"headers": {"Content-Encoding": "gzip"}}]
    assert get(server, "/a.test.xml.gz")[0] == packed


def digest_headers():
    def b64(name, data=DATA):
        return base64.b64encode(hashlib.new(name, data).digest()).decode()

    return {
        "Repr-Digest": lambda data: f"sha-256=:{b64('sha256', data)}:, unknown=:AAAA:",
        "Digest": lambda data: f"SHA-256={b64('sha256', data)}",
        "Content-Digest": lambda data: f"sha-512=:{b64('sha512', data)}:",
        "Content-MD5": lambda data: b64("md5", data),
        "x-amz-checksum-sha256": lambda data: b64("sha256", data),
    }


@pytest.mark.parametrize("name", digest_headers())
def test_the_servers_digests_are_checked(server, name):
    value = digest_headers()[name]
    flipped = DATA[:1_500_000] + bytes([DATA[1_500_000] ^ 4]) + DATA[1_500_001:]
    etag = {"ETag": '"one"'}
    server.headers = etag | {name: value(DATA)}
    server.faults = [{"data": flipped}]
    data, told = get(server)
    assert data == DATA
    algorithm = {"Content-MD5": "md5", "Content-Digest": "sha512"}.get(name, "sha256")
    assert f"and the server says {hashlib.new(algorithm, DATA).hexdigest()}" in "".join(told)
    server.faults = [{"data": flipped}] * 9
    with pytest.raises(ValueError, match="fetched twice: the file there is damaged"):
        get(server, "/a.test.7z?again")


def test_a_digest_of_the_whole_file_is_checked_after_a_cut_too(server):
    server.headers = {"ETag": '"one"', "Content-MD5": base64.b64encode(hashlib.md5(DATA).digest()).decode()}
    flipped = DATA[:-1] + bytes([DATA[-1] ^ 1])
    server.faults = [{"cut": 1_000_000}, {"data": flipped, "headers": {"Content-MD5": None}}]
    assert get(server)[0] == DATA
    assert ranges(server) == [None, "bytes=1000000-", None]


@pytest.mark.parametrize("form", ["#sha256={}", "?sha256={}"])
def test_a_file_can_be_pinned(server, form):
    assert get(server, f"/a.test.7z{form.format(SHA256.upper())}")[0] == DATA
    wrong = "0" * 64
    with pytest.raises(ValueError, match=f"its sha256 is {SHA256}, and {wrong} was asked for"):
        get(server, f"/a.test.7z{form.format(wrong)}")
    with pytest.raises(ValueError, match="sha256=12 is no digest: give its 64 hexadecimal digits"):
        get(server, f"/a.test.7z{form.format('12')}")


def test_a_pin_that_changed_fetches_again(server):
    assert get(server)[0] == DATA
    server.files["/a.test.7z"] = OTHER
    assert get(server)[0] == DATA
    assert get(server, f"/a.test.7z#sha256={hashlib.sha256(OTHER).hexdigest()}")[0] == OTHER


def test_a_cached_file_that_was_altered_is_fetched_again(server):
    path = fetch.fetch(server.url("/a.test.7z"))
    os.utime(path, ns=(1, 1))  # touched only: read once more, and believed again
    assert fetch.digest(path) is None
    assert get(server)[0] == DATA
    assert fetch.digest(path) == SHA256
    assert len(server.asked) == 1
    for damage in (
        lambda: path.write_bytes(OTHER),
        lambda: path.write_bytes(b""),
        lambda: path.with_name("a.test.7z.json").unlink(),
    ):
        damage()
        server.asked = []
        data, _ = get(server)
        assert data == DATA
        assert len(server.asked) == 1


# ---- asked again


def in_another_process():
    """What a process knows of what it asked is forgotten."""
    fetch._asked.clear()


def test_a_process_asks_once_and_the_next_one_asks_again_without_fetching(server):
    get(server)
    get(server)
    assert server.answered == [200]
    for _ in range(2):
        in_another_process()
        assert get(server) == (DATA, [])
        assert get(server) == (DATA, [])
    assert server.answered == [200, 304, 304]
    assert server.conditions[1:] == [(f'"{hashlib.md5(DATA).hexdigest()}"', None)] * 2


def test_what_changed_on_the_server_is_fetched_anew(server):
    get(server)
    in_another_process()
    server.files["/a.test.7z"] = OTHER
    data, told = get(server)
    assert data == OTHER
    assert "changed on the server: fetched again" in told[0]
    in_another_process()
    assert get(server) == (OTHER, [])
    assert server.answered[-1] == 304


def test_a_date_is_asked_about_where_there_is_no_etag(server):
    old, new = (email.utils.formatdate(time.time() - ago, usegmt=True) for ago in (7200, 3600))
    server.headers = {"ETag": None, "Last-Modified": old}
    get(server)
    in_another_process()
    assert get(server) == (DATA, [])
    assert (server.answered, server.conditions[-1]) == ([200, 304], (None, old))
    in_another_process()
    server.headers["Last-Modified"] = new
    server.files["/a.test.7z"] = OTHER
    assert get(server)[0] == OTHER


def test_a_server_that_heeds_no_condition_is_believed_by_what_it_says(server):
    get(server)
    in_another_process()
    server.faults = [{"ignores_conditions": True}]
    assert get(server) == (DATA, [])
    server.files["/a.test.7z"] = OTHER
    in_another_process()
    server.faults = [{"ignores_conditions": True}]
    assert get(server)[0] == OTHER


def test_a_server_that_tells_no_version_is_not_asked_again(server):
    server.headers = {"ETag": None}
    get(server)
    in_another_process()
    assert get(server) == (DATA, [])
    assert server.answered == [200]


@pytest.mark.parametrize("status", [500, 403, 404])
def test_where_the_server_fails_the_cached_file_is_used_with_a_warning(server, caplog, status):
    get(server)
    in_another_process()
    server.faults = [{"status": status}] * 2
    assert get(server)[0] == DATA
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "a.test.7z" in record.message
    assert str(status) in record.message
    assert record.message.endswith("whether it changed is not known, and the copy in the cache is used")


def test_where_the_server_is_away_the_cached_file_is_used_with_a_warning(server, caplog):
    url = server.url("/a.test.7z?token=secret")
    path = fetch.fetch(url)
    server.shutdown()
    server.server_close()
    in_another_process()
    assert fetch.fetch(url, wait=0.01) == path
    assert "no connection to 127.0.0.1" in caplog.text
    assert "the copy in the cache is used" in caplog.text
    assert "secret" not in caplog.text


def test_a_newer_version_that_was_cut_is_gone_on_with_and_never_mixed_with_the_older_one(server, cache):
    get(server)
    in_another_process()
    server.files["/a.test.7z"] = OTHER
    server.faults = [{}, {"cut": 2_000_000}] + [{"status": 500}] * 6
    with pytest.raises(ValueError, match=r"2.0 MB are kept"):
        get(server)
    (whole,) = cache.rglob("*.7z")
    assert whole.read_bytes() == DATA
    in_another_process()
    assert get(server)[0] == OTHER
    assert server.asked[-1][1:] == ("bytes=2000000-", f'"{hashlib.md5(OTHER).hexdigest()}"')
    assert leftovers(cache) == [".7z", ".json", ".lock"]


def test_a_pinned_file_is_not_asked_for_again(server):
    path = f"/a.test.7z#sha256={SHA256}"
    get(server, path)
    in_another_process()
    assert get(server, path)[0] == DATA
    assert server.answered == [200]


def test_two_processes_fetch_the_newer_version_once(server):
    get(server)
    in_another_process()
    server.files["/a.test.7z"] = OTHER
    server.faults = [{}, {"cut": 100_000, "stall": 60}]
    process = child(server)
    wait_for(lambda: len(server.asked) == 3)
    with listening(lambda update: server.go_on.set() if "another process" in update.note else None):
        path = fetch.fetch(server.url("/a.test.7z"), progress=Progress("ingest"))
    assert process.communicate()[1] == ""
    assert path.read_bytes() == OTHER
    assert server.answered.count(200) == 4  # the first version; each process is told that there is another; one fetches it


def test_which_version_stands_there_is_asked_without_fetching_it(server):
    server.headers = {"Last-Modified": "Mon, 01 Jun 2020 01:12:01 GMT"}
    now = fetch.standing(server.url("/a.test.7z"))
    assert now == fetch.Standing(f'"{hashlib.md5(DATA).hexdigest()}"', "Mon, 01 Jun 2020 01:12:01 GMT", len(DATA))
    with pytest.raises(fetch.NotThere, match="there is no such file"):
        fetch.standing(server.url("/b.test.7z"))
    get(server)
    fetch.standing(server.url("/a.test.7z"))
    assert get(server) == (DATA, [])
    assert server.answered[-1] == 304  # whoever looks wants to know: what this process asked before does not count


def child(server, code="", path="/a.test.7z"):
    program = f"{code}\nfrom tasks.ingest.fetch import fetch\nfetch({server.url(path)!r}, wait=0.01)"
    root = Path(fetch.__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", program], cwd=root, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_killed_process_is_gone_on_from(server, cache):
    server.faults = [{"cut": 1_200_000, "stall": 60}]
    process = child(server)
    wait_for(lambda: any(p.stat().st_size >= 1_000_000 for p in cache.rglob("*.part")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (part,) = cache.rglob("*.part")
    kept = part.stat().st_size
    assert DATA.startswith(part.read_bytes())
    assert get(server)[0] == DATA
    assert ranges(server)[-1] == f"bytes={kept}-"
    assert leftovers(cache) == [".7z", ".json", ".lock"]


def test_a_process_killed_after_the_last_byte_needs_no_byte_more(server, cache):
    get(server)
    (whole,) = cache.rglob("*.7z")
    record = whole.with_name("a.test.7z.json")
    about = json.loads(record.read_text())
    whole.rename(whole.with_name("a.test.7z.part"))
    note = {"guard": about["etag"], "etag": about["etag"], "modified": None, "total": len(DATA), "digests": {}}
    whole.with_name("a.test.7z.part.json").write_text(json.dumps(note))
    server.asked = []
    assert get(server)[0] == DATA
    assert server.asked == []


def test_two_processes_fetch_a_file_once(server):
    server.faults = [{"cut": 100_000, "stall": 60}]
    process = child(server)
    wait_for(lambda: server.asked)
    told: list[str] = []
    with listening(lambda update: (told.append(update.note), server.go_on.set() if "another process" in update.note else None)):
        path = fetch.fetch(server.url("/a.test.7z"), progress=Progress("ingest"))
    assert process.communicate()[1] == ""
    assert process.returncode == 0
    assert path.read_bytes() == DATA
    assert len(server.asked) == 1
    assert any("another process fetches a.test.7z: waiting for it" in line for line in told)


def test_a_full_disk_is_one_line_and_what_came_is_kept(server, cache):
    # No file of this process may grow beyond 1 MB: writing fails as on a full disk, with EFBIG for ENOSPC.
    process = child(server, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))")
    last = process.communicate()[1].strip().splitlines()[-1]
    assert re.fullmatch(
        r"ValueError: .*a.test.7z: cannot be written \(the disk is full\): make room \(.* is kept\), or set STACKRLHF_CACHE .*",
        last,
    )
    assert get(server)[0] == DATA
    assert ranges(server)[-1] == "bytes=1000000-"


def test_a_file_that_will_not_fit_is_refused_before_a_byte_of_it(server, cache):
    server.faults = [{"length": str(10**18), "cut": 1000}]
    with pytest.raises(ValueError, match=r"needs 1000000000.0 GB and .* are free: make room, or set STACKRLHF_CACHE"):
        get(server)


def test_a_cache_that_cannot_be_made_is_one_line(server, cache):
    cache.write_bytes(b"a file")
    with pytest.raises(ValueError, match="cannot be written"):
        get(server)


@pytest.mark.parametrize(
    "url", ["https://", "http://127.0.0.1/", "http://127.0.0.1/dumps/", "http://127.0.0.1/*.7z", "http:///a.7z"]
)
def test_addresses_that_name_no_file_are_refused(url):
    with pytest.raises(ValueError, match=r"names no file|cannot be looked into"):
        sources.find((url,))


# ---- as dumps


def pack(members):
    target = io.BytesIO()
    with py7zr.SevenZipFile(target, "w") as archive:
        for name, data in members.items():
            archive.writef(io.BytesIO(data), name)
    return target.getvalue()


def contents(*dump, **options):
    found: dict[str, dict[str, bytes]] = {}
    for site in sources.find(dump, **options):
        tables = found.setdefault(site.name, {})
        for file in site.files:
            sources.read(file, lambda table, chunk, tables=tables: tables.update({table: tables.get(table, b"") + chunk}))
    return found


def test_dumps_over_http_in_each_form(server):
    server.files |= {
        "/a.test.7z": pack({"Posts.xml": XML, "Users.xml": USERS}),
        "/b.test.xml": XML,
        "/c.test.xml.gz": gzip.compress(XML),
        "/d.test/Posts.xml": XML,
        "/two%20words/e.test.7z": pack({"Posts.xml": XML}),
    }
    found = contents(*(server.url(path) for path in server.files))
    assert found == {"a.test": {"posts": XML, "users": USERS}, **{f"{one}.test": {"posts": XML} for one in "bcde"}}


def test_a_bare_name_is_fetched_from_the_archive(server):
    server.files = {"/dumps/a.test.7z": pack({"Posts.xml": XML})}
    assert contents("a.test", archive=server.url("/dumps/{site}.7z")) == {"a.test": {"posts": XML}}
    with pytest.raises(ValueError, match=r"/dumps/b.test.7z: there is no such file \(the server says 404\)"):
        sources.find(("b.test",), archive=server.url("/dumps/{site}.7z"))


def test_stack_overflow_comes_as_an_archive_a_table(server):
    server.files = {
        "/stackoverflow.com-Posts.7z": pack({"Posts.xml": XML}),
        "/stackoverflow.com-Users.7z": pack({"Users.xml": USERS}),
    }
    told = []
    with listening(lambda update: told.append(update.note)):
        found = contents("stackoverflow.com", archive=server.url("/{site}.7z"), progress=Progress("ingest"))
    assert found == {"stackoverflow.com": {"posts": XML, "users": USERS}}
    assert any("stackoverflow.com goes without its table postlinks" in line for line in told)


def test_the_key_is_the_content_wherever_the_dump_lies(server, tmp_path):
    data = pack({"Posts.xml": XML})
    server.files = {"/a.test.7z": data}
    (tmp_path / "a.test.7z").write_bytes(data)
    told = []
    with listening(lambda update: told.append(update.note)):
        remote = digest(IngestConfig(dump=(server.url("/a.test.7z"),)))
    assert (
        remote
        == {"a.test: a.test.7z": hashlib.sha256(data).hexdigest()}
        == digest(IngestConfig(dump=(str(tmp_path / "a.test.7z"),)))
    )
    assert remote == digest(IngestConfig(dump=("a.test",), archive=server.url("/{site}.7z")))
    assert len(server.asked) == 1
    assert any(line.startswith("fetching http://") for line in told)


def test_a_damaged_dump_in_the_cache_says_how_to_be_rid_of_it(server):
    with pytest.raises(ValueError, match=r"corrupt or cut .*: delete it, and it is fetched again"):
        sources.find((server.url("/a.test.7z"),))


# ---- S3


@pytest.fixture(scope="module")
def moto():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def aws(monkeypatch, endpoint):
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")


@pytest.fixture
def bucket(moto, monkeypatch):
    """put(key, data) into a new bucket; s3://bucket is its address."""
    import s3fs

    aws(monkeypatch, moto)
    name = f"bucket-{random.randrange(10**9)}"
    files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    files.mkdir(name)

    def put(key, data):
        files.pipe_file(f"{name}/{key}", data)

    put.address, put.files = f"s3://{name}", files
    return put


def test_dumps_in_s3_as_an_object_a_folder_and_a_glob(bucket):
    bucket("dumps/a.test.7z", pack({"Posts.xml": XML, "Users.xml": USERS}))
    bucket("dumps/b.test.xml", XML)
    bucket("dumps/README.txt", b"hello")
    bucket("so/stackoverflow.com-Posts.7z", pack({"Posts.xml": XML}))
    bucket("so/stackoverflow.com-Users.7z", pack({"Users.xml": USERS}))
    bucket("so/stackoverflow.com-Votes.7z", pack({"Votes.xml": b"<votes/>"}))
    both = {"a.test": {"posts": XML, "users": USERS}, "b.test": {"posts": XML}}
    assert contents(f"{bucket.address}/dumps/a.test.7z") == {"a.test": both["a.test"]}
    assert contents(f"{bucket.address}/dumps/b.test.xml") == {"b.test": both["b.test"]}
    assert contents(f"{bucket.address}/dumps") == both
    assert contents(f"{bucket.address}/dumps/") == both
    assert contents(f"{bucket.address}/*/*.7z") == {"a.test": both["a.test"], "stackoverflow.com": {"posts": XML, "users": USERS}}
    whole = {"stackoverflow.com": {"posts": XML, "users": USERS}}
    assert contents(f"{bucket.address}/so/stackoverflow.com-Posts.7z") == whole
    assert contents("stackoverflow.com", archive=f"{bucket.address}/so/{{site}}.7z") == whole
    assert contents("a.test", archive=f"{bucket.address}/dumps/{{site}}.7z") == {"a.test": both["a.test"]}


def test_an_object_that_changed_in_s3_is_fetched_again(bucket):
    bucket("a.test.xml", XML)
    address = f"{bucket.address}/a.test.xml"
    assert contents(address)["a.test"]["posts"] == XML
    first = digest(IngestConfig(dump=(address,)))
    assert first == {"a.test: a.test.xml": hashlib.sha256(XML).hexdigest()}
    bucket("a.test.xml", XML + b"\n")
    assert contents(address)["a.test"]["posts"] == XML + b"\n"
    assert digest(IngestConfig(dump=(address,))) != first


def test_objects_in_several_parts_are_checked_by_their_etag(bucket, cache):
    size = 5 * 2**20
    whole = DATA + OTHER
    name = bucket.address.removeprefix("s3://")
    upload = bucket.files.call_s3("create_multipart_upload", Bucket=name, Key="a.test.xml")["UploadId"]
    parts = []
    for number, start in enumerate(range(0, len(whole), size), start=1):
        done = bucket.files.call_s3(
            "upload_part", Bucket=name, Key="a.test.xml", UploadId=upload, PartNumber=number, Body=whole[start : start + size]
        )
        parts.append({"PartNumber": number, "ETag": done["ETag"]})
    bucket.files.call_s3(
        "complete_multipart_upload", Bucket=name, Key="a.test.xml", UploadId=upload, MultipartUpload={"Parts": parts}
    )
    path = fetch.fetch(f"{bucket.address}/a.test.xml")
    assert path.read_bytes() == whole
    assert "md5 of parts" in json.loads(path.with_name("a.test.xml.json").read_text())["checked"]


def test_what_is_not_in_s3_is_one_line(bucket):
    bucket("notes/hello.txt", b"hello")
    for address, message in (
        (f"{bucket.address}/a.test.7z", "no such object or folder in S3"),
        ("s3://no-such-bucket-here/a.test.7z", "no such object or folder in S3"),
        (f"{bucket.address}/notes", "no dump in this folder"),
        (f"{bucket.address}/notes/*.7z", "nothing matches that is a dump"),
    ):
        with pytest.raises(ValueError, match=message):
            sources.find((address,))
    with pytest.raises(fetch.NotThere, match="no such object or bucket"):
        fetch.fetch(f"{bucket.address}/a.test.7z")


def test_s3_without_credentials_or_server_is_one_line(monkeypatch, server):
    aws(monkeypatch, server.url(""))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ValueError, match=r"Unable to locate credentials: set AWS_ACCESS_KEY_ID"):
        fetch.fetch("s3://bucket/a.test.7z")


def test_s3_over_a_bad_line_is_gone_on_from_and_flipped_bits_are_noticed(monkeypatch, server):
    # To GET an object S3 is a plain web server, so ours stands in: the ETag of an object is its MD5.
    aws(monkeypatch, server.url(""))
    server.files = {"/bucket/a.test.7z": DATA}
    flipped = DATA[:-1] + bytes([DATA[-1] ^ 1])
    etag = f'"{hashlib.md5(DATA).hexdigest()}"'
    server.faults = [{"cut": 1_000_000}, {"data": flipped, "headers": {"ETag": etag}}]
    path = fetch.fetch("s3://bucket/a.test.7z", wait=0.01)
    assert path.read_bytes() == DATA
    assert ranges(server) == [None, "bytes=1000000-", None]
    server.faults = [{"data": flipped, "headers": {"ETag": etag}}] * 9
    with pytest.raises(ValueError, match="fetched twice: the file there is damaged"):
        fetch.fetch(f"s3://bucket/a.test.7z#sha256={'0' * 64}", wait=0.01)
