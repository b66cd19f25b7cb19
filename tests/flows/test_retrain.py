"""Retraining on the beer site of 2016-12, then of 2020-06: what is looked at, what is trained, what is decided and recorded."""

import gzip
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import py7zr
import pytest

from flows.decision import Decision, Record, last_training, log_name, page, records, settled, write
from flows.presets import STEPS
from tasks.artifacts import Artifact, Store
from tasks.progress import listening
from tests.ingest.test_fetch import Server
from tests.orchestra import artifacts as artifacts_on
from tests.orchestra import jobs_of, submit, wait
from tests.orchestra import task_states as states_on
from tests.s3_server import FaultyProxy, S3Server, use

DUMPS = [Path(os.environ["STACKRLHF_DUMPS"])] if "STACKRLHF_DUMPS" in os.environ else []
DUMPS.append(Path(__file__).parents[3] / "shared" / "data" / "dumps")
BEER = "beer.stackexchange.com"
SMALL = {
    "base.scratch.steps": 3, "sft.steps": 2, "reward.max_questions": 16, "reward.max_eval_questions": 8, "ppo.steps": 1,
    "ppo.value_warmup_steps": 0, "evaluate.max_questions": 8, "evaluate.confidence": 0.51,
}  # fmt: skip
"""Preset ci, smaller; with next to no confidence asked for, a verdict is seldom no-evidence."""


def beer(day: str) -> Path:
    for place in DUMPS:
        if (place / day / f"{BEER}.7z").exists():
            return place / day / f"{BEER}.7z"
    pytest.skip(f"no real dump {day}/{BEER}.7z: set STACKRLHF_DUMPS (looked in {', '.join(map(str, DUMPS))})")


def posts(day: str) -> bytes:
    with py7zr.SevenZipFile(beer(day)) as archive:
        from py7zr.io import BytesIOFactory

        factory = BytesIOFactory(10**9)
        archive.extract(targets=["Posts.xml"], factory=factory)
        return factory.products["Posts.xml"].read()


@dataclass
class Ran:
    """A retraining that ended."""

    state: Any
    record: Record
    seconds: float
    told: list[str] = field(default_factory=list)

    @property
    def decision(self) -> Decision:
        return self.record.decision


def retrain(source: str | Path, store: Store, **more: Any) -> Ran:
    from flows.retrain import retrain as flow
    from tasks.compute import Compute

    compute, told, started = Compute(threads=1, workers=1), [], time.monotonic()
    given = {"overrides": SMALL, "store": store.uri, "compute": compute} | more
    with listening(lambda update: told.append(update.note) if update.note else None):
        state = flow([str(source)], "ci", **given, return_state=True)
    return Ran(state, next(records(store, "champion")), time.monotonic() - started, told)


def crown(store: Store, policy: str, expected: int) -> None:
    """Make the champion of a policy that the pipeline made, by the store's own means: to be better takes more than a minute."""
    ppo = store.manifest("ppo", policy)
    assert ppo is not None
    evaluate = next(one for one in store.manifests("evaluate") if one.identity.inputs["ppo"] == policy)
    made = [ppo, evaluate, *(store.manifest(step, ppo.identity.inputs[step]) for step in ("sft", "reward"))]
    references: list[Artifact] = [store.artifact(one) for one in made if one]
    to = {"key": policy, "evaluate": evaluate.key, "artifacts": {one.step: one.model_dump(exclude={"uri"}) for one in references}}
    assert store.move_pointer("champion", to, expected)


def task_states(run_id: Any) -> dict[str, str]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    until = time.monotonic() + 30
    while time.monotonic() < until:
        with get_client(sync_client=True) as client:
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run_id]}))
        if runs and all(run.state and run.state.is_final() for run in runs):
            runs.sort(key=lambda run: run.start_time)
            return {run.name: run.state.name for run in runs}
        time.sleep(0.2)
    raise AssertionError("the task runs did not end")


def artifacts_of(run_id: Any) -> dict[str, Any]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    with get_client(sync_client=True) as client:
        return {a.key: a.data for a in client.read_artifacts(flow_run_filter=FlowRunFilter(id={"any_": [run_id]}))}


def run_id(ran: Ran) -> Any:
    return ran.state.state_details.flow_run_id


# ---- a folder where dumps arrive


@dataclass
class Story:
    store: Store
    incoming: Path
    first: Ran
    again: Ran
    newer: Ran
    settled: Ran


@pytest.fixture(scope="module")
def story(prefect_server, tmp_path_factory) -> Story:
    """2016-12 arrives; it is looked at again; its policy becomes the champion; 2020-06 arrives; it is looked at again."""
    home = tmp_path_factory.mktemp("retrain")
    store, incoming = Store(home / "store"), home / "incoming"
    incoming.mkdir()
    shutil.copy(beer("2016-12"), incoming)
    first = retrain(incoming, store)
    again = retrain(incoming, store)
    number = store.pointer_number("champion")
    if number == 0:
        crown(store, str(first.decision.challenger), number)
    shutil.copy(beer("2020-06"), incoming)
    newer = retrain(incoming, store)
    return Story(store, incoming, first, again, newer, retrain(incoming, store))


def test_the_first_dump_is_trained_on_and_what_was_decided_is_recorded(story):
    decision = story.first.decision
    assert story.first.state.is_completed()
    assert story.first.state.name == decision.title
    assert decision.word in {"promoted", "kept"}
    assert (decision.champion, decision.changes) == (None, {})
    assert decision.data.dates == {BEER: "2016-12-10"}
    assert decision.data.questions == {BEER: 576}
    assert (decision.word == "promoted") == (decision.verdict["word"] == "better")
    steps = dict.fromkeys(("base", "sft", "reward", "ppo", "evaluate", "promote"), "Completed")
    parts = {"look": "Changed", "ingest": "Cached", "compare": "Changed", "record": "Completed"}
    assert task_states(run_id(story.first)) == parts | steps  # ingest: when the whole pipeline follows it is stored


def test_nothing_new_ends_in_seconds_and_runs_no_step(story):
    for ran, before in ((story.again, story.first), (story.settled, story.newer)):
        assert ran.state.is_completed()
        assert ran.state.name == "Nothing new"
        assert task_states(run_id(ran)) == {"look": "Nothing new", "record": "Completed"}
        assert ran.seconds < 10
        assert ran.decision.reason.startswith("Nothing changed at the source since")
        assert f"{before.decision.title} (record {before.record.number})" in ran.decision.reason
        assert ran.decision.data == before.decision.data


def test_a_newer_dump_makes_a_challenger_that_meets_the_champion_and_wins_only_if_it_is_better(story):
    decision = story.newer.decision
    assert decision.champion == story.first.decision.challenger != decision.challenger
    assert decision.verdict["champion"]["key"].startswith(decision.champion[:12])
    low = decision.verdict["champion"]["interval"][0]
    better = decision.verdict["champion"]["word"] == "better"
    assert better == (low > 0)
    assert (decision.word == "promoted") == better
    assert story.store.pointer("champion").to["key"] == (decision.challenger if better else decision.champion)
    assert story.newer.state.name == ("Promoted" if better else "Not promoted")
    assert Path(decision.report).is_file()


def test_what_changed_in_the_data_is_told_and_no_question_changed_its_split(story):
    decision = story.newer.decision
    assert (decision.against, decision.data.dates, decision.data.questions) == ("champion", {BEER: "2020-05-31"}, {BEER: 987})
    questions = decision.changes["questions"]
    assert (questions["before"], questions["now"], questions["new"], questions["gone"]) == (576, 987, 411, 0)
    assert decision.changes["answers"]["changed_votes"] == 567  # as the raw rows say: tests/ingest/test_changes.py
    assert (questions["changed_split"], decision.moved_into_eval) == (0, 0)


def test_the_dashboard_has_a_page_of_the_decision(story):
    text = artifacts_of(run_id(story.newer))["retrain-decision"]
    decision = story.newer.decision
    assert text == page(decision, "champion", story.store)
    low, high = decision.verdict["champion"]["interval"]
    for told in (
        f"# {decision.title}", decision.reason, f"| {BEER} | {story.incoming}/{BEER}.7z |", "| questions | 576 | 987 | 411 | 0 |",
        f"| the champion | {decision.verdict['champion']['word']} |", f"{low:+.3f} to {high:+.3f}", decision.challenger,
        decision.champion, decision.report,
    ):  # fmt: skip
        assert told in text
    assert "# Nothing new" in artifacts_of(run_id(story.settled))["retrain-decision"]


def test_the_records_outlive_prefect_and_know_the_run(story):
    kept = list(records(story.store, "champion"))[::-1]
    assert [one.number for one in kept] == list(range(1, len(kept) + 1))
    assert [one.decision.word == "nothing-new" for one in kept[:4]] == [False, True, False, True]
    assert kept[2].decision.flow_run == str(run_id(story.newer))
    assert kept[2].decision.seconds > 0
    assert last_training(story.store, "champion").decision.challenger is not None


@pytest.fixture
def after(story, tmp_path) -> Story:
    """A copy of the store in which 2020-06's policy is the champion, and a folder of its own."""
    shutil.copytree(story.store.root, tmp_path / "store")
    store, incoming = Store(tmp_path / "store"), tmp_path / "incoming"
    incoming.mkdir()
    if store.pointer("champion").to["key"] != story.newer.decision.challenger:
        crown(store, story.newer.decision.challenger, store.pointer_number("champion"))
    return Story(store, incoming, story.first, story.again, story.newer, story.settled)


def test_an_older_dump_is_refused_once_unless_it_is_forced(after):
    shutil.copy(beer("2016-12"), after.incoming)
    ran = retrain(after.incoming, after.store)
    assert ran.state.is_failed()
    assert ran.decision.word == "refused"
    assert "is older than the champion's data: its newest post is of 2016-12-10, theirs of 2020-05-31" in ran.state.message
    assert "`force`" in ran.decision.reason
    assert task_states(run_id(ran))["compare"] == "Failed"
    assert "# Refused" in artifacts_of(run_id(ran))["retrain-decision"]
    assert ran.decision.challenger is None
    again = retrain(after.incoming, after.store)
    assert again.state.name == "Nothing new"
    assert f"Refused (record {ran.record.number})" in again.decision.reason
    forced = retrain(after.incoming, after.store, force=True)
    assert forced.state.is_completed()
    assert forced.decision.challenger == after.first.decision.challenger  # stored: only its verdict against this champion is new
    assert forced.decision.verdict["champion"]["key"].startswith(after.newer.decision.challenger[:12])


def test_a_dump_with_far_fewer_questions_is_refused(after):
    """An upload that was cut, and closed as if it were whole."""
    rows = posts("2020-06").splitlines(keepends=True)
    lines = [row for number, row in enumerate(rows) if number < 3 or number > len(rows) / 2]
    (after.incoming / f"{BEER}.xml").write_bytes(b"".join(lines))
    ran = retrain(after.incoming, after.store)
    assert ran.state.is_failed()
    assert f"the dump of {BEER} gives" in ran.decision.reason
    assert "questions and the champion's data 987: it seems cut" in ran.decision.reason


def test_another_site_in_the_place_of_the_champions_is_refused(after):
    from tasks.ingest.config import SimulatedSiteConfig
    from tasks.ingest.simulated.generate import write_site

    write_site(SimulatedSiteConfig(questions=60), after.incoming / "wood.test")
    ran = retrain(after.incoming / "wood.test", after.store)
    assert f"{BEER} is not there, and the champion's data have 987 questions of it" in ran.decision.reason


def test_the_same_rows_packed_anew_are_nothing_new(after):
    """Other bytes, so they are ingested; the same questions and pairs, so nothing is trained."""
    shutil.copy(beer("2020-06"), after.incoming)
    touched = retrain(after.incoming, after.store)
    assert "The files at the source are, byte by byte, what the champion was trained on." in touched.decision.reason
    assert set(task_states(run_id(touched))) == {"look", "record"}
    folder = after.incoming / "packed"
    with py7zr.SevenZipFile(beer("2020-06")) as archive:
        archive.extract(folder, ["Posts.xml", "Users.xml"])
    (after.incoming / f"{BEER}.7z").unlink()
    for table in ("Posts", "Users"):
        with gzip.open(after.incoming / f"{BEER}.{table}.xml.gz", "wb", compresslevel=1) as packed:
            packed.write((folder / f"{table}.xml").read_bytes())
    shutil.rmtree(folder)
    ran = retrain(after.incoming, after.store)
    assert ran.state.name == "Nothing new"
    assert "the questions and pairs in them are what the champion was trained on" in ran.decision.reason
    states = task_states(run_id(ran))
    assert (states["look"], states["compare"]) == ("Changed", "Nothing new")


def test_a_failure_is_recorded_and_looked_at_anew(after):
    (after.incoming / f"{BEER}.7z").write_bytes(beer("2020-06").read_bytes()[:700_000])  # while it is being uploaded
    ran = retrain(after.incoming, after.store)
    assert ran.state.is_failed()
    assert ran.decision.word == "failed"
    assert "corrupt or cut" in ran.decision.reason
    assert settled(after.store, "champion").decision.word != "failed"
    shutil.copy(beer("2020-06"), after.incoming)
    assert retrain(after.incoming, after.store).state.name == "Nothing new"


def test_the_command_says_what_it_decided(after, capsys):
    from flows.cli import main

    shutil.copy(beer("2020-06"), after.incoming)
    command = ["retrain", "--source", str(after.incoming), "--preset", "ci", "--store", after.store.uri, "--threads", "1"]
    assert main([*command, "--json"]) == 0
    assert Decision.model_validate_json(capsys.readouterr().out) == next(records(after.store, "champion")).decision
    shutil.copy(beer("2016-12"), after.incoming)
    assert main(command) == 2
    assert "is older than the champion's data" in capsys.readouterr().err
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("Nothing new: Nothing changed at the source since the look of")


def test_the_command_says_in_one_line_what_failed(prefect_server, tmp_path, capsys, monkeypatch):
    """2 where it is the user's, 1 where it is not; a failing step leaves its traceback in a file."""
    from flows.cli import main

    (tmp_path / "beer.stackexchange.com.7z").write_bytes(b"7z\xbc\xaf'\x1c cut")
    command = ["retrain", "--source", str(tmp_path), "--preset", "ci", "--store", str(tmp_path / "store"), "--threads", "1"]
    assert main(command) == 2
    assert "corrupt or cut" in capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "beer.stackexchange.com.7z").unlink()
    (tmp_path / "wood.test").mkdir()
    for table in ("Posts", "Users"):
        (tmp_path / "wood.test" / f"{table}.xml").write_text("<posts></posts>")
    monkeypatch.setattr("tasks.ingest.ingest.ingest", lambda *_, **__: 1 / 0)
    assert main([*command[:2], str(tmp_path / "wood.test"), *command[3:]]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("stackrlhf: ingest failed: ZeroDivisionError")
    assert "ZeroDivisionError" in Path(said.partition("(traceback: ")[2].rstrip(")")).read_text()


@pytest.mark.parametrize("source", [[], [""], ["{{ $STACKRLHF_DUMP_SOURCE }}"]])
def test_without_a_source_it_says_what_to_set(prefect_server, tmp_path, source):
    from flows.retrain import retrain as flow

    state = flow(source, "ci", store=str(tmp_path / "store"), return_state=True)
    assert state.is_failed()
    assert "retrain has no source to look at" in state.message
    assert "set its parameter `source`" in state.message


def test_records_written_at_once_all_stand(tmp_path):
    store = Store(tmp_path / "store")
    one = Decision(word="nothing-new", reason="a test")
    threads = [threading.Thread(target=lambda: [write(store, "champion", one) for _ in range(5)]) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.number for record in records(store, "champion")] == list(range(30, 0, -1))
    assert store.pointer("champion") is None
    assert store.pointer_number(log_name("champion")) == 30


# ---- a challenger that is better


LEARNS = SMALL | {
    "base.scratch.steps": 240, "base.scratch.batch_tokens": 1024, "base.scratch.learning_rate": 6e-3, "sft.steps": 60,
    "ppo.learning_rate": 1e-6, "evaluate.max_questions": 24, "evaluate.max_new_tokens": 48, "evaluate.temperature": 0.2,
    "evaluate.confidence": 0.99,
}  # fmt: skip
"""Enough that answers begin like the site's and end like sentences, which the simulated site's truth rewards."""


def test_a_challenger_that_is_better_becomes_the_champion(prefect_server, tmp_path):
    """On the simulated site, where the truth judges: a policy of three steps of pretraining, then one that has learnt to write."""
    from tasks.ingest.config import SimulatedSiteConfig
    from tasks.ingest.simulated.generate import write_site
    from tasks.ingest.simulated.world import SITE

    store, source = Store(tmp_path / "store"), tmp_path / SITE
    write_site(SimulatedSiteConfig(questions=150), source)
    first = retrain(source, store)
    if store.pointer("champion") is None:
        crown(store, str(first.decision.challenger), 0)
    before = store.pointer("champion")
    write_site(SimulatedSiteConfig(questions=400), source)
    ran = retrain(source, store, overrides=LEARNS)
    decision, verdict = ran.decision, ran.decision.verdict["champion"]
    assert (ran.state.name, decision.word) == ("Promoted", "promoted"), decision.reason
    assert (verdict["word"], verdict["by"]) == ("better", "true")
    assert verdict["interval"][0] > 0
    assert decision.champion == before.to["key"] != decision.challenger
    now = store.pointer("champion")
    assert (now.number, now.to["key"]) == (before.number + 1, decision.challenger)
    assert artifacts_of(run_id(ran))["retrain-decision"].startswith("# Promoted")
    assert retrain(source, store, overrides=LEARNS).decision.word == "nothing-new"
    assert store.pointer("champion") == now


# ---- elsewhere


@pytest.fixture
def web(tmp_path, monkeypatch):
    monkeypatch.setenv("STACKRLHF_CACHE", str(tmp_path / "cache"))
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetched(ran: Ran) -> int:
    return sum(note.startswith("fetching ") for note in ran.told)


def watched(source: str, put: Callable[[bytes], Any], after: Story) -> None:
    """The champion's dump: fetched once, since only its bytes say what it is; then an older one takes its place."""
    put(beer("2020-06").read_bytes())
    ran = retrain(source, after.store)
    assert "byte by byte, what the champion was trained on" in ran.decision.reason
    assert fetched(ran) == 1
    assert "ETag" in ran.decision.files[0].mark
    again = retrain(source, after.store)
    assert again.decision.reason.startswith("Nothing changed at the source since")
    assert fetched(again) == 0
    put(beer("2016-12").read_bytes())
    older = retrain(source, after.store)
    assert "is older than the champion's data" in older.decision.reason
    assert fetched(older) == 1


def test_a_dump_on_a_web_server_is_told_apart_by_its_etag(after, web):
    watched(f"{web.url(f'/{BEER}.7z')}?token=secret", lambda data: web.files.update({f"/{BEER}.7z": data}), after)
    for record in records(after.store, "champion"):
        assert "secret" not in record.decision.model_dump_json()
    web.files.clear()
    gone = retrain(web.url(f"/{BEER}.7z"), after.store)
    assert gone.state.is_failed()
    assert "there is no such file (the server says 404)" in gone.decision.reason


def test_a_dump_in_s3_is_told_apart_by_its_etag(after, tmp_path, monkeypatch):
    server = S3Server()
    proxy = FaultyProxy(server)
    try:
        use(monkeypatch, proxy.url, tmp_path / "cache")
        server.send("PUT", "dumps")
        watched("s3://dumps/*.7z", lambda data: server.send("PUT", f"dumps/{BEER}.7z", data), after)
        assert sum(method == "GET" and BEER in path for method, path in proxy.seen) == 2  # a version each
    finally:
        proxy.stop()
        server.stop()


# ---- on work pools


def test_on_pools_the_steps_are_jobs_and_the_second_look_starts_none(orchestra, tmp_path):
    server, store = orchestra.server, Store(tmp_path / "store")
    shutil.copy(beer("2016-12"), tmp_path)
    given = {
        "source": [str(tmp_path / f"{BEER}.7z")], "config": "ci", "overrides": SMALL, "store": store.uri,
        "compute": {"executor": "pool", "threads": 1, "workers": 1},
    }  # fmt: skip
    first = wait(server, submit(server, "retrain/weekly", **given), 300)
    (record,) = records(store, "champion")
    assert first.state.is_completed(), first.state
    assert (record.decision.flow_run, record.decision.title) == (str(first.id), first.state.name)
    jobs = jobs_of(server, first.id)
    assert {step: len(runs) for step, runs in jobs.items()} == dict.fromkeys(STEPS, 1)
    assert "retrain-decision" in artifacts_on(server, first.id)
    again = wait(server, submit(server, "retrain/weekly", **given), 60)
    assert again.state.name == "Nothing new"
    assert jobs_of(server, again.id) == {}
    assert states_on(server, again.id) == {"look": "Nothing new", "record": "Completed"}


def test_two_at_once_do_no_harm(orchestra, tmp_path):
    server, store = orchestra.server, Store(tmp_path / "store")
    shutil.copy(beer("2016-12"), tmp_path)
    given = {
        "source": [str(tmp_path / f"{BEER}.7z")], "config": "ci", "overrides": SMALL, "store": store.uri,
        "compute": {"executor": "inline", "threads": 1, "workers": 1},
    }  # fmt: skip
    runs = [submit(server, "retrain/weekly", **given) for _ in range(2)]
    ended = [wait(server, run, 300) for run in runs]
    decisions = [record.decision for record in records(store, "champion")]
    assert {decision.flow_run for decision in decisions} == {str(run) for run in runs}
    assert all(check.problem is None for check in store.verify())
    assert len(store.manifests("ppo")) == 1
    assert store.pointer_number("champion") <= 1
    assert all(run.state.is_completed() for run in ended), [run.state for run in ended]
