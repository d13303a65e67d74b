"""Templates for Kubeflow Trainer: runtime and TrainJob give multi-node's JobSet with the TrainJob's settings."""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from job.errors import exit_codes
from job.settings.load import load_settings
from tests.kubernetes.crds import CRDS
from tests.kubernetes.manifests import (
    ENDS,
    Document,
    build,
    check_restricted,
    container,
    environment,
    job_spec,
    labels,
    one,
    overlay,
)
from tests.kubernetes.policy import judge_set

RUNTIME, RUN = build("kubeflow/runtime"), build("kubeflow/trainjob")


def made_by_trainer(*, nodes: int | None = None, **settings: str) -> tuple[Document, ...]:
    """The JobSet that Trainer makes, by its source (2.3: pkg/runtime, plugins `plainml` and `jobset`).

    The TrainJob's number of nodes becomes completions and parallelism, its resources are merged into the container's,
    and its variables replace those of the same name or come behind them.
    """
    spec = copy.deepcopy(one(RUNTIME, "ClusterTrainingRuntime")["spec"])
    run = copy.deepcopy(one(RUN, "TrainJob"))
    asked = run["spec"]["trainer"]
    (replicated,) = spec["template"]["spec"]["replicatedJobs"]
    # Trainer's webhook looks for these; without the label it would not see the runtime's pods as the trainer's.
    assert replicated["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    assert (replicated["name"], replicated["replicas"]) == ("node", 1)
    job = replicated["template"]["spec"]
    job["completions"] = job["parallelism"] = nodes or asked["numNodes"]
    (pod,) = job["template"]["spec"]["containers"]
    assert pod["name"] == "node"
    for kind, amounts in asked["resourcesPerNode"].items():
        pod["resources"][kind] |= amounts
    given = {v["name"]: v for v in asked["env"]}
    given |= {name: {"name": name, "value": value} for name, value in settings.items()}
    kept = [variable for variable in pod["env"] if variable["name"] not in given]
    pod["env"] = [*kept, *given.values()]
    metadata = {"name": run["metadata"]["name"]}
    jobset = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata}
    return ({**jobset, "spec": spec["template"]["spec"]}, *(d for d in RUN if d["kind"] != "TrainJob"))


def test_trainer_s_api_takes_them() -> None:
    """Runtime and TrainJob fit the API's types, nothing else of the set is left, and each names the other's objects."""
    assert [document["kind"] for document in RUNTIME] == ["ClusterTrainingRuntime"]
    for document in (RUNTIME[0], one(RUN, "TrainJob")):
        jsonschema.validate(document, CRDS[document["apiVersion"], document["kind"]])
    for version in ENDS:
        kubernetes_validate.validate(one(RUN, "ServiceAccount"), version, strict=True)
    reference = one(RUN, "TrainJob")["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (RUNTIME[0]["kind"], RUNTIME[0]["metadata"]["name"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(
            {**RUNTIME[0], "spec": {"tempalte": {}}}, CRDS[RUNTIME[0]["apiVersion"], RUNTIME[0]["kind"]]
        )


def test_the_set_that_trainer_makes() -> None:
    """A valid Job of restricted pods; the runtime's ServiceAccount is made beside the TrainJob."""
    documents = made_by_trainer()
    jsonschema.validate(documents[0], CRDS["jobset.x-k8s.io/v1alpha2", "JobSet"])
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": job_spec(documents)}
    for version in ENDS:
        kubernetes_validate.validate(job, version, strict=True)
    check_restricted(documents)
    account = job_spec(documents)["template"]["spec"]["serviceAccountName"]
    assert one(documents, "ServiceAccount")["metadata"]["name"] == account
    assert container(documents)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "envFrom" not in container(documents)  # a ConfigMap would have to be in each namespace


@pytest.mark.parametrize("nodes", [1, 2])
def test_settings_of_a_trainjob(nodes: int) -> None:
    """The run is named after the TrainJob, its settings are the job's, and the pods of several nodes meet."""
    documents = made_by_trainer(nodes=nodes, JOB_RUN__NODES=str(nodes), JOB_STORAGE__CACHE="/tmp/cache")
    for index in range(nodes):
        found = environment(documents, labels(documents, "a-job", "my-run"), index)
        settings = load_settings([], {name: value for name, value in found.items() if "JOB_" in name or "KUBE" in name})
        assert (settings.run.id, settings.run.nodes, settings.run.node_rank) == ("my-run", nodes, index)
        assert settings.run.rendezvous == "my-run-node-0-0.my-run:29400"
        assert (settings.run.output, settings.storage.cache) == ("s3://my-bucket/runs", "/tmp/cache")
        assert settings.model.keep_quantized == "store"
    run = one(RUN, "TrainJob")["spec"]["trainer"]
    assert {"name": "JOB_RUN__NODES", "value": str(run["numNodes"])} in run["env"]


@pytest.mark.parametrize("code", [*exit_codes(), 137])
def test_exit_codes_mean_what_they_mean_to_multi_node(code: int) -> None:
    """The rules name Trainer's container, so that a preemption is free and a wrong setting final there, too."""
    spec = made_by_trainer()[0]["spec"]
    rules: list[Any] = job_spec(made_by_trainer())["podFailurePolicy"]["rules"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {"node"}
    assert judge_set(spec, code) == judge_set(one(overlay("multi-node"), "JobSet")["spec"], code)
