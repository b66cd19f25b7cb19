"""Puts the work pools, deployments and automations onto the Prefect server of PREFECT_API_URL. Run it again after every change:
what is there is updated, and what an earlier run was given (image, store, source of dumps, webhook) stays unless it is given anew.

    python deployments/install.py                                  jobs are processes of the workers' machines
    python deployments/install.py --type docker --image stackrlhf@sha256:...
    python deployments/install.py --type kubernetes --image registry/stackrlhf@sha256:... --store s3://bucket/store
"""

import argparse
import ipaddress
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import flows  # noqa: F401  sets what Prefect reads when it is imported

# isort: split
import httpx
import yaml
from pool_templates import POOLS, rendered
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL

HERE = Path(__file__).resolve().parent
DONE, FAILED, WRONG = 0, 1, 2  # as the stackrlhf command ends
WEBHOOK = "stackrlhf-notify"
QUEUES = {"cpu": {"steps": 1, "pipelines": 2}}
"""Their priorities: what runs is finished before another pipeline begins."""


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        if arguments.notify and urlsplit(arguments.notify).scheme not in {"http", "https"}:
            raise ValueError(f"--notify {arguments.notify}: give the http:// or https:// address of a webhook")
        url = server_url()
        with get_client(sync_client=True) as client:
            say("server", url)
            for pool in ("cpu", "gpu"):
                install_pool(client, pool, arguments)
            install_deployments(client, arguments.source)
            install_automations(client, arguments.notify)
    except ValueError as error:
        return end(WRONG, error)
    except (httpx.HTTPError, RuntimeError) as error:
        return end(FAILED, f"{type(error).__name__}: {error}" if isinstance(error, httpx.HTTPError) else error)
    print("\nWorkers, each in a terminal or service of its own:")
    given = {"docker": " (with the extra `docker` installed)", "kubernetes": " (with the extra `kubernetes` installed)"}
    print(f"  prefect worker start --pool cpu{given.get(arguments.type, '')}")
    alone = "" if arguments.type == "kubernetes" else " --name $(hostname)-gpu0 --limit 1"
    print(f"  {'CUDA_VISIBLE_DEVICES=0 ' if arguments.type == 'process' else ''}prefect worker start --pool gpu{alone}")
    print("Then, for example:  prefect deployment run rlhf/tiny --watch")
    return DONE


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = described.add_argument
    add("--type", choices=("process", "docker", "kubernetes"), default="process", help="what runs the jobs (default: process)")
    add("--image", help="the image of docker/Dockerfile, by digest if it can be; for docker and kubernetes")
    add("--store", metavar="URI", help="the artifact store of all jobs; without it each worker's STACKRLHF_STORE, or the image's")
    add("--volume", metavar="NAME", help="mounted at /data in jobs: a volume or folder (docker), a claim (kubernetes)")
    add(
        "--python",
        metavar="PATH",
        help="what runs the jobs of --type process (default: the Python that runs this); `python` where it is elsewhere on each "
        "machine: each worker looks for it on its own PATH",
    )
    add(
        "--env",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="environment of all jobs; no secrets",
    )
    source = os.environ.get("STACKRLHF_DUMP_SOURCE") or None
    add("--source", metavar="URI", default=source, help="where retrain/weekly looks for dumps (default: $STACKRLHF_DUMP_SOURCE)")
    add("--notify", metavar="URL", help="webhook that is told when a pipeline fails, such as Slack's")
    return described


def server_url() -> str:
    """The server's address, once it has answered."""
    url, auth = PREFECT_API_URL.value(), PREFECT_API_AUTH_STRING.value()
    if not url:
        raise ValueError(
            "there is no server to install on: run `prefect server start`, and set PREFECT_API_URL, such as http://127.0.0.1:4200/api"
        )
    try:
        with get_client(sync_client=True) as client:
            client.read_work_pools(limit=1)
    except httpx.ConnectError as error:
        raise RuntimeError(
            f"no Prefect server answers at {url}: start it with `prefect server start`, or mend PREFECT_API_URL"
        ) from error
    except httpx.HTTPStatusError as error:
        if error.response.status_code in {401, 403}:
            said = (
                "refuses the PREFECT_API_AUTH_STRING that is set"
                if auth
                else "wants a password: set PREFECT_API_AUTH_STRING=user:password"
            )
            raise ValueError(f"the server at {url} {said}") from None
        raise
    if not auth and not on_loopback(url):
        print(
            f"warning: {url} is not on this machine, and PREFECT_API_AUTH_STRING is not set: whoever reaches the server can run "
            "code on every worker. Set PREFECT_SERVER_API_AUTH_STRING at the server, and PREFECT_API_AUTH_STRING where it is used.",
            file=sys.stderr,
        )
    return str(url)


def on_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# ---- work pools


def install_pool(client: SyncPrefectClient, pool: str, arguments: argparse.Namespace) -> None:
    try:
        present = client.read_work_pool(pool)
    except ObjectNotFound:
        present = None
    if present is not None and present.type != arguments.type:
        raise ValueError(
            f"the pool {pool} is of type {present.type}, and a pool's type cannot be changed: give --type {present.type}, or "
            f"remove the pool with `prefect work-pool delete {pool}`"
        )
    template = rendered(arguments.type, pool, arguments, present.base_job_template if present else None)
    description = yaml.safe_load((POOLS / f"{arguments.type}.yaml").read_text())["description"]
    if present is None:
        client.create_work_pool(
            WorkPoolCreate(name=pool, type=arguments.type, base_job_template=template, description=description)
        )  # fmt: skip
    elif present.base_job_template != template:
        client.update_work_pool(pool, WorkPoolUpdate(base_job_template=template, description=description))
    done = "created" if present is None else "unchanged" if present.base_job_template == template else "updated"
    run_by = f", jobs run by {template['variables']['properties']['command']['default']}" if arguments.type == "process" else ""
    say(f"pool {pool}", f"{done} ({arguments.type}{run_by})")
    for queue, priority in QUEUES.get(pool, {}).items():
        there = {found.name: found for found in client.read_work_queues(work_pool_name=pool)}
        if queue not in there:
            client.create_work_queue(name=queue, work_pool_name=pool, priority=priority)


# ---- deployments


def install_deployments(client: SyncPrefectClient, source: str | None) -> None:
    before = {deployment.id: deployment for deployment in client.read_deployments()}
    weekly = next((found for found in before.values() if found.name == "weekly" and "retrain" in found.tags), None)
    earlier = next(iter((weekly.parameters.get("source") if weekly else None) or []), "")
    env = {**os.environ, "STACKRLHF_VERSION": our_version(), "STACKRLHF_DUMP_SOURCE": source or earlier}
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(HERE / "prefect.yaml"), "--all"]
    done = subprocess.run(command, cwd=HERE.parent, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`prefect deploy` ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    wanted = len(yaml.safe_load((HERE / "prefect.yaml").read_text())["deployments"])
    ours = [found for found in client.read_deployments(limit=200) if "stackrlhf" in found.tags]
    new = sum(found.id not in before for found in ours)
    say("deployments", f"{new} created, {wanted - new} updated")
    for found in ours:
        if found.name == "weekly" and "retrain" in found.tags:
            switch(client, found.id, found.schedules, weekly.schedules if weekly else [], source if source != earlier else None)


def switch(
    client: SyncPrefectClient, deployment: Any, now: list[DeploymentSchedule], before: list[DeploymentSchedule], source: str | None
) -> None:
    """A new source switches the weekly schedule on; else it stays as it was, for someone may have switched it by hand."""
    was_active = {schedule.slug: schedule.active for schedule in before}
    for schedule in now:
        active = True if source else was_active.get(schedule.slug, False)
        if schedule.active != active:
            client.update_deployment_schedule(deployment, schedule.id, active=active)
        when = getattr(schedule.schedule, "cron", schedule.schedule)
        said = "active" if active else "inactive: give --source, or set STACKRLHF_DUMP_SOURCE, to switch it on"
        say("schedule", f"retrain/weekly, cron {when}, {said}")


def our_version() -> str:
    """The package's, with the commit where this is a checkout."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    return f"{version('stackrlhf')}+{commit}" if commit else version("stackrlhf")


# ---- automations


def install_automations(client: SyncPrefectClient, notify: str | None) -> None:
    for entry in yaml.safe_load((HERE / "automations.yaml").read_text()):
        present = client.read_automations_by_name(entry["name"])
        calls = [action for action in entry["actions"] if action["type"] == "call-webhook"]
        if calls and not notify:
            say("automation", f"{entry['name']}: {'as it was' if present else 'left out, for no --notify URL is given'}")
            continue
        for action in calls:
            action["block_document_id"] = str(webhook(notify or ""))
        automation = AutomationCore.model_validate(entry)
        if not present:
            client.create_automation(automation)
        else:
            client.update_automation(present[0].id, automation)
        for extra in present[1:]:
            client.delete_automation(extra.id)
        say("automation", f"{entry['name']}: {'updated' if present else 'created'}")


def webhook(url: str) -> Any:
    """The block that keeps the address: it often carries a secret, and blocks are stored encrypted."""
    return Webhook(url=url).save(WEBHOOK, overwrite=True)


def say(what: str, done: str) -> None:
    print(f"{what:<12} {done}")


def end(code: int, why: object) -> int:
    print(f"install: {why}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
