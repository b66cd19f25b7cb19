"""Schedules on paper, and AdamW's groups."""

import math

import pytest
import torch

from tasks import optim


def test_the_rate_climbs_in_equal_steps_and_the_cosine_is_halfway_in_the_middle():
    assert [optim.warmup_cosine(step, 108, 8) for step in range(4)] == pytest.approx([1 / 9, 2 / 9, 3 / 9, 4 / 9])
    assert optim.warmup_cosine(8, 108, 8) == 1
    assert optim.warmup_cosine(58, 108, 8) == pytest.approx(0.5)
    assert optim.warmup_cosine(108, 108, 8) == pytest.approx(0)


def test_a_floor_is_where_the_rate_ends():
    assert optim.warmup_cosine(100, 100, 0, floor=0.1) == pytest.approx(0.1)
    assert optim.warmup_linear(100, 100, 0, floor=0.1) == pytest.approx(0.1)


def test_the_straight_line_loses_as_much_at_every_step():
    assert [optim.warmup_linear(step, 4, 0) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]


def test_norms_and_biases_are_not_decayed():
    layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    optimizer = optim.adamw(layers.parameters(), 0.1, weight_decay=0.5)
    for parameter in layers.parameters():
        parameter.data.fill_(1)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # AdamW without a gradient only decays: w -= lr * decay * w (https://arxiv.org/abs/1711.05101).
    assert torch.allclose(layers[0].weight, torch.full((3, 3), 0.95))
    assert all(torch.equal(p, torch.ones(3)) for p in (layers[0].bias, layers[1].weight, layers[1].bias))


def test_a_number_that_is_none_ends_the_run_and_names_the_setting():
    with pytest.raises(ValueError, match=r"loss is nan at step 7: lower sft\.learning_rate"):
        optim.finite(math.nan, "loss", 7, "sft.learning_rate")


def test_fast_products_are_still_exact_and_the_setting_goes_back():
    torch.manual_seed(0)
    a, b = torch.randn(300, 200), torch.randn(200, 100)
    before = torch.get_float32_matmul_precision()
    with optim.fast_matmul(torch.nn.Linear(2_100, 2_000)):
        error = (a @ b - (a.double() @ b.double())).abs().max()
    assert error < 1e-4
    assert torch.get_float32_matmul_precision() == before
