"""The schema: the metadata of every setting."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import job
from job.settings.affects_result import affects_result, decisive_settings
from job.settings.load import Settings, load_settings, plain_values
from job.settings.markers import (
    BelongsTo,
    ResultEffect,
    RevisionOf,
    SageMakerChannel,
    find_markers,
    setting_names,
)
from job.settings.presets import PRESETS
from job.settings.schema import NAMES, READING
from tests.chaos import combinations


def own_markers(name: str) -> list[object]:
    """The markers on the field itself, without those of its group."""
    group, _, key = name.partition(".")
    field = Settings.model_fields[group]
    if key:
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, BaseModel)
        field = field.annotation.model_fields[key]
    return list(field.metadata)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_says_whether_it_affects_the_result(name: str) -> None:
    """Exactly once, at the field: what a resumed run must have in common is never decided by accident."""
    assert sum(isinstance(marker, ResultEffect) for marker in own_markers(name)) == 1


def test_which_settings_decide_the_result() -> None:
    """Model, data, recipe and questions do; where files go, how much memory is used and what is logged does not."""
    assert all(map(affects_result, ["model.id", "data.limit", "train.learning_rate", "eval.tasks", "run.seed"]))
    assert not any(
        map(affects_result, ["run.id", "storage.region", "train.micro_batch_tokens", "gate.metric", "preset"])
    )
    settings = load_settings(["--run.id=a"], {})
    decisive = decisive_settings(plain_values(settings))
    assert decisive.keys() == {name for name in NAMES if affects_result(name)}
    assert decisive.items() <= plain_values(settings).items()


def test_markers_name_settings() -> None:
    """A setting that another one refers to is there."""
    subjects = {m.subject for kind in (BelongsTo, RevisionOf) for m in find_markers(Settings, kind).values()}
    data = {"data.source", "data.sft_source", "data.validation", "data.sft_validation", "data.safety_model"}
    assert subjects == {"model.id", "eval.judge", *data}
    assert subjects <= set(NAMES)


def test_channels_of_sagemaker() -> None:
    """Each of the documented channels stands for one setting."""
    channels = {marker.name: name for name, marker in find_markers(Settings, SageMakerChannel).items()}
    assert channels == {
        "training": "data.source",
        "validation": "data.validation",
        "model": "model.id",
        "evaluation": "eval.data",
    }


def test_a_marker_of_a_group_holds_for_its_settings() -> None:
    """And for no other."""
    assert {name.partition(".")[0] for name in READING} == {"storage", "log"}
    assert len(READING) == sum(name.startswith(("storage.", "log.")) for name in NAMES)


def test_presets_give_settings() -> None:
    """A name that is none would be ignored by nobody's fault but ours."""
    for values in PRESETS.values():
        assert values.keys() <= set(NAMES)
    assert setting_names(Settings) == NAMES


def texts(node: ast.AST) -> Iterator[str]:
    """The literal parts of all strings below a node."""
    return (part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str))


def texts_in_messages(tree: ast.Module) -> Iterator[str]:
    """What the arguments of `Problem` say, also by a module's constant, and every string of several words."""
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    docs = {id(statement.value) for statement in statements}
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Problem":
            for part in ast.walk(node):
                yield from texts(constants.get(part.id, part) if isinstance(part, ast.Name) else part)
        elif isinstance(node, ast.Constant) and id(node) not in docs:
            yield from (text for text in texts(node) if " " in text.strip())


def test_messages_spell_a_setting_in_one_way() -> None:
    """A message names a setting JOB_TRAIN__MAX_LENGTH, never `train.max_length`, wherever its value came from."""
    dotted = re.compile(rf"(?<![\w.-])({'|'.join(re.escape(name) for name in NAMES if '.' in name)})(?![\w.])")
    wrong = [
        f"{path.name}: {text}"
        for path in sorted(Path(job.__file__).parent.rglob("*.py"))
        for text in texts_in_messages(ast.parse(path.read_text(encoding="utf-8")))
        if dotted.search(text)
    ]
    assert wrong == []


def test_random_combinations_take_in_every_setting() -> None:
    """`make combinations` draws each setting, or its script says why not: a new one is not forgotten there."""
    assert set(combinations.pool()) <= set(NAMES)
