"""Every deployment: its entry point is a flow, and its parameters load into it."""

from pathlib import Path

import pytest
import yaml

FILE = Path(__file__).parents[1] / "deployments" / "prefect.yaml"
DEPLOYMENTS = yaml.safe_load(FILE.read_text())["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_the_parameters_of_a_deployment_load_into_its_flow(deployment):
    from prefect.flows import load_flow_from_entrypoint

    from flows.presets import resolve

    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    parameters = deployment["parameters"]
    assert set(parameters) <= set(flow.parameters.model_dump()["properties"])
    loaded = flow.validate_parameters(parameters)
    assert resolve(loaded["config"], loaded["overrides"]).name == deployment["name"]


def test_every_deployment_has_a_name_of_its_own_and_refuses_wrong_parameters():
    assert len({deployment["name"] for deployment in DEPLOYMENTS}) == len(DEPLOYMENTS)
    assert all(deployment["enforce_parameter_schema"] for deployment in DEPLOYMENTS)
