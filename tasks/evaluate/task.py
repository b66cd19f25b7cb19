"""The Prefect side of `evaluate`."""

from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State

from tasks.artifacts import Artifact, Identity
from tasks.evaluate.config import EvaluateConfig
from tasks.progress import Progress
from tasks.task import Execution, conduct, step_task

VERSION = 1


def identify(config: EvaluateConfig, *, base: str, sft: str, reward: str, ppo: str, ingest: str) -> Identity:
    inputs = {"base": base, "sft": sft, "reward": reward, "ppo": ppo, "ingest": ingest}
    return Identity(step="evaluate", version=VERSION, config=config.identity(), inputs=inputs)


@step_task("evaluate")
def evaluate(
    config: EvaluateConfig,
    execution: Execution,
    *,
    base: Artifact,
    sft: Artifact,
    reward: Artifact,
    ppo: Artifact,
    ingest: Artifact,
) -> State[Artifact]:
    """Everybody answers the same held-out questions; a verdict follows."""
    inputs = {"base": base, "sft": sft, "reward": reward, "ppo": ppo, "ingest": ingest}

    def produce(folders: dict[str, Path], out: Path, progress: Progress) -> dict[str, Any]:
        from tasks.evaluate.evaluate import evaluate

        models = {name: folders[name] for name in ("base", "sft", "reward", "ppo")}
        return evaluate(config, **models, data=folders["ingest"], out=out, compute=execution.compute, progress=progress)

    return conduct(identify(config, **{name: artifact.key for name, artifact in inputs.items()}), inputs, produce, execution)
