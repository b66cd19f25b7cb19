"""PPO of the policy against the reward model, as in https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo,
with the corrections of docs/recipe.md (the row numbers below are its table's).

One frozen base, sft's merged model, carries all the models as adapters: policy, reward, judge and (by default) value; with every
adapter off it is the reference (row 1).
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.compute import Compute, fit_threads, prepare
from tasks.models import adapter_parameters, causal_lm, load_lora, save_lora, use
from tasks.ppo import preflight
from tasks.ppo.advantages import gae, whiten
from tasks.ppo.config import PPOConfig
from tasks.ppo.forward import policy_forward, response_mask
from tasks.ppo.guards import KL_COEF_FACTOR, Guard, Health, repetition
from tasks.ppo.kl import AdaptiveKLController, k1, k3
from tasks.ppo.losses import explained_variance, masked_mean
from tasks.ppo.models import PPO, forward_rollout, load
from tasks.ppo.queries import EVAL, ROLLOUT, draw, split_questions, stream
from tasks.ppo.report import write_report
from tasks.ppo.rewards import normalise_scores, penalise_missing_eos, token_rewards
from tasks.ppo.update import Batch, update
from tasks.progress import Progress
from tasks.prompts import decode_response, encode_query
from tasks.rollout import Rollout, generate

SAMPLES = 16
"""Held-out queries whose responses before and after are shown."""


def train(
    config: PPOConfig, *, sft: Path, reward: Path, data: Path, out: Path, compute: Compute, progress: Progress
) -> dict[str, Any]:
    """Policy adapter of the best checkpoint by held-out score, with its critic, curves, samples and what the guards saw."""
    ppo = load(config, sft, reward, prepare(compute), compute.micro_batch_tokens)
    model, tokenizer, device = ppo.model, ppo.tokenizer, ppo.device
    fit_threads(compute, model)
    train_questions, eval_questions = split_questions(data, config.eval_queries)
    queries = [encode_query(tokenizer, q, config.max_query_tokens) for q in train_questions]
    eval_queries = [encode_query(tokenizer, q, config.max_query_tokens) for q in eval_questions]
    positions = causal_lm(model).config.max_position_embeddings
    checks = preflight.check_prompts(queries + eval_queries, config.max_query_tokens, config.max_new_tokens, positions)
    checks += [preflight.check_dropout(model), preflight.check_reference(model, ppo.probe, ppo.base_logits)]
    preflight.report(checks, out / "preflight.json")

    policy_parameters = adapter_parameters(model, "policy")
    value_parameters = [*(adapter_parameters(model, "value") if config.value == "adapter" else []), *ppo.value_head.parameters()]
    learning_rates = (config.learning_rate, config.value_learning_rate or config.learning_rate)
    groups = [{"params": p, "lr": lr} for p, lr in zip((policy_parameters, value_parameters), learning_rates)]
    optimizer = torch.optim.Adam(groups, eps=config.adam_eps)  # row 15
    controller = AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
    guard = Guard(config.guard)

    progress.note(f"evaluating the SFT policy on {len(eval_queries)} held-out queries")
    first = best = evaluate(ppo, eval_queries, step=0)
    guard.check_judge(first.scores, first.judge_scores)
    best_state = _snapshot(policy_parameters + value_parameters)
    curves: list[dict[str, float]] = [{"step": 0, **first.metrics}]
    found_by_judge: list[str] = []
    stopped = ""

    for step in range(1, config.steps + 1):
        started = time.monotonic()
        decay = 1 - (step - 1) / config.steps
        for group, lr in zip(optimizer.param_groups, learning_rates):
            group["lr"] = lr * decay

        # Rollout, and one forward pass over it at the settings of the update: old log-probabilities and values (rows 2-4)
        chosen = draw(len(queries), config.batch_size, step, config.seed)
        rollout_seed = stream(config.seed, ROLLOUT, step)
        with use(model, "policy"):
            rollout = generate(
                model, tokenizer, [queries[i] for i in chosen],
                max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=rollout_seed, device=device,
            )  # fmt: skip
        width = max(map(len, rollout.responses))
        mask = response_mask(rollout.responses, width, device)
        old_logprobs, entropy, ref_logprobs, old_values = forward_rollout(ppo, rollout, width)
        sampled = time.monotonic()

        if step == 1:
            checks += _first_checks(ppo, rollout, rollout_seed, old_logprobs, ref_logprobs, mask)
            preflight.report(checks, out / "preflight.json")

        # Scores (rows 5 and 7)
        finished = torch.tensor(rollout.finished, device=device)
        raw_scores = ppo.reward.scores(rollout.queries, rollout.responses)
        scores = normalise_scores(raw_scores, ppo.reward.mean, ppo.reward.std, config.score_clip)
        penalised = penalise_missing_eos(scores, finished, config.missing_eos_penalty)
        kl = (k1(old_logprobs, ref_logprobs) * mask).sum(-1)  # nats per response
        lengths = mask.sum(-1).float()

        # Is all well? Before anything is learned from this rollout
        texts = [decode_response(tokenizer, r) for r in rollout.responses]
        health = Health(
            kl=float(kl.mean()), entropy=float(masked_mean(entropy, mask)), eos_rate=float(finished.float().mean()),
            length=float(lengths.mean()), repetition=float(np.mean([repetition(r) for r in rollout.responses])),
            fences=float(np.mean(["```" in text for text in texts])),
        )  # fmt: skip
        found, found_by_judge = guard.check(health) + found_by_judge, []
        action = guard.act(step, found, controller.coef)
        if action:
            progress.note(f"alarm at step {step}: {'; '.join(found)} -> {action}")
        if action == "raise_kl":
            controller.coef *= KL_COEF_FACTOR
        elif action == "roll_back":
            _restore(policy_parameters + value_parameters, best_state)
            optimizer.state.clear()
            curves.append({"step": step, "kl_coef": controller.coef, "objective/kl": health.kl, "rolled_back_to": best.step})
            continue  # this rollout is not of the policy that is there now
        elif action == "stop":
            stopped = "; ".join(found)
            break

        # Rewards, advantages, returns (rows 6, 10, 11)
        rewards = token_rewards(penalised, old_logprobs, ref_logprobs, mask, controller.coef)
        advantages = gae(rewards, old_values, mask, config.gamma, config.lam)
        returns = advantages + old_values
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)

        batch = Batch(rollout, mask, old_logprobs, old_values, advantages, returns)
        critic_alone = step <= config.value_warmup_steps  # row 14
        updated = update(ppo, optimizer, batch, step, critic_alone)

        row = {
            "step": step,
            "objective/kl": health.kl,
            "objective/kl_k3": float((k3(old_logprobs, ref_logprobs) * mask).sum(-1).mean()),
            "objective/entropy": float(-(old_logprobs * mask).sum(-1).mean()),
            "objective/scores": float(scores.mean()),
            "objective/rlhf_reward": float((penalised - controller.coef * kl).mean()),
            "policy/entropy": health.entropy,
            "val/explained_variance": explained_variance(old_values, returns, mask),
            "eos_rate": health.eos_rate,
            "response_length": health.length,
            "repetition": health.repetition,
            "fences": health.fences,
            "kl_coef": controller.coef,
            "lr": optimizer.param_groups[0]["lr"],
            **updated,
        }
        controller.update(health.kl, len(chosen))  # row 8
        if step % config.eval_every == 0 or step == config.steps:
            latest = evaluate(ppo, eval_queries, step)
            row |= latest.metrics
            found_by_judge = guard.check_judge(latest.scores, latest.judge_scores)
            if latest.metrics["eval/score"] > best.metrics["eval/score"]:
                best, best_state = latest, _snapshot(policy_parameters + value_parameters)
        curves.append(row)
        seconds = {"seconds/rollout": sampled - started, "seconds": time.monotonic() - started}
        progress(step, config.steps, phase="ppo", **{k: v for k, v in row.items() if k != "step"}, **seconds)

    if stopped:
        progress.note(f"stopped at step {step} of {config.steps}: {stopped}")
    _restore(policy_parameters + value_parameters, best_state)
    save_lora(model, out / "policy", "policy")
    if config.value == "adapter":
        save_lora(model, out / "value" / "adapter", "value")
    ppo.value_head.save(out / "value")
    _check_saved(ppo, out / "policy")

    samples = [
        {
            "question": question,
            "before": before, "after": after,
            "score_before": first.scores[i], "score_after": best.scores[i],
            "judge_before": first.judge_scores[i], "judge_after": best.judge_scores[i],
        }
        for i, (question, before, after) in enumerate(zip(eval_questions[:SAMPLES], first.texts, best.texts))
    ]  # fmt: skip
    metrics = {
        "score_before": first.metrics["eval/score"], "score_after": best.metrics["eval/score"],
        "judge_before": first.metrics["eval/judge"], "judge_after": best.metrics["eval/judge"],
        "kl": best.metrics["eval/kl"], "entropy": best.metrics["eval/entropy"], "eos_rate": best.metrics["eval/eos_rate"],
        "response_length": best.metrics["eval/length"],
        "best_step": best.step, "steps": int(curves[-1]["step"]), "alarms": len(guard.alarms),
    }  # fmt: skip
    for name, content in (("curves", curves), ("samples", samples), ("guards", guard.report())):
        (out / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_report(out / "REPORT.md", config, metrics, curves, samples, checks, guard)
    return metrics


# ---- the parts


@dataclass
class Evaluation:
    """The policy at one step on the held-out queries."""

    step: int
    metrics: dict[str, float]
    texts: list[str]
    scores: list[float]
    """Normalised, not clipped, without penalties."""
    judge_scores: list[float]


def evaluate(ppo: PPO, queries: list[list[int]], step: int) -> Evaluation:
    """The policy on held-out queries, with the same random numbers each time, so that evaluations differ by the policy alone."""
    config, model = ppo.config, ppo.model
    with use(model, "policy"):
        rollout = generate(
            model, ppo.tokenizer, queries,
            max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            seed=stream(config.seed, EVAL, 0), device=ppo.device,
        )  # fmt: skip
    width = max(map(len, rollout.responses))
    mask = response_mask(rollout.responses, width, ppo.device)
    logprobs, entropy, ref_logprobs, _ = forward_rollout(ppo, rollout, width)
    scores = ppo.reward.normalise(ppo.reward.scores(rollout.queries, rollout.responses)).tolist()
    judge_scores = ppo.judge.normalise(ppo.judge.scores(rollout.queries, rollout.responses)).tolist()
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


def _first_checks(
    ppo: PPO, rollout: Rollout, seed: int, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor
) -> list[preflight.Check]:
    """The part of the preflight that needs a rollout."""
    config, rows = ppo.config, list(range(min(ppo.config.minibatch_size, 2 * preflight.PROBES)))  # as the update would take them
    with use(ppo.model, "policy"):
        logprobs, _ = policy_forward(
            ppo.model, [rollout.queries[i] for i in rows], [rollout.responses[i] for i in rows],
            config.temperature, mask.shape[1], ppo.device,
        )  # fmt: skip
        checks = preflight.check_rollout(ppo.model, ppo.tokenizer, rollout, seed, config.temperature, config.dtype)
    return [
        preflight.check_ratio(logprobs.detach(), old_logprobs[rows], mask[rows], config.dtype),
        preflight.check_kl(old_logprobs, ref_logprobs, mask, config.dtype),
        *checks,
        preflight.check_scores(ppo.reward, rollout, config.dtype),
        preflight.check_scores(ppo.judge, rollout, config.dtype),
    ]


def _snapshot(parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    return [p.detach().cpu().clone() for p in parameters]


def _restore(parameters: list[torch.nn.Parameter], state: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, tensor in zip(parameters, state, strict=True):
            parameter.copy_(tensor)


def _check_saved(ppo: PPO, folder: Path) -> None:
    """The policy that was written is the policy that is here, to the bit."""
    load_lora(ppo.model, folder, "saved", trainable=False)
    outputs = []
    for name in ("policy", "saved"):
        with torch.no_grad(), use(ppo.model, name):
            outputs.append(causal_lm(ppo.model)(input_ids=ppo.probe[0], attention_mask=ppo.probe[1]).logits)
    if not torch.equal(*outputs):
        error = (outputs[0] - outputs[1]).abs().max().item()
        raise RuntimeError(f"{folder}: the saved policy's logits differ from the trained one's by up to {error:.3g}")
