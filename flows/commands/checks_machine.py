"""Checks of this machine: versions, processors, memory, disk."""

import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, cast

from flows.commands.doctor import Check
from flows.presets import RLHFConfig, Step
from flows.show import bytes_text
from tasks.artifacts import Store
from tasks.compute import Compute, cores

PACKAGE = "stackrlhf"
TRAPS = {"fastapi": "Prefect's server cannot start with it"}
TMP = 1e9
"""Bytes that should be free for temporary files."""


def packages() -> Iterator[Check]:
    """Python and every package against the ranges in pyproject.toml."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in _requirements()]
    here = ".".join(map(str, sys.version_info[:3]))
    enough = sys.version_info >= (3, 11)
    yield Check("python", "ok" if enough else "fail", here, "" if enough else "stackrlhf needs Python 3.11 or newer")
    well = 0
    for one in wanted:
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", str(one.marker or ""))
        try:
            found = version(one.name)
        except PackageNotFoundError:
            if not extra:
                yield Check(one.name, "fail", "is not installed", f"pip install '{one.name}{one.specifier}'")
            continue
        if one.specifier.contains(found, prereleases=True):
            well += 1
            continue
        trap = f": {TRAPS[one.name]}" if one.name in TRAPS else ""
        text = f"{found} is not {one.specifier}{trap}" + (f" (extra {extra[1]})" if extra else "")
        yield Check(one.name, "warn" if extra else "fail", text, f"pip install '{one.name}{one.specifier}'")
    yield Check("packages", "ok" if wanted else "warn", f"{well} installed as pyproject.toml wants them")


def _requirements() -> list[str]:
    try:
        return requires(PACKAGE) or []
    except PackageNotFoundError:
        import tomllib

        with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
            return list(tomllib.load(file)["project"]["dependencies"])


def accelerators() -> Iterator[Check]:
    """Cores, torch, the GPU and whether bitsandbytes works on it."""
    import torch

    yield Check("cores", "ok", f"{cores()} ({platform.processor() or platform.machine()})")
    cuda = torch.cuda.is_available()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    there = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()
    if cuda:
        yield Check("torch", "ok", f"{torch.__version__}, built for {build}")
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            text = f"{torch.cuda.get_device_name(number)}, {bytes_text(free)} of {bytes_text(total)} free"
            little = free < 0.5 * total
            remedy = "another program uses it: nvidia-smi shows which" if little else ""
            yield Check(f"gpu {number}", "warn" if little else "ok", text, remedy)
    elif there:
        how = "install torch built for CUDA" if torch.version.cuda is None else "the driver is too old for it, or not loaded"
        yield Check("torch", "fail", f"{torch.__version__}, built for {build}, sees no GPU, but this machine has one", how)
    else:
        yield Check("torch", "ok", f"{torch.__version__}, built for {build}; no GPU here: the CPU is used")
    bf16 = torch.cuda.is_bf16_supported() if cuda else _bf16_on_cpu(torch)
    what = "bf16 in hardware" if bf16 else "no bf16 in hardware"
    remedy = "" if bf16 else "fp32 is faster here: --set sft.dtype=fp32, and so on"
    yield Check("bf16", "ok" if bf16 else "warn", what, remedy)
    yield _bitsandbytes(torch, "cuda" if cuda else "cpu")


def _bf16_on_cpu(torch: Any) -> bool:
    with suppress(Exception):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def _bitsandbytes(torch: Any, device: str) -> Check:
    remedy = "only quantization=8bit and 4bit need it: pip install bitsandbytes, built for this torch and GPU"
    try:
        import bitsandbytes

        layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False).to(device)
        with torch.no_grad():
            wrong = not torch.isfinite(layer(torch.ones(2, 64, device=device, dtype=torch.float16)).float()).all()
    except Exception as error:
        return Check("bitsandbytes", "warn", f"cannot multiply in 8 bits on {device} ({type(error).__name__})", remedy)
    if wrong:
        return Check("bitsandbytes", "warn", f"multiplies wrong in 8 bits on {device}", remedy)
    return Check("bitsandbytes", "ok", f"{bitsandbytes.__version__}, 8 bits on {device}")


def memory(config: RLHFConfig) -> Iterator[Check]:
    """What is free against the largest step of the preset."""
    from flows.memory import PROCESS, Unknown, architecture_of, device_of, traced_estimate
    from tasks.memory import available

    compute = Compute()
    device = device_of(compute)
    free = available(device)
    what = "memory" if device == "cpu" else "gpu memory"
    try:
        shape = architecture_of(config.base, None)
        needs = {step: traced_estimate(step, config, shape, compute) for step in cast(list[Step], list(PROCESS))}
    except (Unknown, ValueError):
        yield Check(what, "ok", f"{bytes_text(free)} free; what {config.name} needs is known once its base is here")
        return
    step = max((one for one in needs if needs[one].device == device), key=lambda one: needs[one].peak_bytes)
    text = f"{bytes_text(free)} free, {config.name} needs {bytes_text(needs[step].peak_bytes)} at its peak ({step})"
    fits = needs[step].peak_bytes <= free
    remedy = "" if fits else "another preset, a smaller batch, --gradient-checkpointing, quantization=8bit, or another machine"
    yield Check(what, "ok" if fits else "fail", text, remedy)


def disk(config: RLHFConfig, store: Store) -> Iterator[Check]:
    """What is free at the store against a first run of the preset, and in the folder for temporary files."""
    from flows.disk import first_run, free_at

    free, needs = free_at(store.root), first_run(config)
    where = "the store" if store.uri == str(store.root) else "the store's cache"
    if needs is None:
        yield Check("disk", "ok", f"{bytes_text(free)} free at {where}, {store.root}")
    else:
        fits = needs <= free
        text = f"{bytes_text(free)} free at {where}, {store.root}; {config.name} needs {bytes_text(needs)}, its dump apart"
        remedy = "" if fits else "stackrlhf store gc --keep 3, or another place (--store; STACKRLHF_CACHE)"
        yield Check("disk", "ok" if fits else "fail", text, remedy)
    temporary = Path(tempfile.gettempdir())
    free = free_at(temporary)
    little = free < TMP
    yield Check(
        "tmp", "warn" if little else "ok", f"{bytes_text(free)} free in {temporary}", "make room, or set TMPDIR" if little else ""
    )
