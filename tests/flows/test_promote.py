"""The champion pointer: moved by a better verdict, once, and never by another one."""

import json

import pytest

from tasks.artifacts import Artifact, Identity, Store

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def artifact(store: Store, step: str, **content) -> Artifact:
    identity = Identity(step=step, version=1, config=content)
    with store.attempt(identity.key) as out:
        (out / "verdict.json").write_text(json.dumps(content))
        return store.artifact(store.publish(out, identity, metrics={}, seconds=0, peak_memory_bytes=0))


def promote(store: Store, word: str, gain: float, policy: str):
    from flows.steps import promote
    from tasks.promote.config import PromoteConfig

    interval = {"better": [gain / 2, gain * 2], "no-evidence": [-gain, gain * 2], "worse": [gain * 2, gain / 2]}[word]
    evaluate = artifact(store, "evaluate", word=word, gain=gain, interval=interval, by="truth")
    made = {step: artifact(store, step, name=policy) for step in ("ppo", "sft", "reward")}
    return made["ppo"], promote(config=PromoteConfig(), evaluate=evaluate, **made, store=store.uri, return_state=True)


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


def test_the_next_better_candidate_takes_the_place_and_the_first_is_decided_anew(store):
    promote(store, "better", 0.2, "first")
    second, _ = promote(store, "better", 0.3, "second")
    assert store.pointer("champion").to["key"] == second.key
    first, state = promote(store, "better", 0.2, "first")
    assert state.name == "Completed"
    assert [p.to["key"] for p in store.pointer_history("champion")] == [first.key, second.key, first.key]


def test_a_lost_pointer_is_set_again(store):
    ppo, _ = promote(store, "better", 0.2, "first")
    (store.root / "pointers" / "champion" / "00000001.json").unlink()
    promote(store, "better", 0.2, "first")
    assert store.pointer("champion").to["key"] == ppo.key


def test_a_pointer_that_moved_while_it_was_decided_is_not_overwritten(store, monkeypatch):
    real = Store.move_pointer

    def another_was_faster(self, name, to, expected):
        monkeypatch.setattr(Store, "move_pointer", real)
        assert self.move_pointer(name, {"key": "other", "evaluate": "other"}, expected)
        return self.move_pointer(name, to, expected)

    monkeypatch.setattr(Store, "move_pointer", another_was_faster)
    _, state = promote(store, "better", 0.2, "first")
    assert state.is_failed()
    assert "moved by another run" in state.message
    assert store.pointer("champion").to["key"] == "other"
