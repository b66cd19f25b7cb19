"""`stackrlhf export`: a run's policy as a Hugging Face folder that others can load, credit and trace back.

DIR/model.safetensors, config.json, generation_config.json, tokenizer.json, ...   or, with --adapter, adapter_*.{safetensors,json}
DIR/README.md      the model card: verdict, lineage, settings, credits, limits
DIR/lineage.json   keys and digests of everything that went in
DIR/NOTICE.md      the authors and licences of the texts
"""

import argparse
import json
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

from flows.commands import DONE
from flows.commands.card import Subject, model_card
from flows.lineage import find, lineage
from flows.show import bytes_text
from tasks.artifacts import Manifest, Store
from tasks.disk import SUFFIXES, guarded, size_of


def export(arguments: argparse.Namespace) -> int:
    target: Path = arguments.folder.expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already and not an empty folder: give another, or empty it")
    store = Store(arguments.store)
    policy = find(store, "ppo", "champion" if arguments.champion else arguments.ppo)
    subject = subject_of(store, policy, arguments.name or target.name, arguments.adapter)
    print(f"exporting ppo {policy.key[:12]} ...", file=sys.stderr)
    building = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    with guarded(target):
        building.mkdir(parents=True)
    try:
        with guarded(building):
            write(store, subject, building)
            for path in building.rglob("*"):
                assert path.is_dir() or path.suffix in SUFFIXES or path.name.startswith(("LICENSE", "NOTICE")), path
                if path.is_file():
                    path.chmod(0o644)  # safetensors makes files that only their owner may read
            os.replace(building, target)  # over an empty folder, or nothing
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if subject.prompt_tokens:
        print(
            f"note: a soft prompt of {subject.prompt_tokens} tokens stands before every query; transformers alone does not know "
            "it: load the folder with tasks.models.load_model and tasks.prompts.encode_query",
            file=sys.stderr,
        )
    if arguments.json:
        keys = {step: manifest.key for step, manifest in subject.made_from.items()}
        print(json.dumps({"folder": str(target), "ppo": policy.key, "lineage": keys, "bytes": size_of(target)}, indent=1))
    else:
        print(
            f"{target}: {bytes_text(size_of(target))}, {'adapter' if subject.adapter else 'merged model'} of ppo {policy.key[:12]}"
        )
    return DONE


def subject_of(store: Store, policy: Manifest, name: str, adapter: bool) -> Subject:
    """All that is told about the policy. ValueError where what it was made from is gone."""
    made_from = lineage(store, policy)
    for step in ("sft", "base", "ingest"):
        if step not in made_from:
            raise ValueError(f"the {step} that ppo {policy.key[:12]} was made from is not in {store.uri}: run the pipeline again")
    evaluated = [m for m in store.manifests("evaluate") if m.identity.inputs.get("ppo") == policy.key]
    verdict = None
    if evaluated:
        folder = store.open(store.artifact(evaluated[-1]))
        verdict = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
        made_from = {**made_from, "evaluate": evaluated[-1]}
    data = store.open(store.artifact(made_from["ingest"]))
    return Subject(
        name=name,
        adapter=adapter,
        made_from=made_from,
        verdict=verdict,
        data_card=json.loads((data / "card.json").read_text(encoding="utf-8")),
        notice=(data / "NOTICE.md").read_text(encoding="utf-8") if (data / "NOTICE.md").is_file() else "",
    )


def write(store: Store, subject: Subject, out: Path) -> None:
    sft, ppo, base = (store.open(store.artifact(subject.made_from[step])) for step in ("sft", "ppo", "base"))
    if subject.adapter:
        for path in sorted((ppo / "policy").iterdir()):
            shutil.copyfile(path, out / path.name)
        _tokenizer(sft / "model", out)
    else:
        _merge(sft / "model", ppo / "policy", subject.settings("ppo"), out)
    for path in sorted(base.glob("LICENSE*")):
        shutil.copyfile(path, out / path.name)
    if subject.notice:
        (out / "NOTICE.md").write_text(subject.notice, encoding="utf-8")
    (out / "README.md").write_text(model_card(subject), encoding="utf-8")
    (out / "lineage.json").write_text(json.dumps(subject.lineage(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer(model: Path, out: Path) -> None:
    from tasks.models import load_tokenizer

    load_tokenizer(model).save_pretrained(out)


def _merge(model: Path, adapter: Path, settings: dict[str, Any], out: Path) -> None:
    """W + scale * B A in fp32, and kept in fp32: what PPO learned is smaller than what bf16 can hold beside W."""
    from transformers import GenerationConfig

    from tasks.models import load_lora, load_model, load_tokenizer, merged

    tokenizer = load_tokenizer(model)
    whole: Any = merged(load_lora(load_model(model, "fp32", "cpu"), adapter, "policy", trainable=False), "policy")
    whole.generation_config = GenerationConfig(
        do_sample=True,
        temperature=settings["temperature"],
        max_new_tokens=settings["max_new_tokens"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    whole.save_pretrained(out)
    tokenizer.save_pretrained(out)
