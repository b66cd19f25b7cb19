"""Documents of many lengths in one forward pass, without padding them to the longest and without a mask.

All tokens of a batch stand in one row, documents sorted by length. Everything but attention looks at one token at a time,
and does not notice. Attention runs over blocks of similarly long documents, each block one causal call: (documents, heads,
length, head_dim). Within a block a document is filled up at its end; causal attention never looks there. So every document
gets what it would get alone, on CPU and CUDA alike, and no [T, T] mask exists.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tasks import optim
from tasks.models import causal_lm, trunk

WINDOW = 1_024  # documents packed together; packing all at once would sort the whole epoch by length
LONGEST_FILL = 0.1  # of a block's length


class Document(NamedTuple):
    """A text in tokens, and which of them carry loss."""

    ids: np.ndarray  # int32
    first_label: int
    """Tokens from this position on carry loss; the ones before it are only read."""


class Block(NamedTuple):
    """So many documents of `length` tokens each, fill included, one after the other."""

    documents: int
    length: int


@dataclass(frozen=True)
class Batch:
    """Documents in one row of T tokens; N of the tokens are predicted."""

    input_ids: Tensor
    """(1, T)"""
    position_ids: Tensor
    """(1, T), from 0 in every document."""
    blocks: tuple[Block, ...]
    label_rows: Tensor
    """(N,): positions in the row whose next token is predicted."""
    labels: Tensor
    """(N,): those next tokens."""
    starts: tuple[int, ...]
    """Where each of the given documents begins in the row, in the order they were given."""
    tokens: int
    """Tokens of the documents, fill not counted."""


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens as lists of indices: longest first, each into the fullest row that takes it.

    Best-fit decreasing bin packing, as in "Fewer Truncations Improve Language Modeling" (https://arxiv.org/abs/2404.10830).
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"a document of {length} tokens does not fit into a row of {capacity}")
        slot = bisect_left(room, (length, -1))
        if slot == len(room):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left, row = room.pop(slot)
        rows[row].append(index)
        if left > length:
            insort(room, (left - length, row))
    return rows


def endless_rows(lengths: Sequence[int], capacity: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch, indices of one packed row) for ever; every epoch has each document once, in an order of its own."""
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(lengths))
        for start in range(0, len(order), WINDOW):
            window = order[start : start + WINDOW]
            rows = best_fit([lengths[i] for i in window], capacity)
            for row in rng.permutation(len(rows)):
                yield epoch, [int(window[i]) for i in rows[row]]
        epoch += 1


def collate(documents: Sequence[Document], device: torch.device | str) -> Batch:
    """Documents -> one row, similarly long ones side by side."""
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i].ids))
    lengths = [len(documents[i].ids) for i in order]
    blocks: list[Block] = []
    for length in lengths:
        if blocks and length >= blocks[-1].length * (1 - LONGEST_FILL):
            blocks[-1] = Block(blocks[-1].documents + 1, blocks[-1].length)
        else:
            blocks.append(Block(1, length))
    total = sum(block.documents * block.length for block in blocks)
    ids, positions = np.zeros(total, np.int64), np.zeros(total, np.int64)
    starts, rows, labels = [0] * len(documents), [], []
    start, waiting = 0, iter(order)
    for block in blocks:
        for _ in range(block.documents):
            index = next(waiting)
            document, n = documents[index], len(documents[index].ids)
            ids[start : start + n] = document.ids
            positions[start : start + block.length] = np.arange(block.length)
            first = max(document.first_label, 1)  # nothing predicts a document's first token
            rows.append(np.arange(start + first - 1, start + n - 1))
            labels.append(document.ids[first:].astype(np.int64))
            starts[index] = start
            start += block.length

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        input_ids=tensor(ids)[None],
        position_ids=tensor(positions)[None],
        blocks=tuple(blocks),
        label_rows=tensor(np.concatenate(rows)),
        labels=tensor(np.concatenate(labels)),
        starts=tuple(starts),
        tokens=sum(lengths),
    )


def hidden_states(model: PreTrainedModel | PeftModel, batch: Batch) -> Tensor:
    """Hidden states after the final norm, (T, D), each document by itself."""
    config: Any = causal_lm(model).config
    before = config._attn_implementation
    config._attn_implementation = "documents"  # transformers builds no mask for an implementation that registered none
    try:
        output = trunk(model)(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, blocks=batch.blocks)
    finally:
        config._attn_implementation = before
    return output.last_hidden_state[0]


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """(1, heads, T, head_dim) three times -> (1, T, heads, head_dim)."""
    blocks: tuple[Block, ...] = kwargs.pop("blocks")
    sizes = [block.documents * block.length for block in blocks]

    def attend(*row: Tensor) -> Tensor:
        # split, not slices: the gradient of a slice is a whole row of zeros around it.
        parts = zip(blocks, *(tensor[0].split(sizes, dim=1) for tensor in row), strict=True)
        outputs = []
        for block, *qkv in parts:
            q, k, v = (tensor.unflatten(1, block).transpose(0, 1) for tensor in qkv)
            output, _ = sdpa_attention_forward(module, q, k, v, None, **kwargs)
            outputs.append(output.flatten(0, 1))
        return torch.cat(outputs)[None]

    if query.is_cuda or query.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return attend(query, key, value), None
    return cast(Tensor, _AtHighestPrecision.apply(attend, query, key, value)), None


class _AtHighestPrecision(torch.autograd.Function):
    """Run a function, forward and backward, outside optim.fast_matmul: attention is made of products too small for oneDNN."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        with optim.matmul_precision("highest"), torch.set_grad_enabled(any(ctx.needs_input_grad)):
            ctx.inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
            ctx.output = function(*ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [tensor for tensor in ctx.inputs if tensor.requires_grad]
        with optim.matmul_precision("highest"):
            found = iter(torch.autograd.grad(ctx.output, wanted, grads[0]))
        del ctx.output
        return None, *(next(found) if tensor.requires_grad else None for tensor in ctx.inputs)


AttentionInterface.register("documents", _attention)
