"""Documents of many lengths, and trees of answers to one prompt, in one forward pass: nothing is padded to the longest.

All tokens of a batch stand in one row, documents sorted by length. Everything but attention looks at one token at a time,
and does not notice. Attention (tasks.attention) runs over blocks of similarly long documents. Within a block a document is
filled up at its end; causal attention never looks there. In a tree the prompt stands once, as a document, and each branch sees
it and itself: what a prompt's tokens are does not depend on what comes after them. So every document and every branch gets what
it would get alone, on CPU and CUDA alike.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from tasks.attention import Block, Layout, Shared, attention
from tasks.models import causal_lm, trunk

WINDOW = 1_024  # documents packed together; packing all at once would sort the whole epoch by length
LONGEST_FILL = 0.1  # of a block's length


class Document(NamedTuple):
    """A text in tokens, and which of them carry loss."""

    ids: np.ndarray  # int32
    first_label: int
    """Tokens from this position on carry loss; the ones before it are only read."""


class Tree(NamedTuple):
    """A prompt, and texts that go on from it, each as if the others were not there."""

    prompt: np.ndarray  # int32
    branches: list[np.ndarray]  # int32, none of them empty


@dataclass(frozen=True)
class Batch:
    """Documents or trees in one row of T tokens; N of the tokens are predicted."""

    input_ids: Tensor
    """(1, T)"""
    position_ids: Tensor
    """(1, T), from 0 in every document, from the prompt's length in every branch."""
    layout: Layout
    label_rows: Tensor
    """(N,): positions in the row whose next token is predicted; none in trees."""
    labels: Tensor
    """(N,): those next tokens."""
    starts: tuple[int, ...]
    """Where each of the given documents, or each tree's prompt, begins in the row, in the order they were given."""
    branch_ends: Tensor
    """(branches of all trees,): the row of each branch's last token, in the order they were given; none of documents."""
    tokens: int
    """Tokens of the documents or trees, fill not counted."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.layout.blocks


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
    row = _Row()
    starts = row.add([document.ids for document in documents])
    rows, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start, document in zip(starts, documents, strict=True):
        first = max(document.first_label, 1)  # nothing predicts a document's first token
        rows.append(np.arange(start + first - 1, start + len(document.ids) - 1))
        labels.append(document.ids[first:].astype(np.int64))
    return row.batch(device, starts, np.concatenate(rows), np.concatenate(labels), np.zeros(0, np.int64))


def collate_trees(trees: Sequence[Tree], device: torch.device | str) -> Batch:
    """Trees -> one row: the prompts, then the branches tree after tree.

    A tree of one branch is a document: there is nothing to share, and one call does its attention.
    """
    row = _Row()
    shared = [tree for tree in trees if len(tree.branches) != 1]
    whole = [np.concatenate([tree.prompt, tree.branches[0]]) for tree in trees if len(tree.branches) == 1]
    starts = iter(row.add(whole + [tree.prompt for tree in shared]))
    begins = iter([next(starts) for _ in whole]), starts
    tree_starts, ends = [], []
    for tree in trees:
        if len(tree.branches) == 1:
            start = next(begins[0])
            ends.append(start + len(tree.prompt) + len(tree.branches[0]) - 1)
        else:
            start = next(begins[1])
            firsts = row.add(tree.branches, after=(start, len(tree.prompt)))
            ends += [first + len(branch) - 1 for first, branch in zip(firsts, tree.branches, strict=True)]
        tree_starts.append(start)
    none = np.zeros(0, np.int64)
    return row.batch(device, tree_starts, none, none, np.array(ends, np.int64))


class _Row:
    """A row in the making."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.blocks: list[Block] = []
        self.shared: list[Shared] = []
        self.length = 0
        self.tokens = 0

    def add(self, texts: Sequence[np.ndarray], after: tuple[int, int] | None = None) -> list[int]:
        """Append texts in blocks of similar length, the longest first; `after`: they go on from a prompt (its row, its length).

        Returns where each begins, in the order given.
        """
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        borders = [0]  # of blocks, in `order`
        for place, index in enumerate(order):
            if len(texts[index]) < len(texts[order[borders[-1]]]) * (1 - LONGEST_FILL):
                borders.append(place)
        starts, begin = [0] * len(texts), self.length
        for first, last in pairwise([*borders, len(order)]):
            length = len(texts[order[first]]) if order else 0
            for index in order[first:last]:
                ids = np.zeros(length, np.int64)
                ids[: len(texts[index])] = texts[index]
                starts[index] = self.length
                self.ids.append(ids)
                self.positions.append(np.arange(length) + (after[1] if after else 0))
                self.length += length
            if last > first:
                self.blocks.append(Block(last - first, length))
        if after and texts:
            self.shared.append(Shared(begin, self.length, after[0], sum(after)))
        self.tokens += sum(map(len, texts))
        return starts

    def batch(
        self, device: torch.device | str, starts: Sequence[int], label_rows: np.ndarray, labels: np.ndarray, ends: np.ndarray
    ) -> Batch:
        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        return Batch(
            input_ids=tensor(np.concatenate(self.ids))[None],
            position_ids=tensor(np.concatenate(self.positions))[None],
            layout=Layout(tuple(self.blocks), tuple(self.shared)),
            label_rows=tensor(label_rows),
            labels=tensor(labels),
            starts=tuple(starts),
            branch_ends=tensor(ends),
            tokens=self.tokens,
        )


def hidden_states(model: PreTrainedModel | PeftModel, batch: Batch) -> Tensor:
    """Hidden states after the final norm, (T, D), each document and each branch by itself."""
    config: Any = causal_lm(model).config
    before = config._attn_implementation
    config._attn_implementation = "packed"  # transformers builds no mask for an implementation that registered none
    try:
        output = trunk(model)(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, layout=batch.layout)
    finally:
        config._attn_implementation = before
    return output.last_hidden_state[0]


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """(1, heads, T, head_dim) three times -> (1, T, heads, head_dim)."""
    layout: Layout = kwargs["layout"]
    window = kwargs.get("sliding_window")
    longest = max(block.length for block in layout.blocks)
    if window is not None and longest + max((s.prompt_stop - s.prompt for s in layout.shared), default=0) > window:
        raise ValueError(f"this model's attention sees {window} tokens back, and a text has more: lower the maximal lengths")
    kind = query.device.type
    # under autocast rotary positions leave queries and keys in fp32, and values in bf16
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    q, k, v = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    return attention(q, k, v, layout, kwargs.get("scaling"), kwargs.get("dropout") or 0.0)[None], None


AttentionInterface.register("packed", _attention)
