"""The champion pointer: moved by a better verdict, once, and never by another one."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import Artifact, Identity, Store
from tasks.champion import entry, rival

pytestmark = pytest.mark.usefixtures("prefect_server")

OTHER = {
    "key": "other",
    "evaluate": "other",
    "artifacts": {step: {"step": step, "key": "other", "digest": "other"} for step in ("ppo", "sft", "reward", "evaluate")},
}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def artifact(store: Store, step: str, **content) -> Artifact:
    identity = Identity(step=step, version=1, config=content)
    with store.attempt(identity.key) as out:
        (out / "verdict.json").write_text(json.dumps(content))
        return store.artifact(store.publish(out, identity, metrics={}, seconds=0, peak_memory_bytes=0))


def verdict(word: str, gain: float) -> dict:
    interval = {"better": [gain / 2, gain * 2], "no-evidence": [-gain, gain * 2], "worse": [gain * 2, gain / 2]}[word]
    return {"word": word, "gain": gain, "interval": interval, "by": "true"}


def promote(store: Store, word: str, gain: float, policy: str, *, beside: str = "better", champion: Any = "now", **made: Artifact):
    """A run of promote as the pipeline makes it: the champion was chosen before, and evaluate compared with it."""
    from flows.steps import promote
    from tasks.promote.config import PromoteConfig

    made = {step: artifact(store, step, name=policy) for step in ("ppo", "sft", "reward")} | made
    met = rival(store, "champion", made["ppo"].key) if champion == "now" else champion
    found = verdict(word, gain) | {"champion": met and verdict(beside, {"worse": -0.1}.get(beside, 0.1)) | {"key": met.to["key"]}}
    evaluate = artifact(store, "evaluate", **found)
    state = promote(config=PromoteConfig(), evaluate=evaluate, **made, champion=met, store=store.uri, return_state=True)
    return made["ppo"], state


def test_a_better_verdict_moves_the_pointer_once(store):
    ppo, state = promote(store, "better", 0.2, "first")
    assert state.name == "Completed"
    assert store.pointer("champion").to["key"] == ppo.key
    assert store.pointer("champion").to["artifacts"]["ppo"]["digest"] == ppo.digest
    _, state = promote(store, "better", 0.2, "first")
    assert state.name == "Cached"
    assert store.pointer_number("champion") == 1


@pytest.mark.parametrize(("word", "gain"), [("no-evidence", 0.2), ("worse", -0.2)])
def test_no_other_verdict_moves_it(store, word, gain):
    _, state = promote(store, word, gain, "first")
    assert state.is_completed()
    assert store.pointer("champion") is None


def test_the_next_candidate_that_beats_the_champion_takes_its_place_and_the_first_is_decided_anew(store):
    promote(store, "better", 0.2, "first")
    second, _ = promote(store, "better", 0.3, "second")
    assert store.pointer("champion").to["key"] == second.key
    first, state = promote(store, "better", 0.2, "first", beside="worse")
    assert state.name == "Completed"
    assert [p.to["key"] for p in store.pointer_history("champion")] == [second.key, first.key]
    _, state = promote(store, "better", 0.3, "second")
    assert state.name == "Cached"


@pytest.mark.parametrize("beside", ["no-evidence", "worse"])
def test_a_candidate_better_than_its_sft_and_not_better_than_the_champion_stays_below(store, beside):
    first, _ = promote(store, "better", 0.2, "first")
    _, state = promote(store, "better", 0.3, "second", beside=beside)
    assert state.is_completed()
    assert store.pointer("champion").to["key"] == first.key


def test_a_candidate_that_shows_no_gain_over_its_sft_may_still_beat_the_champion_but_not_a_worse_one(store):
    first, _ = promote(store, "better", 0.2, "first")
    promote(store, "worse", -0.2, "second")
    assert store.pointer("champion").to["key"] == first.key
    third, _ = promote(store, "no-evidence", 0.2, "third")
    assert store.pointer("champion").to["key"] == third.key


def test_another_evaluation_of_the_champion_itself_moves_nothing(store):
    promote(store, "better", 0.2, "first")
    promote(store, "better", 0.25, "first")
    assert store.pointer_number("champion") == 1


def test_a_champion_whose_content_is_new_is_named_anew(store):
    ppo, _ = promote(store, "better", 0.2, "first")
    identity = store.manifests("ppo")[0].identity
    with store.attempt(identity.key) as out:
        (out / "other.txt").write_text("recomputed with another content")
        new = store.publish(out, identity, metrics={}, seconds=0, peak_memory_bytes=0, replace=True)
    promote(store, "better", 0.25, "first", ppo=store.artifact(new))
    assert store.pointer("champion").to["artifacts"]["ppo"]["digest"] == new.digest != ppo.digest


def test_a_lost_pointer_is_set_again(store):
    ppo, _ = promote(store, "better", 0.2, "first")
    (store.root / "pointers" / "champion" / "00000001.json").unlink()
    promote(store, "better", 0.2, "first")
    assert store.pointer("champion").to["key"] == ppo.key


def test_a_pointer_that_moved_while_it_was_decided_is_not_overwritten(store, monkeypatch):
    real = Store.move_pointer

    def another_was_faster(self, name, to, expected):
        monkeypatch.setattr(Store, "move_pointer", real)
        assert self.move_pointer(name, OTHER, expected)
        return self.move_pointer(name, to, expected)

    monkeypatch.setattr(Store, "move_pointer", another_was_faster)
    _, state = promote(store, "better", 0.2, "first")
    assert state.is_failed()
    assert "moved by another run" in state.message
    assert store.pointer("champion").to["key"] == OTHER["key"]


def test_a_champion_that_came_between_evaluation_and_promotion_is_not_overwritten_unnoticed(store):
    promote(store, "better", 0.2, "first")
    seen = store.pointer("champion")
    assert store.move_pointer("champion", OTHER, 1)
    _, state = promote(store, "better", 0.3, "second", champion=seen)
    assert state.is_failed()
    assert "moved by another run meanwhile: run again, and it is decided anew" in state.message
    _, state = promote(store, "better", 0.3, "second")
    assert state.is_completed()
    assert store.pointer_number("champion") == 3


def test_a_decision_against_another_champion_than_the_evaluated_one_is_refused(store):
    promote(store, "better", 0.2, "first")
    _, state = promote(store, "better", 0.3, "second", champion=None)
    assert state.is_failed()  # it was evaluated before there was any
    assert store.pointer_number("champion") == 1


def test_the_pool_is_told_whether_a_stored_decision_still_stands(store):
    from tasks.promote.config import PromoteConfig
    from tasks.promote.task import unmoved

    promote(store, "better", 0.2, "first")
    manifest = store.manifests("promote")[0]
    evaluate = manifest.identity.inputs["evaluate"]
    assert not unmoved(store, PromoteConfig(), evaluate, manifest)
    (store.root / "pointers" / "champion" / "00000001.json").unlink()
    assert unmoved(store, PromoteConfig(), evaluate, manifest)
    assert store.move_pointer("champion", OTHER, 0)
    assert unmoved(store, PromoteConfig(), evaluate, manifest)
    promote(store, "worse", -0.3, "second")
    worse = next(m for m in store.manifests("promote") if not m.metrics["moved"])
    assert not unmoved(store, PromoteConfig(), worse.identity.inputs["evaluate"], worse)


CLEAR, CUT = "Fine.", "Hardly"  # worth 0.2 and 0 on the simulated site


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model) -> tuple[Store, dict[str, dict[str, Artifact]]]:
    """A store with what two runs made before evaluate: the one's policy writes clear answers, the other's cuts them off."""
    from flows.presets import resolve
    from tasks.models import load_tokenizer
    from tests.evaluate.folders import simulated_eval, trained, with_manifest, writer

    root = tmp_path_factory.mktemp("runs")
    store, config, tokenizer = Store(root / "store"), resolve("ci"), load_tokenizer(tiny_model / "model")
    site = simulated_eval(root / "site")

    def stored(step: str, folder: Path, **more: Any) -> Artifact:
        key = with_manifest(store.root, folder, step, **getattr(config, step).identity() | more).name
        return store.artifact(next(m for m in store.manifests(step) if m.key == key))

    made = {}
    for seed, text in enumerate((CLEAR, CUT)):
        folders = trained(root / text, writer(root / f"model{seed}", tokenizer, text), std=0.02)
        made[text] = {step: stored(step, folder, seed=seed) for step, folder in folders.items()} | {
            "ingest": stored("ingest", site)
        }
    return store, made


def evaluate_and_promote(store: Store, made: dict[str, Artifact], champion: Any) -> tuple[Any, Any]:
    """The last two steps of a run, as its jobs."""
    from flows import steps
    from flows.presets import resolve
    from tasks.promote.config import PromoteConfig

    config = resolve("ci").evaluate
    evaluated = steps.evaluate(config=config, **made, champion=champion, store=store.uri, return_state=True)
    trained = {step: made[step] for step in ("ppo", "sft", "reward")}
    promoted = steps.promote(
        config=PromoteConfig(), evaluate=evaluated.result(), **trained, champion=champion, store=store.uri, return_state=True
    )
    return evaluated, promoted


def test_a_challenger_takes_the_champions_place_only_where_it_beats_it_and_a_repeated_run_is_stored_in_whole(runs):
    store, made = runs
    for policy in (CLEAR, CUT):  # against its own sft, which writes the same, neither is better
        evaluate_and_promote(store, made[policy], None)
    assert store.pointer("champion") is None
    artifacts = {step: made[CUT][step] for step in ("ppo", "sft", "reward")}
    assert store.move_pointer("champion", entry(**artifacts, evaluate=store.artifact(store.manifests("evaluate")[0])), 0)

    champion = store.pointer("champion")
    evaluated, promoted = evaluate_and_promote(store, made[CLEAR], champion)
    assert evaluated.name == promoted.name == "Completed"
    assert store.pointer("champion").to["key"] == made[CLEAR]["ppo"].key
    decision = json.loads((store.open(promoted.result()) / "decision.json").read_text())
    assert (decision["against"], decision["moved"]) == ("champion", True)
    assert {name: one["word"] for name, one in decision["verdicts"].items()} == {"sft": "no-evidence", "champion": "better"}
    assert rival(store, "champion", made[CLEAR]["ppo"].key) == champion
    assert [state.name for state in evaluate_and_promote(store, made[CLEAR], champion)] == ["Cached", "Cached"]

    _, promoted = evaluate_and_promote(store, made[CUT], store.pointer("champion"))
    assert json.loads((store.open(promoted.result()) / "decision.json").read_text())["word"] == "worse"
    assert store.pointer_number("champion") == 2
