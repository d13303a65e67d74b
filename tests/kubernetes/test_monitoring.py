"""Monitoring in a cluster: which pods are scraped; the dashboard queries only exported metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from job.records import RunFigures, TrainingProgress
from job.runs.layout import Stage
from job.settings.load import exporters, load_settings
from job.tracking.live_metrics import GAUGES, LiveMetrics
from tests.kubernetes.manifests import KUBERNETES, container, environment, job_spec, labels, one, with_component

DASHBOARD: dict[str, Any] = json.loads((KUBERNETES / "grafana-dashboard.json").read_text(encoding="utf-8"))
EXPORTED = {gauge.prometheus for gauge in GAUGES}


def labels_of_samples() -> set[str]:
    """The labels that a sample may have."""
    live = LiveMetrics("a-run")
    stages = tuple(stage.value for stage in Stage)
    live.figures = lambda: RunFigures(1, stages, "train", 0.5, TrainingProgress(1, 2, 1.0, 1.0, 1.0))
    return {name for gauge in GAUGES for found, _ in live.observe(gauge) for name in found}


def expressions() -> Iterator[str]:
    """Every query of the dashboard: of its panels and of its variables."""
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]
            assert variable["definition"] == variable["query"]["query"]


def test_the_dashboard_asks_for_what_is_exported() -> None:
    """Each name in a query is exported, each label is one that samples have, and every figure stands in a panel."""
    asked = {name for text in expressions() for name in re.findall(r"\bqlora_job_\w+", text)}
    assert asked == EXPORTED
    known = labels_of_samples()
    for text in expressions():
        selected = re.findall(r"(\w+)\s*(?:=~|!~|=|!=)\s*\"", text)
        grouped = [name for names in re.findall(r"\bby \(([^)]*)\)", text) for name in names.split(", ")]
        assert set(selected) | set(grouped) <= known, text
        assert text.count("(") == text.count(")")
        assert text.count("{") == text.count("}")
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= known


def test_the_dashboard_can_be_imported() -> None:
    """Panels have ids of their own and do not overlap, and every data source is the one that is chosen above them."""
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r'"uid": "([^"]*)"', text)) == {"qlora-job", "${datasource}"}
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__all"} <= variables


@pytest.mark.parametrize("base", ["eks-spot", pytest.param("multi-node", marks=pytest.mark.long)])
def test_the_pods_are_scraped(base: str) -> None:
    """The PodMonitor finds the pods by their label, and at a port at which the job serves figures."""
    documents = with_component("prometheus", base)
    spec = one(documents, "PodMonitor")["spec"]
    pods = job_spec(documents)["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= pods.items()
    (endpoint,), (port,) = spec["podMetricsEndpoints"], container(documents)["ports"]
    assert endpoint["port"] == port["name"]
    found = {k: v for k, v in environment(documents, labels(documents, "a", "b")).items() if k == "JOB_METRICS__PORT"}
    assert exporters(load_settings([], found), found) == {"prometheus": {"port": port["containerPort"]}}
    (only_first,) = endpoint["relabelings"]
    (label,) = only_first["sourceLabels"]
    assert label == "__meta_kubernetes_pod_label_" + re.sub(r"\W", "_", "batch.kubernetes.io/job-completion-index")
    assert [index for index in ("", "0", "1", "10") if re.fullmatch(only_first["regex"], index)] == ["", "0"]


def test_a_network_policy_lets_prometheus_in() -> None:
    """The policy of the pods allows their port for figures, and no other port from outside."""
    rules = one(with_component("network-policy", "eks-spot"), "NetworkPolicy")["spec"]["ingress"]
    (port,) = container(with_component("prometheus", "eks-spot"))["ports"]
    (open_to_all,) = [rule for rule in rules if "from" not in rule]
    assert [(allowed["port"], allowed["protocol"]) for allowed in open_to_all["ports"]] == [(port["name"], "TCP")]
