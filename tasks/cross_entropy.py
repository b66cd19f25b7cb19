"""Cross-entropy straight from hidden states: the (N, V) logits never exist as a whole."""

from typing import Any

import torch
from torch import Tensor

CHUNK = 2**21  # logits at a time: they stay in the cache


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is made while the logits are there, so that the backward pass needs no second product for them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            want_hidden, want_weight, want_bias, _ = ctx.needs_input_grad
            head = weight.to(hidden.dtype)
            grad_hidden = torch.empty_like(hidden) if want_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if want_bias and bias is not None else None
            total = hidden.new_zeros((), dtype=torch.float32)
            rows = max(1, CHUNK // weight.shape[0])
            for start in range(0, hidden.shape[0], rows):
                chunk, target = hidden[start : start + rows], labels[start : start + rows, None]
                logits = (chunk @ head.T).float()
                if bias is not None:
                    logits += bias
                logprobs = logits.log_softmax(-1)
                total -= logprobs.gather(1, target).sum()
                if not (want_hidden or want_weight):
                    continue
                grad = logprobs.exp_()
                grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + rows] = grad @ head
                if grad_weight is not None:
                    grad_weight += grad.T @ chunk
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.gradients
        scaled = [None if g is None else g * grads[0].to(g.dtype) for g in (hidden, weight, bias)]
        return scaled[0], None if scaled[1] is None else scaled[1].to(ctx.dtype), scaled[2], None


def linear_cross_entropy(hidden: Tensor, head: torch.nn.Module, labels: Tensor) -> Tensor:
    """-sum_n log softmax(head(hidden_n))[labels_n]; (N, D), a linear layer to V, (N,) -> (), fp32."""
    return _LinearCrossEntropy.apply(hidden, head.weight, getattr(head, "bias", None), labels)
