"""sft, reward and ppo in two processes come to what one process comes to: the same losses, samples and weights, but for rounding.

One launch does all three in every way, because starting the ranks takes longest.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tasks import distributed
from tasks.checkpoint import Checkpoints
from tasks.compute import Compute
from tasks.progress import Progress
from tests.ppo.conftest import planted_reward  # noqa: F401

ALONE = Compute(device="cpu", threads=1, micro_batch_tokens=256)
WAYS = ("ddp", "fsdp", "fsdp recomputing")


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


def every_way(model: Path, site: Path, reward: Path, out: Path) -> dict[str, dict[str, int | str]]:
    """`trainings` into a folder of `out` for each of WAYS; a rank of a launch with strategy fsdp."""
    held, world = {}, distributed.world()
    for way in WAYS:
        distributed._world = dataclasses.replace(world, sharded=way != "ddp")  # which is all that the strategy says
        compute = ALONE.model_copy(update={"processes": 2, "gradient_checkpointing": way == "fsdp recomputing"})
        folder = out / way
        folder.mkdir()
        held[way] = trainings(model, site, reward, folder, compute, Progress("test"), Checkpoints(folder / "kept", 0.0))
    distributed._world = world
    return held


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


@pytest.fixture(scope="module")
def by_two(tiny_model, toy_site, planted_reward, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("two")
    compute = ALONE.model_copy(update={"processes": 2, "strategy": "fsdp"})
    held = distributed.launch(every_way, compute, model=tiny_model, site=toy_site, reward=planted_reward, out=out)
    return {way: course(held[way], out / way) for way in WAYS}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", ["sft", "reward", "ppo", "accuracy"])
def test_two_processes_come_to_the_numbers_of_one(by_one, by_two, step, way):
    one, two = dict(_numbers(by_one[step])), dict(_numbers(by_two[way][step]))
    assert two.keys() == one.keys()
    assert {key for key in one if key.endswith(("loss", "scores", "kl"))} or step == "accuracy"
    for key, value in one.items():
        assert two[key] == pytest.approx(value, abs=1e-5, rel=1e-5), key


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_write_the_samples_of_one(by_one, by_two, way):
    assert [sample["after"] for sample in by_two[way]["samples"]] == [sample["after"] for sample in by_one["samples"]]


def test_fsdp_holds_a_share_of_the_frozen_layers_and_refuses_what_it_cannot_cut(by_one, by_two):
    one, two = by_one["held"], by_two["fsdp"]["held"]
    assert by_two["ddp"]["held"] == one
    # hidden 32, feed-forward 64, two layers: 4 * 32 * 32 + 3 * 32 * 64 weights and two norms of 32 each
    assert one["lora"] - two["lora"] == (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) * 2 // 2
    assert "use tuning=lora, or --strategy ddp" in two["full"]
    assert "use quantization=none, or --strategy ddp" in two["int8"]


def _numbers(value: Any, name: str = "") -> list[tuple[str, float]]:
    """Every number of nested lists and dicts with its place, but for seconds."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return [one for key, part in parts if "second" not in str(key) for one in _numbers(part, f"{name}/{key}")]
    return [(name, value)] if isinstance(value, int | float) else []
