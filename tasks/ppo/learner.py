"""Everything that changes while PPO runs, in one place: what a checkpoint has to hold for a restart to end in the same bits.

The rest is a function of the configuration and the step: learning rates, the order of queries and minibatches, every stream of
random numbers (tasks.ppo.queries).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tasks.checkpoint import State, load_optimizer, optimizer_state
from tasks.ppo.config import PPOConfig
from tasks.ppo.guards import KL_COEF_FACTOR, Action, Guard, Health
from tasks.ppo.held_out import Evaluation
from tasks.ppo.kl import AdaptiveKLController
from tasks.ppo.models import PPO
from tasks.ppo.preflight import Check


@dataclass
class Learner:
    """The learning side of a run, between two steps."""

    ppo: PPO
    optimizer: torch.optim.Optimizer
    """Groups: policy, critic."""
    controller: AdaptiveKLController
    guard: Guard
    best_weights: list[Tensor]
    """Of the policy and the critic at the best evaluation so far."""
    step: int = 0
    """Iterations done."""
    first: Evaluation | None = None
    best: Evaluation | None = None
    checks: list[Check] = field(default_factory=list)
    """The preflight's."""
    old_logprobs: Literal["rollout", "forward"] | None = None
    """Where old log-probabilities come from; None before the first rollout has shown whether the two agree."""
    found_by_judge: list[str] = field(default_factory=list)
    """What is wrong in the last evaluation, for the next step's alarm."""
    curves: list[dict[str, float]] = field(default_factory=list)

    @property
    def config(self) -> PPOConfig:
        return self.ppo.config

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return self.ppo.policy_parameters() + self.ppo.value_parameters()

    def set_learning_rates(self, step: int) -> None:
        """Linear to 0 over the run (row 15)."""
        decay = 1 - (step - 1) / self.config.steps
        for group, learning_rate in zip(self.optimizer.param_groups, _learning_rates(self.config)):
            group["lr"] = learning_rate * decay

    def evaluated(self, evaluation: Evaluation) -> None:
        """Remember an evaluation: is it the best, and what does the judge say?"""
        if self.first is None:
            self.first = evaluation
        self.found_by_judge = self.guard.check_judge(evaluation.scores, evaluation.judge_scores)
        if self.best is None or evaluation.metrics["eval/score"] > self.best.metrics["eval/score"]:
            self.best, self.best_weights = evaluation, snapshot(self.parameters)

    def watch(self, step: int, health: Health) -> tuple[Action | None, list[str]]:
        """What was found wrong with this rollout, and what to do about it; a higher KL coefficient and a roll-back happen here."""
        found, self.found_by_judge = self.guard.check(health) + self.found_by_judge, []
        action = self.guard.act(step, found, self.controller.coef)
        if action == "raise_kl":
            self.controller.coef *= KL_COEF_FACTOR
        elif action == "roll_back":
            put(self.parameters, self.best_weights)
            self.optimizer.state.clear()
        return action, found

    # ---- checkpoints

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it, for `Checkpoints.after_step`."""
        tensors = {f"weights/{i}": tensor for i, tensor in enumerate(snapshot(self.parameters))}
        tensors |= {f"best_weights/{i}": tensor for i, tensor in enumerate(self.best_weights)}
        values = {
            "kl_coef": self.controller.coef,
            "guard": self.guard.state(),
            "first": asdict(self.first) if self.first else None,
            "best": asdict(self.best) if self.best else None,
            "checks": [asdict(check) for check in self.checks],
            "old_logprobs": self.old_logprobs,
            "found_by_judge": self.found_by_judge,
            "curves": self.curves,
        }
        return tensors | optimizer_state(self.optimizer), values

    def restore(self, state: State) -> None:
        """Be what `state()` was taken of."""
        tensors, values = state.tensors, state.values
        parameters = self.parameters
        put(parameters, [tensors[f"weights/{i}"] for i in range(len(parameters))])
        self.best_weights = [tensors[f"best_weights/{i}"] for i in range(len(parameters))]
        load_optimizer(self.optimizer, tensors)
        self.step = state.step
        self.controller.coef = values["kl_coef"]
        self.guard.restore(values["guard"])
        self.first, self.best = (Evaluation(**values[name]) if values[name] else None for name in ("first", "best"))
        self.checks = [Check(**check) for check in values["checks"]]
        self.old_logprobs = values["old_logprobs"]
        self.found_by_judge = list(values["found_by_judge"])
        self.curves = list(values["curves"])


def new_learner(ppo: PPO) -> Learner:
    """At the start: the SFT policy, and a critic that is the reward model."""
    config, groups = ppo.config, (ppo.policy_parameters(), ppo.value_parameters())
    optimizer = torch.optim.Adam(
        [{"params": group, "lr": learning_rate} for group, learning_rate in zip(groups, _learning_rates(config))],
        eps=config.adam_eps,
    )  # row 15
    controller = AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
    return Learner(ppo, optimizer, controller, Guard(config.guard), snapshot(groups[0] + groups[1]))


def snapshot(parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    return [p.detach().cpu().clone() for p in parameters]


def put(parameters: Sequence[torch.nn.Parameter], tensors: Sequence[Tensor]) -> None:
    """Write the tensors into the parameters."""
    with torch.no_grad():
        for parameter, tensor in zip(parameters, tensors, strict=True):
            parameter.copy_(tensor)


def _learning_rates(config: PPOConfig) -> tuple[float, float]:
    """Of policy and critic."""
    return config.learning_rate, config.value_learning_rate or config.learning_rate
