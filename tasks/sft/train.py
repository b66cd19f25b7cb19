"""Supervised fine-tuning: the base learns to answer, from each question's best answer.

Precision. `fp32`: everything. `bf16` with LoRA: base weights and activations bf16, adapter fp32. `bf16` with full tuning:
fp32 master weights, products in bf16 under autocast, stored as bf16. A base in 8 or 4 bits is one while it is tuned; the adapter
is merged into the base as it was.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks import distributed, memory, models, optim, packing, prompts, soft_prompt
from tasks.base.fit import LOSS_CURVES, Fit, Fitted, fit
from tasks.checkpoint import NO_CHECKPOINTS, Checkpoints
from tasks.compute import Compute, fit_threads, pass_tokens, prepare
from tasks.config import Quantization
from tasks.curves import draw_panels, write_curves
from tasks.progress import Progress
from tasks.sft.config import SFTConfig
from tasks.sft.data import Documents, load_documents

PROBES = 4
ADAPTER = "sft"
PACKING_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # root mean square, of the logits' standard deviation


def train(
    config: SFTConfig,
    *,
    base: Path,
    data: Path,
    out: Path,
    compute: Compute,
    progress: Progress,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> dict[str, Any]:
    """`base` and the sft split in; model/ (whole, merged), adapter/ (LoRA only), curves.json, checks.json, REPORT.md out."""
    device = prepare(compute)
    tokenizer = models.load_tokenizer(base / "model")
    autocast = config.dtype == "bf16" and config.tuning == "full"
    place = distributed.place(device)
    model: Any = models.load_model(base / "model", "fp32" if autocast else config.dtype, place, config.quantization)
    fit_threads(compute, model)
    _check_lengths(config, model)
    if config.tuning == "prompt":
        prompts.add_soft_prompt(tokenizer, config.prompt_tokens, model.get_input_embeddings().num_embeddings)
    documents = load_documents(data, tokenizer, config)
    if config.tuning == "lora":
        model = models.add_lora(model, config.lora, ADAPTER, config.seed).eval()
    elif config.tuning == "prompt":
        ordinary = torch.from_numpy(np.concatenate([d.ids for d in documents.train])).long()
        ordinary = ordinary[ordinary < model.get_input_embeddings().num_embeddings]
        soft_prompt.attach(model, soft_prompt.start(model, ordinary, config.prompt_tokens, config.seed))
    else:
        model.requires_grad_(True)
    if compute.gradient_checkpointing:
        models.checkpoint_gradients(model)
    model = distributed.shard(model, device)

    probes = [[int(i) for i in document.ids] for document in documents.validation[:PROBES]]
    some = [documents.validation[0], *documents.train[:PROBES]]
    checks: dict[str, Any] = {"packing": check_packing(models.causal_lm(model), some, config.dtype, device)}
    how = Fit(
        steps=config.steps,
        rows=config.batch_size,
        row_tokens=config.seq_length,
        learning_rate=config.learning_rate,
        schedule=lambda step: optim.warmup_cosine(step, config.steps, config.warmup_steps),
        weight_decay=config.weight_decay,
        betas=(0.9, 0.999),
        seed=config.seed,
        autocast=autocast,
        setting="sft.learning_rate",
    )
    fitted = fit(
        model, documents.train, documents.validation, how,
        device=device, micro_batch_tokens=pass_tokens(compute, device), progress=progress, checkpoints=checkpoints,
    )  # fmt: skip

    memory.give_back()
    trained = probe_logits(model, probes, tokenizer.pad_token_id, device)
    if distributed.world().rank > 0:
        return {}  # rank 0 stores
    checks |= store(config, model, tokenizer, base=base, out=out, place=place, probes=probes, trained=trained)
    write_curves(out / "curves.json", fitted.curves)
    checks["documents"] = dict(sorted(documents.counts.items()))
    (out / "checks.json").write_text(json.dumps(checks, indent=2) + "\n")
    (out / "REPORT.md").write_text(report(config, documents, fitted, checks))
    return {
        "loss": fitted.validation_loss,
        "perplexity": math.exp(min(fitted.validation_loss, 700)),
        "base_loss": fitted.curves[0]["validation_loss"],
        "steps": config.steps,
        "epochs": round(fitted.epochs, 3),
        "tokens": fitted.tokens,
        "tokens_per_second": round(fitted.tokens / fitted.seconds, 1),
        "documents": len(documents.train),
        "validation_documents": len(documents.validation),
        "trainable_parameters": _trainable(config, out),
    }


def store(
    config: SFTConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: Path,
    out: Path,
    place: torch.device | str,
    probes: list[list[int]],
    trained: torch.Tensor,
) -> dict[str, Any]:
    """Write what was trained, merged into the base as it was before any rounding to 8 or 4 bits, and check the files.

    `trained`: logits of the probes by the trained model.
    """
    quantised = config.quantization != "none"

    def read(folder: Path, quantization: Quantization = "none") -> PreTrainedModel:
        return models.load_model(folder / "model", config.dtype, place, quantization)

    def logits(of: Any) -> torch.Tensor:
        return probe_logits(of, probes, tokenizer.pad_token_id, place)

    # From the files, as every later step will read them; a hand-over is checked where it can still be refused.
    name, expected = "merge" if config.tuning == "lora" else "save", trained
    if config.tuning == "lora":
        models.save_lora(model, out / "adapter", ADAPTER)
        model = models.load_lora(read(base), out / "adapter", ADAPTER, trainable=False)
        expected = logits(model) if quantised else trained
        model = models.merged(model, ADAPTER)
    elif quantised:
        prompt = model.get_input_embeddings().soft_prompt.detach()
        model = read(base)
        soft_prompt.attach(model, prompt)
        expected = logits(model)
    save_model(models.cast_weights(model, config.dtype), tokenizer, out / "model")
    del model
    checks: dict[str, Any] = {name: models.check_logits(expected, logits(read(out)), config.dtype, name)}
    if quantised:
        checks["quantised"] = models.compare_logits(expected, trained)
        again = logits(read(out, config.quantization))
        checks["quantised_again"] = models.check_requantised(trained, again, checks["quantised"], config.dtype)
    return checks


def check_packing(
    model: PreTrainedModel, documents: list[packing.Document], dtype: str, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Logits of documents packed into one row against those of each alone; an architecture that mixes them is refused."""
    batch = packing.collate(documents, device)
    compared = models.Comparison()
    with torch.no_grad():
        hidden = packing.hidden_states(model, batch)
        for start, document in zip(batch.starts, documents, strict=True):
            ids = torch.tensor(document.ids, dtype=torch.long, device=device)
            together, alone = hidden[start : start + len(ids)], models.trunk(model)(ids[None]).last_hidden_state[0]
            for rows in models.row_chunks(len(ids), model.config.vocab_size):
                compared.add(models.logits(model, alone[rows]), models.logits(model, together[rows]))
    error = compared.result()["rms_error"]
    if not error <= PACKING_TOLERANCE[dtype]:
        raise ValueError(
            f"{type(model).__name__} does not keep packed documents apart (logits differ by {error:.2g} of their spread)"
        )
    return {"rms_error": error, "max_error": compared.largest}


def probe_logits(model: Any, probes: list[list[int]], pad_id: int, device: torch.device | str) -> torch.Tensor:
    """Logits at every token of the probe texts, (N, V) on the CPU, dropout off."""
    ids, mask = models.pad_right(probes, pad_id, device)
    with torch.no_grad():
        hidden = models.hidden_states(model.eval(), ids, mask)[mask.bool()]
        vocab = models.causal_lm(model).config.vocab_size
        return torch.cat([models.logits(model, hidden[rows]).cpu() for rows in models.row_chunks(len(hidden), vocab)])


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A complete Hugging Face folder: safetensors, configuration, tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def report(config: SFTConfig, documents: Documents, fitted: Fitted, checks: dict[str, Any]) -> str:
    """What was trained on, and how the loss went."""
    first = fitted.curves[0]["validation_loss"]
    what = {
        "lora": f"LoRA r {config.lora.r}",
        "prompt": f"a prompt of {config.prompt_tokens} tokens",
        "full": "all weights",
    }[config.tuning]
    base = config.dtype if config.quantization == "none" else f"{config.dtype}, base in {config.quantization}"
    hand_over = checks.get("merge") or checks["save"]
    left_out = {key: n for key, n in sorted(documents.counts.items()) if n and "documents" not in key}
    rows = [
        ("validation loss", f"{first:.4f} -> {fitted.validation_loss:.4f}"),
        ("validation perplexity", f"{math.exp(min(first, 700)):.2f} -> {math.exp(min(fitted.validation_loss, 700)):.2f}"),
        ("tuned", f"{what}, {base}"),
        ("steps", f"{config.steps} ({fitted.epochs:.1f} epochs)"),
        ("tokens", f"{fitted.tokens:,} read, {fitted.label_tokens:,} with loss"),
        ("questions", f"{len(documents.train):,} trained on, {len(documents.validation):,} held back"),
        ("left out or cut", ", ".join(f"{key} {n:,}" for key, n in left_out.items()) or "none"),
        ("stored model against trained one", f"logits differ by {hand_over['rms_error']:.1e} of their spread"),
    ]
    if (again := checks.get("quantised_again")) is not None:
        what = f"stored model in {config.quantization} against trained one"
        rows.append((what, f"{again['pair_flips']:.2%} of token pairs change order"))
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    change = fitted.validation_loss - first
    sentence = (
        f"On {len(documents.validation):,} held-out answers the loss went from **{first:.4f}** (base) to "
        f"**{fitted.validation_loss:.4f}** ({change:+.4f} nats per token)."
    )
    drawn = draw_panels(fitted.curves, LOSS_CURVES, width=7.2, height=2.8)
    return f"# sft: supervised fine-tuning\n\n{sentence}\n\n{drawn}\n\n| the training | |\n|---|---|\n{table}\n"


def _check_lengths(config: SFTConfig, model: PreTrainedModel) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and config.seq_length > context:
        raise ValueError(f"sft.seq_length={config.seq_length} is longer than the base's context of {context}: lower it")
    if config.tuning == "prompt" and config.prompt_tokens >= config.max_query_tokens:
        raise ValueError(
            f"sft.prompt_tokens={config.prompt_tokens} leaves no room for a question in "
            f"sft.max_query_tokens={config.max_query_tokens}: lower it"
        )
    if config.max_query_tokens >= config.seq_length:
        raise ValueError(
            f"sft.max_query_tokens={config.max_query_tokens} leaves no room for an answer in "
            f"sft.seq_length={config.seq_length}: lower it"
        )


def _trainable(config: SFTConfig, out: Path) -> int:
    from safetensors import safe_open

    folder = out / ("adapter" if config.tuning == "lora" else "model")
    if config.tuning == "prompt":
        prompt = soft_prompt.read(folder)
        return 0 if prompt is None else prompt.numel()
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total
