"""Attention over one packed row of documents and trees: exact, forward and backward, and without a [T, T] mask.

The row is cut into blocks, each a few sequences of one length that see themselves, causally. In a tree, the rows of the branches
see the rows of their prompt besides: attention to both is attention to each, weighted by the exponentials of their logsumexps.
The backward pass of each part takes the *joint* output and logsumexp, and so gives its share of the true gradient (the identity
of ring attention, https://arxiv.org/abs/2310.01889). So no key or value is copied for a branch.
"""

from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from tasks import optim


class Block(NamedTuple):
    """So many sequences of `length` tokens each, fill included, one after the other."""

    documents: int
    length: int


class Shared(NamedTuple):
    """Rows [start, stop), whole blocks, that see the rows [prompt, prompt_stop) too, all of them."""

    start: int
    stop: int
    prompt: int
    prompt_stop: int


class Layout(NamedTuple):
    """How a row of T tokens is cut."""

    blocks: tuple[Block, ...]
    """They cover the row."""
    shared: tuple[Shared, ...] = ()

    def sections(self) -> list[tuple[int, int, Block]]:
        """(start, stop, block) of each block."""
        stops = list(accumulate(block.documents * block.length for block in self.blocks))
        return list(zip([0, *stops], stops, self.blocks, strict=False))


def attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """(T, heads, head_dim) of the queries, (T, kv_heads, head_dim) of keys and values -> (T, heads, head_dim).

    Query heads may be a multiple of key heads. `scale`: of the products, 1 / sqrt(head_dim) when None.
    """
    plain = dropout > 0 or query.shape[-1] != value.shape[-1]
    if not plain and query.device.type == "cpu":
        return cast(Tensor, _OnCPU.apply(query, key, value, layout, scale))
    if not plain and query.is_cuda and query.dtype.itemsize == 2 and query.shape[-1] <= 256 and _has_flash(query.device):
        return cast(Tensor, _OnCUDA.apply(query, key, value, layout, scale))
    return plain_attention(query, key, value, layout, scale, dropout)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """The same with torch's own function alone, block by block: slower, for everything that the kernels below do not take."""
    outputs = []
    for start, stop, block in layout.sections():
        # (n, heads, length, head_dim)
        q, k, v = (tensor[start:stop].unflatten(0, block).transpose(1, 2) for tensor in (query, key, value))
        mask = None
        for shared in layout.shared:
            if shared.start <= start < shared.stop:
                prompt = slice(shared.prompt, shared.prompt_stop)
                k, v = (
                    torch.cat([whole[prompt].transpose(0, 1).expand(len(own), -1, -1, -1), own], dim=2)
                    for whole, own in ((key, k), (value, v))
                )
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=gqa)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Attention to some keys (out (T, H, d), lse (T, H)) becomes, in place, attention to those and the others."""
    joint = torch.logaddexp(lse, other_lse)
    out.copy_(out * (lse - joint).exp()[..., None] + other * (other_lse - joint).exp()[..., None])  # in fp32
    lse.copy_(joint)


class _OnCPU(torch.autograd.Function):
    """torch's flash kernel for CPUs, a call a block. Its products are too small for oneDNN: it runs outside optim.fast_matmul.

    In fp32 also for bf16, in which the kernel takes 1.7 times as long (measured on AVX-512 with head_dim 32).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        given = query, key, value
        query, key, value = (_widened(tensor) for tensor in given)
        out, lse = query.new_empty(query.shape), query.new_empty(query.shape[:2])
        with optim.matmul_precision("highest"):
            for start, stop, block in layout.sections():
                q, k, v = (_sequences(tensor, start, stop, block.documents) for tensor in (query, key, value))
                part, part_lse = flash(q, k, v, 0.0, True, scale=scale)
                _sequences(out, start, stop, block.documents).copy_(part)
                lse[start:stop].unflatten(0, block).copy_(part_lse.transpose(1, 2))
            for start, stop, prompt, prompt_stop in layout.shared:
                q, k, v = _sequences(query, start, stop), *(_sequences(t, prompt, prompt_stop) for t in (key, value))
                part, part_lse = flash(q, k, v, 0.0, False, scale=scale)
                _merge(out[start:stop], lse[start:stop], part[0].transpose(0, 1), part_lse[0].T)
        out = out.to(given[0].dtype)
        ctx.save_for_backward(*given, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad, query, key, value, out, lse = (_widened(tensor) for tensor in (grads[0], *ctx.saved_tensors))
        found = [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
        with optim.matmul_precision("highest"):
            for start, stop, block in ctx.layout.sections():
                g, q, k, v, o = (_sequences(tensor, start, stop, block.documents) for tensor in (grad, query, key, value, out))
                logsumexp = lse[start:stop].unflatten(0, block).transpose(1, 2)
                parts = flash(g, q, k, v, o, logsumexp, 0.0, True, scale=ctx.scale)
                for whole, part in zip(found, parts, strict=True):
                    _sequences(whole, start, stop, block.documents).copy_(part)
            for start, stop, prompt, prompt_stop in ctx.layout.shared:
                g, q, o = (_sequences(tensor, start, stop) for tensor in (grad, query, out))
                k, v = (_sequences(tensor, prompt, prompt_stop) for tensor in (key, value))
                parts = flash(g, q, k, v, o, lse[None, start:stop].transpose(1, 2), 0.0, False, scale=ctx.scale)
                places = ((start, stop), (prompt, prompt_stop), (prompt, prompt_stop))
                for whole, part, place in zip(found, parts, places, strict=True):
                    _sequences(whole, *place).add_(part)
        return *(gradient.to(grads[0].dtype) for gradient in found), None, None


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _sequences(row: Tensor, start: int, stop: int, documents: int = 1) -> Tensor:
    """Rows [start, stop) of (T, heads, head_dim) as a view (documents, heads, length, head_dim)."""
    return row[start:stop].unflatten(0, (documents, -1)).transpose(1, 2)


def _has_flash(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


class _OnCUDA(torch.autograd.Function):
    """Flash attention with lengths that vary: one call for all blocks, one more for all branches and their prompts."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None) -> Tensor:
        flash = torch.ops.aten._flash_attention_forward
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        own, rows, prompts, prompt_rows = _lengths(layout, query.device)
        # out is (T, heads, head_dim), lse (heads, T) in fp32
        out, lse, state, unused, _ = flash(query, key, value, *own, 0.0, True, False, scale=scale)
        if layout.shared:
            q, k, v = query[rows], key[prompt_rows], value[prompt_rows]
            part, part_lse, *_ = flash(q, k, v, *prompts, 0.0, False, False, scale=scale)
            merged, merged_lse = out[rows], lse.T[rows]
            _merge(merged, merged_lse, part, part_lse.T)
            out[rows], lse.T[rows] = merged, merged_lse
        ctx.save_for_backward(query, key, value, out, lse, state, unused)
        ctx.layout, ctx.scale = layout, scale
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flash = torch.ops.aten._flash_attention_backward
        query, key, value, out, lse, state, unused = ctx.saved_tensors
        own, rows, prompts, prompt_rows = _lengths(ctx.layout, query.device)
        grad = grads[0].contiguous()
        found = flash(grad, query, key, value, out, lse, *own, 0.0, True, state, unused, scale=ctx.scale)
        if ctx.layout.shared:
            q, k, v, g, o = query[rows], key[prompt_rows], value[prompt_rows], grad[rows], out[rows]
            parts = flash(g, q, k, v, o, lse[:, rows].contiguous(), *prompts, 0.0, False, state, unused, scale=ctx.scale)
            for whole, part, where in zip(found, parts, (rows, prompt_rows, prompt_rows), strict=True):
                whole[where] += part
        return *found, None, None


def _lengths(layout: Layout, device: torch.device) -> tuple[tuple[Any, ...], Tensor, tuple[Any, ...], Tensor]:
    """(cumulative lengths of queries, of keys, longest of each) of all sequences and of branches with prompts, and their rows."""

    def cumulated(queries: list[int], keys: list[int]) -> tuple[Any, ...]:
        sums = (torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (queries, keys))
        return *sums, max(queries, default=0), max(keys, default=0)

    def rows(borders: list[tuple[int, int]]) -> Tensor:
        return torch.cat([torch.arange(0), *(torch.arange(*border) for border in borders)]).to(device)

    lengths = [block.length for block in layout.blocks for _ in range(block.documents)]
    branches, prompts = [(s.start, s.stop) for s in layout.shared], [(s.prompt, s.prompt_stop) for s in layout.shared]
    sizes = [[stop - start for start, stop in borders] for borders in (branches, prompts)]
    return cumulated(lengths, lengths), rows(branches), cumulated(*sizes), rows(prompts)
