"""Checks that the records written during a run (settings, stages, attempts) agree with its manifest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING as MISSING_DEFAULT
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, TypeVar

from job.common.bad_row_reasons import with_reasons
from job.common.formatting import count
from job.common.validation import adapter_of, first_error
from job.errors import JobError
from job.evaluation.comparison import compare_near_ties, compare_tasks
from job.evaluation.groups import compare_groups
from job.evaluation.task_metrics import compare_measured
from job.records import Artifact, AttemptRecord, Evaluated, Exported, ExportedRun, Pulled, Trained
from job.results.manifest import exports_record, full_precision_record
from job.results.reader import scored_in
from job.runs import lease, stage_records
from job.runs.layout import (
    EXPORTED_RUN,
    LEASE,
    RESULTS,
    SETTINGS,
    Stage,
    attempt_key,
    attempt_number,
    prompts_key,
    stage_key,
)
from job.runs.run_log import parse_logged, parse_record
from job.runs.run_settings import parse_settings
from job.storage.open import ObjectStore, TooLarge
from job.verification.differences import MAX_SHOWN, CheckResult, Copies, Difference, find_differences, other_run, show
from job.verification.fetch_files import MISSING

PULL, BASE, TRAIN, ADAPTER = map(stage_key, (Stage.PULL, Stage.EVALUATE_BASE, Stage.TRAIN, Stage.EVALUATE_ADAPTER))
EXPORT = stage_key(Stage.EXPORT)
MAX_RECORD_BYTES = 1 << 20
T = TypeVar("T")


def check_settings(results: Mapping[str, Any], copies: Copies) -> CheckResult:
    """Checks that `settings.json`, which the first attempt wrote, agrees with the manifest."""
    differences: list[Difference] = []
    data = copies[SETTINGS].read_bytes() if SETTINGS in copies else None
    recorded = _parsed(SETTINGS, parse_settings, data, differences)
    if recorded is not None:
        claimed = {name: setting["value"] for name, setting in results["settings"].items() if name in recorded}
        differences += find_differences(f"{RESULTS} settings", claimed, recorded)
    return CheckResult("settings", f"{len(recorded or ())} that affect the result", tuple(differences))


def fingerprint_of(copies: Copies) -> str | None:
    """The run's fingerprint, a hash of settings, data and weights in its records; None if these cannot be read."""
    try:
        settings = parse_settings(copies[SETTINGS].read_bytes())
        return stage_records.fingerprint(
            settings, stage_records.parse(PULL, copies[PULL].read_bytes(), adapter_of(Pulled))[0]
        )
    except (KeyError, ValueError):
        return None  # `check_settings` and `check_stages` report it


def check_stages(results: Mapping[str, Any], copies: Copies, run: str | None) -> CheckResult:
    """Checks that the records of the stages agree with the manifest, and belong to this run."""
    differences: list[Difference] = []
    pulled = _read(PULL, Pulled, copies, differences, run)
    base, adapter = (_read(path, Evaluated, copies, differences, run) for path in (BASE, ADAPTER))
    trained = _read(TRAIN, Trained, copies, differences, run)
    if pulled is not None:
        recorded = {"sha256": pulled.model_sha256, "revision": pulled.model_revision}
        differences += find_differences(
            f"{RESULTS} dataset",
            with_reasons(_with_defaults(_as_pulled(results["dataset"], pulled), pulled.dataset)),
            with_reasons(asdict(pulled.dataset)),
        )
        recorded |= {"licence": pulled.model_licence}
        claimed = {name: results["model"].get(name) for name in recorded}
        differences += find_differences(f"{RESULTS} model", claimed, recorded)
        prompts = None if pulled.prompts is None else asdict(pulled.prompts)
        differences += find_differences(f"{RESULTS} evaluation.prompts", results["evaluation"].get("prompts"), prompts)
    if trained is not None and pulled is not None:
        where = f"{RESULTS} training.start_sha256"
        differences += find_differences(where, trained.training.start_sha256, pulled.start_sha256)
    if trained is not None:
        claimed = _with_defaults(results["training"], trained.training)
        differences += find_differences(f"{RESULTS} training", claimed, asdict(trained.training))
        differences += _artifacts_differ(results, trained.artifacts)
    if base is not None and adapter is not None:
        differences += _artifacts_differ(results, [*base.artifacts, *adapter.artifacts])
        try:
            overlap = (results["dataset"].get("audit") or {}).get("overlap")
            tasks = compare_tasks(base.scores, adapter.scores, overlap=overlap)
            original = full_precision_record(base, adapter.scores)
            bound = (results["evaluation"].get("near_ties") or {}).get("bound")
            near = compare_near_ties(base.scores, adapter.scores, scored_in(results)["dtype"], bound)
        except (JobError, ValueError) as error:
            differences.append(Difference(ADAPTER, "scores that compare with the base's", str(error)))
        else:
            evaluation = results["evaluation"]
            differences += find_differences(f"{RESULTS} evaluation.tasks", evaluation["tasks"], tasks)
            where = f"{RESULTS} evaluation.full_precision"
            differences += find_differences(where, evaluation.get("full_precision"), original)
            differences += find_differences(f"{RESULTS} evaluation.near_ties", evaluation.get("near_ties"), near)
            precision = _precision(base)
            differences += find_differences(f"{RESULTS} evaluation.precision", evaluation.get("precision"), precision)
        differences += _measured_differ(results, base, adapter)
        differences += find_differences(f"{ADAPTER} generation", adapter.generation, base.generation)
        differences += find_differences(f"{ADAPTER} precision", _precision(adapter), _precision(base))
        differences += _judged_differ(results, base, adapter)
        if pulled is not None:
            differences += _groups_differ(results, pulled, base, adapter)
    stages = "pull, evaluate base, train, evaluate adapter"
    if results.get("exports") or EXPORT in copies:
        stages += ", export"
        exported = _read(EXPORT, Exported, copies, differences, run)
        if exported is not None and base is not None and adapter is not None:
            differences += _exports_differ(results, exported, base, adapter)
    return CheckResult("stages", stages, tuple(differences))


def _precision(evaluated: Evaluated) -> dict[str, Any] | None:
    """How the choices were scored, as the manifest has it; None in old records."""
    return None if evaluated.precision is None else asdict(evaluated.precision)


def _measured_differ(results: Mapping[str, Any], base: Evaluated, adapter: Evaluated) -> Iterator[Difference]:
    """Recomputes the figures of tasks without choices from the stages' records."""
    try:
        recomputed = compare_measured(base.measured, adapter.measured)
    except (JobError, ValueError, ArithmeticError, KeyError) as error:
        yield Difference(ADAPTER, "figures that compare with the base's", str(error))
    else:
        yield from find_differences(
            f"{RESULTS} evaluation.measured", results["evaluation"].get("measured", {}), recomputed
        )


def _judged_differ(results: Mapping[str, Any], base: Evaluated, adapter: Evaluated) -> Iterator[Difference]:
    """Checks that judge and rules in the manifest are those of the record, and the answers are those it judged."""
    claimed, where = results["evaluation"].get("principles"), f"{RESULTS} evaluation.principles"
    recorded = None if adapter.judged is None else asdict(adapter.judged)
    if claimed is not None and recorded is not None:
        claimed = {name: claimed.get(name) for name in recorded}
    yield from find_differences(where, claimed, recorded)
    if adapter.judged_answers:
        published = {artifact.path: artifact.sha256 for artifact in (*base.artifacts, *adapter.artifacts)}
        sides = {side: published.get(prompts_key(side)) for side in ("base", "adapter")}
        yield from find_differences(f"{ADAPTER} judged_answers", adapter.judged_answers, sides)


def _groups_differ(
    results: Mapping[str, Any], pulled: Pulled, base: Evaluated, adapter: Evaluated
) -> Iterator[Difference]:
    """Checks that all tasks of the stage `pull` were scored, and that the groups are those of `pull`, with all tasks.

    Records of older versions, and of runs without groups, name no groups.
    """
    evaluation = results["evaluation"]
    scored = sorted([*evaluation["tasks"], *evaluation.get("measured", {})])
    yield from find_differences(f"{RESULTS} evaluation", scored, sorted(pulled.questions))
    if pulled.groups is None:
        return
    where = f"{RESULTS} evaluation.groups"
    try:
        recomputed = compare_groups(pulled.groups, base, adapter)
    except (KeyError, ValueError, ArithmeticError):
        yield Difference(where, "groups of the tasks that were scored", "others, in the record of the pull")
    else:
        yield from find_differences(where, evaluation.get("groups", {}), recomputed)


def _exports_differ(
    results: Mapping[str, Any], exported: Exported, base: Evaluated, adapter: Evaluated
) -> Iterator[Difference]:
    """Compares the manifest's exports with the record of the stage `export`."""
    yield from _artifacts_differ(results, exported.artifacts)
    try:
        recomputed = exports_record(exported, base, adapter.scores)
    except (JobError, ValueError) as error:
        yield Difference(EXPORT, "scores that compare with the base's", str(error))
    else:
        yield from find_differences(f"{RESULTS} exports", results.get("exports", []), recomputed)


def _as_pulled(dataset: Mapping[str, Any], pulled: Pulled) -> dict[str, Any]:
    """The manifest's data set without the figures that the version that pulled it did not record.

    A run may be pulled by an earlier version and completed by a later one. Early versions recorded no audit, and later
    ones an audit without languages and lengths.
    """
    audit, claimed = pulled.dataset.audit, dataset.get("audit")
    if audit is None or claimed is None:
        return {**dataset, "audit": claimed if audit is not None else None}
    figures = {"languages": {}, "languages_by": "", "languages_not_checked": "", "lengths": {}}
    return {**dataset, "audit": _with_defaults({**claimed, **({} if audit.lengths else figures)}, audit)}


def _with_defaults(claimed: Mapping[str, Any], record: Any) -> dict[str, Any]:
    """A record in the manifest, and those in it, with the defaults of fields that were added after its version."""
    plain = [item for item in fields(record) if item.default is not MISSING_DEFAULT]
    created = {
        item.name: item.default_factory() for item in fields(record) if item.default_factory is not MISSING_DEFAULT
    }
    parts = {
        item.name: _with_defaults(claimed[item.name], part)
        for item in fields(record)
        if is_dataclass(part := getattr(record, item.name)) and isinstance(claimed.get(item.name), Mapping)
    }
    return {**{item.name: item.default for item in plain}, **created, **claimed, **parts}


def _artifacts_differ(results: Mapping[str, Any], artifacts: list[Artifact]) -> list[Difference]:
    """The artifacts of a stage that the manifest lists differently or lacks."""
    listed = {artifact["path"]: artifact for artifact in results["artifacts"]}
    pairs = ((listed.get(artifact.path, {"path": None}), asdict(artifact)) for artifact in artifacts)
    return [
        difference
        for claimed, recorded in pairs
        for difference in find_differences(f"{RESULTS} artifacts", claimed, recorded)
    ]


def check_attempts(
    results: Mapping[str, Any], copies: Copies, store: ObjectStore, listed: Collection[str], run: str | None
) -> tuple[CheckResult, set[str]]:
    """Checks that the records of the attempts agree with the manifest, and that the last attempt had the lease.

    A later attempt may have started while the last one was publishing; it then has the lease, and had nothing to do.

    Args:
        results: The manifest.
        copies: Local copies of the files that the manifest lists.
        store: The run's store, for files that the manifest does not list because they change later; these are sealed.
        listed: Paths of all files in the store.
        run: The run's fingerprint; None if it is not known.

    Returns:
        The result, and the paths of the sealed files that belong to the run.
    """
    attempts = [AttemptRecord(**attempt) for attempt in results["run"]["attempts"]]
    last = attempts[-1]
    differences = list(_exported_run_differs(results, copies, run))
    for index, attempt in enumerate(attempts[:-1]):
        key = attempt_key(attempt.number)
        logged = _parsed(key, parse_logged, copies[key].read_bytes() if key in copies else None, differences)
        if logged is not None:
            differences += other_run(key, logged.run, run)
            recorded = logged.record
            # The record of a killed attempt still says `running`; the manifest says `killed`.
            recorded = replace(recorded, outcome="killed") if recorded.outcome == "running" else recorded
            differences += find_differences(f"{RESULTS} run.attempts[{index}]", asdict(attempt), asdict(recorded))
    listed_records = {attempt_key(attempt.number) for attempt in attempts}
    differences += [
        Difference(f"{RESULTS} run.attempts", "all attempts", f"one more in {key}")
        for key in copies
        if attempt_number(key) is not None and key not in listed_records
    ]
    key = attempt_key(last.number)
    if (logged := _parsed(key, parse_logged, _read_small_file(store, key), differences)) is not None:
        noted = logged.record
        differences += other_run(key, logged.run, run)
        where = f"{RESULTS} run.attempts[{len(attempts) - 1}]"
        differences += [*_growing_values_differ(last, noted), *_fixed_fields_differ(where, last, noted)]
    differences += find_differences(f"{RESULTS} run.started", results["run"]["started"], attempts[0].started)
    holder = _parsed(LEASE, lease.parse, _read_small_file(store, LEASE), differences)
    epoch = last.number if holder is None else holder.epoch
    if epoch < last.number:
        differences.append(Difference(LEASE, f"attempt {last.number} or later", f"attempt {epoch}"))
    later = [key for key in listed if last.number < (attempt_number(key) or 0) <= epoch]
    notes = [
        f"{key}: this attempt was started after the results were published, and changed nothing"
        for key in later
        if _parsed(key, parse_record, _read_small_file(store, key), differences) is not None
    ]
    extent = f"{count(len(attempts), 'attempt')}, and the lease"
    check = CheckResult("attempts", extent, tuple(differences), tuple(notes))
    return check, {LEASE, attempt_key(last.number), *later}


def _exported_run_differs(results: Mapping[str, Any], copies: Copies, run: str | None) -> Iterator[Difference]:
    """Compares the finished run that the manifest says is exported with the record of it."""
    claimed, path = results["run"].get("exported_run"), stage_key(EXPORTED_RUN)
    if claimed is None and path not in copies:
        return
    differences: list[Difference] = []
    record = _read(path, ExportedRun, copies, differences, run)
    yield from differences
    if record is not None:
        claimed = None if claimed is None else _with_defaults(claimed, record)
        yield from find_differences(f"{RESULTS} run.exported_run", claimed, asdict(record))


def _growing_values_differ(claimed: AttemptRecord, noted: AttemptRecord) -> Iterator[Difference]:
    """Checks values that grow: the last attempt's record is newer than the manifest, or older if it was killed then."""
    ended = noted.outcome != "running"
    for name, before, after in _growing_values(claimed, noted):
        if after < before if ended else after > before:
            order = "at least" if ended else "at most"
            where = f"{attempt_key(claimed.number)} {name}"
            yield Difference(where, show(after), f"{order} {show(before)} by {RESULTS}")


def _growing_values(claimed: AttemptRecord, noted: AttemptRecord) -> Iterator[tuple[str, float, float]]:
    """(name, in the manifest, in the record) of values that may grow in between: seconds, stage seconds, energy."""
    yield "seconds", claimed.seconds, noted.seconds
    for stage in _unfinished_stages(claimed, noted):
        if stage in claimed.stage_seconds and stage in noted.stage_seconds:
            yield f"stage_seconds.{stage}", claimed.stage_seconds[stage], noted.stage_seconds[stage]
    if claimed.energy_joules is not None and noted.energy_joules is not None:
        yield "energy_joules", claimed.energy_joules, noted.energy_joules


def _unfinished_stages(*records: AttemptRecord) -> set[str]:
    """For each record, the last stage in it, during which it was written."""
    return {next(reversed(record.stage_seconds)) for record in records if record.stage_seconds}


def _fixed_fields_differ(where: str, claimed: AttemptRecord, noted: AttemptRecord) -> Iterator[Difference]:
    """Differences in the fields that cannot change between the manifest and the last attempt's record."""
    ended = noted.outcome != "running"
    stages = claimed.stage_seconds.keys() & noted.stage_seconds.keys() - _unfinished_stages(claimed, noted)
    changing = {"outcome", "finished", "seconds", "stage_seconds", "energy_joules"}
    changing |= set() if ended else {"steps", "last_step", "repeated_steps", "repeated_seconds"}
    manifest_fields, attempt_fields = (
        {name: value for name, value in asdict(record).items() if name not in changing}
        | {"stage_seconds": {stage: record.stage_seconds[stage] for stage in stages}}
        for record in (claimed, noted)
    )
    yield from find_differences(where, manifest_fields, attempt_fields)


def _read_small_file(store: ObjectStore, key: str) -> bytes | None:
    """A small file of the store; None if it is missing, and empty, which no parser accepts, if it is too large."""
    try:
        stored = store.read(key, max_bytes=MAX_RECORD_BYTES)
    except TooLarge:
        return b""
    return None if stored is None else stored.data


def _parsed(key: str, parse: Callable[[bytes], T], data: bytes | None, differences: list[Difference]) -> T | None:
    """The parsed file; None if it is missing or malformed, which is added to `differences`."""
    if data is None:
        differences.append(Difference(key, "a file of the run", MISSING))
        return None
    try:
        return parse(data)
    except ValueError as error:
        differences.append(Difference(key, "a record of the job", first_error(error, MAX_SHOWN)))
        return None


def _read(path: str, kind: type[T], copies: Copies, differences: list[Difference], run: str | None) -> T | None:
    """A stage's result; None if its record is missing or malformed. `run` is the run's fingerprint, or None."""
    data = copies[path].read_bytes() if path in copies else None
    parsed = _parsed(path, lambda data: stage_records.parse(path, data, adapter_of(kind)), data, differences)
    if parsed is None:
        return None
    differences += other_run(path, parsed[1], run)
    return parsed[0]
