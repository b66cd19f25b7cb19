"""Causal language models and their adapters, as every step after `base` loads, runs and saves them.

One frozen base carries several named LoRA adapters; `use(model, name)` says which of them is active. Files are safetensors
and JSON only, and everything is loaded from local folders without remote code.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from tasks import lora as fast_lora
from tasks import quantized, soft_prompt, swiglu
from tasks.config import Quantization

transformers_logging.disable_progress_bar()  # our own progress is told by tasks.progress
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # peft asks for it, on every model

DType = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_FLIPS = 0.01
LOGITS_AT_ONCE = 2**20


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a stored model; its pad token is a token of its own, so that the model can learn to stop."""
    # AutoTokenizer rebuilds some tokenizers from the architecture's name and gets their pre-tokenizer wrong; the file is right.
    if (folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    elif any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "tokenizer_config.json")):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    else:
        raise ValueError(f"{folder}: a model without a tokenizer; put tokenizer.json beside its weights")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer has no eos token; name one in tokenizer_config.json")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        what = "no pad token" if tokenizer.pad_token_id is None else "eos as its pad token, so a model would never learn to stop"
        raise ValueError(f"{folder}: the tokenizer has {what}; let the step `base` add one (base.source=path, base.path={folder})")
    return cast(PreTrainedTokenizerFast, tokenizer)


def load_model(folder: Path, dtype: DType, device: torch.device | str, quantization: Quantization = "none") -> PreTrainedModel:
    """A causal language model for reading: eval mode, frozen, SDPA attention; nothing may be missing from its weights.

    With `quantization` the trunk's linear layers are rounded to 8 or 4 bits while they are read; `dtype` is what the rest is in,
    and what products are made in.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no model here (config.json is missing)")
    load: Any = AutoModelForCausalLM.from_pretrained
    how = quantized.load_settings(quantization, DTYPES[dtype])
    prompt = soft_prompt.read(folder)
    with _quiet(prompt is not None):  # transformers does not know what it is
        model, info = load(
            folder,
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            use_safetensors=True,  # never a pickle
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({} if how is None else {"quantization_config": how, "device_map": {"": torch.device(device)}}),
        )
    wrong = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} weights are missing or misshapen, first {wrong[0]}: not a whole causal language model"
        )
    if prompt is not None:
        soft_prompt.attach(model, prompt)
    swiglu.save_memory(model)
    model = model.eval().requires_grad_(False)
    if how is None:
        return cast(PreTrainedModel, model.to(device))
    quantized.settle(model, device)
    return cast(PreTrainedModel, model)


@contextmanager
def _quiet(really: bool) -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    if really:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def checkpoint_gradients(model: PreTrainedModel | PeftModel) -> None:
    """From now on keep only each decoder layer's input for the backward pass, which runs the layer again: less memory, same bits.

    transformers' own switch does this in training mode alone, and PPO runs in eval mode.
    """
    layers = [module for module in trunk(model).modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"compute.gradient_checkpointing: {type(causal_lm(model)).__name__} has no layers that can run again; turn it off"
        )
    for layer in layers:
        layer.forward = partial(_run_again, causal_lm(model).config, layer, layer.forward)


def _run_again(config: Any, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # By the time of the backward pass another adapter may be active, and another attention: the second run is to be like the first.
    attention = config._attn_implementation
    adapters = [(module, *_switches(module)) for module in layer.modules() if isinstance(module, LoraLayer)]

    def as_before(*args: Any, **kwargs: Any) -> Any:
        now = config._attn_implementation, [(module, *_switches(module)) for module, *_ in adapters]
        try:
            config._attn_implementation = attention
            _switch(adapters)
            return forward(*args, **kwargs)
        finally:
            config._attn_implementation = now[0]
            _switch(now[1])

    # Not the reentrant kind: it would give no gradients, because a frozen embedding's output asks for none.
    return checkpoint(as_before, *args, use_reentrant=False, **kwargs)


def cast_weights(model: PreTrainedModel, dtype: DType) -> PreTrainedModel:
    """The same model with its weights in `dtype`; `model.to(dtype)` would round the rotary frequencies too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    return model


def causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The language model itself, inside its PEFT wrapper or not."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def trunk(model: PreTrainedModel | PeftModel) -> nn.Module:
    """The language model without its head: token ids to hidden states after the final norm."""
    return causal_lm(model).base_model


# ---- adapters


class LoRA(Protocol):
    """Shape of an adapter; tasks.sft.config.LoRAConfig is one (not imported: `base` uses this module and comes before `sft`)."""

    @property
    def r(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...


def lora_targets(model: PreTrainedModel | PeftModel) -> list[str]:
    """Names of the trunk's linear layers (q_proj, up_proj, ...); not the head."""
    names = {
        name.removesuffix(".base_layer").rsplit(".", 1)[-1]
        for name, module in trunk(model).named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and ".lora_" not in name
    }
    if not names:
        raise ValueError(f"{type(causal_lm(model)).__name__} has no linear layers that LoRA could adapt")
    return sorted(names)


def add_lora(model: PreTrainedModel | PeftModel, lora: LoRA, name: str, seed: int) -> PeftModel:
    """A new adapter, trainable and active, on every linear layer of the trunk; other adapters stay as they are.

    B starts at zero (Hu et al. 2021), so the model's output is bit for bit that of its base until the first update.
    """
    config = LoraConfig(
        r=lora.r,
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=lora_targets(model),
        bias="none",
        task_type="CAUSAL_LM",
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), _keeping_gradients(model):
        torch.manual_seed(seed)
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    _make(model, name, trainable=True)
    _activate(model, name)
    fast_lora.speed_up(model)
    return model


def load_lora(model: PreTrainedModel | PeftModel, folder: Path, name: str, trainable: bool) -> PeftModel:
    """Put the adapter saved in `folder` on the model under `name`, active; other adapters stay as they are."""
    if not (folder / ADAPTER_WEIGHTS).is_file() or not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: no LoRA adapter here ({ADAPTER_WEIGHTS} and adapter_config.json)")
    with _keeping_gradients(model):
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=name, is_trainable=trainable)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=trainable)
    # PEFT only warns about weights that it does not find.
    saved, loaded = set(load_file(folder / ADAPTER_WEIGHTS)), set(_adapter_state(model, name))
    if saved != loaded:
        differing = saved ^ loaded
        raise ValueError(
            f"{folder}: the adapter is not one for this model; {len(differing)} weights differ, first {min(differing)}"
        )
    _make(model, name, trainable=trainable)
    _activate(model, name)
    fast_lora.speed_up(model)
    return model.eval() if not trainable else model


def save_lora(model: PeftModel, folder: Path, name: str) -> None:
    """The adapter in PEFT's own format, flat in `folder`, without a trace of where its base lay: same adapter, same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.detach().float().cpu().contiguous() for key, tensor in sorted(_adapter_state(model, name).items())}
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config[name].to_dict()
    config |= {"base_model_name_or_path": None, "inference_mode": True, "revision": None}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=_plain) + "\n")


@contextmanager
def use(model: PreTrainedModel | PeftModel, name: str | None) -> Iterator[None]:
    """Inside the `with`, adapter `name` is active; with None every adapter is off, which is the frozen base, bit for bit.

    Says nothing about gradients: PEFT's own set_adapter and disable_adapter freeze what they switch off.
    """
    if not isinstance(model, PeftModel):
        if name is not None:
            raise ValueError(f"this model has no adapter {name!r}, it has none at all")
        yield
        return
    before = [(layer, *_switches(layer)) for layer in _lora_layers(model)]
    _activate(model, name)
    try:
        yield
    finally:
        _switch(before)


def adapter_parameters(model: PeftModel, name: str) -> list[nn.Parameter]:
    """The weights of one adapter, in a fixed order: what an optimizer takes."""
    return [part[name].weight for layer in _lora_layers(model) for part in (layer.lora_A, layer.lora_B) if name in part]


def merged(model: PeftModel, name: str) -> PreTrainedModel:
    """The language model with W + scale * B A in place of W, in W's dtype; takes the given model apart.

    The sum is made in fp32 and rounded once. W must not be quantised: merging into 8 or 4 bits quantises a second time.
    """
    for layer in _lora_layers(model):
        weight = layer.get_base_layer().weight
        if not weight.dtype.is_floating_point:
            raise ValueError("cannot merge an adapter into quantised weights; load the base in fp32 or bf16 first")
        with torch.no_grad():
            weight.copy_((weight.float() + layer.get_delta_weight(name).float()).to(weight.dtype))
    return cast(PreTrainedModel, cast(Any, model).unload())


class Comparison:
    """How far logits are from those they should equal, told a few rows at a time; sums are made in float64.

    rms_error is in units of their standard deviation; pair_flips is the share of token pairs (v, v + 1) whose order turned.
    """

    def __init__(self) -> None:
        self._numbers = 0
        self._sums = self._largest = torch.zeros(())

    def add(self, expected: Tensor, actual: Tensor) -> None:
        """(rows, V) each."""
        before, after = (tensor - tensor.roll(1, -1) for tensor in (expected, actual))
        flips, error, expected = (before * after < 0).sum(), actual - expected, expected.double()
        self._numbers += expected.numel()
        sums = [expected.sum(), expected.square().sum(), error.double().square().sum(), flips.double()]
        self._sums = self._sums.to(error.device) + torch.stack(sums)
        self._largest = torch.maximum(self._largest.to(error.device), error.abs().max())

    def result(self) -> dict[str, float]:
        total, squares, error, flips = self._sums
        spread = ((squares - total**2 / self._numbers) / (self._numbers - 1)).sqrt()
        return {
            "rms_error": float((error / self._numbers).sqrt() / spread),
            "max_error": float(self._largest / spread),
            "pair_flips": float(flips / self._numbers),
        }

    @property
    def largest(self) -> float:
        """The largest difference, as it is."""
        return float(self._largest)


def compare_logits(expected: Tensor, actual: Tensor) -> dict[str, float]:
    """How far (..., V) logits are from those they should equal; see Comparison."""
    compared = Comparison()
    expected, actual = expected.flatten(0, -2), actual.flatten(0, -2)
    for rows in row_chunks(*expected.shape):
        compared.add(expected[rows], actual[rows])
    return compared.result()


def row_chunks(rows: int, vocab: int) -> Iterator[slice]:
    """Slices of so few rows of logits at a time that their copies take no memory to speak of: 4 MB each in fp32."""
    step = max(1, LOGITS_AT_ONCE // vocab)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def check_logits(expected: Tensor, actual: Tensor, dtype: DType, what: str) -> dict[str, float]:
    """compare_logits, or ValueError where more was lost than rounding to `dtype` explains."""
    result = compare_logits(expected, actual)
    tolerance = {"fp32": 1e-4, "bf16": 0.05}[dtype]
    if not (result["rms_error"] <= tolerance and result["pair_flips"] <= MAX_FLIPS):
        raise ValueError(
            f"{what} changed the model: logits differ by {result['rms_error']:.2g} of their spread (allowed in {dtype}: "
            f"{tolerance}) and {result['pair_flips']:.2%} of token pairs changed order (allowed: {MAX_FLIPS:.0%})"
        )
    return result


def check_requantised(expected: Tensor, actual: Tensor, rounding: dict[str, float], dtype: DType) -> dict[str, float]:
    """compare_logits of a model tuned on rounded weights and of its merged form rounded anew, or ValueError.

    The two were rounded apart, so they differ by about sqrt(2) of what one rounding costs (`rounding`, the same comparison for
    the trained model with and without it); more than twice of that is another model.
    """
    result = compare_logits(expected, actual)
    limit = 2 * rounding["rms_error"] + {"fp32": 1e-4, "bf16": 0.05}[dtype]
    if not result["rms_error"] <= limit:
        raise ValueError(
            f"quantising the merged model changed it: logits differ by {result['rms_error']:.2g} of their spread, where rounding "
            f"the base did by {rounding['rms_error']:.2g}: use sft.quantization=none"
        )
    return result


def _lora_layers(model: PeftModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _adapter_state(model: PeftModel, name: str) -> dict[str, Tensor]:
    # "auto" would ask the hub whether the embeddings were resized.
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def _switches(layer: Any) -> tuple[Any, bool]:
    """Which adapters of a LoRA layer are active, and whether all are off."""
    return layer._active_adapter, layer._disable_adapters


def _switch(layers: list[tuple[Any, Any, bool]]) -> None:
    for layer, active, disabled in layers:
        layer._active_adapter, layer._disable_adapters = active, disabled


def _activate(model: PeftModel, name: str | None) -> None:
    if name is not None and name not in model.peft_config:
        raise ValueError(f"this model has no adapter {name!r}; it has {sorted(model.peft_config)}")
    for layer in _lora_layers(model):
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]


def _make(model: PeftModel, name: str, trainable: bool) -> None:
    for parameter in adapter_parameters(model, name):
        parameter.data = parameter.data.float()  # fp32 also on a bf16 base
        parameter.requires_grad_(trainable)


@contextmanager
def _keeping_gradients(model: nn.Module) -> Iterator[None]:
    """PEFT freezes the adapters it makes inactive; those that were trainable stay so."""
    trainable = [p for p in model.parameters() if p.requires_grad] if isinstance(model, PeftModel) else []
    yield
    for parameter in trainable:
        parameter.requires_grad_(True)


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


# ---- running


def pad_right(ids: list[list[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Rows of ids -> input_ids and attention_mask, (B, T) each. The mask comes from the lengths, never from the ids."""
    longest = max(map(len, ids))
    rows = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in ids], dtype=torch.long, device=device)
    lengths = torch.tensor([len(row) for row in ids], device=device)
    return rows, (torch.arange(longest, device=device) < lengths[:, None]).long()


def hidden_states(model: PreTrainedModel | PeftModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states after the final norm, without the head: (B, T), (B, T) -> (B, T, D). Padding may stand on either side."""
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    output = trunk(model)(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    return output.last_hidden_state


def logits(model: PreTrainedModel | PeftModel, hidden: Tensor) -> Tensor:
    """The head: (..., D) -> (..., V) in fp32. Give it only the rows that are needed."""
    return causal_lm(model).get_output_embeddings()(hidden).float()
