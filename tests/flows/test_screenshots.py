"""What a person sees: a real run's pages in headless Chromium. Texts are there, every plot is loaded and is not blank.

STACKRLHF_KEEP_SCREENSHOTS=1 runs the preset tiny instead of ci and writes the pictures into docs/dashboard/.
"""

import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, Browser
from tests.flows.test_pool import COMPUTE, SMALL
from tests.orchestra import ROOT, Server, artifacts, jobs_of, submit, wait

KEEP = os.environ.get("STACKRLHF_KEEP_SCREENSHOTS") == "1"
PRESET = "tiny" if KEEP else "ci"
MOST, MOST_OF_A_RUN = 2400, 1200
"""Pixels of height; under a run's graph there are only its logs."""
SETTLE = 4 if KEEP else 0.5
"""Seconds until a run's graph stands still, which only a kept picture needs."""
LARGEST = 250_000
"""Bytes of a kept picture."""
PLOTS = "[...document.querySelectorAll('img')].filter(image => image.src.startsWith('data:image/png'))"
LOADED = f"{PLOTS}.every(image => image.complete && image.naturalWidth > 100)"
DRAWN = f"""{PLOTS}.map(image => {{
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    const pixels = new Uint32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
    return [new Set(pixels).size, pixels.filter(pixel => pixel !== pixels[0]).length / pixels.length];
}})"""
HEIGHT = "Math.max(...[...document.querySelectorAll('*')].map(element => element.scrollHeight))"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (apt-get install chromium): the dashboard is not looked at")


@dataclass
class Watched:
    """A finished run, a browser, and where its pictures go."""

    server: Server
    browser: Browser
    pictures: Path
    run: str
    artifacts: dict[str, str]

    def look(self, path: str, name: str, *texts: str, plots: int = 0, settle: float = 0, most: int = MOST) -> None:
        """Open a page, wait until all these texts and so many plots are there, and take its picture, `settle` seconds later."""
        browser = self.browser
        browser.resize(900)
        browser.open(self.server.url.removesuffix("/api") + path)
        browser.wait_for(*texts)
        browser.wait(f"{PLOTS}.length >= {plots} && {LOADED}")
        for colours, marked in browser.run(DRAWN):
            assert colours > 8, f"{path}: a plot of {colours} colours"
            assert marked > 0.01, f"{path}: a plot that is blank"
        save(browser.picture(height=min(most, max(900, browser.run(HEIGHT))), settle=settle), self.pictures / f"{name}.png")

    def artifact(self, key: str, *texts: str, **more: int) -> None:
        self.look(f"/artifacts/artifact/{self.artifacts[key]}", key, *texts, **more)


def save(picture: bytes, path: Path) -> None:
    """In a palette, which is small and looks the same."""
    from PIL import Image

    image = Image.open(io.BytesIO(picture)).convert("RGB")
    for colours in (256, 128, 64):  # the rare ones, which are the curves, are not merged
        image.quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size < LARGEST:
            return
    raise AssertionError(f"{path} has {path.stat().st_size} bytes")


def ask(server: Server, path: str, body: dict) -> list:
    import httpx

    return httpx.post(server.url + path, json=body, timeout=30).raise_for_status().json()


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The pipeline from the terminal against a server, as a user would have it; PPO's page is seen while it runs."""
    home = tmp_path_factory.mktemp("watched")
    pictures = ROOT / "docs" / "dashboard" if KEEP else home / "pictures"
    pictures.mkdir(exist_ok=True)
    server = Server(home / "prefect")
    with server, Browser(home / "browser") as browser:
        command = [sys.executable, "-m", "flows.rlhf", "--preset", PRESET, "--store", str(home / "store")]
        command += [] if KEEP else ["--workers", "1", *(f"--set={name}={value}" for name, value in SMALL.items())]
        with (home / "run.log").open("w") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=server.env, stdout=log, stderr=log)
            try:
                seen = Watched(server, browser, pictures, "", {})
                while process.poll() is None:
                    if KEEP and not seen.artifacts:
                        seen.artifacts = half_way(server)
                        if seen.artifacts:
                            seen.artifact("ppo-live", "objective/kl", "seconds each", plots=1)
                    time.sleep(0.5)
            finally:
                process.kill()
        assert process.returncode == 0, (home / "run.log").read_text()[-3000:]
        runs = ask(server, "/flow_runs/filter", {"flows": {"name": {"any_": ["rlhf"]}}})
        found = ask(server, "/artifacts/filter", {})
        yield Watched(server, browser, pictures, runs[0]["id"], {artifact["key"]: artifact["id"] for artifact in found})


def half_way(server: Server) -> dict[str, str]:
    """PPO's live page, once it has something to show."""
    found = ask(server, "/artifacts/filter", {"artifacts": {"key": {"any_": ["ppo-live"]}}})
    return {a["key"]: a["id"] for a in found if re.search(r"\b[4-9]\d %", a["description"])}


def test_the_run_page_names_the_run_and_its_steps(watched):
    browser = watched.browser
    watched.look(
        f"/runs/flow-run/{watched.run}",
        "run",
        f"{PRESET} on a simulated site",
        "Completed",
        "7 Task runs",
        "best baseline",
        settle=SETTLE,
        most=MOST_OF_A_RUN,
    )
    browser.run("[...document.querySelectorAll('button, a, li')].find(e => e.innerText.trim() === 'Task Runs').click()")
    browser.wait_for("ingest", "base", "sft", "reward", "ppo", "evaluate", "promote")
    browser.run("[...document.querySelectorAll('button, a, li')].find(e => e.innerText.trim() === 'Artifacts').click()")
    browser.wait_for("rlhf-overview")


def test_the_overview_tells_every_step_and_the_verdict_and_its_links_lead_there(watched):
    verdict = r"Verdict: (Better|No evidence|Worse) \(gain [+-]\d"
    watched.artifact("rlhf-overview", "Verdict:", "Champion.", "score_before", "best_baseline", "stackrlhf report", "made from")
    assert re.search(verdict, watched.browser.text())
    links = watched.browser.run("[...document.querySelectorAll('a')].filter(a => a.innerText === 'report').map(a => a.href)")
    own = [watched.artifacts[f"{step}-report"] for step in ("ingest", "base", "sft", "reward", "ppo", "evaluate", "promote")]
    assert [link.rsplit("/", 1)[1] for link in links] == own
    watched.browser.open(links[4])
    watched.browser.wait_for("ppo: before and after")


@pytest.mark.parametrize(
    ("step", "plots", "texts"),
    [
        ("ingest", 1, ["Data card: workshop.simulated", "longer answer wins", "ingest"]),
        ("base", 1, ["base: trained from nothing", "validation loss", "parameters"]),
        ("sft", 1, ["the loss went from", "validation perplexity", "made from"]),
        ("reward", 1, ["longer answer wins", "best possible", "ECE", "held-out pairs"]),
        ("ppo", 1, ["before (sft): score", "after (ppo): score", "held-out judge score", "Preflight", "kl_coef"]),
        ("evaluate", 1, ["True reward", "Judge", "stackrlhf report"]),
        ("promote", 0, ["promote:", "verdict", "candidate", "pointer moved"]),
    ],
)
def test_each_step_has_a_report_with_its_plots(watched, step, plots, texts):
    watched.artifact(f"{step}-report", "peak memory", "Settings", *texts, plots=plots)


def test_a_step_that_ran_has_its_progress_and_its_last_live_page(watched):
    watched.browser.open(f"{watched.server.url.removesuffix('/api')}/artifacts/artifact/{watched.artifacts['ppo-progress']}")
    watched.browser.wait_for("Progress: 100%", "ppo: done in")
    if not KEEP:  # there the page was taken while PPO ran
        watched.artifact("ppo-live", "ppo: done in", "objective/kl", "memory now")


def test_where_the_full_report_lies_is_an_artifact_of_its_own(watched):
    watched.browser.open(f"{watched.server.url.removesuffix('/api')}/artifacts/artifact/{watched.artifacts['report']}")
    watched.browser.wait_for("stackrlhf report", "report.html")


def test_the_new_interface_shows_the_same(watched):
    watched.look(
        f"/v2/runs/flow-run/{watched.run}",
        "run-v2",
        f"{PRESET} on a simulated site",
        "Completed",
        settle=SETTLE,
        most=MOST_OF_A_RUN,
    )
    watched.look(f"/v2/artifacts/artifact/{watched.artifacts['rlhf-overview']}", "rlhf-overview-v2", "Verdict:", "score_before")
    watched.look(f"/v2/artifacts/artifact/{watched.artifacts['ppo-report']}", "ppo-report-v2", "before (sft): score", plots=1)
    links = json.dumps(watched.browser.run("[...document.querySelectorAll('a')].map(a => a.href)"))
    assert f"/v2/artifacts/artifact/{watched.artifacts['sft-report']}" in links


@pytest.mark.skipif(not KEEP, reason="only for the pictures in docs/dashboard/: tests/flows/test_pool.py runs pipelines on pools")
def test_a_run_on_work_pools_shows_its_jobs(orchestra, tmp_path):
    run = submit(orchestra.server, "rlhf/ci", overrides=SMALL, compute=COMPUTE, store=str(tmp_path / "store"))
    assert wait(orchestra.server, run, 400).state.is_completed()
    overview = artifacts(orchestra.server, run)["rlhf-overview"]
    for job in jobs_of(orchestra.server, run).values():
        assert f"[job](../../runs/flow-run/{job[0].id})" in overview
    with Browser(tmp_path / "browser") as browser:
        seen = Watched(orchestra.server, browser, ROOT / "docs" / "dashboard", str(run), {})
        seen.look(f"/runs/flow-run/{run}", "run-on-pools", "Completed", "7 Task runs", settle=SETTLE, most=MOST_OF_A_RUN)
