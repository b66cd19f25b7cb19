"""One flow per step, so that each can be a job of its own on a work pool. Inputs and result are references, never data."""

import os
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks.artifacts import Artifact
from tasks.base.config import BaseModelConfig
from tasks.base.task import base as base_task
from tasks.compute import Compute
from tasks.evaluate.config import EvaluateConfig
from tasks.evaluate.task import evaluate as evaluate_task
from tasks.ingest.config import IngestConfig
from tasks.ingest.task import ingest as ingest_task
from tasks.ppo.config import PPOConfig
from tasks.ppo.task import ppo as ppo_task
from tasks.promote.config import PromoteConfig
from tasks.promote.task import promote as promote_task
from tasks.reward.config import RewardConfig
from tasks.reward.task import reward as reward_task
from tasks.sft.config import SFTConfig
from tasks.sft.task import sft as sft_task
from tasks.task import Execution

STORE = os.environ.get("STACKRLHF_STORE", "./store")
DEFAULT_COMPUTE = Compute()


def own(state: Any) -> State[Artifact]:
    """The step's state as the flow's own: Cached where the artifact was stored. Raises what the step raised."""
    return Completed(name=state.name, message=state.message, data=state.result())


@flow(name="ingest", flow_run_name="ingest", persist_result=False)
def ingest(
    config: IngestConfig, *, store: str = STORE, compute: Compute = DEFAULT_COMPUTE, refresh: bool = False
) -> State[Artifact]:
    """From StackExchange dumps, or a simulated site, to questions, pairs and splits."""
    return own(ingest_task(config, Execution(store=store, compute=compute, refresh=refresh), return_state=True))


@flow(name="base", flow_run_name="base", persist_result=False)
def base(
    config: BaseModelConfig, *, ingest: Artifact, store: str = STORE, compute: Compute = DEFAULT_COMPUTE, refresh: bool = False
) -> State[Artifact]:
    """The language model that everything starts from."""
    return own(base_task(config, Execution(store=store, compute=compute, refresh=refresh), ingest=ingest, return_state=True))


@flow(name="sft", flow_run_name="sft", persist_result=False)
def sft(
    config: SFTConfig,
    *,
    base: Artifact,
    ingest: Artifact,
    store: str = STORE,
    compute: Compute = DEFAULT_COMPUTE,
    refresh: bool = False,
) -> State[Artifact]:
    """Supervised fine-tuning on each question's best answer."""
    return own(
        sft_task(config, Execution(store=store, compute=compute, refresh=refresh), base=base, ingest=ingest, return_state=True)
    )


@flow(name="reward", flow_run_name="reward", persist_result=False)
def reward(
    config: RewardConfig,
    *,
    sft: Artifact,
    ingest: Artifact,
    store: str = STORE,
    compute: Compute = DEFAULT_COMPUTE,
    refresh: bool = False,
) -> State[Artifact]:
    """The reward model, and the judge, which watches PPO and never rewards it."""
    return own(
        reward_task(config, Execution(store=store, compute=compute, refresh=refresh), sft=sft, ingest=ingest, return_state=True)
    )


@flow(name="ppo", flow_run_name="ppo", persist_result=False)
def ppo(
    config: PPOConfig,
    *,
    sft: Artifact,
    reward: Artifact,
    ingest: Artifact,
    store: str = STORE,
    compute: Compute = DEFAULT_COMPUTE,
    refresh: bool = False,
) -> State[Artifact]:
    """Proximal policy optimization against the reward model."""
    execution = Execution(store=store, compute=compute, refresh=refresh)
    return own(ppo_task(config, execution, sft=sft, reward=reward, ingest=ingest, return_state=True))


@flow(name="evaluate", flow_run_name="evaluate", persist_result=False)
def evaluate(
    config: EvaluateConfig,
    *,
    base: Artifact,
    sft: Artifact,
    reward: Artifact,
    ppo: Artifact,
    ingest: Artifact,
    store: str = STORE,
    compute: Compute = DEFAULT_COMPUTE,
    refresh: bool = False,
) -> State[Artifact]:
    """Everybody answers the same held-out questions; a verdict follows."""
    execution = Execution(store=store, compute=compute, refresh=refresh)
    return own(evaluate_task(config, execution, base=base, sft=sft, reward=reward, ppo=ppo, ingest=ingest, return_state=True))


@flow(name="promote", flow_run_name="promote", persist_result=False)
def promote(
    config: PromoteConfig,
    *,
    evaluate: Artifact,
    ppo: Artifact,
    sft: Artifact,
    reward: Artifact,
    store: str = STORE,
    compute: Compute = DEFAULT_COMPUTE,
    refresh: bool = False,
) -> State[Artifact]:
    """Move the champion pointer if the verdict is *better*."""
    execution = Execution(store=store, compute=compute, refresh=refresh)
    return own(promote_task(config, execution, evaluate=evaluate, ppo=ppo, sft=sft, reward=reward, return_state=True))
