"""How StackLLaMA trained in 2023, in our words: plain loops, so nothing of a trainer's overhead counts against it.

SFT: documents joined with EOS and cut every `row_tokens` tokens, so that attention leaks from one document into the next; loss on
every token. Reward: chosen and rejected answers padded apart and sent through the model one after the other, four pairs at a time.
Both at their best setting: no gradient checkpointing; in fp32 (sft with products through oneDNN, which its attention bears), or
with fp32 weights and bf16 products.
"""

from pathlib import Path
from typing import Any

from peers.meter import Meter
from peers.workload import LAYERS, LORA

PAIRS = 4
"""A forward pass (StackLLaMA's per-device batch; 4 rows for SFT)."""


def _adapted(model: Any, task: str) -> tuple[Any, Any]:
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], lora_dropout=LORA["dropout"], target_modules=LAYERS, task_type=task)
    model = get_peft_model(model, config)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.05)


def _step(model: Any, optimizer: Any) -> None:
    import torch

    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def sft(folder: Path, work: dict[str, Any], threads: int, bf16: bool) -> dict[str, Any]:
    """Tokens."""
    import peft  # noqa: F401  # before the meter, which takes the floor of memory
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest" if bf16 else "medium")
    meter = Meter()
    size = work["size"]
    stream = [token for ids, _ in work["sft"]["documents"] for token in (*ids, *([] if ids[-1] == work["eos"] else [work["eos"]]))]
    count = len(stream) // size["row_tokens"]
    rows = torch.tensor(stream[: count * size["row_tokens"]]).view(count, size["row_tokens"])
    model, optimizer = _adapted(AutoModelForCausalLM.from_pretrained(folder / "model"), "CAUSAL_LM")
    model.train()

    def step(batch: torch.Tensor) -> None:
        for part in batch.split(PAIRS):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(input_ids=part, labels=part, use_cache=False).loss
            (loss * len(part) / len(batch)).backward()
        _step(model, optimizer)

    step(rows[: size["rows_per_step"]])
    meter.start()
    for batch in rows.split(size["rows_per_step"]):
        step(batch)
    meter.stop()
    return meter.result(rows.numel())


def reward(folder: Path, work: dict[str, Any], threads: int, bf16: bool) -> dict[str, Any]:
    """Pairs."""
    import peft  # noqa: F401  # before the meter, which takes the floor of memory
    import torch
    from torch.nn.functional import logsigmoid
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(threads)
    meter = Meter()
    questions = work["reward"]["questions"]
    pairs = [(q["query"] + q["responses"][j], q["query"] + q["responses"][k]) for q in questions for j, k in q["pairs"]]
    base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    base.config.pad_token_id = work["pad"]
    model, optimizer = _adapted(base, "SEQ_CLS")
    model.train()
    a_step = PAIRS * max(1, round(len(pairs) * work["size"]["questions_per_step"] / len(questions) / PAIRS))

    def scores(sequences: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, sequences))
        ids = torch.tensor([[*s, *[work["pad"]] * (longest - len(s))] for s in sequences])
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float()

    def step(batch: list[tuple[list[int], list[int]]]) -> None:
        for start in range(0, len(batch), PAIRS):
            part = batch[start : start + PAIRS]
            loss = -logsigmoid(scores([j for j, _ in part]) - scores([k for _, k in part])).sum() / len(batch)
            loss.backward()
        _step(model, optimizer)

    step(pairs[:a_step])
    meter.start()
    for start in range(0, len(pairs), a_step):
        step(pairs[start : start + a_step])
    meter.stop()
    return meter.result(len(pairs))
