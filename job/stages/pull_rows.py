"""Fetches the rows to train and to validate on, and reads them as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job.common.resources import usable_cpus
from job.common.source_list import Source, locate_sources, parse_sources
from job.data.hub_dataset import check_hub_dataset
from job.data.token_cache import Tokens, load_tokens
from job.data.training_and_validation import ValidationSource, validation_source_of
from job.records import Pulled
from job.runs.attempt import Attempt
from job.runs.layout import Stage
from job.settings.schema import Data, Train
from job.settings.training_stages import settings_renamed_in_errors
from job.stages.fetch_input import fetch_input
from job.storage.location import is_remote
from job.storage.open import StorageOptions

FetchedRows = tuple[str | Sequence[Source], float | ValidationSource | None]
"""(what to train on, what to validate on), as `read_rows` takes them."""


@dataclass(frozen=True)
class RowSettings:
    """The settings that decide which rows a training stage reads, and how they become tokens.

    Attributes:
        data: Settings of the data.
        train: Settings of training: the longest row, and which tokens the loss counts.
        seed: Seed of the order of the rows.
        cache: `JOB_STORAGE__CACHE`, a folder where tokens are kept for later starts; None to keep none.
        part_of: The run whose first training stage this is; None for other runs. See `settings_renamed_in_errors`.
    """

    data: Data
    train: Train
    seed: int
    cache: str | None
    part_of: str | None


def validation_of(data: Data) -> float | ValidationSource | None:
    """What to validate on: a share or a number of the rows, or a separate source; None for nothing."""
    return validation_source_of(
        data.validation,
        source=data.source,
        source_revision=data.revision,
        validation_revision=data.validation_revision,
        validation_split=data.validation_split,
    )


def check_hub(rows: RowSettings) -> None:
    """Checks that the data sets on the hub can be read; called before weights are downloaded.

    Raises:
        DataError, SettingsError: One is not there.
        Unreachable, AccessDenied: The hub cannot be used.
    """
    with settings_renamed_in_errors(rows.part_of):
        for source in parse_sources(rows.data.source):
            check_hub_dataset(source.location, source.revision or rows.data.revision)
    validation = validation_of(rows.data)
    if isinstance(validation, ValidationSource) and not is_remote(validation.name):
        check_hub_dataset(validation.name, validation.revision)


def fetch_rows(attempt: Attempt, rows: RowSettings, storage: StorageOptions, below: str = "") -> FetchedRows:
    """(what to train on, what to validate on), copied from stores to the work folder.

    A later attempt gets the revisions that the first one found, except for the rows of a later training stage.

    Args:
        attempt: Files from a store are copied into its work folder.
        rows: Which rows the training stage reads.
        storage: How to reach stores.
        below: Prefix of the names of the copies' folders: `LATER` for a later training stage.

    Raises:
        DataError, SettingsError, Unreachable, AccessDenied, Preempted: As `fetch_input`.
    """
    with settings_renamed_in_errors(rows.part_of):
        source = locate_sources(
            rows.data.source, lambda location, kind: fetch_input(attempt, location, f"{below}{kind}", storage)
        )
        validation = validation_of(rows.data)
        if isinstance(validation, ValidationSource):
            location = fetch_input(attempt, validation.location, f"{below}validation", storage)
            validation = replace(validation, location=location)
    earlier = None if below else attempt.recorded(Stage.PULL, Pulled)
    if earlier is None:
        return source, validation
    # the branches may have moved since the first attempt
    if not isinstance(source, str):
        commits = {record.source: record.revision for record in earlier.dataset.sources}
        source = tuple(replace(part, revision=commits.get(part.name) or part.revision) for part in source)
    recorded = earlier.dataset.validation
    if isinstance(validation, ValidationSource) and recorded is not None:
        validation = replace(validation, revision=recorded.revision or validation.revision)
    return source, validation


def read_rows(
    attempt: Attempt,
    rows: RowSettings,
    source: str | Sequence[Source],
    validation: float | ValidationSource | None,
    tokenizer: Any,
    **options: Any,
) -> Tokens:
    """The tokenized rows for training and for validation.

    Args:
        attempt: The tokens are written to its work folder if there is no cache.
        rows: Which rows the training stage reads, and how they become tokens.
        source: What to train on, as `fetch_rows` returns it.
        validation: What to validate on, as `fetch_rows` returns it.
        tokenizer: The model's.
        options: Further arguments of `load_tokens`.

    Raises:
        DataError, SettingsError, Unreachable, AccessDenied, Preempted: As `load_tokens`.
    """
    data, train, cache = rows.data, rows.train, rows.cache
    with settings_renamed_in_errors(rows.part_of):
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
            loss_on=train.rows_loss_on,
            max_length=train.max_length,
            tokenizer=tokenizer,
            method=train.last_method,
            template_arguments=data.chat_template_arguments,
            field_names=data.fields,
            on_long_row=data.on_long_row,
            row_weights=data.row_weights,
            seed=rows.seed,
            **options,
        )
