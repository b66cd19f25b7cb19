"""PPO that is killed goes on and ends in the same bits; and its checkpoints hold nothing that it could do without."""

import json
import shutil
from dataclasses import replace

import pytest

from tests.killing import PHASES, Kill, content

STEPS = 4
CRITICAL = 3
"""The save that is disturbed."""


def train_ppo(sft, reward, data, out, folder, **more):
    """The step's own function; what it returns is all that it said."""
    from tasks.checkpoint import Checkpoints
    from tasks.compute import Compute
    from tasks.ppo.config import GuardConfig, PPOConfig
    from tasks.ppo.train import train
    from tasks.progress import Progress, listening

    settings = {
        "steps": STEPS, "batch_size": 8, "minibatch_size": 4, "max_query_tokens": 32, "max_new_tokens": 10, "value_warmup_steps": 1,
        "eval_every": 1, "eval_queries": 4, "learning_rate": 1e-3, "epochs": 2, "kl_horizon": 50, "value": "policy_trunk",
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "guard": GuardConfig(max_kl=1000, max_length_ratio=100, max_repetition=1.0),
    } | more  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)  # an attempt begins empty
    out.mkdir(parents=True)
    heard = []
    with listening(heard.append):
        metrics = train(
            PPOConfig(**settings),
            sft=sft,
            reward=reward,
            data=data,
            out=out,
            compute=Compute(device="cpu", threads=1),
            progress=Progress("ppo"),
            checkpoints=Checkpoints(folder, every_seconds=0),
        )
    return metrics, [update.note for update in heard if update.note]


@pytest.fixture(scope="module")
def undisturbed(kills, tiny_model, planted_reward, toy_site, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    metrics, notes = kills.run(train_ppo, tiny_model, planted_reward, toy_site, folder / "out", folder / "kept")
    assert not [note for note in notes if "resumed" in note]
    return metrics, content(folder / "out")


@pytest.mark.parametrize("phase", PHASES[:9])
def test_ppo_killed_in_any_phase_of_a_save_ends_in_the_same_bits(
    phase, undisturbed, kills, tiny_model, planted_reward, toy_site, tmp_path
):
    given = (tiny_model, planted_reward, toy_site, tmp_path / "out", tmp_path / "kept")
    kills.run(train_ppo, *given, kill=Kill(phase, save=CRITICAL))
    metrics, notes = kills.run(train_ppo, *given)
    saved = CRITICAL if PHASES.index(phase) >= PHASES.index("after the rename") else CRITICAL - 1
    assert [note for note in notes if "resumed" in note] == [f"resumed from step {saved} of {STEPS}"]
    assert (metrics, content(tmp_path / "out")) == undisturbed
    assert "samples.json" in undisturbed[1]


# ---- nothing of the state can be left out


class Kept:
    """Checkpoints in memory: what was saved, as it would be read back."""

    def __init__(self, given=None):
        self.given, self.states = given, {}

    def load(self):
        return self.given

    def after_step(self, step, state):
        from tasks.checkpoint import State

        tensors, values = state()
        self.states[step] = State(step, {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(values)))


LATE = 5
"""Going on from here the worse evaluations of before count at 6, step 7 rolls back, and step 8 learns again."""


@pytest.fixture(scope="module")
def eventful(tiny_model, planted_reward, toy_site, tmp_path_factory):
    """A run in which everything that is watched happens: (go on from a state, what came of it, its states, the first state).

    The judge dislikes what the reward model likes. At step 1 the KL is below a floor that it cannot reach yet, which raises the
    coefficient; later the reward rises and the judge's score falls three times in a row, which rolls back.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from tasks.checkpoint import State
    from tasks.compute import Compute
    from tasks.ppo.config import GuardConfig, PPOConfig
    from tasks.ppo.learner import new_learner
    from tasks.ppo.models import load
    from tasks.ppo.train import train
    from tasks.progress import Progress

    folder, compute = tmp_path_factory.mktemp("eventful"), Compute(device="cpu", threads=1)
    reward = folder / "reward"
    shutil.copytree(planted_reward, reward)
    shutil.copytree(reward / "adapter", reward / "judge" / "adapter", dirs_exist_ok=True)
    head = {name: -tensor for name, tensor in load_file(reward / "head.safetensors").items()}
    save_file(head, reward / "judge" / "head.safetensors")
    guard = GuardConfig(min_kl=0.01, max_kl=1000, max_length_ratio=100, max_repetition=1.0, patience=3)
    config = PPOConfig(
        steps=8, batch_size=24, minibatch_size=24, max_query_tokens=32, max_new_tokens=8, value_warmup_steps=0, eval_every=1,
        eval_queries=8, learning_rate=6e-3, epochs=2, kl_coef=0.01, kl_horizon=500, guard=guard, missing_eos_penalty=0.0,
    )  # fmt: skip

    def go_on(name, state=None):
        (folder / name).mkdir()
        kept = Kept(state)
        given = {"sft": tiny_model, "reward": reward, "data": toy_site, "compute": compute}
        train(config, **given, out=folder / name, progress=Progress("ppo"), checkpoints=kept)
        return content(folder / name), kept.states

    finished, states = go_on("whole")
    learner = new_learner(load(config, tiny_model, reward, torch.device("cpu"), compute))
    kinds = ["policy adapter"] * len(learner.ppo.policy_parameters()) + ["value adapter"] * len(learner.ppo.value_parameters())
    kinds[-2:] = ["value head"] * 2
    alarms = json.loads((folder / "whole" / "guards.json").read_text())["alarms"]
    assert [(alarm["step"], alarm["action"]) for alarm in alarms] == [(1, "raise_kl"), (7, "roll_back")]
    return go_on, finished, states, State(0, *learner.state()), kinds


def test_ppo_goes_on_from_its_state(eventful):
    go_on, finished, states, _, _ = eventful
    assert go_on("again", states[LATE])[0] == finished


@pytest.mark.parametrize("entry", ["policy adapter", "value adapter", "value head", "optimizer", "best_weights"])
def test_tensors_left_out_of_the_state_are_missed(eventful, entry):
    _, _, states, untouched, kinds = eventful

    def kind(name):
        group, number = name.split("/")[:2]
        return kinds[int(number)] if group == "weights" else group

    tensors = {name: tensor for name, tensor in states[LATE].tensors.items() if kind(name) != entry}
    tensors |= {name: tensor for name, tensor in untouched.tensors.items() if kind(name) == entry}
    assert missed(eventful, entry, states[LATE], tensors=tensors)


@pytest.mark.parametrize("entry", ["kl_coef", "first", "best", "checks", "old_logprobs", "found_by_judge", "curves"])
def test_values_left_out_of_the_state_are_missed(eventful, entry):
    _, _, states, untouched, _ = eventful
    state = states[LATE + 1 if entry == "found_by_judge" else LATE]
    # without a decision there would be a new preflight, which fails at once: the policy is no longer its reference
    nothing = "forward" if entry == "old_logprobs" else untouched.values[entry]
    assert missed(eventful, entry, state, values=state.values | {entry: nothing})


@pytest.mark.parametrize("entry", ["first", "alarms", "level", "worse_judge", "evaluations"])
def test_what_the_guard_knows_left_out_of_the_state_is_missed(eventful, entry):
    _, _, states, untouched, _ = eventful
    guard = states[LATE].values["guard"] | {entry: untouched.values["guard"][entry]}
    assert missed(eventful, f"guard {entry}", states[LATE], values=states[LATE].values | {"guard": guard})


def test_the_step_left_out_of_the_state_is_missed(eventful):
    assert missed(eventful, "step", eventful[2][LATE], step=LATE + 1)


def test_no_other_entries_are_in_the_state(eventful):
    _, _, states, _, _ = eventful
    assert {name.split("/")[0] for name in states[LATE].tensors} == {"weights", "best_weights", "optimizer"}
    assert set(states[LATE].values) == {
        "kl_coef", "guard", "first", "best", "checks", "old_logprobs", "found_by_judge", "curves"
    }  # fmt: skip
    assert set(states[LATE].values["guard"]) == {"first", "alarms", "level", "worse_judge", "evaluations"}


def missed(eventful, name, state, **changes):
    """Whether the run ends otherwise without it."""
    go_on, finished, *_ = eventful
    return go_on(f"without {name}", replace(state, **changes))[0] != finished
