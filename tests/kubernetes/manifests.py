"""The output of Kustomize for `infra/kubernetes/`, and a kubelet's view of a pod template: environment and volumes."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from collections.abc import Iterable, Mapping
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
