"""One flow per step, so that each can be a job of its own on a work pool. Inputs and result are references, never data.

The parameters of a step's flow are those of its task, and `store`, `compute` and `refresh` in the place of `execution`.
"""

import inspect
import logging
import os
from pathlib import Path
from typing import Any, cast

from prefect import Flow, Task, flow, runtime
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled, Completed

from flows.attempts import begin_attempt, is_cancelling
from flows.memory import PROCESS, before_running
from flows.presets import TINY, RLHFConfig, Step
from tasks.artifacts import Artifact, Manifest, Store
from tasks.base.task import base as base_task
from tasks.compute import Compute
from tasks.evaluate.task import evaluate as evaluate_task
from tasks.ingest.task import ingest as ingest_task
from tasks.manifest import MANIFEST
from tasks.ppo.task import ppo as ppo_task
from tasks.promote.task import promote as promote_task
from tasks.reward.task import reward as reward_task
from tasks.sft.task import sft as sft_task
from tasks.task import Execution

logger = logging.getLogger(__name__)

STORE = os.environ.get("STACKRLHF_STORE", "./store")
DEFAULT_COMPUTE = Compute()


def _execution(*, store: str = STORE, compute: Compute = DEFAULT_COMPUTE, refresh: bool = False) -> Execution:
    return Execution(store=store, compute=compute, refresh=refresh)


def job(task: Task[..., Any]) -> Flow[..., State[Artifact]]:
    """The flow of one step."""

    def run(config: Any, **given: Any) -> State[Artifact]:
        begin_attempt()
        execution = _execution(**{name: given.pop(name) for name in ("store", "compute", "refresh")})
        _check_memory(cast(Step, task.name), config, given, execution)
        try:
            state: Any = task(config, execution, **given, return_state=True)
        except TerminationSignal:
            # A step that saves its state before it ends does not hear Prefect's word for why it has to.
            if is_cancelling():
                return Cancelled(message=f"{task.name} was cancelled; what it had saved is kept")
            raise
        # Cached where the artifact was stored; raises what the step raised
        return Completed(name=state.name, message=state.message, data=state.result())

    own = [parameter for name, parameter in inspect.signature(task.fn).parameters.items() if name != "execution"]
    run.__signature__ = inspect.Signature([*own, *inspect.signature(_execution).parameters.values()])  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = task.name, task.fn.__doc__
    return flow(name=task.name, flow_run_name=lambda: name_of_run(task.name), persist_result=False)(run)


def name_of_run(step: str) -> str:
    """What the pipeline called its job, such as "sft of tiny on a simulated site"; else the step."""
    return str(runtime.flow_run.name) if runtime.flow_run.parent_flow_run_id else step


def _check_memory(step: Step, config: Any, inputs: dict[str, Any], execution: Execution) -> None:
    """ValueError before a step begins that this machine has no memory for."""
    if step not in PROCESS:
        return
    store = Store(execution.store)
    sections: dict[str, Any] = {step: config}
    base: Path | None = None
    for name, artifact in inputs.items():
        if not isinstance(artifact, Artifact) or name not in PROCESS:
            continue
        folder = _folder(store, artifact)
        if name in {"base", "sft"}:
            base = folder  # both have the model's config.json
        if name in {"sft", "reward", "ppo"}:
            made_with = Manifest.parse((folder / MANIFEST).read_text(encoding="utf-8")).identity.config
            sections[name] = RLHFConfig.model_fields[name].annotation.model_validate(made_with)  # type: ignore[union-attr]
    warning = before_running(step, TINY.model_copy(update=sections), base, execution.compute)
    if warning:
        logger.warning(warning)


def _folder(store: Store, artifact: Artifact) -> Path:
    """Of an artifact; the step itself checks every byte of what it reads."""
    return store.open(artifact) if "://" in store.uri else store.folder(artifact.step, artifact.key)


ingest = job(ingest_task)
base = job(base_task)
sft = job(sft_task)
reward = job(reward_task)
ppo = job(ppo_task)
evaluate = job(evaluate_task)
promote = job(promote_task)
