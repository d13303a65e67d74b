"""The Helm chart, rendered by Helm itself, equals what Kustomize builds, field by field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

import job
from job.errors import SettingsError, environment_name
from job.settings.load import load_settings
from job.settings.schema import NAMES
from tests.kubernetes.crds import CRDS
from tests.kubernetes.manifests import (
    ENDS,
    KUBERNETES,
    OVERLAYS,
    Document,
    build,
    check_restricted,
    container,
    environment,
    labels,
    one,
    overlay,
    pod_spec,
    with_component,
)

CHART = KUBERNETES.parent / "helm/qlora-job"
IMAGE = {"repository": "registry.example.com/qlora-job", "digest": f"sha256:{'0' * 64}"}
OUTPUT = {"JOB_RUN__OUTPUT": "s3://my-bucket/runs"}


def example(name: str) -> dict[str, Any]:
    """The chart's values for an overlay."""
    values: dict[str, Any] = yaml.safe_load((CHART / f"examples/{name}.yaml").read_text(encoding="utf-8"))
    return values


def render(values: Mapping[str, Any], name: str = "qlora-job") -> tuple[Document, ...]:
    """What `helm template` prints, by Helm's own Go code (helm-python-sdk)."""
    helm = pytest.importorskip("helm_python")
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(dict(values))
        (text,) = (t for path, t in chart.render(dict(values), name=name, namespace="qlora").items() if "run" in path)
    return tuple(yaml.safe_load_all(text))


def comparable(documents: tuple[Document, ...]) -> dict[tuple[str, str], Any]:
    """Documents without what may differ: the ConfigMap's hash in its name, and the order of what has names."""
    config = one(documents, "ConfigMap")["metadata"]["name"]

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list):
            entries = [plain(entry) for entry in value]
            named = entries and all(isinstance(entry, dict) and "name" in entry for entry in entries)
            return sorted(entries, key=lambda entry: entry["name"]) if named else entries
        return "config" if value == config else value

    found = {(document["kind"], document["metadata"]["name"]): plain(document) for document in documents}
    found["ConfigMap", "config"] = found.pop(("ConfigMap", config))
    for (kind, _), document in found.items():
        if kind == "PersistentVolumeClaim":  # the chart's have labels, and outlive the release
            document["metadata"] = {"name": document["metadata"]["name"]}
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_it_is_what_kustomize_builds(name: str) -> None:
    """With the values of an overlay, Helm's documents are the overlay's, and so is the container's environment."""
    rendered = render(example(name))
    assert comparable(rendered) == comparable(overlay(name))
    pod = labels(rendered, "a-job", "a-set")
    assert environment(rendered, pod) == environment(overlay(name), pod)


def test_the_defaults_are_the_base() -> None:
    """Without any value but the image and where results go, the Job is the base's."""
    ours, base = comparable(render({"image": {"repository": "r", "tag": "t"}, "settings": OUTPUT})), build("base")
    ours["Job", "qlora-job"]["spec"]["template"]["spec"]["containers"][0]["image"] = container(base)["image"]
    assert ours == comparable(base)


@pytest.mark.parametrize("name", ["base", "multi-node"])
def test_its_files_are_kustomize_s(name: str) -> None:
    """The chart contains what Kustomize builds now; after a change to infra/kubernetes its files are written again."""
    folder = name if name == "base" else f"overlays/{name}"
    found = tuple(yaml.safe_load_all((CHART / f"files/{name}.yaml").read_text(encoding="utf-8")))
    command = f"kubectl kustomize infra/kubernetes/{folder} >infra/helm/qlora-job/files/{name}.yaml"
    assert found == build(folder), f"run: {command}"
    monitor = Path("components/prometheus/podmonitor.yaml")
    assert (CHART / "files" / monitor.name).read_text() == (KUBERNETES / monitor).read_text(), f"copy {monitor}"


def test_other_values() -> None:
    """What the examples leave out reaches its place, and the API server takes the result under another name."""
    values = {
        "image": IMAGE,
        "settings": {**OUTPUT, "JOB_DATA__LIMIT": 1500000, "JOB_TRAIN__LEARNING_RATE": 2e-4, "JOB_LOG__LEVEL": "info"},
        "sharedMemory": "16Gi",
        "priorityClassName": "low",
        "imagePullSecrets": [{"name": "registry"}],
        "labels": {"team": "language"},
        "jobAnnotations": {"argocd.argoproj.io/sync-options": "Force=true"},
        "claims": [{"name": "cache", "storage": "60Gi", "storageClassName": "fast"}],
        "volumes": [{"name": "cache", "persistentVolumeClaim": {"claimName": "cache"}}],
    }
    documents = render(values, "my-run")
    for document in documents:
        for version in ENDS:
            kubernetes_validate.validate(document, version, strict=True)
    check_restricted(documents)
    data, pod = one(documents, "ConfigMap")["data"], pod_spec(documents)
    assert (data["JOB_DATA__LIMIT"], data["JOB_TRAIN__LEARNING_RATE"]) == ("1500000", "0.0002")
    assert {d["metadata"]["name"] for d in documents if d["kind"] in {"Job", "ServiceAccount"}} == {"my-run"}
    assert one(documents, "Job")["metadata"]["annotations"] == values["jobAnnotations"]
    assert all(d["metadata"]["labels"]["team"] == "language" for d in documents)
    assert (pod["priorityClassName"], pod["imagePullSecrets"]) == ("low", [{"name": "registry"}])
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert volumes["cache"] == {"name": "cache", "persistentVolumeClaim": {"claimName": "cache"}}
    assert one(documents, "PersistentVolumeClaim")["spec"]["storageClassName"] == "fast"


@pytest.mark.parametrize("nodes", [1, 2])
def test_figures_for_prometheus(nodes: int) -> None:
    """The pods serve figures as with the component, and the PodMonitor is its own but selects this release alone."""
    given = {"enabled": True, "labels": {"release": "monitoring"}}
    documents = render({"image": IMAGE, "settings": OUTPUT, "nodes": nodes, "prometheus": given}, "my-run")
    theirs = with_component("prometheus", "eks-spot" if nodes == 1 else "multi-node")
    assert container(documents)["ports"] == container(theirs)["ports"]
    pods = labels(documents, "my-run", "my-run")
    assert environment(documents, pods)["JOB_METRICS__PORT"] == environment(theirs, pods)["JOB_METRICS__PORT"]
    ours, kustomized = one(documents, "PodMonitor"), one(theirs, "PodMonitor")
    jsonschema.validate(ours, CRDS[ours["apiVersion"], "PodMonitor"])
    assert ours["spec"]["podMetricsEndpoints"] == kustomized["spec"]["podMetricsEndpoints"]
    selected = ours["spec"]["selector"]["matchLabels"].items()
    assert kustomized["spec"]["selector"]["matchLabels"].items() < selected <= pods.items()
    assert not selected <= labels(documents, "other", "other").items()
    assert ours["metadata"] == {"name": "my-run", "labels": {"release": "monitoring"}}


def test_a_serviceaccount_that_is_there() -> None:
    """Several releases can share one that a role of the cloud trusts; the chart makes none, and changes none."""
    shared = {"image": IMAGE, "settings": OUTPUT, "serviceAccount": {"name": "trusted"}}
    documents = render(shared, "my-run")
    assert [document["kind"] for document in documents] == ["ConfigMap", "Job"]
    assert pod_spec(documents)["serviceAccountName"] == "trusted"
    with pytest.raises(pytest.importorskip("helm_python").HelmError, match=r"serviceAccount\.annotations"):
        render({**shared, "serviceAccount": {"name": "trusted", "annotations": {"a": "b"}}})


def test_a_second_mount_of_a_volume() -> None:
    """A mount takes the place of the chart's own only at the same path: a part of `cache` elsewhere leaves /cache."""
    added = {"name": "cache", "mountPath": "/models", "subPath": "models"}
    documents = render({"image": IMAGE, "settings": OUTPUT, "volumeMounts": [added]})
    mounts = {mount["mountPath"]: mount for mount in container(documents)["volumeMounts"]}
    assert mounts["/cache"] == {"name": "cache", "mountPath": "/cache"}
    assert mounts["/models"] == added
    replaced = {"name": "cache", "mountPath": "/cache", "subPath": "job"}
    documents = render({"image": IMAGE, "settings": OUTPUT, "volumeMounts": [replaced]})
    assert [m for m in container(documents)["volumeMounts"] if m["name"] == "cache"] == [replaced]


def test_three_machines() -> None:
    """The number of machines is that of the pods and of the job's nodes; the set is one that JobSet takes."""
    documents = render({"image": IMAGE, "settings": OUTPUT, "nodes": 3}, "my-run")
    jobset = one(documents, "JobSet")
    jsonschema.validate(jobset, CRDS[jobset["apiVersion"], "JobSet"])
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (spec["completions"], spec["parallelism"]) == (3, 3)
    found = environment(documents, labels(documents, "none", "my-run"))
    assert (found["JOB_RUN__NODES"], found["JOB_RUN__RENDEZVOUS"]) == ("3", "my-run-node-0-0.my-run:29400")


def test_off_without_quotes_is_refused() -> None:
    """YAML reads off as false: where the job knows the word only, Helm says so, and not a pod that waited for a GPU."""

    def takes(name: str, value: str) -> bool:
        try:
            load_settings([], {name: value})
        except SettingsError as error:
            return not any(name in str(problem) and "must be" in str(problem) for problem in error.problems)
        return True

    known = map(environment_name, NAMES)
    words = {name for name in known if takes(name, "off") and not takes(name, "false")}
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    assert schema["properties"]["settings"]["properties"].keys() == words
    values = {"image": IMAGE, "settings": {**OUTPUT, **dict.fromkeys(words, False)}}
    with pytest.raises(pytest.importorskip("helm_python").HelmError) as refused:
        render(values)
    assert {name for name in words if f"/settings/{name}': got boolean, want string" in str(refused.value)} == words


def test_other_settings_are_another_configmap() -> None:
    """With other settings an upgrade is refused by the API server, since the pods would name another ConfigMap."""
    first, second = (
        container(render({"image": IMAGE, "settings": {**OUTPUT, "JOB_RUN__SEED": seed}}))["envFrom"] for seed in (1, 2)
    )
    assert first != second


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"settings": OUTPUT}, "image.repository: say where the image is"),
        ({"image": {"repository": "r"}, "settings": OUTPUT}, "image.digest, or image.tag: say which image"),
        ({"image": IMAGE}, "settings.JOB_RUN__OUTPUT: say where results go"),
        ({"image": IMAGE, "settings": OUTPUT, "node": 2}, "node"),
        ({"image": IMAGE, "settings": {"job_run__output": "x"}}, "job_run__output"),
        ({"image": IMAGE, "settings": OUTPUT, "env": [{"name": "A", "value": 1}]}, "got number, want string"),
        (
            {"image": IMAGE, "settings": OUTPUT, "terminationGracePeriodSeconds": 30},
            "110 must be less than",
        ),
        (
            {"image": IMAGE, "settings": {**OUTPUT, "JOB_RUN__GRACE_SECONDS": 120}},
            "JOB_RUN__GRACE_SECONDS: 120 must be less",
        ),
    ],
)
def test_what_is_missing_or_misspelt_is_said(values: dict[str, Any], said: str) -> None:
    """Helm refuses values without the image or the place for results, and names that the chart does not know."""
    helm = pytest.importorskip("helm_python")
    with pytest.raises(helm.HelmError, match=said):
        render(values)


def test_values_fit_their_schema() -> None:
    """Defaults and examples fit values.schema.json, and the chart has the job's version."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    for values in (yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")), *map(example, OVERLAYS)):
        jsonschema.validate(values, schema)
        assert values.keys() <= schema["properties"].keys()
    about = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert (about["version"], about["appVersion"]) == (job.__version__, job.__version__)
