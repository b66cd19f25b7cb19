"""What every training loop needs besides its loss: learning-rate schedules, AdamW, and checks on the numbers."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tasks.compute import is_small


def warmup_cosine(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Factor of the learning rate at `step` of `steps` (from 0): linear up to 1 over `warmup`, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def warmup_linear(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    """The same with a straight line down to `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * (1 - min(1.0, done))


def adamw(
    parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.AdamW:
    """AdamW in one fused pass; norms and biases are not decayed."""
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """The norm of the gradient before it was clipped to `max_norm`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))


def finite(value: float, name: str, step: int, setting: str) -> float:
    """`value`, or the end of the run: a model with one nan in it is lost."""
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value} at step {step}: lower {setting}")
    return value


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """torch.set_float32_matmul_precision for the length of the `with`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def fast_matmul(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, fp32 products on a CPU go to oneDNN: up to 1.8 times as fast where MKL does not use AVX-512.

    "medium" allows bf16 inside a product where the CPU has AMX, so it is used only where a product is still exact fp32. It makes
    the many small products of attention five times slower; tasks.packing keeps those out of it. Products of a small model gain
    nothing (measured: 0.33 CPU-seconds a step without, 0.42 with, at hidden size 96), and are left as they are.
    """
    if torch.cuda.is_available() or is_small(model):
        yield
        return
    a = torch.linspace(-1, 1, 256 * 256).reshape(256, 256).sin()
    exact = a.double() @ a.double()
    with matmul_precision("medium"):
        medium_is_exact = bool((a @ a - exact).abs().max() < 1e-4)
    with matmul_precision("medium" if medium_is_exact else torch.get_float32_matmul_precision()):
        yield
