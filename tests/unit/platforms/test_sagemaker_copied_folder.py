"""SageMaker's channels as sources, and the folder that it copies to S3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.errors import SettingsError
from job.platforms.sagemaker_copied_folder import copied_folder, outlives_machine
from job.settings.load import load_settings
from job.settings.markers import SageMakerChannel, find_markers
from job.settings.sagemaker_channels import read_channels
from job.settings.schema import Settings

USUAL = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
CHANNELS = {marker.name: setting for setting, marker in find_markers(Settings, SageMakerChannel).items()}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """SageMaker's folder of inputs, with nothing in it."""
    folder = tmp_path / "ml/input"
    (folder / "config").mkdir(parents=True)
    (folder / "data").mkdir()
    return folder


def order(inputs: Path, **channels: object) -> None:
    """Writes what was ordered, and makes a folder for each channel."""
    (inputs / "config/inputdataconfig.json").write_text(json.dumps(channels), encoding="utf-8")
    for name in channels:
        (inputs / "data" / name).mkdir(exist_ok=True)


def environment(inputs: Path, **settings: str) -> dict[str, str]:
    """The environment of a training job."""
    return {"TRAINING_JOB_NAME": "job", "SAGEMAKER_BASE_DIR": str(inputs.parent), **settings}


def problems(inputs: Path, **settings: str) -> list[str]:
    """What is wrong with the settings of a training job."""
    with pytest.raises(SettingsError) as caught:
        load_settings([], environment(inputs, **settings))
    return [str(problem) for problem in caught.value.problems]


def test_no_inputs_give_nothing(inputs: Path) -> None:
    """Elsewhere than on SageMaker, and without channels, there is nothing to read."""
    assert read_channels(None, CHANNELS).given == read_channels(inputs, CHANNELS).given == {}


def test_channels_stand_for_sources(inputs: Path) -> None:
    """Data, model and questions come from their channels, with their provenance; the preset's pins go."""
    order(inputs, training=USUAL, model=USUAL, evaluation=USUAL)
    for name in ("arc_easy.jsonl", ".hidden", "_SUCCESS"):
        (inputs / "data/evaluation" / name).write_text("", encoding="utf-8")
    settings = load_settings([], environment(inputs))
    assert settings.data.source == str(inputs / "data/training")
    assert settings.model.id == str(inputs / "data/model")
    assert dict(settings.eval.data) == {"arc_easy": str(inputs / "data/evaluation/arc_easy.jsonl")}
    assert settings.sources["data.source"] == "sagemaker channel training"
    assert (settings.model.revision, settings.data.revision) == (None, None)


@pytest.mark.parametrize("how", ["environment", "hyperparameters", "file"])
def test_the_users_own_settings_win(inputs: Path, tmp_path: Path, how: str) -> None:
    """A channel is what a source is when nobody says otherwise, wherever that is said."""
    order(inputs, training=USUAL)
    given_: dict[str, str] = {}
    if how == "environment":
        given_ = {"JOB_DATA__SOURCE": "mine/own"}
    elif how == "hyperparameters":
        (inputs / "config/hyperparameters.json").write_text('{"data.source": "mine/own"}', encoding="utf-8")
    else:
        (tmp_path / "job.yaml").write_text("data: {source: mine/own}", encoding="utf-8")
        given_ = {"JOB_CONFIG": str(tmp_path / "job.yaml")}
    assert load_settings([], environment(inputs, **given_)).data.source == "mine/own"


@pytest.mark.parametrize("mode", ["File", "FastFile"])
def test_files_are_files(inputs: Path, mode: str) -> None:
    """Whether a channel is copied first or streamed as it is read makes no difference to the job."""
    order(inputs, Training=USUAL | {"TrainingInputMode": mode})
    assert load_settings([], environment(inputs)).data.source == str(inputs / "data/Training")


@pytest.mark.parametrize(
    ("ordered", "expected"),
    [
        (
            {"TrainingInputMode": "Pipe"},
            "is a pipe, which can be read only once; set its input mode to File or FastFile",
        ),
        (
            {"S3DistributionType": "ShardedByS3Key"},
            "is divided among the hosts, but each host needs all of it; set its distribution to FullyReplicated",
        ),
    ],
)
def test_channels_that_cannot_be_used(inputs: Path, ordered: dict[str, str], expected: str) -> None:
    """They are refused by name before anything else happens."""
    order(inputs, training=USUAL | ordered)
    assert problems(inputs) == [f"sagemaker channel training: {expected}"]


def test_a_channel_for_nothing(inputs: Path) -> None:
    """A name that the job does not know may be a slip: the run would train on something else and not say so."""
    order(inputs, train=USUAL)
    [problem] = problems(inputs)
    assert problem.startswith("sagemaker channel train: is not a known channel; name it model, training, validation, ")


@pytest.mark.parametrize(
    "setting",
    [{"JOB_DATA__SOURCE": "{folder}/a.jsonl"}, {"JOB_MODEL__ID": "{folder}"}, {"HF_TOKEN_PATH": "{folder}/t"}],
)
def test_a_channel_that_is_named(inputs: Path, setting: dict[str, str]) -> None:
    """A channel of any name may be named in a setting, or in the environment of another library."""
    order(inputs, mine=USUAL)
    given_ = {name: value.format(folder=inputs / "data/mine") for name, value in setting.items()}
    assert load_settings([], environment(inputs, **given_))


def test_a_channel_whose_name_begins_like_another(inputs: Path) -> None:
    """Naming one channel does not excuse the other."""
    order(inputs, mine=USUAL, mi=USUAL)
    assert [
        problem.partition(":")[0] for problem in problems(inputs, JOB_DATA__SOURCE=f"{inputs}/data/mine/x.jsonl")
    ] == ["sagemaker channel mi"]


def test_an_empty_channel_of_questions(inputs: Path) -> None:
    """Questions that were ordered and are not there are missed at once."""
    order(inputs, evaluation=USUAL)
    assert problems(inputs) == [
        "sagemaker channel evaluation: has no file; add a file for each task, named after it: arc_easy.jsonl"
    ]


def test_questions_of_no_task(inputs: Path) -> None:
    """A file that is not named after a task is told how it should be."""
    order(inputs, evaluation=USUAL)
    (inputs / "data/evaluation/test.jsonl").write_text("", encoding="utf-8")
    [problem] = problems(inputs)
    assert problem.startswith(
        "JOB_EVAL__DATA (sagemaker channel evaluation): has a file for a task that is not in JOB_EVAL__TASKS"
    )
    assert "named after their tasks" in problem


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_broken_list_of_channels(inputs: Path, text: str) -> None:
    """What cannot be read is told, not skipped."""
    (inputs / "config/inputdataconfig.json").write_text(text, encoding="utf-8")
    [problem] = problems(inputs)
    assert problem.startswith("inputdataconfig.json: ")


@given(channels=st.dictionaries(st.text(max_size=8), st.none() | st.text() | st.dictionaries(st.text(), st.text())))
def test_any_list_of_channels_is_read(tmp_path_factory: pytest.TempPathFactory, channels: dict[str, Any]) -> None:
    """Whatever the list says, the answer is settings or problems."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "config").mkdir()
    (folder / "config/inputdataconfig.json").write_text(json.dumps(channels), encoding="utf-8")
    layer = read_channels(folder, CHANNELS)
    assert len(layer.given) + len(layer.problems) == len(channels) or "evaluation" in map(str.lower, channels)


def test_the_platforms_defaults(inputs: Path) -> None:
    """Runs lie in the folder that SageMaker copies, checkpoints are let go late, and a stop has two minutes."""
    settings = load_settings([], environment(inputs))
    assert settings.run.output == str(inputs.parent / "checkpoints")
    assert (settings.run.grace_seconds, settings.checkpoint.settle_seconds) == (120, 300)
    assert settings.sources["checkpoint.settle_seconds"] == "platform"
    elsewhere = load_settings([], environment(inputs, JOB_RUN__OUTPUT="s3://bucket/runs", JOB_RUN__GRACE_SECONDS="60"))
    assert (elsewhere.run.grace_seconds, elsewhere.checkpoint.settle_seconds) == (60, 0)
    mine = load_settings([], environment(inputs, JOB_CHECKPOINT__SETTLE_SECONDS="5"))
    assert mine.checkpoint.settle_seconds == 5


@pytest.mark.parametrize(
    ("said", "expected"),
    [(None, None), ({"LocalPath": "/x/y"}, "/x/y"), ({"S3Uri": "s3://b"}, "checkpoints"), ([], "checkpoints")],
)
def test_the_copied_folder(inputs: Path, said: object, expected: str | None) -> None:
    """SageMaker names the folder where the request has a CheckpointConfig; without a name it is the usual one."""
    if said is not None:
        (inputs / "config/checkpointconfig.json").write_text(json.dumps(said), encoding="utf-8")
    assert copied_folder(inputs) == (None if expected is None else inputs.parent / expected)
    assert copied_folder(None) is None


def test_what_lasts(inputs: Path) -> None:
    """S3 lasts; a folder lasts if SageMaker copies it."""
    folder = inputs.parent / "checkpoints"
    assert outlives_machine("s3://bucket/runs", inputs)
    assert not outlives_machine(str(folder), inputs)
    (inputs / "config/checkpointconfig.json").write_text(json.dumps({"LocalPath": str(folder)}), encoding="utf-8")
    assert outlives_machine(str(folder), inputs)
    assert outlives_machine(str(folder / "deeper"), inputs)
    assert not outlives_machine("runs", inputs)
