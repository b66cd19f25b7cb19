"""Before the first update of every run: does what PPO takes for granted hold on this machine, with these models?

A policy that has not been updated is its reference, so its ratio is 1 and its KL 0. Most bugs of PPO for language models (dropout,
another temperature, a shifted position, padding seen by attention, an adapter left on) break one of these equalities.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.models import causal_lm, logits, pad_right, use
from tasks.ppo.config import PPOConfig
from tasks.ppo.forward import policy_forward, response_hidden
from tasks.ppo.kl import k1
from tasks.ppo.losses import masked_mean
from tasks.reward.model import RewardModel
from tasks.rollout import Rollout, row_uniforms, sample

TOLERANCE = {
    "fp32": {"ratio": 1e-5, "kl": 1e-6, "logprobs": 1e-4, "resampled": 0.01, "scores": 1e-3},
    # 8 bits of mantissa: batches of another shape are rounded otherwise
    "bf16": {"ratio": 0.2, "kl": 1e-2, "logprobs": 0.2, "resampled": 0.2, "scores": 0.1},
    # On CUDA activations are rounded too, and what is an outlier depends on the batch (tasks.quantized)
    "8bit": {"ratio": 0.2, "kl": 1e-2, "logprobs": 0.2, "resampled": 0.2, "scores": 0.1},
    "4bit": {"ratio": 0.2, "kl": 1e-2, "logprobs": 0.2, "resampled": 0.2, "scores": 0.1},
}
SAME = 1e-5
"""Log-probabilities and values this near are taken to be one another."""
MIN_EOS_PROBABILITY = 1e-3
"""Expected number of EOS per response, summed over its tokens."""
PROBES = 8
"""Responses of the first rollout that the slower checks look at."""


def numerics(config: PPOConfig) -> str:
    """Which row of TOLERANCE holds for this configuration."""
    return config.dtype if config.quantization == "none" else config.quantization


class PreflightError(ValueError):
    """A check failed; the message says which and why that matters."""


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    value: float
    limit: float
    why: str


def at_most(name: str, value: float, limit: float, why: str) -> Check:
    """A check that value <= limit; NaN fails."""
    return Check(name, bool(value <= limit), float(value), float(limit), why)


def check_prompts(queries: list[list[int]], max_query_tokens: int, max_new_tokens: int, positions: int) -> list[Check]:
    """Every prompt, and a whole response after it, fits."""
    longest = max(map(len, queries))
    return [
        at_most("longest query, tokens", longest, max_query_tokens, "a longer one would lose its end, 'Answer:' included"),
        at_most("longest query and response, tokens", longest + max_new_tokens, positions, "the model has no more positions"),
    ]


def check_dropout(model: torch.nn.Module) -> Check:
    """No module is in training mode, so no dropout is active, the adapters' included."""
    active = sum(m.training and isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    return at_most("active dropout layers", active, 0, "with dropout the ratio is not 1 at step 0")


def check_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, numerics: str) -> Check:
    """The update's own forward pass against the rollout's, before any update; (B, T) x 3."""
    error = ((logprobs - old_logprobs) * mask).exp().sub(1).abs().max()
    return at_most("max |ratio - 1|", float(error), TOLERANCE[numerics]["ratio"], "old and new logprobs are not of one policy")


def check_kl(old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, numerics: str) -> Check:
    """A new adapter changes nothing; (B, T) x 3."""
    kl = masked_mean(k1(old_logprobs, ref_logprobs), mask).abs()
    return at_most("|KL| per token", float(kl), TOLERANCE[numerics]["kl"], "the policy does not start at its reference")


def check_reference(model: Any, probe: tuple[Tensor, Tensor], base_logits: Tensor) -> Check:
    """With the adapters off the model is the base that was loaded, bit for bit."""
    with torch.no_grad(), use(model, None):
        error = (causal_lm(model)(input_ids=probe[0], attention_mask=probe[1]).logits.float() - base_logits).abs().max()
    return at_most("max |reference - base|", float(error), 0.0, "an adapter leaks into the reference, or was merged into the base")


@torch.no_grad()
def check_rollout(model: Any, tokenizer: Any, rollout: Rollout, seed: int | None, temperature: float, numerics: str) -> list[Check]:
    """What was sampled with a cache and left padding, against a plain forward pass; the policy's adapter is active.

    Given the same uniform numbers the forward pass must draw the same tokens (`seed` None: another engine drew them).
    """
    queries, responses = rollout.queries[:PROBES], rollout.responses[:PROBES]
    device = next(model.parameters()).device
    hidden = response_hidden(model, queries, responses, device)
    tokens = torch.tensor([token for r in responses for token in r], device=device)
    rows = logits(model, hidden)
    drawn = []
    if seed is not None:
        uniforms = torch.cat([row_uniforms(seed, i, len(r)) for i, r in enumerate(responses)]).to(device)
        differing = float((sample(rows, uniforms, temperature) != tokens).float().mean())
        limit, why = TOLERANCE[numerics]["resampled"], "sampling and scoring differ"
        drawn = [at_most("share of tokens drawn otherwise", differing, limit, why)]

    ids, mask = pad_right([q + r for q, r in zip(queries, responses)], tokenizer.pad_token_id, device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = causal_lm(model)(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float()
    expected = F.log_softmax(whole[:, :-1] / temperature, dim=-1).gather(2, ids[:, 1:, None])[..., 0]
    width = max(map(len, responses))
    ours, _ = policy_forward(model, queries, responses, temperature, width, device)
    error = max(
        float((expected[i, len(q) - 1 : len(q) - 1 + len(r)] - ours[i, : len(r)]).abs().max())
        for i, (q, r) in enumerate(zip(queries, responses))
    )
    eos = F.softmax(rows / temperature, dim=-1)[:, tokenizer.eos_token_id].sum() / len(responses)
    reachable = max(float(eos), float(any(rollout.finished)))
    return [
        *drawn,
        at_most("max |logprob - the whole model's|", error, TOLERANCE[numerics]["logprobs"], "its head is more than linear"),
        Check(
            "EOS per response, expected",
            reachable >= MIN_EOS_PROBABILITY,
            reachable,
            MIN_EOS_PROBABILITY,
            "this policy cannot end a response: was it trained with EOS after each answer, and pad != eos?",
        ),
    ]


def check_scores(reward: RewardModel, rollout: Rollout, numerics: str) -> Check:
    """A response's score does not depend on its company in the batch."""
    queries, responses = rollout.queries[:PROBES], rollout.responses[:PROBES]
    together = reward.scores(queries, responses)
    alone = torch.cat([reward.scores([q], [r]) for q, r in zip(queries, responses)])
    error = float((together - alone).abs().max()) / reward.std
    name = f"max |score alone - in a batch|, {reward.adapter_name}, standard deviations"
    return at_most(name, error, TOLERANCE[numerics]["scores"], "padding reaches the score")


def report(checks: list[Check], path: Path) -> None:
    """Write the checks; PreflightError for those that failed."""
    rows = [asdict(check) | {"value": check.value if math.isfinite(check.value) else None} for check in checks]
    path.write_text(json.dumps(rows, indent=2) + "\n")
    failed = [check for check in checks if not check.ok]
    if failed:
        reasons = "; ".join(f"{c.name} is {c.value:.3g}, limit {c.limit:.3g}: {c.why}" for c in failed)
        raise PreflightError(f"ppo preflight: {reasons}")
