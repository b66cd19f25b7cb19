"""The fused LoRA layers against PEFT's own, forward and backward."""

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer

from tasks import lora, models, packing
from tasks.packing import Document
from tasks.sft.config import LoRAConfig


def pair(tiny_model, dtype, quantization, dropout):
    """Two equal models, the first with the fused layers, the second with PEFT's own."""
    both = []
    for fused in (True, False):
        model = models.load_model(tiny_model / "model", dtype, "cpu", quantization)
        model = models.add_lora(model, LoRAConfig(r=4, alpha=8, dropout=dropout), "policy", seed=1).train()
        generator = torch.Generator().manual_seed(0)
        for parameter in models.adapter_parameters(model, "policy"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        assert len(layers) == 14
        assert all("forward" in vars(layer) for layer in layers)
        if not fused:
            for layer in layers:
                del layer.forward
        both.append(model)
    return both


def outcome(model, seed=0):
    torch.manual_seed(seed)
    ids = torch.arange(3, 43).view(2, 20)
    hidden = models.hidden_states(model, ids, torch.ones_like(ids))
    weight = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)
    (hidden.float() * weight).sum().backward()
    return [hidden.detach().float(), *(p.grad for p in models.adapter_parameters(model, "policy"))]


def error(actual, expected):
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_outputs_and_gradients_are_peft_s(quantization, tiny_model):
    fused, peft = (outcome(model) for model in pair(tiny_model, "fp32", quantization, 0.0))
    assert max(error(actual, expected) for actual, expected in zip(fused, peft, strict=True)) <= 1e-5


def test_in_bf16_they_are_as_near_to_the_truth_as_peft_s(tiny_model):
    fused, peft = pair(tiny_model, "bf16", "none", 0.0)
    exact, _ = pair(tiny_model, "fp32", "none", 0.0)
    for wide, narrow in zip(exact.base_model.parameters(), fused.base_model.parameters(), strict=True):
        wide.data = narrow.data.float()
    truth = outcome(exact)
    errors = [[error(a, e) for a, e in zip(outcome(model), truth, strict=True)] for model in (fused, peft)]
    assert max(errors[0]) < 0.1
    assert sum(errors[0]) < 1.25 * sum(errors[1])


def test_dropout_keeps_the_mean_and_its_gradient_is_that_of_the_same_mask(tiny_model):
    model, _ = pair(tiny_model, "fp32", "none", 0.5)
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    x = torch.ones(1, 4_000, 32, requires_grad=True)
    a, b = layer.lora_A["policy"].weight, layer.lora_B["policy"].weight
    base = torch.nn.functional.linear(x, layer.base_layer.weight)
    added = layer(x) - base
    low = torch.full((32,), 2.0) @ a.T @ b.T  # scale alpha / r = 2
    assert torch.allclose(added.mean(1)[0], low, atol=0.1)
    assert added.std(1).min() > 0
    # The map is linear in x for a fixed mask: its gradient, summed against x, is its value.
    added.sum().backward()
    assert torch.allclose((x.grad * x).sum(), added.sum(), rtol=1e-3)
    gradient_b = b.grad.clone()
    assert torch.allclose((gradient_b * b).sum(), added.sum(), rtol=1e-3)
    assert torch.allclose((a.grad * a).sum(), added.sum(), rtol=1e-3)


def test_nothing_is_kept_for_a_gradient_of_the_frozen_weights(tiny_model):
    fused, peft = pair(tiny_model, "fp32", "none", 0.0)
    sizes = []
    for model in (fused, peft):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            outcome(model)
        sizes.append(sum(kept.values()))
    assert sizes[0] <= sizes[1]


def test_layers_whose_base_is_trained_keep_peft_s_forward(tiny_model):
    fused, _ = pair(tiny_model, "fp32", "none", 0.0)
    layer = next(module for module in fused.modules() if isinstance(module, LoraLayer))
    layer.base_layer.weight.requires_grad_(True)
    layer(torch.ones(1, 3, 32)).sum().backward()
    assert layer.base_layer.weight.grad.abs().sum() > 0
    lora.speed_up(fused)  # a second time changes nothing
    assert torch.equal(layer(torch.ones(1, 3, 32)), layer(torch.ones(1, 3, 32)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_gated_mlp_gives_transformers_bits_and_keeps_less(dtype, tiny_model):
    results, kept = [], []
    for ours in (True, False):
        model = models.load_model(tiny_model / "model", dtype, "cpu").requires_grad_(True)
        mlps = [layer.mlp for layer in model.model.layers]
        assert all("forward" in vars(mlp) for mlp in mlps)
        for mlp in mlps if not ours else []:
            del mlp.forward
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            loss = (
                packing.hidden_states(model, packing.collate([Document(np.arange(5, 45, dtype=np.int32), 1)], "cpu")).float().sum()
            )
        kept.append(sum(sizes.values()))
        loss.backward()
        results.append([loss, *(p.grad for p in model.model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] - kept[0] >= 2 * 40 * 64  # layers, tokens, intermediate size: silu(gate)
