"""Whole signed runs, with exports on S3 and with two stages: killed in between, they verify with the signer's key."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import boto3
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from job.common.hashing import sealed
from job.runs.layout import facts_of
from tests import warm
from tests.chaos.small import CONFIGURATIONS, settings
from tests.integration.whole_runs import attempt
from tests.published_run import rewrite
from tests.s3_server import BUCKET, CREDENTIALS, credentials, moto_server
from tests.unit.verification.test_signature import write_key

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """The signer's key, and one of somebody else: files with the private and the public half."""
    folder = tmp_path_factory.mktemp("keys")
    return {name: write_key(folder, name, ec.generate_private_key(ec.SECP256R1())) for name in ("signer", "other")}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, keys: dict[str, tuple[str, str]]) -> dict[str, str]:
    """A signed run of two steps."""
    found = settings(tmp_path_factory.mktemp("signed"), rows=8, questions=12)
    return {**found, "JOB_TRAIN__MAX_STEPS": "2", "JOB_SIGN__KEY": keys["signer"][0]}


def verified(run: str, key: str, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and output of `verify`."""
    done = warm.run(["verify", run, "--key", key], {**os.environ, **environment})
    return done.returncode, done.stdout + done.stderr


def test_exports_on_s3(environment: dict[str, str], keys: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    """Killed in the export and while it is published: the signatures cover all that is there, and one byte is found."""
    with credentials(), moto_server() as url:
        given = {
            **environment,
            **CREDENTIALS,
            "JOB_STORAGE__ENDPOINT_URL": url,
            "JOB_RUN__OUTPUT": f"s3://{BUCKET}/out",
        }
        given |= {"JOB_RUN__ID": "signed", "JOB_EXPORT__FORMATS": "adapter:bf16,merged"}
        faults = "kill@stage=export,kill@stage=publish"
        codes = [attempt(given, JOB_FAULT=faults).returncode for _ in range(3)]
        assert codes == [-9, -9, 0]
        client = boto3.client("s3", endpoint_url=url)

        def body(key: str) -> bytes:
            return bytes(client.get_object(Bucket=BUCKET, Key=f"out/signed/{key}")["Body"].read())

        results = json.loads(body("results.json"))
        folders = ("artifacts/adapter/", "artifacts/export/adapter-bf16/", "artifacts/export/merged/")
        assert results["signing"]["signatures"] == ["model.sig", *(f"{folder}model.sig" for folder in folders)]
        for folder in folders:
            assert results["signing"]["key_sha256"] in body(f"{folder}README.md").decode()
        where = f"s3://{BUCKET}/out/signed"
        reading = {**CREDENTIALS, "JOB_STORAGE__ENDPOINT_URL": url}
        code, said = verified(where, keys["signer"][1], reading)
        assert code == 0, said
        assert "holds    signature" in said
        code, said = verified(where, keys["other"][1], reading)
        assert code == 4, said
        whole = attempt({**given, "JOB_RUN__ID": "undisturbed"})
        assert whole.returncode == 0, whole.stderr[-3000:]
        other = json.loads(client.get_object(Bucket=BUCKET, Key="out/undisturbed/results.json")["Body"].read())
        assert facts_of(results) == facts_of(other)

        weights = body("artifacts/export/merged/model.safetensors")
        data = weights[:-1] + bytes([weights[-1] ^ 1])
        client.put_object(Bucket=BUCKET, Key="out/signed/artifacts/export/merged/model.safetensors", Body=data)
        code, said = verified(where, keys["signer"][1], reading)
        assert code == 4
        assert "artifacts/export/merged/model.safetensors" in said


def test_two_stages(environment: dict[str, str], keys: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    """The last stage's signature is over the hash of the first one's manifest: neither can be forged."""
    given = {
        **environment,
        **CONFIGURATIONS["sft,dpo"](tmp_path),
        "JOB_RUN__ID": "staged",
        "JOB_RUN__OUTPUT": str(tmp_path / "out"),
    }
    assert attempt(given, JOB_FAULT="kill@stage=publish").returncode == -9
    done = attempt(given)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "out/staged"
    code, said = verified(str(run), keys["signer"][1], {})
    assert code == 0, said
    assert "holds    signature" in said
    forged = Path(shutil.copytree(run, tmp_path / "forged"))
    weights = forged / "sft/artifacts/adapter/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    rewrite(forged / "sft", "artifacts/adapter/adapter_model.safetensors", bytes(data))
    first = forged / "sft/results.json"
    first.write_bytes(sealed(json.loads(first.read_bytes())))
    code, said = verified(str(forged), keys["signer"][1], {})
    assert code == 4
    assert "results.json training.first_stage" in said
