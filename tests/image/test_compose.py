"""The Compose file's services, run by plain `docker run` with its values, on a network without internet access."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from tests.image.engine import DOCKER, IMAGE, Engine, docker, variables

FILE = Path(__file__).parents[2] / "infra/docker/compose.yaml"
BASE = os.environ.get("BASE_IMAGE")
pytestmark = pytest.mark.timeout(600)

# Reads all that the run published, with the job's own boto3; the secret comes by standard input.
READ_BACK = """
import boto3, hashlib, json, sys
secret, s3, found = sys.stdin.read().strip().encode(), boto3.client("s3"), {}
for page in s3.get_paginator("list_objects_v2").paginate(Bucket="runs"):
    for item in page["Contents"]:
        body = s3.get_object(Bucket="runs", Key=item["Key"])["Body"].read()
        assert secret not in body, item["Key"]
        found[item["Key"]] = hashlib.sha256(body).hexdigest()
        if item["Key"].endswith("/results.json"):
            results = json.loads(body)
json.dump({"found": found, "results": results}, sys.stdout)
"""


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    """The file's services, with variables at their defaults but for the image's name."""
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: IMAGE if m[1] == "IMAGE" else m[2], FILE.read_text("utf-8"))
    return yaml.safe_load(text)["services"]


@pytest.fixture
def s3_image(services: dict[str, dict[str, Any]]) -> str:
    """The server's image; where no registry can be reached, the same version of moto on the image's own base."""
    image: str = services["s3"]["image"]
    if not BASE:
        return image
    name, version = "qlora-job-test-moto", image.rpartition(":")[2]
    recipe = f"""FROM {BASE}
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && python3 -m venv /opt/moto
RUN /opt/moto/bin/pip install -q --no-cache-dir "moto[s3,server]=={version}"
ENTRYPOINT ["/opt/moto/bin/moto_server", "-H0.0.0.0"]
"""
    docker("build", "--tag", name, "-", stdin=recipe, timeout=300)
    return name


def options(service: dict[str, Any], network: str, name: str, engine: Engine) -> tuple[list[str], list[str]]:
    """What `docker run` makes of a service: options, and words behind the image. An unknown key is an error."""
    rest = dict(service)
    for ignored in ("image", "depends_on"):
        rest.pop(ignored, None)
    found = ["--network", network, "--network-alias", name, *variables(rest.pop("environment", {}))]
    entrypoint = rest.pop("entrypoint", [])
    found += ["--entrypoint", entrypoint[0]] if entrypoint else []
    found += ["--read-only"] if rest.pop("read_only", False) else []
    found += [word for place in rest.pop("tmpfs", []) for word in ("--tmpfs", place)]
    found += [word for what in rest.pop("cap_drop", []) for word in ("--cap-drop", what)]
    found += [word for what in rest.pop("security_opt", []) for word in ("--security-opt", what)]
    found += ["--shm-size", rest.pop("shm_size", "64m")]
    found += ["--stop-timeout", rest.pop("stop_grace_period", "10s").removesuffix("s")]
    for volume in rest.pop("volumes", []):
        found += ["--volume", f"{engine.volume()}:{volume.partition(':')[2]}"]
    for secret in rest.pop("secrets", []):
        file = FILE.parent / yaml.safe_load(FILE.read_text("utf-8"))["secrets"][secret]["file"]
        found += ["--volume", f"{file}:/run/secrets/{secret}:ro"]
    assert rest == {}
    return found, entrypoint[1:]


def test_the_services_as_written(engine: Engine, services: dict[str, dict[str, Any]], s3_image: str) -> None:
    """The job publishes to the server in the other container; its secret is in no log, no object, no inspection."""
    network = engine.network()
    (server, _), (bucket, words) = (options(services[name], network, name, engine) for name in ("s3", "bucket"))
    engine.start(*server, image=s3_image)
    made = engine.start(*bucket, words=words, image=services["bucket"]["image"])
    assert made.end() == 0, made.text
    job, _ = options(services["job"], network, "job", engine)
    container = engine.start(*job, JOB_TRAIN__MAX_STEPS="4", JOB_EVAL__LIMIT="50")
    assert container.end() == 0, container.text[-3000:]
    secret = (FILE.parent / "example-secret-key").read_text("utf-8").strip()
    read = ["run", "--rm", "--interactive", "--name", engine.name(), *bucket, IMAGE, "-c", READ_BACK]
    answer = json.loads(docker(*read, stdin=secret))
    results, found = answer["results"], answer["found"]
    assert results["run"]["status"] == "complete"
    for artifact in results["artifacts"]:
        assert found[f"compose/{artifact['path']}"] == artifact["sha256"], artifact["path"]
    assert secret not in container.text
    assert secret not in docker("inspect", container.name)


def test_the_documented_command(s3_image: str, tmp_path: Path) -> None:
    """`docker compose run --rm job` of Compose itself: server and bucket are there first, and the code is the job's."""
    program = shlex.split(os.environ.get("COMPOSE", "")) or [DOCKER, "compose"]
    if subprocess.run([*program, "version"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker Compose: COMPOSE names the program where `docker compose` is none")
    override = tmp_path / "override.yaml"
    override.write_text(yaml.safe_dump({"services": {"s3": {"image": s3_image}}}), encoding="utf-8")
    page = (FILE.parent / "README.md").read_text(encoding="utf-8")
    (words,) = re.findall(r"^docker compose -f infra/docker/compose.yaml (run .+)$", page, re.MULTILINE)
    command = [*program, "-p", f"qlora-job-test-{uuid4().hex[:12]}", "-f", str(FILE), "-f", str(override)]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environ = os.environ | {"IMAGE": IMAGE}
        return subprocess.run(
            [*command, *arguments], env=environ, capture_output=True, text=True, timeout=400, check=False
        )

    options = [*shlex.split(words)[:-1], "-T", "-e", "JOB_EVAL__LIMIT=20"]
    try:
        done = run(*options, "-e", "JOB_TRAIN__MAX_STEPS=2", "job")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "results: s3://runs/compose/results.json" in done.stdout
        again = run(*options, "-e", "JOB_TRAIN__MAX_STEPS=3", "job")
        assert again.returncode == 2, again.stderr[
            -3000:
        ]  # the run is known, and was made with another number of steps
        assert "JOB_TRAIN__MAX_STEPS" in again.stderr
    finally:
        run("down", "--volumes", "--timeout", "1")


def test_grace_and_patience(services: dict[str, dict[str, Any]]) -> None:
    """Docker waits longer than the job takes to leave."""
    job = services["job"]
    assert int(job["stop_grace_period"].removesuffix("s")) > float(job["environment"]["JOB_RUN__GRACE_SECONDS"])
