"""Which models the decoder takes, and that what it takes it runs as the library does."""

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tasks import decoder
from tasks.decoder import decoder_for, fold_bytes
from tasks.models import add_lora, causal_lm, use
from tasks.sft.config import LoRAConfig

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LIKE_LLAMA = [
    (LlamaForCausalLM, LlamaConfig, {}),
    (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3, "head_dim": 8}),
    (MistralForCausalLM, MistralConfig, {"sliding_window": 64}),
    (Qwen2ForCausalLM, Qwen2Config, {}),
    (GemmaForCausalLM, GemmaConfig, {"head_dim": 16}),
]
UNLIKE = [
    (MistralForCausalLM, MistralConfig, {"sliding_window": 48}),  # shorter than the room that is asked for
    (LlamaForCausalLM, LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 8.0}}),
    (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),  # norms inside attention
    (GraniteForCausalLM, GraniteConfig, {"residual_multiplier": 0.5}),  # Llama's names, other arithmetic: the probe finds out
]
ROOM = 60


def build(kind, config, changes):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15, "pad_token_id": 1,
    }  # fmt: skip
    model = kind(config(**shape | changes)).eval().requires_grad_(False)
    peft = add_lora(model, LoRAConfig(r=4, alpha=8, dropout=0.0), "policy", 0).eval()
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
        elif name.endswith("bias"):
            parameter.data.normal_()
    return peft


@pytest.mark.parametrize("prefill_tokens", [1, 1_000])
@pytest.mark.parametrize("limit", [2**30, 0])
@pytest.mark.parametrize(("kind", "config", "changes"), LIKE_LLAMA)
def test_prompts_and_steps_give_the_models_own_logits(kind, config, changes, limit, prefill_tokens, monkeypatch):
    monkeypatch.setitem(decoder.PREFILL_TOKENS, "cpu", prefill_tokens)
    model = causal_lm(build(kind, config, changes))
    found = decoder_for(model, ROOM, torch.device("cpu"), limit)
    assert found is not None
    rows = [list(range(length, 2 * length)) for length in (30, 30, 17, 5)]  # the first two are one prompt
    logits = [found.start(rows, 4)[1]]
    rows = [[*row, token] for row, token in zip(rows, (7, 8, 9, 10))]
    logits.append(found.step(torch.tensor([7, 8, 9, 10]))[1])
    found.keep(torch.tensor([1, 3]))
    logits.append(found.step(torch.tensor([11, 12]))[1])
    for step, (kept, ends) in enumerate([([0, 1, 2, 3], []), ([0, 1, 2, 3], []), ([1, 3], [[11], [12]])]):
        for place, row in enumerate(kept):
            ids = rows[row][: len(rows[row]) - (step == 0)] + (ends[place] if ends else [])
            expected = model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert torch.allclose(logits[step][place], expected, atol=2e-5)


@pytest.mark.parametrize(("kind", "config", "changes"), UNLIKE)
def test_models_that_compute_otherwise_are_left_to_their_own_code(kind, config, changes):
    assert decoder_for(causal_lm(build(kind, config, changes)), ROOM, torch.device("cpu")) is None


def test_with_its_adapter_off_it_is_the_base():
    peft = build(*LIKE_LLAMA[0])
    with use(peft, None):
        found = decoder_for(causal_lm(peft), ROOM, torch.device("cpu"))
        expected = causal_lm(peft)(input_ids=torch.tensor([[3, 4, 5]])).logits[0, -1]
    assert found is not None
    assert torch.allclose(found.start([[3, 4, 5]], 1)[1][0], expected, atol=1e-5)


def test_the_size_of_a_folded_copy_by_hand():
    # a layer: q and o 64 x 64, k and v 32 x 64, gate, up and down 96 x 64; the head 320 x 64; four bytes each
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64
    assert fold_bytes(causal_lm(build(*LIKE_LLAMA[0]))) == 4 * (2 * layer + 320 * 64)
