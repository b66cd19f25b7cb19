"""What a stretch of work took: CPU seconds of this process, wall seconds, peak memory, and the phases inside."""

import functools
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def memory(field: str) -> int:
    """Bytes: VmRSS (now) or VmHWM (at most, since this program was started) of this process.

    ru_maxrss would do for the peak, were it not handed down by the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    """`start` after the warm-up, `stop` when the work is done; `wrap` names the functions whose CPU seconds are told apart."""

    def __init__(self) -> None:
        self.floor = memory("VmRSS")  # interpreter and libraries: make the meter after the imports, before the model
        self.cpu = self.wall = 0.0
        self.phases: dict[str, float] = {}
        self.running = False
        self._open: list[float] = []  # CPU seconds already told apart inside each wrapped function that is running
        self._began = (0.0, 0.0)

    def start(self) -> None:
        self.running = True
        self._began = (time.process_time(), time.perf_counter())

    def stop(self) -> None:
        self.cpu = time.process_time() - self._began[0]
        self.wall = time.perf_counter() - self._began[1]
        self.running = False

    def wrap(self, owner: Any, name: str, phase: str | Callable[..., str | None]) -> None:
        """Count what owner.name takes as `phase`, or as what `phase(*its arguments)` says; less what is wrapped inside it."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            label = phase if isinstance(phase, str) else phase(*args, **kwargs)
            if not self.running or label is None:
                return function(*args, **kwargs)
            self._open.append(0.0)
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.process_time() - began
                inside = self._open.pop()
                self.phases[label] = self.phases.get(label, 0.0) + took - inside
                if self._open:
                    self._open[-1] += took

        setattr(owner, name, counted)

    def result(self, work: float, **more: Any) -> dict[str, Any]:
        """`work` units were done between start and stop."""
        found = {
            "per_cpu_s": work / self.cpu,
            "per_s": work / self.wall,
            "peak_bytes": max(memory("VmHWM"), self.floor),  # Linux brings the peak up to date only now and then
            "floor_bytes": self.floor,
            "cpu_s": self.cpu,
        }
        if self.phases:
            rest = self.cpu - sum(self.phases.values())
            found["phases_cpu_s"] = {name: round(seconds, 3) for name, seconds in {**self.phases, "rest": rest}.items()}
        return found | more
