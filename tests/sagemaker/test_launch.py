"""The launcher: its request checked with SageMaker's API model and a fake SageMaker; its logs and messages."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
import launch
import pytest
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    EndpointConnectionError,
    PartialCredentialsError,
    UnauthorizedSSOTokenError,
)
from botocore.stub import Stubber
from hypothesis import given, settings
from hypothesis import strategies as st
from launch_follow import EXIT_CODES, LOG_GROUP, Screen, follow, new_lines, outcome, show
from launch_request import ENVIRONMENT, HYPERPARAMETERS, Order, build, problems
from moto import mock_aws

from job.errors import exit_codes
from job.settings.load import load_settings
from job.settings.schema import NAMES
from tests.s3_server import CREDENTIALS

DIGEST = "sha256:" + "0" * 64
ROLE = "arn:aws:iam::123456789012:role/qlora-job"
IMAGE = f"123456789012.dkr.ecr.us-east-1.amazonaws.com/qlora-job@{DIGEST}"
ORDER = ["--image", IMAGE, "--role", ROLE, "--root", "s3://bucket/prefix", "--run", "my.run"]
METRICS = json.loads(launch.METRICS.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An AWS of our own, with made-up credentials."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with mock_aws():
        yield


@pytest.fixture
def shapes() -> Any:
    """The model of SageMaker's API that botocore has."""
    return boto3.client("sagemaker").meta.service_model


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """The request that an order makes."""
    assert launch.main([*ORDER, *words, "--dry-run"]) == 0, capsys.readouterr().err
    request: dict[str, Any] = json.loads(capsys.readouterr().out)
    return request


def refusals(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """What the launcher says of an order that it refuses."""
    assert launch.main([*ORDER, *words, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()


def violations(value: Any, shape: Any, path: str = "") -> Iterator[str]:
    """Where a value breaks limits of SageMaker's model that botocore does not enforce: lengths, patterns, choices."""
    limits = shape.metadata
    size = value if shape.type_name in {"integer", "long"} else len(value) if hasattr(value, "__len__") else 0
    if not limits.get("min", size) <= size <= limits.get("max", size):
        yield f"{path}: {size}"
    if shape.type_name == "string":
        pattern = re.sub(r"\\p\{\w+\}", r"\\w ", limits.get("pattern", ".*"))
        if not re.fullmatch(pattern, value, re.DOTALL) or (shape.enum and value not in shape.enum):
            yield f"{path}: {value}"
    elif shape.type_name == "structure":
        assert value.keys() <= shape.members.keys(), path
        for name, part in value.items():
            yield from violations(part, shape.members[name], f"{path}.{name}")
    elif shape.type_name == "list":
        for part in value:
            yield from violations(part, shape.member, f"{path}[]")
    elif shape.type_name == "map":
        for name, part in value.items():
            yield from violations(name, shape.key, f"{path}.{name}")
            yield from violations(part, shape.value, f"{path}.{name}")


class TestRequest:
    """What is sent."""

    def test_on_demand(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The plain case: the job publishes to S3 itself, one machine, a day at most, no spot."""
        request = dry_run(capsys, "--set", "train.epochs=3", "--channel", "training=s3://bucket/prefix/data/x.jsonl")
        assert re.fullmatch(r"my-run-\d{8}-\d{6}", request["TrainingJobName"])
        assert request["AlgorithmSpecification"]["TrainingImage"] == IMAGE
        assert request["HyperParameters"] == {
            "run.id": "my.run",
            "run.image_digest": DIGEST,
            "run.output": "s3://bucket/prefix/runs",
            "storage.region": "us-east-1",
            "train.epochs": "3",
        }
        assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 86400}
        assert not request["EnableManagedSpotTraining"]
        assert not {"CheckpointConfig", "VpcConfig", "RetryStrategy"} & request.keys()
        [channel] = request["InputDataConfig"]
        assert (channel["ChannelName"], channel["InputMode"]) == ("training", "File")

    def test_everything(self, capsys: pytest.CaptureFixture[str], shapes: Any) -> None:
        """Spot with its waits, VPC, keys, tags, retries, the platform's copy: all that can be ordered fits."""
        request = dry_run(
            capsys,
            *("--spot", "--max-run", "6h", "--max-wait", "6h", "--copied", "--isolated"),
            *("--subnet", "subnet-1", "--subnet", "subnet-2", "--security-group", "sg-1", "--retries", "3"),
            *("--kms-key", "arn:aws:kms:us-east-1:123456789012:key/1", "--volume-kms-key", "alias/disks"),
            *("--tag", "team=nlp", "--env", "HF_HUB_OFFLINE=1", "--fast-file", "--channel", "model=s3://bucket/m/"),
        )
        assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 21600, "MaxWaitTimeInSeconds": 21600}
        assert request["CheckpointConfig"]["S3Uri"] == "s3://bucket/prefix/checkpoints/my.run"
        assert "run.output" not in request["HyperParameters"]
        assert request["VpcConfig"] == {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]}
        assert request["Tags"][-1] == {"Key": "team", "Value": "nlp"}
        assert request["Environment"] == {"HF_HOME": "/tmp/huggingface", "HF_HUB_OFFLINE": "1"}
        assert list(violations(request, shapes.shape_for("CreateTrainingJobRequest"))) == []

    @pytest.mark.parametrize("run", ["a", "A.b_c-9", "x" * 128, "9" + "-" * 127])
    def test_any_run_makes_a_job_name(self, capsys: pytest.CaptureFixture[str], shapes: Any, run: str) -> None:
        """Names of runs are freer than those of training jobs, which must also be new each time."""
        name = dry_run(capsys, "--run", run)["TrainingJobName"]
        assert list(violations(name, shapes.shape_for("TrainingJobName"))) == []

    def test_spot_waits_longer_than_it_runs(self, capsys: pytest.CaptureFixture[str]) -> None:
        """SageMaker refuses a wait shorter than the run; what is not said is twice the run, within the 28 days."""
        assert dry_run(capsys, "--spot", "--max-run", "90m")["StoppingCondition"]["MaxWaitTimeInSeconds"] == 10800
        assert dry_run(capsys, "--spot", "--max-run", "28d")["StoppingCondition"]["MaxWaitTimeInSeconds"] == 28 * 86400

    def test_settings_however_they_are_spelled(self, capsys: pytest.CaptureFixture[str]) -> None:
        """What is checked here is what the container would read; paths of the container are not looked for here."""
        words = ["--set", "train-learning-rate=1e-4", "--set", "config=/opt/ml/input/data/conf/job.yaml"]
        request = dry_run(capsys, *words, "--set", "storage.cache=/proc/none", "--copied")
        assert request["HyperParameters"]["train-learning-rate"] == "1e-4"

    def test_the_job_understands_its_settings(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        """The hyperparameters that are sent are read by the container as the settings that were meant."""
        sent = dry_run(capsys, "--set", "train.epochs=3", "--kms-key", "key")["HyperParameters"]
        (tmp_path / "input/config").mkdir(parents=True)
        (tmp_path / "input/config/hyperparameters.json").write_text(json.dumps(sent), encoding="utf-8")
        settings = load_settings([], {"TRAINING_JOB_NAME": "job", "SAGEMAKER_BASE_DIR": str(tmp_path)})
        assert (settings.run.id, settings.run.output) == ("my.run", "s3://bucket/prefix/runs")
        assert (settings.storage.region, settings.storage.kms_key_id) == ("us-east-1", "key")
        assert settings.train.epochs == 3
        assert settings.checkpoint.settle_seconds == 0

    def test_limits_are_the_models(self, shapes: Any) -> None:
        """The limits that the launcher checks are those that SageMaker publishes."""
        members = shapes.shape_for("CreateTrainingJobRequest").members
        for limits, name in ((HYPERPARAMETERS, "HyperParameters"), (ENVIRONMENT, "Environment")):
            of = members[name]
            assert limits == (of.metadata["max"], of.key.metadata["max"], of.value.metadata["max"])
        assert list(violations(METRICS, shapes.shape_for("MetricDefinitionList"))) == []

    @settings(max_examples=20)
    @given(values=st.dictionaries(st.sampled_from(["run", "image", "root", "instance"]), st.text(max_size=20)))
    def test_any_order_is_checked(self, values: dict[str, str]) -> None:
        """No order makes the checks fail by themselves."""
        order = Order(
            **{"job": "j", "run": "r", "image": IMAGE, "role": ROLE, "root": "s3://b", "region": "r"} | values
        )
        assert build(order, METRICS)
        assert all(isinstance(problem, str) for problem in problems(order))


class TestRefusals:
    """What is not sent."""

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--image", "qlora-job:latest"], "--image: must be named by its digest"),
            (["--root", "bucket/prefix"], "--root: must be s3://bucket"),
            (["--role", "qlora-job"], "--role: must be the ARN"),
            (["--max-wait", "2d"], "--max-wait: is for --spot"),
            (["--spot", "--max-run", "2h", "--max-wait", "1h"], "--max-wait: includes the time of running"),
            (["--max-run", "29d"], "--max-run: must be between a second and 28 days"),
            (["--subnet", "subnet-1"], "a VPC takes both"),
            (["--isolated"], "--isolated: such a container cannot reach S3"),
            (["--copied", "--count", "2"], "--copied: each machine has its own folder"),
            (["--channel", "training=/data"], "--channel: must be NAME=s3://"),
            (["--set", "run.id=other"], "--set run.id: is what --run is for"),
            (["--set", "data.source=" + "x" * 2501], "is longer than the 2500 characters"),
            (["--env", "A=" + "x" * 513], "is longer than the 512 characters"),
            (
                ["--instance", "ml.g5.2xlarge", "--retries", "-1"],
                "Invalid value for parameter RetryStrategy.MaximumRetryAttempts",
            ),
            (
                ["--set", "train.epocs=3"],
                "hyperparameters.json train.epocs: is not a setting; the nearest is train.epochs",
            ),
            (["--env", "JOB_TRAIN__EPOCHS=none"], "JOB_TRAIN__EPOCHS (environment): must"),
        ],
    )
    def test_mistakes(self, capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
        """Each is named with its place and the way to mend it, and nothing is sent."""
        assert any(expected in line for line in refusals(capsys, *words))

    def test_all_at_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        """An order with several mistakes is answered with all of them."""
        assert len(refusals(capsys, "--image", "x", "--isolated", "--max-run", "29d", "--set", "a=1")) == 4

    def test_too_many(self, capsys: pytest.CaptureFixture[str]) -> None:
        """More settings than SageMaker takes are told to go into a file."""
        words = [word for n in range(101) for word in ("--env", f"A_{n}=1")]
        [line] = refusals(capsys, *words)
        assert line.startswith("--env: SageMaker takes 100 of them, these are 101; put settings into a file")

    @pytest.mark.parametrize(
        ("flag", "name", "value"),
        [
            ("--env", "HF_TOKEN", "short"),
            ("--env", "AWS_SECRET_ACCESS_KEY", "x"),
            ("--env", "WANDB_API_KEY", "x"),
            ("--env", "DB_PASSWORD", "x"),
            ("--env", "HARMLESS", "hf_abcdefghijklmnopqrstuvwxyz"),
            ("--env", "HARMLESS", "AKIAABCDEFGHIJKLMNOP"),
            ("--set", "hf_token", "short"),
            ("--set", "data.source", "hf_abcdefghijklmnopqrstuvwxyz"),
        ],
    )
    def test_secrets(self, capsys: pytest.CaptureFixture[str], flag: str, name: str, value: str) -> None:
        """A request shows its values to everybody who may describe the job: secrets are refused, and not repeated."""
        said = "\n".join(refusals(capsys, flag, f"{name}={value}"))
        assert f"{flag} {name}: looks like a secret" in said
        assert "--channel secrets=" in said
        if len(value) > 5:
            assert value not in said

    @pytest.mark.parametrize(
        "words",
        [
            ["--set", "train.micro_batch_tokens=1024"],
            ["--set", "eval.batch_tokens=1024"],
            ["--env", "TOKENIZERS_PARALLELISM=false"],
            ["--env", "HF_TOKEN_PATH=/opt/ml/input/data/secrets/hf-token"],
        ],
    )
    def test_what_only_sounds_like_one(self, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
        """Counts of tokens, and the path of a file that holds one, are no secrets."""
        dry_run(capsys, *words)

    def test_the_hub_reads_a_token_from_that_file(self, tmp_path: Path) -> None:
        """The way that the refusal names works: the hub's client takes its token from the file in HF_TOKEN_PATH."""
        (tmp_path / "hf-token").write_text("from-the-file\n", encoding="utf-8")
        read = "from huggingface_hub import get_token; print(get_token())"
        environment = {"PATH": os.environ["PATH"], "HF_TOKEN_PATH": str(tmp_path / "hf-token")}
        done = subprocess.run([sys.executable, "-c", read], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == "from-the-file\n"


class TestFollowing:
    """What happens after the request is sent."""

    def test_to_the_end(self, capsys: pytest.CaptureFixture[str]) -> None:
        """With --wait the log is shown until the job is complete, then its model and its results."""
        logs = boto3.client("logs")
        logs.create_log_group(logGroupName=LOG_GROUP)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "follow", with_log(logs, '{"event": "model is loaded", "level": "info"}'))
            assert launch.main([*ORDER, "--wait", "--spot"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith("training job my-run-")
        assert any("model is loaded" in line for line in said)
        assert said[-2].startswith("model: s3://bucket/prefix/sagemaker/my-run-")
        assert said[-1] == "results: s3://bucket/prefix/runs/my.run/results.json"
        [job] = boto3.client("sagemaker").list_training_jobs()["TrainingJobSummaries"]
        sent = boto3.client("sagemaker").describe_training_job(TrainingJobName=job["TrainingJobName"])
        assert sent["EnableManagedSpotTraining"]
        assert sent["HyperParameters"]["run.id"] == "my.run"

    def test_states_and_streams(self) -> None:
        """Each state is told once; a job that was interrupted has a second stream, whose lines are shown, too."""
        logs = boto3.client("logs")
        logs.create_log_group(logGroupName=LOG_GROUP)
        write(logs, "job/algo-1-100", "first")
        write(logs, "other/algo-1-100", "of another job")
        sagemaker = boto3.client("sagemaker")
        states = [("InProgress", "Training"), ("InProgress", "Interrupted"), ("InProgress", "Training")]
        with Stubber(sagemaker) as stub:
            for status, secondary in [*states, ("Completed", "Completed")]:
                stub.add_response(
                    "describe_training_job", described(TrainingJobStatus=status, SecondaryStatus=secondary)
                )
            out = io.StringIO()
            screen = Screen(out)
            seen = 0

            def write_more(text: str) -> None:
                nonlocal seen
                seen += 1
                if "Interrupted" in text:
                    write(logs, "job/algo-1-200", "second")
                Screen.line(screen, text)

            screen.line = write_more  # type: ignore[method-assign]
            job = follow(sagemaker, logs, "job", screen, pause=0)
        assert job["TrainingJobStatus"] == "Completed"
        lines = out.getvalue().splitlines()
        assert lines == ["[Training]", "first", "[Interrupted]", "second", "[Training]", "[Completed]"]

    def test_a_job_without_a_log_yet(self) -> None:
        """Before the first job of an account writes, there is no group of logs; that is no error."""
        assert list(new_lines(boto3.client("logs"), "job", {})) == []

    def test_a_refused_log_is_an_error(self) -> None:
        """Only absence is taken for absence."""
        logs = boto3.client("logs")
        with Stubber(logs) as stub:
            stub.add_client_error("describe_log_streams", "AccessDeniedException")
            with pytest.raises(ClientError):
                list(new_lines(logs, "job", {}))

    def test_lines_for_eyes(self) -> None:
        """A line of the job's log becomes readable; progress stays on one line of a terminal; the rest is untouched."""
        out = Terminal()
        screen = Screen(out)
        step = {"done": 3, "total": 24, "loss": 1.5, "event": "steps", "stage": "train", "level": "info"}
        show(json.dumps(step | {"timestamp": "2026-11-24T11:36:12Z", "run": "r", "attempt": 1}), screen)
        show(json.dumps({"event": "Unreachable", "level": "error", "why": "503"}), screen)
        show("arc_easy, 20 questions: accuracy 45.00 % -> 40.00 %", screen)
        show("[1, 2]", screen)
        assert out.getvalue().replace("\r\033[K", "|") == (
            "|11:36:12 train            steps 3/24  loss 1.5"
            "|                  error: Unreachable  why 503\n"
            "|arc_easy, 20 questions: accuracy 45.00 % -> 40.00 %\n"
            "|[1, 2]\n"
        )


class TestOutcome:
    """What the end of a job means."""

    def test_the_table_is_the_jobs(self) -> None:
        """The launcher knows the exit codes as `errors.py` has them."""
        assert exit_codes() == EXIT_CODES

    @pytest.mark.parametrize("code", EXIT_CODES)
    def test_reasons_become_exit_codes(self, code: int) -> None:
        """The code is read from the failure file's words, as SageMaker frames them; retry is offered where it helps."""
        reason = f"AlgorithmError: SomeError (exit code {code}): why, exit code: {code}"
        found, lines = ended(TrainingJobStatus="Failed", SecondaryStatus="Failed", FailureReason=reason)
        assert found == code
        assert EXIT_CODES[code][0] in "\n".join(lines)
        assert ("to go on: again" in lines) == (EXIT_CODES[code][1] != "no")

    @pytest.mark.parametrize(
        ("reason", "code"),
        [
            ("AlgorithmError: , exit code: 137", 137),
            ("AlgorithmError: exit code: 2", 2),
            ("InternalServerError: We encountered an internal error.", 1),
            ("ClientError: Data download failed", 1),
        ],
    )
    def test_reasons_of_others(self, reason: str, code: int) -> None:
        """A job that left no words has SageMaker's; a failure of SageMaker's own is not called a bug of the job."""
        found, lines = ended(TrainingJobStatus="Failed", SecondaryStatus="Failed", FailureReason=reason)
        assert found == code
        assert f"failed: {reason}" in lines
        assert ("a bug" in "\n".join(lines)) is False

    @pytest.mark.parametrize("why", ["MaxRuntimeExceeded", "MaxWaitTimeExceeded", "Stopped"])
    def test_stopped(self, why: str) -> None:
        """A job that was stopped is one that was preempted: the same run can go on."""
        code, lines = ended(TrainingJobStatus="Stopped", SecondaryStatus=why)
        assert code == 75
        assert f"stopped: {why}; what was published is kept in s3://b/runs/r" in lines
        assert "to go on: again" in lines

    def test_savings(self) -> None:
        """SageMaker's own formula, for managed spot alone."""
        times = {"TrainingTimeInSeconds": 500, "BillableTimeInSeconds": 100, "EnableManagedSpotTraining": True}
        _, lines = ended(**times)
        assert lines[0] == "500 s of training, 100 s to pay for on each of 2 machine(s), 80 % saved"
        _, lines = ended(**times | {"EnableManagedSpotTraining": False})
        assert "saved" not in lines[0]


class TestErrors:
    """What AWS refuses."""

    @pytest.mark.parametrize(
        ("code", "exit_code", "hint"),
        [
            ("ResourceLimitExceeded", 2, "Service Quotas"),
            ("AccessDeniedException", 77, ""),
            ("ExpiredTokenException", 77, ""),
            ("UnrecognizedClientException", 77, ""),
            ("InvalidSignatureException", 77, ""),
            ("ThrottlingException", 69, ""),
            ("RequestLimitExceeded", 69, ""),
            ("InternalFailure", 69, ""),
            ("ValidationException", 2, "--dry-run"),
        ],
    )
    def test_refusals_of_sagemaker(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        code: str,
        exit_code: int,
        hint: str,
    ) -> None:
        """No traceback: what AWS says, what to do, and a code that tells a refusal from a mistake."""

        def refuse(*_: Any, **__: Any) -> None:
            raise ClientError({"Error": {"Code": code, "Message": "no"}}, "CreateTrainingJob")

        monkeypatch.setattr("botocore.client.BaseClient._make_api_call", refuse)
        assert launch.main(ORDER) == exit_code
        said = capsys.readouterr().err
        assert said.startswith(f"{code}: no")
        assert hint in said

    @pytest.mark.parametrize(("status", "exit_code"), [(400, 2), (403, 77), (429, 69), (500, 69), (503, 69)])
    def test_unknown_words_of_aws(self, monkeypatch: pytest.MonkeyPatch, status: int, exit_code: int) -> None:
        """An error that the launcher does not know by name is judged by its HTTP status."""
        answer = {"Error": {"Code": "Strange"}, "ResponseMetadata": {"HTTPStatusCode": status}}

        def refuse(*_: Any, **__: Any) -> None:
            raise ClientError(answer, "CreateTrainingJob")

        monkeypatch.setattr("botocore.client.BaseClient._make_api_call", refuse)
        assert launch.main(ORDER) == exit_code

    @pytest.mark.parametrize(
        "error",
        [
            CredentialRetrievalError(provider="process", error_msg="no"),
            PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"),
            UnauthorizedSSOTokenError(),
        ],
    )
    def test_credentials_that_cannot_be_had(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BotoCoreError
    ) -> None:
        """A login that has expired or is half given is a matter of access, not of settings."""

        def refuse(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr("botocore.client.BaseClient._make_api_call", refuse)
        assert launch.main(ORDER) == 77
        assert "log in again, or give --profile" in capsys.readouterr().err

    def test_no_region(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a region nothing is guessed."""
        monkeypatch.delenv("AWS_DEFAULT_REGION")
        assert launch.main([*ORDER, "--dry-run"]) == 2
        assert capsys.readouterr().err == "no AWS region: give --region\n"

    def test_no_such_profile(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A profile that is not there is told in a line."""
        assert launch.main([*ORDER, "--profile", "none"]) == 2
        assert "none" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (KeyboardInterrupt(), 130),
            (EndpointConnectionError(endpoint_url="https://logs"), 69),
            (ClientError({"Error": {"Code": "AccessDeniedException", "Message": "no logs"}}, "GetLogEvents"), 69),
        ],
    )
    def test_no_longer_followed(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: Any, error: BaseException, code: int
    ) -> None:
        """Ctrl-C, a lost network or a log that may not be read end the following, not the job, and say so."""

        def interrupt(*_: Any) -> None:
            raise error

        monkeypatch.setattr(launch, "follow", interrupt)
        assert launch.main([*ORDER, "--wait"]) == code
        assert (
            "aws sagemaker stop-training-job --region us-east-1 --training-job-name my-run-" in capsys.readouterr().err
        )


def test_the_page_tells_what_there_is() -> None:
    """Options and settings that the README names are the launcher's and the job's."""
    text = launch.METRICS.with_name("README.md").read_text(encoding="utf-8")
    ours = text.replace("aws ecr get-login-password", "").partition("## Clean up")[0]
    options = {option for action in launch.parser()._actions for option in action.option_strings}
    others = {"--stack-name", "--template-file", "--capabilities", "--output", "--query", "--username"}
    others |= {"--password-stdin", "--build-arg"}
    assert set(re.findall(r"--[a-z][a-z-]+", ours)) <= options | others
    settings = {one or other for one, other in re.findall(r"--set ([a-z_.]+)=|`((?:data|model|eval)\.[a-z_]+)`", text)}
    assert {"train.epochs", "data.source"} <= settings <= {*NAMES, "config"}


def test_a_tag_becomes_a_digest() -> None:
    """An image of ECR that is named by its tag is pinned to what the tag means now."""
    ecr = boto3.client("ecr")
    ecr.create_repository(repositoryName="qlora-job")
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": {}, "layers": []})
    put = ecr.put_image(repositoryName="qlora-job", imageManifest=manifest, imageTag="v1")["image"]
    name = "123456789012.dkr.ecr.us-east-1.amazonaws.com/qlora-job"
    found = launch.by_digest(boto3.Session(), f"{name}:v1")
    assert found == f"{name}@{put['imageId']['imageDigest']}"
    assert launch.by_digest(boto3.Session(), IMAGE) == IMAGE


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        """See `TextIO.isatty`."""
        return True


def with_log(logs: Any, *lines: str) -> Any:
    """`follow`, but the job has written these lines by then."""

    def following(sagemaker: Any, client: Any, name: str, screen: Screen, pause: float) -> dict[str, Any]:
        write(logs, f"{name}/algo-1-100", *lines)
        return follow(sagemaker, client, name, screen, 0)

    return following


def write(logs: Any, stream: str, *lines: str) -> None:
    """Writes lines into a stream as SageMaker does."""
    logs.create_log_stream(logGroupName=LOG_GROUP, logStreamName=stream)
    now = int(time.time() * 1000)
    events = [{"timestamp": now + n, "message": line} for n, line in enumerate(lines)]
    logs.put_log_events(logGroupName=LOG_GROUP, logStreamName=stream, logEvents=events)


def described(**changes: Any) -> dict[str, Any]:
    """A description of a job, with what every one has."""
    return {
        "TrainingJobName": "job",
        "TrainingJobArn": "arn:aws:sagemaker:us-east-1:123456789012:training-job/job",
        "ModelArtifacts": {"S3ModelArtifacts": "s3://b/sagemaker/job/output/model.tar.gz"},
        "TrainingJobStatus": "Completed",
        "SecondaryStatus": "Completed",
        "AlgorithmSpecification": {"TrainingInputMode": "File"},
        "ResourceConfig": {"InstanceCount": 2},
        "StoppingCondition": {},
        "CreationTime": "2026-11-24T00:00:00Z",
        **changes,
    }


def ended(**changes: Any) -> tuple[int, list[str]]:
    """What the launcher makes of the end of a job."""
    job: Mapping[str, Any] = described(**changes)
    return outcome(job, "s3://b/runs/r", "again")
