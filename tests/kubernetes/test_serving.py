"""The templates of `infra/serving/` are valid for API servers, and agree with what the job publishes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from job.common.export_formats import MERGED
from job.push.oci_image import FOLDER
from job.settings.load import load_settings
from job.settings.schema import NAMES
from tests.kubernetes.manifests import build, one

SERVING = Path(__file__).parents[2] / "infra/serving"
VERSIONS = [f"1.{minor}" for minor in range(33, 38)]
FOLDERS = ("adapter", "merged", "from-store")

INFERENCE_SERVICE = Path(__file__).with_name("kserve_inference_service.json")
"""KServe's own schema of v1beta1, or rather the part of it that its comment names."""
KSERVE_URIS = re.compile(r"(gs|s3|pvc|file|https?|hdfs|webhdfs|oci|oci\+native|oci\+fetch|hf)://.+")
"""The places that KServe v0.20 reads models from (SupportedStorageURIPrefixList)."""
KSERVE_MODES = {"Standard", "Knative"}


def strict(schema: Any) -> Any:
    """A CustomResourceDefinition's schema as the API server checks it for strict clients: unknown fields are errors."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(value) for name, value in schema.items()}
    return {**closed, "additionalProperties": False} if "properties" in schema and "type" in schema else closed


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
    """The InferenceService fits the schema of KServe's own CRD; it names the folder in which the job puts the model."""
    schema = strict(json.loads(INFERENCE_SERVICE.read_text(encoding="utf-8")))
    document = yaml.safe_load((SERVING / "kserve.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(document, schema)
    predictor = document["spec"]["predictor"]
    assert KSERVE_URIS.fullmatch(predictor["model"]["storageUri"])
    assert document["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] in KSERVE_MODES
    # KServe mounts the image's folder `models` there
    assert (FOLDER, f"--model_dir=/mnt/models/{MERGED}") == ("models", predictor["model"]["args"][1])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "predictor", "model", "storageURI"), "s3://x"),
        (("spec", "predictor", "model", "modelFormat"), {"version": "1"}),
        (("spec", "predictor", "model", "args"), "--model_name=run"),
        (("spec", "predictor", "model", "resources", "limits", "memory"), "32 GB"),
        (("spec", "predictor", "model", "resources", "limit"), {}),
        (("spec", "predictor", "minReplicas"), "1"),
        (("spec", "predicator"), {}),
    ],
)
def test_kserve_would_refuse(path: tuple[str, ...], value: object) -> None:
    """The check above can fail: misspelt names, missing names, wrong kinds of values."""
    schema = strict(json.loads(INFERENCE_SERVICE.read_text(encoding="utf-8")))
    document = yaml.safe_load((SERVING / "kserve.yaml").read_text(encoding="utf-8"))
    *parents, last = path
    place = document
    for name in parents:
        place = place[name]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


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


def parameters(template: dict[str, Any]) -> dict[str, Any]:
    """A value for each parameter of the template, which has to allow it."""
    given = {
        "Name": "my-model",
        "ModelUri": "s3://my-bucket/qlora/my-first-run/artifacts/export/merged/",
        "Image": "763104351884.dkr.ecr.us-east-1.amazonaws.com/djl-inference:0.34.0-lmi16.0.0-cu128",
        "RoleArn": "arn:aws:iam::123456789012:role/serving",
    }
    found = {name: given.get(name, parameter.get("Default")) for name, parameter in template["Parameters"].items()}
    for name, parameter in template["Parameters"].items():
        assert re.fullmatch(parameter.get("AllowedPattern", ".*"), str(found[name])), name
    return found


def request(template: dict[str, Any], resource: str) -> dict[str, Any]:
    """The request that CloudFormation makes for a resource: its properties, with the values of what they refer to."""
    values = {**parameters(template), "Model.ModelName": "my-model-1", "Configuration.EndpointConfigName": "my-model-1"}

    def resolved(value: Any) -> Any:
        if isinstance(value, list):
            return [resolved(one) for one in value]
        if not isinstance(value, dict):
            return value
        match value:
            case {"Ref": name}:
                return values[name]
            case {"Fn::GetAtt": where}:
                return values[where if isinstance(where, str) else ".".join(where)]
            case {"Fn::Sub": text}:
                return re.sub(r"\$\{(\w+)\}", lambda found: str(values[found[1]]), text)
        return {name: resolved(one) for name, one in value.items()}

    found: dict[str, Any] = resolved(template["Resources"][resource]["Properties"])
    return found


def template_of_the_endpoint() -> dict[str, Any]:
    """The template as CloudFormation reads it, its short tags as functions."""
    from cfnlint.decode import cfn_yaml

    loaded = cfn_yaml.load(str(SERVING / "sagemaker.yaml"))
    found: dict[str, Any] = json.loads(json.dumps(loaded))
    return found


NAMED = {
    "Model": ("CreateModel", {"ModelName": "my-model-1"}),
    "Configuration": ("CreateEndpointConfig", {"EndpointConfigName": "my-model-1"}),
    "Endpoint": ("CreateEndpoint", {}),
}
"""Resource of the template -> the call that makes it, and what CloudFormation adds: the names it makes up."""


def refusals(resource: str, change: dict[str, Any] | None = None) -> str:
    """What the service model of SageMaker, as botocore ships it, has to say of a resource."""
    import botocore.session
    from botocore.validate import ParamValidator

    operation, named = NAMED[resource]
    model = botocore.session.get_session().get_service_model("sagemaker").operation_model(operation)
    body = {**named, **request(template_of_the_endpoint(), resource), **(change or {})}
    report: str = ParamValidator().validate(body, model.input_shape).generate_report()
    return report + enum_refusals(body, model.input_shape)


def enum_refusals(value: Any, shape: Any) -> str:
    """Values that are none of an enumeration, or do not fit a pattern; the validator does not look at these."""
    if shape.type_name == "structure":
        return "".join(enum_refusals(one, shape.members[name]) for name, one in value.items() if name in shape.members)
    if shape.type_name == "list":
        return "".join(enum_refusals(one, shape.member) for one in value)
    if shape.type_name == "map":
        return "".join(enum_refusals(one, shape.value) for one in value.values())
    if getattr(shape, "enum", None) and value not in shape.enum:
        return f"{value} is none of {shape.name}"
    pattern = shape.metadata.get("pattern")
    if pattern and not re.fullmatch(pattern, str(value)):
        return f"{value} does not fit {shape.name}"
    return ""


@pytest.mark.parametrize("resource", NAMED)
def test_sagemaker_takes_the_endpoint(resource: str) -> None:
    """Each resource of the template is a request that fits the service's own model: names, types, limits, values."""
    assert refusals(resource) == ""


@pytest.mark.parametrize(
    ("resource", "change", "said"),
    [
        ("Model", {"PrimaryContainer": {"Imag": "x"}}, "Unknown parameter"),
        ("Model", {"PrimaryContainer": {"ModelDataSource": {"S3DataSource": {}}}}, "Missing required parameter"),
        ("Configuration", {"ProductionVariants": [{"VariantName": "a", "InstanceType": "ml.none"}]}, "none of"),
        ("Configuration", {"ProductionVariants": [{"VariantName": 1}]}, "Invalid type"),
        ("Endpoint", {"EndpointName": "my_model"}, "does not fit"),
    ],
)
def test_sagemaker_would_refuse(resource: str, change: dict[str, Any], said: str) -> None:
    """The check above can fail."""
    assert said in refusals(resource, change)
