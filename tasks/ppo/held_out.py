"""The policy on held-out queries: what the best checkpoint is chosen by, and what the judge watches."""

import math
from dataclasses import dataclass

import numpy as np

from tasks.ppo.forward import response_mask
from tasks.ppo.guards import repetition
from tasks.ppo.kl import k1
from tasks.ppo.losses import masked_mean
from tasks.ppo.models import PPO, policy_numbers, reference_pass, sample_responses, score
from tasks.ppo.queries import EVAL, stream
from tasks.prompts import decode_response


@dataclass
class Evaluation:
    """The policy at one step on the held-out queries."""

    step: int
    metrics: dict[str, float]
    texts: list[str]
    scores: list[float]
    """Normalised, not clipped, without penalties."""
    judge_scores: list[float]


def evaluate(ppo: PPO, queries: list[list[int]], step: int, sampled: bool) -> Evaluation:
    """The policy on held-out queries, with the same random numbers each time, so that evaluations differ by the policy alone.

    `sampled`: log-probabilities are the sampler's, as in `forward_rollout`.
    """
    rollout = sample_responses(ppo, queries, stream(ppo.config.seed, EVAL, 0))
    width = max(map(len, rollout.responses))
    mask = response_mask(rollout.responses, width, ppo.device)
    logprobs, entropy, *_ = policy_numbers(ppo, rollout, width, sampled)
    ref_logprobs = reference_pass(ppo, rollout, width)
    scores = ppo.reward.normalise(score(ppo, ppo.reward, rollout)).tolist()
    judge_scores = ppo.judge.normalise(score(ppo, ppo.judge, rollout)).tolist()
    if not all(map(math.isfinite, scores + judge_scores)):
        raise FloatingPointError(f"ppo: a held-out score is not finite at step {step}")
    texts = [decode_response(ppo.tokenizer, r) for r in rollout.responses]
    metrics = {
        "eval/score": float(np.mean(scores)),
        "eval/judge": float(np.mean(judge_scores)),
        "eval/kl": float((k1(logprobs, ref_logprobs) * mask).sum(-1).mean()),
        "eval/entropy": float(masked_mean(entropy, mask)),
        "eval/eos_rate": float(np.mean(rollout.finished)),
        "eval/length": float(mask.sum(-1).float().mean()),
        "eval/repetition": float(np.mean([repetition(r) for r in rollout.responses])),
        "eval/fences": float(np.mean(["```" in text for text in texts])),
    }
    return Evaluation(step, metrics, texts, scores, judge_scores)
