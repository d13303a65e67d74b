"""Whole runs that start from an adapter in a bucket or on the hub: killed and resumed, or refused if it changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from job.model.adapter_files import save_adapter
from job.model.published_names import PublishedNames
from job.model.start_adapter import CONFIG, WEIGHTS, hash_start
from job.storage.open import StorageOptions, open_store
from tests.chaos.small import settings
from tests.dataset_hub import COMMIT, OTHER, serving
from tests.helpers import fill_adapter, make_model
from tests.integration.whole_runs import attempt, published
from tests.s3_server import BUCKET, CREDENTIALS, credentials, moto_server
from tests.unit.model.test_start_adapter import hub_of


class Place:
    """A bucket, or a repository of the hub."""

    def __init__(self, endpoint: str, commits: dict[str, Path] | None) -> None:
        self._endpoint, self._commits = endpoint, commits

    def put(self, adapter: Path) -> None:
        """Replaces what is there."""
        if self._commits is not None:
            commit = OTHER if COMMIT in self._commits else COMMIT
            self._commits.clear()
            self._commits[commit] = adapter
            return
        store = open_store(f"s3://{BUCKET}/adapter", StorageOptions(endpoint_url=self._endpoint))
        for name in (CONFIG, WEIGHTS):
            store.upload(adapter / name, name)

    def commit(self, adapter: Path) -> None:
        """The newest commit of the hub's repository; a bucket has none."""
        if self._commits is not None:
            before = dict(self._commits)
            self._commits.clear()
            self._commits.update({OTHER: adapter, **before})


@dataclass(frozen=True)
class Start:
    """An adapter that is not on this machine.

    Attributes:
        environment: Of a run of three steps that starts from it.
        adapters: The adapter's files as they are at first, and as they are after a change.
        place: Where it is.
    """

    environment: dict[str, str]
    adapters: tuple[Path, Path]
    place: Place

    def put(self, number: int) -> None:
        """Has the place serve one of the two adapters."""
        self.place.put(self.adapters[number])

    def move(self) -> None:
        """Has the hub's branch go on to the second adapter; the commit of the first one stays."""
        self.place.commit(self.adapters[1])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> tuple[Path, Path]:
    """Two adapters of the tiny base with other numbers."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, scale in (("first", 0.01), ("second", 0.02)):
        model = fill_adapter(make_model(base_folder), scale)
        save_adapter(model, folder / name, base="base", revision=None, names=PublishedNames(""))
    return folder / "first", folder / "second"


@pytest.fixture
def start(request: pytest.FixtureRequest, adapters: tuple[Path, Path], tmp_path: Path) -> Iterator[Start]:
    """An adapter at the place that the parameter names, as it is at first."""
    environment = {**settings(tmp_path, rows=12, questions=4), "JOB_TRAIN__MAX_STEPS": "3"}
    environment["JOB_CHECKPOINT__EVERY_STEPS"] = "1"
    if request.param == "bucket":
        with credentials(), moto_server() as endpoint:
            environment |= {"JOB_LORA__START": f"s3://{BUCKET}/adapter", "JOB_STORAGE__ENDPOINT_URL": endpoint}
            found = Start({**environment, **CREDENTIALS}, adapters, Place(endpoint, None))
            found.put(0)
            yield found
        return
    commits = {COMMIT: adapters[0]}
    with serving(hub_of(commits)) as endpoint:
        environment |= {"JOB_LORA__START": "some/adapter", "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
        yield Start(environment, adapters, Place("", commits))


@pytest.mark.parametrize("start", ["hub"], indirect=True)
def test_a_branch_that_moved_does_not_change_the_start(start: Start, tmp_path: Path) -> None:
    """A killed run on the hub's newest commit goes on with the commit that its first attempt found."""
    run = {"JOB_RUN__ID": "moved"}
    assert attempt(start.environment, **run, JOB_FAULT="kill@step=2").returncode == -9
    start.move()
    assert attempt(start.environment, **run).returncode == 0
    training = json.loads((tmp_path / "out/moved/results.json").read_bytes())["training"]
    assert training["start_sha256"] == hash_start(start.adapters[0])


@pytest.mark.long
@pytest.mark.parametrize("start", ["bucket"], indirect=True)
def test_another_adapter_at_the_same_place_is_refused(start: Start, tmp_path: Path) -> None:
    """Other numbers than those that a killed attempt began with: exit 65 with the setting, and nothing is published."""
    run = {"JOB_RUN__ID": "moved"}
    assert attempt(start.environment, **run, JOB_FAULT="kill@step=2").returncode == -9
    start.put(1)
    refused = attempt(start.environment, **run)
    assert refused.returncode == 65, refused.stderr[-3000:]
    assert "JOB_LORA__START: its content has changed since the first attempt" in refused.stderr
    assert not (tmp_path / "out/moved/results.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("start", ["bucket", "hub"], indirect=True)
def test_a_killed_run_ends_as_an_undisturbed_one(start: Start, tmp_path: Path) -> None:
    """Killed before the first checkpoint, behind it and in the last evaluation: the same artifacts to the bit.

    On the hub the branch has a newer adapter by the second attempt, which goes on with the commit of the first.

    They are also those of a run that starts from the same adapter in a folder.
    """
    assert attempt(start.environment, JOB_RUN__ID="whole").returncode == 0
    killed = {"JOB_RUN__ID": "killed", "JOB_FAULT": "kill@step=1,kill@step=2,kill@stage=evaluate-adapter"}
    assert attempt(start.environment, **killed).returncode == -9
    start.move()
    assert [attempt(start.environment, **killed).returncode for _ in range(3)] == [-9, -9, 0]
    local = {"JOB_RUN__ID": "local", "JOB_LORA__START": str(shutil.copytree(start.adapters[0], tmp_path / "start"))}
    assert attempt(start.environment, **local).returncode == 0
    training = json.loads((tmp_path / "out/killed/results.json").read_bytes())["training"]
    assert training["start_sha256"] == hash_start(start.adapters[0])
    facts = [published(tmp_path / "out", name) for name in ("whole", "killed", "local")]
    assert facts[0] == facts[1] == facts[2]
