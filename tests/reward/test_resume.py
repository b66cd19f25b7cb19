"""Reward model and judge that are killed go on, and end in the same bits as two that nobody disturbed."""

import shutil

import pytest

from tests.killing import PHASES, Kill, content

STEPS = 3  # of each of the two, one after the other: saves 1 to 3 are the reward model's, 4 to 6 the judge's


def train_reward(sft, data, out, folder):
    """The step's own function; what it returns is all that it said."""
    from tasks.checkpoint import Checkpoints
    from tasks.compute import Compute
    from tasks.progress import Progress, listening
    from tasks.reward.config import RewardConfig
    from tasks.reward.train import train
    from tasks.sft.config import LoRAConfig

    config = RewardConfig(
        questions_per_step=2, max_questions=6, max_eval_questions=4, max_length=64, max_query_tokens=32, max_new_tokens=4,
        score_samples=8, learning_rate=5e-3, lora=LoRAConfig(r=4, alpha=8, dropout=0.1),
    )  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)  # an attempt begins empty
    out.mkdir(parents=True)
    heard = []
    with listening(heard.append):
        metrics = train(
            config,
            sft=sft,
            data=data,
            out=out,
            compute=Compute(device="cpu", threads=1),
            progress=Progress("reward"),
            checkpoints=Checkpoints(folder, every_seconds=0),
        )
    return metrics, [update.note for update in heard if update.note and "resumed" in update.note]


@pytest.fixture(scope="module")
def undisturbed(kills, tiny_model, toy_site, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    metrics, notes = kills.run(train_reward, tiny_model, toy_site, folder / "out", folder / "kept")
    assert not notes
    return metrics, content(folder / "out")


@pytest.mark.parametrize(
    ("phase", "save"), [(phase, STEPS if number % 2 else 2 * STEPS) for number, phase in enumerate(PHASES[:-1])] + [(PHASES[-1], 4)]
)
def test_killed_in_any_phase_of_a_save_it_ends_in_the_same_bits(phase, save, undisturbed, kills, tiny_model, toy_site, tmp_path):
    given = (tiny_model, toy_site, tmp_path / "out", tmp_path / "kept")
    kills.run(train_reward, *given, kill=Kill(phase, save))
    metrics, notes = kills.run(train_reward, *given)
    saved = save if PHASES.index(phase) >= PHASES.index("after the rename") else save - 1
    resumed = {"reward": min(saved, STEPS), "judge": saved - STEPS}
    assert notes == [f"{name}: resumed from step {step} of {STEPS}" for name, step in resumed.items() if step > 0]
    assert (metrics, content(tmp_path / "out")) == undisturbed
