"""What the work needs at least, in multiplications and additions, and how many of them one thread does in a second.

A matrix of W weights costs 2 W a token forward, 2 W more for the gradient of its input, and nothing for its own: the base is
frozen. The adapters cost both. Attention of a token at position t reads t keys and values: 4 t hidden forward, as much twice
backward. Only rows with a label go through the head.
"""

import statistics
import time
from typing import Any


def _trunk(work: dict[str, Any], lengths: list[int], training: bool, prefix: int = 0) -> float:
    """Of sequences that follow `prefix` tokens already there."""
    size = work["size"]
    tokens = sum(lengths)
    inner = size["intermediate"]
    lora = size["layers"] * 16 * (4 * 2 * size["hidden"] + 3 * (size["hidden"] + inner))
    keys = sum(n * (prefix + (n + 1) / 2) for n in lengths)
    attention = 4 * size["hidden"] * size["layers"] * keys
    if training:
        return 4 * work["trunk_weights"] * tokens + 6 * lora * tokens + 3 * attention
    return 2 * work["trunk_weights"] * tokens + attention


def gflop_needed(verb: str, work: dict[str, Any]) -> float:
    """A token of sft, a pair of reward, a sample of ppo."""
    head = work["size"]["hidden"] * work["vocab"]
    if verb == "sft":
        documents = work["sft"]["documents"]
        lengths = [len(ids) for ids, _ in documents]
        labels = sum(len(ids) - max(1, first) for ids, first in documents)
        return (_trunk(work, lengths, True) + 4 * head * labels) / sum(lengths) / 1e9
    if verb == "reward":
        questions = work["reward"]["questions"]
        flop = sum(
            _trunk(work, [len(q["query"])], True) + _trunk(work, [len(r) for r in q["responses"]], True, len(q["query"]))
            for q in questions
        )
        return flop / sum(len(q["pairs"]) for q in questions) / 1e9
    size, queries = work["size"], work["ppo"]["queries"]
    new = size["new_tokens"]
    whole = [len(q) + new for q in queries]
    forward, training = _trunk(work, whole, False), _trunk(work, whole, True)
    rows = 2 * head * new * len(queries)
    # one pass each to sample, for the reference and for the reward; then the epochs
    flop = (forward + rows) + (forward + rows) + forward + size["epochs"] * (training + 2 * rows)
    return flop / len(queries) / 1e9


def matrix_peak(threads: int) -> float:
    """GFLOP/s of a large fp32 product through oneDNN."""
    import torch

    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("medium")
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    rates = []
    for _ in range(20):
        began = time.process_time() / threads
        a @ b
        rates.append(2 * 1024**3 / 1e9 / max(1e-9, time.process_time() / threads - began))
    return statistics.median(sorted(rates)[-5:])
