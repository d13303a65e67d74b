"""Prepares the audit of the training rows (`job.audit`), and reuses what an earlier attempt's audit found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from job import log
from job.audit.audit import Audited, parse_findings
from job.audit.overlap import index_questions
from job.audit.rows import set_up
from job.audit.safety import Screen
from job.common.findings import UNSAFE
from job.common.hashing import hash_file
from job.errors import DataError, Problem, SettingsError
from job.records import Artifact, DatasetRecord, Pulled
from job.runs.attempt import Attempt
from job.runs.layout import FINDINGS, Stage
from job.runs.stage_records import identity
from job.settings.schema import Data, Run
from job.stages.handoff import Sources
from job.stages.safety import SafetyModel, screen_rows
from job.storage.open import StorageOptions, open_store


def audit_arguments(
    attempt: Attempt,
    data: Data,
    run: Run,
    storage: StorageOptions,
    *,
    prompts: Mapping[str, Sequence[str]],
    safety: SafetyModel | None,
) -> dict[str, Any]:
    """The arguments of `load_rows` that say what the audit looks for, and what scores the rows' texts.

    Args:
        attempt: Its watchdog is reset while rows are scored.
        data: Settings that say what to do with findings.
        run: Settings that name the store for the scores, and the device that computes them.
        storage: How to reach stores.
        prompts: By task, the prompts of the questions that will be scored: a row that contains one is a finding.
        safety: The classifier of JOB_DATA__SAFETY_MODEL; None without one.
    """
    questions = index_questions(prompts)
    if safety is None:
        return {"audit": set_up(questions, data.on_finding)}
    shared = open_store(run.output, storage)
    screen = screen_rows(attempt, safety, run, shared)
    return {"audit": set_up(questions, data.on_finding, safety.record), "screen": screen}


def known_scores(attempt: Attempt) -> dict[str, Screen]:
    """The argument `screen` with the scores that an earlier attempt published; empty if it published none.

    On another GPU the classifier's score of a row may fall on the other side of the threshold. With the published
    scores the run keeps the rows that it began with.
    """
    earlier = attempt.recorded(Stage.PULL, Pulled)
    record = None if earlier is None else earlier.dataset.audit
    if record is None or record.safety is None:
        return {}
    try:
        findings = parse_findings(attempt.fetch(Artifact(FINDINGS, record.bytes, record.sha256)).read_bytes())
    except DataError:
        return {}  # `known_audit` logs the error
    scores = {finding.row: finding.score or 0.0 for finding in findings if finding.kind == UNSAFE}
    return {"screen": lambda texts: [scores.get(row, 0.0) for row in range(len(texts))]}


def known_audit(attempt: Attempt) -> Audited | None:
    """The audit's result that an earlier attempt published; None if there is none, or if it left rows out.

    If rows were left out, the audit is repeated to find which; it finds the same.
    """
    earlier = attempt.recorded(Stage.PULL, Pulled)
    record = None if earlier is None else earlier.dataset.audit
    if record is None or record.left_out:
        return None
    try:
        findings = attempt.fetch(Artifact(FINDINGS, record.bytes, record.sha256)).read_bytes()
    except DataError as error:
        log.get_logger().warning("the published audit cannot be read: the rows are audited again", why=str(error))
        return None
    log.get_logger().info("the audit of an earlier attempt is used again")
    return Audited(record, findings, ())


def with_audit_of_before(attempt: Attempt, dataset: DatasetRecord) -> DatasetRecord:
    """The record of the data with the first attempt's audit, if this attempt leaves out the same rows.

    If rows are left out, every attempt has to audit them again, possibly with other tools than the first, as when a
    package is missing here. The run's record keeps the audit of the first attempt.

    Raises:
        SettingsError: Other tools than the first attempt's have left out other rows.
    """
    earlier = attempt.recorded(Stage.PULL, Pulled)
    before, now = None if earlier is None else earlier.dataset.audit, dataset.audit
    if earlier is None or before is None or now is None or before == now:
        return dataset
    other_tools = [
        f"rows with a finding of the kind {kind} were searched for by {check.checked_by or 'nothing'} "
        f"when this run began, and by {now.checks[kind].checked_by or 'nothing'} here"
        for kind, check in before.checks.items()
        if kind in now.checks and check.action == "skip" and check.checked_by != now.checks[kind].checked_by
    ]
    if identity(replace(earlier, dataset=dataset)) == identity(earlier):
        if other_tools:
            message = "the audit used other tools than when this run began, but leaves out the same rows; nothing to do"
            log.get_logger().warning(message, tools=other_tools)
        return replace(dataset, audit=before)
    if not other_tools:
        return dataset  # the data itself has changed, which the comparison of the whole record reports
    message = f"{'; '.join(other_tools)}: other rows would be trained on"
    advice = "install the tools with which the run began, or start a new run"
    raise SettingsError([Problem("JOB_DATA__ON_FINDING", message)], advice=advice)


def publish_findings(attempt: Attempt, sources: Sources) -> None:
    """Publishes the audit's findings if the store does not have them; before the record of the pull, which lists them.

    Raises:
        DataError: The findings are gone from the store, and this machine's audit, with other tools, found others.
    """
    record = sources.record.dataset.audit
    if record is None or sources.findings is None:
        return
    if attempt.damaged([Artifact(FINDINGS, record.bytes, record.sha256)]):
        if hash_file(sources.findings) != record.sha256:
            message = (
                "is missing, and the audit's tools on this machine find other things than those of the first attempt"
            )
            raise DataError(
                [
                    Problem(
                        f"{attempt.store.uri}/{FINDINGS}",
                        f"{message}; install the tools of the first attempt, or start a new run",
                    )
                ]
            )
        attempt.publish(sources.findings, FINDINGS)
