"""Language modelling on packed documents: the training loop of the scratch model and of supervised fine-tuning."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tasks import optim, packing
from tasks.cross_entropy import linear_cross_entropy
from tasks.curves import Row
from tasks.models import causal_lm
from tasks.packing import Document
from tasks.progress import Progress

LOGGED = 100  # points of a curve, about
VALIDATED = 10
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
) -> Fitted:
    """Train what is trainable in `model` for `how.steps` steps, epoch after epoch, each in an order of its own."""
    torch.manual_seed(how.seed)  # dropout
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.adamw(parameters, how.learning_rate, how.weight_decay, how.betas)
    lengths = [len(document.ids) for document in documents]
    rows = packing.endless_rows(lengths, how.row_tokens, how.seed)
    fitted, seen = Fitted(), 0
    log_every, validate_every = max(1, how.steps // LOGGED), max(1, how.steps // VALIDATED)

    with optim.fast_matmul(model):
        fitted.validation_loss = mean_loss(model, validation, micro_batch_tokens, device, how.autocast)
        fitted.curves.append({"step": 0, "validation_loss": fitted.validation_loss})
        model.train()
        for step in range(how.steps):
            started = time.perf_counter()
            chosen = [index for _ in range(how.rows) for index in next(rows)[1]]
            loss, labels = _accumulate(model, [documents[i] for i in chosen], micro_batch_tokens, device, how.autocast)
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
                row: Row = {"step": step + 1, "loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
                if validate:
                    fitted.validation_loss = mean_loss(model, validation, micro_batch_tokens, device, how.autocast)
                    row["validation_loss"] = optim.finite(fitted.validation_loss, "validation loss", step + 1, how.setting)
                fitted.curves.append(row | {"epoch": seen / len(documents)})
                progress(step + 1, how.steps, "train", loss=loss, tokens_per_second=fitted.tokens / fitted.seconds)
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
    """Mean loss per label token, dropout off."""
    training = model.training
    model.eval()
    total, labels = 0.0, 0
    with torch.no_grad():
        for part in _micro_batches(documents, micro_batch_tokens):
            loss, count = _loss(model, part, device, autocast)
            total, labels = total + float(loss), labels + count
    model.train(training)
    return total / labels


def _accumulate(
    model: PreTrainedModel | PeftModel, documents: Sequence[Document], micro_batch_tokens: int, device: torch.device, autocast: bool
) -> tuple[float, int]:
    """Gradient of the mean loss over all label tokens of the step, however many passes it takes."""
    labels = sum(len(document.ids) - max(1, document.first_label) for document in documents)
    total = 0.0
    for part in _micro_batches(documents, micro_batch_tokens):
        loss, _ = _loss(model, part, device, autocast)
        (loss / labels).backward()
        total += float(loss.detach())
    return total / labels, labels


def _loss(
    model: PreTrainedModel | PeftModel, documents: Sequence[Document], device: torch.device, autocast: bool
) -> tuple[torch.Tensor, int]:
    batch = packing.collate(documents, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        hidden = packing.hidden_states(model, batch)[batch.label_rows]
        if autocast:
            hidden = hidden.bfloat16()
        return linear_cross_entropy(hidden, causal_lm(model).get_output_embeddings(), batch.labels), len(batch.labels)


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
