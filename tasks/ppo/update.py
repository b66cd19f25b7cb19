"""The update: passes over a rollout in minibatches (rows 12, 13, 16)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tasks.distributed import mine, rounds, sum_gradients, total
from tasks.models import use
from tasks.optim import fast_matmul
from tasks.ppo.forward import read_policy, response_hidden, unpack
from tasks.ppo.kl import k3
from tasks.ppo.losses import masked_mean, policy_loss, value_loss
from tasks.ppo.models import PPO
from tasks.ppo.queries import EPOCHS
from tasks.rollout import Rollout

POLICY_METRICS = ("policy/loss", "policy/clipfrac", "ratio", "policy/approxkl", "policy/kl")
VALUE_METRICS = ("val/loss", "val/clipfrac")


@dataclass
class Batch:
    """A rollout and what the update needs of it; tensors are (B, T)."""

    rollout: Rollout
    mask: Tensor
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor | None = None
    """How much each token counts in the policy's loss, where another engine sampled it; None: all the same."""


def update(ppo: PPO, optimizer: torch.optim.Optimizer, batch: Batch, step: int, critic_alone: bool) -> dict[str, float]:
    """`epochs` passes over the rollout in minibatches; the losses are means over a minibatch's tokens, however it is cut up."""
    config, n = ppo.config, len(batch.rollout.queries)
    groups = [group["params"] for group in optimizer.param_groups]
    sums: dict[str, list[float]] = {}
    learning = not critic_alone
    over = False  # in shared mode the critic has no trunk of its own to go on with after the policy's last pass
    rng = np.random.default_rng((config.seed, EPOCHS, step))
    with fast_matmul(ppo.model):
        for _ in range(config.epochs):
            order = rng.permutation(n).tolist()
            for start in range(0, n, config.minibatch_size):
                if over:
                    break
                optimizer.zero_grad()
                totals = backward(ppo, batch, order[start : start + config.minibatch_size], learning)
                if not all(map(math.isfinite, totals.values())):
                    raise FloatingPointError(f"ppo: a loss is not finite at step {step}: {totals}; lower the learning rate")
                for name, value in totals.items():
                    sums.setdefault(name, []).append(value)
                if learning and totals["policy/kl"] > 1.5 * config.target_kl:  # row 16
                    learning, over = False, ppo.shared
                    if over:
                        break
                    _forget(groups[0])
                elif learning and totals["ratio"] > config.max_ratio:  # row 16
                    sums.setdefault("policy/skipped", []).append(1.0)
                    for group in groups if ppo.shared else groups[:1]:
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


def backward(ppo: PPO, batch: Batch, minibatch: list[int], policy: bool) -> dict[str, float]:
    """Gradients of a minibatch's losses, and its metrics, the same on every rank; each rank goes through a share of the rows.

    In one pass where the rows fit one; else in several, each loss weighing as much as its share of the minibatch's tokens.
    """
    tokens = float(batch.mask[minibatch].sum())
    passes = [(rows, float(batch.mask[rows].sum()) / tokens) for rows in ppo.micro_batches(batch.rollout, mine(minibatch))]
    passes += [(minibatch[:1], 0.0)] * (rounds(len(passes)) - len(passes))  # under fsdp, where another rank has more
    names = (*(POLICY_METRICS if policy else ()), *VALUE_METRICS)
    sums = torch.zeros(len(names), dtype=torch.float64)
    for rows, weight in passes:
        metrics = _backward(ppo, batch, rows, weight, policy)
        sums += weight * torch.stack([metrics[name] for name in names]).double().cpu()
    sum_gradients([*(ppo.policy_parameters() if policy else []), *ppo.value_parameters()])
    return dict(zip(names, total(sums).tolist()))


def _backward(ppo: PPO, batch: Batch, rows: list[int], weight: float, policy: bool) -> dict[str, Tensor]:
    """Add `weight` times these rows' gradients. Every backward pass runs inside its `use`: layers may have to run again."""
    config, model = ppo.config, ppo.model
    queries, responses = [batch.rollout.queries[i] for i in rows], [batch.rollout.responses[i] for i in rows]
    mask, old_logprobs = batch.mask[rows], batch.old_logprobs[rows]

    def policy_terms(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = unpack(read_policy(model, hidden, responses, config.temperature, entropy=False)[0], mask)
        weights = None if batch.weights is None else batch.weights[rows]
        loss, clipfrac, ratio = policy_loss(logprobs, old_logprobs, batch.advantages[rows], mask, config.cliprange, weights)
        new = logprobs.detach()
        approxkl = 0.5 * masked_mean((new - old_logprobs).square(), mask)
        kl = masked_mean(k3(old_logprobs, new), mask)  # KL(old || new), sampled from old
        return loss, dict(zip(POLICY_METRICS, (loss.detach(), clipfrac, ratio, approxkl, kl)))

    def value_terms(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        values = unpack(ppo.value_head(hidden)[:, 0], mask)
        loss, clipfrac = value_loss(values, batch.old_values[rows], batch.returns[rows], mask, config.cliprange_value)
        return config.vf_coef * loss, dict(zip(VALUE_METRICS, (loss.detach(), clipfrac)))

    if ppo.shared:
        with use(model, "policy"):
            with torch.set_grad_enabled(policy):  # the critic alone: its head learns, the policy's trunk must not
                hidden = response_hidden(model, queries, responses, ppo.device)
            policy_part, metrics = policy_terms(hidden) if policy else (0.0, {})
            value_part, value_metrics = value_terms(hidden)
            ((policy_part + value_part) * weight).backward()
        return metrics | value_metrics
    metrics = {}
    for wanted, adapter, terms in ((policy, "policy", policy_terms), (True, "value", value_terms)):
        if wanted:  # one after the other, to hold the activations of one pass at a time
            with use(model, adapter):
                loss, found = terms(response_hidden(model, queries, responses, ppo.device))
                (loss * weight).backward()
                del loss
            metrics |= found
    return metrics


def _forget(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
