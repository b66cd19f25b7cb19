"""A small language model from nothing: byte-level BPE and a tied-embedding Llama, both trained on the sft split."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tasks import distributed, optim, prompts
from tasks.base.config import ScratchConfig
from tasks.base.fit import Fit, Fitted, fit, held_out
from tasks.checkpoint import NO_CHECKPOINTS, Checkpoints
from tasks.compute import Compute, fit_threads, pass_tokens
from tasks.ingest.dataset import iter_questions
from tasks.models import checkpoint_gradients
from tasks.packing import Document
from tasks.progress import Progress

EOS, PAD = "<|eos|>", "<|pad|>"
WARMUP = 0.05  # of the steps
FLOOR = 0.1  # of the peak learning rate
BETAS = (0.9, 0.95)


def iter_threads(data: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(key, question, its answers) of the sft split; the answers in the order of the site's page, the most voted first."""
    for question in iter_questions(data, "sft", columns=["site", "qid", "question", "answers"]):
        answers = [answer for answer in question["answers"] if answer["text"].strip()]
        if answers:
            answers.sort(key=lambda a: (-a["pm_score"], -a["votes"], a["answer_id"]))
            yield f"{question['site']}/{question['qid']}", question["question"], [answer["text"] for answer in answers]


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's, but every digit is a token of its own; no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def architecture(config: ScratchConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> LlamaConfig:
    """The model's shape; without a tokenizer, that of one which came to all its tokens."""
    if config.hidden_size % (2 * config.heads):
        raise ValueError(
            f"base.scratch.hidden_size={config.hidden_size} must be a multiple of twice "
            f"base.scratch.heads={config.heads} (rotary positions)"
        )
    return LlamaConfig(
        vocab_size=config.vocab_size if tokenizer is None else len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.context,
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None if tokenizer is None else tokenizer.eos_token_id,
        pad_token_id=None if tokenizer is None else tokenizer.pad_token_id,
    )


def initialise(config: ScratchConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A Llama with random weights, N(0, 0.02)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(architecture(config, tokenizer))
    model.set_attn_implementation("sdpa")
    return cast(PreTrainedModel, model)


def train_scratch(
    config: ScratchConfig,
    seed: int,
    *,
    data: Path,
    device: torch.device,
    compute: Compute,
    progress: Progress,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Fitted]:
    """Tokenizer, then language modelling on whole threads; the questions held back are those of `sft`."""
    threads = list(iter_threads(data))
    validation_keys = held_out([key for key, _, _ in threads])
    used = [(question, answers) for key, question, answers in threads if key not in validation_keys]
    texts = (f"{prompts.query_text(question)} {answer.strip()}" for question, answers in used for answer in answers)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    train = [encode(tokenizer, question, answers, config.context) for question, answers in used]
    validation = [
        encode(tokenizer, question, answers, config.context) for key, question, answers in threads if key in validation_keys
    ]
    model: Any = initialise(config, tokenizer, seed)
    model = model.to(device)
    fit_threads(compute, model)
    if compute.gradient_checkpointing:
        checkpoint_gradients(model)
    if distributed.world().sharded:
        progress.note("fsdp cuts frozen weights, and this model has none: each process holds it whole")
    warmup = round(WARMUP * config.steps)
    how = Fit(
        steps=config.steps,
        rows=max(1, config.batch_tokens // config.context),
        row_tokens=min(config.context, config.batch_tokens),
        learning_rate=config.learning_rate,
        schedule=lambda step: optim.warmup_cosine(step, config.steps, warmup, FLOOR),
        weight_decay=config.weight_decay,
        betas=BETAS,
        seed=seed,
        setting="base.scratch.learning_rate",
    )
    fitted = fit(
        model, train, validation, how,
        device=device, micro_batch_tokens=pass_tokens(compute, device), progress=progress, checkpoints=checkpoints,
    )  # fmt: skip
    return model, tokenizer, fitted


def encode(tokenizer: PreTrainedTokenizerBase, question: str, answers: Sequence[str], context: int) -> Document:
    """A thread as one document: the question and its answers, best first, each ended by EOS; all of it carries loss.

    What comes after an answer depends on how good that answer was (below a wrong one, no better one follows). So the model
    learns to know, at an answer's end, what the answer is worth, and the reward model has something to begin with. A
    question may take half of the context; what the context cannot hold of the answers is cut.
    """
    ids = prompts.encode_query(tokenizer, question, context // 2)
    again = tokenizer(prompts.SUFFIX, add_special_tokens=False)["input_ids"]
    for place, answer in enumerate(answers):
        ids = [*ids, *(again if place else []), *prompts.encode_response(tokenizer, answer)]
    return Document(np.array(ids[:context], np.int32), first_label=1)
