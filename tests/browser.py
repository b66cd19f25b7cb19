"""Headless Chromium, driven over its own DevTools protocol: open a page, ask it questions, take its picture."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


class Browser:
    """One page of a Chromium of its own; `with Browser(folder) as browser:`."""

    def __init__(self, folder: Path, *, width: int = 1280, height: int = 900):
        self.folder, self.width, self.height = folder, width, height
        self._number = 0

    def __enter__(self) -> "Browser":
        from websockets.sync.client import connect

        assert CHROMIUM is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "profile" / "DevToolsActivePort").unlink(missing_ok=True)  # of an earlier start
        self._log = (self.folder / "chromium.log").open("wb")
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio"]
        flags += ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--force-color-profile=srgb"]
        flags += [f"--user-data-dir={self.folder / 'profile'}", f"--window-size={self.width},{self.height}"]
        self._process = subprocess.Popen(
            [CHROMIUM, *flags, "--remote-debugging-port=0", "about:blank"], stdout=self._log, stderr=self._log
        )
        try:
            port = self._port()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
                page = next(target for target in json.load(answer) if target["type"] == "page")
            self._socket = connect(page["webSocketDebuggerUrl"], max_size=2**27, open_timeout=20)
            self.call("Page.enable")
            self.call("Network.enable")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._end()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _port(self) -> int:
        """Chromium chooses a free one and writes it into its profile."""
        file = self.folder / "profile" / "DevToolsActivePort"
        until = time.monotonic() + 30
        while time.monotonic() < until and self._process.poll() is None:
            if file.exists() and (lines := file.read_text().splitlines()):
                return int(lines[0])
            time.sleep(0.05)
        raise RuntimeError(f"Chromium did not start: see {self.folder / 'chromium.log'}")

    def call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"].get("exception", {}).get("description", found)))
        return found["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def text(self) -> str:
        return str(self.run("document.body ? document.body.innerText : ''"))

    def wait(self, script: str, seconds: float = 30) -> None:
        """Until the expression is true; what the page says is told where it does not become so."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with suppress(RuntimeError):  # the page that the expression began in is gone
                if self.run(script):
                    return
            time.sleep(0.1)
        raise AssertionError(f"{self.run('location.href')}: not so after {seconds:.0f} s: {script}\n{self.text()[:2000]}")

    def wait_for(self, *texts: str, seconds: float = 30) -> None:
        """Until all these texts are shown."""
        self.wait(f"document.body !== null && {json.dumps(texts)}.every(text => document.body.innerText.includes(text))", seconds)

    def picture(self, *, height: int | None = None, settle: float = 0) -> bytes:
        """A PNG of the page as it stands; `height` makes the window so high first; `settle`: seconds until moving graphs stand."""
        if height is not None:
            self.resize(height)
        time.sleep(settle)
        shot = self.call("Page.captureScreenshot", format="png")
        return base64.b64decode(shot["data"])

    def resize(self, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=self.width, height=height, deviceScaleFactor=1, mobile=False)
        time.sleep(0.2)
