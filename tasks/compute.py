"""How a step is executed. None of this changes a result, so none of it is in a key."""

import os
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch


class Compute(BaseModel):
    """Where and how a step runs: device, threads, workers, per-device batch."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    threads: int | None = Field(None, ge=1)
    """Threads of torch; None: all the cores that this process may use, but one for a model too small to gain by more."""
    workers: int | None = Field(None, ge=1)
    """Processes of ingest; None: all the cores that this process may use."""
    engine: Literal["processes", "dask", "ray"] = "processes"
    """What runs the shards of ingest: processes of this machine, or a Dask or Ray cluster (extras `dask`, `ray`)."""
    engine_address: str | None = None
    """Address of the cluster, such as tcp://10.0.0.1:8786 or ray://10.0.0.1:10001; None: one is started on this machine."""
    micro_batch_tokens: int = Field(16_384, ge=1)
    """Tokens in one forward pass; larger batches accumulate gradients."""


SMALL_MODEL = 4_000_000
"""Parameters. Below, a second thread gains little for its CPU time, and beside a busy process two take far longer."""


def cores() -> int:
    """Cores that this process may use (affinity, not what the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def prepare(compute: Compute) -> "torch.device":
    """Set torch's threads and choose the device; ValueError where the one asked for is not there."""
    import torch

    if compute.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("compute.device=cuda, but torch sees no CUDA device: use --device auto, or mend the driver")
    torch.set_num_threads(compute.threads or cores())
    cuda = compute.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def is_small(model: "torch.nn.Module") -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL


def fit_threads(compute: Compute, model: "torch.nn.Module") -> None:
    """One thread for a model too small to gain by more, unless `compute.threads` says otherwise."""
    import torch

    if compute.threads is None and is_small(model):
        torch.set_num_threads(1)
