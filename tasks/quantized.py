"""A frozen base in 8 bits (LLM.int8(), https://arxiv.org/abs/2208.07339) or 4 bits (NF4, https://arxiv.org/abs/2305.14314).

bitsandbytes' layers, on CPU and CUDA. On CUDA a product is bitsandbytes' own: in 8 bits the activations are rounded too, and an
outlier in one row takes its column out of the rounding for the whole batch, so a text's numbers depend a little on its neighbours.
On a CPU only the weights are rounded, in training and in evaluation alike, and nothing depends on neighbours.
"""

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tasks.config import Quantization

logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line per product


def load_settings(quantization: Quantization, dtype: torch.dtype) -> Any:
    """transformers' quantization_config, or None. Embeddings and head stay as they are (transformers' default)."""
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return None


def quantised_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if bits(module)]


def bits(layer: nn.Module) -> int:
    """8, 4, or 0 for a layer that is not quantised."""
    import bitsandbytes

    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        return 8
    return 4 if isinstance(layer, bitsandbytes.nn.Linear4bit) else 0


def settle(model: nn.Module, device: torch.device | str) -> None:
    """After loading: on a CPU, the same product whether a model trains or not."""
    if torch.device(device).type != "cpu":
        return
    for layer in quantised_layers(model):
        if bits(layer) == 8:
            # bitsandbytes rounds activations to 8 bits here in eval mode and not in training mode: what is sampled and scored
            # would be another model than the one that is trained.
            layer.forward = _Product(layer)
        else:
            # In eval mode bitsandbytes would repack the weights for inference; LoRA's gradients are then zero, without an error.
            cast(Any, layer).support_avx512bf16_for_cpu = False


class _Product:
    """forward of a layer whose weights are made from their 8 bits anew in both passes: no copy of them is kept in between."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return cast(Tensor, _DequantisedLinear.apply(x, self.layer))


class _DequantisedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        bias = cast(Tensor | None, layer.bias)
        return functional.linear(x, dequantised(layer, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ dequantised(ctx.layer, grads[0].dtype), None


def dequantised(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weights that a quantised layer stands for, (out, in)."""
    from bitsandbytes.functional import dequantize_4bit

    weight = cast(Any, layer.weight)
    if bits(layer) == 4:
        return cast(Tensor, dequantize_4bit(weight.data, weight.quant_state)).to(dtype)
    scale = cast(Any, layer).state.SCB  # bitsandbytes moves it there in its first forward
    return cast(Tensor, weight.data.to(dtype).mul_((weight.SCB if scale is None else scale)[:, None] / 127))
