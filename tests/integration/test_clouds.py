"""Every command on runs in a cloud's store, by an imitation of that store: all files are read and written there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from job.storage.open import open_store
from tests import clouds, warm
from tests.azurite import KEY
from tests.chaos.small import settings
from tests.gcs_server import TOKEN as GOOGLE_TOKEN
from tests.hub_server import TOKEN, Hub, hub_server
from tests.s3_server import SECRET
from tests.unit.verification.test_signature import write_key

pytestmark = pytest.mark.long
CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"


@pytest.fixture(params=clouds.SCHEMES)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Each kind of store, and the variables that lead to it."""
    with clouds.imitation(request.param, tmp_path) as environ:
        yield request.param, environ if request.param != "azure" else {CONNECTION: connection_string(environ)}


def connection_string(environ: Mapping[str, str]) -> str:
    """What Azure's portal shows of an account."""
    fields = {"BlobEndpoint": "ENDPOINT", "AccountName": "ACCOUNT_NAME", "AccountKey": "ACCOUNT_KEY"}
    return ";".join(f"{field}={environ[f'AZURE_STORAGE_{name}']}" for field, name in fields.items())


def job(words: list[str], environ: Mapping[str, str], *codes: int) -> str:
    """Runs a command, which has to end with one of these exit codes; returns what it said. No secret is in it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JOB_", "AZURE_"))}
    done = warm.run(words, {**clean, **environ})
    said = done.stdout + done.stderr
    assert done.returncode in (codes or (0,)), said[-3000:]
    assert not any(secret in said for secret in (KEY, SECRET, GOOGLE_TOKEN, TOKEN))
    return said


def test_every_command(server: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """Two signed runs, one killed, one from the other's adapter, are planned, read, compared, pushed and promoted."""
    (kind, reach), place = server, clouds.place(server[0])
    private, public = write_key(tmp_path, "signer", ec.generate_private_key(ec.SECP256R1()))
    environ = {**settings(tmp_path, rows=12, questions=12), **reach}
    given = open_store(f"{place}/in", clouds.options(kind, reach))
    for path in [*(tmp_path / "base").iterdir(), tmp_path / "rows.jsonl", tmp_path / "questions.jsonl"]:
        given.upload(path, path.relative_to(tmp_path).as_posix())
    environ |= {
        "JOB_RUN__OUTPUT": f"{place}/out",
        "JOB_MODEL__ID": f"{place}/in/base",
        "JOB_DATA__SOURCE": f"{place}/in/rows.jsonl",
        "JOB_EVAL__DATA": f"arc_easy={place}/in/questions.jsonl",
        "JOB_EXPORT__FORMATS": "adapter:bf16,merged",
        "JOB_SIGN__KEY": private,
        "JOB_TRAIN__MAX_STEPS": "4",
        "JOB_GATE__MAX_REGRESSION": "1",
        "JOB_MODEL__KEEP_QUANTIZED": "store",
    }
    one, two, pointer = f"{place}/out/one", f"{place}/out/two", f"{place}/models/current"

    assert "conditional writes" in job(["plan"], environ)
    first = {**environ, "JOB_RUN__ID": "one"}
    job(["run"], {**first, "JOB_FAULT": "kill@step=3"}, -9)
    assert "evaluate-base" in job(["status", one], reach)
    job(["run"], {**first, "JOB_FAULT": "kill@stage=export"}, -9)
    job(["run"], first)
    second = {**environ, "JOB_RUN__ID": "two", "JOB_LORA__START": f"{one}/artifacts/adapter"}
    job(["run"], {**second, "JOB_GATE__BASELINE": one})
    said = job(["status", two], reach)
    assert all(f" {two}/artifacts/{folder}\n" in said for folder in ("adapter", "export/merged"))

    for run in (one, f"{two}/results.json"):
        assert "holds    signature" in job(["verify", run, "--key", public], reach)
    job(["report", one, "--output", str(tmp_path / "page.html")], reach)
    assert f"verify {one}" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '"two"' in job(["compare", one, two, "--format", "json"], reach)
    assert "one" in job(["compare", "--history", f"{place}/out"], reach)

    for run in (one, two):
        job(["promote", run, "--to", pointer], reach)
    assert 'run "two"' in job(["verify", pointer], reach)
    assert one in job(["promote", "--rollback", "--to", pointer], reach)
    hub = Hub()
    with hub_server(hub) as endpoint:
        pushing = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        job(["push", pointer, "--hub", "me/model"], {**reach, **pushing})
    assert "merged/model.safetensors" in hub.files("me/model")
    job(["verify", one], reach)
    job(["run"], first)  # it is complete: nothing is done again

    store, name = open_store(one, clouds.options(kind, reach)), "artifacts/adapter/adapter_model.safetensors"
    stored = store.read(name)
    assert stored is not None
    store.write(name, stored.data[:-1] + bytes([stored.data[-1] ^ 1]))
    assert "adapter_model.safetensors" in job(["verify", one], reach, 4)
