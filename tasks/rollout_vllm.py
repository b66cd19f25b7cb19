"""Rollouts by vLLM (the package `vllm`, a CUDA device): token ids in and out, and what the engine thought of each token.

The engine holds its own copy of the unquantised base and gets the policy's adapter as files, under a new id each time, because
vLLM reads an adapter once for each id. Its kernels are not the trainer's: the log-probabilities that it returns are those of the
distribution that it sampled from (`processed_logprobs`), and stand in `Rollout.engine_logprobs`; tasks.mismatch and the truncated
importance weights of PPO take it from there. Between rollouts the engine sleeps: its weights wait in the host's memory, its cache
is gone, and the update has the card for itself.
"""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from tasks import quantized
from tasks.distributed import world
from tasks.models import causal_lm, save_lora
from tasks.prompts import soft_prompt
from tasks.rollout import Rollout, check_room

MEMORY = 0.45
"""Share of the card that the engine may take while it is awake."""


class _Engine(NamedTuple):
    llm: Any
    ids: Iterator[int]


_engines: "WeakKeyDictionary[Any, _Engine]" = WeakKeyDictionary()


def generate_shared(
    model: PeftModel,
    tokenizer: Any,
    queries: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: torch.device | str,
) -> Rollout:
    """tasks.rollout.generate_shared by vLLM: a response to each query from the model with its active adapter.

    A row's tokens depend on seed and row, up to the engine's own rounding. ValueError, in one line, where vLLM cannot do it.
    """
    vllm = _import(model, torch.device(device))
    from vllm.lora.request import LoRARequest

    if soft_prompt(tokenizer):
        raise ValueError("ppo.engine=vllm has no rows for the tokens of a soft prompt (sft.tuning=prompt): set ppo.engine=own")
    check_room(causal_lm(model), queries, max_new_tokens)
    adapter = _active_adapter(model)
    engine = _engine(vllm, model, adapter)
    seeds = [int(np.random.default_rng((seed, row)).integers(2**31)) for row in range(len(queries))]
    sampling = [
        vllm.SamplingParams(
            temperature=temperature,
            max_tokens=max_new_tokens,
            ignore_eos=True,  # the model's generation settings may name further ends
            stop_token_ids=[tokenizer.eos_token_id],
            seed=one,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
        )
        for one in seeds
    ]
    prompts = [vllm.TokensPrompt(prompt_token_ids=query) for query in queries]
    engine.llm.wake_up()
    try:
        with tempfile.TemporaryDirectory(prefix="stackrlhf-adapter-") as folder:
            request = None
            if adapter is not None:
                number = next(engine.ids)
                save_lora(model, Path(folder), adapter)
                request = LoRARequest(lora_name=f"{adapter}-{number}", lora_int_id=number, lora_path=folder)
            outputs = engine.llm.generate(prompts, sampling, lora_request=request, use_tqdm=False)
    finally:
        engine.llm.sleep(level=1)
    return to_rollout(queries, [output.outputs[0] for output in outputs], tokenizer.eos_token_id)


def to_rollout(queries: list[list[int]], completions: list[Any], eos: int) -> Rollout:
    """vLLM's completions (`token_ids`, `logprobs`: a dict by token for each position) as a Rollout."""
    responses = [list(completion.token_ids) for completion in completions]
    logprobs = [
        torch.tensor([position[token].logprob for token, position in zip(response, completion.logprobs, strict=True)])
        for response, completion in zip(responses, completions, strict=True)
    ]
    return Rollout(queries, responses, [response[-1] == eos for response in responses], engine_logprobs=logprobs)


def _import(model: Any, device: torch.device) -> Any:
    try:
        import vllm
    except ImportError:
        raise ValueError("ppo.engine=vllm: vllm is not installed (docs/dependencies.md says why); set ppo.engine=own") from None
    if device.type != "cuda":
        raise ValueError("ppo.engine=vllm needs a CUDA device: set ppo.engine=own to sample on a CPU")
    if world().size > 1:
        raise ValueError(f"ppo.engine=vllm runs in one process, not in {world().size}: set compute.processes=1 or ppo.engine=own")
    if quantized.quantised_layers(causal_lm(model)):
        raise ValueError("ppo.engine=vllm samples from an unquantised base: set ppo.quantization=none, or ppo.engine=own")
    return vllm


def _engine(vllm: Any, model: PeftModel, adapter: str | None) -> _Engine:
    """The engine for this base; started once, it lives as long as the base."""
    base = causal_lm(model)
    if base not in _engines:
        folder, rank = Path(base.name_or_path or ""), 8
        if not (folder / "config.json").is_file():
            raise ValueError(f"ppo.engine=vllm reads the base from its folder, and {folder} is none: set ppo.engine=own")
        if adapter is not None:
            rank = model.peft_config[adapter].r  # type: ignore[attr-defined]
        llm = vllm.LLM(
            model=str(folder),
            dtype=str(base.dtype).removeprefix("torch."),
            enable_lora=True,
            max_loras=1,
            max_lora_rank=max(8, 1 << (rank - 1).bit_length()),  # vLLM knows powers of two from 8 on
            max_model_len=base.config.max_position_embeddings,
            logprobs_mode="processed_logprobs",  # with the temperature in them
            generation_config="vllm",
            gpu_memory_utilization=MEMORY,
            enable_sleep_mode=True,
            trust_remote_code=False,
        )
        llm.sleep(level=1)
        _engines[base] = _Engine(llm, itertools.count(1))
    return _engines[base]


def _active_adapter(model: Any) -> str | None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            return None if layer.disable_adapters else str(layer.active_adapters[0])
    return None
