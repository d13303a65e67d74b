"""Checks of `plan`: the rows to train on, with their audit, and the questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from job.common import formatting
from job.common.bad_row_reasons import by_reason
from job.common.findings import statistics
from job.common.resources import usable_cpus
from job.common.source_list import locate_sources, parse_sources
from job.data.examples import lengths_of
from job.data.hub_dataset import is_hub_id
from job.data.preferences import EncodedAnswers
from job.data.sources import check_source, copies_named_as_given, require_revision
from job.data.tokenization import Encoded
from job.data.training_and_validation import ValidationSource, load_rows
from job.errors import named_by
from job.evaluation.question_lengths import check_lengths, count_questions
from job.evaluation.task_files import is_task_file
from job.evaluation.task_names import check_tasks
from job.evaluation.tasks import Tasks, check_choices, load_tasks
from job.planning.character_tokenizer import CharacterTokenizer
from job.planning.known_models_and_data import CHARACTERS_PER_TOKEN, TaskTokens
from job.planning.preflight import HUB_UNREACHABLE, Found, NotChecked, Online
from job.planning.shown_rows import ShownRow, show_row
from job.records import AuditRecord, DatasetRecord, Example
from job.storage.hub import peek_dataset
from job.storage.open import StorageOptions, bytes_to_fetch, fetch, is_remote

NO_LIMIT = 1 << 31
"""Maximum length of an example, in tokens, in effect none: used while token counts are only estimated."""
MAX_BYTES = 256 << 20
"""Larger data sets are not downloaded for a plan."""
_PLACES = 2
_ACTIONS = {"record": "", "skip": ", left out", "error": ""}


@dataclass(frozen=True)
class DataFacts:
    """The rows as the job would use them.

    Attributes:
        examples: To train on.
        estimated: Whether token counts are estimated from characters.
        download_bytes: Bytes to fetch; 0 for local files.
        licence: On the data sets' cards; None if there is none.
        validation: To validate on.
        shown: The first rows, for the plan to print.
        schema: The rows' schema.
        audit: What the audit found; None without an audit.
        long_rows: As in `DatasetRecord`.
        longest_at: File and line of the longest row to train on; empty if they are not known.
    """

    examples: Sequence[Example]
    estimated: bool
    download_bytes: int
    licence: str | None
    validation: Sequence[Example] = ()
    shown: Sequence[ShownRow] = ()
    schema: str = ""
    audit: AuditRecord | None = None
    long_rows: Mapping[str, int] = field(default_factory=dict)
    longest_at: str = ""


def preview_data(
    source: str,
    *,
    tokenizer: Any | None,
    max_length: int,
    online: Online,
    folder: Path,
    storage: StorageOptions,
    revision: str | None,
    show: int = 0,
    validation: float | ValidationSource | None = None,
    **reading: Any,
) -> Found[DataFacts]:
    """Reads and checks the rows as the job will; without a tokenizer, token counts are estimated.

    Args:
        source: JOB_DATA__SOURCE.
        tokenizer: The model's; None if it could not be read.
        max_length: Longest example allowed, in tokens.
        online: Whether the hub can be reached.
        folder: Folder for copies from a store.
        storage: How to reach stores.
        revision: For a hub id.
        show: How many rows to show, the first ones; none without a tokenizer.
        validation: What to validate on.
        reading: Further arguments of `load_rows`.
    """
    download, licence = _look_up_sources(source, revision, storage, split=reading["split"], online=online)
    if isinstance(validation, ValidationSource):
        validation, validation_bytes = _fetch_validation(validation, folder, storage, online)
        download += validation_bytes
    with named_by("JOB_DATA__SOURCE", ": "):
        sources = locate_sources(source, lambda location, kind: fetch(location, folder / kind, storage))
    shown: list[ShownRow] = []

    def show_first(item: Encoded | EncodedAnswers) -> None:
        if tokenizer is not None and len(shown) < show:
            shown.append(show_row(item, tokenizer))

    examples, held_out, record = load_rows(
        sources,
        validation,
        revision=revision,
        max_length=NO_LIMIT if tokenizer is None else max_length,
        tokenizer=tokenizer or CharacterTokenizer(CHARACTERS_PER_TOKEN),
        name=source,
        on_example=show_first,
        processes=usable_cpus(),
        **reading,
    )
    facts = DataFacts(
        examples=examples,
        estimated=tokenizer is None,
        download_bytes=download,
        licence=licence,
        validation=held_out or (),
        shown=shown,
        schema=record.format,
        # If they are only estimated, without the lengths.
        audit=record.audit if tokenizer is not None or record.audit is None else replace(record.audit, lengths={}),
        long_rows=record.long_rows,
        longest_at=record.longest_at,
    )
    text = _describe_rows(record)
    if tokenizer is not None:
        return "ok", text, facts
    too_long = sum(length > max_length for length in lengths_of(examples))
    return "note", f"{text}; tokens are estimated{f', so {too_long} rows may be too long' if too_long else ''}", facts


def _look_up_sources(
    source: str, revision: str | None, storage: StorageOptions, *, split: str, online: Online
) -> tuple[int, str | None]:
    """(bytes to download of all sources of JOB_DATA__SOURCE, their licences).

    Raises:
        NotChecked: They are too large to be downloaded for a plan.
    """
    downloads = [
        _look_up_source(part.location, part.revision or revision, storage, split=split, online=online)
        for part in parse_sources(source)
    ]
    download = sum(size for size, _ in downloads)
    _require_small(source, download)
    return download, "; ".join(sorted({licence for _, licence in downloads if licence})) or None


def _fetch_validation(
    validation: ValidationSource, folder: Path, storage: StorageOptions, online: Online
) -> tuple[ValidationSource, int]:
    """(the source of JOB_DATA__VALIDATION with its place on this disk, bytes to download).

    Raises:
        NotChecked: It is too large to be downloaded for a plan.
    """
    download, _ = _look_up_source(
        validation.name,
        validation.revision,
        storage,
        "JOB_DATA__VALIDATION",
        split=validation.split,
        online=online,
    )
    _require_small(validation.name, download)
    with named_by("JOB_DATA__VALIDATION", ": "):
        location = fetch(validation.location, folder / "validation", storage)
    return replace(validation, location=location), download


def _require_small(source: str, download_bytes: int) -> None:
    """Raises NotChecked for data that is too large to be downloaded for a plan."""
    if download_bytes > MAX_BYTES:
        raise NotChecked(f"{source} has {formatting.size(download_bytes, ' ')}, too much to fetch for a plan")


def _describe_rows(record: DatasetRecord) -> str:
    """Numbers of rows to train on, for validation, and skipped, in words."""
    text = f"{formatting.count(record.rows, 'row')} in the schema {record.format}"
    if record.validation is not None:
        text += f", {record.validation.rows:,} for validation"
    if record.skipped:
        text += f"; skipped {'; '.join(f'{count}: {why}' for why, count in by_reason(record.skipped).items())}"
    return text


def report_audit(record: AuditRecord, long_rows: Mapping[str, int]) -> Found[None]:
    """A sentence with the audit's findings by kind, what it could not check, and statistics of the rows."""
    findings = [
        f"{check.rows:,} {kind} ({', '.join(check.places[:_PLACES])}{', ...' * (check.rows > _PLACES)})"
        f"{_ACTIONS[check.action]}"
        for kind, check in record.checks.items()
        if check.rows
    ]
    not_checked = [
        f"{kind} not checked: {check.not_checked}" for kind, check in record.checks.items() if check.not_checked
    ]
    if record.too_short:
        not_checked.append(f"{record.too_short:,} questions of one or two words were not searched for")
    what = "; ".join([*(findings or ["nothing found"]), *not_checked])
    text = " ".join([f"{formatting.count(record.rows, 'row')}: {what}.", *statistics(asdict(record), long_rows)])
    return "note" if findings or not_checked else "ok", text, None


def _look_up_source(
    source: str,
    revision: str | None,
    storage: StorageOptions,
    setting: str = "JOB_DATA__SOURCE",
    *,
    split: str,
    online: Online,
) -> tuple[int, str | None]:
    """(bytes to download, 0 for a local file; the licence on the hub's card, if there is one)."""
    if is_remote(source):
        return bytes_to_fetch(source, storage), None
    check_source(source, revision, split, setting)
    if not is_hub_id(source):
        return 0, None
    if not online():
        raise NotChecked(f"{source}: {HUB_UNREACHABLE}")
    return peek_dataset(source, require_revision(revision))


def preview_questions(
    names: Sequence[str],
    data: Mapping[str, str],
    num_fewshot: int | None = None,
    *,
    needed_by: Sequence[str] = (),
    tokenizer: Any | None,
    limit: int | None,
    online: Online,
    folder: Path,
    storage: StorageOptions,
    max_length: int = NO_LIMIT,
    cut: bool = False,
    on_tasks: Callable[[Tasks], None] | None = None,
) -> Found[TaskTokens]:
    """Loads the tasks as the job will, if all their questions can be fetched.

    Args:
        names: Tasks.
        data: The user's own files of questions, by task.
        needed_by: Settings that need a multiple-choice task.
        num_fewshot: Examples in every prompt; None for as many as each task says.
        tokenizer: The model's; None if it could not be read.
        limit: Number of questions of each task; None for all.
        online: Whether the hub can be reached.
        folder: Folder for copies from a store.
        storage: How to reach stores.
        max_length: The most tokens of a question with one of its choices.
        cut: Whether the beginning of longer ones is cut off.
        on_tasks: Called with the tasks, as soon as they are loaded.
    """
    check_tasks(names, data)
    if (missing := [name for name in names if name not in data and not is_task_file(name)]) and not online():
        raise NotChecked(f"{', '.join(missing)}: {HUB_UNREACHABLE}")
    with named_by("JOB_EVAL__DATA", ": "):
        files = {task: Path(fetch(uri, folder / "questions" / task, storage)) for task, uri in data.items()}
    with copies_named_as_given({str(path): data[task] for task, path in files.items()}):
        tasks = load_tasks(names, files, data, num_fewshot)
    check_choices(tasks, needed_by)
    if on_tasks is not None:
        on_tasks(tasks)
    if tokenizer is not None:
        check_lengths(tasks, tokenizer, limit=limit, max_length=max_length, cut=cut, vocabulary=None)
    facts = TaskTokens(*count_questions(tasks, tokenizer or CharacterTokenizer(CHARACTERS_PER_TOKEN), limit))
    return "ok", f"{facts.count:,} questions in {', '.join(names)}", facts
