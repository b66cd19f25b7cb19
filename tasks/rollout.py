"""Sampling responses: KV cache, left padding, real EOS, and a random stream for each row.

A row's uniform numbers depend on the seed and the row's place in `queries` alone, and a token is drawn by inverting the
cumulative distribution. So a response does not depend on the batch that its query happens to share, on the batch size, or on
which other rows have ended (up to rounding in the logits, about 1e-6, when padding differs).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True)
class Rollout:
    """Queries and what was sampled after them, in the order they were given."""

    queries: list[list[int]]
    responses: list[list[int]]
    """Token ids; EOS is the last one where the response ended by itself."""
    finished: list[bool]
    """True: ended with EOS; False: cut at max_new_tokens."""


def row_uniforms(seed: int, row: int, n: int) -> Tensor:
    """The first n uniform numbers in [0, 1) of a row's own stream; (n,) float64."""
    return torch.from_numpy(np.random.default_rng((seed, row)).random(n))


def sample(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Tokens drawn from softmax(logits / temperature) by inverse CDF; (B, V), (B,) in [0, 1) -> (B,). Temperature 0: argmax."""
    if temperature == 0:
        return logits.argmax(-1)
    # float64: in float32 the cumulative sum of a large vocabulary is off by more than a rare token's probability
    cdf = torch.softmax(logits.double() / temperature, dim=-1).cumsum(-1)
    threshold = uniforms.to(cdf)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


class RoomyLayer(DynamicLayer):
    """A layer's keys and values in a buffer with room for all the steps: the library's own layer copies itself at each one."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.buffer: Tensor = torch.empty(2, 0, 0, 0, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        past = self.get_seq_length()
        end = past + key_states.shape[-2]
        if self.buffer.shape[1] != key_states.shape[0]:  # the first step, or rows were dropped since the last one
            batch, heads, _, width = key_states.shape
            buffer = key_states.new_empty(2, batch, heads, self.length, width)
            if self.keys is not None and self.values is not None:
                buffer[0, :, :, :past], buffer[1, :, :, :past] = self.keys, self.values
            self.buffer, self.is_initialized = buffer, True
        self.buffer[0, :, :, past:end], self.buffer[1, :, :, past:end] = key_states, value_states
        self.keys, self.values = self.buffer[0, :, :, :end], self.buffer[1, :, :, :end]
        return self.keys, self.values


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    queries: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: torch.device | str,
    batch_size: int = 64,
) -> Rollout:
    """One response per query, sampled from the model with its active adapter; top_k 0, top_p 1, no minimum length."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not all(queries):
        raise ValueError(f"query {queries.index([])} is empty: every query needs at least one token")
    limit = inner.config.max_position_embeddings
    longest = max(map(len, queries), default=0)
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a query of {longest} tokens and max_new_tokens={max_new_tokens} do not fit {limit} positions: lower either"
        )
    was_training = inner.training
    inner.eval()  # LoRA dropout off
    responses: list[list[int]] = [[] for _ in queries]
    order = sorted(range(len(queries)), key=lambda i: -len(queries[i]))  # similar lengths together; the largest batch comes first
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        _generate_batch(inner, tokenizer, queries, rows, responses, max_new_tokens, temperature, seed, torch.device(device))
    inner.train(was_training)
    return Rollout(queries, responses, [r[-1] == tokenizer.eos_token_id for r in responses])


def _generate_batch(
    model: Any,
    tokenizer: Any,
    queries: list[list[int]],
    rows: list[int],
    responses: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: torch.device,
) -> None:
    """Fill `responses` for these rows."""
    eos, pad, width = tokenizer.eos_token_id, tokenizer.pad_token_id, max(len(queries[i]) for i in rows)
    ids = torch.tensor([[pad] * (width - len(queries[i])) + queries[i] for i in rows], device=device)
    lengths = torch.tensor([len(queries[i]) for i in rows], device=device)
    # the mask of all the steps at once: True from the query's first token on
    mask = torch.arange(width + max_new_tokens, device=device)[None] >= (width - lengths)[:, None]
    positions = (mask[:, :width].cumsum(-1) - 1).clamp(min=0)
    uniforms = torch.stack([row_uniforms(seed, i, max_new_tokens) for i in rows]).to(device)

    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(width + max_new_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    active = list(rows)  # the rows that still run, in the cache's order
    for step in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask[:, : width + step],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens = sample(output.logits[:, -1], uniforms[:, step], temperature)
        drawn = tokens.tolist()
        for row, token in zip(active, drawn):
            if not responses[row] or responses[row][-1] != eos:
                responses[row].append(token)
        running = [k for k, row in enumerate(active) if responses[row][-1] != eos]
        if not running:
            return
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        if len(running) <= 0.75 * len(active):  # dropping rows copies the cache: not for each one that ends
            keep = torch.tensor(running, device=device)
            cache.batch_select_indices(keep)
            ids, positions, mask, uniforms = ids[keep], positions[keep], mask[keep], uniforms[keep]
            active = [active[k] for k in running]
