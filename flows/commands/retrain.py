"""`stackrlhf retrain`: one look at the source of dumps now, as the deployment retrain/weekly does it by schedule."""

import argparse
import sys
import traceback
from typing import Any

from flows.commands import DONE, FAILED, WRONG
from flows.commands.given import compute_of
from flows.commands.run import check_server, interruption, is_the_users, terminal, write_log
from flows.presets import parse_override, resolve
from flows.show import Live
from tasks.artifacts import Store, StoreError
from tasks.progress import listening
from tasks.step import describe, watching


def retrain(arguments: argparse.Namespace) -> int:
    compute, store = compute_of(arguments), Store(arguments.store)
    if compute.executor == "pool":
        check_server()
    overrides = dict(parse_override(text) for text in arguments.set)
    resolve(arguments.preset, overrides, dump=arguments.source)
    with Live() as live, terminal(live), listening(live.update), watching(live.event):
        live.line(f"retrain {arguments.preset}, store {store.uri}")
        live.busy("starting Prefect")
        from flows.retrain import retrain as flow

        given = {"overrides": overrides, "store": store.uri, "compute": compute, "force": arguments.force}
        failure: Exception | None = None
        try:
            state: Any = flow(source=arguments.source, config=arguments.preset, **given, return_state=True)
            decision = state.result()
        except BaseException as error:
            if stopped := interruption(error):
                raise stopped from None
            if isinstance(error, ValueError | StoreError) or not isinstance(error, Exception):
                raise  # flows/cli.py makes a line of it
            failure = error
    if failure is not None:
        if arguments.debug:
            traceback.print_exception(failure)
        print(f"stackrlhf: {describe(failure)} (traceback: {write_log(store, failure)})", file=sys.stderr)
        return WRONG if is_the_users(failure) else FAILED
    if arguments.json:
        print(decision.model_dump_json(indent=1))
    else:
        print(f"{decision.title}: {decision.reason}")
        if decision.report:
            print(f"report: {decision.report}", file=sys.stderr)
    return DONE
