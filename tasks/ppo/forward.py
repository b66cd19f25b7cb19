"""One forward pass over whole sequences, for the response's tokens alone: log-probabilities, entropies, values.

The state that predicts the response's first token stands at the query's last one, so for a query of q and a response of n tokens
the rows q - 1 ... q + n - 2 are read: by the LM head (log-probability of the token that follows) and by the value head (V of the
state before that token). Only these rows go through a head.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.models import causal_lm
from tasks.packing import Document, collate, hidden_states

CHUNK_LOGITS = 2**21
"""Logits in memory at a time: what stays in a CPU's cache, and little of a GPU's memory."""


def response_mask(responses: list[list[int]], width: int, device: torch.device | str) -> Tensor:
    """True on the tokens of each response; (B, width)."""
    lengths = torch.tensor([len(r) for r in responses], device=device)
    return torch.arange(width, device=device) < lengths[:, None]


def response_hidden(model: Any, queries: list[list[int]], responses: list[list[int]], device: torch.device | str) -> Tensor:
    """Hidden states from which the responses' tokens are predicted, row after row without padding; -> (N, D)."""
    batch = collate([Document(np.array(q + r, np.int32), len(q)) for q, r in zip(queries, responses)], device)
    rows = [start + len(q) - 1 + t for start, q, r in zip(batch.starts, queries, responses) for t in range(len(r))]
    return hidden_states(model, batch)[torch.tensor(rows, device=device)]


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(head(h) / temperature)[token] and the entropy, without ever holding (N, V) numbers.

    d logp / d h = (W[token] - sum_v p_v W_v) / temperature: computed in the forward pass, chunk by chunk, while p is at hand. The
    head is frozen, so this is the only gradient; the entropy has none (it is watched, not optimized).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        chunk = max(1, CHUNK_LOGITS // weight.shape[0])
        logprobs, entropies, slopes = [], [], []
        for h, token in zip(hidden.split(chunk), tokens.split(chunk)):
            logp = F.log_softmax(F.linear(h, weight, bias).float() / temperature, dim=-1)
            p = logp.exp()
            logprobs.append(logp.gather(1, token[:, None])[:, 0])
            entropies.append(-torch.linalg.vecdot(p, logp))
            if ctx.needs_input_grad[0]:
                slopes.append((weight[token].float() - (p.to(weight.dtype) @ weight).float()) / temperature)
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
            ctx.dtype = hidden.dtype
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0][:, None] * slopes).to(ctx.dtype), None, None, None, None


def token_logprobs(
    hidden: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens, and the entropies of their distributions; (N, D), (N,), (V, D), (V,) -> (N,), (N,) fp32."""
    return _TokenLogprobs.apply(hidden, tokens, weight, bias, temperature)


def policy_forward(
    model: Any,
    queries: list[list[int]],
    responses: list[list[int]],
    temperature: float,
    width: int,
    device: torch.device | str,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the responses' tokens under the model with whatever adapter is active, and entropies; (B, width) each.

    0 outside the responses. Logits are divided by the temperature, as they were in sampling.
    """
    hidden = response_hidden(model, queries, responses, device) if hidden is None else hidden
    head = causal_lm(model).get_output_embeddings()
    tokens = torch.tensor([token for r in responses for token in r], device=device)
    logprobs, entropy = token_logprobs(hidden, tokens, head.weight, getattr(head, "bias", None), temperature)
    mask = response_mask(responses, width, device)
    return _unpack(logprobs, mask), _unpack(entropy, mask)


def value_forward(
    model: Any,
    head: nn.Module,
    queries: list[list[int]],
    responses: list[list[int]],
    width: int,
    device: torch.device | str,
    hidden: Tensor | None = None,
) -> Tensor:
    """Values of the states before each of the responses' tokens; (B, width), 0 outside the responses."""
    hidden = response_hidden(model, queries, responses, device) if hidden is None else hidden
    return _unpack(head(hidden)[:, 0], response_mask(responses, width, device))


def _unpack(flat: Tensor, mask: Tensor) -> Tensor:
    """(N,) -> (B, T): one number for each True, row after row; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)
