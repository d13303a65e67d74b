"""Simulates SageMaker for one training job: builds /opt/ml, starts the container's command, copies checkpoints.

It behaves like SageMaker, as far as that is documented (`infra/sagemaker/README.md` says where):

- The command gets one argument, `train`; settings are strings in `hyperparameters.json`; channels are folders.
- The folder of checkpoints is copied to S3 while the job runs, with a delay and in no order. Files deleted there are
  deleted in S3 at once. Copied files get marker files next to them; files with special names are not copied.
- Nothing more is copied once the container has ended. A new machine starts with an empty /opt/ml and what S3 has.
- A stop is SIGTERM, and SIGKILL 120 seconds later.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import warm

ROOT = Path(__file__).parents[2]
STOP_SECONDS = 120
MARKS = (".sagemaker-uploading", ".sagemaker-uploaded")
LEFT_ALONE = (".sagemaker-ignore", *MARKS)


@dataclass(frozen=True)
class Ended:
    """How a container ended: its exit code (negative: the signal), what it printed, and its failure file."""

    code: int
    log: list[str]
    failure: str | None

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log's lines about one kind of event."""
        lines = [json.loads(line) for line in self.log if line.startswith("{")]
        return [line for line in lines if line["event"] == name]


@dataclass
class TrainingJob:
    """One training job and its S3.

    Attributes:
        name: The job's.
        machine: Simulates /opt/ml; emptied whenever the job gets a machine.
        bucket: Simulates the checkpoints' place in S3; None if the request has no CheckpointConfig.
        hyperparameters: All strings.
        channels: Name -> file or folder in S3 that is copied into the channel's folder.
        environment: The request's `Environment`.
        ordered: The values of `inputdataconfig.json` for a channel other than the defaults.
        lag: Delay of the copies of checkpoints, in seconds.
    """

    name: str
    machine: Path
    bucket: Path | None
    hyperparameters: Mapping[str, str]
    channels: Mapping[str, Path] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    ordered: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    hosts: tuple[str, ...] = ("algo-1",)
    lag: float = 0.0

    def run(self, stop: Callable[[dict[str, Any]], bool] = lambda _: False, how: int = signal.SIGTERM) -> Ended:
        """Gives the job a new machine, and runs its container there.

        Args:
            stop: Whether to stop the job after this line of its log.
            how: SIGTERM, followed by SIGKILL after 120 seconds; or SIGKILL, if the machine is lost.
        """
        self._set_up()
        with (
            self._copying(),
            warm.followed(["train"], self._environ(), folder=self.machine.parent) as (container, lines),
        ):
            log = []
            deadline: threading.Timer | None = None
            for line in lines:
                if not line.endswith("\n"):  # a kill came while it was written
                    break
                log.append(line.rstrip("\n"))
                if deadline is None and line.startswith("{") and stop(json.loads(line)):
                    os.kill(container.pid, how)
                    deadline = threading.Timer(STOP_SECONDS, container.kill)
                    deadline.start()
            (code,) = container.wait(STOP_SECONDS)
            if deadline:
                deadline.cancel()
        failure = self.machine / "output/failure"
        return Ended(code, log, failure.read_text(encoding="utf-8") if failure.exists() else None)

    def _set_up(self) -> None:
        shutil.rmtree(self.machine, ignore_errors=True)
        for folder in ("input/config", "input/data", "model", "output/data"):
            (self.machine / folder).mkdir(parents=True)
        usual = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
        said: dict[str, object] = {
            "hyperparameters": dict(self.hyperparameters),
            "inputdataconfig": {name: {**usual, **self.ordered.get(name, {})} for name in self.channels},
            "resourceconfig": {
                "current_host": self.hosts[0],
                "hosts": list(self.hosts),
                "network_interface_name": "eth0",
            },
        }
        for name, source in self.channels.items():
            target = self.machine / "input/data" / name
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                target.mkdir()
                shutil.copy(source, target)
        if self.bucket is not None:
            said["checkpointconfig"] = {"LocalPath": str(self.machine / "checkpoints")}
            self.bucket.mkdir(exist_ok=True)
            shutil.copytree(self.bucket, self.machine / "checkpoints")
        for name, content in said.items():
            (self.machine / "input/config" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")

    def _environ(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        return {
            **kept,
            "HOME": str(self.machine),
            "PYTHONPATH": str(ROOT),
            "TRAINING_JOB_NAME": self.name,
            "TRAINING_JOB_ARN": f"arn:aws:sagemaker:eu-central-1:123456789012:training-job/{self.name}",
            "SAGEMAKER_BASE_DIR": str(self.machine),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **self.environment,
        }

    @contextmanager
    def _copying(self) -> Iterator[None]:
        if self.bucket is None:
            yield
            return
        ended = threading.Event()
        copier = threading.Thread(target=self._copy, args=(self.bucket, ended))
        copier.start()
        try:
            yield
        finally:
            ended.set()
            copier.join()

    def _copy(self, bucket: Path, ended: threading.Event) -> None:
        folder = self.machine / "checkpoints"
        draw = random.Random(self.name)
        while not ended.wait(0.05):
            mirror(folder, bucket, older_than=time.time() - self.lag, draw=draw, ended=ended)


def mirror(
    folder: Path, bucket: Path, *, older_than: float, draw: random.Random, ended: threading.Event | None = None
) -> None:
    """Copies files changed before `older_than`, in no order, each completely; deletes removed files at once."""
    # Not rglob, which fails if a file is removed while it searches.
    here = {
        path.relative_to(folder): path
        for parent, folders, files in os.walk(folder)
        for path in (Path(parent, name) for name in (*folders, *files))
    }
    for path in list(bucket.rglob("*")):
        if path.is_file() and path.relative_to(bucket) not in here:
            path.unlink()
    names = [name for name, path in here.items() if not name.name.endswith(LEFT_ALONE) and path.is_file()]
    for name in draw.sample(names, len(names)):
        if ended is not None and ended.is_set():
            return
        with suppress(FileNotFoundError):  # it was removed in the meantime
            status = (folder / name).stat()
            copy = bucket / name
            known = copy.exists() and copy.stat().st_mtime_ns == status.st_mtime_ns
            if status.st_mtime <= older_than and not known:
                copy.parent.mkdir(parents=True, exist_ok=True)
                partial = copy.with_name(copy.name + ".upload")
                shutil.copy2(folder / name, partial)
                partial.replace(copy)
                (folder / name).with_name(name.name + MARKS[1]).touch()
