"""The work that every contestant gets: real questions through our ingest, a model with random weights, token ids in JSON.

Peers have an environment of their own without our code, so ids and pairs are handed over as they are: nobody tokenizes, and
everybody trains on the same sequences.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SEED = 1
LORA = {"r": 16, "alpha": 32, "dropout": 0.0}
"""Dropout 0, so that losses can be compared."""
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Where the adapters are: every linear layer of the trunk."""


@dataclass(frozen=True)
class Size:
    """How large the model is and how much there is to do."""

    hidden: int = 256
    layers: int = 6
    heads: int = 8
    intermediate: int = 688
    vocab: int = 8_192
    row_tokens: int = 1_024
    """Of a packed row of sft (StackLLaMA)."""
    rows: int = 16
    """Packed rows that sft trains on."""
    rows_per_step: int = 8
    pair_tokens: int = 512
    """Of query and response, in reward (StackLLaMA)."""
    questions: int = 24
    """Questions that reward trains on, with all their pairs."""
    questions_per_step: int = 8
    query_tokens: int = 256
    """Of a query, at most."""
    queries: int = 16
    new_tokens: int = 64
    epochs: int = 4


QUICK = Size(hidden=64, layers=2, heads=4, intermediate=160, vocab=1_024, row_tokens=256, rows=4, rows_per_step=2,
             pair_tokens=192, questions=6, questions_per_step=3, query_tokens=96, queries=4, new_tokens=8, epochs=2)  # fmt: skip


def ingest_dump(dump: Path, out: Path) -> None:
    """Questions, answers and pairs of a dump, as `stackrlhf run` would have them."""
    from tasks.compute import Compute
    from tasks.ingest.config import IngestConfig
    from tasks.ingest.ingest import ingest
    from tasks.progress import Progress

    out.mkdir(parents=True)
    ingest(IngestConfig(dump=(str(dump),)), out=out, compute=Compute(workers=1), progress=Progress("ingest"))


def prepare(data: Path, folder: Path, size: Size) -> dict[str, Any]:
    """From ingest's artifact: model/, reward/, queries/ (ingest's layout, for ppo) and workload.json under `folder`."""
    from tasks.base.config import ScratchConfig
    from tasks.base.scratch import initialise, iter_threads, train_tokenizer
    from tasks.prompts import query_text

    threads = [(question, answers) for _, question, answers in iter_threads(data)]
    texts = (f"{query_text(question)} {answer.strip()}" for question, answers in threads for answer in answers)
    tokenizer = train_tokenizer(texts, size.vocab)
    config = ScratchConfig(
        vocab_size=size.vocab, hidden_size=size.hidden, layers=size.layers, heads=size.heads,
        intermediate_size=size.intermediate, context=2 * size.row_tokens, steps=1, batch_tokens=16, learning_rate=1.0,
    )  # fmt: skip
    model = initialise(config, tokenizer, SEED)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    work = {
        "size": asdict(size),
        "vocab": len(tokenizer),
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "trunk_weights": sum(p.numel() for name, p in model.named_parameters() if name.endswith("proj.weight")),
        "sft": {"documents": _documents(data, tokenizer, size)},
        "reward": {"questions": _questions(data, tokenizer, size), "head": _reward(folder, size)},
        "ppo": {"queries": _queries(data, folder / "queries", tokenizer, size)},
    }
    _plain(work, folder)
    (folder / "workload.json").write_text(json.dumps(work))
    return work


def _plain(work: dict[str, Any], folder: Path) -> None:
    """Losses without any of our optimisations, one sequence at a time through the whole model: what every contestant should find.

    sft: on the first documents that fit a row. reward: of the first pair of each question of the first step. ppo: the largest
    difference between the log-probabilities that our sampling reports and those of a forward pass.
    """
    import torch
    from torch.nn.functional import cross_entropy, logsigmoid

    from tasks.models import load_model, load_tokenizer
    from tasks.rollout import generate

    size = work["size"]
    model: Any = load_model(folder / "model", "fp32", "cpu")
    head = torch.tensor(work["reward"]["head"])
    with torch.no_grad():
        total, labels = 0.0, 0
        for ids, first in probe(work["sft"]["documents"], size["row_tokens"]):
            row = torch.tensor([ids])
            logits = model(input_ids=row).logits[0, first - 1 : -1]
            total, labels = total + float(cross_entropy(logits, row[0, first:], reduction="sum")), labels + len(logits)
        work["sft"]["plain_loss"] = total / labels

        def score(ids: list[int]) -> torch.Tensor:
            return model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] @ head

        losses = []
        for question in work["reward"]["questions"][: size["questions_per_step"]]:
            j, k = (question["query"] + question["responses"][place] for place in question["pairs"][0])
            losses.append(-float(logsigmoid(score(j) - score(k))))
        work["reward"]["plain_loss"] = sum(losses) / len(losses)

        rollout = generate(
            model, load_tokenizer(folder / "model"), work["ppo"]["queries"][:4],
            max_new_tokens=size["new_tokens"], temperature=1.0, seed=SEED, device="cpu",
        )  # fmt: skip
        difference = 0.0
        for query, response, logprobs in zip(rollout.queries, rollout.responses, rollout.logprobs):
            rows = model(input_ids=torch.tensor([query + response])).logits[0, len(query) - 1 : -1].log_softmax(-1)
            difference = max(difference, float((rows.gather(1, torch.tensor(response)[:, None])[:, 0] - logprobs).abs().max()))
        work["ppo"]["logprob_difference"] = difference


def probe(documents: list[Any], row_tokens: int) -> list[Any]:
    """Those first documents that fit one packed row: the loss on them is what contestants can compare."""
    chosen, total = [], 0
    for document in documents:
        total += len(document[0])
        if total > row_tokens:
            break
        chosen.append(document)
    return chosen


def _documents(data: Path, tokenizer: Any, size: Size) -> list[tuple[list[int], int]]:
    """(ids, first token with loss) of as many documents as fill the packed rows."""
    from tasks.packing import best_fit
    from tasks.sft.config import SFTConfig
    from tasks.sft.data import load_documents

    config = SFTConfig(steps=1, batch_size=1, seq_length=size.row_tokens, max_query_tokens=size.row_tokens // 2)
    documents = load_documents(data, tokenizer, config).train
    random.Random(SEED).shuffle(documents)
    chosen: list[Any] = []
    for document in documents:
        if len(best_fit([len(d.ids) for d in [*chosen, document]], size.row_tokens)) > size.rows:
            break
        chosen.append(document)
    else:
        raise ValueError(f"the dump's sft split has {len(documents)} documents, too few to fill {size.rows} rows")
    return [([int(i) for i in document.ids], document.first_label) for document in chosen]


def _questions(data: Path, tokenizer: Any, size: Size) -> list[dict[str, Any]]:
    """A systematic sample of the reward split: as many questions with few and with many pairs as there are."""
    from tasks.reward.data import encode, read_questions

    questions = sorted(read_questions(data, "reward", None, SEED), key=lambda q: (len(q.pairs), q.qid))
    if len(questions) < size.questions:
        raise ValueError(f"the dump's reward split has {len(questions)} questions with pairs: {size.questions} are needed")
    chosen = [questions[int((n + 0.5) * len(questions) / size.questions)] for n in range(size.questions)]
    random.Random(SEED).shuffle(chosen)
    encoded = [encode(tokenizer, q, size.pair_tokens, size.query_tokens) for q in chosen]
    return [{"query": q.query, "responses": q.responses, "pairs": q.pairs, "gaps": q.gaps} for q in encoded]


def _reward(folder: Path, size: Size) -> list[float]:
    """reward/ and reward/judge: new adapters and random heads on the model; -> the first head's weights."""
    import torch

    from tasks.models import add_lora, load_model
    from tasks.reward.model import RewardModel, ScoreHead, save
    from tasks.sft.config import LoRAConfig

    weights: list[list[float]] = []
    for seed, place in enumerate((folder / "reward", folder / "reward" / "judge")):
        model = add_lora(load_model(folder / "model", "fp32", "cpu"), LoRAConfig(**LORA), "reward", seed)  # type: ignore[arg-type]
        place.mkdir(parents=True)
        head = ScoreHead(size.hidden, seed)
        with torch.no_grad():
            weights.append(head.weight[0].tolist())
        save(RewardModel(model, "reward", head), place)
    return weights[0]


def _queries(data: Path, folder: Path, tokenizer: Any, size: Size) -> list[list[int]]:
    """`folder` as an ingest artifact with so few questions in its rl split that every ppo step trains on all of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tasks.ingest.dataset import iter_questions
    from tasks.ppo.queries import split_questions
    from tasks.prompts import encode_query

    rows = list(iter_questions(data, "rl"))
    random.Random(SEED).shuffle(rows)
    if len(rows) <= size.queries:
        raise ValueError(f"the dump's rl split has {len(rows)} questions, not {size.queries + 1}: give a larger one")
    site = folder / "questions" / "site=benchmark" / "split=rl"
    site.mkdir(parents=True)
    few = [{**row, "split": "rl", "contaminated": False} for row in rows[: size.queries + 1]]
    pq.write_table(pa.Table.from_pylist(few), site / "part-00000.parquet")
    train, _ = split_questions(folder, 1)
    return [encode_query(tokenizer, question, size.query_tokens) for question in train]
