"""The data of the pull: rows and prompts, fetched and read with the model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from job import log
from job.common.methods import SFT
from job.common.resources import usable_cpus
from job.common.source_list import Source, locate_sources, parse_sources
from job.data.hub_dataset import check_hub_dataset
from job.data.prompts import find_prompts, prompts_sha256, read_prompts, validation_prompts
from job.data.token_cache import Tokens, load_tokens
from job.data.training_and_validation import ValidationSource, what_to_validate_on
from job.errors import DataError, Problem, named_by
from job.records import PromptRow, PromptsRecord
from job.runs.attempt import Attempt
from job.settings.load import Settings
from job.settings.training_stages import naming_its_settings
from job.storage.location import is_remote
from job.storage.open import StorageOptions, fetch

_SETTING_OF = {
    "data": "JOB_DATA__SOURCE",
    "validation": "JOB_DATA__VALIDATION",
    "questions": "JOB_EVAL__DATA",
    "prompts": "JOB_EVAL__PROMPTS",
}
"""Folder for what is fetched -> the setting that names it."""
LATER = "later/"
"""Stands before the folder of what a later stage reads."""


def fetch_input(attempt: Attempt, place: str, kind: str, storage: StorageOptions) -> str:
    """The local path of an input, copied from a store to the folder `kind`; errors name the setting that gives it."""
    attempt.alive()
    with named_by(_SETTING_OF[kind.removeprefix(LATER).partition("/")[0]], ": "):
        return fetch(place, attempt.work / kind, storage)


def validation_of(settings: Settings) -> float | ValidationSource | None:
    """The rows to validate on: a share of the training rows, or rows of their own; None for none."""
    data = settings.data
    return what_to_validate_on(
        data.validation,
        source=data.source,
        source_revision=data.revision,
        validation_revision=data.validation_revision,
        validation_split=data.validation_split,
    )


def check_hub(settings: Settings) -> None:
    """Asks the hub whether the data sets that it has are there, before weights are downloaded."""
    with naming_its_settings(settings):
        for source in parse_sources(settings.data.source):
            check_hub_dataset(source.place, source.revision or settings.data.revision)
    validation = validation_of(settings)
    if isinstance(validation, ValidationSource) and not is_remote(validation.name):
        check_hub_dataset(validation.name, validation.revision)


def fetch_rows(
    attempt: Attempt, settings: Settings, storage: StorageOptions, below: str = ""
) -> tuple[str | Sequence[Source], float | ValidationSource | None]:
    """What to train on, and what to validate on, copied from stores to folders that begin with `below`."""
    with naming_its_settings(settings):
        source = locate_sources(
            settings.data.source, lambda place, kind: fetch_input(attempt, place, f"{below}{kind}", storage)
        )
        validation = validation_of(settings)
        if isinstance(validation, ValidationSource):
            place = fetch_input(attempt, validation.place, f"{below}validation", storage)
            validation = replace(validation, place=place)
        return source, validation


def read_rows(
    attempt: Attempt,
    settings: Settings,
    source: str | Sequence[Source],
    validation: float | ValidationSource | None,
    tokenizer: Any,
    **how: Any,
) -> Tokens:
    """The tokens for training and for validation; `how` goes to `load_examples`."""
    data, cache = settings.data, settings.storage.cache
    with naming_its_settings(settings):
        return load_tokens(
            source,
            validation,
            root=attempt.work if cache is None else Path(cache),
            keep=cache is not None,
            processes=usable_cpus(),
            name=data.source,
            revision=data.revision,
            split=data.split,
            limit=data.limit,
            schema=None if data.format == "auto" else data.format,
            on_bad_row=data.on_bad_row,
            loss_on=settings.train.rows_loss_on,
            max_length=settings.train.max_length,
            tokenizer=tokenizer,
            method=settings.train.last_method,
            template_arguments=data.chat_template_arguments,
            field_names=data.fields,
            on_long_row=data.on_long_row,
            row_weights=data.row_weights,
            seed=settings.run.seed if data.seed is None else data.seed,
            **how,
        )


def read_asked_prompts(
    attempt: Attempt,
    settings: Settings,
    storage: StorageOptions,
    tokens: Tokens,
    tokenizer: Any,
    *,
    fetched: tuple[str | Sequence[Source], float | ValidationSource | None],
    **how: Any,
) -> list[PromptRow]:
    """The prompts of JOB_EVAL__PROMPTS; none where it is empty. `fetched` and `tokens` are of the training data.

    Raises:
        DataError: They cannot be read, or there are none.
    """
    place = settings.eval.prompts
    if place is None:
        return []
    if isinstance(place, int):
        return _prompts_of_rows(attempt, settings, fetched, tokens, tokenizer, **how)
    return read_prompts(
        find_prompts(fetch_input(attempt, place, "prompts", storage)),
        place,
        tokenizer=tokenizer,
        schema=tokens.record.format,
        most_tokens=_longest_prompt(settings),
        template_arguments=settings.data.chat_template_arguments,
        **how,
    )


def _prompts_of_rows(
    attempt: Attempt,
    settings: Settings,
    fetched: tuple[str | Sequence[Source], float | ValidationSource | None],
    tokens: Tokens,
    tokenizer: Any,
    **how: Any,
) -> list[PromptRow]:
    """The prompts of the first JOB_EVAL__PROMPTS validation rows; `fetched` and `tokens` are of all rows.

    Raises:
        DataError: The rows have no prompts.
    """
    asked, held = int(settings.eval.prompts or 0), tokens.validation or ()
    if settings.train.rows_loss_on == "all" and settings.train.last_method == SFT:
        # Where all tokens are targets, they do not say where the prompt ends: the same rows, read for that.
        train = settings.train.model_copy(update={"loss_on": "completion"})
        again = read_rows(attempt, settings.model_copy(update={"train": train}), *fetched, tokenizer, **how)
        if [again.record.rows, len(again.validation or ())] != [tokens.record.rows, len(held)]:
            what = "some rows cannot be split into prompt and completion; give a file of prompts instead of a number"
            raise DataError([Problem("JOB_EVAL__PROMPTS", what)])
        held = again.validation or ()
    most = _longest_prompt(settings)
    found = list(validation_prompts(held, asked, tokenizer, most))
    if not found:
        what = f"no validation row of the schema {tokens.record.format} has a prompt of at most {most:,} tokens"
        raise DataError([Problem("JOB_EVAL__PROMPTS", f"{what}; give a file of prompts instead of a number")])
    if len(found) < asked:
        log.get_logger().warning("there are fewer prompts than JOB_EVAL__PROMPTS", prompts=len(found), asked=asked)
    return found


def _longest_prompt(settings: Settings) -> int:
    """In tokens, so that an answer has room behind it."""
    return settings.train.max_length - settings.eval.prompts_max_new_tokens


def prompts_record(settings: Settings, prompts: Sequence[PromptRow]) -> PromptsRecord | None:
    """The record of the prompts for the manifest; None where there are none."""
    if not prompts:
        return None
    asked = settings.eval.prompts
    return PromptsRecord(
        source=asked if isinstance(asked, str) else "validation rows",
        count=len(prompts),
        max_new_tokens=settings.eval.prompts_max_new_tokens,
        sha256=prompts_sha256([(prompt.text, prompt.reference) for prompt in prompts]),
    )
