"""SageMaker input channels as a source of settings."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from job.common.config_files import read_mapping
from job.errors import Problem
from job.settings.layers import GivenValue, Layer


def read_channels(inputs: Path | None, channels: Mapping[str, str], mentioned: Collection[str] = ()) -> Layer:
    """The settings that channels stand for.

    Args:
        inputs: SageMaker's folder of inputs, with `config/inputdataconfig.json` and the channels below `data/`.
        channels: Name of a channel -> dotted name of the setting it stands for (`SageMakerChannel` in the schema).
        mentioned: Texts that may name a path in a channel. A channel that is for nothing is an error: its name may be
            a slip, and the run would train on something else.
    """
    layer = Layer()
    if inputs is None or not (listing := inputs / "config/inputdataconfig.json").is_file():
        return layer
    listed = read_mapping(listing, json.loads)
    if isinstance(listed, str):
        return Layer(problems=[Problem(listing.name, listed)])
    for name, ordered in listed.items():
        source, folder = f"sagemaker channel {name}", inputs / "data" / str(name)
        setting = channels.get(str(name).lower())
        if why := _unusable(ordered):
            layer.problems.append(Problem(source, why))
        elif setting == "eval.data":
            if questions := _questions(folder):
                layer.given[setting] = GivenValue(questions, source)
            else:
                layer.problems.append(Problem(source, "holds no file; give one a task, named after it: arc_easy.jsonl"))
        elif setting is not None:
            layer.given[setting] = GivenValue(str(folder), source)
        elif not any(f"{folder}/" in f"{text}/" for text in mentioned):
            what = f"stands for no setting; name it {', '.join(channels)}, or name a path in {folder} in a setting"
            layer.problems.append(Problem(source, what))
    return layer


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
