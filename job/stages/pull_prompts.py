"""The prompts of JOB_EVAL__PROMPTS: a file of them, or the first validation rows without their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from job import log
from job.common.methods import SFT
from job.data.evaluation_prompts import find_prompts, prompts_sha256, read_prompts, validation_prompts
from job.data.token_cache import Tokens
from job.errors import DataError, Problem, naming
from job.records import PromptRow, PromptsRecord
from job.runs.attempt import Attempt
from job.settings.schema import Eval
from job.stages.fetch_input import fetch_input
from job.stages.pull_rows import FetchedRows, RowSettings, read_rows
from job.storage.open import StorageOptions


def find_prompt_rows(
    attempt: Attempt,
    options: Eval,
    rows: RowSettings,
    storage: StorageOptions,
    *,
    tokens: Tokens,
    tokenizer: Any,
    fetched: FetchedRows,
    reading: Mapping[str, Any],
    auditing: Mapping[str, Any],
) -> list[PromptRow]:
    """The prompts of JOB_EVAL__PROMPTS; an empty list if it is not set.

    Args:
        attempt: A file in a store is copied into its work folder.
        options: Settings of the evaluation.
        rows: Settings of the training rows.
        storage: How to reach stores.
        tokens: The tokenized training and validation rows.
        tokenizer: The model's.
        fetched: The training and validation data, as `fetch_rows` returned them.
        reading: Further arguments of `read_prompts`, or of `read_rows`.
        auditing: Further arguments of `read_rows`, in place of `reading`, if the audit left rows out.

    Raises:
        DataError: The prompts cannot be read, or there are none.
    """
    location = options.prompts
    if location is None:
        return []
    if isinstance(location, int):
        # Reading the rows again gives the same ones only if the audit leaves out the same.
        left_out = tokens.record.audit is not None and tokens.record.audit.left_out
        arguments = auditing if left_out else reading
        return _prompts_of_rows(attempt, options, rows, fetched, tokens=tokens, tokenizer=tokenizer, reading=arguments)
    copy = fetch_input(attempt, location, "prompts", storage)
    with naming(location, copy):
        path = find_prompts(copy)
    return read_prompts(
        path,
        location,
        tokenizer=tokenizer,
        schema=tokens.record.format,
        most_tokens=_longest_prompt(options, rows),
        template_arguments=rows.data.chat_template_arguments,
        **reading,
    )


def _prompts_of_rows(
    attempt: Attempt,
    options: Eval,
    rows: RowSettings,
    fetched: FetchedRows,
    *,
    tokens: Tokens,
    tokenizer: Any,
    reading: Mapping[str, Any],
) -> list[PromptRow]:
    """The prompts of the first JOB_EVAL__PROMPTS validation rows; arguments as for `find_prompt_rows`.

    Raises:
        DataError: The rows have no prompts.
    """
    count, rows_held_out = int(options.prompts or 0), tokens.validation or ()
    if rows.train.rows_loss_on == "all" and rows.train.last_method == SFT:
        # If all tokens are targets, the targets do not show where the prompt ends. So the rows are read again with the
        # completion's tokens as targets.
        train = rows.train.model_copy(update={"loss_on": "completion"})
        log.get_logger().info("the rows are read again, to see where the prompts of JOB_EVAL__PROMPTS end")
        reread = read_rows(attempt, replace(rows, train=train), *fetched, tokenizer, **reading)
        if [reread.record.rows, len(reread.validation or ())] != [tokens.record.rows, len(rows_held_out)]:
            message = "some rows cannot be split into prompt and completion; give a file of prompts instead of a number"
            raise DataError([Problem("JOB_EVAL__PROMPTS", message)])
        rows_held_out = reread.validation or ()
    most = _longest_prompt(options, rows)
    prompts = list(validation_prompts(rows_held_out, count, tokenizer, most))
    if not prompts:
        message = f"no validation row of the schema {tokens.record.format} has a prompt of at most {most:,} tokens"
        raise DataError([Problem("JOB_EVAL__PROMPTS", f"{message}; give a file of prompts instead of a number")])
    if len(prompts) < count:
        message, change = "there are fewer prompts than JOB_EVAL__PROMPTS", "a larger JOB_DATA__VALIDATION has more"
        log.get_logger().warning(message, prompts=len(prompts), asked=count, change=change)
    return prompts


def _longest_prompt(options: Eval, rows: RowSettings) -> int:
    """The most tokens of a prompt that leave room for the answer."""
    return rows.train.max_length - options.prompts_max_new_tokens


def prompts_record(options: Eval, prompts: Sequence[PromptRow]) -> PromptsRecord | None:
    """The part of the pull's record about the prompts; None if there are none."""
    if not prompts:
        return None
    prompts_setting = options.prompts
    return PromptsRecord(
        source=prompts_setting if isinstance(prompts_setting, str) else "validation rows",
        count=len(prompts),
        max_new_tokens=options.prompts_max_new_tokens,
        sha256=prompts_sha256([(prompt.text, prompt.reference) for prompt in prompts]),
    )
