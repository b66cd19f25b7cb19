"""Talking to the policy of a run."""

import argparse
import contextlib
import io
import itertools
import sys
from typing import Any

from flows.lineage import find
from tasks.artifacts import Store
from tasks.compute import Compute


def chat(arguments: argparse.Namespace) -> int:
    store = Store(arguments.store)
    policy = find(store, "ppo", "champion" if arguments.champion else arguments.ppo)
    sft = store.manifest("sft", policy.identity.inputs["sft"])
    if sft is None:
        raise ValueError(f"the sft model of ppo {policy.key[:12]} is not in {store.uri}: run the pipeline again")
    folder, adapter = store.open(store.artifact(sft)), store.open(store.artifact(policy))
    print(f"loading {'sft ' + sft.key[:12] if arguments.sft else 'ppo ' + policy.key[:12]} ...", file=sys.stderr)

    with contextlib.redirect_stderr(io.StringIO()):
        from tasks.compute import prepare
        from tasks.models import load_lora, load_model, load_tokenizer
        from tasks.prompts import decode_response, encode_query
        from tasks.rollout import generate

        device = prepare(Compute(device=arguments.device, threads=arguments.threads))
        tokenizer = load_tokenizer(folder / "model")
        model: Any = load_model(folder / "model", str(policy.identity.config["dtype"]), device)  # type: ignore[arg-type]
        if not arguments.sft:
            model = load_lora(model, adapter / "policy", "policy", trainable=False)
            model.set_adapter("policy")
        model.eval()

    def answer(question: str, seed: int) -> str:
        limit = max(16, int(model.config.max_position_embeddings) - arguments.max_new_tokens)
        query = encode_query(tokenizer, question, limit)
        rollout = generate(
            model,
            tokenizer,
            [query],
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            seed=seed,
            device=device,
        )
        return decode_response(tokenizer, rollout.responses[0])

    if arguments.question is not None:
        print(answer(arguments.question, arguments.seed))
        return 0
    print("ask; an empty line or Ctrl-D ends", file=sys.stderr)
    for turn in itertools.count():
        try:
            question = input("Question: " if sys.stdin.isatty() else "")
        except EOFError:
            break
        if not question.strip():
            break
        print(answer(question, arguments.seed + turn))
    return 0
