"""SageMaker's input channels as a source of settings.

    training      JOB_DATA__SOURCE: the channel's folder, with one data file directly in it
    model         JOB_MODEL__ID: the channel's folder, in the hub's layout
    evaluation    JOB_EVAL__DATA: files named after their tasks, `arc_easy.jsonl`

The fields in `schema` are marked with the channel (`SageMakerChannel`). A channel of another name is accepted if a
setting has a path in it: `config=/opt/ml/input/data/conf/job.yaml`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from job.common.config_files import read_mapping
from job.errors import Problem
from job.settings.layers import GivenValue, Layer


def read_channels(inputs: Path | None, channels: Mapping[str, str], mentioned: Collection[str] = ()) -> Layer:
    """The settings that the job's input channels set.

    Args:
        inputs: SageMaker's folder of inputs, with `config/inputdataconfig.json` and the channels below `data/`.
        channels: Name of a channel -> dotted name of the setting that it sets (`SageMakerChannel` in the schema).
        mentioned: Texts that may contain a path in a channel. A channel that nothing uses is an error: its name may
            be misspelt, and the run would train on other data.
    """
    layer = Layer()
    if inputs is None or not (listing := inputs / "config/inputdataconfig.json").is_file():
        return layer
    listed = read_mapping(listing, json.loads)
    if isinstance(listed, str):
        return Layer(problems=[Problem(listing.name, listed)])
    for name, channel in listed.items():
        source, folder = f"sagemaker channel {name}", inputs / "data" / str(name)
        setting = channels.get(str(name).lower())
        if why := _unusable(channel):
            layer.problems.append(Problem(source, why))
        elif setting == "eval.data":
            if questions := _questions(folder):
                layer.given[setting] = GivenValue(questions, source)
            else:
                layer.problems.append(
                    Problem(source, "has no file; add a file for each task, named after it: arc_easy.jsonl")
                )
        elif setting is not None:
            layer.given[setting] = GivenValue(str(folder), source)
        elif not any(f"{folder}/" in f"{text}/" for text in mentioned):
            what = f"is not a known channel; name it {', '.join(channels)}, or set a setting to a path in {folder}"
            layer.problems.append(Problem(source, what))
    return layer


def _unusable(channel: object) -> str | None:
    """Why a channel's configuration cannot be used; None if it can."""
    channel = channel if isinstance(channel, Mapping) else {}
    if channel.get("TrainingInputMode") == "Pipe":
        return "is a pipe, which can be read only once; set its input mode to File or FastFile"
    if channel.get("S3DistributionType") == "ShardedByS3Key":
        return "is divided among the hosts, but each host needs all of it; set its distribution to FullyReplicated"
    return None


def _questions(folder: Path) -> dict[str, str]:
    """Task -> file of its questions."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {file.name.partition(".")[0]: str(file) for file in files if file.is_file() and file.name[0] not in "._"}
