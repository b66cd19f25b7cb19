"""The whole pipeline. Also the main job: `python -m flows.rlhf` is `stackrlhf run`."""

import logging
import os
import textwrap
from typing import Any

from prefect import Task, flow, runtime

from flows.attempts import begin_attempt
from flows.disk import check_disk, disk
from flows.memory import before_running
from flows.overview import Overview
from flows.plan import check_steps, identities, make_plan
from flows.pool import Inputs, Pools, cancel_jobs
from flows.presets import PRESETS, PresetName, RLHFConfig, Step, resolve
from tasks.artifacts import Artifact, Pointer, Store
from tasks.base.task import base as base_task
from tasks.compute import Compute
from tasks.evaluate.task import evaluate as evaluate_task
from tasks.ingest.task import ingest as ingest_task
from tasks.ppo.task import ppo as ppo_task
from tasks.promote.task import promote as promote_task
from tasks.reward.task import reward as reward_task
from tasks.sft.task import sft as sft_task
from tasks.task import Execution
from tasks.trackers import check_installed

logger = logging.getLogger(__name__)

DEFAULT_COMPUTE = Compute()


def name_of_run() -> str:
    """Such as "tiny on a simulated site", or "smollm2 on beer.stackexchange.com.7z up to sft"."""
    given = runtime.flow_run.parameters
    config = given.get("config") or "tiny"
    config = PRESETS[config] if isinstance(config, str) else RLHFConfig.model_validate(config)
    data = " + ".join(os.path.basename(dump.rstrip("/")) for dump in config.ingest.dump) or "a simulated site"
    changed = ", ".join(f"{key}={value}" for key, value in (given.get("overrides") or {}).items())
    return " ".join(
        [
            f"{config.name} on {data}",
            *([textwrap.shorten(f"with {changed}", 100, placeholder=" ...")] if changed else []),
            *([f"seed {config.seed}"] if config.seed is not None else []),
            *([f"up to {given['until']}"] if given.get("until") else []),
        ]
    )


@flow(name="rlhf", flow_run_name=name_of_run, persist_result=False, on_cancellation=[cancel_jobs])
def rlhf(
    config: RLHFConfig | PresetName = "tiny",
    *,
    overrides: dict[str, Any] | None = None,
    refresh: list[Step] | None = None,
    until: Step | None = None,
    store: str = os.environ.get("STACKRLHF_STORE", "./store"),
    compute: Compute = DEFAULT_COMPUTE,
) -> dict[str, Artifact]:
    """From a StackExchange dump to an answering model and a verdict on it.

    Args:
        config: the name of a preset, or a complete configuration.
        overrides: single numbers by dotted name, such as {"ppo.kl_coef": 0.02}.
        refresh: steps to make anew even if they are stored.
        until: the last step to run; empty: all.
        store: the artifact store: a folder, or s3://bucket/prefix.
        compute: how the steps are executed; changes no result.
    """
    run = _Run(resolve(config, overrides), Store(store), compute, refresh or [], until)
    try:
        ingest = run(ingest_task)
        base = run(base_task, ingest=ingest)
        sft = run(sft_task, base=base, ingest=ingest)
        reward = run(reward_task, sft=sft, ingest=ingest)
        ppo = run(ppo_task, sft=sft, reward=reward, ingest=ingest)
        evaluate = run(evaluate_task, base=base, sft=sft, reward=reward, ppo=ppo, ingest=ingest, champion=run.champion)
        run(promote_task, evaluate=evaluate, ppo=ppo, sft=sft, reward=reward, champion=run.champion)
    finally:
        run.overview.close()
    return run.made


class _Run:
    """One step after the other, up to `until`, each under the key that the plan gave it."""

    def __init__(self, config: RLHFConfig, store: Store, compute: Compute, refresh: list[Step], until: Step | None):
        check_steps([*refresh, *([until] if until else [])])
        first = begin_attempt("stackrlhf", config.name)
        self.config, self.store, self.compute, self.refresh, self.until = config, store, compute, refresh, until
        self.pools = Pools(config, store, compute, refresh, until, first) if compute.executor == "pool" else None
        self.plan, self.champion = identities(config, store)
        self._check_first()
        self.overview = Overview(config, store, self.plan)
        self.made: dict[str, Artifact] = {}

    def _check_first(self) -> None:
        """ValueError before the first step for what would end a later one: no such tracker, or a disk that is too small."""
        if self.compute.report_to and not self.pools:  # with pools it is the workers' machines that have the trackers
            check_installed(self.compute.report_to)
        if "://" in self.store.uri:  # of the caches of other machines this one knows nothing
            return
        plans = make_plan(self.config, self.store, self.refresh, self.until)
        if not all(plan.stored for plan in plans.values()):
            check_disk(self.store, plans, disk(self.config, self.store, plans), self.compute)

    def __call__(self, task: Task[..., Any], **inputs: Artifact | Pointer | None) -> Artifact | None:
        if self.until in self.made:
            return None
        step: Any = task.name
        self.overview.begin(step)
        try:
            state = self._on_pool(step, inputs) if self.pools else self._here(task, step, inputs)
            artifact: Artifact = state.result()  # raises what the step raised
        except BaseException:
            self.overview.end(step, None, "failed")
            raise
        self.overview.end(step, artifact, "stored" if state.name == "Cached" else "ran")
        assert artifact.key == self.plan[step].key, f"{step} ran under another key than the plan's"
        self.made[step] = artifact
        return artifact

    def _here(self, task: Task[..., Any], step: Step, inputs: Inputs) -> Any:
        self._check_memory(step, inputs)
        execution = Execution(store=self.store.uri, compute=self.compute, refresh=step in self.refresh)
        return task(getattr(self.config, step), execution, **inputs, return_state=True)

    def _on_pool(self, step: Step, inputs: Inputs) -> Any:
        assert self.pools
        return self.pools.task(step)(self.plan[step], **inputs, return_state=True)

    def _check_memory(self, step: Step, inputs: Inputs) -> None:
        """ValueError before a step begins that the machine has no memory for."""
        identity = self.plan[step]
        given = {name: artifact for name, artifact in inputs.items() if isinstance(artifact, Artifact)}
        digests = {name: artifact.digest for name, artifact in given.items() if name in identity.inputs}
        if step in self.refresh or self.store.find(identity, digests) is None:
            base = self.made.get("base")
            warning = before_running(step, self.config, self.store.open(base) if base else None, self.compute)
            if warning:
                logger.warning(warning)


if __name__ == "__main__":
    import sys

    from flows.cli import main

    sys.exit(main(["run", *sys.argv[1:]]))
