"""The model of the pull: small files of a store before weights, and the rows of the embedding."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.errors import DataError
from job.model.files import fingerprint
from job.records import Pulled
from job.stages import pull_model
from job.stages.pull_model import _fetch_small_files, embedding_rows, fetch_original
from job.storage.open import StorageOptions, open_store
from tests import warm
from tests.example_run import DATASET
from tests.s3_server import BUCKET, CREDENTIALS, credentials, moto_server

DEMO = Path(__file__).parents[3] / "job" / "demo" / "base"
SMALL_BYTES = 2 << 20


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        ('{"vocab_size": 32000}', 32000),
        ('{"vocab_size": 7, "text_config": {"vocab_size": 9}}', 9),
        ("[]", None),
        ("{", None),
        ('{"vocab_size": null}', None),
    ],
)
def test_the_size_of_the_embedding_is_in_the_configuration(tmp_path: Path, config: str, rows: int | None) -> None:
    """It is the text part's; where the configuration does not say, loading the model will."""
    (tmp_path / "config.json").write_text(config)
    assert embedding_rows(tmp_path) == rows


@pytest.fixture(scope="module")
def bucket() -> Iterator[StorageOptions]:
    """A bucket with the demo's base below `base/`: its weights are none, and there is more beside it."""
    with credentials(), moto_server() as endpoint:
        options = StorageOptions(endpoint_url=endpoint)
        store = open_store(f"s3://{BUCKET}/base", options)
        for file in DEMO.iterdir():
            store.write(file.name, b"no weights" if file.suffix == ".safetensors" else file.read_bytes())
        store.write("original/params.json", b"{}")
        store.write("optimizer.pt", bytes(SMALL_BYTES + 1))
        yield options


def test_of_a_model_in_a_bucket_small_files_come_first(
    bucket: StorageOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configuration and tokenizer, no weights, no folders, nothing large; None where nothing lies."""
    monkeypatch.setattr(pull_model, "MAX_SMALL_BYTES", SMALL_BYTES)
    folder = _fetch_small_files(f"s3://{BUCKET}/base", tmp_path / "small", bucket)
    assert folder is not None
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {file.name: file.read_bytes() for file in DEMO.iterdir() if file.suffix != ".safetensors"}
    assert _fetch_small_files(f"s3://{BUCKET}/elsewhere", tmp_path / "none", bucket) is None


def test_a_model_in_a_bucket_is_refused_before_its_weights_are_fetched(bucket: StorageOptions, tmp_path: Path) -> None:
    """A target module that it does not have ends the job, although its weights could not even be read."""
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith("JOB_")},
        **CREDENTIALS,
        "JOB_PRESET": "demo",
        "JOB_MODEL__ID": f"s3://{BUCKET}/base",
        "JOB_STORAGE__ENDPOINT_URL": str(bucket.endpoint_url),
        "JOB_RUN__OUTPUT": str(tmp_path),
        "JOB_LORA__TARGET_MODULES": "q_prj",
        "JOB_LOG__FORMAT": "json",
    }
    done = warm.run([], environ)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "q_prj" in done.stderr


def test_a_later_attempt_fetches_the_original_model_from_its_bucket(bucket: StorageOptions, tmp_path: Path) -> None:
    """It lies where the settings say, and has to be what the run began with."""
    attempt: Any = SimpleNamespace(alive=lambda: None, work=tmp_path / "work")
    settings: Any = SimpleNamespace(model=SimpleNamespace(id=f"s3://{BUCKET}/base"))
    shutil.copytree(DEMO, tmp_path / "base")
    (tmp_path / "base/model.safetensors").write_bytes(b"no weights")
    record = Pulled(DATASET, fingerprint(tmp_path / "base"), None, {})
    folder = fetch_original(attempt, settings, bucket, record)
    assert fingerprint(folder) == record.model_sha256
    with pytest.raises(DataError, match=r"JOB_MODEL__ID: .* is not what this run began with"):
        fetch_original(attempt, settings, bucket, replace(record, model_sha256="0" * 64))
