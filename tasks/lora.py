"""LoRA's forward and backward in one piece: y = x W' + s (x A') B' for PEFT's layers, which stay what they are in files and names.

PEFT's own forward casts the input to fp32, keeps what the frozen weights' gradient would need, and makes and adds two full-sized
temporaries in each direction. Here the low-rank part is added in place, and the backward pass keeps x (which neighbours share)
and x A' (rank numbers a token). In fp32 the numbers are PEFT's to rounding; on a bf16 base A and B stay fp32 and are rounded to
bf16 for the products, as under autocast.
"""

from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tasks import quantized


def speed_up(model: nn.Module) -> None:
    """Give every LoRA layer on a frozen linear layer the forward below; others keep PEFT's."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and "forward" not in vars(layer):
            base = layer.get_base_layer()
            if type(base) is nn.Linear or quantized.bits(base):
                cast(Any, layer).forward = partial(_forward, layer, cast(Any, layer).forward)


def _forward(layer: Any, peft_forward: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not names:
        return cast(Tensor, layer.base_layer(x))
    name = names[0]
    trained = any(parameter.requires_grad for parameter in layer.base_layer.parameters())
    special = len(names) > 1 or name in layer.lora_variant or layer.lora_bias.get(name) or args or kwargs
    if trained or special or torch.is_autocast_enabled(x.device.type):
        return cast(Tensor, peft_forward(x, *args, **kwargs))
    dropout = layer.lora_dropout[name]
    kept = None
    if dropout.training and (rate := getattr(dropout, "p", 0.0)) > 0:
        kept = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - rate)
    scale = layer.scaling[name] if kept is None else layer.scaling[name] / (1 - rate)
    return cast(Tensor, _LoRALinear.apply(x, layer.lora_A[name].weight, layer.lora_B[name].weight, scale, layer.base_layer, kept))


class _LoRALinear(torch.autograd.Function):
    """(..., K), A (r, K), B (N, r), s, frozen linear layer K -> N, dropout's mask (..., K) or None -> (..., N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, base: nn.Module, kept: Tensor | None) -> Tensor:
        y = base(x)
        rows = x if kept is None else x * kept
        low = rows.flatten(0, -2) @ a.T.to(x.dtype)
        low *= scale
        y.flatten(0, -2).addmm_(low, b.T.to(x.dtype))
        ctx.save_for_backward(x, a, b, low, kept)
        ctx.scale, ctx.base = scale, base
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low, kept = ctx.saved_tensors
        want_x, want_a, want_b = ctx.needs_input_grad[:3]
        grad = grads[0].flatten(0, -2)
        grad_x = grad_a = grad_b = None
        if want_b:
            grad_b = (grad.T @ low).to(b.dtype)
        grad_low = grad @ b.to(grad.dtype)
        grad_low *= ctx.scale
        if want_a:
            rows = x if kept is None else x * kept
            grad_a = (grad_low.T @ rows.flatten(0, -2)).to(a.dtype)
        if want_x:
            base = ctx.base
            weight = quantized.dequantised(base, grad.dtype) if quantized.bits(base) else base.weight
            grad_x = grad @ weight
            if kept is None:
                grad_x.addmm_(grad_low, a.to(grad.dtype))
            else:
                grad_x.addcmul_(grad_low @ a.to(grad.dtype), kept.flatten(0, -2).to(grad.dtype))
            grad_x = grad_x.view(x.shape)
        return grad_x, grad_a, grad_b, None, None, None
