"""silu(gate) * up of a gated MLP (https://arxiv.org/abs/2002.05202), keeping gate and up for the backward pass and not silu(gate).

The same operations as transformers' in the same order, so the same bits, forward and backward; a quarter less memory in the MLP,
which holds most of what a decoder layer keeps.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def save_memory(model: nn.Module) -> None:
    """Give every gated MLP with SiLU the forward below."""
    for module in model.modules():
        if {name for name, _ in module.named_children()} == PARTS and type(cast(Any, module).act_fn).__name__ in (
            "SiLU",
            "SiLUActivation",
        ):
            module.forward = partial(_forward, module)


def _forward(mlp: Any, x: Tensor) -> Tensor:
    return cast(Tensor, mlp.down_proj(_SwiGLU.apply(mlp.gate_proj(x), mlp.up_proj(x))))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), functional.silu(gate).mul_(grads[0])
