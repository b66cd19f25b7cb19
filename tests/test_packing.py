"""Packed documents must not notice each other, and must get what they would get alone."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

from tasks import models, optim, packing
from tasks.packing import Block, Document

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES = {
    "llama, grouped heads": LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.2),
    "qwen2, with biases": Qwen2Config(**SIZES, num_key_value_heads=4, initializer_range=0.2),
    "gpt-neox": GPTNeoXConfig(**SIZES, initializer_range=0.2),
    "gpt2, absolute positions": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2),
}


def documents(*lengths, seed=0, first_label=2):
    rng = np.random.default_rng(seed)
    return [Document(rng.integers(0, 300, n).astype(np.int32), first_label) for n in lengths]


def language_model(name="llama, grouped heads"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(ARCHITECTURES[name], attn_implementation="sdpa").eval()


def packed_logits(model, docs):
    batch = packing.collate(docs, "cpu")
    with torch.no_grad():
        hidden = packing.hidden_states(model, batch)
        return [models.logits(model, hidden[s : s + len(d.ids)]) for s, d in zip(batch.starts, docs, strict=True)]


def alone(model, document):
    with torch.no_grad():
        return model(torch.tensor(document.ids, dtype=torch.long)[None]).logits[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("fast", [False, True])
def test_packed_logits_are_those_of_each_document_alone(name, fast):
    model, docs = language_model(name), documents(5, 30, 29, 12, 7, 30)
    with optim.matmul_precision("medium" if fast else "highest"):
        packed = packed_logits(model, docs)
    for document, logits in zip(docs, packed, strict=True):
        assert torch.allclose(logits, alone(model, document), atol=1e-5)


def test_changing_one_document_leaves_the_others_bit_for_bit():
    model, docs = language_model(), documents(30, 29, 28, 12)
    before = packed_logits(model, docs)
    docs[1] = documents(29, seed=9)[0]
    after = packed_logits(model, docs)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize("fast", [False, True])
def test_packed_gradients_are_the_sum_of_those_of_each_document_alone(fast):
    model, docs = language_model(), documents(9, 21, 20)
    with optim.matmul_precision("medium" if fast else "highest"):
        batch = packing.collate(docs, "cpu")
        hidden = packing.hidden_states(model, batch)[batch.label_rows]
        torch.nn.functional.cross_entropy(models.logits(model, hidden), batch.labels, reduction="sum").backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for document in docs:
        ids = torch.tensor(document.ids, dtype=torch.long)
        logits = model(ids[None]).logits[0, 1:-1]  # of the tokens from 2 on
        torch.nn.functional.cross_entropy(logits, ids[2:], reduction="sum").backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(packed[name], parameter.grad, atol=1e-4), name


def test_the_usual_attention_is_back_after_a_packed_pass():
    model = language_model()
    packed_logits(model, documents(5, 6))
    assert model.config._attn_implementation == "sdpa"


def test_every_label_is_the_token_after_its_row():
    docs = [Document(np.arange(10, 16, dtype=np.int32), 3), Document(np.arange(20, 24, dtype=np.int32), 0)]
    batch = packing.collate(docs, "cpu")
    assert batch.labels.tolist() == [13, 14, 15, 21, 22, 23]
    assert (batch.input_ids[0, batch.label_rows] + 1).tolist() == batch.labels.tolist()
    assert batch.tokens == 10


def test_positions_begin_at_zero_in_every_document():
    batch = packing.collate(documents(4, 9), "cpu")
    assert batch.position_ids[0].tolist() == [*range(9), *range(4)]
    assert batch.blocks == (Block(1, 9), Block(1, 4))


def test_fill_is_at_most_a_tenth():
    lengths = np.random.default_rng(0).integers(20, 500, 200)
    batch = packing.collate(documents(*lengths), "cpu")
    assert batch.tokens == lengths.sum()
    assert batch.input_ids.shape[1] < batch.tokens / 0.9


def test_best_fit_on_paper():
    # 6 opens a row of 10, 5 a second; 4 fills the first to the brim, 3 goes to the second, 2 finishes it.
    assert packing.best_fit([2, 4, 6, 3, 5], 10) == [[2, 1], [4, 3, 0]]


def test_rows_hold_every_document_once_and_never_overflow():
    lengths = list(np.random.default_rng(1).integers(1, 100, 3_000))
    rows = packing.best_fit(lengths, 256)
    assert sorted(i for row in rows for i in row) == list(range(3_000))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 256
    assert len(rows) <= 1.02 * sum(lengths) / 256


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="11 tokens does not fit into a row of 10"):
        packing.best_fit([11], 10)


def test_every_epoch_has_each_document_once_in_an_order_of_its_own():
    epochs: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for epoch, row in packing.endless_rows([7] * 50, 20, seed=3):
        if epoch == 3:
            break
        epochs[epoch] += row
    assert all(sorted(order) == list(range(50)) for order in epochs.values())
    assert epochs[0] != epochs[1] != epochs[2]
    again = packing.endless_rows([7] * 50, 20, seed=3)
    assert [i for _ in range(25) for i in next(again)[1]] == epochs[0]
