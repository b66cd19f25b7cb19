"""A real S3 server on loopback, and a real HTTP proxy before it that hurts what passes: what the tests of the store use."""

import http.client
import re
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote
from xml.etree import ElementTree

import pytest

SECRET = "CANARY0secret0CANARY0secret0CANARY0abcde"
TOKEN = "CANARY0token0CANARY0token0CANARY0token0x"


class S3Server:
    """moto's server, one request at a time: its checks of If-Match and If-None-Match would race otherwise, S3's do not."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        application, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

        def one_at_a_time(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            with lock:
                return application(environ, start_response)

        class Quiet(MotoRequestHandler):
            def log(self, *_: Any) -> None:
                pass

        self._server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=Quiet)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()

    # the test's own way to the objects, past the code under test; paths are bucket/key

    def send(self, method: str, path: str, body: bytes | None = None, query: str = "") -> bytes:
        headers = {
            "Content-Type": "application/octet-stream",
            "Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request",
        }
        request = urllib.request.Request(f"{self.url}/{quote(path)}{query}", data=body, method=method, headers=headers)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
            return answer.read()

    def objects(self, bucket: str) -> list[str]:
        listed = ElementTree.fromstring(self.send("GET", bucket, query="?list-type=2&max-keys=1000"))
        return sorted(element.text or "" for element in listed.iter() if element.tag.endswith("}Key") or element.tag == "Key")

    def uploads(self, bucket: str) -> int:
        return len(re.findall(rb"<UploadId>", self.send("GET", bucket, query="?uploads")))


def use(monkeypatch: pytest.MonkeyPatch, url: str, cache: Any) -> None:
    """Let everything that speaks S3 in this process and its children speak with `url`."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "AKIACANARY",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": TOKEN,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "STACKRLHF_CACHE": str(cache),
    }.items():
        monkeypatch.setenv(name, value)


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    cut-before, cut-after: the connection ends without a reply, the request lost or applied; 403, 500, 503: answered so, not
    applied; 500-after: applied, and answered so; hang-before, hang-after: no reply for `seconds`, lost or applied at once; late:
    no reply, and applied after `seconds`; flip, short, cut-body: one bit of the reply's body is wrong, its second half is missing
    and its length says so, or does not; bare-flip, bare-short: the same from a server that sends no checksums; call: `action()`
    before the request is passed on; call-after: after it was applied.
    """

    kind: str
    seconds: float = 2.0
    action: Callable[[], Any] = lambda: None


def is_write(method: str, path: str) -> bool:
    return method in {"PUT", "POST", "DELETE"}


def is_read(method: str, path: str) -> bool:
    return method == "GET" and "list-type" not in path and "uploads" not in path


class FaultyProxy:
    """Passes requests on to a server, and hurts those that are `wanted`, from number `at` on, `times` of them."""

    def __init__(self, server: S3Server):
        self.seen: list[tuple[str, str]] = []
        self.heard: list[bytes] = []
        """The heads of all requests, as they came."""
        self._server, self._lock = server, threading.Lock()
        self.hurt()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def handle_any(self) -> None:
                proxy._handle(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def hurt(
        self, fault: Fault | None = None, wanted: Callable[[str, str], bool] = is_write, at: int = 1, times: int = 1_000_000
    ) -> None:
        with self._lock:
            self._fault, self._wanted, self._at, self._times, self.count = fault, wanted, at, times, 0
            self.seen.clear()

    def _choose(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.seen.append((method, path))
            if not self._wanted(method, path):
                return None
            self.count += 1
            return self._fault if self._at <= self.count < self._at + self._times else None

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        method, path = request.command, unquote(request.path)
        self.heard.append(bytes(request.headers))
        request.close_connection = True
        fault = self._choose(method, path) or Fault("none")
        if fault.kind == "call":
            fault.action()
        if fault.kind in {"hang-before", "late"}:
            time.sleep(fault.seconds)
        if fault.kind in {"cut-before", "hang-before"}:
            return
        status, headers, content = int(fault.kind) if fault.kind.isdigit() else 0, [], b""
        if not status:
            connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=30)
            connection.putrequest(method, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name.lower() not in {"expect", "connection"}:
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            status, headers, content = answer.status, answer.getheaders(), answer.read()
            connection.close()
        if fault.kind == "call-after":
            fault.action()
        if fault.kind == "hang-after":
            time.sleep(fault.seconds)
        if fault.kind in {"cut-after", "hang-after", "late"}:
            return
        if fault.kind == "500-after":
            status, headers = 500, []
        if fault.kind[:3].isdigit():
            code = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}[status]
            content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        if fault.kind.startswith("bare-"):
            headers = [(name, value) for name, value in headers if not name.lower().startswith("x-amz-checksum")]
        length, hurt = len(content), fault.kind.removeprefix("bare-")
        if hurt == "flip" and content:
            content = content[: length // 2] + bytes([content[length // 2] ^ 1]) + content[length // 2 + 1 :]
        if hurt in {"short", "cut-body"}:
            content = content[: length // 2]
            length = len(content) if hurt == "short" else length
        try:
            request.send_response_only(status)
            for name, value in headers:
                if name.lower() not in {"content-length", "connection", "transfer-encoding"}:
                    request.send_header(name, value)
            request.send_header("Content-Length", str(length))
            request.send_header("Connection", "close")
            request.end_headers()
            if method != "HEAD":
                request.wfile.write(content)
        except OSError:
            pass  # the client was killed, or gave up
