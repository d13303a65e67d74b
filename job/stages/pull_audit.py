"""The audit of the training rows as a stage has it: what it looks for, and what an earlier attempt has found already.

The audit itself is in `job.audit`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from job import log
from job.audit.audit import Audited, read_findings
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
        attempt: Its watchdog gets beats while rows are scored.
        data: What to do with findings.
        run: The store that keeps the scores, and the device that computes them.
        storage: How to reach stores.
        prompts: By task, those of the questions that will be scored: a row that contains one is a finding.
        safety: The classifier of JOB_DATA__SAFETY_MODEL; None without.
    """
    questions = index_questions(prompts)
    if safety is None:
        return {"audit": set_up(questions, data.on_finding)}
    shared = open_store(run.output, storage)
    screen = screen_rows(attempt, safety, run, shared)
    return {"audit": set_up(questions, data.on_finding, safety.record), "screen": screen}


def known_scores(attempt: Attempt) -> dict[str, Screen]:
    """As `audit_arguments` has it, a `screen` by what an earlier attempt published; empty if there is nothing.

    On another GPU the classifier may score a row on the other side of the threshold: the run keeps the rows that it
    began with.
    """
    earlier = attempt.recorded(Stage.PULL, Pulled)
    record = None if earlier is None else earlier.dataset.audit
    if record is None or record.safety is None:
        return {}
    try:
        findings = read_findings(attempt.fetch(Artifact(FINDINGS, record.bytes, record.sha256)))
    except DataError:
        return {}  # which `known_audit` logs
    scores = {one.row: one.score or 0.0 for one in findings if one.kind == UNSAFE}
    return {"screen": lambda texts: [scores.get(row, 0.0) for row in range(len(texts))]}


def known_audit(attempt: Attempt) -> Audited | None:
    """The result of the audit that an earlier attempt published; None if there is none, or rows were left out.

    Which examples these are is found out again, with the same result.
    """
    earlier = attempt.recorded(Stage.PULL, Pulled)
    record = None if earlier is None else earlier.dataset.audit
    if record is None or record.left_out:
        return None
    try:
        findings = attempt.fetch(Artifact(FINDINGS, record.bytes, record.sha256)).read_bytes()
    except DataError as error:
        log.get_logger().warning("the audit of the rows is made again", why=str(error))
        return None
    log.get_logger().info("the audit of the rows is known from an earlier attempt")
    return Audited(record, findings, ())


def with_audit_of_before(attempt: Attempt, dataset: DatasetRecord) -> DatasetRecord:
    """The record of the data with the audit of the first attempt, if the same rows are left out on this machine.

    Where rows are left out, every attempt looks for them again, and it may do that with other tools than the first: a
    package may be missing here. The run's audit stays what the first attempt found.

    Raises:
        SettingsError: Other rows are left out, and what looks for them is another.
    """
    earlier = attempt.recorded(Stage.PULL, Pulled)
    before, now = None if earlier is None else earlier.dataset.audit, dataset.audit
    if earlier is None or before is None or now is None or before == now:
        return dataset
    other = [
        f"rows with a finding of the kind {kind} were looked for by {check.checked_by or 'nothing'} "
        f"when this run began, and by {now.checks[kind].checked_by or 'nothing'} here"
        for kind, check in before.checks.items()
        if kind in now.checks and check.action == "skip" and check.checked_by != now.checks[kind].checked_by
    ]
    if identity(replace(earlier, dataset=dataset)) == identity(earlier):
        if other:
            log.get_logger().warning("the audit's tools are others, which leave out the same rows", tools=other)
        return replace(dataset, audit=before)
    if not other:
        return dataset  # the data has changed, which is told for all of the record
    what = f"{'; '.join(other)}: other rows would be trained on"
    advice = "install what the run began with, or start a new run"
    raise SettingsError([Problem("JOB_DATA__ON_FINDING", what)], advice=advice)


def publish_findings(attempt: Attempt, sources: Sources) -> None:
    """Publishes what the audit found, before the record of the pull that lists it; once, and again if it is gone.

    Raises:
        DataError: It is gone, and the audit on this machine, with other tools, found something else.
    """
    record = sources.record.dataset.audit
    if record is None or sources.findings is None:
        return
    if attempt.damaged([Artifact(FINDINGS, record.bytes, record.sha256)]):
        if hash_file(sources.findings) != record.sha256:
            what = "is gone, and the audit's tools on this machine find something else than the first attempt's"
            raise DataError([Problem(f"{attempt.store.uri}/{FINDINGS}", f"{what}; install those, or start a new run")])
        attempt.publish(sources.findings, FINDINGS)
