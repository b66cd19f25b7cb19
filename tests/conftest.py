"""What many tests share: no network, a tiny real model with its tokenizer, and a small site in ingest's layout."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # toy models; two threads of each of several processes would spin

import random
from pathlib import Path

import pytest

WORDS = "oil grease clamp bolt torque wheel chain brush solder flux resin wax blade file rasp plane saw drill".split()


def toy_questions(n: int, seed: int = 0) -> list[dict]:
    """Questions in ingest's schema (the columns that training reads), with two to four answers and their pairs."""
    rng = random.Random(seed)
    rows = []
    for qid in range(1, n + 1):
        tool, part = rng.sample(WORDS, 2)
        answers = []
        for a in range(rng.randint(2, 4)):
            votes = rng.randint(-1, 9)
            text = f"Use the {rng.choice([tool, part])}. " + " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))
            pm_score = -1 if votes < 0 else round((1 + votes) ** 0.5)
            answers.append({"answer_id": qid * 10 + a, "text": text, "pm_score": pm_score, "votes": votes, "selected": a == 0})
        indices = [(j, k) for j in range(len(answers)) for k in range(len(answers))]
        pairs = [{"j": j, "k": k} for j, k in indices if answers[j]["pm_score"] > answers[k]["pm_score"]]
        title = f"How do I fit the {part} with the {tool}?"
        rows.append(
            {
                "site": "toy.test",
                "qid": qid,
                "title": title,
                "question": f"{title}\n\nThe {part} is old.",
                "answers": answers,
                "pairs": pairs,
            }
        )
    return rows


@pytest.fixture(scope="session")
def toy_site(tmp_path_factory) -> Path:
    """An ingest folder with 24 questions a split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("site")
    for number, split in enumerate(("sft", "reward", "rl", "eval")):
        folder = root / "questions" / "site=toy.test" / f"split={split}"
        folder.mkdir(parents=True)
        pq.write_table(
            pa.Table.from_pylist([{**q, "split": split, "contaminated": False} for q in toy_questions(24, seed=number)]),
            folder / "part-00000.parquet",
        )
    (root / "card.json").write_text('{"simulated": false}')
    return root


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A randomly initialised two-layer Llama (hidden 32) with a byte-level BPE of 384 tokens, as `base` would store it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|eos|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{q['question']} {a['text']}" for q in toy_questions(50) for a in q["answers"]), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>", pad_token="<|pad|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id,
        bos_token_id=None, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="session")
def kills():
    """Runs trainings in children that are killed at a chosen moment (tests/killing.py)."""
    from tests.killing import Kills

    server = Kills()
    yield server
    server.close()
