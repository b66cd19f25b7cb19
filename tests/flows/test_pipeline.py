"""The whole pipeline, from the simulated site to the champion: once, once more, and with one setting changed."""

import json

import pytest

from flows.cli import main

pytestmark = pytest.mark.usefixtures("prefect_server")

STEPS = ["ingest", "base", "sft", "reward", "ppo", "evaluate", "promote"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("pipeline") / "store")


def run(store: str, capsys, *more: str) -> dict:
    assert main(["run", "--preset", "ci", "--threads", "1", "--store", store, "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def states(result: dict) -> dict[str, str]:
    return {step: result["steps"][step]["state"] for step in STEPS}


def test_from_dump_to_verdict_then_all_stored_then_only_what_depends_on_the_change(store, capsys, tmp_path):
    first = run(store, capsys)
    assert states(first) == dict.fromkeys(STEPS, "ran")
    assert first["verdict"]["word"] in {"better", "no-evidence", "worse"}
    assert first["verdict"]["by"] == "true"
    low, high = first["verdict"]["interval"]
    assert low <= first["verdict"]["gain"] <= high
    with open(first["report"], encoding="utf-8") as file:
        assert "<html" in file.read()

    second = run(store, capsys)
    assert states(second) == dict.fromkeys(STEPS, "stored")
    assert {step: second["steps"][step]["key"] for step in STEPS} == {step: first["steps"][step]["key"] for step in STEPS}
    assert second["verdict"] == first["verdict"]

    third = run(store, capsys, "--set", "ppo.kl_coef=0.1")
    ran = ("ppo", "evaluate", "promote")
    assert states(third) == {step: "ran" if step in ran else "stored" for step in STEPS}

    assert main(["store", "verify", "--store", store]) == 0


def test_a_preflight_of_the_run_holds_to_the_recipes_limits(store, capsys):
    ppo = run(store, capsys)["steps"]["ppo"]["uri"]
    with open(f"{ppo}/preflight.json", encoding="utf-8") as file:
        checks = {check["name"]: check for check in json.load(file)}
    assert all(check["ok"] for check in checks.values())
    assert checks["max |ratio - 1|"]["value"] < 1e-5
    assert checks["|KL| per token"]["value"] < 1e-6
    assert checks["max |reference - base|"]["value"] == 0
