"""Language modelling on packed documents: the training loop of the scratch model and of supervised fine-tuning.

Several processes share each step's documents (tasks/distributed.py), and a run that was stopped goes on from its checkpoint to
the same bits: all that a step hangs on is the weights, the optimizer, and its number.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from tasks import checkpoint, distributed, optim, packing
from tasks.checkpoint import NO_CHECKPOINTS, Checkpoints
from tasks.cross_entropy import linear_cross_entropy
from tasks.curves import Row
from tasks.last_layer import hidden_rows
from tasks.models import causal_lm
from tasks.packing import Document
from tasks.progress import Progress

LOGGED = 100  # points of a curve, about
VALIDATED = 10
LOSS_CURVES = [("Loss (nats per token) over the steps", {"loss": "training", "validation_loss": "held out"})]
HELD_OUT = 0.05  # of the questions
MAX_HELD_OUT = 256


@dataclass(frozen=True)
class Fit:
    """How a fit is to go: all that changes its result but not the model and the documents."""

    steps: int
    rows: int
    """Packed rows per optimizer step."""
    row_tokens: int
    learning_rate: float
    schedule: Callable[[int], float]
    """Step from 0 -> factor of the learning rate."""
    weight_decay: float
    betas: tuple[float, float]
    seed: int
    autocast: bool = False
    """fp32 weights, bf16 products."""
    max_grad_norm: float = 1.0
    setting: str = "learning_rate"
    """What to lower when the loss is not a number."""


@dataclass
class Fitted:
    curves: list[Row] = field(default_factory=list)
    validation_loss: float = math.nan
    tokens: int = 0
    """Read, fill not counted."""
    label_tokens: int = 0
    """That carried loss."""
    seconds: float = 0.0
    epochs: float = 0.0


def held_out(keys: Sequence[str]) -> set[str]:
    """The few questions that the validation loss is taken on, the same ones in `base` and `sft`: those whose hash is smallest."""
    if len(set(keys)) < 2:
        raise ValueError(f"the sft split has {len(set(keys))} usable questions; at least 2 are needed: use a larger dump")
    wanted = min(MAX_HELD_OUT, max(1, round(HELD_OUT * len(set(keys)))))
    return set(sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).hexdigest())[:wanted])


def fit(
    model: PreTrainedModel | PeftModel,
    documents: Sequence[Document],
    validation: Sequence[Document],
    how: Fit,
    *,
    device: torch.device,
    micro_batch_tokens: int,
    progress: Progress,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> Fitted:
    """Train what is trainable in `model` for `how.steps` steps, epoch after epoch, each in an order of its own."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optim.adamw(trainable.values(), how.learning_rate, how.weight_decay, how.betas)
    lengths = [len(document.ids) for document in documents]
    rows = packing.endless_rows(lengths, how.row_tokens, how.seed)
    fitted, first, seen = Fitted(), 0, 0
    log_every, validate_every = max(1, how.steps // LOGGED), max(1, how.steps // VALIDATED)
    if (state := checkpoints.load()) is not None:
        first, seen, fitted = state.step, state.values["seen"], Fitted(**state.values["fitted"])
        checkpoint.load_parameters(trainable, state.tensors)
        checkpoint.load_optimizer(optimizer, state.tensors)
        progress.note(f"resumed from step {first} of {how.steps}")
        for _ in range(first * how.rows):
            next(rows)

    def now() -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = checkpoint.parameter_state(trainable) | checkpoint.optimizer_state(optimizer)
        return tensors, {"seen": seen, "fitted": asdict(fitted)}

    with optim.fast_matmul(model):
        if state is None:
            fitted.validation_loss = mean_loss(model, validation, micro_batch_tokens, device, how.autocast)
            fitted.curves.append({"step": 0, "validation_loss": fitted.validation_loss})
            progress(0, how.steps, "train", validation_loss=fitted.validation_loss)
        model.train()
        for step in range(first, how.steps):
            started = time.perf_counter()
            checkpoint.seed_step(how.seed, step)  # dropout
            chosen = [index for _ in range(how.rows) for index in next(rows)[1]]
            loss, labels = _accumulate(model, [documents[i] for i in chosen], micro_batch_tokens, device, how.autocast)
            distributed.sum_gradients(trainable.values())
            grad_norm = optim.clip_gradients(optimizer, how.max_grad_norm)
            optim.finite(loss, "loss", step + 1, how.setting)
            optim.finite(grad_norm, "the gradient's norm", step + 1, how.setting)
            learning_rate = how.learning_rate * how.schedule(step)
            optim.set_learning_rate(optimizer, learning_rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            seen += len(chosen)
            fitted.tokens += sum(lengths[i] for i in chosen)
            fitted.label_tokens += labels
            fitted.seconds += time.perf_counter() - started
            last = step + 1 == how.steps
            validate = last or (step + 1) % validate_every == 0
            if validate or step == 0 or (step + 1) % log_every == 0:
                row: Row = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
                if validate:
                    fitted.validation_loss = mean_loss(model, validation, micro_batch_tokens, device, how.autocast)
                    row["validation_loss"] = optim.finite(fitted.validation_loss, "validation loss", step + 1, how.setting)
                row["epoch"] = seen / len(documents)
                fitted.curves.append({"step": step + 1, **row})
                told = {"loss": loss, "tokens_per_second": fitted.tokens / fitted.seconds, **row}
                progress(step + 1, how.steps, "train", **told)
            checkpoints.after_step(step + 1, now)
    fitted.epochs = seen / len(documents)
    model.eval()
    return fitted


def mean_loss(
    model: PreTrainedModel | PeftModel,
    documents: Sequence[Document],
    micro_batch_tokens: int,
    device: torch.device,
    autocast: bool = False,
) -> float:
    """Mean loss per label token, dropout off; the documents are shared among the processes."""
    training = model.training
    model.eval()
    with torch.no_grad():
        total = sum(float(loss) for loss in _losses(model, documents, micro_batch_tokens, device, autocast))
    model.train(training)
    return _everyones(total) / _labels(documents)


def _accumulate(
    model: PreTrainedModel | PeftModel, documents: Sequence[Document], micro_batch_tokens: int, device: torch.device, autocast: bool
) -> tuple[float, int]:
    """This process's part of the gradient of the mean loss over all label tokens of the step, however many passes it takes.

    The loss and the number of label tokens are the whole step's.
    """
    labels, total = _labels(documents), 0.0
    for loss in _losses(model, documents, micro_batch_tokens, device, autocast):
        (loss / labels).backward()
        total += float(loss.detach())
    return _everyones(total) / labels, labels


def _losses(
    model: PreTrainedModel | PeftModel, documents: Sequence[Document], micro_batch_tokens: int, device: torch.device, autocast: bool
) -> Iterator[Tensor]:
    """Summed losses of this process's share of `documents`, a pass each; 0 for passes that only keep it in step with the others."""
    parts = _micro_batches(_share(documents), micro_batch_tokens)
    for number in range(distributed.rounds(len(parts))):
        if number < len(parts):
            yield _loss(model, parts[number], device, autocast)
        else:
            yield 0 * _loss(model, documents[:1], device, autocast)


def _share(documents: Sequence[Document]) -> list[Document]:
    """This process's documents: the longest first, each goes to the process that has the fewest tokens yet."""
    world = distributed.world()
    if world.size == 1:
        return list(documents)
    shares: list[list[Document]] = [[] for _ in range(world.size)]
    tokens = [0] * world.size
    for document in sorted(documents, key=lambda d: -len(d.ids)):
        lightest = tokens.index(min(tokens))
        shares[lightest].append(document)
        tokens[lightest] += len(document.ids)
    return shares[world.rank]


def _labels(documents: Sequence[Document]) -> int:
    """Tokens that carry loss; nothing predicts a document's first."""
    return sum(len(document.ids) - max(1, document.first_label) for document in documents)


def _everyones(value: float) -> float:
    """The sum of `value` over the processes."""
    return float(distributed.total(torch.tensor(value, dtype=torch.float64)))


def _loss(model: PreTrainedModel | PeftModel, documents: Sequence[Document], device: torch.device, autocast: bool) -> Tensor:
    batch = packing.collate(documents, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        hidden = hidden_rows(model, batch, batch.label_rows)
        if autocast:
            hidden = hidden.bfloat16()
        return linear_cross_entropy(hidden, causal_lm(model).get_output_embeddings(), batch.labels)


def _micro_batches(documents: Sequence[Document], tokens: int) -> list[list[Document]]:
    """Longest first, so that each pass holds documents of similar length."""
    parts: list[list[Document]] = []
    room = 0
    for document in sorted(documents, key=lambda d: -len(d.ids)):
        if len(document.ids) > room or not parts:
            parts.append([])
            room = tokens
        parts[-1].append(document)
        room -= len(document.ids)
    return parts
