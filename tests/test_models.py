"""Models and adapters: what every later step relies on."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tasks import models, packing, quantized
from tasks.packing import Document, collate
from tasks.sft.config import LoRAConfig

LORA = LoRAConfig(r=4, alpha=8, dropout=0.0)
IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]


@pytest.fixture
def model(tiny_model):
    return models.load_model(tiny_model / "model", "fp32", "cpu")


def run(model, ids=None):
    rows, mask = models.pad_right(ids or IDS, 1, "cpu")
    with torch.no_grad():
        return models.logits(model, models.hidden_states(model, rows, mask))


def scramble(model, name, seed=0):
    """An adapter with random B, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in models.adapter_parameters(model, name):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def test_hidden_states_and_head_together_are_the_model(model):
    rows, mask = models.pad_right(IDS[:1], 1, "cpu")
    with torch.no_grad():
        expected = model(rows).logits
    assert mask.all()
    assert torch.equal(run(model, IDS[:1]), expected)


def test_a_row_gives_the_same_alone_and_beside_a_longer_one(model):
    assert torch.allclose(run(model)[1, :3], run(model, IDS[1:])[0], atol=1e-5)


def test_padding_on_the_left_changes_nothing(model):
    rows = torch.tensor([[1, 1, 11, 12, 13]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    with torch.no_grad():
        left = models.logits(model, models.hidden_states(model, rows, mask))
    assert torch.allclose(left[0, 2:], run(model, IDS[1:])[0], atol=1e-5)


def test_the_mask_comes_from_lengths_so_a_pad_id_inside_a_text_counts():
    rows, mask = models.pad_right([[7, 1, 1], [7]], 1, "cpu")
    assert rows.tolist() == [[7, 1, 1], [7, 1, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_fresh_adapter_leaves_the_base_bit_for_bit(model):
    base = run(model)
    adapted = models.add_lora(model, LORA, "policy", seed=1)
    assert torch.equal(run(adapted), base)


def test_without_adapter_the_trained_model_is_the_base_bit_for_bit(model):
    base = run(model)
    adapted = models.add_lora(model, LORA, "policy", seed=1)
    scramble(adapted, "policy")
    assert not torch.allclose(run(adapted), base, atol=1e-3)
    with models.use(adapted, None):
        assert torch.equal(run(adapted), base)
    assert not torch.allclose(run(adapted), base, atol=1e-3)


def test_each_of_two_adapters_answers_for_itself_and_both_stay_trainable(model):
    adapted = models.add_lora(model, LORA, "policy", seed=1)
    scramble(adapted, "policy", 1)
    alone = run(adapted)
    adapted = models.add_lora(adapted, LORA, "value", seed=2)
    scramble(adapted, "value", 2)
    with models.use(adapted, "policy"):
        assert torch.equal(run(adapted), alone)
    with models.use(adapted, "value"):
        assert not torch.allclose(run(adapted), alone, atol=1e-3)
    assert all(p.requires_grad for name in ("policy", "value") for p in models.adapter_parameters(adapted, name))


def test_use_goes_back_to_what_was_active_even_after_an_error(model):
    adapted = models.add_lora(model, LORA, "policy", seed=1)
    scramble(adapted, "policy")
    before = run(adapted)
    with pytest.raises(RuntimeError), models.use(adapted, None):
        raise RuntimeError
    assert torch.equal(run(adapted), before)


def test_gradients_reach_only_the_active_adapter(model):
    adapted = models.add_lora(models.add_lora(model, LORA, "policy", seed=1), LORA, "value", seed=2)
    rows, mask = models.pad_right(IDS, 1, "cpu")
    with models.use(adapted, "policy"):
        models.hidden_states(adapted, rows, mask).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in models.adapter_parameters(adapted, "policy"))
    assert all(p.grad is None for p in models.adapter_parameters(adapted, "value"))
    assert all(p.grad is None for name, p in adapted.named_parameters() if "lora_" not in name)


def test_an_adapter_covers_every_linear_layer_but_the_head(model):
    assert models.lora_targets(model) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_the_same_seed_makes_the_same_adapter_and_leaves_the_random_stream(tiny_model):
    def fresh(seed):
        loaded = models.load_model(tiny_model / "model", "fp32", "cpu")
        return models.adapter_parameters(models.add_lora(loaded, LORA, "policy", seed), "policy")[0].detach().clone()

    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = fresh(5)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, fresh(5))
    assert not torch.equal(first, fresh(6))


def test_a_saved_adapter_comes_back_under_any_name(model, tiny_model, tmp_path):
    adapted = models.add_lora(model, LORA, "policy", seed=1)
    scramble(adapted, "policy")
    models.save_lora(adapted, tmp_path / "a", "policy")
    again = models.load_lora(models.load_model(tiny_model / "model", "fp32", "cpu"), tmp_path / "a", "other", trainable=False)
    assert torch.equal(run(again), run(adapted))
    assert not any(p.requires_grad for p in again.parameters())
    fresh = models.add_lora(models.load_model(tiny_model / "model", "fp32", "cpu"), LORA, "new", seed=1)
    both = models.load_lora(fresh, tmp_path / "a", "old", trainable=True)
    assert torch.equal(run(both), run(adapted))
    assert all(p.requires_grad for name in ("new", "old") for p in models.adapter_parameters(both, name))


def test_saving_twice_gives_the_same_bytes_and_no_path(model, tmp_path):
    adapted = models.add_lora(model, LORA, "policy", seed=1)
    for folder in ("a", "b"):
        models.save_lora(adapted, tmp_path / folder, "policy")
    for name in ("adapter_config.json", models.ADAPTER_WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "/" not in (tmp_path / "a" / "adapter_config.json").read_text()
    assert not any("policy" in key for key in load_file(tmp_path / "a" / models.ADAPTER_WEIGHTS))


def test_on_a_bf16_base_the_adapter_is_fp32(tiny_model):
    adapted = models.add_lora(models.load_model(tiny_model / "model", "bf16", "cpu"), LORA, "policy", seed=1)
    assert {p.dtype for p in models.adapter_parameters(adapted, "policy")} == {torch.float32}
    assert {p.dtype for name, p in adapted.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    assert run(adapted).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-6), ("bf16", 0.03)])
def test_merged_logits_are_those_of_base_and_adapter(tiny_model, dtype, tolerance):
    adapted = models.add_lora(models.load_model(tiny_model / "model", dtype, "cpu"), LORA, "policy", seed=1)
    scramble(adapted, "policy")
    expected = run(adapted)
    model = models.merged(adapted, "policy")
    assert {p.dtype for p in model.parameters()} == {models.DTYPES[dtype]}
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert (run(model) - expected).square().mean().sqrt() < tolerance * expected.std()


def test_an_unknown_adapter_is_refused(model):
    with pytest.raises(ValueError, match="no adapter 'policy'"), models.use(model, "policy"):
        pass
    adapted = models.add_lora(model, LORA, "policy", seed=1)
    with pytest.raises(ValueError, match=r"'reward'; it has \['policy'\]"), models.use(adapted, "reward"):
        pass


def test_an_adapter_of_another_shape_is_refused(model, tiny_model, tmp_path):
    models.save_lora(models.add_lora(model, LORA, "policy", seed=1), tmp_path, "policy")
    state = load_file(tmp_path / models.ADAPTER_WEIGHTS)
    state.pop(min(state))
    from safetensors.torch import save_file

    save_file(state, tmp_path / models.ADAPTER_WEIGHTS)
    with pytest.raises(ValueError, match="not one for this model"):
        models.load_lora(models.load_model(tiny_model / "model", "fp32", "cpu"), tmp_path, "policy", trainable=False)
    with pytest.raises(ValueError, match="no LoRA adapter here"):
        models.load_lora(model, tmp_path / "absent", "policy", trainable=False)


def test_a_folder_without_tokenizer_or_with_pad_equal_to_eos_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="a model without a tokenizer"):
        models.load_tokenizer(tmp_path)
    tokenizer = models.load_tokenizer(tiny_model / "model")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="eos as its pad token"):
        models.load_tokenizer(tmp_path)


def test_a_model_with_a_weight_missing_is_refused(tiny_model, tmp_path):
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(tiny_model / "model", tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state.pop("model.norm.weight")
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing.*model\.norm\.weight"):
        models.load_model(tmp_path / "model", "fp32", "cpu")


def packed(*lengths):
    rng = np.random.default_rng(0)
    return collate([Document(rng.integers(2, 250, n).astype(np.int32), 1) for n in lengths], "cpu")


def gradients(model, batch, name="policy"):
    for parameter in models.adapter_parameters(model, name):
        parameter.grad = None
    with models.use(model, name):
        loss = packing.hidden_states(model, batch).square().sum()
    loss.backward()  # outside of `use`, as PPO does
    return [p.grad.clone() for p in models.adapter_parameters(model, name)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_recomputed_layers_give_the_same_gradients_bit_for_bit(training, quantization, tiny_model):
    """Also in eval mode, where PPO runs, with dropout, packed, and with another adapter active by the time of the backward pass."""
    model = models.load_model(tiny_model / "model", "fp32", "cpu", quantization)
    model = models.add_lora(model, LoRAConfig(r=4, alpha=8, dropout=0.1), "policy", seed=1)
    model = models.add_lora(model, LORA, "value", seed=2).train(training)
    scramble(model, "policy", 1)
    scramble(model, "value", 2)
    batch = packed(12, 40, 9)
    torch.manual_seed(0)
    expected = gradients(model, batch)
    models.checkpoint_gradients(model)
    kept = []
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        actual = gradients(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in actual)
    assert sum(t.numel() for t in kept) < 25 * batch.input_ids.numel() * 32  # of hidden size 32: nothing of a layer's inside


@pytest.mark.parametrize(("quantization", "spread"), [("8bit", 0.05), ("4bit", 1.0)])
def test_a_quantised_model_is_the_same_in_training_and_in_evaluation(quantization, spread, tiny_model):
    exact = models.load_model(tiny_model / "model", "fp32", "cpu")
    model = models.load_model(tiny_model / "model", "fp32", "cpu", quantization)
    expected = run(model)
    assert torch.equal(run(model.train()), expected)
    assert 0 < models.compare_logits(run(exact), expected)["rms_error"] < spread
    # Embedding and head keep all their bits.
    assert torch.equal(model.get_input_embeddings().weight, exact.get_input_embeddings().weight)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(quantized.quantised_layers(model)) == 14


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_on_a_quantised_base_gradients_are_those_of_its_rounded_weights(dtype, quantization, tiny_model):
    """Also after an evaluation, which in bitsandbytes' own 4 bits leaves them zero on some CPUs, without an error."""
    model = models.load_model(tiny_model / "model", dtype, "cpu", quantization)
    plain = models.load_model(tiny_model / "model", dtype, "cpu")
    rounded = [quantized.dequantised(layer, plain.dtype) for layer in quantized.quantised_layers(model)]
    linear = [m for m in models.trunk(plain).modules() if isinstance(m, torch.nn.Linear)]
    for layer, weight in zip(linear, rounded, strict=True):
        layer.weight.data = weight
    both = [models.add_lora(m, LORA, "policy", seed=1).eval() for m in (model, plain)]
    for m in both:
        scramble(m, "policy")
        run(m)
    actual, expected = (gradients(m, packed(12, 40, 9)) for m in both)
    assert all(g.abs().sum() > 0 for g in actual)
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= (1e-5 if dtype == "fp32" else 0.05) * b.abs().max()


def test_merging_into_rounded_weights_is_refused(tiny_model):
    adapted = models.add_lora(models.load_model(tiny_model / "model", "fp32", "cpu", "8bit"), LORA, "policy", seed=1)
    with pytest.raises(ValueError, match="cannot merge an adapter into quantised weights"):
        models.merged(adapted, "policy")


def test_logits_are_compared_a_few_rows_at_a_time_and_the_numbers_are_those_of_the_whole(monkeypatch):
    torch.manual_seed(0)
    expected = 5 + 3 * torch.randn(50, 40)
    actual = expected + 0.1 * torch.randn(50, 40)
    monkeypatch.setattr(models, "LOGITS_AT_ONCE", 7 * 40)
    found = models.compare_logits(expected, actual)
    error, spread = (actual - expected).double(), expected.double().std()
    turned = (expected - expected.roll(1, -1)).sign() != (actual - actual.roll(1, -1)).sign()
    assert found["rms_error"] == pytest.approx(float(error.square().mean().sqrt() / spread), rel=1e-9)
    assert found["max_error"] == pytest.approx(float(error.abs().max() / spread), rel=1e-6)
    assert found["pair_flips"] == pytest.approx(float(turned.double().mean()), rel=1e-9)


def test_a_model_rounded_anew_may_differ_by_two_roundings_and_no_more():
    torch.manual_seed(0)
    exact, noise = torch.randn(20, 50), 0.05 * torch.randn(3, 20, 50)
    rounding = models.compare_logits(exact, exact + noise[0])
    result = models.check_requantised(exact + noise[0], exact + noise[1], rounding, "fp32")
    assert result["rms_error"] == pytest.approx(0.05 * 2**0.5, rel=0.1)
    with pytest.raises(ValueError, match="quantising the merged model changed it"):
        models.check_requantised(exact + noise[0], exact + 3 * noise[1], rounding, "fp32")
