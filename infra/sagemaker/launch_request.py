"""The request for a training job from the user's order, and all problems of an order at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

DAY = 24 * 3600
MAX_SECONDS = 28 * DAY
# SageMaker's own limits: entries, characters of a name, characters of a value. botocore checks none of them.
HYPERPARAMETERS = (100, 256, 2500)
ENVIRONMENT = (100, 512, 512)
SECRET_NAME = re.compile(
    r"(TOKEN(?![A-Z])|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)(?!.*(FILE|DIR|PATH)$)", re.IGNORECASE
)
SECRET_VALUE = re.compile(r"hf_\w{20}|(AKIA|ASIA)[0-9A-Z]{16}|-----BEGIN|\bgh[pousr]_\w{20}")
NO_SECRETS = (
    "looks like a secret, and whoever may describe the job could read it. AWS credentials come from the role. For a "
    "gated model copy it into the bucket and give --channel model=s3://...; for a token keep it in an object there: "
    "--channel secrets=s3://.../hf-token --env HF_TOKEN_PATH=/opt/ml/input/data/secrets/hf-token"
)


@dataclass(frozen=True)
class Order:
    """The user's request. `root` is `s3://bucket/prefix`: the files of all runs are below it.

    `copied`: SageMaker copies the run's folder to S3; else the job publishes to S3 itself, and verifies it.
    """

    job: str
    run: str
    image: str
    role: str
    root: str
    region: str
    instance: str = "ml.g5.2xlarge"
    count: int = 1
    volume_gb: int = 100
    spot: bool = False
    max_run: int = DAY
    max_wait: int | None = None
    retries: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    channels: Mapping[str, str] = field(default_factory=dict)
    fast_file: bool = False
    copied: bool = False
    isolated: bool = False
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    kms_key: str | None = None
    volume_kms_key: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def results(self) -> str:
        """Location of the run's files."""
        if self.copied:
            return f"{self.root}/checkpoints/{self.run}/{self.run}"
        return f"{self.settings.get('run.output', self.root + '/runs')}/{self.run}"


def build(order: Order, metrics: list[dict[str, str]]) -> dict[str, Any]:
    """The parameters of `CreateTrainingJob`."""
    key = {"KmsKeyId": order.kms_key} if order.kms_key else {}
    mode = "FastFile" if order.fast_file else "File"
    stop = {"MaxRuntimeInSeconds": order.max_run}
    if order.spot:
        stop["MaxWaitTimeInSeconds"] = order.max_wait or min(2 * order.max_run, MAX_SECONDS)
    request: dict[str, Any] = {
        "TrainingJobName": order.job,
        "AlgorithmSpecification": {
            "TrainingImage": order.image,
            "TrainingInputMode": mode,
            "MetricDefinitions": metrics,
        },
        "RoleArn": order.role,
        "OutputDataConfig": {"S3OutputPath": f"{order.root}/sagemaker", **key},
        "ResourceConfig": {
            "InstanceType": order.instance,
            "InstanceCount": order.count,
            "VolumeSizeInGB": order.volume_gb,
            **({"VolumeKmsKeyId": order.volume_kms_key} if order.volume_kms_key else {}),
        },
        "StoppingCondition": stop,
        "EnableManagedSpotTraining": order.spot,
        "EnableNetworkIsolation": order.isolated,
        "HyperParameters": hyperparameters(order),
        "Environment": {"HF_HOME": "/tmp/huggingface", **order.environment},  # noqa: S108 - SageMaker's scratch disk
        "Tags": [{"Key": name, "Value": value} for name, value in {"qlora-job:run": order.run, **order.tags}.items()],
    }
    if order.channels:
        request["InputDataConfig"] = [_channel(name, uri, mode) for name, uri in order.channels.items()]
    if order.copied:  # by run, so that no job gets the checkpoints of another run
        request["CheckpointConfig"] = {
            "S3Uri": f"{order.root}/checkpoints/{order.run}",
            "LocalPath": "/opt/ml/checkpoints",
        }
    if order.subnets:
        request["VpcConfig"] = {"Subnets": list(order.subnets), "SecurityGroupIds": list(order.security_groups)}
    if order.retries:
        request["RetryStrategy"] = {"MaximumRetryAttempts": order.retries}
    return request


def hyperparameters(order: Order) -> dict[str, str]:
    """The job's settings, with the user's own last."""
    _, named, digest = order.image.rpartition("@")
    own: dict[str, str] = {"run.id": order.run, **({"run.image_digest": digest} if named else {})}
    if not order.copied:
        own |= {"run.output": f"{order.root}/runs", "storage.region": order.region}
        own |= {"storage.kms_key_id": order.kms_key} if order.kms_key else {}
    return own | dict(order.settings)


def _channel(name: str, uri: str, mode: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "InputMode": mode, "DataSource": {"S3DataSource": source}}


def problems(order: Order) -> Iterator[str]:
    """What is wrong with an order, each problem with its fix."""
    wait = order.max_wait
    checks = [
        (
            re.fullmatch(r".+@sha256:[0-9a-f]{64}", order.image),
            "--image: must be named by its digest, NAME@sha256:..., so that a resumed run has the same software",
        ),
        (
            re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^/]+)*", order.root),
            "--root: must be s3://bucket or s3://bucket/prefix (bucket: 3 to 63 characters); or give --stack",
        ),
        (order.role.startswith("arn:"), "--role: must be the ARN of the execution role; or give --stack"),
        ("run.id" not in order.settings, "--set run.id: is what --run is for"),
        (
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", order.run),
            "--run: must begin with a letter or digit and have at most 128 letters, digits, '.', '_' and '-'",
        ),
        (1 <= order.max_run <= MAX_SECONDS, "--max-run: must be between a second and 28 days"),
        (wait is None or order.spot, "--max-wait: is for --spot; add that, or drop it"),
        (
            wait is None or order.max_run <= wait <= MAX_SECONDS,
            "--max-wait: includes the time of running: it must be at least --max-run, and at most 28 days",
        ),
        (
            bool(order.subnets) == bool(order.security_groups),
            "--subnet, --security-group: a VPC takes both; give both, or none",
        ),
        (
            order.count == 1 or not order.copied,
            "--copied: each machine has its own folder, and a run needs one for all; drop it, or --count",
        ),
        (
            order.copied or not order.isolated,
            "--isolated: such a container cannot reach S3, so it cannot publish; add --copied",
        ),
        (
            all(uri.startswith("s3://") for uri in order.channels.values()),
            "--channel: must be NAME=s3://bucket/prefix",
        ),
    ]
    yield from (text for fine, text in checks if not fine)
    yield from _unfit("--set", hyperparameters(order), *HYPERPARAMETERS)
    yield from _unfit("--env", order.environment, *ENVIRONMENT)


def _unfit(what: str, values: Mapping[str, str], entries: int, name_length: int, length: int) -> Iterator[str]:
    """Problems of values: too many, too long, or secrets."""
    instead = "put settings into a file in a channel and name it, --set config=/opt/ml/input/data/CHANNEL/FILE"
    if len(values) > entries:
        yield f"{what}: SageMaker takes {entries} of them, these are {len(values)}; {instead}"
    for name, value in values.items():
        if len(name) > name_length or len(value) > length:
            yield f"{what} {name[:60]}: is longer than the {length} characters that SageMaker takes; {instead}"
        if SECRET_NAME.search(name) or SECRET_VALUE.search(value):
            yield f"{what} {name[:60]}: {NO_SECRETS}"
