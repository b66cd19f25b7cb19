"""Folders as the steps before evaluate leave them, made in a second."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks import prompts, soft_prompt
from tasks.artifacts import Identity, Store
from tasks.compute import Compute
from tasks.evaluate.config import EvaluateConfig
from tasks.evaluate.evaluate import evaluate
from tasks.ingest.simulated.world import ATTRIBUTES, PARTS, SITE, Attribute
from tasks.models import adapter_parameters, add_lora, load_model, save_lora
from tasks.progress import Progress
from tasks.reward.model import RewardModel, ScoreHead, save
from tasks.sft.config import LoRAConfig

LORA = LoRAConfig(r=2, alpha=4, dropout=0.0)


def run(config: EvaluateConfig, models: Mapping[str, Path], data: Path, out: Path, champion: Mapping[str, Path] | None = None):
    out.mkdir()
    compute, progress = Compute(device="cpu", threads=1), Progress("evaluate")
    return evaluate(config, **models, data=data, champion=champion, out=out, compute=compute, progress=progress)


def trained(root: Path, sft: Path, seed: int = 1, std: float = 0.2) -> dict[str, Path]:
    """A reward model and a judge on `sft` that prefer other things, and a policy that learned nothing."""
    model = load_model(sft / "model", "fp32", "cpu")
    for name, folder, own in (("reward", root / "reward", seed), ("judge", root / "reward" / "judge", seed + 1)):
        model = add_lora(model, LORA, name, own)
        torch.manual_seed(own)
        for parameter in adapter_parameters(model, name):
            torch.nn.init.normal_(parameter, std=std)
        folder.mkdir(parents=True)
        save(RewardModel(model, name, ScoreHead(model.config.hidden_size, own), mean=0.5, std=2.0), folder)
    model = add_lora(model, LORA, "policy", seed + 2)
    save_lora(model, root / "ppo" / "policy", "policy")
    return {"base": sft, "sft": sft, "reward": root / "reward", "ppo": root / "ppo"}


def heard(models: Mapping[str, Path]) -> dict[str, Path]:
    """What evaluate reads of a run whose policy is the champion."""
    return {step: models[step] for step in ("ppo", "sft", "reward")}


def simulated_titles() -> list[tuple[str, Attribute]]:
    """12 questions of the simulated site, and what each asks for."""
    asked = [(part, ATTRIBUTES[qid % len(ATTRIBUTES)]) for qid, part in enumerate(PARTS[:12], start=1)]
    return [(a.titles[0].format(part=part, sign=next(iter(a.facts))), a) for part, a in asked]


def simulated_eval(root: Path) -> Path:
    """The eval split of those questions, as ingest leaves it."""
    rows = []
    for qid, (title, attribute) in enumerate(simulated_titles(), start=1):
        answer = {"answer_id": qid, "text": attribute.methods[0], "pm_score": 2, "votes": 3, "selected": True}
        rows.append(
            {"site": SITE, "qid": qid, "title": title, "question": title, "answers": [answer], "pairs": [], "split": "eval"}
        )
    folder = root / "questions" / f"site={SITE}" / "split=eval"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "part-00000.parquet")
    (root / "card.json").write_text('{"simulated": true, "best_possible_accuracy": 0.8}')
    (root / "NOTICE.md").write_text("Answers by Ada.")
    return root


def other_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|pad|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def babbler(folder: Path, tokenizer: Any, hidden: int = 48, prompt_tokens: int = 0, seed: int = 5) -> Path:
    """A random model with this tokenizer; with a soft prompt, if it is to have one."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(tokenizer, hidden, max_position_embeddings=192))
    if prompt_tokens:
        prompts.add_soft_prompt(tokenizer, prompt_tokens, model.config.vocab_size)
        soft_prompt.attach(model, torch.randn(prompt_tokens, hidden))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def writer(folder: Path, tokenizer: Any, text: str) -> Path:
    """A model that answers every question with `text`: it knows one next token for each token, and looks at nothing else."""
    last = tokenizer(prompts.SUFFIX, add_special_tokens=False)["input_ids"][-1]
    chain = [last, *prompts.encode_response(tokenizer, text)]
    assert len(set(chain)) == len(chain) < 64, chain
    model = LlamaForCausalLM(_config(tokenizer, 64, max_position_embeddings=256))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, head = model.get_input_embeddings().weight.zero_(), model.get_output_embeddings().weight.zero_()
        embedding[:, 63] = 1
        for place, (token, following) in enumerate(itertools.pairwise(chain)):
            embedding[token] = torch.eye(64)[place]
            head[following, place] = 10.0
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def _config(tokenizer: Any, hidden: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        initializer_range=0.2, tie_word_embeddings=False, **more,
    )  # fmt: skip


def with_manifest(root: Path, folder: Path, step: str, **config: Any) -> Path:
    """The same files in a folder of a store, with a manifest that says how they were made."""
    store, identity = Store(root), Identity(step=step, version=1, config=config)
    with store.attempt(identity.key) as out:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != "manifest.json":
                target = out / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        return store.folder(step, store.publish(out, identity, metrics={"x": 1}, seconds=75, peak_memory_bytes=0).key)
