"""Packed documents and branches must not notice each other, and must get what they would get alone."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2Config

from tasks import models, optim, packing
from tasks.attention import Block
from tasks.packing import Document, Tree

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


def trees(seed=0):
    """One with three branches, one with a single one, one with two alike, one whose prompt is longest."""
    rng = np.random.default_rng(seed)
    sizes = [(7, [4, 9, 1]), (5, [6]), (6, [8, 8]), (15, [2, 3])]
    return [
        Tree(rng.integers(0, 300, p).astype(np.int32), [rng.integers(0, 300, b).astype(np.int32) for b in branches])
        for p, branches in sizes
    ]


def texts(forest):
    """Each branch with its prompt before it."""
    return [Document(np.concatenate([tree.prompt, branch]), 0) for tree in forest for branch in tree.branches]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("fast", [False, True])
def test_the_end_of_each_branch_is_that_of_its_whole_text_alone(name, fast):
    model, forest = language_model(name), trees()
    with optim.matmul_precision("medium" if fast else "highest"), torch.no_grad():
        batch = packing.collate_trees(forest, "cpu")
        ends = models.logits(model, packing.hidden_states(model, batch)[batch.branch_ends])
    for text, logits in zip(texts(forest), ends, strict=True):
        assert torch.allclose(logits, alone(model, text)[-1], atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_through_trees_are_the_sum_of_those_of_each_text_alone(dtype):
    """bf16 keeps 8 bits of every number on the way, and of the gradients' sum too; they agree to a tenth of the largest."""
    model, forest = models.cast_weights(language_model(), dtype), trees()
    batch = packing.collate_trees(forest, "cpu")
    weights = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    (packing.hidden_states(model, batch)[batch.branch_ends] * weights).sum().backward()
    shared = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for text, weight in zip(texts(forest), weights, strict=True):
        (model.base_model(torch.tensor(text.ids, dtype=torch.long)[None]).last_hidden_state[0, -1] * weight).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            error, spread = (shared[name] - parameter.grad.float()).abs().max(), parameter.grad.float().abs().max()
            assert error <= {"fp32": 1e-5, "bf16": 0.1}[dtype] * max(1.0, float(spread)), name


def test_changing_one_branch_leaves_every_other_bit_for_bit():
    model, forest = language_model(), trees()

    def ends(forest):
        batch = packing.collate_trees(forest, "cpu")
        with torch.no_grad():
            return packing.hidden_states(model, batch)[batch.branch_ends]

    before = ends(forest)
    forest[0].branches[1] = trees(seed=9)[0].branches[1]
    assert [torch.equal(a, b) for a, b in zip(before, ends(forest), strict=True)] == [True, False] + [True] * 6


def test_a_prompt_stands_once_and_its_branches_go_on_from_it():
    forest = [Tree(np.array([7, 8, 9], np.int32), [np.array([1], np.int32), np.array([2, 3, 4], np.int32)])]
    batch = packing.collate_trees(forest, "cpu")
    assert batch.input_ids[0].tolist() == [7, 8, 9, 2, 3, 4, 1]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 3]
    assert batch.branch_ends.tolist() == [6, 5]
    assert batch.starts == (0,)
    assert batch.tokens == 7


def test_trees_hold_no_more_than_their_tokens_and_a_tenth():
    forest = [Tree(t.prompt, t.branches * 5) for t in trees()]
    batch = packing.collate_trees(forest, "cpu")
    assert batch.tokens == sum(len(t.prompt) + sum(map(len, t.branches)) for t in forest)
    assert batch.input_ids.shape[1] < batch.tokens / 0.9


@pytest.mark.parametrize("name", ["llama, grouped heads", "gpt-neox"])
def test_in_bf16_packed_logits_are_those_of_each_document_alone_to_its_rounding(name):
    model, docs = models.cast_weights(language_model(name), "bf16"), documents(5, 30, 29, 12)
    for document, logits in zip(docs, packed_logits(model, docs), strict=True):
        models.check_logits(alone(model, document).float(), logits, "bf16", "packing")


def test_under_autocast_packed_logits_are_those_of_each_document_alone_to_its_rounding():
    model, docs = language_model(), documents(5, 30, 29, 12)
    with torch.autocast("cpu", torch.bfloat16):
        for document, logits in zip(docs, packed_logits(model, docs), strict=True):
            models.check_logits(alone(model, document).float(), logits, "bf16", "packing")


def test_a_text_longer_than_what_the_models_attention_sees_is_refused():
    settings = {**SIZES, "num_key_value_heads": 4, "sliding_window": 8}
    model = AutoModelForCausalLM.from_config(MistralConfig(**settings), attn_implementation="sdpa").eval()
    packed_logits(model, documents(8, 5))
    with pytest.raises(ValueError, match="sees 8 tokens back, and a text has more"):
        packed_logits(model, documents(9, 5))


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
