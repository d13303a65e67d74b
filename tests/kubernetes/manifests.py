"""The output of Kustomize for `infra/kubernetes/`, and a kubelet's view of a pod template: environment and volumes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Document = Mapping[str, Any]

KUBERNETES = Path(__file__).parents[2] / "infra/kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
JOBS = [name for name in OVERLAYS if name != "multi-node"]
"""Overlays that build a Job; the other one builds a JobSet."""

# Pods get it with or without enableServiceLinks.
SERVICE = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}


NODE = "a-node"
"""The machine of every pod."""
FIELDS = {"spec.nodeName": NODE, "metadata.name": "a-pod", "metadata.namespace": "qlora"}
"""The downward API's values for every pod, except labels."""


@cache
def build(folder: str) -> tuple[Document, ...]:
    """The documents that `kubectl apply -k` would send, by the kubectl of the development packages.

    Args:
        folder: Below `infra/kubernetes/`, or an absolute path.
    """
    kubectl = Path(sysconfig.get_path("scripts"), "kubectl")
    done = subprocess.run(
        [kubectl, "kustomize", KUBERNETES / folder], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # deprecation warnings are on stderr
    return tuple(yaml.safe_load_all(done.stdout))


def overlay(name: str) -> tuple[Document, ...]:
    """The documents of an overlay."""
    return build(f"overlays/{name}")


def one(documents: Iterable[Document], kind: str, name: str | None = None) -> Document:
    """The only document of a kind, or of a kind and name."""
    (found,) = (d for d in documents if d["kind"] == kind and name in {None, d["metadata"]["name"]})
    return found


def job_spec(documents: Iterable[Document]) -> Document:
    """The spec of the Job, or of the Job that a JobSet makes."""
    (found,) = (document for document in documents if document["kind"] in {"Job", "JobSet"})
    if found["kind"] == "JobSet":
        (replicated,) = found["spec"]["replicatedJobs"]
        return dict(replicated["template"]["spec"])
    return dict(found["spec"])


def pod_spec(documents: Iterable[Document]) -> Document:
    """The spec of the pods."""
    return dict(job_spec(documents)["template"]["spec"])


def container(documents: Iterable[Document]) -> Document:
    """The pods' only container."""
    (found,) = pod_spec(documents)["containers"]
    return dict(found)


def labels(documents: Iterable[Document], job: str, jobset: str) -> dict[str, str]:
    """The labels of a pod: the template's, and those that the controllers add."""
    given = job_spec(documents)["template"].get("metadata", {}).get("labels", {})
    return {**given, "batch.kubernetes.io/job-name": job, "jobset.sigs.k8s.io/jobset-name": jobset}


def environment(documents: Iterable[Document], pod_labels: Mapping[str, str], index: int = 0) -> dict[str, str]:
    """A container's environment by the kubelet's rules: envFrom, then env in order; `$(NAME)` of what came before.

    The pods of an Indexed Job have their index in it.
    """
    documents = list(documents)
    job = container(documents)
    found = dict(SERVICE)
    for source in job.get("envFrom", []):
        found |= one(documents, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in job.get("env", []):
        if "valueFrom" in variable:
            path = variable["valueFrom"]["fieldRef"]["fieldPath"]
            if path in FIELDS:
                found[variable["name"]] = FIELDS[path]
                continue
            match = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
            assert match, path
            found[variable["name"]] = pod_labels[match[1]]
        else:
            expanded = re.sub(r"\$\((\w+)\)", lambda m: found.get(m[1], m[0]), variable["value"])
            found[variable["name"]] = expanded
    if job_spec(documents).get("completionMode") == "Indexed":
        found["JOB_COMPLETION_INDEX"] = str(index)
    return found


def relocate(text: str, places: Mapping[str, Path]) -> str:
    """A value in which paths below mount points are replaced by the volumes' real folders."""
    mounts = "|".join(re.escape(mount) for mount in sorted(places, key=len, reverse=True))
    return re.sub(rf"(^|=|,)({mounts})(?=/|,|$)", lambda m: f"{m[1]}{places[m[2]]}", text)


# podFailurePolicy is stable since 1.31.
VERSIONS = [f"1.{minor}" for minor in range(31, 38)]


ENDS = [VERSIONS[0], VERSIONS[-1]]


def check_restricted(documents: Sequence[Document]) -> None:
    """The Pod Security Standard "restricted", and more: read-only root, no token, no links to services."""
    pod, job = pod_spec(documents), container(documents)
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert job["securityContext"]["allowPrivilegeEscalation"] is False
    assert job["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert job["securityContext"]["readOnlyRootFilesystem"] is True
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys()
    allowed = {"configMap", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    for volume in pod["volumes"]:
        assert volume.keys() - {"name"} <= allowed
    assert pod["automountServiceAccountToken"] is False
    assert one(documents, "ServiceAccount")["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert not {"livenessProbe", "readinessProbe", "startupProbe"} & job.keys()  # the job has a watchdog of its own


@cache
def with_component(name: str, base: str, more: str = "") -> tuple[Document, ...]:
    """An overlay of the user's own on a shipped one, with a component and more lines; multi-node's pods are set/'s."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copytree(KUBERNETES, folder / "kubernetes")
        own = folder / "own"
        own.mkdir()
        added = ""
        if base == "multi-node":
            path = folder / "kubernetes/overlays/multi-node/set/kustomization.yaml"
            text, listed = path.read_text(encoding="utf-8"), "components/eight-gpus\n"
            assert text.count(listed) == 1
            path.write_text(text.replace(listed, f"{listed}  - ../../../components/{name}\n"), encoding="utf-8")
        else:
            added = f"components: [../kubernetes/components/{name}]\n"
        text = f"resources: [../kubernetes/overlays/{base}]\n{added}{more}"
        (own / "kustomization.yaml").write_text(text, encoding="utf-8")
        return build(str(own))
