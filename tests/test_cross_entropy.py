"""The fused head against torch's own cross-entropy."""

import math

import pytest
import torch

from tasks import cross_entropy
from tasks.cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("chunk", [7, 2**21])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_those_of_torch(chunk, bias, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk * 11)
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 11, bias=bias)
    hidden, labels = torch.randn(20, 5, requires_grad=True), torch.randint(0, 11, (20,))
    results = []
    for loss in (
        lambda: linear_cross_entropy(hidden, head, labels),
        lambda: torch.nn.functional.cross_entropy(head(hidden), labels, reduction="sum"),
    ):
        hidden.grad = None
        head.zero_grad()
        value = loss()
        (value / 3).backward()
        results.append([value.detach(), hidden.grad, *(p.grad for p in head.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_equal_logits_cost_log_of_the_vocabulary():
    head = torch.nn.Linear(4, 8, bias=False).requires_grad_(False)
    head.weight.zero_()
    assert math.isclose(
        float(linear_cross_entropy(torch.randn(3, 4), head, torch.tensor([0, 5, 7]))), 3 * math.log(8), rel_tol=1e-6
    )


def test_a_frozen_head_gets_no_gradient():
    head = torch.nn.Linear(4, 8, bias=False).requires_grad_(False)
    hidden = torch.randn(3, 4, requires_grad=True)
    linear_cross_entropy(hidden, head, torch.tensor([0, 5, 7])).backward()
    assert hidden.grad is not None
    assert head.weight.grad is None
