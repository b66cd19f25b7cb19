"""Log-probabilities of given answers: how far PPO went from its reference, and what it forgot."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.distributed import gather, mine, rounds
from tasks.optim import fast_matmul
from tasks.ppo.forward import policy_forward
from tasks.ppo.kl import k1
from tasks.reward.model import similar_lengths


@torch.no_grad()
def response_logprobs(
    model: Any,
    queries: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    temperature: float,
    device: torch.device,
    batch_tokens: int,
) -> list[Tensor]:
    """log p(token | what stands before it) of each response's tokens, from logits / temperature; one (T_i,) fp32 each.

    The ranks share the work, and each gets all of it.
    """
    batches = list(similar_lengths([len(q) + len(r) for q, r in zip(queries, responses)], batch_tokens))
    share, found = mine(batches), []
    with fast_matmul(model):
        for number in range(rounds(len(share))):
            rows = share[number] if number < len(share) else batches[0]  # under fsdp, where another rank has more
            some, given = [queries[i] for i in rows], [responses[i] for i in rows]
            logprobs, _ = policy_forward(model, some, given, temperature, max(map(len, given)), device)
            if number < len(share):
                found.append([row[: len(response)].cpu() for row, response in zip(logprobs, given)])
    result: list[Tensor] = [torch.empty(0)] * len(queries)
    for batch, rows_of in zip(batches, gather(found, len(batches)), strict=True):
        for i, row in zip(batch, rows_of, strict=True):
            result[i] = row
    return result


def perplexity(logprobs: Sequence[Tensor]) -> float:
    """exp of the mean negative log-likelihood per token, over all tokens of all answers."""
    return float(np.exp(-torch.cat(list(logprobs)).double().mean().item()))


def kl(logprobs: Sequence[Tensor], ref_logprobs: Sequence[Tensor]) -> np.ndarray:
    """Sum over each response of log p - log p_ref, on samples from p: an unbiased estimate of the KL divergence, nats; -> (N,)."""
    return np.array([float(k1(p.double(), ref.double()).sum()) for p, ref in zip(logprobs, ref_logprobs)])
