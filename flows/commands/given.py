"""What the user gave, as the flow takes it: configuration, store, compute. Whatever is wrong with it comes out here."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator

from pydantic import ValidationError

from flows.presets import RLHFConfig, Step, parse_override, resolve
from tasks.artifacts import Store
from tasks.compute import Compute
from tasks.progress import Update, listening
from tasks.step import StepPlan


def configuration(arguments: argparse.Namespace) -> RLHFConfig:
    overrides = dict(parse_override(text) for text in arguments.set)
    return resolve(arguments.preset, overrides, dump=arguments.dump, model=arguments.model, seed=arguments.seed)


def prepare(arguments: argparse.Namespace) -> tuple[RLHFConfig, Store, dict[Step, StepPlan]]:
    """Everything that the user can have got wrong comes out here, before anything runs."""
    config, store = configuration(arguments), Store(arguments.store)
    from flows.plan import check_steps, make_plan  # imports prefect, but starts no server

    check_steps([*arguments.refresh, *([arguments.until] if arguments.until else [])])
    with listening(_say):
        plans = make_plan(config, store, arguments.refresh, arguments.until)
    return config, store, plans


def _say(update: Update) -> None:
    """Before the display stands: a dump that is fetched, because its content is its key, must not look like a hang."""
    if update.note:
        print(f"stackrlhf: {update.note}", file=sys.stderr)


def compute_of(arguments: argparse.Namespace) -> Compute:
    """Every field of Compute is an option of the same name; one that is not given keeps its default."""
    given = {name: value for name in Compute.model_fields if (value := getattr(arguments, name, None)) is not None}
    try:
        return Compute(**given)
    except ValidationError as error:
        wrong = [": ".join([*map(str, one["loc"]), one["msg"].removeprefix("Value error, ")]) for one in error.errors()]
        raise ValueError("; ".join(wrong)) from error


@contextlib.contextmanager
def errors_only(logger: logging.Logger) -> Iterator[None]:
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
