"""`verify`: checks that a published run agrees with its manifest, from the run's own files only.

Every file is read once, up to the size in the manifest, and compared with its hash or seal; every figure is recomputed
from samples, metrics and attempts. This detects damage and mistakes, down to a single byte. It does not detect changes
by a person who can write to the run's folder and recomputes the hashes and seals. The signature of a signed run does,
for the manifest, the artifacts and all that the manifest lists. It does not cover what is written after the manifest:
the last attempt's record, the lease, and the records of pushes and of `serve-check`.

To add a check: a function that returns a `CheckResult`, and a line in `verify`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job.checkpoints.commit_marker import Marker
from job.common.formatting import count
from job.common.hashing import unsealed
from job.common.tables import visible
from job.errors import Problem, VerificationError
from job.records import Artifact
from job.results.inventory import artifacts_of, evidence_of, is_evidence, is_leftover
from job.results.reader import parse, read_bytes
from job.runs.layout import ARTIFACTS, FIRST_STAGE, PUSHED, RESULTS, SERVED, SIGNATURE
from job.storage.location import join
from job.storage.open import ObjectStore, StorageOptions, is_key, open_store
from job.verification import check_checkpoints
from job.verification.check_audit import check_audit
from job.verification.check_bom import check_bom, check_compute
from job.verification.check_evaluation import check_evaluation, check_gate
from job.verification.check_exports import check_exports
from job.verification.check_first_stage import check_first_stage
from job.verification.check_history import check_attempts, check_settings, check_stages, fingerprint_of
from job.verification.check_preferences import check_preferences
from job.verification.check_principles import check_principles
from job.verification.check_prompts import check_prompts
from job.verification.check_pushes import check_pushes
from job.verification.check_served import check_served
from job.verification.check_signature import check_signature
from job.verification.check_training import check_cost, check_training, check_validation
from job.verification.differences import CheckResult, Difference, show
from job.verification.fetch_files import fetch_files

_DEFAULT = StorageOptions()


def verify(
    store: ObjectStore,
    work: Path,
    storage: StorageOptions = _DEFAULT,
    *,
    nested: bool = False,
    key: str | None = None,
) -> list[CheckResult]:
    """Checks a run, and the first stage of a run that trained in two stages.

    Args:
        store: The run's store.
        work: Folder for copies of the files.
        storage: How to reach the store of the first stage.
        nested: Whether the run is itself a first stage: it then has no other stage before it.
        key: Public key in PEM that must have signed the run; None accepts any signer, and unsigned runs.

    Returns:
        The result of every check; if the manifest cannot be parsed, that of the manifest only.

    Raises:
        SettingsError: There is no run here.
        VerificationError: The run has no results.
    """
    data = read_bytes(store)
    try:
        results = parse(data)
    except ValueError as error:
        return [
            CheckResult("manifest", f"{len(data):,} bytes", (Difference(RESULTS, "the job's manifest", str(error)),))
        ]
    listed = {info.key: info.bytes for info in store.list()}
    if results["training"].get("first_stage") and not nested:  # `check_first_stage` checks these files
        listed = {key: size for key, size in listed.items() if not key.startswith(FIRST_STAGE)}
    files = _fetch_listed(store, results, listed, work)
    copies, run = files.copies, fingerprint_of(files.copies)
    attempts, sealed = check_attempts(results, copies, store, listed, run)
    return [
        CheckResult("manifest", f"schema {results['schema_version']}, run {show(results['run']['id'])}", _seal(data)),
        CheckResult("artifacts", _extent(files.artifacts), tuple(files.artifact_differences)),
        CheckResult("evidence", _extent(files.evidence), tuple(files.evidence_differences)),
        _check_other_files(results, store, listed, files, sealed=sealed, run=run),
        check_evaluation(results, copies),
        check_gate(results, copies),
        check_training(results, copies),
        check_validation(results, copies),
        *check_audit(results, copies),
        *filter(
            None,
            [
                check_prompts(results, copies),
                check_principles(results, copies),
                check_preferences(results, copies),
                check_exports(results, copies),
                check_bom(results, copies),
                check_compute(results),
                check_signature(results, data, store, copies, key),
                check_pushes(results, store, listed, copies),
                check_served(results, store, listed, copies),
            ],
        ),
        check_cost(results),
        check_settings(results, copies),
        check_stages(results, copies, run),
        attempts,
        check_checkpoints.check_checkpoints(results, files.markers, copies, files.checkpoint_differences, run),
        *(() if nested else check_first_stage(results, store, lambda: _verify_first_stage(store, work, storage))),
    ]


@dataclass(frozen=True)
class _ListedFiles:
    """The files that the manifest and the commit markers list, with local copies by path, and where they differ."""

    artifacts: list[Artifact]
    evidence: list[Artifact]
    markers: list[Marker]
    checkpoints: list[Artifact]
    copies: dict[str, Path]
    artifact_differences: list[Difference]
    evidence_differences: list[Difference]
    checkpoint_differences: list[Difference]


def _fetch_listed(
    store: ObjectStore, results: Mapping[str, Any], listed: Mapping[str, int], work: Path
) -> _ListedFiles:
    """Copies the files to `work`. The markers are among the evidence, so their checkpoints come last."""
    artifacts, evidence = artifacts_of(results), evidence_of(results)
    copies, artifact_differences = fetch_files(store, artifacts, listed, work)
    more_copies, evidence_differences = fetch_files(store, evidence, listed, work)
    copies |= more_copies
    markers, marker_differences = check_checkpoints.read_markers(copies)
    checkpoints = [claim for marker in markers for claim in check_checkpoints.claims(marker)]
    more_copies, checkpoint_differences = fetch_files(store, checkpoints, listed, work)
    return _ListedFiles(
        artifacts=artifacts,
        evidence=evidence,
        markers=markers,
        checkpoints=checkpoints,
        copies=copies | more_copies,
        artifact_differences=artifact_differences,
        evidence_differences=evidence_differences,
        checkpoint_differences=[*marker_differences, *checkpoint_differences],
    )


def _check_other_files(
    results: Mapping[str, Any],
    store: ObjectStore,
    listed: Mapping[str, int],
    files: _ListedFiles,
    *,
    sealed: set[str],
    run: str | None,
) -> CheckResult:
    """Checks that every file in the folder is listed, and in the right place.

    Args:
        results: The manifest.
        store: The run's store.
        listed: Path -> bytes of every file in the store.
        files: Those that the manifest and the markers list.
        sealed: Paths of the attempts' sealed records.
        run: The run's fingerprint.
    """
    last = results["run"]["attempts"][-1]["number"]
    expected_keys = {
        RESULTS,
        *sealed,
        *([SIGNATURE] if results.get("signing") else []),
        *(key for key in listed if key.startswith((PUSHED, SERVED))),
        *(claim.path for claim in (*files.artifacts, *files.evidence, *files.checkpoints)),
    }
    misplaced = [
        *(_out_of_place(claim) for claim in files.artifacts if not claim.path.startswith(ARTIFACTS)),
        *(_out_of_place(claim) for claim in files.evidence if not is_evidence(claim.path, last)),
    ]
    late = check_checkpoints.late_markers(store, listed.keys() - expected_keys, run, last)
    unknown, leftovers = _unclaimed(listed, expected_keys, {marker.folder for marker in files.markers}, late)
    extent = f"{count(len(listed), 'file')} in the folder"
    return CheckResult("other files", extent, (*misplaced, *unknown), leftovers)


def _verify_first_stage(store: ObjectStore, work: Path, storage: StorageOptions) -> list[CheckResult]:
    folder = work / FIRST_STAGE
    folder.mkdir(exist_ok=True)
    return verify(open_store(join(store.uri, FIRST_STAGE.rstrip("/")), storage), folder, storage, nested=True)


def _seal(data: bytes) -> tuple[Difference, ...]:
    try:
        unsealed(data)
    except ValueError as error:
        return (Difference(RESULTS, "an unchanged manifest", str(error)),)
    return ()


def _extent(claims: list[Artifact]) -> str:
    return f"{count(len(claims), 'file')}, {count(sum(claim.bytes for claim in claims), 'byte')}"


def _out_of_place(claim: Artifact) -> Difference:
    return Difference(claim.path, "a file of this group of the manifest", "a file of another kind")


def _unclaimed(
    listed: Mapping[str, int], expected_keys: set[str], complete_folders: set[str], late: set[str]
) -> tuple[tuple[Difference, ...], tuple[str, ...]]:
    """The files that no record lists.

    Args:
        listed: Path -> bytes of every file in the store.
        expected_keys: Paths that a record lists.
        complete_folders: Folders of valid checkpoints, whose markers list every file.
        late: Commit markers that were written after the run was published.

    Returns:
        Differences, and notes on files that a killed or replaced attempt may have left behind.
    """
    unknown, leftovers = [], []
    for key, size in listed.items():
        if key in expected_keys:
            continue
        if key in late:
            leftovers.append(f"{key} was written by an attempt that had been replaced; nothing reads it")
        elif is_key(key) and is_leftover(key) and not key.startswith(tuple(complete_folders)):
            leftovers.append(f"{key} was left behind by an attempt that was killed; nothing reads it")
        else:
            unknown.append(Difference(key, "no such file", f"a file of {size} bytes"))
    return tuple(unknown), tuple(leftovers)


def as_json(where: str, checks: list[CheckResult]) -> dict[str, Any]:
    """The result as JSON-able values."""
    return {
        "results": where,
        "verified": not any(check.differences for check in checks),
        "checks": [{**asdict(check), "holds": not check.differences} for check in checks],
    }


def as_lines(checks: list[CheckResult]) -> list[str]:
    """The result as lines of text."""
    lines = []
    width = max(len(check.what) for check in checks)
    for check in checks:
        outcome = "differs" if check.differences else "holds"
        lines.append(f"{outcome:<8} {check.what:<{width}}  {check.extent}")
        lines += [f"  {difference}" for difference in check.differences]
        lines += [f"  note: {note}" for note in check.notes]
    wrong = sum(bool(check.differences) for check in checks)
    lines.append(f"{wrong} of {len(checks)} checks differ" if wrong else f"verified: all {len(checks)} checks hold")
    return [visible(line) for line in lines]


def require_verified(checks: list[CheckResult]) -> None:
    """Raises an error unless all checks hold.

    Raises:
        VerificationError: With all that differs.
    """
    problems = [
        Problem(visible(difference.where), visible(f"claimed {difference.claimed}, found {difference.found}"))
        for check in checks
        for difference in check.differences
    ]
    if problems:
        raise VerificationError(problems)
