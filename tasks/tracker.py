"""One experiment tracker from the inside: a process that reads lines of JSON from its standard input and tells the library.

The first line is what `tasks.trackers.opening` makes; then {"metrics", "step", "prefix", "time"} for each update, and {"final",
"state"} at the end. An input that ends without the latter means that the training was killed. Whatever goes wrong here is this
process's end, with the reason as the last line on standard error.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

PROJECT = "stackrlhf"
AFTER_THE_END_SECONDS = 120
"""How long a tracker may still work when the training is gone, which would have ended it."""

Opening = dict[str, Any]


class Backend(Protocol):
    """What a tracker can be told."""

    def log(self, metrics: dict[str, float], step: int, prefix: str, when: float) -> None: ...

    def final(self, metrics: dict[str, Any]) -> None:
        """Names begin with `<step>/final/`."""

    def close(self, finished: bool) -> None: ...


class TensorBoard:
    """Event files in a folder of the step's key; a step that goes on adds a file to them."""

    def __init__(self, about: Opening) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        base = os.environ.get("STACKRLHF_TENSORBOARD_DIR") or Path(about["folder"]) / "tensorboard"
        self._writer = EventFileWriter(str(Path(base) / about["name"]), flush_secs=10)
        self._last = 0
        rows = "\n".join(f"| {name} | {value} |" for name, value in {**about["tags"], **about["config"]}.items())
        self._text(f"{about['step']}/settings", f"| setting | |\n|---|---|\n{rows}")

    def log(self, metrics: dict[str, float], step: int, prefix: str, when: float) -> None:
        self._last = max(self._last, step)
        for name, value in metrics.items():
            self._scalar(name, value, step, when)

    def final(self, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._scalar(name, float(value), self._last, time.time())
            else:
                self._text(name, str(value))

    def close(self, finished: bool) -> None:
        self._writer.close()

    def _scalar(self, name: str, value: float, step: int, when: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        self._writer.add_event(Event(wall_time=when, step=step, summary=summary))

    def _text(self, name: str, text: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        about = create_summary_metadata(display_name=name, description="")
        value = Summary.Value(tag=name, metadata=about, tensor=make_tensor_proto([text.encode()]))
        self._writer.add_event(Event(wall_time=time.time(), step=self._last, summary=Summary(value=[value])))


class MLflow:
    """A run of experiment $MLFLOW_EXPERIMENT_NAME; found again by its tag `key`."""

    def __init__(self, about: Opening) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        place = Path(about["folder"])
        if not (uri := os.environ.get("MLFLOW_TRACKING_URI")):
            place.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{place / 'mlflow.db'}"
        self._client = client = MlflowClient(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._create_experiment(name)
        old = client.search_runs([experiment], f"tags.key = '{about['tags']['key']}'", max_results=1)
        self._run = old[0].info.run_id if old else client.create_run(experiment, run_name=about["name"]).info.run_id
        client.update_run(self._run, status="RUNNING")
        tags = [RunTag(k, v) for k, v in about["tags"].items()]
        params = [Param(k, str(v)[:6000]) for k, v in about["config"].items()]
        for start in range(0, len(params) or 1, 100):  # the API takes no more at once
            client.log_batch(self._run, params=params[start : start + 100], tags=tags)

    def _create_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        try:
            return str(self._client.create_experiment(name))
        except MlflowException:  # another step was first
            if (found := self._client.get_experiment_by_name(name)) is None:
                raise
            return str(found.experiment_id)

    def log(self, metrics: dict[str, float], step: int, prefix: str, when: float) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self._run, metrics=[Metric(k, v, int(when * 1000), step) for k, v in metrics.items()])

    def final(self, metrics: dict[str, Any]) -> None:
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        self.log(numbers, 0, "", time.time())
        for name, value in metrics.items():
            if name not in numbers:
                self._client.set_tag(self._run, name, str(value))

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "FAILED")


class WandB:
    """A run whose id is the step and the beginning of its key; with WANDB_MODE=offline, files that `wandb sync` sends later."""

    def __init__(self, about: Opening) -> None:
        import wandb

        Path(about["folder"]).mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=os.environ.get("WANDB_DIR", about["folder"]),
            id=about["name"],
            name=about["name"],
            group=f"data-{about['tags']['data']}",
            job_type=about["step"],
            tags=[about["step"]],
            config={**about["config"], **{f"tag.{k}": v for k, v in about["tags"].items()}},
            resume="allow",
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
        self._known: set[str] = set()

    def log(self, metrics: dict[str, float], step: int, prefix: str, when: float) -> None:
        axis = f"{prefix}/step"  # wandb's own step cannot go back, and two models of one step count on their own
        for name in metrics.keys() - self._known:
            self._run.define_metric(name, step_metric=axis)
            self._known.add(name)
        self._run.log({**metrics, axis: step})

    def final(self, metrics: dict[str, Any]) -> None:
        self._run.summary.update(metrics)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class Trackio:
    """A run in the SQLite file of the project, in $TRACKIO_DIR."""

    def __init__(self, about: Opening) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(Path(about["folder"]) / "trackio"))  # read when it is imported
        import trackio

        self._last = 0
        self._trackio = trackio
        with contextlib.redirect_stdout(sys.stderr):
            trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=about["name"],
                group=f"data-{about['tags']['data']}",
                config={**about["config"], **{f"tag.{k}": v for k, v in about["tags"].items()}},
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, metrics: dict[str, float], step: int, prefix: str, when: float) -> None:
        self._last = max(self._last, step)
        self._trackio.log(dict(metrics), step=step)

    def final(self, metrics: dict[str, Any]) -> None:
        self._trackio.log(metrics, step=self._last)

    def close(self, finished: bool) -> None:
        self._trackio.finish()


BACKENDS: dict[str, type[Any]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB, "trackio": Trackio}


def serve(tracker: str) -> None:
    """The life of this process."""
    os.nice(10)  # training comes first
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever trains says when it is over
    own = os.dup(0)  # what the library starts inherits no end of the pipe
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    lines = _lines(own)
    about = next(lines)
    backend: Backend = BACKENDS[tracker](about)
    finished = False
    for message in lines:
        if "final" in message:
            finished = message["state"] == "finished"
            backend.final({f"{about['step']}/final/{name}": value for name, value in message["final"].items()})
        else:
            backend.log(message["metrics"], message["step"], message["prefix"], message["time"])
    backend.close(finished)
    sys.stderr.flush()
    os._exit(0)  # the libraries' exit handlers have nothing to add, and some wait for a network


def _lines(file: int) -> Iterator[dict[str, Any]]:
    with os.fdopen(file, "rb") as stream:
        for line in stream:
            yield json.loads(line)
    signal.alarm(AFTER_THE_END_SECONDS)
