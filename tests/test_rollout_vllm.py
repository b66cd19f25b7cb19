"""What of the vLLM engine can be had without a GPU; with one and the extra, a rollout by both."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from tasks.models import add_lora, load_model, load_tokenizer, use
from tasks.rollout_vllm import generate_shared, to_rollout
from tasks.sft.config import LoRAConfig

INSTALLED = importlib.util.find_spec("vllm") is not None
HOW = {"max_new_tokens": 4, "temperature": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def model(tiny_model):
    return add_lora(load_model(tiny_model / "model", "fp32", "cpu"), LoRAConfig(r=4, alpha=8, dropout=0.0), "policy", 0)


@pytest.mark.skipif(INSTALLED, reason="vllm is installed here")
def test_without_the_package_it_is_refused_in_one_line_that_names_the_way_out(model):
    with pytest.raises(ValueError, match=r"vllm is not installed .* set ppo.engine=own") as error:
        generate_shared(model, None, [[5]], device="cuda", **HOW)
    assert "\n" not in str(error.value)


def test_what_vllm_returns_becomes_a_rollout():
    def said(**logprobs: float):
        return {int(token[1:]): SimpleNamespace(logprob=value) for token, value in logprobs.items()}

    # vLLM gives the sampled token's log-probability, and may give others beside it
    completions = [
        SimpleNamespace(token_ids=(7, 0), logprobs=[said(t7=-0.5, t3=-0.1), said(t0=-1.0)]),
        SimpleNamespace(token_ids=(9,), logprobs=[said(t9=-2.0)]),
    ]
    rollout = to_rollout([[1], [2]], completions, eos=0)
    assert (rollout.responses, rollout.finished) == ([[7, 0], [9]], [True, False])
    assert [row.tolist() for row in rollout.engine_logprobs] == [[-0.5, -1.0], [-2.0]]


@pytest.mark.skipif(not (INSTALLED and torch.cuda.is_available()), reason="needs the package vllm and a CUDA device")
def test_vllm_samples_from_the_policy_and_not_from_its_base(tiny_model):
    tokenizer = load_tokenizer(tiny_model / "model")
    peft = add_lora(load_model(tiny_model / "model", "bf16", "cuda"), LoRAConfig(r=4, alpha=8, dropout=0.0), "policy", 0)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    queries = [[5, 6, 7], [9, 10]] * 8
    rollout = generate_shared(peft, tokenizer, queries, device="cuda", **HOW)
    for adapter, near in (("policy", True), (None, False)):
        errors = []
        with torch.no_grad(), use(peft, adapter):
            for query, response, theirs in zip(queries, rollout.responses, rollout.engine_logprobs):
                logits = peft(input_ids=torch.tensor([query + response], device="cuda")).logits[0, len(query) - 1 : -1]
                ours = logits.float().log_softmax(-1)[range(len(response)), response].cpu()
                errors.append(float((ours - theirs).abs().mean()))
        assert (sum(errors) / len(errors) < 0.1) == near
