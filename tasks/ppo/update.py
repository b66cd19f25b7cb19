"""The update: passes over a rollout in minibatches (rows 12, 13, 16)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tasks.models import use
from tasks.ppo.forward import policy_forward, response_hidden, value_forward
from tasks.ppo.kl import k3
from tasks.ppo.losses import masked_mean, policy_loss, value_loss
from tasks.ppo.models import PPO
from tasks.ppo.queries import EPOCHS
from tasks.rollout import Rollout


@dataclass
class Batch:
    """A rollout and what the update needs of it; tensors are (B, T)."""

    rollout: Rollout
    mask: Tensor
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


def update(ppo: PPO, optimizer: torch.optim.Optimizer, batch: Batch, step: int, critic_alone: bool) -> dict[str, float]:
    """`epochs` passes over the rollout in minibatches; the losses are means over a minibatch's tokens, however it is cut up."""
    config, rollout, n = ppo.config, batch.rollout, len(batch.rollout.queries)
    shared = config.value == "policy_trunk"
    groups = [group["params"] for group in optimizer.param_groups]
    sums: dict[str, list[float]] = {}
    learning = not critic_alone
    over = False  # in shared mode the critic has no trunk of its own to go on with after the policy's last pass
    rng = np.random.default_rng((config.seed, EPOCHS, step))
    for _ in range(config.epochs):
        order = rng.permutation(n).tolist()
        for start in range(0, n, config.minibatch_size):
            if over:
                break
            minibatch = order[start : start + config.minibatch_size]
            tokens = batch.mask[minibatch].sum()
            totals: dict[str, float] = {}
            optimizer.zero_grad()
            for rows in ppo.micro_batches(rollout, minibatch):
                micro_metrics = _backward(ppo, batch, rows, float(batch.mask[rows].sum() / tokens), policy=learning, shared=shared)
                for name, value in micro_metrics.items():
                    totals[name] = totals.get(name, 0.0) + value
            if not all(map(math.isfinite, totals.values())):
                raise FloatingPointError(f"ppo: a loss is not finite at step {step}: {totals}; lower the learning rate")
            for name, value in totals.items():
                sums.setdefault(name, []).append(value)
            if learning and totals["policy/kl"] > 1.5 * config.target_kl:  # row 16
                learning, over = False, shared
                if over:
                    break
                _forget(groups[0])
            elif learning and totals["ratio"] > config.max_ratio:  # row 16
                sums.setdefault("policy/skipped", []).append(1.0)
                for group in groups if shared else groups[:1]:
                    _forget(group)
            for group in groups:  # apart: the critic's first, large gradients must not shrink the policy's
                if not torch.nn.utils.clip_grad_norm_(group, config.max_grad_norm).isfinite():
                    raise FloatingPointError(f"ppo: a gradient is not finite at step {step}; lower the learning rate")
            optimizer.step()
    optimizer.zero_grad()
    return {name: float(np.mean(values)) for name, values in sums.items() if name != "policy/skipped"} | {
        "policy/skipped": float(len(sums.get("policy/skipped", []))),
        "policy/minibatches": float(len(sums.get("ratio", []))),
    }


def _backward(ppo: PPO, batch: Batch, rows: list[int], weight: float, policy: bool, shared: bool) -> dict[str, float]:
    """Add these rows' gradients; `weight` is their share of the minibatch's tokens. Returns metrics times weight."""
    config, model, width = ppo.config, ppo.model, batch.mask.shape[1]
    queries, responses = [batch.rollout.queries[i] for i in rows], [batch.rollout.responses[i] for i in rows]
    mask, old_logprobs = batch.mask[rows], batch.old_logprobs[rows]
    metrics: dict[str, float] = {}
    hidden = None
    loss = torch.zeros((), device=ppo.device)
    if policy:
        with use(model, "policy"):
            hidden = response_hidden(model, queries, responses, ppo.device)
            logprobs, _ = policy_forward(model, queries, responses, config.temperature, width, ppo.device, hidden=hidden)
        pg_loss, clipfrac, ratio = policy_loss(logprobs, old_logprobs, batch.advantages[rows], mask, config.cliprange)
        loss = loss + pg_loss
        difference = (logprobs - old_logprobs).detach()
        metrics |= {
            "policy/loss": float(pg_loss.detach()), "policy/clipfrac": float(clipfrac), "ratio": float(ratio),
            "policy/approxkl": float(0.5 * masked_mean(difference.square(), mask)),
            "policy/kl": float(masked_mean(k3(old_logprobs, logprobs.detach()), mask)),  # KL(old || new), sampled from old
        }  # fmt: skip
    elif shared:  # the critic alone: its head learns, the policy's trunk must not
        with torch.no_grad(), use(model, "policy"):
            hidden = response_hidden(model, queries, responses, ppo.device)
    if not shared and policy:
        (loss * weight).backward()  # before the critic's pass, to hold the activations of one pass at a time
        loss = torch.zeros((), device=ppo.device)
    with use(model, ppo.value_adapter):
        values = value_forward(model, ppo.value_head, queries, responses, width, ppo.device, hidden=hidden if shared else None)
    vf_loss, vf_clipfrac = value_loss(values, batch.old_values[rows], batch.returns[rows], mask, config.cliprange_value)
    ((loss + config.vf_coef * vf_loss) * weight).backward()
    metrics |= {"val/loss": float(vf_loss.detach()), "val/clipfrac": float(vf_clipfrac)}
    return {name: value * weight for name, value in metrics.items()}


def _forget(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
