"""The whole pipeline. Also the main job: `python -m flows.rlhf` is `stackrlhf run`."""

import logging
import os
from typing import Any

from prefect import Task, flow, runtime

from flows.memory import before_running
from flows.plan import check_steps, identities
from flows.presets import TINY, RLHFConfig, Step, resolve
from tasks.artifacts import Artifact, Store
from tasks.base.task import base as base_task
from tasks.compute import Compute
from tasks.evaluate.task import evaluate as evaluate_task
from tasks.ingest.task import ingest as ingest_task
from tasks.ppo.task import ppo as ppo_task
from tasks.promote.task import promote as promote_task
from tasks.reward.task import reward as reward_task
from tasks.sft.task import sft as sft_task
from tasks.task import Execution

logger = logging.getLogger(__name__)

DEFAULT_COMPUTE = Compute()


def name_of_run() -> str:
    """Such as "tiny on a simulated site", or "smollm2 on beer.stackexchange.com.7z up to sft"."""
    given = runtime.flow_run.parameters
    config = RLHFConfig.model_validate(given["config"])
    data = " + ".join(os.path.basename(dump.rstrip("/")) for dump in config.ingest.dump) or "a simulated site"
    changed = ", ".join(f"{key}={value}" for key, value in (given.get("overrides") or {}).items())
    return " ".join(
        [
            f"{config.name} on {data}",
            *([f"with {changed}"[:120]] if changed else []),
            *([f"seed {config.seed}"] if config.seed is not None else []),
            *([f"up to {given['until']}"] if given.get("until") else []),
        ]
    )


@flow(name="rlhf", flow_run_name=name_of_run, persist_result=False)
def rlhf(
    config: RLHFConfig = TINY,
    *,
    overrides: dict[str, Any] | None = None,
    refresh: list[Step] | None = None,
    until: Step | None = None,
    store: str = os.environ.get("STACKRLHF_STORE", "./store"),
    compute: Compute = DEFAULT_COMPUTE,
) -> dict[str, Artifact]:
    """From a StackExchange dump to an answering model and a verdict on it.

    Args:
        config: a complete configuration; the default is the preset `tiny`.
        overrides: single numbers by dotted name, such as {"ppo.kl_coef": 0.02}.
        refresh: steps to make anew even if they are stored.
        until: the last step to run; empty: all.
        store: the artifact store: a folder, or s3://bucket/prefix.
        compute: how the steps are executed; changes no result.
    """
    run = _Run(resolve(config, overrides), Store(store), compute, refresh or [], until)
    ingest = run(ingest_task)
    base = run(base_task, ingest=ingest)
    sft = run(sft_task, base=base, ingest=ingest)
    reward = run(reward_task, sft=sft, ingest=ingest)
    ppo = run(ppo_task, sft=sft, reward=reward, ingest=ingest)
    evaluate = run(evaluate_task, base=base, sft=sft, reward=reward, ppo=ppo, ingest=ingest)
    run(promote_task, evaluate=evaluate, ppo=ppo, sft=sft, reward=reward)
    return run.made


class _Run:
    """One step after the other, up to `until`, each under the key that the plan gave it."""

    def __init__(self, config: RLHFConfig, store: Store, compute: Compute, refresh: list[Step], until: Step | None):
        check_steps([*refresh, *([until] if until else [])])
        self.config, self.store, self.compute, self.refresh, self.until = config, store, compute, refresh, until
        self.plan = identities(config, store)
        self.made: dict[str, Artifact] = {}

    def __call__(self, task: Task[..., Any], **inputs: Artifact | None) -> Artifact | None:
        if self.until in self.made:
            return None
        step = task.name
        self._check_memory(step, inputs)
        execution = Execution(store=self.store.uri, compute=self.compute, refresh=step in self.refresh)
        state: Any = task(getattr(self.config, step), execution, **inputs, return_state=True)
        artifact: Artifact = state.result()  # raises what the step raised
        # promote's key holds the champion that it meets, and another run may have moved that meanwhile
        assert step == "promote" or artifact.key == self.plan[step].key, f"{step} ran under another key than the plan's"  # type: ignore[index]
        self.made[step] = artifact
        return artifact

    def _check_memory(self, step: Any, inputs: dict[str, Artifact | None]) -> None:
        """ValueError before a step begins that the machine has no memory for."""
        digests = {name: artifact.digest for name, artifact in inputs.items() if artifact is not None}
        if step in self.refresh or self.store.find(self.plan[step], digests) is None:
            base = self.made.get("base")
            warning = before_running(step, self.config, self.store.open(base) if base else None, self.compute)
            if warning:
                logger.warning(warning)


if __name__ == "__main__":
    import sys

    from flows.cli import main

    sys.exit(main(["run", *sys.argv[1:]]))
