"""The planner: what is in a key and what is not, and what a change makes run again."""

import os
import shutil
from pathlib import Path

import pytest

from flows.plan import check_steps, estimate, identities, make_plan
from flows.presets import STEPS, resolve
from tasks.artifacts import Identity, Store
from tasks.champion import entry
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
    return {step: identity.key for step, identity in identities(resolve("ci", **more), store)[0].items()}


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
    for step, identity in identities(resolve("ci"), store)[0].items():
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
    one = identities(resolve("ci"), store)[0]
    digest = publish(store, one["ingest"])
    publish(store, one["base"], input_digests={"ingest": digest})
    assert make_plan(resolve("ci"), store)["base"].stored
    publish(store, one["ingest"], "other content", replace=True)
    plan = make_plan(resolve("ci"), store)["base"]
    assert not plan.stored
    assert plan.why == "ingest was recomputed with another content"


def crown(store: Store, policy: str, **overrides) -> dict[str, Identity]:
    """Store what a run made that differs in its ppo alone, and let the pointer stand on it as promote would."""
    steps = identities(resolve("ci", {"name": policy, **overrides}), store)[0]
    made = {}
    for step in ("sft", "reward", "ppo", "evaluate"):
        publish(store, steps[step])
        made[step] = store.artifact(store.find(steps[step]))
    assert store.move_pointer("champion", entry(**made), store.pointer_number("champion"))
    return steps


def test_a_run_whose_candidate_became_champion_finds_its_decision_again_and_a_later_one_is_decided_anew(store):
    crown(store, "old", **{"ppo.kl_coef": 0.3})
    before = keys(store)
    crown(store, "mine")
    assert keys(store) == before
    crown(store, "new", **{"ppo.kl_coef": 0.2})
    assert changed(keys(store), before) == ["evaluate", "promote"]


def test_evaluate_knows_the_champion_by_its_policy_and_not_by_the_pointers_number(store):
    alone = keys(store)
    crown(store, "one", **{"ppo.kl_coef": 0.3})
    met = keys(store)
    assert changed(met, alone) == ["evaluate", "promote"]
    crown(store, "two", **{"ppo.kl_coef": 0.2})
    assert keys(store)["evaluate"] != met["evaluate"]
    crown(store, "one", **{"ppo.kl_coef": 0.3})
    assert changed(keys(store), met) == ["promote"]


def test_the_plan_names_the_new_champion_as_the_reason(store):
    digests: dict[str, str] = {}
    for step, identity in identities(resolve("ci"), store)[0].items():
        digests[step] = publish(store, identity, input_digests={name: digests[name] for name in identity.inputs})
    crown(store, "other", **{"ppo.kl_coef": 0.3})
    plans = make_plan(resolve("ci"), store)
    assert [step for step, plan in plans.items() if not plan.stored] == ["evaluate", "promote"]
    assert plans["evaluate"].why == "new champion_ppo, champion_sft, champion_reward"


@pytest.mark.parametrize("step", ["ppo", "sft", "reward"])
def test_a_champion_that_is_gone_is_told_before_anything_runs_and_is_not_missed_where_nothing_asks_it(store, step):
    steps = crown(store, "old", **{"ppo.kl_coef": 0.3, "sft.seed": 7})
    asked = identities(resolve("ci"), store)[0]["evaluate"]
    shutil.rmtree(store.folder(step, steps[step].key))
    with pytest.raises(ValueError, match=rf"{step} {steps[step].key[:12]} is gone .*00000001.json.*--set promote.pointer=NAME"):
        keys(store)
    keys(store, overrides={"promote.pointer": "another"})
    publish(store, asked)  # its answers are stored: nobody has to be asked
    keys(store)


def test_a_champion_that_was_recomputed_with_another_content_is_another(store):
    steps = crown(store, "old", **{"ppo.kl_coef": 0.3})
    publish(store, steps["ppo"], "other content", replace=True)
    with pytest.raises(ValueError, match="has another content now"):
        keys(store)


def test_an_entry_that_names_no_artifacts_is_refused_with_the_remedy(store):
    assert store.move_pointer("champion", {"key": "other"}, 0)
    with pytest.raises(ValueError, match="entry 1 of the champion pointer names no ppo, sft, reward: remove it"):
        keys(store)


def test_planning_leaves_the_disk_as_it_is(store, dump):
    make_plan(resolve("ci", dump=[os.fspath(dump)]), store)
    assert not store.root.exists()
