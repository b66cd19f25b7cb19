"""How fast and how large training is on a GPU: Llama shapes of 1B and 7B with random weights, which are made on the device.

    python benchmarks/gpu.py --shape 1b
    python benchmarks/gpu.py --shape 7b --step ppo       # 512 + 128 tokens on a base of 8 bits: does it fit one card?
    python benchmarks/gpu.py --shape smoke               # a toy, on a CPU too: a check of the code, no figures

Steps: `sft` (LoRA on a bf16 base with and without gradient checkpointing, then on 8 and 4 bits), `reward`, `rollout`, `ppo`. All
are this repository's own code on made-up token ids of realistic lengths. One JSON line each on stdout; where memory does not
suffice it has "error" instead of figures. `share_of_peak` is the arithmetic that is needed over the measured rate of a large bf16
product; `share_of_limit` of a rollout the tokens a second over those that reading the weights and the cache once a step would allow
at the measured bandwidth. Exit code 2: a large shape was asked for, and there is no CUDA device.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

SHAPES: dict[str, dict[str, Any]] = {
    # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4, "vocab_size": 32_000},  # TinyLlama-1.1B
    "7b": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32_000},  # Llama-2-7B
    "smoke": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip
STEPS = ("sft", "reward", "rollout", "ppo")
EOS, PAD = 0, 1
CARD = 80e9  # bytes


class Bench:
    """A shape on a device, how long the work is, and the machine's limits."""

    def __init__(self, shape: str) -> None:
        import torch

        self.torch, self.shape, self.small = torch, SHAPES[shape], shape == "smoke"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.row_tokens = 128 if self.small else 1_024
        self.rows = 2 if self.small else 16
        self.query, self.new = (24, 8) if self.small else (512, 128)
        self.samples = 4 if self.small else 64
        self.repeat = 1 if self.small else 4
        self.dtype = torch.bfloat16

    def model(self, quantization: str) -> Any:
        """Random weights, made where they stay; then rounded layer by layer."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch = self.torch
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                config = LlamaConfig(
                    **self.shape, max_position_embeddings=2048, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=None
                )
                made: Any = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        made.set_attn_implementation("sdpa")
        made.eval().requires_grad_(False)
        if quantization != "none":
            self._quantise(made, quantization)
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return made

    def _quantise(self, model: Any, quantization: str) -> None:
        """What loading with bitsandbytes does; there is no file to load here."""
        import bitsandbytes as bnb

        from tasks import quantized

        torch = self.torch
        for parent in list(model.model.modules()):
            for name, layer in list(parent.named_children()):
                if not isinstance(layer, torch.nn.Linear):
                    continue
                shape, weight = (layer.in_features, layer.out_features), layer.weight.data
                if quantization == "8bit":
                    new: Any = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=6.0)
                    new.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
                else:
                    new = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=self.dtype, quant_type="nf4")
                    new.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
                del layer, weight
                setattr(parent, name, new.to(self.device))
        setattr(model, f"is_loaded_in_{quantization}", True)  # where PEFT looks
        quantized.settle(model, self.device)

    def ids(self, n: int) -> list[int]:
        return self.torch.randint(2, self.shape["vocab_size"], (n,)).tolist()

    def synchronise(self) -> float:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work: Callable[[], Any], repeat: int | None = None) -> float:
        """Of one call, after one to warm up."""
        work()
        began = self.synchronise()
        for _ in range(repeat or self.repeat):
            work()
        return (self.synchronise() - began) / (repeat or self.repeat)

    def peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return int(self.torch.cuda.max_memory_allocated())
        from peers.meter import memory

        return memory("VmHWM")

    def tflops(self) -> float:
        """Of a large bf16 product."""
        n = 256 if self.small else 8192
        a, b = (self.torch.randn(n, n, dtype=self.dtype, device=self.device) for _ in range(2))
        return 2 * n**3 / self.seconds(lambda: a @ b, 20) / 1e12

    def bandwidth(self) -> float:
        """Bytes a second, of a copy: read and written."""
        n = 2**20 if self.small else 2**31
        a = self.torch.empty(n, dtype=self.torch.uint8, device=self.device)
        b = self.torch.empty_like(a)
        return 2 * n / self.seconds(lambda: b.copy_(a), 20)


def trunk_weights(bench: Bench) -> int:
    s = bench.shape
    head = s["hidden_size"] // s["num_attention_heads"]
    attention = 2 * s["hidden_size"] ** 2 + 2 * s["hidden_size"] * head * s["num_key_value_heads"]
    return s["num_hidden_layers"] * (attention + 3 * s["hidden_size"] * s["intermediate_size"])


def sft(bench: Bench, quantization: str, checkpointing: bool) -> dict[str, Any]:
    """Packed rows through tasks.base.fit.fit; loss on the answers, two thirds of the tokens."""
    from dataclasses import replace

    import numpy as np

    from tasks import models
    from tasks.base.fit import Fit, fit
    from tasks.packing import Document
    from tasks.progress import Progress
    from tasks.sft.config import LoRAConfig

    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(5.7, 0.6, 8 * bench.rows * bench.repeat), 32, bench.row_tokens).astype(int)
    documents = [Document(np.array(bench.ids(length), np.int32), first_label=length // 3) for length in lengths]
    model = models.add_lora(bench.model(quantization), LoRAConfig(dropout=0.0), "sft", 1)
    if checkpointing:
        models.checkpoint_gradients(model)
    how = Fit(
        steps=1, rows=bench.rows, row_tokens=bench.row_tokens, learning_rate=1e-5, schedule=lambda step: 1.0,
        weight_decay=0.0, betas=(0.9, 0.999), seed=1,
    )  # fmt: skip
    run: dict[str, Any] = {"device": bench.device, "micro_batch_tokens": 16_384, "progress": Progress("sft")}
    shortest = [min(documents, key=lambda d: len(d.ids))]
    fit(model, documents, shortest, how, **run)
    began = bench.synchronise()
    fitted = fit(model, documents, shortest, replace(how, steps=bench.repeat), **run)
    seconds = bench.synchronise() - began
    s, head = bench.shape, bench.shape["hidden_size"] * bench.shape["vocab_size"]
    length = sum(len(d.ids) ** 2 for d in documents) / sum(len(d.ids) for d in documents)
    attention = 4 * s["hidden_size"] * s["num_hidden_layers"] * length / 2
    flop = fitted.tokens * (4 * trunk_weights(bench) + 3 * attention) + 4 * head * fitted.label_tokens
    return {"tokens_per_s": fitted.tokens / seconds, "share_of_peak": flop / seconds / 1e12 / bench.tflops()}


def _reward_model(bench: Bench, quantization: str) -> Any:
    from tasks import models
    from tasks.reward.model import RewardModel, ScoreHead
    from tasks.sft.config import LoRAConfig

    model = models.add_lora(bench.model(quantization), LoRAConfig(dropout=0.0), "reward", 1)
    return RewardModel(model, "reward", ScoreHead(bench.shape["hidden_size"]).to(bench.device))


def reward(bench: Bench, quantization: str) -> dict[str, Any]:
    """Questions of a third of a row, four answers, their six pairs."""
    from tasks import models
    from tasks.optim import adamw, clip_gradients
    from tasks.reward.config import RewardConfig
    from tasks.reward.data import Encoded
    from tasks.reward.train import accumulate

    part = bench.row_tokens // 4
    pairs = [(j, k) for j in range(4) for k in range(j)]
    questions = [Encoded(bench.ids(part), [bench.ids(part) for _ in range(4)], pairs, [1] * 6, 0) for _ in range(bench.rows)]
    scorer = _reward_model(bench, quantization)
    config = RewardConfig(questions_per_step=bench.rows, max_length=2 * part, max_query_tokens=part, max_new_tokens=8)
    optimizer = adamw([*models.adapter_parameters(scorer.model, "reward"), *scorer.head.parameters()], 2e-5, 0.0)

    def step() -> None:
        accumulate(scorer, questions, config, 16_384)
        clip_gradients(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"pairs_per_s": 6 * len(questions) / bench.seconds(step)}


def rollout(bench: Bench, quantization: str) -> dict[str, Any]:
    """Sampling alone, as wide as ppo does it."""
    from tasks.rollout import generate

    s, model = bench.shape, bench.model(quantization)
    tokenizer = SimpleNamespace(eos_token_id=s["vocab_size"], pad_token_id=PAD)  # never drawn: every row goes to its end
    queries = [bench.ids(bench.query) for _ in range(bench.samples)]

    def run() -> None:
        generate(model, tokenizer, queries, max_new_tokens=bench.new, temperature=1.0, seed=1, device=bench.device)

    seconds = bench.seconds(run, 1)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    head = s["hidden_size"] // s["num_attention_heads"]
    a_token = 2 * s["num_hidden_layers"] * s["num_key_value_heads"] * head * 2
    bandwidth = bench.bandwidth()
    limit = bench.samples * bandwidth / (weights + bench.samples * a_token * (bench.query + bench.new / 2))
    rate = bench.samples * bench.new / seconds
    return {
        "tokens_per_s": rate,
        "limit_tokens_per_s": limit,
        "share_of_limit": rate / limit,
        "bandwidth_gb_per_s": bandwidth / 1e9,
    }


def ppo(bench: Bench, quantization: str) -> dict[str, Any]:
    """One iteration as tasks.ppo.train makes it: sample, reference, reward, four passes of the update."""
    import torch

    from tasks import models
    from tasks.ppo.advantages import gae, whiten
    from tasks.ppo.config import PPOConfig
    from tasks.ppo.forward import response_mask
    from tasks.ppo.models import PPO, forward_rollout, sample_responses, score
    from tasks.ppo.rewards import token_rewards
    from tasks.ppo.update import Batch, update
    from tasks.reward.model import ScoreHead
    from tasks.sft.config import LoRAConfig

    config = PPOConfig.model_validate({
        "steps": 2, "batch_size": bench.samples, "minibatch_size": bench.samples // 4, "max_query_tokens": bench.query,
        "max_new_tokens": bench.new, "value_warmup_steps": 0, "eval_every": 1, "eval_queries": 1, "value": "policy_trunk",
        "dtype": "bf16", "target_kl": 1e6, "max_ratio": 1e6, "quantization": quantization,
    })  # fmt: skip
    scorer = _reward_model(bench, quantization)
    model = models.add_lora(scorer.model, LoRAConfig(dropout=0.0), "policy", 2).eval()
    value_head = ScoreHead(bench.shape["hidden_size"]).to(bench.device)
    tokenizer: Any = SimpleNamespace(eos_token_id=bench.shape["vocab_size"], pad_token_id=PAD)
    nothing = torch.zeros(0)
    trained = PPO(config, model, tokenizer, scorer, scorer, value_head, bench.device, 16_384, (nothing, nothing), nothing)
    optimizer = torch.optim.Adam(
        [{"params": trained.policy_parameters()}, {"params": trained.value_parameters()}], lr=1e-6, eps=1e-5
    )
    queries = [bench.ids(bench.query) for _ in range(bench.samples)]
    phases: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        began = bench.synchronise()
        yield
        phases[name] = bench.synchronise() - began

    def step(number: int) -> None:
        with phase("generate"):
            rolled = sample_responses(trained, queries, number)
        width = max(map(len, rolled.responses))
        mask = response_mask(rolled.responses, width, bench.device)
        with phase("reference"):
            logprobs, _, ref_logprobs, values = forward_rollout(trained, rolled, width, True)
        with phase("reward"):
            scores = score(trained, scorer, rolled)
        with phase("update"):
            rewards = token_rewards(scores, logprobs, ref_logprobs, mask, config.kl_coef)
            advantages = gae(rewards, values, mask, config.gamma, config.lam)
            batch = Batch(rolled, mask, logprobs, values, whiten(advantages, mask), advantages + values)
            update(trained, optimizer, batch, number, False)

    step(1)
    step(2)
    seconds = sum(phases.values())
    found = {"samples_per_s": bench.samples / seconds, "phases_s": {name: round(took, 4) for name, took in phases.items()}}
    return found | {"fits_80_gb": bench.peak_bytes() < CARD}


def cases(step: str) -> list[dict[str, Any]]:
    """What is measured of a step."""
    if step == "sft":
        bases = [("none", False), ("none", True), ("8bit", False), ("4bit", False)]
        return [{"quantization": quantization, "checkpointing": checkpointing} for quantization, checkpointing in bases]
    return [{"quantization": quantization} for quantization in ("none", "8bit")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="1b", help="default 1b")
    parser.add_argument("--step", choices=STEPS, nargs="+", default=list(STEPS), help="default all")
    arguments = parser.parse_args()
    import torch

    if arguments.shape != "smoke" and not torch.cuda.is_available():
        what = f"--shape {arguments.shape} needs a CUDA device, and torch sees none"
        print(f"{what}: use --shape smoke, or mend the driver", file=sys.stderr)
        sys.exit(2)
    steps: dict[str, Callable[..., dict[str, Any]]] = {"sft": sft, "reward": reward, "rollout": rollout, "ppo": ppo}
    for name in arguments.step:
        for case in cases(name):
            bench = Bench(arguments.shape)
            line = {"shape": arguments.shape, "step": name, **case, "device": str(bench.device)}
            if bench.device.type == "cuda":
                line["device"] = torch.cuda.get_device_name()
            torch.manual_seed(1)
            try:
                found = steps[name](bench, **case)
                line |= {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
            except torch.OutOfMemoryError as error:
                line["error"] = str(error).splitlines()[0]
            print(json.dumps(line | {"peak_bytes": bench.peak_bytes()}), flush=True)
            del bench
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
