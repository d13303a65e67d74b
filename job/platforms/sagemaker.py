"""What SageMaker says beside the hyperparameters: its channels of input data, and the folder that it copies to S3.

Channels stand in for sources that no setting names:

    training      data.source: the channel's folder, with one data file directly in it
    model         model.id: the channel's folder, in the hub's layout
    evaluation    eval.data: files named after their tasks, `arc_easy.jsonl`

A channel of another name is for a setting to name: `config=/opt/ml/input/data/conf/job.yaml`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from job.common.config_files import read_mapping


def copied_folder(inputs: Path | None) -> Path | None:
    """The folder that SageMaker copies to S3 beside the job, and restores after an interruption; None if there is none.

    It says so only where the request has a CheckpointConfig.
    """
    if inputs is None or not (path := inputs / "config/checkpointconfig.json").is_file():
        return None
    said = read_mapping(path, json.loads)
    folder = said.get("LocalPath") if isinstance(said, Mapping) else None
    return Path(folder) if isinstance(folder, str) and folder else inputs.parent / "checkpoints"


def lasts(output: str, inputs: Path | None) -> bool:
    """Whether what is written to `output` outlives the machine."""
    copied = copied_folder(inputs)
    return "://" in output or (copied is not None and Path(output).is_relative_to(copied))
