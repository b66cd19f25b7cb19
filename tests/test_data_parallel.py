"""sft, reward and ppo in two processes come to what one process comes to: the same losses, samples and weights, but for rounding.

One launch a strategy does all three, because starting the ranks takes longest; the first of them loses a rank on the way.
"""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks import distributed
from tasks.checkpoint import Checkpoints
from tasks.compute import Compute
from tasks.progress import Progress, Update, listening
from tests.ppo.conftest import planted_reward  # noqa: F401

ALONE = Compute(device="cpu", threads=1, micro_batch_tokens=256)
KILLED_AT = 3  # of the steps of sft


@dataclass(frozen=True)
class Murderous(Progress):
    """Kills rank 1, once, when sft has done some steps."""

    mark: Path = Path()

    def __call__(self, done: int, total: int, phase: str = "", **metrics: float) -> None:
        if distributed.world().rank == 1 and done == KILLED_AT and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().__call__(done, total, phase, **metrics)


def cut(model: Path, tuning: str) -> int | str:
    """Numbers of a base's weights that this process holds after `shard`; or what it says."""
    import torch

    from tasks import models
    from tasks.sft.config import LoRAConfig

    base = models.load_model(model / "model", "fp32", "cpu")
    if tuning == "full":
        base.requires_grad_(True)
    elif tuning == "int8":
        for parameter in base.parameters():
            parameter.data = parameter.data.to(torch.int8)
    whole = models.add_lora(base, LoRAConfig(r=4, alpha=8), "sft", 1) if tuning == "lora" else base
    try:
        sharded = distributed.shard(whole, "cpu")
    except ValueError as error:
        return str(error)
    return sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in sharded.parameters())


def trainings(
    model: Path, site: Path, reward: Path, out: Path, compute: Compute, progress: Progress, checkpoints: Checkpoints
) -> dict[str, int | str]:
    """sft, reward and ppo into folders of `out`; -> what `cut` says."""
    from tasks.ppo.config import GuardConfig, PPOConfig
    from tasks.ppo.train import train as ppo
    from tasks.reward.config import RewardConfig
    from tasks.reward.train import train as train_reward
    from tasks.sft.config import LoRAConfig, SFTConfig
    from tasks.sft.train import train as sft

    lora = LoRAConfig(r=4, alpha=8, dropout=0.0)  # dropout draws other numbers in every rank
    configs = {
        "sft": SFTConfig(
            steps=5, batch_size=2, seq_length=96, max_query_tokens=48, learning_rate=5e-3, warmup_steps=1, lora=lora
        ),
        "reward": RewardConfig(
            questions_per_step=5, max_length=96, max_query_tokens=48, max_new_tokens=8, score_samples=9, learning_rate=1e-3,
            max_questions=11, max_eval_questions=7, lora=lora,
        ),
        "ppo": PPOConfig(
            steps=2, batch_size=6, minibatch_size=3, max_query_tokens=32, max_new_tokens=8, value_warmup_steps=0, eval_every=1,
            eval_queries=5, learning_rate=1e-3, epochs=2, lora=lora,
            guard=GuardConfig(max_kl=1000, max_length_ratio=100, max_repetition=1.0),
        ),
    }  # fmt: skip
    for name, work, inputs in (
        ("sft", sft, {"base": model}),
        ("reward", train_reward, {"sft": model}),
        ("ppo", ppo, {"sft": model, "reward": reward}),
    ):
        folder = out / name
        folder.mkdir(exist_ok=True)
        own = {"compute": compute, "progress": progress, "checkpoints": checkpoints.part(name)}
        work(configs[name], data=site, out=folder, **inputs, **own)
    return {tuning: cut(model, tuning) for tuning in ("lora", "full", "int8")}


def course(held: dict[str, int | str], out: Path) -> dict[str, Any]:
    """What the trainings left in their folders, and what `cut` said."""
    curves = {name: out / name / "curves.json" for name in ("sft", "reward", "ppo")}
    files = curves | {"accuracy": out / "reward" / "accuracy.json", "samples": out / "ppo" / "samples.json"}
    return {name: json.loads(path.read_text()) for name, path in files.items()} | {"held": held}


@pytest.fixture(scope="module")
def by_one(tiny_model, toy_site, planted_reward, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("one")
    held = trainings(tiny_model, toy_site, planted_reward, out, ALONE, Progress("test"), Checkpoints())
    return course(held, out)


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def by_two(request, tiny_model, toy_site, planted_reward, tmp_path_factory):  # noqa: F811
    """(what came of it, notes, is it fsdp)"""
    out, mark = tmp_path_factory.mktemp(request.param), tmp_path_factory.mktemp("mark") / "killed"
    if request.param == "fsdp":
        mark.touch()
    compute = ALONE.model_copy(update={"processes": 2, "strategy": request.param})
    notes: list[str] = []

    def hear(update: Update) -> None:
        if update.note:
            notes.append(update.note)

    with listening(hear):
        held = distributed.launch(
            trainings, compute, model=tiny_model, site=toy_site, reward=planted_reward, out=out, compute=compute,
            progress=Murderous("test", mark), checkpoints=Checkpoints(out / "kept", 0.0),
        )  # fmt: skip
    return course(held, out), notes, compute.strategy == "fsdp"


@pytest.mark.parametrize("step", ["sft", "reward", "ppo", "accuracy"])
def test_two_processes_come_to_the_numbers_of_one(by_one, by_two, step):
    one, two = dict(_numbers(by_one[step])), dict(_numbers(by_two[0][step]))
    assert two.keys() == one.keys()
    assert {key for key in one if key.endswith(("loss", "scores", "kl"))} or step == "accuracy"
    for key, value in one.items():
        assert two[key] == pytest.approx(value, abs=1e-5, rel=1e-5), key


def test_two_processes_write_the_samples_of_one(by_one, by_two):
    assert [sample["after"] for sample in by_two[0]["samples"]] == [sample["after"] for sample in by_one["samples"]]


def test_fsdp_holds_a_share_of_the_frozen_layers_and_refuses_what_it_cannot_cut(by_one, by_two):
    one, two = by_one["held"], by_two[0]["held"]
    if not by_two[2]:
        assert two == one
        return
    # hidden 32, feed-forward 64, two layers: 4 * 32 * 32 + 3 * 32 * 64 weights and two norms of 32 each
    assert one["lora"] - two["lora"] == (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) * 2 // 2
    assert "use tuning=lora, or --strategy ddp" in two["full"]
    assert "use quantization=none, or --strategy ddp" in two["int8"]


def test_they_went_on_from_a_checkpoint_when_a_rank_was_lost(by_two):
    _, notes, _ = by_two
    lost = [note for note in notes if "rank 1 was killed" in note]
    resumed = [note for note in notes if f"resumed from step {KILLED_AT - 1} of 5" in note]
    assert len(lost) == len(resumed) <= 1


def _numbers(value: Any, name: str = "") -> list[tuple[str, float]]:
    """Every number of nested lists and dicts with its place, but for seconds."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return [one for key, part in parts if "second" not in str(key) for one in _numbers(part, f"{name}/{key}")]
    return [(name, value)] if isinstance(value, int | float) else []
