"""Detects where the job runs (plain Docker, a Kubernetes pod, a SageMaker training job), and the paths there.

To add a platform: its name in `Platform.name`, and in `detect` the variable that only it sets, with what it gives the
job.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from job.errors import SettingsError, UnfitMachine

# Kubernetes puts the addresses of all Services whose names begin with "job" into every pod (JOB_TRACKER_SERVICE_HOST,
# JOB_TRACKER_PORT_443_TCP_ADDR), and the pod's number into those of an Indexed Job, which is read here.
_COMPLETION_INDEX = "JOB_COMPLETION_INDEX"
_SERVICE = re.compile(r"JOB_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
# The value of this one is an address, tcp://10.0.0.1:443. With a number, JOB_METRICS_PORT is a mistyped setting.
_SERVICE_ADDRESS = re.compile(r"JOB_(\w+_)?PORT")

# To add a name: only one that is not a setting's name with another number of underscores, which would be a typo.
_FOREIGN = {
    "Jenkins": ("JOB_NAME", "JOB_BASE_NAME", "JOB_URL", "JOB_DISPLAY_URL"),
    "Prow": ("JOB_NAME", "JOB_SPEC", "JOB_TYPE"),
    "Grid Engine": ("JOB_ID", "JOB_NAME", "JOB_SCRIPT"),
    "Kubernetes' Indexed Job": (_COMPLETION_INDEX,),
    "manifests of Kubernetes' JobSet": ("JOB_INDEX", "JOB_GLOBAL_INDEX"),
    "IBM Code Engine": ("JOB_INDEX", "JOB_ARRAY_SIZE", "JOB_MODE", "JOB_RETRY_LIMIT", "JOB_INDEX_RETRY_COUNT"),
    "Oracle's Data Science Jobs": (
        "JOB_OCID",
        "JOB_COMPARTMENT_OCID",
        "JOB_ARTIFACT_FILE_NAME",
        "JOB_RUN_OCID",
        "JOB_RUN_COMPARTMENT_OCID",
    ),
    "templates for AWS Batch": (
        "JOB_DEFINITION",
        "JOB_DEFINITION_ARN",
        "JOB_DEFINITION_NAME",
        "JOB_QUEUE",
        "JOB_QUEUE_ARN",
        "JOB_QUEUE_NAME",
    ),
}
"""Platform that sets variables that begin with `JOB_` and are no settings -> their names, on every platform. AWS Batch,
Slurm, Nomad, Cloud Run, Google's Batch, Azure ML and Vertex AI prefix theirs with their own names."""


def is_foreign(variable: str) -> bool:
    """Whether a variable that begins with `JOB_` is known to be set by a CI server or a batch system, not by a user."""
    return any(variable in names for names in _FOREIGN.values())


@dataclass(frozen=True)
class Delivery:
    """Folders that a platform collects when the job is done: `model` gets the adapter, `data` everything else."""

    model: Path
    data: Path


@dataclass(frozen=True)
class Platform:
    """What the platform gives the job, and where it reads how the job ended.

    Attributes:
        name: Which platform it is.
        hyperparameters: JSON file with settings; it may not exist.
        inputs: Folder of the job's inputs: `config/` lists them, `data/` holds them.
        delivery: Folders that it collects results from; None where it collects none.
        failure_file: Takes the reason of a failure; SageMaker shows the first 1,024 characters.
        termination_log: Takes the reason why the container ended; Kubernetes shows at most 4,096 bytes.
        run_id: The platform's own name for this run, the same after every restart; None where it has none.
        resources: JSON file that lists the machines of this run; it may not exist.
        completion_index: Number of this pod in its Indexed Job; None where it has none.
        output: The default folder of runs on this platform; None for the job's default.
        grace_seconds: Time between the signal to stop and the kill, where it is known.
        node: Name of the machine in its cluster, where it is known.
    """

    name: Literal["docker", "kubernetes", "sagemaker"]
    hyperparameters: Path | None = None
    inputs: Path | None = None
    delivery: Delivery | None = None
    failure_file: Path | None = None
    termination_log: Path | None = None
    run_id: str | None = None
    resources: Path | None = None
    completion_index: int | None = None
    output: Path | None = None
    grace_seconds: float | None = None
    node: str | None = None

    @contextmanager
    def machine_checks(self) -> Iterator[None]:
        """Within it the machine is compared with the settings that require GPUs.

        Raises:
            UnfitMachine: In place of a SettingsError, on Kubernetes: the next pod may get another machine. What another
                process reported is unchanged: it is not about this machine.
        """
        try:
            yield
        except SettingsError as error:
            if self.name != "kubernetes" or error.reported:
                raise
            raise UnfitMachine(str(error)) from None

    def sets(self, variable: str, value: str = "") -> bool:
        """Whether the platform (or what starts the job there) sets this `JOB_` variable to this value, not the user."""
        if is_foreign(variable) or self.name != "kubernetes":
            return is_foreign(variable)
        address = _SERVICE_ADDRESS.fullmatch(variable) is not None and not value.strip().isdecimal()
        return address or _SERVICE.fullmatch(variable) is not None

    def reads(self, variable: str) -> bool:
        """Whether a variable that is foreign elsewhere says something here."""
        return self.name == "kubernetes" and variable == _COMPLETION_INDEX


def detect(environ: Mapping[str, str]) -> Platform:
    """The platform that an environment belongs to; plain Docker (or no container) unless a variable names another.

    A pod's own name changes with every retry, so the Job's template says what the Job is called (a label of the pod),
    and where the termination message goes if that is not the usual place.
    """
    if environ.get("TRAINING_JOB_NAME"):
        base = Path(environ.get("SAGEMAKER_BASE_DIR") or "/opt/ml")  # the SageMaker toolkit's own name for it
        return Platform(
            name="sagemaker",
            hyperparameters=base / "input/config/hyperparameters.json",
            inputs=base / "input",
            delivery=Delivery(model=base / "model", data=base / "output/data"),
            failure_file=base / "output/failure",
            run_id=environ["TRAINING_JOB_NAME"],
            resources=base / "input/config/resourceconfig.json",
            output=base / "checkpoints",
            grace_seconds=120,
        )
    if environ.get("KUBERNETES_SERVICE_HOST"):
        index = environ.get(_COMPLETION_INDEX, "")
        return Platform(
            name="kubernetes",
            termination_log=Path(environ.get("KUBERNETES_TERMINATION_LOG") or "/dev/termination-log"),
            run_id=environ.get("KUBERNETES_JOB_NAME") or None,
            completion_index=int(index) if index.isascii() and index.isdecimal() else None,
            node=environ.get("KUBERNETES_NODE_NAME") or None,
        )
    return Platform(name="docker")
