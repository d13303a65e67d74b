"""The templates of `infra/serving/`: API servers would take them, and they agree with what the job publishes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from job.push.oci import FOLDER
from job.settings.load import load_settings
from job.settings.schema import NAMES
from tests.kubernetes.crds import FLAG, NUMBER, QUANTITY, TEXT, closed, listed, resource
from tests.kubernetes.manifests import build, one

SERVING = Path(__file__).parents[2] / "infra/serving"
VERSIONS = [f"1.{minor}" for minor in range(33, 38)]
FOLDERS = ("adapter", "merged", "from-store")

_QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
_MODEL = closed(
    ("modelFormat",),
    modelFormat=closed(("name",), name=TEXT, version=TEXT),
    runtime=TEXT,
    protocolVersion=TEXT,
    storageUri={"type": "string", "pattern": r"^(oci|oci\+native|oci\+fetch|s3|hf|pvc|gs)://.+"},
    args=listed(TEXT),
    env=listed({"type": "object"}),
    resources=closed(requests=_QUANTITIES, limits=_QUANTITIES),
)
_PREDICTOR = closed(
    ("model",),
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    model=_MODEL,
    serviceAccountName=TEXT,
    timeout=NUMBER,
    paused=FLAG,
)
INFERENCE_SERVICE = resource(
    "serving.kserve.io/v1beta1", "InferenceService", closed(("predictor",), predictor=_PREDICTOR)
)
"""The fields that we set, as KServe's v1beta1 defines them; a new field is looked up there and added here."""


def container(folder: str) -> dict[str, Any]:
    """The container with vLLM."""
    (found,) = one(build(str(SERVING / folder)), "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(found)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_api_server_takes_it(folder: str) -> None:
    """Every document fits the strict schema of its kind, in the first version with image volumes and in the last."""
    for document in build(str(SERVING / folder)):
        for version in (VERSIONS[0], VERSIONS[-1]):
            assert kubernetes_validate.validate(document, version, strict=True) == version


def test_a_wrong_field_is_found() -> None:
    """The check above can fail: a misspelt field of the image volume."""
    document: Any = yaml.safe_load(yaml.safe_dump(one(build(str(SERVING / "merged")), "Deployment")))
    document["spec"]["template"]["spec"]["volumes"][0]["image"]["refrence"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


def test_kserve_takes_it() -> None:
    """The InferenceService has KServe's fields alone, and names the folder in which the job puts the model."""
    document = yaml.safe_load((SERVING / "kserve.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(document, INFERENCE_SERVICE)
    document["spec"]["predictor"]["model"]["storageURI"] = "s3://x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, INFERENCE_SERVICE)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_pod_selects_itself_and_mounts_what_it_names(folder: str) -> None:
    """Labels, ports and volumes agree; the model is read where it is mounted, and the pod is no root."""
    documents = build(str(SERVING / folder))
    deployment, service = one(documents, "Deployment"), one(documents, "Service")
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    found = container(folder)
    assert {port["name"] for port in found["ports"]} == {service["spec"]["ports"][0]["targetPort"]}
    assert {mount["name"] for mount in found["volumeMounts"]} == {volume["name"] for volume in pod["spec"]["volumes"]}
    mounted = {mount["name"]: mount["mountPath"] for mount in found["volumeMounts"]}
    model = next(re.sub(r"^.*=", "", arg) for arg in found["args"] if mounted["run"] in arg)
    assert model.startswith(f"{mounted['run']}/{FOLDER}")
    assert pod["spec"]["securityContext"]["runAsNonRoot"]


def test_the_adapter_s_server_is_that_of_the_reference_recipe() -> None:
    """Base, commit and rank are those of the default preset."""
    settings = load_settings([], environ={})
    words = container("adapter")["args"]
    assert words[0] == settings.model.id
    assert f"--max-lora-rank={settings.lora.rank}" in words
    assert f"--max-model-len={settings.train.max_length}" in words
    if settings.model.revision:
        assert f"--revision={settings.model.revision}" in words


def test_the_page_names_settings_and_commands() -> None:
    """Every setting on the page is one, and every command line of `qlora-job` is understood."""
    from job.cli.arguments import COMMANDS, parse_arguments

    page = (SERVING / "README.md").read_text(encoding="utf-8")
    named = {name.lower().replace("__", ".").removeprefix("job_") for name in re.findall(r"JOB_[A-Z_]+[A-Z]", page)}
    assert named <= set(NAMES)
    (command,) = re.findall(r"^qlora-job serve-check (.*)$", page, re.MULTILINE)
    assert parse_arguments(command.split(), COMMANDS["serve-check"].arguments).options["--served"] == "merged"


def test_the_endpoint_s_template() -> None:
    """CloudFormation's linter has nothing to say of it, not even for information."""
    command = [
        Path(sys.executable).with_name("cfn-lint"),
        "--include-checks",
        "I",
        "--",
        str(SERVING / "sagemaker.yaml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
