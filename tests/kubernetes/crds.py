"""Schemas of the custom resources that the templates use: the fields that they set, as defined by the APIs.

JobSet v1alpha2 (v0.10 and newer), Kueue v1beta2, Kubeflow Trainer v1alpha1 (2.2 and newer) and the Prometheus
operator's v1, read from the projects' Go types. Other fields are refused: look up a new field of a template there and
add it here.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def closed(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def listed(items: Schema, **limits: int) -> Schema:
    """A list of such items."""
    return {"type": "array", "items": items, **limits}


def resource(api_version: str, kind: str, spec: Schema | None = None) -> Schema:
    """A whole document; without the argument `spec` it has no such field."""
    name = {"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 40}
    metadata = closed(("name",), name=name, labels=STRINGS, annotations=STRINGS)
    head: dict[str, Schema] = {"apiVersion": {"const": api_version}, "kind": {"const": kind}, "metadata": metadata}
    return closed(("apiVersion", "kind", "metadata"), **head, **({} if spec is None else {"spec": spec}))


TEXT: Schema = {"type": "string", "minLength": 1}
STRINGS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
NUMBER: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
FLAG: Schema = {"type": "boolean"}
QUANTITY: Schema = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|k|[KMGTP]i?)?$"}

TRAINER = "trainer.kubeflow.org/v1alpha1"
JOBSET = "jobset.x-k8s.io/v1alpha2"
KUEUE = "kueue.x-k8s.io/v1beta2"
MONITORING = "monitoring.coreos.com/v1"

_RULE = closed(
    ("name", "action"),
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={
        "enum": [
            "FailJobSet",
            "RestartJobSet",
            "RestartJobSetAndIgnoreMaxRestarts",
            "RestartJob",
            "RestartJobAndIgnoreMaxRestarts",
        ]
    },
    onJobFailureReasons=listed(
        {
            "enum": [
                "BackoffLimitExceeded",
                "DeadlineExceeded",
                "FailedIndexes",
                "MaxFailedIndexesExceeded",
                "PodFailurePolicy",
            ]
        }
    ),
    onJobFailureMessagePatterns=listed(TEXT),
    targetReplicatedJobs=listed(TEXT),
)
# A Job's spec is checked against the API server's own schema.
_REPLICATED = closed(
    ("name", "template"),
    name=TEXT,
    replicas=NUMBER,
    template=closed(("spec",), metadata=closed(labels=STRINGS, annotations=STRINGS), spec={"type": "object"}),
)
_JOBSET = closed(
    ("replicatedJobs",),
    replicatedJobs=listed(_REPLICATED, minItems=1),
    network=closed(enableDNSHostnames=FLAG, subdomain=TEXT, publishNotReadyAddresses=FLAG),
    failurePolicy=closed(
        maxRestarts=NUMBER,
        restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
        rules=listed(_RULE),
    ),
    suspend=FLAG,
    ttlSecondsAfterFinished=NUMBER,
)

_FLAVOR = closed(
    ("name", "resources"),
    name=TEXT,
    resources=listed(closed(("name", "nominalQuota"), name=TEXT, nominalQuota=QUANTITY), minItems=1, maxItems=64),
)
_CLUSTER_QUEUE = closed(
    namespaceSelector=closed(matchLabels=STRINGS),
    queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]},
    preemption=closed(
        withinClusterQueue={"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]},
        reclaimWithinCohort={"enum": ["Never", "LowerPriority", "Any"]},
    ),
    resourceGroups=listed(
        closed(
            ("coveredResources", "flavors"),
            coveredResources=listed(TEXT, minItems=1, maxItems=64),
            flavors=listed(_FLAVOR, minItems=1, maxItems=64),
        ),
        maxItems=16,
    ),
)
# Nodes are counted by topology only if a label says which; the API server refuses a Topology without one.
_FLAVOR_SPEC = {
    **closed(nodeLabels=STRINGS, topologyName=TEXT),
    "if": {"required": ["topologyName"]},
    "then": {"required": ["nodeLabels"]},
}
_TOPOLOGY = closed(
    ("levels",),
    levels=listed(closed(("nodeLabel",), nodeLabel=TEXT), minItems=1, maxItems=16) | {"uniqueItems": True},
)
_RUNTIME = closed(
    ("template",),
    mlPolicy=closed(numNodes=NUMBER),
    template=closed(("spec",), metadata=closed(labels=STRINGS, annotations=STRINGS), spec=_JOBSET),
)
_VARIABLE = closed(("name", "value"), name=TEXT, value={"type": "string"})
_TRAIN_JOB = closed(
    ("runtimeRef",),
    runtimeRef=closed(("name",), apiGroup={"const": "trainer.kubeflow.org"}, kind=TEXT, name=TEXT),
    trainer=closed(
        numNodes=NUMBER,
        # Merged into the variables of the runtime's container.
        resourcesPerNode=closed(
            requests={"type": "object", "additionalProperties": QUANTITY},
            limits={"type": "object", "additionalProperties": QUANTITY},
        ),
        env=listed(_VARIABLE, maxItems=128),
    ),
    suspend=FLAG,
)

_RELABELING = closed(
    sourceLabels=listed({"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}),
    regex=TEXT,
    action={"enum": ["replace", "keep", "drop", "labelmap", "labeldrop", "labelkeep"]},
)
_POD_MONITOR = closed(
    ("selector", "podMetricsEndpoints"),
    selector=closed(matchLabels=STRINGS),
    podMetricsEndpoints=listed(
        closed(
            port=TEXT,
            interval={"type": "string", "pattern": r"^(0|(\d+[smh])+)$"},
            relabelings=listed(_RELABELING),
        )
    ),
)

CRDS: dict[tuple[str, str], Schema] = {
    (JOBSET, "JobSet"): resource(JOBSET, "JobSet", _JOBSET),
    (TRAINER, "ClusterTrainingRuntime"): resource(TRAINER, "ClusterTrainingRuntime", _RUNTIME),
    (TRAINER, "TrainJob"): resource(TRAINER, "TrainJob", _TRAIN_JOB),
    (KUEUE, "ResourceFlavor"): resource(KUEUE, "ResourceFlavor", _FLAVOR_SPEC),
    (KUEUE, "Topology"): resource(KUEUE, "Topology", _TOPOLOGY),
    (KUEUE, "ClusterQueue"): resource(KUEUE, "ClusterQueue", _CLUSTER_QUEUE),
    (KUEUE, "LocalQueue"): resource(KUEUE, "LocalQueue", closed(("clusterQueue",), clusterQueue=TEXT)),
    (MONITORING, "PodMonitor"): resource(MONITORING, "PodMonitor", _POD_MONITOR),
}
"""(apiVersion, kind) -> schema."""
