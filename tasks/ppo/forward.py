"""One forward pass over whole sequences, for the response's tokens alone: log-probabilities, entropies, values.

The state that predicts the response's first token stands at the query's last one, so for a query of q and a response of n tokens
the rows q - 1 ... q + n - 2 are read: by the LM head (log-probability of the token that follows) and by the value head (V of the
state before that token). Only these rows go through a head, and through most of the last layer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.last_layer import hidden_rows
from tasks.models import causal_lm
from tasks.packing import Document, collate

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
    return hidden_rows(model, batch, torch.tensor(rows, device=device))


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(head(h) / temperature)[token] and the entropy, without ever holding (N, V) numbers.

    d logp / d h = (W[token] - sum_v p_v W_v) / temperature: computed in the forward pass, chunk by chunk, while p is at hand. The
    head is frozen, so this is the only gradient; the entropy has none (it is watched, not optimized).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        chunk = max(1, CHUNK_LOGITS // weight.shape[0])
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropies = hidden.new_empty(len(hidden) if entropy else 0, dtype=torch.float32)
        slopes = torch.empty_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            token = tokens[rows]
            logits = F.linear(hidden[rows], weight, bias).float()
            logp = F.log_softmax(logits if temperature == 1 else logits.div_(temperature), dim=-1)
            logprobs[rows] = logp.gather(1, token[:, None])[:, 0]
            if not entropy and slopes is None:
                continue
            p = logp.exp() if entropy else logp.exp_()
            if entropy:
                entropies[rows] = -torch.linalg.vecdot(p, logp)
            if slopes is not None:
                slopes[rows] = (weight[token].float() - (p.to(weight.dtype) @ weight).float()) / temperature
        if slopes is not None:
            ctx.save_for_backward(slopes)
            ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0][:, None] * slopes).to(ctx.dtype), None, None, None, None, None


def token_logprobs(
    hidden: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens, and the entropies of their distributions (none, (0,), where they are not wanted).

    (N, D), (N,), (V, D), (V,) -> (N,), (N,) fp32.
    """
    return _TokenLogprobs.apply(hidden, tokens, weight, bias, temperature, entropy)


def read_policy(
    model: Any, hidden: Tensor, responses: list[list[int]], temperature: float, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` of the responses' tokens by the model's own head, row after row; (N, D) -> (N,), (N,)."""
    head = causal_lm(model).get_output_embeddings()
    tokens = torch.tensor([token for r in responses for token in r], device=hidden.device)
    return token_logprobs(hidden, tokens, head.weight, getattr(head, "bias", None), temperature, entropy)


def policy_forward(
    model: Any,
    queries: list[list[int]],
    responses: list[list[int]],
    temperature: float,
    width: int,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the responses' tokens under the model with whatever adapter is active, and entropies; (B, width) each.

    0 outside the responses. Logits are divided by the temperature, as they were in sampling.
    """
    hidden = response_hidden(model, queries, responses, device)
    logprobs, entropy = read_policy(model, hidden, responses, temperature)
    mask = response_mask(responses, width, device)
    return unpack(logprobs, mask), unpack(entropy, mask)


def unpack(flat: Tensor, mask: Tensor) -> Tensor:
    """(N,) -> (B, T): one number for each True, row after row; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def stack(rows: Sequence[Tensor], width: int, device: torch.device | str) -> Tensor:
    """Rows of (T_i,) or (T_i, k) -> (B, width) or (B, width, k), 0 after their ends."""
    table = rows[0].new_zeros(len(rows), width, *rows[0].shape[1:])
    for place, row in zip(table, rows):
        place[: len(row)] = row
    return table.to(device)
