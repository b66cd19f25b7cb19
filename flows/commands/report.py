"""`stackrlhf report`: where a run's HTML report lies; or copied, opened, or served on this machine.

The server gives out the reports of the store's evaluations and nothing else: report.html, REPORT.md and the pictures in plots/, as
their manifests list them. It listens on loopback, and answers only to a request that names loopback as its host, so that no page
of another site can read it through the reader's browser.
"""

import argparse
import html
import json
import shutil
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from flows.commands import DONE
from flows.lineage import find
from flows.show import headline
from tasks.artifacts import Artifact, Manifest, Store, StoreError
from tasks.disk import guarded

TYPES = {".html": "text/html; charset=utf-8", ".md": "text/plain; charset=utf-8", ".png": "image/png", ".svg": "image/svg+xml"}
POLICY = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'"
HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})


def report(arguments: argparse.Namespace) -> int:
    if arguments.serve is not None and (arguments.out or arguments.open or arguments.key):
        raise ValueError("--serve shows all reports of the store: leave KEY, --out and --open away")
    store = Store(arguments.store)
    if arguments.serve is not None:
        return serve(store, arguments.serve)
    manifest = find(store, "evaluate", arguments.key)
    path = store.open(store.artifact(manifest)) / "report.html"
    if arguments.out:
        target = arguments.out.expanduser()
        if target.is_dir():
            raise ValueError(f"{target} is a folder: give the name of a file, such as {target / 'report.html'}")
        with guarded(target):
            shutil.copyfile(path, target)
        path = target.absolute()
    if arguments.open:
        import webbrowser

        if not webbrowser.open(path.absolute().as_uri()):
            print(f"stackrlhf: there is no browser here; the report is {path}", file=sys.stderr)
    print(json.dumps({"evaluate": manifest.key, "report": str(path)}) if arguments.json else path)
    return DONE


def serve(store: Store, port: int) -> int:
    try:
        server = make_server(store, port)
    except OSError as error:
        raise ValueError(f"--serve {port}: {error.strerror}: give another port, or 0 for a free one") from error
    except OverflowError as error:
        raise ValueError(f"--serve {port}: a port is a number up to 65535") from error
    with server:
        print(f"reports of {store.uri}: http://127.0.0.1:{server.server_port}/ (Ctrl-C ends)", file=sys.stderr, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)
    return DONE


def make_server(store: Store, port: int) -> ThreadingHTTPServer:
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, store))


def public(manifest: Manifest) -> list[str]:
    """The files of an evaluation that are given out."""
    return [name for name in manifest.files if name in {"report.html", "REPORT.md"} or _is_plot(name)]


def _is_plot(name: str) -> bool:
    path = Path(name)
    return path.parts[0] == "plots" and len(path.parts) == 2 and path.suffix in {".png", ".svg"}


class Handler(BaseHTTPRequestHandler):
    """GET / lists the evaluations; GET /<key>/<file> gives one of the files that `public` names."""

    server_version, sys_version = "stackrlhf", ""

    def __init__(self, store: Store, *rest: object):
        self.store = store
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if host not in HOSTS:
            self._answer(403, "text/plain", b"only for this machine\n")
            return
        try:
            found = self._find(urlsplit(self.path).path)
        except StoreError as error:
            self._answer(502, "text/plain; charset=utf-8", f"{error}\n".encode())
            return
        if found is None:
            self._answer(404, "text/plain", b"there is no such report\n")
        else:
            self._answer(200, *found)

    do_HEAD = do_GET

    def _find(self, path: str) -> tuple[str, bytes] | None:
        if path == "/":
            return TYPES[".html"], self._index().encode()
        key, _, name = path.strip("/").removeprefix("evaluate/").partition("/")
        manifest = self.store.manifest("evaluate", key) if key in self.store.keys("evaluate") else None
        if manifest is None or name not in public(manifest):
            return None
        artifact: Artifact = self.store.artifact(manifest)
        return TYPES[Path(name).suffix], (self.store.open(artifact) / name).read_bytes()

    def _index(self) -> str:
        rows = "\n".join(
            f'<tr><td>{html.escape(m.created[:16].replace("T", " "))}</td><td><a href="/{m.key}/report.html">{m.key[:12]}</a></td>'
            f"<td>{html.escape(headline(m))}</td></tr>"
            for m in reversed(self.store.manifests("evaluate"))
        )
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Reports</title>'
            "<style>body{font:16px sans-serif;margin:2em}td,th{text-align:left;padding:.2em 1em .2em 0}</style>"
            f"<h1>Reports of {html.escape(self.store.uri)}</h1><table><tr><th>evaluated (UTC)</th><th>key</th><th>result</th></tr>"
            f"{rows}</table></html>"
        )

    def _answer(self, code: int, kind: str, content: bytes) -> None:
        self.send_response(code)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal belongs to the user."""
