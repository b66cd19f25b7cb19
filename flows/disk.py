"""How many bytes each step will put on the disk, from the shape of the base and the settings: nothing is loaded, not even torch.

What a step stores is arithmetic (weights, adapters, a tokenizer); what it needs besides while it runs are its checkpoints, and in
ingest the shards. Of ingest the factors below were measured on five dumps of 1 to 4 MB of XML.
"""

import errno
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.memory import Unknown, architecture_of
from flows.presets import STEPS, RLHFConfig, Step
from tasks.artifacts import Store
from tasks.base.config import BaseModelConfig
from tasks.checkpoint import KEPT
from tasks.compute import Compute
from tasks.ingest.config import IngestConfig
from tasks.sft.config import LoRAConfig
from tasks.step import StepPlan

STORED, SHARDS = 0.6, 1.6
"""Of the bytes of XML that ingest reads: what it stores (0.33 to 0.58), and what its shards take meanwhile (up to 1.6)."""
QUESTION, QUESTION_SHARDS = 380, 4_100
"""The same of a question of the simulated site (294 to 380 and 3,900), beside PAPERS."""
TOKEN = 60
"""Bytes of a token in tokenizer.json."""
PAPERS = 100_000
"""Bytes of curves, checks and REPORT.md."""
REPORT = 600_000
"""Bytes of evaluate's report, plots and tables."""
WIDTH = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Disk:
    """What a step puts on the disk, and how that is known."""

    bytes: int | None
    """Of its artifact."""
    working_bytes: int
    """Besides, at most, while it runs: checkpoints, shards."""
    source: Literal["stored", "estimated", "measured", "unknown"]
    """estimated: from shapes and settings; measured: what the same step, or its like, took."""


@dataclass(frozen=True)
class Shape:
    """Weights of a causal language model, counted from its config.json."""

    parameters: int
    hidden: int
    vocab: int
    lora: int
    """Weights of an adapter of rank 1 on every linear layer of the trunk."""

    @property
    def tokenizer(self) -> int:
        return self.vocab * TOKEN

    def adapter(self, lora: LoRAConfig) -> int:
        return self.lora * lora.r * 4


def shape_of(architecture: Mapping[str, Any]) -> Shape:
    """Of Llama and its kin, with a gated feed-forward layer; of GPT-2's kin by its shorter names."""
    hidden = int(architecture.get("hidden_size") or architecture["n_embd"])
    layers = int(architecture.get("num_hidden_layers") or architecture["n_layer"])
    heads = int(architecture.get("num_attention_heads") or architecture["n_head"])
    vocab = int(architecture["vocab_size"])
    old = "n_embd" in architecture
    wide = int(architecture.get("intermediate_size") or architecture.get("n_inner") or 4 * hidden)
    head = int(architecture.get("head_dim") or hidden // heads)
    query, key = heads * head, int(architecture.get("num_key_value_heads") or heads) * head
    linear = [(hidden, 3 * hidden), (hidden, hidden), (hidden, wide), (wide, hidden)]
    if not old:
        linear = [(hidden, query), (hidden, key), (hidden, key), (query, hidden), (hidden, wide), (hidden, wide), (wide, hidden)]
    embeddings = vocab * hidden * (1 if architecture.get("tie_word_embeddings", old) else 2)
    if old:
        embeddings += int(architecture.get("n_positions", 1024)) * hidden
    a_layer = sum(into * out for into, out in linear) + 2 * hidden
    return Shape(embeddings + layers * a_layer + hidden, hidden, vocab, layers * sum(into + out for into, out in linear))


def disk(config: RLHFConfig, store: Store, plans: Mapping[Step, StepPlan]) -> dict[Step, Disk]:
    """Of every step of the plan: of a stored one what it takes, of the others what they will."""
    shape: Shape | None = None
    with suppress(Unknown, KeyError):
        shape = shape_of(_architecture(config.base, store, plans.get("base")))
    found: dict[Step, Disk] = {}
    for step, plan in plans.items():
        stored, working = _needs(step, config, shape)
        if plan.stored and plan.last is not None:
            found[step] = Disk(plan.last.bytes, 0, "stored")
        elif plan.last is not None and plan.last.key == plan.identity.key:
            found[step] = Disk(plan.last.bytes, working, "measured")
        elif stored is not None:
            found[step] = Disk(stored, working, "estimated")
        elif plan.last is not None:
            found[step] = Disk(plan.last.bytes, working, "measured")
        else:
            found[step] = Disk(None, 0, "unknown")
    return found


def first_run(config: RLHFConfig) -> int | None:
    """Bytes that a run takes in an empty store, its dump apart; None where the shape of its base is not known."""
    try:
        shape = shape_of(base_architecture(config.base))
    except (Unknown, KeyError, ValueError):
        return None
    found = [_needs(step, config, shape) for step in STEPS if step != "ingest" or not config.ingest.dump]
    return sum(stored or 0 for stored, _ in found) + max(working for _, working in found)


def base_architecture(config: BaseModelConfig) -> dict[str, Any]:
    """architecture_of, which would load torch for a base from scratch."""
    if config.source == "scratch" and config.scratch is not None:
        s = config.scratch
        return {
            "hidden_size": s.hidden_size, "num_hidden_layers": s.layers, "num_attention_heads": s.heads,
            "intermediate_size": s.intermediate_size, "vocab_size": s.vocab_size, "tie_word_embeddings": True,
        }  # fmt: skip
    return architecture_of(config, None)


def _architecture(config: BaseModelConfig, store: Store, plan: StepPlan | None) -> dict[str, Any]:
    try:
        return base_architecture(config)
    except Unknown:
        if plan is None or not plan.stored or plan.last is None:
            raise
    return architecture_of(config, store.open(store.artifact(plan.last)))


def _needs(step: Step, config: RLHFConfig, shape: Shape | None) -> tuple[int | None, int]:
    """(bytes of its artifact, bytes besides while it runs); None where the model's shape is not known."""
    if step == "ingest":
        return _ingest(config.ingest)
    if step == "evaluate":
        return REPORT, 0
    if step == "promote":
        return 10_000, 0
    if shape is None:
        return None, 0
    papers = shape.tokenizer + PAPERS
    if step == "base":
        scratch = config.base.source == "scratch"
        return shape.parameters * WIDTH[config.base.dtype] + papers, _checkpoints(4 * shape.parameters) if scratch else 0
    if step == "sft":
        adapter = shape.adapter(config.sft.lora) if config.sft.tuning == "lora" else 0
        trained = {"lora": adapter, "full": 4 * shape.parameters, "prompt": 4 * config.sft.prompt_tokens * shape.hidden}
        return shape.parameters * WIDTH[config.sft.dtype] + adapter + papers, _checkpoints(trained[config.sft.tuning])
    adapter, policy = shape.adapter(config.reward.lora), shape.adapter(config.ppo.lora)
    if step == "reward":
        return 2 * adapter + PAPERS, 2 * _checkpoints(adapter)
    value = adapter if config.ppo.value == "adapter" else 0
    return policy + value + PAPERS, _checkpoints(policy + value) + policy


def _checkpoints(trained: int) -> int:
    """Weights and Adam's two moments, of each checkpoint that is kept and of the one that is being written."""
    return (KEPT + 1) * 3 * trained


def _ingest(config: IngestConfig) -> tuple[int | None, int]:
    if not config.dump:
        questions = config.simulate.questions if config.simulate else 0
        return PAPERS + QUESTION * questions, QUESTION_SHARDS * questions
    from tasks.ingest import sources
    from tasks.progress import Progress

    sites = sources.find(
        config.dump, config.site, site_names=config.site_names, archive=config.archive, progress=Progress("ingest")
    )
    unpacked = sum(file.unpacked for site in sites for file in site.files)
    return PAPERS + round(STORED * unpacked), round(SHARDS * unpacked)


# ---- does it fit?


def free_at(place: Path) -> int:
    """Bytes that are free for this user on the disk that holds `place`, whether that is there yet or not."""
    for folder in (place, *place.parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENOTDIR}:
                raise ValueError(f"{folder}: {os.strerror(error.errno or 0)}: name another place (--store)") from error
    raise ValueError(f"{place}: there is no such disk")


def too_large(
    store: Store, plans: Mapping[Step, StepPlan], disks: Mapping[Step, Disk], compute: Compute
) -> dict[Step, tuple[int, int]]:
    """Steps that would run and do not fit: (bytes that are there when it works, with what comes before it; bytes free now). Of
    the caches of workers' machines this one can say nothing."""
    if compute.executor == "pool" and store.uri != str(store.root):
        return {}
    free = free_at(store.root)
    found: dict[Step, tuple[int, int]] = {}
    before = 0
    for step, plan in plans.items():
        if plan.stored or disks[step].bytes is None:
            continue
        needs = before + (disks[step].bytes or 0) + disks[step].working_bytes
        if needs > free:
            found[step] = (needs, free)
        before += disks[step].bytes or 0
    return found


def check_disk(store: Store, plans: Mapping[Step, StepPlan], disks: Mapping[Step, Disk], compute: Compute) -> None:
    """ValueError before anything runs where the disk has no room for a step."""
    for step, (needs, free) in too_large(store, plans, disks, compute).items():
        raise ValueError(f"{step} does not fit: {disk_text(store, needs, free)}")


def disk_text(store: Store, needs: int, free: int) -> str:
    from flows.show import bytes_text

    return (
        f"needs {bytes_text(needs)} of disk at {store.root} (with the steps before it), has {bytes_text(free)} free: "
        "make room (stackrlhf store gc --keep 3), or name another place (--store; STACKRLHF_CACHE)"
    )
