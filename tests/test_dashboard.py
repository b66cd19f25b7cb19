"""What the dashboard says of a step: how long it still takes, pages that are whole, small, harmless and keep secrets."""

import base64
import io
import math
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import markdown_it
import pytest

from tasks import curves, pages
from tasks.artifacts import FileEntry, Identity, Manifest
from tasks.pages import Live, bounded, cell, facts, report_place, without_secrets
from tasks.progress import Pace, Update, in_words, seconds_each, seconds_left

ROOT = Path(__file__).parents[1]
MARKDOWN = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table")
EVIL = "a|b\n<script>alert(1)</script> [x](javascript:alert) ![i](http://h/p.png) `c` # h *b* _u_ ~~s~~"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pace_of(seconds_and_done, total, phase="train") -> tuple[Pace, Clock]:
    clock = Clock()
    pace = Pace(clock)
    for seconds, done in seconds_and_done:
        clock.now = 100.0 + seconds
        pace.hear(Update("sft", phase, done, total))
    return pace, clock


# ---- how long still


def test_ten_steps_of_two_seconds_leave_forty_seconds_for_the_other_twenty():
    points = [(2.0 * n, n) for n in range(11)]
    assert seconds_each(points) == 2.0
    assert seconds_left(points, 30, now=20.0) == 40.0


def test_while_a_step_is_going_on_the_time_left_shrinks_by_that_step_at_most():
    points = [(0.0, 0), (10.0, 1)]
    assert seconds_left(points, 3, now=10.0) == 20.0
    assert seconds_left(points, 3, now=14.0) == 16.0
    assert seconds_left(points, 3, now=500.0) == 10.0  # the last one is still to come


@pytest.mark.parametrize("points", [[], [(0.0, 0)], [(0.0, 5), (9.0, 5)]])
def test_without_two_points_that_differ_nothing_is_known(points):
    assert seconds_each(points) is None
    assert seconds_left(points, 9, now=10.0) is None


def test_what_a_checkpoint_gave_is_not_taken_for_speed():
    pace, _ = pace_of([(60.0, 500), (70.0, 501), (80.0, 502)], 600)
    assert pace.each() == 10.0
    assert pace.left() == 980.0


def test_a_phase_that_gets_slower_is_timed_by_its_newest_part():
    fast = [(float(n), n) for n in range(61)]
    slow = [(60.0 + 10.0 * n, 60 + n) for n in range(1, 13)]  # two minutes at ten seconds each
    assert seconds_each([*fast, *slow]) == 10.0


def test_what_came_before_the_first_step_loading_and_measuring_is_no_part_of_the_rate():
    pace, clock = pace_of([(300.0, 1)], 5)
    assert pace.left() is None
    clock.now += 3
    pace.hear(Update("sft", "train", 2, 5))
    assert pace.left() == 9.0


def test_phases_side_by_side_leave_the_longer_of_both():
    clock = Clock()
    pace = Pace(clock)
    for n in range(1, 6):
        clock.now = 100.0 + n
        pace.hear(Update("reward", "reward", n, 10))
        pace.hear(Update("reward", "judge", n, 25))
    assert pace.left() == pytest.approx(20.0)
    for n in range(6, 10):  # the judge fell silent
        clock.now += 60
        pace.hear(Update("reward", "reward", n, 10))
    assert pace.left() == pytest.approx(60.0)


def test_a_phase_that_is_over_has_nothing_left_and_the_next_one_begins_anew():
    pace, clock = pace_of([(1.0, 1), (2.0, 2)], 2)
    assert pace.left() is None
    clock.now += 5
    pace.hear(Update("sft", "measure", 0, 4))
    clock.now += 5
    pace.hear(Update("sft", "measure", 1, 4))
    assert pace.left() == 15.0


def test_a_million_updates_are_kept_in_few_points_and_give_the_same_rate():
    clock = Clock()
    pace, live = Pace(clock), Live("sft")
    for n in range(20_000):
        clock.now = 100.0 + 0.5 * n
        pace.hear(Update("sft", "train", n, 40_000))
        live.hear(Update("sft", "train", n, 40_000, {"loss": 1.0}))
    assert pace.each() == pytest.approx(0.5, rel=0.02)
    assert max(len(phase.points) for phase in pace._phases.values()) < 400
    assert len(live.rows) < 400


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (1800, "30 min"), (7500, "2 h 05 min"), (274_000, "3 d 4 h")],
)
def test_times_are_told_as_people_say_them(seconds, words):
    assert in_words(seconds) == words


# ---- the page of a running step


def live_ppo(steps=12) -> Live:
    clock = Clock()
    live = Live("ppo", Pace(clock))
    for step in range(1, steps + 1):
        clock.now += 2
        live.hear(Update("ppo", "ppo", step, 40, {"lr": 1e-5, "objective/kl": 0.1 * step, "objective/scores": math.sin(step)}))
    return live


def test_a_running_step_tells_phase_rate_time_left_newest_metrics_and_a_curve():
    live = live_ppo()
    live.hear(Update("ppo", note="alarm at step 3: KL -> stop"))
    page = live.page(256 * 2**20, datetime(2026, 1, 1, 12, tzinfo=UTC))
    assert page.startswith("# ppo: 30 %")
    for words in (
        "12 of 40",
        "about 56 s",
        "| seconds each | 2 |",
        "256 MiB",
        "12:00:00 UTC",
        "`objective/kl` | 1.2",
        "alarm at step 3",
    ):
        assert words in page
    assert page.index("`objective/scores`") < page.index("`lr`")  # the telling ones first
    (picture,) = re.findall(r"data:image/png;base64,([\w+/=]+)", page)
    assert len(picture) < 80_000
    assert live.line() == "ppo 12 of 40, 30 %, about 56 s left; objective/scores -0.5366, objective/kl 1.2, lr 1e-05"


def test_before_the_first_update_and_with_two_points_there_is_a_page_without_a_curve():
    assert "starting" in Live("sft").page(0)
    assert "data:image" not in live_ppo(steps=2).page(0)


def test_a_step_that_ended_has_no_bar_and_nothing_left():
    page = live_ppo().page(0, state="done in 24 s")
    assert page.startswith("# ppo: done in 24 s")
    assert "left" not in page
    assert "█" not in page


# ---- pictures


def test_a_picture_has_a_panel_for_each_metric_that_was_logged_and_leaves_out_what_is_no_number():
    from PIL import Image

    rows = [{"step": n, "a": math.nan if n == 2 else n, "b": n} for n in range(5)]
    assert curves.points(rows, "a") == [(0, 0), (1, 1), (3, 3), (4, 4)]
    drawn = curves.draw_panels(rows, [("A", {"a": ""}), ("B", {"b": ""}), ("C", {"c": ""})])
    assert drawn.startswith("![A, B](data:image/png;base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(drawn.split("base64,")[1][:-1])))
    assert picture.size == (1080, 315)
    assert curves.draw_panels(rows, [("C", {"c": ""})]) == ""


def test_a_picture_that_would_be_too_large_is_drawn_coarser(monkeypatch):
    rows = [{"step": n, "a": math.sin(n)} for n in range(300)]
    monkeypatch.setattr(curves, "LARGEST_IMAGE", 12_000)
    assert len(curves.draw_panels(rows, [("A", {"a": ""})])) < 12_100


def test_the_running_mean_of_a_line_is_that_line():
    line = [float(n) for n in range(100)]
    assert curves.running_mean(line)[10:90] == pytest.approx(line[10:90])
    assert curves.running_mean([3.0] * 50) == [3.0] * 50


# ---- reports


def manifest(**config) -> Manifest:
    return Manifest(
        identity=Identity(step="sft", version=2, config={"steps": 5, "nested": {"lr": 1e-4}, **config}, inputs={"base": "ab" * 32}),
        input_digests={"base": "cd" * 32},
        files={"model/x": FileEntry(bytes=2_000_000, sha256="0" * 64)},
        metrics={"loss": 1.25}, seconds=83.2, peak_memory_bytes=512 * 2**20, code="c", libraries={"torch": "2.13"},
        created="2026-11-22T09:00:00.0+00:00", host="vm|1", pid=1,
    )  # fmt: skip


def test_every_report_ends_with_cost_key_lineage_metrics_and_settings():
    made = manifest()
    page = pages.report(made, "# sft\n\nIt went well.", {"base": "../../artifacts/artifact/1"})
    assert page.startswith("# sft\n\nIt went well.")
    for words in (
        "1 min 23 s",
        "512 MiB",
        made.key,
        "[base](../../artifacts/artifact/1)",
        "`abababababab`",
        "nested.lr  0.0001",
        "loss  1.25",
    ):
        assert words in page
    assert pages.report(made, None).startswith("# sft\n")


def test_a_page_that_is_too_large_loses_its_last_pictures_first():
    picture = "![curve](data:image/png;base64," + "A" * 3000 + ")"
    text = bounded(f"top {picture}\n\nmiddle {picture} bottom", most=4000)
    assert text.count("data:image") == 1
    assert text.endswith("middle *curve: too large to show here* bottom")
    assert len(bounded("ä" * 4000, most=1000).encode()) <= 1000
    assert bounded("short") == "short"


@pytest.mark.parametrize("shown", [cell(EVIL), pages.escape(EVIL)])
def test_what_people_or_models_wrote_is_text_and_nothing_else(shown):
    html = MARKDOWN.render(pages.table(("a", "b"), [(shown, "end")]))
    assert "<script" not in html
    assert "<a " not in html
    assert "<img" not in html
    assert "<em>" not in html
    assert html.count("<td>") == 2
    assert "a|b" in html


def test_long_lines_in_a_cell_are_broken_and_long_texts_cut():
    assert cell("one two three", width=8) == "one two<br>three"
    assert cell("x" * 50, width=40, most=45).endswith("x" * 5 + "…")
    assert cell("a\n\nb") == "a<br><br>b"


def test_passwords_signatures_and_values_of_secret_variables_are_not_shown():
    environment = {"WANDB_API_KEY": "0123456789abcdef", "AWS_SECRET_ACCESS_KEY": "s3cr3t/s3cr3t", "HOME": "/home/somebody"}
    text = (
        "https://me:pass@host/dump.7z?X-Amz-Signature=abc123&x=1 key 0123456789abcdef "
        "s3://b/p?token=zzz /home/somebody s3cr3t/s3cr3t http://host:4200/api"
    )
    shown = without_secrets(text, environment)
    for secret in ("pass@", "abc123", "0123456789abcdef", "zzz", "s3cr3t"):
        assert secret not in shown
    assert "/home/somebody" in shown
    assert "http://host:4200/api" in shown


def test_settings_with_an_address_are_shown_without_its_password():
    page = without_secrets(facts(manifest(source="https://me:hunter2@host/x")), {})
    assert "hunter2" not in page
    assert "host/x" in page


def test_the_full_report_is_a_link_where_a_server_of_reports_is_named_and_a_command_elsewhere():
    key = "ab" * 32
    linked = report_place(key, "/s/report.html", {"STACKRLHF_REPORTS_URL": "http://files:8000/store/"})
    assert f"](http://files:8000/store/evaluate/{key}/report.html)" in linked
    told = report_place(key, "/s/report.html", {})
    assert "`stackrlhf report abababababab --open`" in told
    assert "\n/s/report.html\n" in told
    assert "](" not in told


def test_a_promotion_is_told_in_words():
    from tasks.promote.report import markdown

    decision = {
        "pointer": "champion", "word": "better", "allowed": True, "moved": True, "against": "sft", "champion": None,
        "candidate": {"key": "ef" * 32}, "reason": "efefefefefef becomes champion in place of none: it is better.",
    }  # fmt: skip
    page = markdown(decision)
    assert page.startswith("# promote: there is a new champion")
    assert "efefefefefef" in page
    assert markdown({**decision, "moved": False}).startswith("# promote: no champion yet")
    assert markdown({**decision, "moved": False, "champion": {"key": "aa"}}).startswith("# promote: the champion stays")


# ---- experiment trackers


def test_trackers_are_not_loaded_for_a_run_that_reports_to_none():
    script = """
import sys
from pathlib import Path
from tasks.artifacts import Identity
from tasks.compute import Compute
from tasks.task import telling_trackers
with telling_trackers(Identity(step="sft", version=1, config={}), Path("nowhere"), Compute()) as final:
    final({"loss": 1.0})
print("tasks.trackers" in sys.modules, Path("nowhere").exists())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_trackers_that_were_asked_for_are_told_the_final_metrics_and_get_a_folder_that_is_no_artifacts(tmp_path, monkeypatch):
    import contextlib

    from tasks import trackers
    from tasks.compute import Compute
    from tasks.task import telling_trackers

    told = []

    @contextlib.contextmanager
    def reporting(report_to, identity, folder):
        told.append((report_to, identity.step, folder))
        yield told.append

    monkeypatch.setattr(trackers, "reporting", reporting)
    compute = Compute(report_to=("tensorboard",))
    with telling_trackers(manifest().identity, tmp_path / "trackers", compute) as final:
        final({"loss": 1.0})
    assert told == [(("tensorboard",), "sft", tmp_path / "trackers"), {"loss": 1.0}]
    other = Compute(report_to=("tensorboard",), machines=2, machine_rank=1, rendezvous="10.0.0.1:29500")
    with telling_trackers(manifest().identity, tmp_path, other) as final:  # machine 0 reports
        final({})
    assert len(told) == 2
