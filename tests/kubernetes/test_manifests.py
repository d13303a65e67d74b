"""The shipped templates build, are valid for every API server, and agree with the job itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import kubernetes_validate
import pytest

from job.errors import environment_name, exit_codes
from job.settings.load import exporters, load_settings, trackers
from job.settings.schema import NAMES
from job.storage.open import Location
from tests.kubernetes.crds import CRDS
from tests.kubernetes.manifests import (
    ENDS,
    JOBS,
    KUBERNETES,
    OVERLAYS,
    SERVICE,
    VERSIONS,
    build,
    check_restricted,
    container,
    environment,
    job_spec,
    labels,
    one,
    overlay,
    pod_spec,
    relocate,
    with_component,
)
from tests.kubernetes.policy import judge, judge_set

FOLDERS = ["base", *(f"overlays/{name}" for name in OVERLAYS), "overlays/kueue/queue", "overlays/kueue/topology"]

ACTIONS = {"no": "FailJob", "yes": "Count", "counts against the limit": "Count", "yes, free": "Ignore"}
SET_ACTIONS = {"FailJob": "FailJobSet", "Count": "RestartJobSet", "Ignore": "RestartJobSetAndIgnoreMaxRestarts"}


UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(text: str) -> int:
    """Kubernetes' notation of whole amounts, in units or bytes."""
    number, unit = re.fullmatch(r"(\d+)(\w*)", text).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit]


@pytest.mark.parametrize("versions", [ENDS, pytest.param(VERSIONS[1:-1], marks=pytest.mark.long)], ids=" ".join)
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_api_server_takes_it(folder: str, versions: list[str]) -> None:
    """Every document fits the strict schema of its kind, in each version of Kubernetes that is supported."""
    for document in build(folder):
        if schema := CRDS.get((document["apiVersion"], document["kind"])):
            jsonschema.validate(document, schema)
            continue
        for version in versions:
            assert kubernetes_validate.validate(document, version, strict=True) == version


def test_a_jobset_holds_a_valid_job() -> None:
    """Nobody but the API server looks into a JobSet's Job, and that only when the set is there already."""
    spec = job_spec(overlay("multi-node"))
    for version in ENDS:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": spec}
        kubernetes_validate.validate(job, version, strict=True)


def test_a_wrong_field_is_found() -> None:
    """The checks above can fail: a misspelt field deep inside, in a Job and in a JobSet."""
    job = {**one(overlay("demo"), "Job")}
    job["spec"] = {**job["spec"], "backofLimit": 1}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)
    jobset = {**one(overlay("multi-node"), "JobSet")}
    jobset["spec"] = {**jobset["spec"], "failurePolicy": {"maxRestart": 1}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobset, CRDS[jobset["apiVersion"], jobset["kind"]])


def settings_of(name: str, index: int = 0) -> dict[str, str]:
    """The `JOB_` variables of an overlay's pod, the first one's unless another is asked for."""
    documents = overlay(name)
    found = environment(documents, labels(documents, "a-job", "a-set"), index)
    return {key: value for key, value in found.items() if key.startswith(("JOB_", "KUBERNETES_"))}


@pytest.mark.parametrize("name", OVERLAYS)
def test_settings_are_settings(name: str, tmp_path: Path) -> None:
    """Every `JOB_` name is one that the job knows, and every value is one that it takes."""
    places = {mount["mountPath"]: tmp_path for mount in container(overlay(name))["volumeMounts"]}
    environ = {key: relocate(value, places) for key, value in settings_of(name).items()}
    settings = load_settings([], environ)
    given = {setting for setting, source in settings.sources.items() if source.startswith("environment ")}
    assert given == {setting for setting in NAMES if environment_name(setting) in environ}
    assert settings.run.id == ("a-set" if name == "multi-node" else "a-job")
    assert settings.sources["run.id"] == "platform"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_user_s_run_id_wins(name: str) -> None:
    """Nothing in the template overrides a JOB_RUN__ID among the settings."""
    assert "JOB_RUN__ID" not in {variable["name"] for variable in container(overlay(name))["env"]}


def test_pods_of_a_set_meet_at_its_first_pod() -> None:
    """The rendezvous is the name that JobSet gives to the pod with index 0: set, replicated job, index, index."""
    documents = overlay("multi-node")
    (replicated,) = one(documents, "JobSet")["spec"]["replicatedJobs"]
    host, _, port = settings_of("multi-node")["JOB_RUN__RENDEZVOUS"].partition(":")
    assert host == f"a-set-{replicated['name']}-0-0.a-set"
    assert port.isdecimal()
    spec = replicated["template"]["spec"]
    for index in range(spec["completions"]):
        run = load_settings([], settings_of("multi-node", index)).run
        assert (run.nodes, run.node_rank) == (spec["completions"], index)
    assert spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"
    assert one(documents, "JobSet")["spec"]["network"]["enableDNSHostnames"] is True


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("code", exit_codes())
def test_exit_codes_mean_to_the_job_what_they_mean(name: str, code: int) -> None:
    """The podFailurePolicy does what the table of exit codes says; no code is left to the default."""
    meaning, retry = exit_codes()[code]
    verdict = judge(job_spec(overlay(name))["podFailurePolicy"]["rules"], code)
    assert (verdict.action, verdict.rule is not None) == (ACTIONS[retry], True), meaning


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("code", [None, 1, 69, 75, 76, 137, 143])
def test_a_disruption_is_free(name: str, code: int | None) -> None:
    """Whatever the process of an evicted pod still managed to say, its replacement costs nothing."""
    rules = job_spec(overlay(name))["podFailurePolicy"]["rules"]
    assert judge(rules, code, {"DisruptionTarget"}).action == "Ignore"


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("code", [137, 143, 255])
def test_other_deaths_count(name: str, code: int) -> None:
    """Out of memory would be out of memory for ever: what is not the cluster's doing counts."""
    assert judge(job_spec(overlay(name))["podFailurePolicy"]["rules"], code).action == "Count"


@pytest.mark.parametrize("code", [*exit_codes(), 137, 255])
def test_exit_codes_mean_the_same_to_a_set(code: int) -> None:
    """One pod's end decides for all pods: fail, start again, or start again for free."""
    spec = one(overlay("multi-node"), "JobSet")["spec"]
    single = judge(job_spec(overlay("demo"))["podFailurePolicy"]["rules"], code).action
    assert judge_set(spec, code) == SET_ACTIONS[single]


@pytest.mark.parametrize("code", [None, 1, 75, 137])
def test_a_disruption_restarts_a_whole_set_for_free(code: int | None) -> None:
    """A pod that is evicted takes the others with it, and none of it counts."""
    spec = one(overlay("multi-node"), "JobSet")["spec"]
    assert judge_set(spec, code, {"DisruptionTarget"}) == "RestartJobSetAndIgnoreMaxRestarts"
    assert spec["failurePolicy"]["restartStrategy"] == "BlockingRecreate"


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_job_ends(name: str) -> None:
    """Retries are bounded in number and in time, pods are not restarted in place, and what is done is cleaned up."""
    documents, spec = overlay(name), job_spec(overlay(name))
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["podReplacementPolicy"] == "Failed"
    assert len(spec["podFailurePolicy"]["rules"]) <= 20
    assert pod_spec(documents)["restartPolicy"] == "Never"
    if name == "multi-node":
        jobset = one(documents, "JobSet")["spec"]
        assert spec["backoffLimit"] == 0
        assert jobset["failurePolicy"]["maxRestarts"] > 0
        assert jobset["ttlSecondsAfterFinished"] > 0
    else:
        assert spec["backoffLimit"] > 0
        assert spec["ttlSecondsAfterFinished"] > 0


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_job_knows_less_time_than_it_has(name: str) -> None:
    """After SIGTERM the kubelet waits longer than the job plans with, so that its termination message is read."""
    grace = float(settings_of(name)["JOB_RUN__GRACE_SECONDS"])
    assert 0 < grace < pod_spec(overlay(name))["terminationGracePeriodSeconds"]
    assert grace <= 15 or name != "gke-spot"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_template_names_what_is_there(name: str) -> None:
    """ConfigMaps, claims, the ServiceAccount, volumes and the policy's container: all are built beside the Job."""
    documents, pod, job = overlay(name), pod_spec(overlay(name)), container(overlay(name))
    for source in job["envFrom"]:
        assert one(documents, "ConfigMap", source["configMapRef"]["name"])["data"]
    assert one(documents, "ServiceAccount", pod["serviceAccountName"])
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in job["volumeMounts"]} == volumes.keys()
    for volume in volumes.values():
        if claim := volume.get("persistentVolumeClaim"):
            assert one(documents, "PersistentVolumeClaim", claim["claimName"])
    for rule in job_spec(documents)["podFailurePolicy"]["rules"]:
        assert rule.get("onExitCodes", {}).get("containerName", job["name"]) == job["name"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_pod_is_restricted(name: str) -> None:
    """A namespace that enforces the Pod Security Standard "restricted" takes the pods."""
    check_restricted(overlay(name))


def test_the_pod_fits_a_machine_with_gke_s_default_disk() -> None:
    """Of 100 GB GKE leaves 47,093,746,742 bytes to pods; volumes on the disk may hold no more than the limit."""
    gib = {"Gi": 1 << 30}
    pod, resources = pod_spec(build("base")), container(build("base"))["resources"]
    disk = {name: resources[name]["ephemeral-storage"] for name in ("requests", "limits")}
    asked, limit = (int(size[:-2]) * gib[size[-2:]] for size in disk.values())
    volumes = [volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume]
    on_disk = [volume["sizeLimit"] for volume in volumes if volume.get("medium") != "Memory"]
    assert asked <= 47_093_746_742
    assert sum(int(size[:-2]) * gib[size[-2:]] for size in on_disk) <= limit


def test_the_user_is_the_image_s() -> None:
    """The pods run as the user that the image was made and tested for."""
    dockerfile = (KUBERNETES.parents[1] / "Dockerfile").read_text(encoding="utf-8")
    security = pod_spec(build("base"))["securityContext"]
    *_, last = re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE)
    assert last == f"{security['runAsUser']}:{security['runAsGroup']}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_nothing_is_written_to_the_root(name: str) -> None:
    """Every path that the environment names lies on a volume; what is written there has a limit or a claim."""
    documents, job = overlay(name), container(overlay(name))
    mounts = {mount["mountPath"]: mount for mount in job["volumeMounts"]}
    assert {"/tmp", "/dev/shm", "/cache"} <= mounts.keys()
    found = environment(documents, labels(documents, "a", "b"))
    for variable, value in found.items():
        path = value.rpartition("=")[2]
        if path.startswith("/"):
            (mount,) = [mounts[at] for at in mounts if f"{path}/".startswith(f"{at}/")]
            assert not mount.get("readOnly") or variable not in {"HOME", "HF_HOME", "JOB_RUN__OUTPUT"}
    for volume in pod_spec(documents)["volumes"]:
        if "emptyDir" in volume:
            assert volume["emptyDir"]["sizeLimit"]
    shm = next(v for v in pod_spec(documents)["volumes"] if v["name"] == mounts["/dev/shm"]["name"])
    assert shm["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("name", OVERLAYS)
def test_resources(name: str) -> None:
    """Requested and limited; a GPU is in the limits, as Kubernetes wants it, and its nodes' taint is tolerated."""
    resources = container(overlay(name))["resources"]
    assert {"cpu", "memory"} <= resources["requests"].keys()
    assert resources["limits"]["memory"] == resources["requests"]["memory"]
    assert ("nvidia.com/gpu" in resources["limits"]) == (name != "demo")
    assert "nvidia.com/gpu" in {toleration["key"] for toleration in pod_spec(overlay(name))["tolerations"]}


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name != "demo"])
def test_the_image_is_named_by_its_digest(name: str) -> None:
    """And the job is told which: the results name what they were made with."""
    _, _, digest = container(overlay(name))["image"].partition("@")
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
    assert settings_of(name)["JOB_RUN__IMAGE_DIGEST"] == digest


def test_no_secret_is_shipped() -> None:
    """Credentials are the user's; no template has one, and none goes by the environment."""
    for name in OVERLAYS:
        assert "Secret" not in {document["kind"] for document in overlay(name)}
        found = environment(overlay(name), labels(overlay(name), "a", "b"))
        assert not [key for key in found if re.search(r"TOKEN$|SECRET|ACCESS_KEY|PASSWORD", key)]


@pytest.mark.parametrize(
    ("name", "selector", "taint"),
    [
        ("eks-spot", {"karpenter.sh/capacity-type": "spot"}, None),
        ("gke-spot", {"cloud.google.com/gke-spot": "true"}, "cloud.google.com/gke-spot"),
        ("aks-spot", {"kubernetes.azure.com/scalesetpriority": "spot"}, "kubernetes.azure.com/scalesetpriority"),
    ],
)
def test_spot_pods_go_to_spot_machines(name: str, selector: dict[str, str], taint: str | None) -> None:
    """They ask for them by the cloud's label, tolerate its taint, and are not moved about to save a machine."""
    pod = pod_spec(overlay(name))
    assert pod["nodeSelector"] == selector
    assert taint is None or taint in {toleration["key"] for toleration in pod["tolerations"]}
    annotations = job_spec(overlay(name))["template"]["metadata"]["annotations"]
    assert (annotations.get("cluster-autoscaler.kubernetes.io/safe-to-evict") == "false") == (name != "eks-spot")
    # With it, Karpenter skips the pod when it drains a machine before a spot interruption.
    assert "karpenter.sh/do-not-disrupt" not in annotations


@pytest.mark.parametrize(
    ("name", "annotation", "scheme"),
    [
        ("eks-spot", "eks.amazonaws.com/role-arn", "s3"),
        ("gke-spot", "iam.gke.io/gcp-service-account", "gs"),
        ("aks-spot", "azure.workload.identity/client-id", "az"),
    ],
)
def test_each_cloud_s_own_store(name: str, annotation: str, scheme: str) -> None:
    """Results go to the store of the same cloud, and the ServiceAccount names who the pod is there."""
    assert one(overlay(name), "ServiceAccount")["metadata"]["annotations"].keys() == {annotation}
    found = environment(overlay(name), labels(overlay(name), "a", "b"))
    assert Location.parse(found["JOB_RUN__OUTPUT"]).scheme == scheme
    if scheme == "az":
        assert found["AZURE_STORAGE_ACCOUNT_NAME"]
        assert job_spec(overlay(name))["template"]["metadata"]["labels"]["azure.workload.identity/use"] == "true"


def test_a_role_of_aws_elsewhere() -> None:
    """Outside EKS the component mounts a token for AWS alone, which the kubelet renews."""
    on_s3 = with_component("s3-web-identity", "gke-spot")
    (volume,) = [v for v in pod_spec(on_s3)["volumes"] if "projected" in v]
    (source,) = volume["projected"]["sources"]
    token = source["serviceAccountToken"]
    assert (token["audience"], token["expirationSeconds"] >= 600) == ("sts.amazonaws.com", True)
    found = environment(on_s3, labels(on_s3, "a", "b"))
    assert found["AWS_WEB_IDENTITY_TOKEN_FILE"] == f"/run/secrets/aws/{token['path']}"
    assert found["AWS_ROLE_ARN"].startswith("arn:aws:iam::")


def test_boto3_takes_the_role(tmp_path: Path) -> None:
    """By the token, although the template names a file of keys as well, which is not there."""
    on_s3 = with_component("s3-web-identity", "gke-spot")
    places = {mount["mountPath"]: tmp_path for mount in container(on_s3)["volumeMounts"]}
    found = environment(on_s3, labels(on_s3, "a", "b"))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in found.items():
            if name.startswith("AWS_"):
                patch.setenv(name, relocate(value, places))
        credentials = botocore.session.Session().get_credentials()
    assert credentials.method == "assume-role-with-web-identity"


@pytest.mark.parametrize("token", ["hf_of_the_secret", None])
def test_the_hub_s_client_takes_the_token(token: str | None, tmp_path: Path) -> None:
    """From the Secret's file, if there is one."""
    if token:
        (tmp_path / "HF_TOKEN").write_text(f"{token}\n", encoding="utf-8")
    path = environment(overlay("demo"), labels(overlay("demo"), "a", "b"))["HF_TOKEN_PATH"]
    environ = {"HF_TOKEN_PATH": relocate(path, {"/run/secrets/qlora-job": tmp_path}), "HF_HOME": str(tmp_path)}
    code = "from huggingface_hub import get_token; print(get_token())"
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(token)


def test_kueue_lets_the_job_go() -> None:
    """In a queue that covers all that it requests; applied again, it does not suspend a Job that runs."""
    job = one(overlay("kueue"), "Job")
    assert "suspend" not in job["spec"]
    limit = job["metadata"]["labels"]["kueue.x-k8s.io/max-exec-time-seconds"]
    assert int(limit) == job["spec"]["activeDeadlineSeconds"]
    queues = build("overlays/kueue/queue")
    local = one(queues, "LocalQueue", job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"])
    (group,) = one(queues, "ClusterQueue", local["spec"]["clusterQueue"])["spec"]["resourceGroups"]
    resources = container(overlay("kueue"))["resources"]
    assert set(group["coveredResources"]) >= resources["requests"].keys() | resources["limits"].keys()
    for flavor in group["flavors"]:
        assert one(queues, "ResourceFlavor", flavor["name"])
        assert [resource["name"] for resource in flavor["resources"]] == group["coveredResources"]
        quota = {resource["name"]: quantity(resource["nominalQuota"]) for resource in flavor["resources"]}
        for name in ("kueue", "multi-node"):
            wanted = container(overlay(name))["resources"]
            pods = job_spec(overlay(name))["completions"]
            for resource, amount in {**wanted["limits"], **wanted["requests"]}.items():
                assert pods * quantity(amount) <= quota[resource], (name, resource)


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_lost_machine_does_not_hold_kueue_up(name: str) -> None:
    """Kueue may delete a pod of a lost machine by force; the lease keeps what still runs there from writing."""
    annotations = job_spec(overlay(name))["template"]["metadata"]["annotations"]
    assert annotations["kueue.x-k8s.io/safe-to-forcefully-delete"] == "true"


COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
ONLY = {
    "cache-claim": ["eks-spot"],  # one disk, for one pod
    "image": ["eks-spot"],
    "exclusive-topology": ["multi-node"],
    "kueue-topology": ["multi-node"],
}
"""Components that are not for every overlay -> those that they are tried on."""
DRA_SINCE = "1.34"


def tried() -> Iterator[Any]:
    """Each component with the overlays that it is tried on; all but one of them in the long tests."""
    for name in COMPONENTS:
        first, *others = ONLY.get(name, ["eks-spot", "multi-node"])
        yield pytest.param(name, first)
        yield from (pytest.param(name, other, marks=pytest.mark.long) for other in others)


@pytest.mark.parametrize(("name", "base"), list(tried()))
def test_components_build(name: str, base: str) -> None:
    """Each component builds on an overlay that can take it, and changes something; the API server takes the result."""
    documents = with_component(name, base)
    shipped = {"image": {"eks-spot"}, "eight-gpus": {"multi-node"}}
    assert (documents == overlay(base)) == (base in shipped.get(name, ()))
    for document in documents:
        if schema := CRDS.get((document["apiVersion"], document["kind"])):
            jsonschema.validate(document, schema)
            continue
        for version in ENDS:
            since = DRA_SINCE if document["kind"] == "ResourceClaimTemplate" else version
            kubernetes_validate.validate(document, max(version, since), strict=True)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": job_spec(documents)}
    kubernetes_validate.validate(job, VERSIONS[-1], strict=True)  # a JobSet's is not in its own schema
    check_restricted(documents)
    assert {mount["name"] for mount in container(documents)["volumeMounts"]} == {
        volume["name"] for volume in pod_spec(documents)["volumes"]
    }
    assert all(len(volume) == 2 for volume in pod_spec(documents)["volumes"])  # its name and one kind of volume


@pytest.mark.parametrize("base", ["eks-spot", "multi-node"])
def test_gpus_by_dra(base: str) -> None:
    """Each pod has a claim of its own instead of the device plugin's GPUs, also under another name of the run."""
    documents = with_component("dra", base, "nameSuffix: -second\n")
    template = one(documents, "ResourceClaimTemplate")
    assert template["metadata"]["name"] == "qlora-job-gpu-second"
    (claim,) = pod_spec(documents)["resourceClaims"]
    assert claim["resourceClaimTemplateName"] == template["metadata"]["name"]
    resources = container(documents)["resources"]
    assert resources["claims"] == [{"name": claim["name"]}]
    assert "nvidia.com/gpu" not in resources["limits"]
    (request,) = template["spec"]["spec"]["devices"]["requests"]
    assert (request["exactly"]["allocationMode"], request["exactly"]["count"]) == ("ExactCount", 1)


@pytest.mark.parametrize("base", ["eks-spot", "multi-node"])
def test_a_priority_under_another_name(base: str) -> None:
    """Under another name of the run the pods name the PriorityClass that is built beside them: no other need exist."""
    documents = with_component("priority", base, "nameSuffix: -second\n")
    assert pod_spec(documents)["priorityClassName"] == one(documents, "PriorityClass")["metadata"]["name"]


def test_eight_gpus() -> None:
    """A Job on one machine of eight GPUs has what each pod of multi-node has: GPUs, CPUs, memory and /dev/shm."""
    documents = with_component("eight-gpus", "eks-spot")
    assert container(documents)["resources"] == container(overlay("multi-node"))["resources"]
    assert container(documents)["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert pod_spec(documents)["volumes"] == pod_spec(overlay("multi-node"))["volumes"]


@pytest.mark.parametrize(
    ("name", "resource"), [("efa", "vpc.amazonaws.com/efa"), ("infiniband", "rdma/rdma_shared_device_a")]
)
def test_fast_networks(name: str, resource: str) -> None:
    """The pods ask for the adapters beside their GPUs, and the log says which network NCCL took."""
    documents = with_component(name, "multi-node")
    resources = container(documents)["resources"]
    assert resources["limits"][resource] == resources["requests"][resource]
    assert resources["limits"]["nvidia.com/gpu"] == "8"
    found = environment(documents, labels(documents, "a", "b"))
    assert (found["NCCL_DEBUG"], found["NCCL_DEBUG_SUBSYS"]) == ("INFO", "INIT,NET")


@pytest.mark.parametrize(("name", "key"), [("wandb", "WANDB_API_KEY"), ("mlflow", "MLFLOW_TRACKING_TOKEN")])
def test_keys_of_trackers(name: str, key: str) -> None:
    """A tracker is on, and the entrypoint reads its key from a file of a Secret that only the job's user can read."""
    documents = with_component(name, "eks-spot")
    found = environment(documents, labels(documents, "a", "b"))
    assert key not in found
    assert trackers(load_settings([], {}), found) == {name: None}  # with the project that the component names
    mount = next(mount for mount in container(documents)["volumeMounts"] if mount["name"] == name)
    assert found[f"{key}_FILE"] == f"{mount['mountPath']}/{key}"
    volume = next(volume for volume in pod_spec(documents)["volumes"] if volume["name"] == name)
    assert volume["secret"]["defaultMode"] == 0o440
    entrypoint = (KUBERNETES.parents[1] / "entrypoint.sh").read_text(encoding="utf-8")
    assert key in re.findall(r"^secrets=\(([^)]*)\)", entrypoint, re.MULTILINE)[0].split()


@pytest.mark.parametrize("base", ["eks-spot", pytest.param("multi-node", marks=pytest.mark.long)])
def test_progress_of_a_pod(base: str) -> None:
    """The job knows its pod, finds token and certificate, and may change pods and nothing else."""
    documents = with_component("progress", base, "nameSuffix: -second\n")
    found = environment(documents, labels(documents, "a", "b"))
    settings = load_settings([], {"JOB_METRICS__POD_ANNOTATION": found["JOB_METRICS__POD_ANNOTATION"]})
    asked = exporters(settings, found)["pod-annotation"]
    assert asked["url"] == "https://10.96.0.1:443/api/v1/namespaces/qlora/pods/a-pod"
    mount = next(mount for mount in container(documents)["volumeMounts"] if mount["name"] == "api-server")
    volume = next(volume for volume in pod_spec(documents)["volumes"] if volume["name"] == "api-server")
    token, trust = (source for source in volume["projected"]["sources"])
    assert asked["token"] == f"{mount['mountPath']}/{token['serviceAccountToken']['path']}"
    assert asked["authority"] == f"{mount['mountPath']}/{trust['configMap']['items'][0]['path']}"
    binding, role = one(documents, "RoleBinding"), one(documents, "Role")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == [pod_spec(documents)["serviceAccountName"]]
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["patch"]}]


@pytest.mark.parametrize("base", ["eks-spot", "multi-node"])
def test_labels_for_who_pays(base: str) -> None:
    """Owner, team and cost centre stand on the Job and on its pods, where costs are allocated."""
    documents = with_component("owner", base)
    (job,) = (document for document in documents if document["kind"] in {"Job", "JobSet"})
    wanted = {"owner": "jane.doe", "team": "language", "cost-center": "4711"}
    for metadata in (job["metadata"], job_spec(documents)["template"]["metadata"]):
        assert wanted.items() <= metadata["labels"].items()
    assert "selector" not in job_spec(documents)


@pytest.mark.parametrize("base", ["eks-spot", "multi-node"])
def test_gitops(base: str) -> None:
    """Argo CD and Flux may make the Job anew when its settings change, and no Job deletes itself, to be made again."""
    documents = with_component("gitops", base)
    (job,) = (document for document in documents if document["kind"] in {"Job", "JobSet"})
    assert job["metadata"]["annotations"] == {
        "argocd.argoproj.io/sync-options": "Force=true" if base == "eks-spot" else "Force=true,Replace=true",
        "kustomize.toolkit.fluxcd.io/force": "enabled",
    }
    assert "ttlSecondsAfterFinished" not in job["spec"]


def test_kueue_places_a_set_by_topology() -> None:
    """The level that the pods name is one of the queue's, the queue is the set's, and its flavor has the Topology."""
    documents, queues = with_component("kueue-topology", "multi-node"), build("overlays/kueue/topology")
    found = one(documents, "JobSet")["metadata"]["labels"]
    queue, day = found["kueue.x-k8s.io/queue-name"], found["kueue.x-k8s.io/max-exec-time-seconds"]
    assert int(day) == job_spec(documents)["activeDeadlineSeconds"]
    (group,) = one(queues, "ClusterQueue", one(queues, "LocalQueue", queue)["spec"]["clusterQueue"])["spec"][
        "resourceGroups"
    ]
    for flavor in group["flavors"]:
        spec = one(queues, "ResourceFlavor", flavor["name"])["spec"]
        levels = [level["nodeLabel"] for level in one(queues, "Topology", spec["topologyName"])["spec"]["levels"]]
        annotations = job_spec(documents)["template"]["metadata"]["annotations"]
        assert annotations["kueue.x-k8s.io/podset-preferred-topology"] in levels
        assert levels[-1] == "kubernetes.io/hostname"


def test_a_second_multi_node_run_stands_beside_the_first(tmp_path: Path) -> None:
    """With a suffix, set, ConfigMap and ServiceAccount get names of their own, and the pods refer to those."""
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    own = tmp_path / "own"
    own.mkdir()
    text = "resources: [../kubernetes/overlays/multi-node]\nnameSuffix: -second\n"
    (own / "kustomization.yaml").write_text(text, encoding="utf-8")
    documents = build(str(own))
    assert one(documents, "JobSet")["metadata"]["name"] == "qlora-job-second"
    assert one(documents, "ServiceAccount")["metadata"]["name"] == pod_spec(documents)["serviceAccountName"]
    (source,) = container(documents)["envFrom"]
    assert one(documents, "ConfigMap")["metadata"]["name"] == source["configMapRef"]["name"]


def test_air_gapped_needs_nothing_from_outside() -> None:
    """Model, data, questions and results lie on claims, and the hub's client knows that there is no hub."""
    found = settings_of("air-gapped") | environment(overlay("air-gapped"), labels(overlay("air-gapped"), "a", "b"))
    assert found["HF_HUB_OFFLINE"] == "1"
    for setting in ("JOB_MODEL__ID", "JOB_DATA__SOURCE", "JOB_EVAL__DATA", "JOB_RUN__OUTPUT"):
        assert re.search(r"(^|=)/(input|output)(/|$)", found[setting])
    assert found["JOB_RUN__SPOT_NOTICES"] == "off"


def test_a_folder_of_the_user_s_own(tmp_path: Path) -> None:
    """What the page says about settings of one's own: built on an overlay, under another name, which names the run."""
    page = (KUBERNETES / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(# my-run/kustomization.yaml.*?)```", page, re.DOTALL)
    own = tmp_path / "my-run"
    own.mkdir()
    (tmp_path / "infra").symlink_to(KUBERNETES.parent)
    (own / "kustomization.yaml").write_text(example)
    documents = build(str(own))
    job = one(documents, "Job")
    assert job["metadata"]["name"] == "qlora-job-second"
    assert one(documents, "ServiceAccount")["metadata"]["name"] == "qlora-job-second"
    assert pod_spec(documents)["serviceAccountName"] == "qlora-job-second"
    found = environment(documents, labels(documents, job["metadata"]["name"], "none"))
    settings = load_settings([], {key: value for key, value in found.items() if "JOB_" in key} | SERVICE)
    assert (settings.run.id, settings.train.epochs) == ("qlora-job-second", 3)
    assert settings.run.output == "s3://my-bucket/runs"


def test_the_page_s_table_of_ends() -> None:
    """What the page says about each exit code is what the Job does."""
    page = (KUBERNETES / "README.md").read_text(encoding="utf-8")
    actions = {"next pod, not counted": "Ignore", "next pod, counted": "Count", "fails at once": "FailJob"}
    rows = re.findall(rf"^\| ([^|]*\d+[^|]*) \| ({'|'.join(actions)})", page, re.MULTILINE)
    said = {int(code): actions[what] for codes, what in rows for code in re.findall(r"\d+", codes)}
    assert said.keys() >= exit_codes().keys()
    rules = job_spec(overlay("demo"))["podFailurePolicy"]["rules"]
    assert said == {code: judge(rules, code).action for code in said}


def test_a_set_on_spot_machines_of_eks(tmp_path: Path) -> None:
    """The page's overlay gives a JobSet what eks-spot gives a Job: the role and the machines."""
    page = (KUBERNETES / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"  ```yaml\n(  # my-set/kustomization.yaml.*?)  ```", page, re.DOTALL)
    (tmp_path / "infra").symlink_to(KUBERNETES.parent)
    own = tmp_path / "my-set"
    own.mkdir()
    (own / "kustomization.yaml").write_text(textwrap.dedent(example), encoding="utf-8")
    documents, theirs = build(str(own)), overlay("eks-spot")
    assert (
        one(documents, "ServiceAccount")["metadata"]["annotations"]
        == (one(theirs, "ServiceAccount")["metadata"]["annotations"])
    )
    assert pod_spec(documents)["nodeSelector"] == pod_spec(theirs)["nodeSelector"]


def test_a_second_air_gapped_run_reads_the_first_one_s_claims(tmp_path: Path) -> None:
    """With the page's patch a suffix renames the Job but not the claims, which the first run's overlay made."""
    page = (KUBERNETES / "README.md").read_text(encoding="utf-8")
    (patch,) = re.findall(r"### air-gapped\n.*?```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "infra").symlink_to(KUBERNETES.parent)
    own = tmp_path / "my-run"
    own.mkdir()
    text = f"resources: [../infra/kubernetes/overlays/air-gapped]\nnameSuffix: -second\n{patch}"
    (own / "kustomization.yaml").write_text(text, encoding="utf-8")
    documents = build(str(own))
    assert {document["kind"] for document in documents} == {"ServiceAccount", "ConfigMap", "Job"}
    assert one(documents, "Job")["metadata"]["name"] == "qlora-job-second"
    claims = {volume["name"]: volume.get("persistentVolumeClaim") for volume in pod_spec(documents)["volumes"]}
    assert claims["input"] == {"claimName": "qlora-job-input", "readOnly": True}
    assert claims["output"] == {"claimName": "qlora-job-output"}


def names_in(path: Path) -> Iterator[str]:
    """The `JOB_` names in a file's text."""
    yield from re.findall(r"\bJOB_[A-Z_]+[A-Z]", path.read_text(encoding="utf-8"))


def test_the_page_names_settings() -> None:
    """Every `JOB_` name in a comment or in the page beside the templates is a setting."""
    known = {environment_name(name) for name in NAMES}
    for path in (*KUBERNETES.rglob("*.yaml"), *KUBERNETES.rglob("*.md")):
        assert set(names_in(path)) <= known, path
