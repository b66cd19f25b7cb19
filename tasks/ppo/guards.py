"""What is watched while PPO runs, and what is done about it: KL coefficient up, then back to the best checkpoint, then stop.

Each limit is about a way in which a run was seen to go wrong: see section 4 of the recipe.
"""

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tasks.ppo.config import GuardConfig

Action = Literal["raise_kl", "roll_back", "stop"]
ACTIONS: tuple[Action, ...] = ("raise_kl", "roll_back", "stop")
KL_COEF_FACTOR = 1.5
GRACE = 3
"""Iterations that an action is given to work before the next alarm counts."""
CALM = 20
"""Iterations without an alarm after which the next one begins with the mildest action again."""


def repetition(response: list[int], n: int = 4) -> float:
    """Share of a response's n-grams that repeat an earlier one."""
    grams = [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Health:
    """What the guards look at, of one rollout."""

    kl: float
    """Nats per response (k1)."""
    entropy: float
    """Nats per token."""
    eos_rate: float
    length: float
    """Tokens."""
    repetition: float
    fences: float
    """Share of responses with a code fence."""


@dataclass(frozen=True)
class Alarm:
    step: int
    what: str
    action: Action


@dataclass
class Guard:
    """The limits, what the first rollout looked like, and the alarms so far."""

    config: GuardConfig
    first: Health | None = None
    alarms: list[Alarm] = field(default_factory=list)
    level: int = 0
    """Index of the next action."""
    worse_judge: int = 0
    """Evaluations in a row with a higher reward and a lower judge score."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def check(self, health: Health) -> list[str]:
        """What is wrong with this rollout, in words. The first one, of the SFT policy itself, is what later ones are held against.

        A floor or ceiling that the SFT policy itself breaks would stop every run: it is moved to where that policy, made half
        again as bad, would stand.
        """
        limits, first = self.config, self.first or health
        self.first = first
        min_entropy = min(limits.min_entropy, first.entropy / 2)
        min_eos_rate = min(limits.min_eos_rate, first.eos_rate / 2)
        max_repetition = max(limits.max_repetition, (1 + first.repetition) / 2 if first.repetition >= limits.max_repetition else 0)
        found = []
        if not all(math.isfinite(value) for value in asdict(health).values()):
            found.append(f"a metric is not finite: {asdict(health)}")
        if health.kl > limits.max_kl:
            found.append(f"KL {health.kl:.2f} above {limits.max_kl:g} nats per response")
        if health.kl < limits.min_kl:
            found.append(f"KL {health.kl:.2f} below {limits.min_kl:g}: sampling and scoring disagree")
        if health.entropy < min_entropy:
            found.append(f"entropy {health.entropy:.3f} below {min_entropy:.3f} nats per token")
        if health.eos_rate < min_eos_rate:
            found.append(f"only {health.eos_rate:.0%} of the responses end by themselves, floor {min_eos_rate:.0%}")
        if not first.length / limits.max_length_ratio <= health.length <= first.length * limits.max_length_ratio:
            found.append(f"mean length {health.length:.1f} tokens, {first.length:.1f} at first, limit x{limits.max_length_ratio:g}")
        if health.repetition > max_repetition:
            found.append(f"{health.repetition:.0%} of the 4-grams repeat, ceiling {max_repetition:.0%}")
        if health.fences > first.fences + limits.max_fence_increase:
            found.append(f"{health.fences:.0%} of the responses hold a code fence, {first.fences:.0%} at first")
        return found

    def check_judge(self, scores: list[float], judge_scores: list[float]) -> list[str]:
        """Reward rising while the judge's score falls, on the same held-out queries every time.

        Held against the evaluation that the judge liked best; lower means by more than one standard error of the paired
        difference, because the best of several noisy evaluations looks better than it is.
        """
        now = {"score": statistics.fmean(scores), "judge": list(judge_scores)}
        best = max(self.evaluations, key=lambda e: statistics.fmean(e["judge"]), default=None)
        self.evaluations.append(now)
        if best is None:
            return []
        drops = [before - after for before, after in zip(best["judge"], judge_scores, strict=True)]
        error = statistics.stdev(drops) / math.sqrt(len(drops)) if len(drops) > 1 else 0.0
        worse = now["score"] > best["score"] and statistics.fmean(drops) > error
        self.worse_judge = self.worse_judge + 1 if worse else 0
        if self.worse_judge < self.config.patience:
            return []
        fallen = statistics.fmean(drops)
        return [f"the reward rises and the judge's score falls (by {fallen:.3f}), {self.worse_judge} evaluations in a row"]

    def act(self, step: int, found: list[str], kl_coef: float) -> Action | None:
        """The next action where something was found and the last action had its time; kept in `alarms`."""
        last = self.alarms[-1].step if self.alarms else None
        if last is not None and step - last > CALM:
            self.level = 0
        if not found or (last is not None and step - last < GRACE):
            return None
        if self.level == 0 and kl_coef == 0:
            self.level = 1  # 1.5 times nothing is nothing
        action = ACTIONS[min(self.level, len(ACTIONS) - 1)]
        self.level += 1
        self.alarms.append(Alarm(step, "; ".join(found), action))
        return action

    def report(self) -> dict[str, Any]:
        """For guards.json."""
        return {
            "limits": self.config.model_dump(mode="json"),
            "first_rollout": asdict(self.first) if self.first else None,
            "alarms": [asdict(alarm) for alarm in self.alarms],
        }

    def state(self) -> dict[str, Any]:
        """All that it has learnt, for JSON."""
        return {
            "first": asdict(self.first) if self.first else None,
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "level": self.level,
            "worse_judge": self.worse_judge,
            "evaluations": [dict(evaluation) for evaluation in self.evaluations],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Be what `state()` was taken of."""
        self.first = Health(**state["first"]) if state["first"] else None
        self.alarms = [Alarm(**alarm) for alarm in state["alarms"]]
        self.level, self.worse_judge, self.evaluations = state["level"], state["worse_judge"], list(state["evaluations"])
