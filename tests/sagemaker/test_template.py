"""The CloudFormation template passes its linter, and its role allows exactly what the job does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import launch
import pytest
from botocore.exceptions import ClientError
from launch_request import Order, build
from moto import mock_aws
from moto.core import set_initial_no_auth_action_count

from job.errors import AccessDenied, JobError
from job.storage import s3
from job.storage.base import MIB
from job.storage.open import StorageOptions, open_store
from tests.s3_server import CREDENTIALS
from tests.sagemaker.template import BUCKET, MADE, TEMPLATE, Stack

KEY = "arn:aws:kms:us-east-1:123456789012:key/00000000-0000-0000-0000-000000000000"
EVERYTHING = {"KmsKeyArn": KEY, "Vpc": "yes", "DataBucket": "my-data"}
# Which permission each request to S3 needs, by AWS's Service Authorization Reference.
PERMISSION = {
    "GetObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
}
# Actions that AWS knows no resource for, or none that is there before the job is.
WITHOUT_RESOURCE = {"ecr:GetAuthorizationToken", "cloudwatch:PutMetricData"}


@pytest.fixture(autouse=True)
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An AWS of our own, with made-up credentials."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with mock_aws():
        yield


def use_everything(uri: str, path: Path) -> None:
    """Every verb of a store, with a file that goes in parts, and what is not there."""
    store = open_store(uri)
    path.write_bytes(b"x" * (9 * MIB))
    assert store.conditional_writes()
    store.write("small", b"1")
    store.upload(path, "large")
    store.download("large", path.with_name("copy"))
    assert store.read("absent") is None
    with suppress(FileNotFoundError):
        store.download("absent", path.with_name("copy"))
    assert [info.key for info in store.list()] == ["large", "small"]
    store.delete("small")
    store.delete("large")


def break_an_upload(uri: str, path: Path) -> None:
    """An upload whose parts are refused."""

    def refuse(**_: Any) -> None:
        raise ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "UploadPart")

    store: Any = open_store(uri, StorageOptions(retries=1))
    store._client.meta.events.register("before-call.s3.UploadPart", refuse)
    with pytest.raises(JobError):
        store.upload(path, "never")


def test_lint() -> None:
    """cfn-lint has nothing to say, not even for information."""
    command = [Path(sys.executable).with_name("cfn-lint"), "--include-checks", "I", "--", str(TEMPLATE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_role_may_do_what_the_store_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The S3 permissions are exactly those that the requests of a store need, on the prefix alone."""
    requests: set[str] = set()
    connect = s3.S3Store.__init__

    def watched(self: Any, client: Any, *args: Any, **options: Any) -> None:
        client.meta.events.register("before-call.s3", lambda model, **_: requests.add(model.name))
        connect(self, client, *args, **options)

    monkeypatch.setattr(s3.S3Store, "__init__", watched)
    stack = Stack()
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    use_everything(stack.outputs["Root"] + "/runs", tmp_path / "file")
    break_an_upload(stack.outputs["Root"] + "/runs", tmp_path / "file")
    assert requests == PERMISSION.keys()
    arn = MADE["Bucket.Arn"]
    expected = {action: {f"{arn}/qlora-job/*"} for action in PERMISSION.values()} | {"s3:ListBucket": {arn}}
    assert stack.allowed("s3") == expected


@set_initial_no_auth_action_count(4)
def test_the_role_is_enough_and_ends_at_the_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a role of these policies, and permissions enforced, every verb works below the prefix and none beside it."""
    stack, iam = Stack(), boto3.client("iam")
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    trust = json.dumps(stack.resources["Role"]["AssumeRolePolicyDocument"])
    role = iam.create_role(RoleName=MADE["Role"], AssumeRolePolicyDocument=trust)["Role"]["Arn"]
    iam.put_role_policy(
        RoleName=MADE["Role"], PolicyName="runs", PolicyDocument=json.dumps(without_conditions(stack.policies["runs"]))
    )
    assumed = boto3.client("sts").assume_role(RoleArn=role, RoleSessionName="job")["Credentials"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", assumed["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", assumed["SecretAccessKey"])
    monkeypatch.setenv("AWS_SESSION_TOKEN", assumed["SessionToken"])
    use_everything(stack.outputs["Root"] + "/runs", tmp_path / "file")
    with pytest.raises(AccessDenied):
        open_store(stack.outputs["Root"] + "-beside").write("x", b"")


def without_conditions(policy: dict[str, Any]) -> dict[str, Any]:
    """The statements that hold always: moto does not evaluate conditions."""
    return {**policy, "Statement": [part for part in policy["Statement"] if "Condition" not in part]}


@pytest.mark.parametrize("parameters", [{}, EVERYTHING], ids=["alone", "with everything"])
def test_nothing_broader(parameters: dict[str, str]) -> None:
    """No action is a pattern, and no resource is everything, but for what AWS cannot narrow down."""
    statements = list(Stack(**parameters).statements)
    assert statements
    for statement in statements:
        actions = set(statement["Action"])
        assert statement["Effect"] == "Allow"
        assert not any("*" in action for action in actions)
        if any(resource in {"*", "arn:aws:s3:::*"} for resource in statement["Resource"]):
            assert actions <= WITHOUT_RESOURCE or all(action.startswith("ec2:") for action in actions)


def test_what_is_asked_for_is_added() -> None:
    """A key, a VPC and a bucket of data each bring their permissions, and none comes without being asked for."""
    plain, asked = Stack(), Stack(**EVERYTHING)
    assert not plain.allowed("kms")
    assert not plain.allowed("ec2")
    assert "Key" not in plain.outputs
    assert asked.outputs["Key"] == KEY
    assert asked.allowed("kms") == {
        f"kms:{action}": {KEY} for action in ("Decrypt", "DescribeKey", "Encrypt", "GenerateDataKey", "CreateGrant")
    }
    assert {"ec2:CreateNetworkInterface", "ec2:DeleteNetworkInterface"} <= asked.allowed("ec2").keys()
    assert "arn:aws:s3:::my-data/*" in asked.allowed("s3")["s3:GetObject"]
    assert "arn:aws:s3:::my-data/*" not in asked.allowed("s3")["s3:PutObject"]


def test_only_sagemaker_of_this_account_takes_the_role() -> None:
    """The service may assume the role on behalf of this account alone."""
    [trust] = Stack().resources["Role"]["AssumeRolePolicyDocument"]["Statement"]
    assert trust["Principal"] == {"Service": "sagemaker.amazonaws.com"}
    assert trust["Condition"] == {"StringEquals": {"aws:SourceAccount": "123456789012"}}


def test_the_bucket_is_closed_and_remembers() -> None:
    """Versioned, encrypted, not public, TLS alone."""
    stack = Stack()
    bucket = stack.resources["Bucket"]
    assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
    assert list(bucket["PublicAccessBlockConfiguration"].values()) == [True] * 4
    for parameters, expected in (({}, {"SSEAlgorithm": "AES256"}), (EVERYTHING, {"SSEAlgorithm": "aws:kms"})):
        encryption = Stack(**parameters).resources["Bucket"]["BucketEncryption"]
        [rule] = encryption["ServerSideEncryptionConfiguration"]
        assert expected.items() <= rule["ServerSideEncryptionByDefault"].items()
    policy = stack.resources["BucketPolicy"]
    assert policy["Bucket"] == BUCKET
    [deny] = policy["PolicyDocument"]["Statement"]
    assert (deny["Effect"], deny["Action"], deny["Principal"]) == ("Deny", "s3:*", "*")
    assert deny["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert deny["Resource"] == [MADE["Bucket.Arn"], f"{MADE['Bucket.Arn']}/*"]


def test_copied_folders_expire_and_published_runs_do_not() -> None:
    """The rule that deletes objects covers where SageMaker copies to, and not where the job publishes runs."""
    stack = Stack()
    rules = stack.resources["Bucket"]["LifecycleConfiguration"]["Rules"]
    [expiring] = [rule for rule in rules if "ExpirationInDays" in rule]
    prefix = f"s3://{BUCKET}/{expiring['Prefix']}"
    place = {"role": stack.outputs["Role"], "root": stack.outputs["Root"], "region": "us-east-1"}
    copied = Order(job="j", run="r", image="i", copied=True, **place)
    published = Order(job="j", run="r", image="i", **place)
    assert build(copied, [])["CheckpointConfig"]["S3Uri"].startswith(prefix)
    assert not published.results.startswith(prefix)
    assert any("NoncurrentVersionExpiration" in rule for rule in rules)
    assert any("AbortIncompleteMultipartUpload" in rule for rule in rules)


def test_the_repository_does_not_change_its_mind() -> None:
    """A tag, once pushed, means the same image for ever; images are scanned, and old ones go."""
    repository = Stack().resources["Repository"]
    assert repository["ImageTagMutability"] == "IMMUTABLE"
    assert repository["ImageScanningConfiguration"] == {"ScanOnPush": True}
    assert len(json.loads(repository["LifecyclePolicy"]["LifecyclePolicyText"])["rules"]) == 2


# moto deploys all of the template but for this resource.
@pytest.mark.filterwarnings("ignore:Tried to parse AWS..S3..BucketPolicy:UserWarning")
def test_the_launcher_takes_the_stack(capsys: pytest.CaptureFixture[str]) -> None:
    """`--stack` gives role, root and key of what was deployed."""
    boto3.client("cloudformation").create_stack(
        StackName="qlora",
        TemplateBody=TEMPLATE.read_text(encoding="utf-8"),
        Parameters=[{"ParameterKey": name, "ParameterValue": value} for name, value in EVERYTHING.items()],
        Capabilities=["CAPABILITY_IAM"],
    )
    stack = launch.outputs(boto3.Session(), "qlora")
    assert stack.keys() == Stack(**EVERYTHING).outputs.keys()
    image = f"{stack['Repository']}@sha256:{'0' * 64}"
    assert launch.main(["--stack", "qlora", "--image", image, "--run", "r", "--dry-run"]) == 0
    request = json.loads(capsys.readouterr().out)
    assert request["RoleArn"] == stack["Role"]
    assert request["OutputDataConfig"] == {"S3OutputPath": stack["Root"] + "/sagemaker", "KmsKeyId": KEY}
    assert request["HyperParameters"]["run.output"] == stack["Root"] + "/runs"
    assert request["HyperParameters"]["storage.kms_key_id"] == KEY
