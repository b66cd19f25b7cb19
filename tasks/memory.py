"""How much memory a computation will take, before it takes any: the real code runs on tensors that have shapes and no numbers.

`tracing()` turns every tensor made inside it into a fake one (torch's FakeTensorMode) and keeps a ledger of when each comes into
being and when nobody needs it any more. So the estimate follows the code: what a layer keeps for the backward pass, what a fused
loss never makes, which copies a check makes. What no tensor shows (Python, kernels' own workspaces) has to be added.

On a CPU a process takes more than its tensors: glibc's heap has holes. Tensors of less than `MAPPED` bytes live in that heap, and
count `HOLES` times what they hold; larger ones have pages of their own.
"""

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAPPED = 32 * 2**20
"""Bytes from which glibc gives an allocation pages of its own, always (DEFAULT_MMAP_THRESHOLD_MAX)."""
WARN = 0.85
"""Share of what is free from which a step is warned of."""
HOLES = 1.9
"""The heap against the tensors in it, weights aside, which stay where they are put. Passes of a step differ in length, so the holes
that one leaves do not fit the next. Fitted to SFT and reward at hidden 256 and 576, with the caches of compiled products kept small
(flows/__init__.py)."""


class Ledger(TorchDispatchMode):
    """Bytes of the tensors alive, now and at most since `mark`; small ones count `holes` times."""

    def __init__(self, holes: float = 1.0) -> None:
        super().__init__()
        self.holes = holes
        self.now = self.peak = 0.0
        self._alive: dict[int, float] = {}

    @contextmanager
    def solid(self) -> Iterator[None]:
        """What is made inside the `with` stays, and leaves no holes."""
        before, self.holes = self.holes, 1.0
        yield
        self.holes = before

    def mark(self) -> None:
        """From here on `peak` is of what follows, what is held now included."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return _number(args[0].dtype)
        if func is torch.ops.aten.bincount.default:  # as long as its input, where the real one is as long as its largest number
            return torch.ones_like(args[0], dtype=torch.int64)
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return found

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, float(storage.nbytes())
        if key in self._alive or tensor.is_meta:
            return
        self._alive[key] = size = size * (self.holes if size < MAPPED else 1)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def _number(dtype: torch.dtype) -> Any:
    """What a number that nobody computed is taken for: finite, of no consequence, and true."""
    return True if dtype is torch.bool else 1e-9 if dtype.is_floating_point else 1


class _Answers(TorchFunctionMode):
    """Answers for code that reads numbers out of a tensor: as many as it has."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return _nested(tuple(args[0].shape), _number(args[0].dtype))
        if func is Tensor.numpy:
            return torch.zeros(tuple(args[0].shape), dtype=args[0].dtype).numpy()
        return func(*args, **(kwargs or {}))


def _nested(shape: tuple[int, ...], value: Any) -> Any:
    return [_nested(shape[1:], value) for _ in range(shape[0])] if shape else value


@contextmanager
def tracing(holes: float = 1.0) -> Iterator[Ledger]:
    """Inside the `with` tensors take no memory and next to no time, and their comings and goings are written down."""
    ledger = Ledger(holes)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(ledger)
        stack.enter_context(_Answers())
        yield ledger


def inhabit(model: nn.Module, device: str = "cpu") -> None:
    """Inside `tracing`: parameters and buffers of a model built on the meta device become fake tensors of `device`."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for owned in (module._parameters, module._buffers):
            for name, old in owned.items():
                if old is not None and old.is_meta and id(old) not in made:  # tied weights stay one
                    new: Tensor = torch.empty(old.shape, dtype=old.dtype, device=device)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                if id(old) in made:
                    owned[name] = made[id(old)]  # type: ignore[assignment]


# ---- what is there


def give_back() -> None:
    """Return the heap's holes to the machine: between phases of a step, so that what comes next does not stand on top of them."""
    with suppress(AttributeError, OSError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)


def available(device: str) -> int:
    """Bytes that this process could still get: of the machine's memory and its cgroup's on a CPU, of the device on CUDA."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return min([psutil.virtual_memory().available, *_left_in_cgroup()])


def _left_in_cgroup(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What the limits of this process's cgroup leave (version 2, else version 1); page cache counts as free."""
    for limit, used, stat, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):
            most, now = (int((root / name).read_text()) for name in (limit, used))
            lines = dict(line.split() for line in (root / stat).read_text().splitlines())
            return [max(0, most - now + int(lines.get(cache, 0)))]
    return []


@dataclass(frozen=True)
class Fit:
    """Whether what a step needs is there."""

    needed: int
    """Bytes on top of what this process holds already."""
    available: int

    @property
    def share(self) -> float:
        return self.needed / max(1, self.available)


def check_fits(step: str, peak: int, phase: str, device: str, *, allow: bool = False) -> str | None:
    """None where `peak` bytes are there with room to spare, a warning above 85 % of them; ValueError where they are not.

    `peak`: of the whole process on a CPU, whose present size counts as had. `allow`: a warning in place of the error.
    """
    held = psutil.Process().memory_info().rss if device == "cpu" else 0
    fit = Fit(max(0, peak - held), available(device))
    if fit.share <= WARN:
        return None
    text = (
        f"{step} needs about {peak / 1e9:.1f} GB at its peak ({phase}), {fit.needed / 1e9:.1f} GB more than this process has, and "
        f"{fit.available / 1e9:.1f} GB of {'memory' if device == 'cpu' else 'the GPU'} are free: lower compute.micro_batch_tokens, "
        f"set compute.gradient_checkpointing, {step}.quantization=8bit or dtype=bf16, or lower the batch"
    )
    if fit.share > 1 and not allow:
        raise ValueError(f"{text} (--allow-memory runs it all the same)")
    return text
