"""`bom.cdx.json`: base, data and software of the model, as a CycloneDX 1.6 ML-BOM.

Format: https://cyclonedx.org/docs/1.6/json/. All of it comes from the manifest. It has neither times
nor the run's id, and its serial number is computed from the content, so that runs with the same results publish the
same file. `verify` builds it again. If you change what `build` writes, change `FORM`, so that `verify` does not compare
files of older versions.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from job.results.public_bases import last_part, public_base
from job.runs.layout import ADAPTER, EXPORT, SIGNATURE, WEIGHTS

FORM = "1"
_SPDX = {
    "apache-2.0": "Apache-2.0",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "cc-by-sa-3.0": "CC-BY-SA-3.0",
}
"""The hub's name of a licence -> its SPDX id, of the licences that are known here."""
_BASE, _MODEL = "base", "model"


def build(results: Mapping[str, Any]) -> bytes:
    """The BOM of a run.

    Args:
        results: The manifest; its entries for reports and signatures are ignored.
    """
    datasets = list(_datasets(results))
    software = list(_software(results))
    parts = [_base(results), *datasets, *software]
    bom = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": _model(results, [dataset["bom-ref"] for dataset in datasets]),
            "properties": [{"name": "qlora-job:form", "value": FORM}],
        },
        "components": parts,
        "dependencies": [
            {"ref": _MODEL, "dependsOn": [part["bom-ref"] for part in parts]},
            *({"ref": part["bom-ref"]} for part in parts),
        ],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(bom, sort_keys=True))
    return json.dumps({**bom, "serialNumber": f"urn:uuid:{serial}"}, indent=2).encode()


def form_of(bom: Mapping[str, Any]) -> str | None:
    """The `FORM` that a BOM was written in; None if it names none."""
    properties = {entry["name"]: entry["value"] for entry in bom["metadata"]["properties"]}
    form = properties.get("qlora-job:form")
    return None if form is None else str(form)


def _model(results: Mapping[str, Any], datasets: list[str]) -> dict[str, Any]:
    """The component of the adapter, with its files and those of exported formats."""
    files = [
        artifact
        for artifact in results["artifacts"]
        if artifact["path"].startswith((ADAPTER, EXPORT)) and not artifact["path"].endswith(f"/{SIGNATURE}")
    ]
    weights = [artifact["sha256"] for artifact in files if artifact["path"] == WEIGHTS]
    model, training = results["model"], results["training"]
    return {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": f"{last_part(_base_name(results)[0])} LoRA adapter",
        "version": weights[0][:12] if weights else "unknown",
        "hashes": [_hash(sha256) for sha256 in weights],
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": "text-generation",
                "modelArchitecture": model["architecture"],
                "datasets": [{"ref": ref} for ref in datasets],
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "text"}],
            },
            "quantitativeAnalysis": {"performanceMetrics": list(_metrics(results, "adapter"))},
        },
        "components": [
            {
                "type": "file",
                "bom-ref": artifact["path"],
                "name": artifact["path"],
                "hashes": [_hash(artifact["sha256"])],
            }
            for artifact in files
        ],
        "properties": _properties(
            {
                "trainable parameters": model["trainable_parameters"],
                "method": training.get("method", "sft"),
                "optimizer steps": training["steps"],
                "training PFLOP": (results.get("compute") or {}).get("training_pflop"),
                "commit": results["software"]["git"],
                "image": results["software"]["image_digest"],
            }
        ),
    }


def _base(results: Mapping[str, Any]) -> dict[str, Any]:
    model = results["model"]
    name, revision = _base_name(results)
    licence = model.get("licence")
    return {
        "type": "machine-learning-model",
        "bom-ref": _BASE,
        "name": name,
        **({"version": revision} if revision else {}),
        **({"licenses": [_licence(licence)]} if licence else {}),
        "modelCard": {
            "modelParameters": {"modelArchitecture": model["architecture"]},
            "quantitativeAnalysis": {"performanceMetrics": list(_metrics(results, "base"))},
        },
        "properties": _properties(
            {
                "SHA-256 over the SHA-256 of its files": model["sha256"],
                "parameters": model["parameters"],
                "weights held as": model["quantization"],
                "computed in": model["dtype"],
            }
        ),
    }


def _base_name(results: Mapping[str, Any]) -> tuple[str, str | None]:
    model, name_setting = results["model"], results["settings"].get("model.name") or {}
    return public_base(model["id"], model["revision"], name_setting.get("value"))


def _metrics(results: Mapping[str, Any], side: str) -> Iterator[dict[str, Any]]:
    """The metrics of the adapter or of the quantized base; for the adapter also the gain, with its interval."""
    for name, task in results["evaluation"]["tasks"].items():
        for metric in ("acc", "acc_norm"):
            if task[side].get(metric) is not None:
                yield {"type": metric, "value": repr(task[side][metric]), "slice": name}
        if side == "adapter":
            low, high = task["ci95"]
            interval = {"lowerBound": repr(low), "upperBound": repr(high)}
            gain = {"type": "acc, gain over the base", "value": repr(task["delta"]), "slice": name}
            yield {**gain, "confidenceInterval": interval}
    for name, task in results["evaluation"].get("measured", {}).items():
        for metric, figures in task["metrics"].items():
            yield {"type": metric, "value": repr(figures[side]), "slice": name}


def _datasets(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every source of training rows, and that of validation rows if it is a different one."""
    dataset = results["dataset"]
    licences = dataset.get("licences") or {}
    parts = dataset.get("sources") or [dataset]
    validation = dataset.get("validation")
    if validation and not validation["held_out"]:
        parts = [*parts, validation]
    for number, part in enumerate(parts, start=1):
        source = part["source"]
        public = bool(part["revision"]) or "://" in source
        yield {
            "type": "data",
            "bom-ref": f"data-{number}",
            "name": source if public else last_part(source),
            **({"version": part["revision"]} if part["revision"] else {}),
            **({"licenses": [_licence(licences[source])]} if source in licences else {}),
            "data": [{"type": "dataset"}],
            "properties": _properties(
                {"SHA-256 of the tokenized rows": part["sha256"], "rows": part["rows"], "tokens": part.get("tokens")}
            ),
        }


def _software(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    software = results["software"]
    yield {"type": "platform", "bom-ref": "python", "name": "python", "version": software["python"]}
    for name, version in sorted(software["packages"].items()):
        purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{version.replace('+', '%2B')}"
        yield {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _hash(sha256: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": sha256}


def _licence(name: str) -> dict[str, Any]:
    identifier = _SPDX.get(name)
    return {"license": {"id": identifier} if identifier else {"name": name}}


def _properties(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """Facts for which CycloneDX has no field, without those that are unknown."""
    return [{"name": f"qlora-job:{name}", "value": str(value)} for name, value in facts.items() if value is not None]
