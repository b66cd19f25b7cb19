"""A training that is killed goes on, and ends in the same bits as one that nobody disturbed: sft, and base from scratch."""

import shutil

import pytest

from tests.killing import PHASES, Kill, content

STEPS = 5


def train_sft(base, data, out, folder, **more):
    """The step's own function; what it returns is all that it said."""
    from tasks.checkpoint import Checkpoints
    from tasks.compute import Compute
    from tasks.progress import Progress, listening
    from tasks.sft.config import LoRAConfig, SFTConfig
    from tasks.sft.train import train

    config = SFTConfig(
        steps=STEPS, batch_size=2, seq_length=96, max_query_tokens=48, learning_rate=5e-3, warmup_steps=2,
        lora=LoRAConfig(r=4, alpha=8, dropout=0.1), **more,
    )  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)  # an attempt begins empty
    out.mkdir(parents=True)
    heard = []
    with listening(heard.append):
        metrics = train(
            config,
            base=base,
            data=data,
            out=out,
            compute=Compute(device="cpu", threads=1),
            progress=Progress("sft"),
            checkpoints=Checkpoints(folder, every_seconds=0),
        )
    metrics.pop("tokens_per_second")
    return metrics, [update.note for update in heard if update.note]


@pytest.fixture(scope="module")
def undisturbed(kills, tiny_model, toy_site, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    metrics, notes = kills.run(train_sft, tiny_model, toy_site, folder / "out", folder / "kept")
    assert not [note for note in notes if "resumed" in note]
    return metrics, content(folder / "out")


@pytest.mark.parametrize("phase", PHASES[1:-2] + PHASES[-1:])
def test_sft_killed_in_any_phase_of_a_save_ends_in_the_same_bits(phase, undisturbed, kills, tiny_model, toy_site, tmp_path):
    given = (tiny_model, toy_site, tmp_path / "out", tmp_path / "kept")
    kills.run(train_sft, *given, kill=Kill(phase, save=3))
    metrics, notes = kills.run(train_sft, *given)
    saved = 3 if PHASES.index(phase) >= PHASES.index("after the rename") else 2
    assert [note for note in notes if "resumed" in note] == [f"resumed from step {saved} of {STEPS}"]
    assert (metrics, content(tmp_path / "out")) == undisturbed


def test_killed_before_anything_was_saved_it_starts_from_nothing(undisturbed, kills, tiny_model, toy_site, tmp_path):
    given = (tiny_model, toy_site, tmp_path / "out", tmp_path / "kept")
    kills.run(train_sft, *given, kill=Kill("before the rename", save=1))
    metrics, notes = kills.run(train_sft, *given)
    assert not [note for note in notes if "resumed" in note]
    assert (metrics, content(tmp_path / "out")) == undisturbed


def test_killed_after_its_last_step_it_only_writes_what_came_of_it(undisturbed, kills, tiny_model, toy_site, tmp_path):
    given = (tiny_model, toy_site, tmp_path / "out", tmp_path / "kept")
    kills.run(train_sft, *given, kill=Kill("after the save", save=STEPS))
    metrics, notes = kills.run(train_sft, *given)
    assert f"resumed from step {STEPS} of {STEPS}" in notes
    assert (metrics, content(tmp_path / "out")) == undisturbed


def train_base(data, out, folder):
    from tasks.base.build import build
    from tasks.base.config import BaseModelConfig, ScratchConfig
    from tasks.checkpoint import Checkpoints
    from tasks.compute import Compute
    from tasks.progress import Progress

    scratch = ScratchConfig(
        vocab_size=320, hidden_size=32, layers=2, heads=2, intermediate_size=64,
        context=96, steps=4, batch_tokens=384, learning_rate=1e-2,
    )  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    metrics = build(
        BaseModelConfig(source="scratch", scratch=scratch),
        data=data,
        out=out,
        compute=Compute(device="cpu", threads=1),
        progress=Progress("base"),
        checkpoints=Checkpoints(folder, every_seconds=0),
    )
    metrics.pop("tokens_per_second")
    return metrics


def test_a_base_from_scratch_goes_on_too(kills, toy_site, tmp_path):
    expected = kills.run(train_base, toy_site, tmp_path / "whole", tmp_path / "kept-whole")
    kills.run(train_base, toy_site, tmp_path / "out", tmp_path / "kept", kill=Kill("in the step after it", save=2))
    assert kills.run(train_base, toy_site, tmp_path / "out", tmp_path / "kept") == expected
    assert content(tmp_path / "out") == content(tmp_path / "whole")
