"""The training methods: one table that settings, data, trainer and report read.

To add one:
1. Add an entry to `METHODS`. Its key is the value of `JOB_TRAIN__METHOD`.
2. For a new form of rows, add a schema in `data/schemas.py`.
3. Add its loss to `OBJECTIVES` in `training/objectives.py`, under the same name.
4. Compare it with another implementation, in `tests/unit/training/test_objectives.py`.

No torch: the choices are among the settings, which must answer before torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

MethodName = Literal["sft", "dpo", "kto", "orpo"]
Methods = Literal["sft", "dpo", "kto", "orpo", "sft,dpo", "sft,kto", "sft,orpo"]
"""Values of `JOB_TRAIN__METHOD`: a method, or two that follow each other in one run."""
SFT: MethodName = "sft"
FIRST_STAGE = "sft"
"""The folder, below a run's own, of the run that is its first stage, as in `sft,dpo`."""

FIRST_STAGE_SETTINGS: Mapping[str, str] = {
    **{
        f"data.{name}": f"data.sft_{name}"
        for name in ("source", "revision", "split", "limit", "format", "fields", "on_long_row")
    },
    **{f"data.{name}": f"data.sft_{name}" for name in ("validation", "validation_revision", "validation_split")},
    **{f"train.{name}": f"train.sft_{name}" for name in ("epochs", "learning_rate")},
}
"""Setting, by its dotted name -> the one that gives its value to the first stage of two."""
INHERITED = ("data.split", "data.on_long_row", "data.validation", "data.validation_split")
"""Those of them that the first stage takes from the second unless they are set for it."""


@dataclass(frozen=True)
class Method:
    """The properties of a method that the rest of the job uses.

    Attributes:
        title: Its name in words, for the report.
        schemas: Schemas of the rows that it can learn from, by their names in `JOB_DATA__FORMAT`.
        reference: Whether its loss compares with the log-probabilities of a frozen reference model.
        tags: How the hub tags models that were trained by it.
    """

    title: str
    schemas: tuple[str, ...]
    reference: bool = False
    tags: tuple[str, ...] = ()


_PAIRS, _LABELLED = "preference", "unpaired_preference"

METHODS: Mapping[str, Method] = {
    "sft": Method("supervised fine-tuning", ("alpaca", "prompt_completion", "messages", "text"), tags=("sft",)),
    "dpo": Method("direct preference optimization", (_PAIRS,), reference=True, tags=("dpo",)),
    "kto": Method("Kahneman-Tversky optimization", (_LABELLED,), reference=True, tags=("kto",)),
    "orpo": Method("odds ratio preference optimization", (_PAIRS,), tags=("orpo",)),
}


def last_of(methods: str) -> MethodName:
    """The method whose adapter a run publishes: the last one of `Methods`.

    Raises:
        KeyError: There is no such method.
    """
    name: Any = methods.rpartition(",")[2]
    METHODS[name]
    found: MethodName = name
    return found


def methods_for(schema: str) -> list[str]:
    """The methods that can learn from rows of a schema."""
    return [name for name, method in METHODS.items() if schema in method.schemas]
