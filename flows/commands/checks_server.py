"""Checks of the Prefect server that PREFECT_API_URL names: is it there, safe, and set up for runs on work pools?"""

import ipaddress
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from flows.commands.doctor import Check

INSTALL = "python deployments/install.py"
POOLS = {"cpu": "prefect worker start --pool cpu", "gpu": "prefect worker start --pool gpu --name $(hostname)-gpu0 --limit 1"}
STEPS = ("ingest/cpu", "base/cpu", "base/gpu", "sft/gpu", "reward/gpu", "ppo/gpu", "evaluate/gpu", "promote/cpu")
PIPELINES = ("rlhf/tiny", "rlhf/smollm2", "rlhf/stackllama-7b", "retrain/weekly")
ZOMBIES = "stackrlhf crashed when silent"
SECONDS = 10.0


def server() -> Iterator[Check]:
    import httpx
    from prefect import __version__ as mine
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        yield Check("prefect", "ok", f"{mine}, no PREFECT_API_URL: steps run in the command's own process (--executor inline)")
        return
    auth = PREFECT_API_AUTH_STRING.value()
    secret = auth.get_secret_value() if auth is not None and hasattr(auth, "get_secret_value") else auth
    parts = urlsplit(url)
    where = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"  # without what else an address may hold
    with SyncPrefectClient(url, auth_string=secret, httpx_settings={"timeout": SECONDS}) as client:
        try:
            theirs = client.request("GET", "/admin/version").json()
        except httpx.HTTPStatusError as error:
            code = error.response.status_code
            remedy = "set PREFECT_API_AUTH_STRING=user:password as the server has it" if code in {401, 403} else "look into its log"
            yield Check("prefect", "fail", f"the server at {where} answers {code}", remedy)
            return
        except (httpx.HTTPError, OSError, ValueError) as error:
            remedy = "prefect server start, or mend PREFECT_API_URL (without it runs are inline)"
            yield Check("prefect", "fail", f"no server answers at {where} ({type(error).__name__})", remedy)
            return
        alike = str(theirs).split(".")[:2] == mine.split(".")[:2]
        remedy = "" if alike else f"install prefect=={theirs} here, or {mine} there"
        yield Check("prefect", "ok" if alike else "warn", f"{where} is up with {theirs}, this is {mine}", remedy)
        yield _safety(where, parts.hostname or "", parts.scheme, bool(secret))
        yield from _pools(client)
        yield from _deployments(client)


def _safety(where: str, host: str, scheme: str, secret: bool) -> Check:
    if on_loopback(host):
        return Check("auth", "ok", "the server is on this machine only")
    if not secret:
        remedy = "set PREFECT_SERVER_API_AUTH_STRING at the server, and PREFECT_API_AUTH_STRING where it is used"
        return Check("auth", "fail", f"{where} has no password here: who reaches it can run code on every worker", remedy)
    if scheme == "http":
        return Check("auth", "warn", f"the password for {where} travels in clear", "put TLS before the server: https://")
    return Check("auth", "ok", "with a password, over TLS")


def on_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _pools(client: Any) -> Iterator[Check]:
    there = {pool.name: pool for pool in client.read_work_pools()}
    for name, start in POOLS.items():
        if name not in there:
            yield Check(f"pool {name}", "fail", "is not there", INSTALL)
            continue
        workers = client.request(
            "POST", "/work_pools/{name}/workers/filter", path_params={"name": name}, json={"limit": 200}
        ).json()  # fmt: skip
        online = [worker["name"] for worker in workers if worker.get("status") == "ONLINE"]
        paused = " (paused)" if there[name].is_paused else ""
        if there[name].is_paused:
            remedy = f"prefect work-pool resume {name}"
        else:
            remedy = "" if online else f"its runs wait until there is one: {start}"
        text = f"{there[name].type}{paused}, workers online: {', '.join(sorted(online)) or 'none'}"
        yield Check(f"pool {name}", "ok" if online and not paused else "warn", text, remedy)


def _deployments(client: Any) -> Iterator[Check]:
    from prefect.exceptions import ObjectNotFound

    lacking = []
    for name in (*STEPS, *PIPELINES):
        try:
            client.read_deployment_by_name(name)
        except ObjectNotFound:
            lacking.append(name)
    text = f"{len(STEPS) + len(PIPELINES) - len(lacking)} there" + (f", missing: {', '.join(lacking)}" if lacking else "")
    steps = any(name in STEPS for name in lacking)
    yield Check("deployments", "fail" if steps else "warn" if lacking else "ok", text, INSTALL if lacking else "")
    found = client.read_automations_by_name(ZOMBIES)
    text = "a run whose job vanished is found" if found else "a run whose job vanished would stay Running for ever"
    yield Check("automation", "ok" if found else "warn", text, "" if found else INSTALL)
