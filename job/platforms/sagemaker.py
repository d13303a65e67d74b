"""What SageMaker says beside the hyperparameters: its channels of input data, and the folder that it copies to S3.

Channels stand in for sources that no setting names:

    training      data.source: the channel's folder, with one data file directly in it
    model         model.id: the channel's folder, in the hub's layout
    evaluation    eval.data: files named after their tasks, `arc_easy.jsonl`

A channel of another name is for a setting to name: `config=/opt/ml/input/data/conf/job.yaml`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from job.errors import Problem
from job.settings.layers import Given, Layer, read_mapping

STANDS_FOR = {"training": "data.source", "model": "model.id", "evaluation": "eval.data"}


def read_channels(inputs: Path | None, mentioned: Collection[str] = ()) -> Layer:
    """The settings that channels stand in for.

    Args:
        inputs: SageMaker's folder of inputs, with `config/inputdataconfig.json` and the channels below `data/`.
        mentioned: Texts that may name a path in a channel. A channel that is for nothing is an error: its name may be
            a slip, and the run would train on something else.
    """
    layer = Layer()
    if inputs is None or not (listing := inputs / "config/inputdataconfig.json").is_file():
        return layer
    channels = read_mapping(listing, json.loads)
    if isinstance(channels, str):
        return Layer(problems=[Problem(listing.name, channels)])
    for name, ordered in channels.items():
        source, folder = f"sagemaker channel {name}", inputs / "data" / str(name)
        setting = STANDS_FOR.get(str(name).lower())
        if why := _unusable(ordered):
            layer.problems.append(Problem(source, why))
        elif setting == "eval.data":
            if questions := _questions(folder):
                layer.given[setting] = Given(questions, source)
            else:
                layer.problems.append(Problem(source, "holds no file; give one a task, named after it: arc_easy.jsonl"))
        elif setting is not None:
            layer.given[setting] = Given(str(folder), source)
        elif not any(f"{folder}/" in f"{text}/" for text in mentioned):
            what = f"stands for no setting; name it {', '.join(STANDS_FOR)}, or name a path in {folder} in a setting"
            layer.problems.append(Problem(source, what))
    return layer


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
    return output.startswith("s3://") or (copied is not None and Path(output).is_relative_to(copied))


def _unusable(ordered: object) -> str | None:
    """Why a channel cannot be used as it was ordered; None when it can."""
    ordered = ordered if isinstance(ordered, Mapping) else {}
    if ordered.get("TrainingInputMode") == "Pipe":
        return "is a pipe, which can be read only once; give it the input mode File or FastFile"
    if ordered.get("S3DistributionType") == "ShardedByS3Key":
        return "is dealt out to the hosts, and each needs all of it; make its distribution FullyReplicated"
    return None


def _questions(folder: Path) -> dict[str, str]:
    """Task -> file of its questions."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {file.name.partition(".")[0]: str(file) for file in files if file.is_file() and file.name[0] not in "._"}
