"""The folder that SageMaker copies to S3 while the job runs.

SageMaker's input channels are a source of settings: `job/settings/sagemaker_channels.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from job.common.config_files import read_mapping


def copied_folder(inputs: Path | None) -> Path | None:
    """The folder that SageMaker copies to S3 while the job runs, and restores after an interruption; None without one.

    SageMaker names it only for a training job that was created with a CheckpointConfig.
    """
    if inputs is None or not (path := inputs / "config/checkpointconfig.json").is_file():
        return None
    config = read_mapping(path, json.loads)
    folder = config.get("LocalPath") if isinstance(config, Mapping) else None
    return Path(folder) if isinstance(folder, str) and folder else inputs.parent / "checkpoints"


def outlives_machine(output: str, inputs: Path | None) -> bool:
    """Whether files written to `output` outlive the machine."""
    copied = copied_folder(inputs)
    return "://" in output or (copied is not None and Path(output).is_relative_to(copied))
