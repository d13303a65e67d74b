"""The record of a finished stage: its result, sealed, with the run it belongs to.

A run is identified by a hash of everything that decides its result (`fingerprint`), not by its id: a copied folder that
continues under another id is the same run, and a record of a run with other settings, data or weights is ignored,
wherever it is found. Records of earlier versions have no seal, fingerprint or key; they are read without these checks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter
from pydantic_core import from_json

from job.common.hashing import seal, sealed, unsealed
from job.common.validation import first_error
from job.errors import DataError, Problem
from job.records import NAMES_THE_RUN, Pulled

T = TypeVar("T")

RUN = "run"
"""The field of a record that holds the fingerprint."""
_ATTEMPT = "attempt"
"""The unique field of a record, by which a late removal distinguishes it from the one it was meant for."""
_KEY = "written_to"
"""The field with the record's own place: the evaluations of base and adapter have records of one form."""
_MAX_WORDS = 200
_SETTING_OF = {
    "dataset": "JOB_DATA__SOURCE",
    "model_sha256": "JOB_MODEL__ID",
    "model_revision": "JOB_MODEL__REVISION",
    "questions": "JOB_EVAL__TASKS",
    "start_sha256": "JOB_LORA__START",
    "prompts": "JOB_EVAL__PROMPTS",
    "groups": "JOB_EVAL__TASKS",
    "safety_sha256": "JOB_DATA__SAFETY_MODEL",
    "judge_sha256": "JOB_EVAL__PRINCIPLES",
}
"""Each field of `Pulled` that `identity` has -> the setting that names what it is about."""


def fingerprint(settings: Mapping[str, Any], pulled: Pulled) -> str:
    """SHA-256 over the settings that decide the result, and over what was pulled: data, weights and questions."""
    return seal({"settings": dict(settings), "pulled": identity(pulled)})


def identity(pulled: Pulled) -> dict[str, Any]:
    """What has to be the same in all attempts: every field without a default, or marked with `NAMES_THE_RUN`.

    A field with a default was added by a later version, whose runs go on with records of earlier ones; what it tells
    is also in the hashes.
    """

    def facts(record: Any) -> dict[str, Any]:
        names = [
            field.name
            for field in fields(record)
            if (field.default is MISSING and field.default_factory is MISSING)
            or (field.metadata.get(NAMES_THE_RUN) and getattr(record, field.name) != field.default)
        ]
        return {name: plain(getattr(record, name)) for name in names}

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(one) for name, one in value.items()}
        return facts(value) if is_dataclass(value) else value

    return facts(pulled)


def require_same_inputs(first: Pulled, now: Pulled, *, exports_run: bool) -> None:
    """Refuses inputs that are not those of the run.

    Args:
        first: What the first attempt pulled; of a run that exports a finished one, what that one pulled.
        now: What this attempt pulled.
        exports_run: Whether this run exports a finished one.

    Raises:
        DataError: Data, model or questions differ, with every setting that names one that does.
    """
    before, found = identity(first), identity(now)
    if changed := [name for name, value in before.items() if found.get(name) != value]:
        if exports_run:
            what = "its content is not that of the run in JOB_EXPORT__RUN; restore it, or train again without that"
        else:
            what = "its content has changed since the first attempt of this run; restore it, or start a new run with "
            what += "another JOB_RUN__ID"
        raise DataError([Problem(_SETTING_OF[name], what) for name in changed])


def render(key: str, record: str, run: str, attempt: int = 0) -> bytes:
    """A stage's result (a JSON object) as the file that `parse` reads.

    Args:
        key: Where it is written, below the run's folder.
        record: The result.
        run: The run's fingerprint.
        attempt: Number of the attempt that writes it.

    Raises:
        ValueError: The result has a field with a name of the record's own.
    """
    facts = json.loads(record)
    own = {_KEY: key, _ATTEMPT: attempt, RUN: run}
    if same := own.keys() & facts.keys():
        raise ValueError(f"a result cannot have the field {min(same)}: the record has one of that name")
    return sealed({**facts, **own})


def parse(key: str, data: bytes, kind: TypeAdapter[T]) -> tuple[T, str | None]:
    """What a stage found out, and the fingerprint of the run it was found in; None for a record without one.

    `key` is where the data was read.

    Raises:
        ValueError: It is not a record of this kind, was cut or altered, or belongs to another key.
    """
    try:
        facts = from_json(data)
        # One damaged byte may hide one of the two fields, not both.
        if isinstance(facts, dict) and {RUN, "seal"} & facts.keys():
            facts = unsealed(data)
            run = str(facts.pop(RUN))
            facts.pop(_ATTEMPT, None)
            _compare_places(key, facts.pop(_KEY, key))
            return kind.validate_json(json.dumps(facts)), run
        return kind.validate_json(data), None
    except KeyError:
        raise ValueError("was altered: it names no run") from None
    except ValueError as error:
        raise ValueError(first_error(error, _MAX_WORDS)) from None


def _compare_places(key: str, recorded_key: str) -> None:
    if recorded_key != key:
        raise ValueError(f"was written for {recorded_key}")
