"""What is deployed, without a server: its parameters load into the flows, and every pool's template gives a valid job."""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

DEPLOYMENTS = Path(__file__).parents[1] / "deployments"
sys.path.insert(0, str(DEPLOYMENTS))  # install.py is run from there, so its second half is found there
from pool_templates import rendered  # noqa: E402

ALL = yaml.safe_load((DEPLOYMENTS / "prefect.yaml").read_text())["deployments"]
PIPELINES = [deployment for deployment in ALL if deployment["entrypoint"] == "flows.rlhf.rlhf"]
STEPS = [deployment for deployment in ALL if deployment["entrypoint"].startswith("flows.steps.")]
IMAGE = "registry.test/stackrlhf@sha256:" + 64 * "0"


def name_of(deployment: dict[str, Any]) -> str:
    return f"{deployment['entrypoint'].rpartition('.')[2]}/{deployment['name']}"


def flow_of(deployment: dict[str, Any]) -> Any:
    from prefect.flows import load_flow_from_entrypoint

    return load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)


# ---- prefect.yaml


@pytest.mark.parametrize("deployment", PIPELINES, ids=name_of)
def test_the_parameters_of_a_pipeline_load_into_its_flow(deployment):
    from flows.presets import resolve

    dump = {} if deployment["name"] in {"tiny", "ci"} else {"overrides": {"ingest.dump": ["/dumps/beer.stackexchange.com.7z"]}}
    loaded = flow_of(deployment).validate_parameters(deployment["parameters"] | dump)
    assert resolve(loaded["config"], loaded["overrides"]).name == deployment["name"]
    assert loaded["compute"].executor == "pool"


def test_the_parameters_of_the_weekly_retraining_load_into_its_flow():
    (deployment,) = (deployment for deployment in ALL if name_of(deployment) == "retrain/weekly")
    (schedule,) = deployment["schedules"]
    assert not schedule["active"], "nothing may run before a source is given"
    loaded = flow_of(deployment).validate_parameters(
        deployment["parameters"] | schedule["parameters"] | {"source": ["/dumps/*.7z"]}
    )
    assert loaded["source"] == ["/dumps/*.7z"]
    assert loaded["compute"].executor == "pool"


@pytest.mark.parametrize("deployment", STEPS, ids=name_of)
def test_a_step_is_deployed_under_its_name_on_the_pool_of_its_name(deployment):
    assert flow_of(deployment).name == deployment["entrypoint"].rpartition(".")[2]
    assert deployment["work_pool"]["name"] == deployment["name"]


def test_everything_that_a_pipeline_starts_is_deployed_and_nothing_twice():
    from flows.presets import STEPS as NAMES

    names = [name_of(deployment) for deployment in ALL]
    assert len(set(names)) == len(names)
    assert {name.partition("/")[0] for name in names} == {*NAMES, "rlhf", "retrain"}
    assert {"base/cpu", "base/gpu", "rlhf/tiny", "rlhf/smollm2", "rlhf/stackllama-7b", "retrain/weekly"} <= set(names)


@pytest.mark.parametrize("deployment", ALL, ids=name_of)
def test_no_deployment_takes_wrong_parameters_or_holds_leases_that_a_restarted_server_forgets(deployment):
    assert deployment["enforce_parameter_schema"]
    assert "concurrency_limit" not in deployment
    assert "stackrlhf" in deployment["tags"], "the automations look for this tag"


def test_a_pipeline_and_its_steps_stand_in_different_queues():
    queues = {
        kind: {d["work_pool"]["work_queue_name"] for d in ALL if kind in d["tags"] and d["name"] != "gpu"}
        for kind in ("pipeline", "step")
    }
    assert queues == {"pipeline": {"pipelines"}, "step": {"steps"}}


# ---- automations.yaml


def test_the_automations_are_what_prefect_takes_and_silence_is_not_taken_for_death_too_soon():
    from prefect.events.schemas.automations import AutomationCore

    silent, failed = yaml.safe_load((DEPLOYMENTS / "automations.yaml").read_text())
    silent = AutomationCore.model_validate(silent)
    assert silent.trigger.within.total_seconds() >= 600
    (action,) = failed["actions"]
    action["block_document_id"] = str(uuid4())
    failed = AutomationCore.model_validate(failed)
    assert failed.trigger.expect == {"prefect.flow-run.Failed", "prefect.flow-run.Crashed"}


# ---- the pools' templates, by the workers' own classes


def given(**options: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"image": None, "store": None, "volume": None, "env": [], "python": None} | options)


def job(configuration: Any, template: dict[str, Any], **variables: Any) -> Any:
    """The job that a worker would start for a flow run."""
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

    unused = PrefectClient("http://127.0.0.1:9/api")  # no template refers to a block; without a client Prefect starts a server
    made = asyncio.run(configuration.from_template_and_values(template, variables, client=unused))
    made.prepare_for_flow_run(FlowRun(id=uuid4(), name="sft", flow_id=uuid4()))
    return made


def kept(template: dict[str, Any], worker: Any, replaced: set[str]) -> None:
    """All that Prefect's own template sets is set here, and all its variables are there but those that ours replace."""
    own = worker.get_default_base_job_template()
    assert set(own["job_configuration"]) == set(template["job_configuration"])
    assert set(own["variables"]["properties"]) - set(template["variables"]["properties"]) == replaced


@pytest.mark.parametrize("pool", ["cpu", "gpu"])
def test_a_process_job_runs_in_its_workers_folder_and_environment(pool, monkeypatch):
    from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    template = rendered("process", pool, given(store="/srv/store"))
    kept(template, ProcessWorker, set())
    made = job(ProcessJobConfiguration, template)
    assert str(made.working_dir) == "."
    assert (made.env["CUDA_VISIBLE_DEVICES"], made.env["STACKRLHF_STORE"]) == ("3", "/srv/store")
    assert made.env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "60"
    assert int(made.env["PREFECT_CLIENT_MAX_RETRIES"]) >= 8, "a job that ends during an outage of minutes waits for the API"


def test_a_process_job_is_the_engine_itself_run_by_the_python_that_was_given():
    def command(template: dict[str, Any]) -> str:
        from prefect.workers.process import ProcessJobConfiguration

        return str(job(ProcessJobConfiguration, template).command)

    first = rendered("process", "gpu", given())
    assert command(first) == f"{sys.executable} -m prefect.engine"
    elsewhere = rendered("process", "gpu", given(python="python"), first)
    assert command(elsewhere) == "python -m prefect.engine"  # each worker looks for it on its own PATH
    assert command(rendered("process", "gpu", given(), elsewhere)) == "python -m prefect.engine"
    spaced = rendered("process", "gpu", given(python="/opt/of us/python"))
    assert command(spaced) == "'/opt/of us/python' -m prefect.engine"
    with pytest.raises(ValueError, match="a container has the Python of its image"):
        rendered("docker", "gpu", given(image=IMAGE, python="python"))


DOCKERS = {"container_create_kwargs", "mem_limit", "memswap_limit", "volumes", "privileged"}


def test_a_docker_job_has_gpus_shared_memory_and_its_volumes():
    docker = pytest.importorskip("prefect_docker.worker", reason="the extra `docker` is not installed")
    from docker.models.containers import _create_container_args

    template = rendered("docker", "gpu", given(image=IMAGE, volume="/srv/stackrlhf", env=["AWS_ENDPOINT_URL=http://s3:7070"]))
    kept(template, docker.DockerWorker, DOCKERS)
    credentials = "/etc/stackrlhf/aws:/home/stackrlhf/.aws/credentials:ro"
    made = job(docker.DockerWorkerJobConfiguration, template, shared_memory="8g", memory="64g", credentials_volume=credentials)
    # what docker-py sends to the engine
    sent = _create_container_args(
        {"image": made.image, "command": made.command, "environment": made.env, "volumes": made.volumes, "version": "1.45"}
        | {"mem_limit": made.mem_limit, "memswap_limit": made.memswap_limit, **made.container_create_kwargs}
    )
    host = sent["host_config"]
    (request,) = host["DeviceRequests"]
    assert (request["Driver"], request["Count"], request["Capabilities"]) == ("nvidia", -1, [["gpu"]])
    assert host["ShmSize"] == 8 * 2**30
    assert host["Memory"] == host["MemorySwap"] == 64 * 2**30
    assert host["Binds"] == ["/srv/stackrlhf:/data", credentials]
    assert host["CapDrop"] == ["ALL"]
    assert sent["image"] == IMAGE
    assert sent["environment"]["AWS_ENDPOINT_URL"] == "http://s3:7070"


def test_a_docker_job_of_the_cpu_pool_asks_for_no_gpu():
    docker = pytest.importorskip("prefect_docker.worker", reason="the extra `docker` is not installed")

    made = job(docker.DockerWorkerJobConfiguration, rendered("docker", "cpu", given(image=IMAGE)))
    assert "device_requests" not in made.container_create_kwargs
    assert made.volumes == ["stackrlhf-data:/data"]


def kubernetes_job(pool: str, options: dict[str, Any], **variables: Any) -> dict[str, Any]:
    worker = pytest.importorskip("prefect_kubernetes.worker", reason="the extra `kubernetes` is not installed")
    template = rendered("kubernetes", pool, given(image=IMAGE, **options))
    kept(template, worker.KubernetesWorker, {"backoff_limit"})
    return job(worker.KubernetesWorkerJobConfiguration, template, **variables).job_manifest


@pytest.mark.parametrize("pool", ["cpu", "gpu"])
def test_a_kubernetes_job_has_no_field_that_kubernetes_does_not_know(pool):
    manifest = kubernetes_job(pool, {"volume": "stackrlhf"}, runtime_class="nvidia", image_pull_secrets=[{"name": "registry"}])
    from kubernetes_asyncio.client import ApiClient, V1Job

    for quirk in ("parallelism", "completions"):  # Prefect wants these in the pod, where Kubernetes has no such fields
        manifest["spec"]["template"]["spec"].pop(quirk)

    async def there_and_back() -> dict[str, Any]:
        async with ApiClient() as client:
            return client.sanitize_for_serialization(client._ApiClient__deserialize(manifest, V1Job))

    understood = asyncio.run(there_and_back())
    assert without_empty(understood) == without_empty(manifest)


def without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_empty(inner) for name, inner in value.items() if inner not in ({}, [], None)}
    return [without_empty(inner) for inner in value] if isinstance(value, list) else str(value)


def test_a_kubernetes_gpu_job_asks_for_gpus_tolerates_their_taint_and_has_shared_memory():
    manifest = kubernetes_job(
        "gpu",
        {"store": "s3://bucket/store"},
        gpus=4,
        shared_memory="32Gi",
        memory_limit="200Gi",
        node_selector={"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
    )
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4, "memory": "200Gi"}
    assert container["resources"]["requests"]["nvidia.com/gpu"] == 4
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "32Gi"}} in pod["volumes"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert {"name": "STACKRLHF_STORE", "value": "s3://bucket/store"} in container["env"]
    assert container["envFrom"] == [{"secretRef": {"name": "stackrlhf-env", "optional": True}}]
    assert manifest["spec"]["backoffLimit"] == 0


def test_a_kubernetes_cpu_job_asks_for_no_gpu_and_mounts_the_claim_that_was_given():
    pod = kubernetes_job("cpu", {"volume": "artifacts"})["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert "nvidia.com/gpu" not in str(container["resources"])
    assert pod["tolerations"] == []
    assert {"name": "data", "persistentVolumeClaim": {"claimName": "artifacts"}} in pod["volumes"]
    assert {"name": "data", "mountPath": "/data"} in container["volumeMounts"]


# ---- what install.py was given


def test_what_was_given_earlier_stays_unless_it_is_given_anew():
    first = rendered("docker", "gpu", given(image=IMAGE, store="s3://bucket/store", volume="artifacts"))
    again = rendered("docker", "gpu", given(), first)
    assert again == first
    moved = rendered("docker", "gpu", given(store="s3://other/store"), again)["variables"]["properties"]
    assert moved["env"]["default"]["STACKRLHF_STORE"] == "s3://other/store"
    assert moved["image"]["default"] == IMAGE
    without = rendered("docker", "gpu", given(env=["STACKRLHF_STORE="]), again)["variables"]["properties"]
    assert "STACKRLHF_STORE" not in without["env"]["default"]


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "PREFECT_API_AUTH_STRING"])
def test_a_secret_is_not_put_where_everyone_reads_it(name):
    with pytest.raises(ValueError, match=f"--env {name}: whoever may look at the pool would read it"):
        rendered("process", "cpu", given(env=[f"{name}=canary"]))


def test_a_store_that_would_go_with_its_pod_is_refused():
    with pytest.raises(ValueError, match="a pod's folders go when it ends: give --store s3://"):
        rendered("kubernetes", "gpu", given(image=IMAGE))


def test_containers_need_an_image_and_processes_have_none():
    with pytest.raises(ValueError, match="needs --image"):
        rendered("docker", "cpu", given())
    with pytest.raises(ValueError, match="a process job has what its worker has"):
        rendered("process", "cpu", given(image=IMAGE))
