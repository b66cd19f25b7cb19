"""How a step is executed. None of this changes a result, so none of it is in a key."""

import os
import re
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tasks.distributed import world

if TYPE_CHECKING:
    import torch


Tracker = Literal["tensorboard", "mlflow", "wandb", "trackio"]


class Compute(BaseModel):
    """Where and how a step runs: device, threads, processes, machines, per-device batch."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    executor: Literal["inline", "pool"] = "inline"
    """inline: the steps run in this process. pool: each step that is not stored yet is a job of its own on Prefect's work pools."""
    report_to: tuple[Tracker, ...] = ()
    """Experiment trackers that are told each step's settings and metrics; each needs its extra, such as stackrlhf[mlflow]."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    threads: int | None = Field(None, ge=1)
    """Threads of torch in each process; None: the cores that this machine may use, shared among its processes, but one for a
    model too small to gain by more."""
    workers: int | None = Field(None, ge=1)
    """Processes of ingest; None: all the cores that this process may use."""
    engine: Literal["processes", "dask", "ray"] = "processes"
    """What runs the shards of ingest: processes of this machine, or a Dask or Ray cluster (extras `dask`, `ray`)."""
    engine_address: str | None = None
    """Address of the cluster, such as tcp://10.0.0.1:8786 or ray://10.0.0.1:10001; None: one is started on this machine."""
    allow_memory: bool = False
    """Begin a step although its estimate says that it needs more memory than is free: a warning instead of an error."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Tokens in one forward pass; larger batches accumulate gradients. None: 2,048 on a CPU, where more costs memory and gains
    nothing, 16,384 on CUDA."""
    gradient_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass instead of keeping them: less memory, about 1.4 times the
    work, the same numbers."""
    checkpoint_seconds: float = Field(300, ge=0)
    """Training saves its state at the first step boundary after so many seconds, and goes on from there after a crash; 0: after
    every step."""
    processes: int = Field(1, ge=1)
    """Processes of training and evaluation on this machine, which share each batch: one a GPU, or so many on its CPU."""
    machines: int = Field(1, ge=1)
    """Machines that run this same command, each with so many processes, on one store; see docs/scale.md."""
    machine_rank: int = Field(0, ge=0)
    """Number of this machine, from 0; machine 0 publishes the artifacts, the others wait for them."""
    rendezvous: str | None = None
    """host:port of machine 0, where the machines find one another; any free port. Needed with several machines."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process holds the whole model. fsdp: its frozen weights are cut among the processes, and gathered layer by
    layer; for a base that does not fit."""

    @model_validator(mode="after")
    def _machines_find_one_another(self) -> Self:
        if self.machine_rank >= self.machines:
            raise ValueError(
                f"compute.machine_rank={self.machine_rank}: with compute.machines={self.machines} the last is {self.machines - 1}"
            )
        if self.machines > 1 and self.rendezvous is None:
            raise ValueError(f"compute.machines={self.machines} needs compute.rendezvous=host:port, where machine 0 can be reached")
        if self.rendezvous is not None and not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:/]+):[0-9]{1,5}", self.rendezvous):
            raise ValueError(f"compute.rendezvous={self.rendezvous!r} is not host:port, such as 10.0.0.1:29500")
        if self.strategy == "fsdp" and self.processes * self.machines == 1:
            raise ValueError("compute.strategy=fsdp cuts a model among processes, and there is one: set compute.processes")
        return self


PASS_TOKENS = {"cpu": 2_048, "cuda": 16_384}
"""Tokens in one forward pass where `micro_batch_tokens` says nothing."""
SAMPLED_TOKENS = 16_384
"""Tokens of the rows that evaluation samples side by side, where `micro_batch_tokens` says nothing."""
SMALL_MODEL = 4_000_000
"""Parameters. Below, a second thread gains little for its CPU time, and beside a busy process two take far longer."""


def cores() -> int:
    """Cores that this process may use (affinity, not what the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def prepare(compute: Compute) -> "torch.device":
    """Set torch's threads and choose the device, its own in a launch; ValueError where there is none."""
    import torch

    if compute.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("compute.device=cuda, but torch sees no CUDA device: use --device auto, or mend the driver")
    torch.set_num_threads(compute.threads or max(1, cores() // compute.processes))
    cuda = compute.device != "cpu" and torch.cuda.is_available()
    if not cuda:
        return torch.device("cpu")
    if compute.processes > torch.cuda.device_count():
        raise ValueError(
            f"compute.processes={compute.processes}, but this machine has {torch.cuda.device_count()} CUDA devices: "
            "lower it, or use --device cpu"
        )
    if compute.processes == 1:
        return torch.device("cuda")
    device = torch.device("cuda", world().local_rank)
    torch.cuda.set_device(device)
    return device


def pass_tokens(compute: Compute, device: "torch.device | str") -> int:
    """Tokens in one forward pass on this device."""
    return compute.micro_batch_tokens or PASS_TOKENS[str(device).partition(":")[0]]


def is_small(model: "torch.nn.Module") -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL


def fit_threads(compute: Compute, model: "torch.nn.Module") -> None:
    """One thread for a model too small to gain by more, unless `compute.threads` says otherwise."""
    import torch

    if compute.threads is None and is_small(model):
        torch.set_num_threads(1)
