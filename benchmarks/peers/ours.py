"""Our own trainers, called as the steps call them."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from peers.meter import Meter
from peers.workload import LORA, SEED, probe

PASSES = 2
"""Over what the peers go through once: the shorter a time, the worse it is known."""


def sft(folder: Path, work: dict[str, Any], dtype: str, threads: int) -> dict[str, Any]:
    """tasks.base.fit.fit on packed rows, all documents in each pass; tokens."""
    import numpy as np

    from tasks import models, packing
    from tasks.base.fit import Fit, fit, mean_loss
    from tasks.compute import Compute, pass_tokens, prepare
    from tasks.progress import Progress
    from tasks.sft.config import LoRAConfig

    size, compute = work["size"], Compute(device="cpu", threads=threads)
    device = prepare(compute)
    meter = Meter()
    documents = [packing.Document(np.array(ids, np.int32), first) for ids, first in work["sft"]["documents"]]
    shortest = [min(documents, key=lambda document: len(document.ids))]  # fit validates now and then: as good as nothing
    model: Any = models.add_lora(models.load_model(folder / "model", dtype, device), LoRAConfig(**LORA), "sft", SEED)
    tokens = pass_tokens(compute, device)
    loss = mean_loss(model, probe(documents, size["row_tokens"]), tokens, device)
    how = Fit(
        steps=1, rows=size["rows_per_step"], row_tokens=size["row_tokens"], learning_rate=2e-5, schedule=lambda step: 1.0,
        weight_decay=0.0, betas=(0.9, 0.999), seed=SEED,
    )  # fmt: skip
    run = {"device": device, "micro_batch_tokens": tokens, "progress": Progress("sft")}
    fit(model, documents, shortest, how, **run)
    meter.start()
    fitted = fit(model, documents, shortest, replace(how, steps=PASSES * (size["rows"] // size["rows_per_step"])), **run)
    meter.stop()
    return meter.result(fitted.tokens, loss=loss)


def reward(folder: Path, work: dict[str, Any], dtype: str, threads: int) -> dict[str, Any]:
    """tasks.reward.train.accumulate, whole questions a step; pairs."""
    import torch

    from tasks import models
    from tasks.compute import Compute, pass_tokens, prepare
    from tasks.optim import adamw, clip_gradients, fast_matmul
    from tasks.reward.config import RewardConfig
    from tasks.reward.data import Encoded
    from tasks.reward.model import RewardModel, ScoreHead
    from tasks.reward.train import accumulate
    from tasks.sft.config import LoRAConfig

    size, compute = work["size"], Compute(device="cpu", threads=threads)
    device = prepare(compute)
    tokens = pass_tokens(compute, device)
    meter = Meter()
    questions = [Encoded(q["query"], q["responses"], q["pairs"], q["gaps"], 0) for q in work["reward"]["questions"]]
    model: Any = models.add_lora(models.load_model(folder / "model", dtype, device), LoRAConfig(**LORA), "reward", SEED)
    head = ScoreHead(size["hidden"])
    with torch.no_grad():
        head.weight[0] = torch.tensor(work["reward"]["head"])
    scorer = RewardModel(model, "reward", head, micro_batch_tokens=tokens)
    config = RewardConfig(questions_per_step=size["questions_per_step"], max_length=size["pair_tokens"],
                          max_query_tokens=size["query_tokens"], max_new_tokens=size["new_tokens"], centering=0.0,
                          lora=LoRAConfig(**LORA))  # fmt: skip
    optimizer = adamw([*models.adapter_parameters(model, "reward"), *head.parameters()], 2e-5, 0.0)

    def step(batch: list[Encoded]) -> float:
        found = accumulate(scorer, batch, config, tokens)
        clip_gradients(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(found["loss"])

    model.train()
    with fast_matmul(model):
        # one pair a question, so that our mean over questions is everybody's mean over pairs
        first = [replace(q, pairs=q.pairs[:1], gaps=q.gaps[:1]) for q in questions[: size["questions_per_step"]]]
        loss = accumulate(scorer, first, config, tokens)["loss"]
        optimizer.zero_grad(set_to_none=True)
        step(questions[: size["questions_per_step"]])
        meter.start()
        for _ in range(PASSES):
            for start in range(0, len(questions), size["questions_per_step"]):
                step(questions[start : start + size["questions_per_step"]])
        meter.stop()
    return meter.result(PASSES * sum(len(q.pairs) for q in questions), loss=loss)


class _EnoughError(BaseException):
    """Ends a training run that has been measured; no Exception, which progress would swallow."""


def ppo(folder: Path, work: dict[str, Any], dtype: str, threads: int, value: str) -> dict[str, Any]:
    """tasks.ppo.train.train from the end of its first step to the end of its third; samples."""
    import tempfile

    import tasks.ppo.train as trainer
    from tasks.compute import Compute
    from tasks.ppo.config import GuardConfig, PPOConfig
    from tasks.progress import Progress, Update, listening
    from tasks.sft.config import LoRAConfig

    size, compute = work["size"], Compute(device="cpu", threads=threads)
    meter = Meter()
    for name, phase in (
        ("sample_responses", "generate"), ("forward_rollout", "reference"), ("score", "reward"), ("update", "update"),
    ):  # fmt: skip
        meter.wrap(trainer, name, phase)
    config = PPOConfig(
        steps=PASSES + 2, batch_size=size["queries"], minibatch_size=size["queries"], max_query_tokens=size["query_tokens"],
        max_new_tokens=size["new_tokens"], value_warmup_steps=0, eval_every=PASSES + 2, eval_queries=1, epochs=size["epochs"],
        value=value, dtype=dtype, learning_rate=3e-6, lora=LoRAConfig(**LORA),
        guard=GuardConfig(max_kl=1e6, min_kl=-1e6, max_length_ratio=1e6, max_repetition=1.0, max_fence_increase=1.0),
    )  # fmt: skip

    def listen(update: Update) -> None:
        if update.phase == "ppo" and update.done == 1:
            meter.start()
        elif update.phase == "ppo" and update.done == 1 + PASSES:
            meter.stop()
            raise _EnoughError

    with tempfile.TemporaryDirectory() as out, listening(listen), contextlib.suppress(_EnoughError):
        trainer.train(config, sft=folder, reward=folder / "reward", data=folder / "queries", out=Path(out), compute=compute,
                      progress=Progress("ppo"))  # fmt: skip
    return meter.result(PASSES * size["queries"])
