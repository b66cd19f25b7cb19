"""Attention by blocks and prompts against one dense softmax under the mask that it stands for."""

import math

import pytest
import torch

from tasks.attention import Block, Layout, Shared, attention, plain_attention

# two documents of 5, one of 3, which is a prompt too; branches of 2, 2 and 4 that go on from it, and one of 3 from a document
LAYOUT = Layout((Block(2, 5), Block(1, 3), Block(2, 2), Block(1, 4), Block(1, 3)), (Shared(13, 21, 10, 13), Shared(21, 24, 5, 10)))
SEEN_BY = [(0, 5), (5, 10), (10, 13), (13, 15), (15, 17), (17, 21), (21, 24)]


def mask() -> torch.Tensor:
    """True where row i sees row j."""
    sees = torch.zeros(24, 24, dtype=torch.bool)
    for start, stop in SEEN_BY:
        sees[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
    sees[13:21, 10:13] = True
    sees[21:24, 5:10] = True
    return sees


def dense(query, key, value, scale=None):
    """Softmax over all rows, in float64."""
    q, k, v = (t.double().transpose(0, 1) for t in (query, key, value))
    k, v = (t.repeat_interleave(q.shape[0] // k.shape[0], 0) for t in (k, v))
    products = q @ k.transpose(1, 2) * (scale or 1 / math.sqrt(q.shape[-1]))
    return (products.masked_fill(~mask(), -math.inf).softmax(-1) @ v).transpose(0, 1)


def inputs(heads, kv_heads, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, heads, 8), (24, kv_heads, 8), (24, kv_heads, 8)]
    return [torch.randn(s, generator=generator).mul(1.5).to(device, dtype).requires_grad_() for s in shapes]


def outcome(function, tensors, **settings):
    for tensor in tensors:
        tensor.grad = None
    out = function(*tensors, **settings)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out))
    return [out.detach().cpu(), *(tensor.grad.cpu().clone() for tensor in tensors)]


@pytest.mark.parametrize("function", [attention, plain_attention])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_output_and_gradients_are_those_of_the_dense_softmax(function, kv_heads, scale):
    tensors = inputs(4, kv_heads)
    expected = outcome(dense, tensors, scale=scale)
    for ours, theirs in zip(outcome(function, tensors, layout=LAYOUT, scale=scale), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-5, rtol=1e-5)


def test_in_bf16_it_is_the_dense_softmax_to_its_eight_bits():
    tensors = inputs(4, 2, torch.bfloat16)
    for ours, theirs in zip(outcome(attention, tensors, layout=LAYOUT), outcome(dense, tensors), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs.double(), atol=0.03, rtol=0.02)


def test_large_products_do_not_overflow_where_two_softmaxes_are_joined():
    tensors = [tensor.detach().mul(40).requires_grad_() for tensor in inputs(4, 4)]
    for ours, theirs in zip(outcome(attention, tensors, layout=LAYOUT), outcome(dense, tensors), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=2e-2, rtol=1e-3)


def test_dropout_is_honoured():
    tensors = inputs(4, 4)
    torch.manual_seed(0)
    first, second = (attention(*tensors, LAYOUT, dropout=0.5) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention with lengths that vary needs a CUDA device")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_on_cuda_it_is_the_dense_softmax_too(kv_heads):
    tensors = inputs(4, kv_heads, torch.bfloat16, "cuda")
    expected = outcome(dense, inputs(4, kv_heads, torch.bfloat16))
    for ours, theirs in zip(outcome(attention, tensors, layout=LAYOUT), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=0.03, rtol=0.02)
