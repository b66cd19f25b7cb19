"""Supervised fine-tuning, end to end on a toy site."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tasks import models
from tasks.base.fit import Fit, fit, held_out, mean_loss
from tasks.compute import Compute
from tasks.packing import Document
from tasks.progress import Progress, listening
from tasks.prompts import decode_response, encode_query
from tasks.sft.config import LoRAConfig, SFTConfig
from tasks.sft.data import encode, load_documents
from tasks.sft.train import check_packing, train

SMALL = SFTConfig(
    steps=6, batch_size=2, seq_length=96, max_query_tokens=48, learning_rate=5e-3, warmup_steps=2, lora=LoRAConfig(r=4, alpha=8)
)  # fmt: skip
CPU = Compute(device="cpu", threads=1)


def run(base, data, out, config=SMALL, compute=CPU):
    out.mkdir(parents=True, exist_ok=True)
    return train(config, base=base, data=data, out=out, compute=compute, progress=Progress("sft"))


def change(**values):
    return SMALL.model_copy(update=values)


@pytest.fixture(scope="module")
def trained(tiny_model, toy_site, tmp_path_factory):
    out = tmp_path_factory.mktemp("sft")
    updates = []
    with listening(updates.append):
        metrics = run(tiny_model, toy_site, out)
    return out, metrics, updates


def test_it_leaves_a_whole_model_an_adapter_and_its_checks(trained, tiny_model):
    out, metrics, _ = trained
    assert {path.name for path in out.iterdir()} == {"model", "adapter", "curves.json", "checks.json", "REPORT.md"}
    assert not [path for path in out.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]
    assert metrics["loss"] < metrics["base_loss"]
    assert math.isclose(metrics["perplexity"], math.exp(metrics["loss"]))
    checks = json.loads((out / "checks.json").read_text())
    assert checks["merge"]["rms_error"] < 1e-5
    assert checks["packing"]["rms_error"] < 1e-5
    adapted = models.load_lora(models.load_model(tiny_model / "model", "fp32", "cpu"), out / "adapter", "sft", trainable=False)
    merged = models.load_model(out / "model", "fp32", "cpu")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-4)


def test_the_stored_tokenizer_is_the_base_s(trained, tiny_model):
    tokenizers = [models.load_tokenizer(folder / "model") for folder in (trained[0], tiny_model)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].pad_token_id != tokenizers[0].eos_token_id


def test_progress_and_curves_show_every_logged_step(trained):
    out, _, updates = trained
    assert all(update.total == 6 for update in updates)
    told = [{"step": update.done, **update.metrics} for update in updates]
    assert all(row.pop("tokens_per_second") > 0 for row in told[1:])
    curves = json.loads((out / "curves.json").read_text())
    assert told == curves
    assert [row["step"] for row in curves] == [0, 1, 2, 3, 4, 5, 6]
    assert "validation_loss" in curves[-1]
    # Linear warm-up over two steps, then a cosine from the peak towards 0.
    assert [row["learning_rate"] / 5e-3 for row in curves[1:4]] == pytest.approx([1 / 3, 2 / 3, 1])


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(trained, tiny_model, toy_site, tmp_path):
    run(tiny_model, toy_site, tmp_path / "again")
    run(tiny_model, toy_site, tmp_path / "other", change(seed=2))
    files = sorted(path.relative_to(trained[0]) for path in trained[0].rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file())
    assert [str(f) for f in files if (trained[0] / f).read_bytes() != (tmp_path / "again" / f).read_bytes()] == []
    weights = "model/model.safetensors"
    assert (trained[0] / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


def test_small_passes_give_what_one_large_pass_gives(tiny_model, toy_site, tmp_path):
    config = change(lora=LoRAConfig(r=4, alpha=8, dropout=0.0))
    whole = run(tiny_model, toy_site, tmp_path / "whole", config)
    parts = run(tiny_model, toy_site, tmp_path / "parts", config, Compute(device="cpu", threads=1, micro_batch_tokens=64))
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-4)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_bf16_stays_close_and_is_stored_as_bf16(tuning, tiny_model, toy_site, tmp_path):
    config = change(tuning=tuning, lora=LoRAConfig(r=4, alpha=8, dropout=0.0))
    exact = run(tiny_model, toy_site, tmp_path / "fp32", config)
    rounded = run(tiny_model, toy_site, tmp_path / "bf16", config.model_copy(update={"dtype": "bf16"}))
    assert rounded["loss"] == pytest.approx(exact["loss"], abs=0.03)
    assert {t.dtype for t in load_file(tmp_path / "bf16" / "model" / "model.safetensors").values()} == {torch.bfloat16}
    if tuning == "lora":
        state = load_file(tmp_path / "bf16" / "adapter" / models.ADAPTER_WEIGHTS)
        assert {t.dtype for t in state.values()} == {torch.float32}


def test_full_tuning_moves_every_weight_and_leaves_no_adapter(tiny_model, toy_site, tmp_path):
    run(tiny_model, toy_site, tmp_path, change(tuning="full"))
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (tiny_model, tmp_path))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "adapter").exists()


def test_it_learns_a_tiny_batch_by_heart(tiny_model):
    model = models.load_model(tiny_model / "model", "fp32", "cpu").requires_grad_(True)
    documents = [Document(np.arange(start, start + 12, dtype=np.int32), 4) for start in (10, 50, 90)]
    how = Fit(
        steps=60, rows=2, row_tokens=24, learning_rate=1e-2, schedule=lambda _: 1.0, weight_decay=0.0, betas=(0.9, 0.999), seed=1
    )  # fmt: skip
    fitted = fit(
        model, documents, documents, how, device=torch.device("cpu"), micro_batch_tokens=1000, progress=Progress("sft")
    )  # fmt: skip
    assert fitted.validation_loss < 0.02


@pytest.mark.parametrize(("loss_on", "first"), [("answer", None), ("all", 1)])
def test_the_loss_counts_the_answer_s_tokens_with_eos_and_no_others(loss_on, first, tiny_model):
    model, tokenizer = models.load_model(tiny_model / "model", "fp32", "cpu"), models.load_tokenizer(tiny_model / "model")
    document = encode(tokenizer, "How do I fit the wheel?", "Use oil.", change(loss_on=loss_on))
    ids = torch.tensor(document.ids, dtype=torch.long)
    query = len(tokenizer("Question: How do I fit the wheel?")["input_ids"]) + len(tokenizer("\n\nAnswer:")["input_ids"])
    with torch.no_grad():
        logprobs = model(ids[None]).logits[0].double().log_softmax(-1)
    expected = [-float(logprobs[t - 1, ids[t]]) for t in range(first or query, len(ids))]
    assert tokenizer.decode(ids[query:]) == " Use oil.<|eos|>"
    assert mean_loss(model, [document], 1000, torch.device("cpu")) == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_a_long_answer_is_cut_and_keeps_its_prompt(tiny_model):
    tokenizer = models.load_tokenizer(tiny_model / "model")
    document = encode(tokenizer, "How? " * 50, "Use oil. " * 50, SMALL)
    assert len(document.ids) == SMALL.seq_length
    assert document.ids[-1] != tokenizer.eos_token_id
    assert tokenizer.decode(document.ids[: document.first_label]).endswith("\n\nAnswer:")
    assert document.first_label == SMALL.max_query_tokens


def write_site(folder, answers_of):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "questions" / "site=toy.test" / "split=sft"
    path.mkdir(parents=True)
    rows = [
        {"site": "toy.test", "qid": qid, "question": f"How {qid}?", "answers": answers, "contaminated": False}
        for qid, answers in answers_of.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), path / "part-00000.parquet")
    return folder


def answer(text, pm_score):
    return {"answer_id": pm_score + 10, "text": text, "pm_score": pm_score, "votes": pm_score, "selected": False}


def test_one_text_a_question_its_best_and_none_that_was_voted_down(tiny_model, tmp_path):
    tokenizer = models.load_tokenizer(tiny_model / "model")
    site = write_site(
        tmp_path,
        {1: [answer("bad", 0), answer("best", 3)], 2: [answer("hated", -1)], 3: [answer(" ", 2)], 4: [answer("fine", 0)]},
    )
    documents = load_documents(site, tokenizer, SMALL)
    texts = {tokenizer.decode(d.ids).split("Answer: ")[1] for d in documents.train + documents.validation}
    assert texts == {"best<|eos|>", "fine<|eos|>"}
    assert documents.counts["voted_below_zero"] == 1
    assert documents.counts["empty_answer"] == 1
    assert (len(documents.train), len(documents.validation)) == (1, 1)


def test_the_same_questions_are_held_back_whatever_their_order():
    keys = [f"toy.test/{n}" for n in range(100)]
    assert held_out(keys) == held_out(keys[::-1])
    assert len(held_out(keys)) == 5
    assert held_out(keys) - {"toy.test/200"} <= held_out([*keys, "toy.test/200"])
    with pytest.raises(ValueError, match="at least 2 are needed"):
        held_out(["toy.test/1"])


def test_what_cannot_fit_is_refused_in_one_line(tiny_model, toy_site, tmp_path):
    with pytest.raises(ValueError, match=r"sft\.seq_length=512 is longer than the base's context of 256"):
        run(tiny_model, toy_site, tmp_path, change(seq_length=512))
    with pytest.raises(ValueError, match=r"sft\.max_query_tokens=96 leaves no room"):
        run(tiny_model, toy_site, tmp_path, change(max_query_tokens=96))


def test_a_loss_that_is_no_number_stops_the_run(tiny_model, toy_site, tmp_path):
    with pytest.raises(ValueError, match=r"(loss|norm) is (nan|inf) at step \d+: lower sft\.learning_rate"):
        run(tiny_model, toy_site, tmp_path, change(tuning="full", learning_rate=1e30, warmup_steps=0, steps=20))


def test_a_merge_that_loses_something_is_refused():
    torch.manual_seed(0)
    expected = torch.randn(20, 50)
    assert models.check_logits(expected, expected, "fp32", "merge") == {"rms_error": 0, "max_error": 0, "pair_flips": 0}
    with pytest.raises(ValueError, match="merge changed the model"):
        models.check_logits(expected, expected + 0.2 * torch.randn(20, 50), "bf16", "merge")


def test_an_architecture_that_lets_documents_see_each_other_is_refused(tiny_model):
    from transformers import AutoModelForCausalLM, MambaConfig

    torch.manual_seed(0)
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=1, initializer_range=0.5)
    ).eval()
    documents = [Document(np.arange(n, n + 12, dtype=np.int32), 1) for n in (5, 90)]
    with pytest.raises((ValueError, TypeError), match=r"keep packed documents apart|blocks"):
        check_packing(mamba, documents, "fp32")


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_base_learns_and_is_merged_into_the_base_as_it_was(quantization, tiny_model, toy_site, tmp_path):
    config = change(lora=LoRAConfig(r=4, alpha=8, dropout=0.0), quantization=quantization)
    metrics = run(tiny_model, toy_site, tmp_path, config)
    assert metrics["loss"] < metrics["base_loss"] - 0.1
    base, stored = (load_file(folder / "model" / "model.safetensors") for folder in (tiny_model, tmp_path))
    assert {t.dtype for t in stored.values()} == {torch.float32}
    # Only the adapted layers moved, and by no more than rank 4: nothing of the rounding is in the files.
    for name, weight in stored.items():
        moved = torch.linalg.matrix_rank(weight - base[name], atol=1e-4) if weight.ndim == 2 else (weight - base[name]).abs().sum()
        assert moved == (4 if "proj" in name else 0), name
    checks = json.loads((tmp_path / "checks.json").read_text())
    assert checks["merge"]["rms_error"] < 1e-5
    assert 0 < checks["quantised_again"]["rms_error"] <= 2 * checks["quantised"]["rms_error"] + 1e-4


def test_a_soft_prompt_is_all_that_is_trained_and_no_model_can_write_it(tiny_model, toy_site, tmp_path):
    metrics = run(tiny_model, toy_site, tmp_path, change(tuning="prompt", prompt_tokens=5, learning_rate=0.3, steps=20))
    assert metrics["loss"] < metrics["base_loss"] - 0.1
    assert metrics["trainable_parameters"] == 5 * 32
    base, stored = (load_file(folder / "model" / "model.safetensors") for folder in (tiny_model, tmp_path))
    assert set(stored) - set(base) == {"model.embed_tokens.soft_prompt"}
    assert all(torch.equal(stored[name], base[name]) for name in base)
    assert json.loads((tmp_path / "checks.json").read_text())["save"]["rms_error"] < 1e-5

    model, tokenizer = models.load_model(tmp_path / "model", "fp32", "cpu"), models.load_tokenizer(tmp_path / "model")
    query = encode_query(tokenizer, "How do I fit the wheel?", 48)
    plain = encode_query(models.load_tokenizer(tiny_model / "model"), "How do I fit the wheel?", 48)
    soft = [tokenizer.convert_tokens_to_ids(f"<|prompt_{i}|>") for i in range(5)]
    assert query == soft + plain
    assert decode_response(tokenizer, query) == decode_response(tokenizer, plain)
    with torch.no_grad():
        # What the paper does: the trained rows in front of the embedded text.
        rows = torch.cat([stored["model.embed_tokens.soft_prompt"], base["model.embed_tokens.weight"][plain]])
        expected = models.load_model(tiny_model / "model", "fp32", "cpu")(inputs_embeds=rows[None]).logits
        logits = model(torch.tensor([query])).logits
    assert torch.allclose(logits, expected, atol=1e-5)
    assert logits.shape[-1] == min(soft)  # the head has no row for them


def test_a_soft_prompt_goes_through_lora_and_merging_into_the_next_files(tiny_model, toy_site, tmp_path):
    run(tiny_model, toy_site, tmp_path / "prompt", change(tuning="prompt", prompt_tokens=3, learning_rate=0.3, steps=1))
    run(tmp_path / "prompt", toy_site, tmp_path / "lora", change(steps=1))
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("prompt", "lora"))
    assert torch.equal(first["model.embed_tokens.soft_prompt"], second["model.embed_tokens.soft_prompt"])
    with pytest.raises(ValueError, match="carries a soft prompt already"):
        run(tmp_path / "prompt", toy_site, tmp_path / "again", change(tuning="prompt"))


def test_rounded_weights_cannot_be_trained():
    with pytest.raises(ValueError, match=r"sft\.tuning=full trains the weights that sft\.quantization=8bit rounds"):
        SFTConfig(**SMALL.model_dump() | {"tuning": "full", "quantization": "8bit"})


def test_recomputed_layers_give_the_same_bytes(trained, tiny_model, toy_site, tmp_path):
    run(tiny_model, toy_site, tmp_path, compute=CPU.model_copy(update={"gradient_checkpointing": True}))
    weights = "model/model.safetensors"
    assert (trained[0] / weights).read_bytes() == (tmp_path / weights).read_bytes()
