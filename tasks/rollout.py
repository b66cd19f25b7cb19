"""Sampling responses: no padding where the model allows it, KV cache, real EOS, and a random stream for each row.

A row's uniform numbers depend on the seed and the row's stream number alone, and a token is drawn by inverting the cumulative
distribution. So a response does not depend on the batch that its query happens to share, on the batch size, on which other rows
have ended, or on the process that samples it (up to rounding in the logits, about 1e-6). The distribution is at hand when a token
is drawn, so its log-probability and entropy cost nothing more.

Llama-like models are run by tasks.decoder, all others by their own code (`_Library`), with the same results up to rounding.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tasks import optim
from tasks.decoder import FOLD_BYTES, decoder_for
from tasks.distributed import any_of, gather, mine, rounds, world


@dataclass(frozen=True)
class Rollout:
    """Queries and what was sampled after them, in the order they were given. Equal if the same tokens were sampled."""

    queries: list[list[int]]
    responses: list[list[int]]
    """Token ids; EOS is the last one where the response ended by itself."""
    finished: list[bool]
    """True: ended with EOS; False: cut at max_new_tokens."""
    logprobs: list[Tensor] = field(default_factory=list, compare=False)
    """log softmax(logits / temperature)[token] of each response's tokens; (T_i,) each, fp32, CPU. Temperature 0 counts as 1."""
    entropies: list[Tensor] = field(default_factory=list, compare=False)
    """Of the distributions that they were drawn from, nats; shapes as in logprobs."""
    values: list[Tensor] | None = field(default=None, compare=False)
    """value_head(hidden state before each token); shapes as in logprobs."""
    engine_logprobs: list[Tensor] | None = field(default=None, compare=False)
    """Of the tokens that another engine sampled, in its own numerics: see tasks.mismatch."""


def row_uniforms(seed: int, row: int, n: int) -> Tensor:
    """The first n uniform numbers in [0, 1) of a row's own stream; (n,) float64."""
    return torch.from_numpy(np.random.default_rng((seed, row)).random(n))


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens by inverse CDF of softmax(logits / temperature), their log-probabilities, and the entropies of the distributions.

    (B, V), (B,) in [0, 1) -> (B,), (B,), (B,). Temperature 0: the likeliest token, with the numbers of temperature 1.
    """
    scaled = logits.float() if temperature in (0, 1) else logits.float() / temperature
    logprobs = torch.log_softmax(scaled, dim=-1)
    p = logprobs.exp()
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        # float64: in float32 the cumulative sum of a large vocabulary is off by more than a rare token's probability
        cdf = p.cumsum(-1, dtype=torch.float64)
        threshold = uniforms.to(cdf)[:, None] * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0], -torch.linalg.vecdot(p, logprobs)


def sample(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """The tokens of `draw` alone; (B, V), (B,) -> (B,)."""
    return draw(logits, uniforms, temperature)[0]


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
    streams: Sequence[int] | None = None,
    value_head: Any = None,
    fold_bytes: int = FOLD_BYTES,
) -> Rollout:
    """One response per query, sampled from the model with its active adapter; top_k 0, top_p 1, no minimum length.

    streams[i] is the number of row i's random stream (i where None is given); value_head maps hidden states (B, D) to (B, 1). The
    adapter is folded into a copy of the weights of at most `fold_bytes`, which lives as long as the call. Under fsdp all ranks call
    this together, each with its own queries.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = torch.device(device)
    check_room(inner, queries, max_new_tokens)
    was_training = inner.training
    inner.eval()  # LoRA dropout off
    sampling = _Sampling(
        queries, list(streams) if streams is not None else list(range(len(queries))),
        max_new_tokens, temperature, seed, tokenizer.eos_token_id, value_head, device,
    )  # fmt: skip
    # similar lengths together, equal queries side by side; the largest batch comes first
    order = sorted(range(len(queries)), key=lambda i: (-len(queries[i]), queries[i], sampling.streams[i]))
    try:
        # One-token products are far too small for what optim.fast_matmul chooses.
        with torch.no_grad(), optim.matmul_precision("highest") if device.type == "cpu" else nullcontext():
            runner: Runner | None = None
            if queries and not world().sharded:
                runner = decoder_for(inner, max(map(len, queries)) + max_new_tokens, device, fold_bytes)
            if runner is None:
                runner = _Library(inner, tokenizer.pad_token_id)
            for batch in range(rounds(-(-len(queries) // batch_size))):
                sampling.batch(runner, order[batch * batch_size : (batch + 1) * batch_size])
    finally:
        inner.train(was_training)
    return sampling.rollout()


def generate_shared(
    model: Any, tokenizer: Any, queries: list[list[int]], *, max_new_tokens: int, streams: Sequence[int] | None = None, **how: Any
) -> Rollout:
    """generate() with the queries cut among the ranks: each gets the whole rollout, with the tokens that one process would draw."""
    # here too: where one rank raised alone, the others would wait for it
    check_room(model.get_base_model() if hasattr(model, "get_base_model") else model, queries, max_new_tokens)
    streams = list(range(len(queries))) if streams is None else streams
    part = generate(model, tokenizer, mine(queries), max_new_tokens=max_new_tokens, streams=mine(streams), **how)
    values: Sequence[Tensor | None] = part.values if part.values is not None else [None] * len(part.queries)
    rows = gather(list(zip(part.responses, part.finished, part.logprobs, part.entropies, values, strict=True)), len(queries))
    return Rollout(
        queries,
        [row[0] for row in rows],
        [row[1] for row in rows],
        logprobs=[row[2] for row in rows],
        entropies=[row[3] for row in rows],
        values=None if how.get("value_head") is None else [row[4] for row in rows if row[4] is not None],
    )


def check_room(model: Any, queries: list[list[int]], max_new_tokens: int) -> None:
    """ValueError where a query is empty or too long."""
    if not all(queries):
        raise ValueError(f"query {queries.index([])} is empty: every query needs at least one token")
    limit, longest = model.config.max_position_embeddings, max(map(len, queries), default=0)
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a query of {longest} tokens and max_new_tokens={max_new_tokens} do not fit {limit} positions: lower either"
        )


class Runner(Protocol):
    """A model that reads one batch of rows token by token; results are hidden states (B, D) and logits (B, V)."""

    least_drop: float
    """Share of the rows that must have ended before it pays to drop them."""

    def start(self, queries: list[list[int]], steps: int) -> tuple[Tensor, Tensor]: ...

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]: ...

    def keep(self, rows: Tensor) -> None: ...


@dataclass
class _Sampling:
    """What is asked for, and what has been sampled so far."""

    queries: list[list[int]]
    streams: list[int]
    max_new_tokens: int
    temperature: float
    seed: int
    eos: int
    value_head: Any
    device: torch.device

    def __post_init__(self) -> None:
        self.responses: list[list[int]] = [[] for _ in self.queries]
        numbers = 2 if self.value_head is None else 3
        self.numbers = torch.zeros(len(self.queries), numbers, self.max_new_tokens)
        """Log-probability, entropy, and value of each token."""

    def batch(self, runner: Runner, rows: list[int]) -> None:
        """Sample these rows. Without rows (under fsdp, where the other ranks still have some) a row that nobody asked for."""
        uniforms = torch.stack(
            [row_uniforms(self.seed, self.streams[i], self.max_new_tokens) for i in rows]
            or [torch.zeros(self.max_new_tokens, dtype=torch.float64)]
        ).to(self.device)
        active = list(rows)  # the rows that still run, in the runner's order
        hidden, logits = runner.start([self.queries[i] for i in rows] or [[self.eos]], self.max_new_tokens)
        for step in range(self.max_new_tokens):
            tokens, *numbers = draw(logits, uniforms[:, step], self.temperature)
            if self.value_head is not None:
                numbers.append(self.value_head(hidden)[:, 0])
            drawn, table = tokens.tolist(), torch.stack(numbers, 1).float().cpu()
            running = []
            for k, row in enumerate(active):
                response = self.responses[row]
                if not response or response[-1] != self.eos:
                    response.append(drawn[k])
                    self.numbers[row, :, step] = table[k]
                    if drawn[k] != self.eos:
                        running.append(k)
            if step + 1 == self.max_new_tokens or not any_of(bool(running)):
                return
            if running and len(active) - len(running) >= runner.least_drop * len(active):  # not for each: it copies the cache
                keep = torch.tensor(running, device=self.device)
                runner.keep(keep)
                tokens, uniforms, active = tokens[keep], uniforms[keep], [active[k] for k in running]
            hidden, logits = runner.step(tokens)

    def rollout(self) -> Rollout:
        columns = [[row[n, : len(r)].clone() for row, r in zip(self.numbers, self.responses)] for n in range(self.numbers.shape[1])]
        return Rollout(
            self.queries,
            self.responses,
            [response[-1] == self.eos for response in self.responses],
            logprobs=columns[0],
            entropies=columns[1],
            values=columns[2] if self.value_head is not None else None,
        )


class _RoomyLayer(DynamicLayer):
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


class _Library:
    """Any causal LM of transformers by its own code: prompts padded on the left, the library's cache with room for all steps."""

    least_drop = 0.25

    def __init__(self, model: Any, pad: int) -> None:
        self.model, self.pad = model, pad
        self.head = model.get_output_embeddings()

    def start(self, queries: list[list[int]], steps: int) -> tuple[Tensor, Tensor]:
        device, width = self.model.get_input_embeddings().weight.device, max(map(len, queries))
        ids = torch.tensor([[self.pad] * (width - len(query)) + query for query in queries], device=device)
        lengths = torch.tensor([len(query) for query in queries], device=device)
        # the mask of all the steps at once: True from the query's first token on
        self.mask = torch.arange(width + steps, device=device)[None] >= (width - lengths)[:, None]
        self.positions = (self.mask[:, :width].cumsum(-1) - 1).clamp(min=0)
        self.end = width
        self.cache = DynamicCache(config=self.model.config)
        self.cache.layers = [_RoomyLayer(width + steps) if type(layer) is DynamicLayer else layer for layer in self.cache.layers]
        return self._forward(ids)

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        self.positions = self.positions[:, -1:] + 1
        self.end += 1
        return self._forward(tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.positions, self.mask = self.positions[rows], self.mask[rows]

    def _forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        # What the head reads: the model's own output has only the logits, and may have changed them (a soft cap, a scale).
        hook = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            output = self.model(
                input_ids=ids,
                attention_mask=self.mask[:, : self.end],
                position_ids=self.positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        finally:
            hook.remove()
        return seen[0][:, -1], output.logits[:, -1]
