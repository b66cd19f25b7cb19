"""The planner: what is in a key and what is not, and what a change makes run again."""

import os
import shutil
from pathlib import Path

import pytest

from flows.plan import check_steps, estimate, identities, make_plan
from flows.presets import STEPS, resolve
from tasks.artifacts import Identity, Store
from tasks.ingest.config import SimulatedSiteConfig
from tasks.ingest.simulated.generate import write_site


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="module")
def dump(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dumps") / "toy.site"
    write_site(SimulatedSiteConfig(questions=3), folder)
    return folder


def keys(store: Store, **more) -> dict[str, str]:
    return {step: identity.key for step, identity in identities(resolve("ci", **more), store).items()}


def publish(store: Store, identity: Identity, text: str = "x", seconds: float = 3.0, **more) -> str:
    with store.attempt(identity.key) as out:
        (out / "text.txt").write_text(text)
        return store.publish(out, identity, metrics={}, seconds=seconds, peak_memory_bytes=10**6, **more).digest


def changed(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [step for step in STEPS if one[step] != other[step]]


@pytest.mark.parametrize(
    ("key", "value", "first"),
    [
        ("ingest.max_pairs", 5, 0),
        ("base.scratch.steps", 7, 1),
        ("sft.lora.r", 2, 2),
        ("reward.learning_rate", 1e-4, 3),
        ("ppo.kl_coef", 0.2, 4),
        ("evaluate.best_of", 3, 5),
    ],
)
def test_a_setting_changes_its_step_and_all_that_follow(store, key, value, first):
    assert changed(keys(store), keys(store, overrides={key: value})) == list(STEPS[first:])


def test_the_presets_name_is_in_no_key(store):
    assert keys(store) == keys(store, overrides={"name": "other"})


def test_moving_a_dump_keeps_the_keys_and_changing_or_renaming_it_does_not(store, dump, tmp_path):
    before = keys(store, dump=[str(dump)])
    moved = tmp_path / "elsewhere" / "toy.site"
    shutil.copytree(dump, moved)
    assert keys(store, dump=[str(moved)]) == before
    renamed = tmp_path / "other.site"
    shutil.copytree(dump, renamed)
    assert changed(keys(store, dump=[str(renamed)]), before) == list(STEPS)
    users = moved / "Users.xml"
    users.write_bytes(users.read_bytes().replace(b"</users>", b" </users>"))
    assert changed(keys(store, dump=[str(moved)]), before) == list(STEPS)


def test_a_dump_given_from_its_own_folder_has_the_same_key(store, dump, monkeypatch):
    before = keys(store, dump=[str(dump)])
    monkeypatch.chdir(dump.parent)
    assert keys(store, dump=["toy.site"]) == before


def test_a_model_from_a_folder_is_known_by_its_content_and_needs_no_ingest(store, tmp_path):
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
    one, two = (keys(store, model=str(tmp_path / name)) for name in ("one", "two"))
    assert one == two
    other = keys(store, model=str(tmp_path / "one"), overrides={"ingest.max_pairs": 5})
    assert other["base"] == one["base"]
    assert changed(one, other) == [step for step in STEPS if step != "base"]
    (tmp_path / "one" / "model.safetensors").write_bytes(b"other weights")
    assert keys(store, model=str(tmp_path / "one"))["base"] != two["base"]


def test_what_is_not_there_is_told_before_anything_runs(store):
    with pytest.raises(ValueError, match=r"missing\.7z: no such file"):
        keys(store, dump=["missing.7z"])
    with pytest.raises(ValueError, match="no step; there are: ingest"):
        check_steps(["train"])


def test_after_a_change_the_plan_says_which_steps_run_and_why(store):
    digests: dict[str, str] = {}
    for step, identity in identities(resolve("ci"), store).items():
        digests[step] = publish(store, identity, input_digests={name: digests[name] for name in identity.inputs})
    assert all(plan.stored for plan in make_plan(resolve("ci"), store).values())
    plans = make_plan(resolve("ci", {"ppo.kl_coef": 0.2}), store)
    assert {step: plan.why for step, plan in plans.items() if not plan.stored} == {
        "ppo": "ppo.kl_coef: 0.05 -> 0.2",
        "evaluate": "new ppo",
        "promote": "new evaluate",
    }
    known = estimate(plans)
    assert (known.seconds, known.peak_memory_bytes, known.disk_bytes, known.unknown) == (9.0, 10**6, 3, ())


def test_the_plan_ends_where_the_run_does(store):
    assert list(make_plan(resolve("ci"), store, until="sft")) == ["ingest", "base", "sft"]


def test_an_input_recomputed_with_another_content_makes_the_next_step_run(store):
    one = identities(resolve("ci"), store)
    digest = publish(store, one["ingest"])
    publish(store, one["base"], input_digests={"ingest": digest})
    assert make_plan(resolve("ci"), store)["base"].stored
    publish(store, one["ingest"], "other content", replace=True)
    plan = make_plan(resolve("ci"), store)["base"]
    assert not plan.stored
    assert plan.why == "ingest was recomputed with another content"


def test_a_run_whose_candidate_became_champion_finds_its_decision_again_and_a_later_one_is_decided_anew(store):
    mine = identities(resolve("ci"), store)
    assert store.move_pointer("champion", {"key": mine["ppo"].key, "evaluate": mine["evaluate"].key}, 0)
    assert identities(resolve("ci"), store)["promote"].key == mine["promote"].key
    assert store.move_pointer("champion", {"key": "other", "evaluate": "other"}, 1)
    assert identities(resolve("ci"), store)["promote"].key != mine["promote"].key


def test_planning_leaves_the_disk_as_it_is(store, dump):
    make_plan(resolve("ci", dump=[os.fspath(dump)]), store)
    assert not store.root.exists()
