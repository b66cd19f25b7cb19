"""Running a step: what is stored is not made again, and what went in while it ran is what stands in its key."""

import errno
import os
import signal
import threading
import time

import pytest

from tasks import step as step_module
from tasks.artifacts import Identity, Store, StoreError
from tasks.interrupt import Interrupted
from tasks.step import StepFailed, describe, differences, follow_step, measured_memory, plan_step, run_step, watching


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def identity(step: str = "base", **more) -> Identity:
    return Identity(**({"step": step, "version": 1, "config": {"steps": 2}} | more))


class Producer:
    """Writes `text`, and counts how often it was asked."""

    def __init__(self, text: str = "hello"):
        self.text, self.calls = text, 0

    def __call__(self, folders, out, kept=None):
        self.calls += 1
        read = "".join((folder / "text.txt").read_text() for folder in folders.values())
        (out / "text.txt").write_text(read + self.text)
        return {"length": len(read + self.text)}


def test_a_step_runs_once_and_is_then_served(store):
    produce, events = Producer(), []
    with watching(lambda event: events.append((event.step, event.state))):
        first = run_step(store, identity(), {}, produce)
        second = run_step(store, identity(), {}, produce)
    assert (first.cached, second.cached, produce.calls) == (False, True, 1)
    assert second.artifact == first.artifact
    assert events == [("base", "running"), ("base", "ran"), ("base", "stored")]


def test_a_step_reads_its_inputs_and_measures_itself(store):
    base = run_step(store, identity(), {}, Producer("a")).artifact

    def produce(folders, out, kept):
        time.sleep(0.05)
        return Producer("b")(folders, out)

    made = run_step(store, identity("sft", inputs={"base": base.key}), {"base": base}, produce)
    assert (store.open(made.artifact) / "text.txt").read_text() == "ab"
    assert made.manifest.metrics == {"length": 2}
    assert made.manifest.input_digests == {"base": base.digest}
    assert 0.05 <= made.manifest.seconds < 5
    assert made.manifest.peak_memory_bytes > 1_000_000


def test_a_failed_step_names_itself_and_leaves_nothing(store):
    def produce(folders, out, kept):
        (out / "text.txt").write_text("x")
        raise ValueError("max_length=3 is too short")

    with pytest.raises(StepFailed, match="base failed: max_length=3 is too short") as caught:
        run_step(store, identity(), {}, produce)
    assert isinstance(caught.value.__cause__, ValueError)
    assert store.load(identity()) is None
    assert list((store.root / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("I/O error: No space left on device (os error 28)")]
)
def test_a_disk_that_fills_up_while_a_step_writes_is_said_with_its_path(store, error):
    def produce(folders, out, kept):
        (out / "text.txt").write_text("x" * 100)
        raise error

    with pytest.raises(StepFailed, match=r"base failed: /.*No space left.*100 bytes"):
        run_step(store, identity(), {}, produce)


def test_a_refresh_that_reproduces_leaves_the_next_steps_stored_and_one_that_does_not_makes_them_anew(store):
    following = Producer("-next")

    def both(text: str, refresh: bool):
        base = run_step(store, identity(), {}, Producer(text), refresh=refresh).artifact
        return run_step(store, identity("sft", inputs={"base": base.key}), {"base": base}, following)

    both("a", refresh=False)
    assert both("a", refresh=True).cached
    changed = both("b", refresh=True)
    assert not changed.cached
    assert (store.open(changed.artifact) / "text.txt").read_text() == "b-next"
    assert both("ignored", refresh=False).cached


def test_an_input_that_is_replaced_while_the_step_reads_it_fails_the_step(store):
    base = run_step(store, identity(), {}, Producer("a")).artifact

    def produce(folders, out, kept):
        run_step(store, identity(), {}, Producer("b"), refresh=True)  # another run
        return Producer()(folders, out)

    with pytest.raises(StepFailed, match="base was replaced by another run while sft read it"):
        run_step(store, identity("sft", inputs={"base": base.key}), {"base": base}, produce)


def test_a_dump_that_changes_while_it_is_read_fails_the_step(store):
    with pytest.raises(StepFailed, match="dump changed while base read it"):
        run_step(store, identity(external={"dump": "a"}), {}, Producer(), external=lambda: {"dump": "b"})


def test_a_hit_made_by_other_code_is_served_with_a_warning(store, monkeypatch, caplog):
    run_step(store, identity(), {}, Producer())
    monkeypatch.setattr(step_module, "code_fingerprint", lambda step: "other")
    monkeypatch.setattr(step_module, "library_versions", lambda: {"torch": "99"})
    outcome = run_step(store, identity(), {}, Producer())
    assert outcome.cached
    assert "made by other code" in caplog.text
    assert "now 99" in caplog.text
    assert len(outcome.warnings) == 2


# ---- steps that go on where they were


def kept_by(store: Store, refresh: bool = False, **more) -> list[str]:
    """Run a resumable step that is killed in its middle; what it finds of the runs before it."""
    found = []

    def produce(folders, out, kept):
        found.extend(path.name for path in sorted(kept.glob("step-*")))
        (kept / f"step-{len(found) + 1}").mkdir()
        raise KeyboardInterrupt  # or anything else

    with pytest.raises(KeyboardInterrupt):
        run_step(store, identity(**more), {}, produce, resumable=True, refresh=refresh)
    return found


def test_a_step_finds_what_a_killed_one_left_and_removes_it_once_it_is_published(store):
    assert kept_by(store) == []
    assert kept_by(store) == ["step-1"]
    assert kept_by(store, config={"steps": 3}) == []
    found = []

    def produce(folders, out, kept):
        found.extend(path.name for path in sorted(kept.glob("step-*")))
        return Producer()(folders, out)

    run_step(store, identity(), {}, produce, resumable=True)
    assert found == ["step-1", "step-2"]
    left = list((store.root / "tmp").iterdir())
    assert [path.name for path in left] == [f"{identity(config={'steps': 3}).key}.kept"]


def test_what_a_failed_step_left_stays_for_the_next_one(store):
    def produce(folders, out, kept):
        (kept / "step-1").mkdir()
        raise ValueError("loss is nan")

    with pytest.raises(StepFailed):
        run_step(store, identity(), {}, produce, resumable=True)
    assert kept_by(store) == ["step-1"]


def test_a_refresh_goes_on_from_a_refresh_only(store, caplog):
    kept_by(store)
    assert kept_by(store, refresh=True) == []
    assert "is not used: it had another refresh" in caplog.text
    assert kept_by(store, refresh=True) == ["step-1"]
    assert kept_by(store) == []


def test_what_was_left_of_other_inputs_is_not_used(store):
    def run(text: str) -> list[str]:
        base = run_step(store, identity(), {}, Producer(text), refresh=True).artifact
        found = []

        def produce(folders, out, kept):
            found.extend(path.name for path in kept.glob("step-*"))
            (kept / "step-1").mkdir(exist_ok=True)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_step(store, identity("sft", inputs={"base": base.key}), {"base": base}, produce, resumable=True)
        return found

    assert [run("a"), run("a"), run("b")] == [[], ["step-1"], []]


def test_an_orphan_and_a_re_run_share_no_folder_and_make_one_artifact(store, caplog):
    begun, going_on = threading.Event(), threading.Event()
    folders_used, made = [], []

    def produce(folders, out, kept):
        folders_used.append(kept)
        (kept / "step-1").mkdir()
        begun.set()
        if len(folders_used) == 1:
            going_on.wait(30)
        return Producer()(folders, out)

    def run():
        made.append(run_step(store, identity(), {}, produce, resumable=True))

    orphan = threading.Thread(target=run)
    orphan.start()
    begun.wait(30)
    run()
    going_on.set()
    orphan.join()
    assert folders_used[0] != folders_used[1]
    assert "is used by another run" in caplog.text
    assert made[0].artifact == made[1].artifact
    assert [manifest.key for manifest in store.list()] == [identity().key]
    assert list((store.root / "tmp").iterdir()) == []


def test_what_a_killed_step_left_goes_after_a_week_and_not_before(store):
    kept_by(store)
    folder = store.root / "tmp" / f"{identity().key}.kept"
    for days, there in ((6, True), (8, False)):
        for path in [*folder.rglob("*"), folder]:
            os.utime(path, (time.time() - days * 86400,) * 2)
        store.collect()
        assert folder.exists() == there


def test_sigterm_while_a_finished_training_is_written_still_publishes_it(store):
    def produce(folders, out, kept):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return Producer()(folders, out)

    events = []
    with pytest.raises(Interrupted), watching(lambda event: events.append(event.state)):
        run_step(store, identity(), {}, produce, resumable=True)
    assert store.load(identity()) is not None
    assert events == ["running", "ran"]


def test_a_machine_that_publishes_nothing_does_its_share_and_waits_for_the_one_that_does(store):
    shared, said = [], []

    def share(folders, out, kept):
        shared.append(kept)
        return {}

    def say(text: str) -> None:
        said.append(text)
        publishing.start()

    publishing = threading.Timer(0.1, lambda: run_step(store, identity(), {}, Producer()))
    outcome = follow_step(store, identity(), {}, share, say)
    publishing.join()
    assert outcome.manifest == store.load(identity())
    assert shared == [store.root / "tmp" / f"{identity().key}.kept"]
    assert "waiting for machine 0" in said[0]
    assert follow_step(store, identity(), {}, share, say).cached


# ---- planning


def test_the_plan_names_the_field_in_which_the_nearest_stored_one_differs(store):
    for steps, rate in ((2, 0.1), (5, 0.1), (9, 0.9)):
        run_step(store, identity(config={"steps": steps, "lora": {"rate": rate}}), {}, Producer())
    plan = plan_step(store, identity(config={"steps": 5, "lora": {"rate": 0.2}}), {})
    assert not plan.stored
    assert plan.differences == ("base.lora.rate: 0.1 -> 0.2",)
    assert plan.last.identity.config["steps"] == 5


def test_the_plan_says_stored_refreshed_never_seen_and_made_from_other_inputs(store):
    base = run_step(store, identity(), {}, Producer()).artifact
    sft = identity("sft", inputs={"base": base.key})
    assert plan_step(store, sft, {"base": base.digest}).why == "no sft is stored yet"
    run_step(store, sft, {"base": base}, Producer())
    assert plan_step(store, sft, {"base": base.digest}).stored
    assert plan_step(store, sft, {"base": base.digest}, refresh=True).why == "refresh was asked for"
    assert plan_step(store, sft, {"base": "other"}).why == "base was recomputed with another content"


def test_a_plan_moves_and_changes_nothing(store):
    run_step(store, identity(), {}, Producer())
    (store.folder("base", identity().key) / "text.txt").unlink()
    before = sorted(store.root.rglob("*"))
    assert not plan_step(store, identity(), {}).stored
    assert sorted(store.root.rglob("*")) == before


def test_differences_name_version_fields_inputs_and_contents():
    old = identity(inputs={"a": "1" * 64}, external={"dump": "x" * 64})
    new = identity(version=2, config={"steps": 3, "new": 1}, inputs={"a": "2" * 64}, external={"dump": "y" * 64})
    assert differences(old, new) == [
        "version: 1 -> 2",
        "base.steps: 2 -> 3",
        "base.new: - -> 1",
        f"input a: {'1' * 12} -> {'2' * 12}",
        f"content of dump: {'x' * 12} -> {'y' * 12}",
    ]


def test_errors_that_a_user_can_mend_are_told_without_the_class():
    assert describe(ValueError("a\nb")) == "a b"
    assert describe(StoreError("full")) == "full"
    assert describe(KeyError("x")) == "KeyError: 'x'"
    assert describe(AssertionError()) == "AssertionError"


# ---- memory


def test_the_peak_is_that_of_the_step_not_of_what_ran_before():
    before = bytearray(300_000_000)
    before[::4096] = b"x" * len(before[::4096])
    del before
    with measured_memory() as small:
        pass
    with measured_memory() as large:
        data = bytearray(200_000_000)
        data[::4096] = b"x" * len(data[::4096])
        del data
    assert 190e6 < large.peak - small.peak < 260e6
    assert not any(thread.name == "memory" for thread in threading.enumerate())
