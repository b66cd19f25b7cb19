"""PPO of the policy against the reward model, as in https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo,
with the corrections of docs/recipe.md (the row numbers below are its table's).

One frozen base, sft's merged model, carries all the models as adapters: policy, reward, judge and (by default) value; with every
adapter off it is the reference (row 1).
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.checkpoint import NO_CHECKPOINTS, Checkpoints
from tasks.compute import Compute, fit_threads, prepare
from tasks.mismatch import mismatch
from tasks.models import causal_lm, load_lora, save_lora, use
from tasks.optim import fast_matmul
from tasks.ppo import preflight
from tasks.ppo.advantages import gae, whiten
from tasks.ppo.config import PPOConfig
from tasks.ppo.forward import policy_forward, response_mask, stack
from tasks.ppo.guards import Health, repetition
from tasks.ppo.held_out import evaluate
from tasks.ppo.kl import k1, k3
from tasks.ppo.learner import Learner, new_learner, put
from tasks.ppo.losses import explained_variance, importance, masked_mean
from tasks.ppo.models import PPO, forward_rollout, load, sample_responses, score
from tasks.ppo.queries import ROLLOUT, draw, split_questions, stream
from tasks.ppo.report import write_report
from tasks.ppo.rewards import normalise_scores, penalise_missing_eos, token_rewards
from tasks.ppo.update import Batch, update
from tasks.progress import Progress
from tasks.prompts import decode_response, encode_query
from tasks.rollout import Rollout

SAMPLES = 16
"""Held-out queries whose responses before and after are shown."""


def train(
    config: PPOConfig,
    *,
    sft: Path,
    reward: Path,
    data: Path,
    out: Path,
    compute: Compute,
    progress: Progress,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> dict[str, Any]:
    """Policy adapter of the best checkpoint by held-out score, with its critic, curves, samples and what the guards saw.

    Every rank of a launch does all of this alike; what is heavy is cut among them inside sample_responses, forward_rollout,
    score and update. After an interruption it goes on from the newest of `checkpoints`, to the same bits on a CPU.
    """
    ppo = load(config, sft, reward, prepare(compute), compute)
    fit_threads(compute, ppo.model)
    train_questions, eval_questions = split_questions(data, config.eval_queries)
    queries = [encode_query(ppo.tokenizer, q, config.max_query_tokens) for q in train_questions]
    eval_queries = [encode_query(ppo.tokenizer, q, config.max_query_tokens) for q in eval_questions]

    learner = new_learner(ppo)
    if (saved := checkpoints.load()) is not None:
        learner.restore(saved)
        progress.note(f"resumed from step {learner.step} of {config.steps}")
    else:
        learner.checks = _static_checks(ppo, queries + eval_queries)
        preflight.report(learner.checks, out / "preflight.json")
        progress.note(f"evaluating the SFT policy on {len(eval_queries)} held-out queries")
        evaluation = evaluate(ppo, eval_queries, step=0, sampled=False)
        learner.evaluated(evaluation)
        learner.curves.append({"step": 0, **evaluation.metrics})
        progress(0, config.steps, phase="ppo", **evaluation.metrics)

    for step in range(learner.step + 1, config.steps + 1):
        started = time.monotonic()
        learner.set_learning_rates(step)

        # Rollout, and what the update and the KL need of it (rows 2-4)
        chosen = draw(len(queries), config.batch_size, step, config.seed)
        rollout_seed = stream(config.seed, ROLLOUT, step)
        rollout = sample_responses(ppo, [queries[i] for i in chosen], rollout_seed)
        width = max(map(len, rollout.responses))
        mask = response_mask(rollout.responses, width, ppo.device)
        sampled = learner.old_logprobs == "rollout"
        old_logprobs, entropy, ref_logprobs, old_values = forward_rollout(ppo, rollout, width, sampled)
        if learner.old_logprobs is None:
            learner.checks += _first_checks(ppo, rollout, rollout_seed, old_logprobs, ref_logprobs, mask)
            learner.old_logprobs = _where_old_logprobs_come_from(ppo, rollout, old_logprobs, old_values, mask)
            preflight.report(learner.checks, out / "preflight.json")
        rolled_out = time.monotonic()

        # Scores (rows 5 and 7)
        finished = torch.tensor(rollout.finished, device=ppo.device)
        raw_scores = score(ppo, ppo.reward, rollout)
        scores = normalise_scores(raw_scores, ppo.reward.mean, ppo.reward.std, config.score_clip)
        penalised = penalise_missing_eos(scores, finished, config.missing_eos_penalty)
        kl = (k1(old_logprobs, ref_logprobs) * mask).sum(-1)  # nats per response

        # Is all well? Before anything is learned from this rollout
        health = _health(ppo, rollout, kl, entropy, mask)
        action, found = learner.watch(step, health)
        if action:
            progress.note(f"alarm at step {step}: {'; '.join(found)} -> {action}")
        if action == "stop":
            progress.note(f"stopped at step {step} of {config.steps}: {'; '.join(found)}")
            break
        row: dict[str, float]
        if action == "roll_back":  # this rollout is not of the policy that is there now
            assert learner.best is not None
            row = {"step": step, "kl_coef": learner.controller.coef, "objective/kl": health.kl}
            row["rolled_back_to"] = learner.best.step
        else:
            # Rewards, advantages, returns (rows 6, 10, 11)
            kl_coef = learner.controller.coef
            rewards = token_rewards(penalised, old_logprobs, ref_logprobs, mask, kl_coef)
            advantages = gae(rewards, old_values, mask, config.gamma, config.lam)
            returns = advantages + old_values
            if config.whiten_advantages:
                advantages = whiten(advantages, mask)

            batch = Batch(rollout, mask, old_logprobs, old_values, advantages, returns)
            sampling = {} if sampled else _weigh(batch, config.importance_cap)
            critic_alone = step <= config.value_warmup_steps  # row 14
            updated = update(ppo, learner.optimizer, batch, step, critic_alone)
            row = {
                "step": step,
                "objective/kl": health.kl,
                "objective/kl_k3": float((k3(old_logprobs, ref_logprobs) * mask).sum(-1).mean()),
                "objective/entropy": float(-(old_logprobs * mask).sum(-1).mean()),
                "objective/scores": float(scores.mean()),
                "objective/rlhf_reward": float((penalised - kl_coef * kl).mean()),
                "policy/entropy": health.entropy,
                "val/explained_variance": explained_variance(old_values, returns, mask),
                "eos_rate": health.eos_rate,
                "response_length": health.length,
                "repetition": health.repetition,
                "fences": health.fences,
                "kl_coef": kl_coef,
                "lr": learner.optimizer.param_groups[0]["lr"],
                **sampling,
                **updated,
            }
            learner.controller.update(health.kl, len(chosen))  # row 8
            if step % config.eval_every == 0 or step == config.steps:
                evaluation = evaluate(ppo, eval_queries, step, sampled)
                row |= evaluation.metrics
                learner.evaluated(evaluation)
        seconds = {"seconds/rollout": rolled_out - started, "seconds": time.monotonic() - started}
        progress(step, config.steps, phase="ppo", **{k: v for k, v in row.items() if k != "step"}, **seconds)
        learner.curves.append(row)
        learner.step = step
        checkpoints.after_step(step, learner.state)

    put(learner.parameters, learner.best_weights)
    return _write(learner, eval_questions, out)


# ---- the parts


def _static_checks(ppo: PPO, queries: list[list[int]]) -> list[preflight.Check]:
    """The part of the preflight that needs no rollout."""
    positions = causal_lm(ppo.model).config.max_position_embeddings
    return [
        *preflight.check_prompts(queries, ppo.config.max_query_tokens, ppo.config.max_new_tokens, positions),
        preflight.check_dropout(ppo.model),
        preflight.check_reference(ppo.model, ppo.probe, ppo.base_logits),
    ]


def _first_checks(
    ppo: PPO, rollout: Rollout, seed: int, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor
) -> list[preflight.Check]:
    """The part of the preflight that needs a rollout."""
    config, rows = ppo.config, list(range(min(ppo.config.minibatch_size, 2 * preflight.PROBES)))  # as the update would take them
    numerics = preflight.numerics(config)
    drawn_by = seed if config.engine == "own" else None
    with torch.no_grad(), fast_matmul(ppo.model):
        with use(ppo.model, "policy"):
            logprobs, _ = policy_forward(
                ppo.model, [rollout.queries[i] for i in rows], [rollout.responses[i] for i in rows],
                config.temperature, mask.shape[1], ppo.device,
            )  # fmt: skip
            checks = preflight.check_rollout(ppo.model, ppo.tokenizer, rollout, drawn_by, config.temperature, numerics)
        return [
            preflight.check_ratio(logprobs, old_logprobs[rows], mask[rows], numerics),
            preflight.check_kl(old_logprobs, ref_logprobs, mask, numerics),
            *checks,
            preflight.check_scores(ppo.reward, rollout, numerics),
            preflight.check_scores(ppo.judge, rollout, numerics),
        ]


def _where_old_logprobs_come_from(ppo: PPO, rollout: Rollout, logprobs: Tensor, values: Tensor, mask: Tensor) -> Any:
    """ "rollout" where the sampler's numbers are those of this forward pass, or were asked for; else "forward"."""
    if ppo.config.old_logprobs != "auto":
        return ppo.config.old_logprobs
    if ppo.config.engine != "own":
        return "forward"
    pairs = [(logprobs, rollout.logprobs), *([(values, rollout.values)] if rollout.values is not None else [])]
    errors = [float(((stack(rows, mask.shape[1], ppo.device) - ours) * mask).abs().max()) for ours, rows in pairs]
    return "rollout" if max(errors) <= preflight.SAME else "forward"


def _health(ppo: PPO, rollout: Rollout, kl: Tensor, entropy: Tensor, mask: Tensor) -> Health:
    texts = [decode_response(ppo.tokenizer, r) for r in rollout.responses]
    return Health(
        kl=float(kl.mean()),
        entropy=float(masked_mean(entropy, mask)),
        eos_rate=float(np.mean(rollout.finished)),
        length=float(mask.sum(-1).float().mean()),
        repetition=float(np.mean([repetition(r) for r in rollout.responses])),
        fences=float(np.mean(["```" in text for text in texts])),
    )


def _weigh(batch: Batch, cap: float) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the forward pass's; another engine's tokens are weighed by it."""
    rollout, mask = batch.rollout, batch.mask
    theirs = stack(rollout.engine_logprobs or rollout.logprobs, mask.shape[1], mask.device)
    found = mismatch(batch.old_logprobs, theirs, mask)
    if rollout.engine_logprobs is not None:
        batch.weights = importance(batch.old_logprobs, theirs, cap)
        found["sampling/capped"] = float(masked_mean((batch.weights == cap).float(), mask))
    return found


def _write(learner: Learner, eval_questions: list[str], out: Path) -> dict[str, Any]:
    """The artifact: the best weights are in place."""
    ppo, first, best, curves, guard = learner.ppo, learner.first, learner.best, learner.curves, learner.guard
    assert first is not None
    assert best is not None
    save_lora(ppo.model, out / "policy", "policy")
    if not ppo.shared:
        save_lora(ppo.model, out / "value" / "adapter", "value")
    ppo.value_head.save(out / "value")
    _check_saved(ppo, out / "policy")
    preflight.report(learner.checks, out / "preflight.json")

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
    write_report(out / "REPORT.md", ppo.config, metrics, curves, samples, learner.checks, guard)
    return metrics


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
