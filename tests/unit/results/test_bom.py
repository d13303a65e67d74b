"""The ML-BOM: valid by the official schema, the same for the same results, and derived from the manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.errors import VerificationError
from job.results import bom
from job.runs.layout import BOM
from job.storage.local import LocalStore
from job.verification.check_bom import check_bom
from job.verification.verify import require_verified, verify
from tests.example_run import evidence, publish, results
from tests.published_run import forge, pairs, publish_file, publish_run


@pytest.fixture
def finished(tmp_path: Path) -> dict[str, Any]:
    """The manifest of a made-up run of Mistral on Alpaca."""
    found = evidence()
    manifest = results(found)
    manifest["model"]["licence"] = "apache-2.0"
    manifest["dataset"]["licences"] = {manifest["dataset"]["source"]: "cc-by-nc-4.0"}
    return publish(tmp_path / "run", found, manifest)


def components(content: bytes) -> dict[str, dict[str, Any]]:
    """Each part by its name in the BOM."""
    return {part["bom-ref"]: part for part in json.loads(content)["components"]}


@pytest.mark.filterwarnings("ignore")
def test_the_official_schema(finished: dict[str, Any]) -> None:
    """The library of CycloneDX accepts it in its strict form, and refuses it with a field too many."""
    schema = pytest.importorskip("cyclonedx.schema")
    validation = pytest.importorskip("cyclonedx.validation.json")
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    written = json.loads(bom.build(finished))
    assert validator.validate_str(json.dumps(written)) is None
    assert validator.validate_str(json.dumps({**written, "more": 1})) is not None


def test_what_it_names(finished: dict[str, Any]) -> None:
    """Base and data with their commits and licences, the adapter's hash and its figures, and every package."""
    content = bom.build(finished)
    found, written = components(content), json.loads(content)
    assert (found["base"]["name"], found["base"]["version"]) == (
        "mistralai/Mistral-7B-v0.1",
        finished["model"]["revision"],
    )
    assert found["base"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert found["data-1"]["licenses"] == [{"license": {"id": "CC-BY-NC-4.0"}}]
    assert {"name": "qlora-job:rows", "value": "1500"} in found["data-1"]["properties"]
    model = written["metadata"]["component"]
    weights = [one["sha256"] for one in finished["artifacts"] if one["path"].endswith("adapter_model.safetensors")]
    assert [one["content"] for one in model["hashes"]] == weights
    measured = {
        (one["type"], one["slice"]): one for one in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    }
    for name, task in finished["evaluation"]["tasks"].items():
        assert float(measured["acc", name]["value"]) == task["adapter"]["acc"]
    versions = {part["name"]: part["version"] for part in found.values() if part["type"] == "library"}
    assert versions == finished["software"]["packages"]


def test_the_same_results_give_the_same_bytes(finished: dict[str, Any]) -> None:
    """Neither times nor the run's id are in it, nor the path of a base on this machine."""
    content = bom.build(finished)
    other = json.loads(json.dumps(finished))
    other["run"].update(id="another", finished="2027-01-01T00:00:00Z")
    assert bom.build(other) == content
    other["model"].update(id="/home/somebody/base", revision=None)
    assert b"somebody" not in bom.build(other)
    assert json.loads(bom.build(other))["serialNumber"] != json.loads(content)["serialNumber"]


def test_verify_makes_it_again(tmp_path: Path) -> None:
    """A figure that is forged in it is named, though its hash and the seal were computed again."""
    run = publish_run(tmp_path / "run", {"quiz": pairs(20, improved=5)})
    content = bom.build(json.loads((run / "results.json").read_bytes()))

    def put(data: bytes) -> None:
        artifact = publish_file(LocalStore(run), BOM, data)

        def change(made: dict[str, Any]) -> None:
            kept = [one for one in made["artifacts"] if one["path"] != artifact.path]
            made["artifacts"] = [*kept, artifact.__dict__]

        forge(run, change)

    for number, (data, holds) in enumerate([(content, True), (content.replace(b"nf4", b"fp8"), False), (b"[]", False)]):
        put(data)
        (work := tmp_path / f"work-{number}").mkdir()
        checks = verify(LocalStore(run), work)
        assert {check.what for check in checks if check.differences} == (set() if holds else {"ML-BOM"})
    with pytest.raises(VerificationError, match="CycloneDX ML-BOM"):
        require_verified(checks)


def test_a_bom_of_another_form(tmp_path: Path) -> None:
    """What another version wrote is checked by its hash alone, and that is said."""
    run = publish_run(tmp_path / "run", {"quiz": pairs(20)})
    made = json.loads((run / "results.json").read_bytes())
    other = tmp_path / "bom"
    other.write_bytes(bom.build(made).replace(b'"value": "1"', b'"value": "0"'))
    found = check_bom({**made, "artifacts": [{"path": BOM}]}, {BOM: other})
    assert found is not None
    assert (found.differences, found.notes) == ((), ("was written by another version of the job",))
