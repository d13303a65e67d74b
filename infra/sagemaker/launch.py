"""Starts a run as a SageMaker training job, on demand or on managed spot, and follows it. Needs only boto3.

    python infra/sagemaker/launch.py --stack qlora-job --image REPOSITORY@sha256:... --run my-run --spot --wait

Settings of the job are given by `--set train.epochs=3` (as hyperparameters) or `--env JOB_TRAIN__EPOCHS=3`. The same
`--run` again resumes that run. Exit codes are those of the job's own table (README); with `--wait`, the job's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError, HTTPClientError, NoCredentialsError
from botocore.validate import ParamValidator
from launch_follow import Screen, follow, outcome
from launch_request import DAY, Order, build, hyperparameters, problems

METRICS = Path(__file__).with_name("metrics.json")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": DAY}
SETTINGS, UNREACHABLE, DENIED, INTERRUPTED = 2, 69, 77, 130
AS_GIVEN = (
    *("instance", "count", "volume_gb", "spot", "max_run", "max_wait", "retries"),
    *("fast_file", "copied", "isolated", "volume_kms_key"),
)
# AWS's codes for throttled requests, with any HTTP status, and for unknown credentials.
THROTTLED = re.compile(r"Throttl|TooManyRequests|RequestLimitExceeded|SlowDown|ServiceUnavailable|InternalFailure")
REFUSED = re.compile(
    "Denied|Expired|NotAuthorized|Unauthorized|AuthFailure|UnrecognizedClient|InvalidClientTokenId|OptInRequired"
    "|InvalidAccessKeyId|InvalidSignature|SignatureDoesNotMatch|IncompleteSignature|MissingAuthenticationToken|InvalidToken"
)
HINTS = {
    "ResourceLimitExceeded": "request more in Service Quotas, SageMaker: '<instance> for (spot) training job usage'",
    "ResourceInUse": "a job of this name exists; wait a second and start again",
    "ValidationException": "SageMaker refuses the request; --dry-run shows it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    given = parser().parse_args(arguments)
    try:
        return launch(given)
    except ClientError as error:
        code = error.response["Error"]["Code"]
        hint = next((text for name, text in HINTS.items() if code.startswith(name)), "")
        return fail([f"{code}: {error.response['Error'].get('Message', '')}", hint], meaning(error))
    except (EndpointConnectionError, HTTPClientError) as error:
        return fail([str(error)], UNREACHABLE)
    except NoCredentialsError:
        return fail(["no AWS credentials: log in, or give --profile"], DENIED)
    except BotoCoreError as error:
        # By name: older versions of botocore do not have all of them.
        if re.search("Credential|Token|SSO|Login", type(error).__name__):
            return fail([str(error), "log in again, or give --profile"], DENIED)
        return fail([str(error)], SETTINGS)


def meaning(error: ClientError) -> int:
    """The exit code for an answer of AWS: retry, not allowed, or a mistake in the request."""
    code, status = error.response["Error"]["Code"], error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if THROTTLED.search(code) or status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return UNREACHABLE
    return DENIED if REFUSED.search(code) or status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN} else SETTINGS


def launch(given: argparse.Namespace) -> int:
    """Checks and sends the request, and with --wait follows the job."""
    session = boto3.Session(profile_name=given.profile, region_name=given.region)
    if session.region_name is None:
        return fail(["no AWS region: give --region"], SETTINGS)
    order = read_order(given, session)
    request = build(order, json.loads(METRICS.read_text(encoding="utf-8")))
    sagemaker = session.client("sagemaker")
    shape = sagemaker.meta.service_model.operation_model("CreateTrainingJob").input_shape
    report = ParamValidator().validate(request, shape)
    wrong = [*problems(order), *([report.generate_report()] if report.has_errors() else []), *check_settings(order)]
    if wrong:
        return fail(wrong, SETTINGS)
    if given.dry_run:
        sys.stdout.write(json.dumps(request, indent=2) + "\n")
        return 0
    sagemaker.create_training_job(**request)
    screen = Screen()
    screen.line(f"training job {order.job} of run {order.run}, in {order.region}; results: {order.results}")
    return see_through(order, sagemaker, session.client("logs"), screen, given.pause) if given.wait else 0


def see_through(order: Order, sagemaker: Any, logs: Any, screen: Screen, pause: float) -> int:
    """Follows the job to its end, and prints the outcome."""
    stop = f"aws sagemaker stop-training-job --region {order.region} --training-job-name {order.job}"
    goes_on = f"the job continues, and is no longer followed; to stop it: {stop}"
    try:
        job = follow(sagemaker, logs, order.job, screen, pause)
    except KeyboardInterrupt:
        return fail([goes_on], INTERRUPTED)
    except (BotoCoreError, ClientError) as error:
        return fail([str(error), goes_on], UNREACHABLE)
    code, lines = outcome(job, order.results, f"the same command with --run {order.run}")
    for line in lines:
        screen.line(line)
    return code


def read_order(given: argparse.Namespace, session: Any) -> Order:
    """The user's request, completed with the values of the stack and the registry."""
    stack = outputs(session, given.stack) if given.stack else {}
    now = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    run = given.run or f"qlora-{now}"
    slug = re.sub(r"[^A-Za-z0-9]+", "-", run).strip("-")[: 62 - len(now)].rstrip("-") or "run"
    return Order(
        job=f"{slug}-{now}" if given.run else slug,
        run=run,
        image=by_digest(session, given.image),
        role=given.role or stack.get("Role", ""),
        root=(given.root or stack.get("Root", "")).rstrip("/"),
        region=session.region_name,
        kms_key=given.kms_key or stack.get("Key") or None,
        subnets=tuple(given.subnet),
        security_groups=tuple(given.security_group),
        settings=dict(given.set),
        environment=dict(given.env),
        channels=dict(given.channel),
        tags=dict(given.tag),
        **{name: getattr(given, name) for name in AS_GIVEN},
    )


def outputs(session: Any, stack: str) -> dict[str, str]:
    """The outputs of the CloudFormation stack of `template.yaml`."""
    found = session.client("cloudformation").describe_stacks(StackName=stack)["Stacks"][0]
    return {output["OutputKey"]: output["OutputValue"] for output in found.get("Outputs", ())}


def by_digest(session: Any, image: str) -> str:
    """The name of an ECR image by digest instead of tag; any other name unchanged."""
    match = re.fullmatch(r"((\d{12})\.dkr\.ecr\.[^/]+/([^:@]+)):([^:@]+)", image)
    if match is None:
        return image
    found = session.client("ecr").describe_images(
        registryId=match[2], repositoryName=match[3], imageIds=[{"imageTag": match[4]}]
    )
    return f"{match[1]}@{found['imageDetails'][0]['imageDigest']}"


def check_settings(order: Order) -> list[str]:
    """Checks the settings with the job itself, if it is installed here: a typo is found before a machine starts."""
    try:
        from job.errors import SettingsError
        from job.settings.load import load_settings
    except ImportError:
        return []
    environment = {name: value for name, value in order.environment.items() if name.startswith("JOB_")}
    with tempfile.TemporaryDirectory() as base:
        given = Path(base, "input/config/hyperparameters.json")
        given.parent.mkdir(parents=True)
        given.write_text(json.dumps(hyperparameters(order)), encoding="utf-8")
        # Paths are those of the container, so they cannot be checked here.
        apart = ["--config=", "--storage.cache=", "--run.output=s3://checked/elsewhere"]
        try:
            load_settings(apart, {**environment, "TRAINING_JOB_NAME": order.job, "SAGEMAKER_BASE_DIR": base})
        except SettingsError as error:
            return [str(problem) for problem in error.problems]
    return []


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--image", required=True, help="repository@sha256:... (for a tag in ECR the digest is looked up)")
    add("--stack", help="CloudFormation stack of template.yaml: gives role, root and key")
    add("--role", help="ARN of the execution role")
    add("--root", help="s3://bucket[/prefix] for everything of all runs")
    add("--run", help="name of the run; the same name again resumes it")
    add("--instance", default=Order.instance, help="default: %(default)s")
    add("--count", type=int, default=1, help="machines; default: 1")
    add("--volume-gb", type=int, default=Order.volume_gb, help="disk; default: %(default)s")
    add("--spot", action="store_true", help="managed spot: cheaper, interrupted and resumed by SageMaker")
    add("--max-run", type=seconds, default=DAY, help="such as 90m, 6h, 2d; default: 1d")
    add("--max-wait", type=seconds, help="with --spot: running and waiting together; default: twice --max-run")
    add("--retries", type=int, default=0, help="after errors of SageMaker's own")
    add("--set", type=pair, action="append", default=[], metavar="NAME=VALUE", help="a setting, train.epochs=3")
    add("--env", type=pair, action="append", default=[], metavar="NAME=VALUE", help="environment of the container")
    add(
        "--channel",
        type=pair,
        action="append",
        default=[],
        metavar="NAME=URI",
        help="training, validation, model, evaluation",
    )
    add("--fast-file", action="store_true", help="stream the channels instead of copying them first")
    add("--copied", action="store_true", help="SageMaker copies the run to S3, instead of the job itself")
    add("--isolated", action="store_true", help="no network for the container; needs --copied")
    add("--subnet", action="append", default=[], help="of a VPC; repeat for more")
    add("--security-group", action="append", default=[])
    add("--kms-key", help="key for what is written to S3")
    add("--volume-kms-key", help="key for the disk; not for instances with disks of their own (g4dn, g5, g6, p4d, p5)")
    add("--tag", type=pair, action="append", default=[], metavar="KEY=VALUE")
    add("--region")
    add("--profile")
    add("--dry-run", action="store_true", help="print the request as JSON and send nothing")
    add("--wait", action="store_true", help="follow the job to its end")
    add("--pause", type=float, default=10.0, help=argparse.SUPPRESS)
    return made


def pair(text: str) -> tuple[str, str]:
    """`NAME=VALUE`."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError("must be NAME=VALUE")
    return name, value


def seconds(text: str) -> int:
    """`90m` -> 5400."""
    match = re.fullmatch(r"(\d{1,9})([smhd]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError("must be a number of seconds, or such as 90m, 6h, 2d")
    return int(match[1]) * UNITS[match[2] or "s"]


def fail(lines: Sequence[str], code: int) -> int:
    """Prints what is wrong."""
    sys.stderr.write("".join(f"{line}\n" for line in lines if line))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
