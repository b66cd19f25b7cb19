"""Several processes train one model: control is replicated, work is shared.

Every process (rank) runs the same code on the same config, data order, and decisions. What is heavy is cut by rank (`mine`) and
its results are put together again in their order (`gather`), and gradients are summed once a step (`sum_gradients`); so each
rank makes the same update, and N processes come to what one comes to with the same global batch, but for rounding. In one
process, outside a launch, all of this does nothing, and costs nothing.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from tasks.compute import Compute
    from tasks.config import Quantization
    from tasks.models import DType

T = TypeVar("T")
M = TypeVar("M", bound="PreTrainedModel | PeftModel")

COLLECTIVE = timedelta(hours=2)
"""How long a rank waits for the others; one may be writing a large model meanwhile."""


@dataclass(frozen=True)
class World:
    """The processes that train together, and which of them this one is."""

    rank: int = 0
    size: int = 1
    sharded: bool = False
    """Strategy fsdp: a forward pass is a collective, so every rank has to make as many as the others."""
    local_rank: int = 0
    """On this machine."""


_world = World()


def world() -> World:
    """Of this process; World() outside a launch."""
    return _world


def mine(items: Sequence[T]) -> list[T]:
    """This rank's share of `items`: every size-th one, from its rank on."""
    return list(items[_world.rank :: _world.size])


def gather(part: Sequence[T], n: int) -> list[T]:
    """What the ranks made of `mine(range(n))`, in the order of range(n), on every rank. For small things; tensors on the CPU."""
    if _world.size == 1:
        assert len(part) == n, f"{len(part)} results of {n}"
        return list(part)
    import torch.distributed as dist

    parts: list[Any] = [None] * _world.size
    dist.all_gather_object(parts, list(part))
    whole: list[Any] = [None] * n
    for rank, one in enumerate(parts):
        whole[rank :: _world.size] = one  # ValueError where a rank has more or fewer than its share
    return whole


def agreed(value: T) -> T:
    """Rank 0's value, on every rank: for a decision that hangs on a clock or a signal."""
    if _world.size == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def anywhere(flag: bool) -> bool:
    """Whether any rank says so, on every rank: for a signal that may reach one machine alone."""
    if _world.size == 1:
        return flag
    import torch

    return bool(total(torch.tensor(float(flag))))


def total(values: "Tensor") -> "Tensor":
    """The sum of `values` over the ranks, the same bits on each; a copy."""
    summed = values.detach().clone()
    if _world.size > 1:
        import torch.distributed as dist

        dist.all_reduce(summed)
    return summed


def sum_gradients(parameters: "Iterable[nn.Parameter]") -> None:
    """Put the sum over the ranks into every `.grad`: each rank has divided its loss by the *global* number of rows or tokens.

    One all-reduce of a flat fp32 buffer. A gradient that this rank has not (None) counts as 0, and stays None where no rank has
    one, as it would in one process. What `shard` cut is left alone: its gradients were summed in the backward pass.
    """
    if _world.size == 1:
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    wanted = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if not wanted:
        return
    device = wanted[0].device
    present = torch.tensor([p.grad is not None for p in wanted], dtype=torch.float32, device=device)
    flat = torch.cat(
        [present, *(p.new_zeros(p.numel(), dtype=torch.float32) if p.grad is None else p.grad.float().flatten() for p in wanted)]
    )
    dist.all_reduce(flat)
    found, *sums = flat.split([len(wanted), *(p.numel() for p in wanted)])
    for parameter, ranks, summed in zip(wanted, found.tolist(), sums, strict=True):
        if ranks:
            parameter.grad = summed.view_as(parameter).to(parameter.dtype)


def rounds(n: int) -> int:
    """How many passes this rank makes for `n` of its own: as many as the busiest rank under fsdp, else `n`."""
    if not _world.sharded:
        return n
    return max(_everyone(n))


def any_of(flag: bool) -> bool:
    """Whether any rank has still something to do, under fsdp; else whether this one has."""
    return any(_everyone(flag)) if _world.sharded else flag


def _everyone(value: T) -> list[T]:
    import torch.distributed as dist

    values: list[Any] = [None] * _world.size
    dist.all_gather_object(values, value)
    return values


def place(device: "torch.device | str") -> "torch.device | str":
    """Where a model is read that is to compute on `device`: under fsdp the CPU, because whole it need not fit where it computes."""
    return "cpu" if _world.sharded else device


def load_frozen(
    folder: "Path", dtype: "DType", device: "torch.device | str", quantization: "Quantization" = "none"
) -> "PreTrainedModel":
    """models.load_model, and its layers cut among the ranks under fsdp. Adapters go on afterwards, whole on every rank."""
    from tasks import models

    return shard(models.load_model(folder, dtype, place(device), quantization), device)


def shard(model: "M", device: "torch.device | str") -> "M":
    """The model with its frozen decoder layers cut among the ranks, under fsdp (torch's FSDP2); else as it is.

    A layer is gathered when it computes, forward and backward, and let go after it. Adapters, embeddings and head stay whole on
    every rank, so their gradients are left to `sum_gradients`, whether they were there before or are added later. ValueError for
    what it cannot cut.
    """
    if not _world.sharded:
        return model
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    from tasks.models import trunk

    layers = [module for module in trunk(model).modules() if isinstance(module, GradientCheckpointingLayer)]
    cut = {p for layer in layers for name, p in layer.named_parameters() if ".lora_" not in name}
    if any(p.requires_grad for p in cut):
        raise ValueError("compute.strategy=fsdp cuts only frozen weights: use tuning=lora, or --strategy ddp")
    if not all(p.dtype.is_floating_point for p in cut):
        raise ValueError("compute.strategy=fsdp cannot cut a base in 8 or 4 bits: use quantization=none, or --strategy ddp")
    whole = set(model.parameters()) - cut
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    mesh = init_device_mesh(torch.device(device).type, (_world.size,))
    for module in [*layers, trunk(model)]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    return model


def launch(function: Callable[..., T], compute: "Compute", /, **arguments: Any) -> T:
    """function(**arguments), by all processes of all machines that `compute` asks for; what rank 0 returns.

    `function` is a module's own, and arguments and result can be pickled. Ranks other than 0 get a private temporary folder for
    `out`, and their progress is not heard; rank 0's is heard here. A rank that is killed makes all start anew, three times at
    most, from the newest checkpoint of `checkpoints`. What a rank raises ends all of them, and is raised here. SIGTERM goes on
    to every rank, each of which saves at its next step boundary; then Interrupted is raised.
    """
    if compute.processes * compute.machines == 1:
        return function(**arguments)
    from tasks import ranks

    return cast(T, ranks.run(function, compute, arguments))


@contextmanager
def joined(compute: "Compute", folder: str) -> Iterator[World]:
    """Inside the `with`, this process is one rank of those that the launcher started; on one machine they meet in `folder`."""
    global _world  # noqa: PLW0603
    import torch
    from accelerate import PartialState

    local_rank = int(os.environ["LOCAL_RANK"])
    size = compute.processes * compute.machines
    rank = compute.machine_rank * compute.processes + local_rank  # the launcher numbers machines as they come
    os.environ["RANK"] = str(rank)
    cuda = compute.device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    meeting = {"init_method": f"file://{folder}/group-{os.environ['TORCHELASTIC_RESTART_COUNT']}"} if compute.machines == 1 else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # threads are set by tasks.compute
        # With both backends, small objects and tensors on the CPU go by gloo.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        PartialState(cpu=not cuda, backend=backend, rank=rank, world_size=size, timeout=COLLECTIVE, **meeting)
    _world = World(rank, size, compute.strategy == "fsdp", local_rank)
    try:
        # The group is left to the process's end: where one rank raises, the others should not see it go before they hear why.
        yield _world
    finally:
        _world = World()
