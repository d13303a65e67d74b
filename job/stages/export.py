"""Export: makes the formats that were asked for, scores every candidate on the run's questions, publishes the best.

What is scored are the very files that are published, loaded as a model of their own. A restart makes them again, takes
up the scores that are kept, and uploads only what is not in the store.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from job import log
from job.common.hashing import hash_files
from job.common.resources import check_disk, required_bytes
from job.errors import Unreachable
from job.evaluation.comparison import choose_candidate
from job.evaluation.score_cache import ScoreCache, score_conditions
from job.export.formats import FORMATS, ExportInputs
from job.export.merge import Candidates, release
from job.export.scoring import load_exported
from job.records import Artifact, Evaluated, Exported, ExportRecord, Trained, Uploaded
from job.runs.attempt import Attempt, missing
from job.runs.layout import SCORES, UPLOADED, export_folder, export_side
from job.settings.load import Settings
from job.stages.evaluate import load_published_adapter, score_model
from job.stages.handoff import Loaded, Sources
from job.stages.pull import fetch_original
from job.storage.open import storage_options

Made = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""By format and candidate: its `folder`, and `files`, by name their SHA-256; JSON-able."""


def check_export(attempt: Attempt, settings: Settings, original: Path, loaded: Loaded) -> dict[str, Candidates]:
    """Refuses before training what cannot be exported after it; returns what will be made, by format.

    Args:
        attempt: On its disk the candidates are written.
        settings: Name the formats.
        original: Folder of the base's own files.
        loaded: The model, with any adapter.

    Raises:
        SettingsError: The base or the adapter cannot be exported as asked for.
        DataError: The base's files cannot be read.
        Unreachable: The disk is too small.
    """
    asked = settings.export
    found: dict[str, Candidates] = {
        name: FORMATS[name].candidates(loaded.model, original, asked.merge_onto) for name in asked.formats
    }
    check_disk(attempt.work, required_bytes(len(one.names) * one.bytes_each for one in found.values()))
    return found


def export(attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded, trained: Trained) -> Exported | None:
    """Makes, scores and publishes all formats. The model in memory is given up: no stage after this one uses it."""
    load_published_adapter(attempt, loaded, trained)
    made = attempt.processes.share_on_machine("exported", lambda: _make(attempt, settings, sources, loaded))
    hashes = [[one["files"] for one in candidates.values()] for _, candidates in sorted(made.items())]
    if any(other != hashes for other in attempt.processes.gather("exported files", hashes)):
        raise Unreachable("the machines of this run exported different bytes; give all of them the same kind of GPU")
    device, compute_dtype = loaded.model.device, loaded.model.get_base_model().dtype
    release(loaded.model)
    exports, artifacts = [], list[Artifact]()
    for name in settings.export.formats:
        evaluated, dtypes = {}, ("", "")
        for candidate, files in made[name].items():
            exported = load_exported(
                Path(files["folder"]),
                device=device,
                compute_dtype=compute_dtype,
                max_length=settings.train.max_length,
                packed=loaded.packing.packed,
            )
            dtypes = exported.dtype, exported.scored_in
            facts = {"exported": files["files"], "dtype": exported.scored_in, "packed": loaded.packing.packed}
            cache = ScoreCache(attempt.store, SCORES, settings.run.id, score_conditions(facts))
            side = export_side(name, candidate)
            log.get_logger().info("evaluating", export=name, candidate=candidate, dtype=exported.scored_in)
            found = score_model(attempt, settings, sources, exported.model, cache=cache, side=side)
            release(exported.model)
            if found is not None:
                evaluated[candidate] = found
        if attempt.processes.leads:
            record = _choose(name, made[name], evaluated, dtypes)
            log.get_logger().info("exported", export=name, candidate=record.candidate, reason=record.reason)
            exports.append(record)
            artifacts += [artifact for found in evaluated.values() for artifact in found.artifacts]
            artifacts += _publish(attempt, made[name][record.candidate], export_folder(name))
    return Exported(exports, artifacts) if attempt.processes.leads else None


def _make(attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded) -> dict[str, Any]:
    """Writes all candidates on this machine's disk; returns where they are, as `Made`."""
    original = sources.original
    if original is None:
        original = fetch_original(attempt, settings, storage_options(settings.storage), sources.record)
    made: dict[str, Any] = {}
    for name, candidates in check_export(attempt, settings, original, loaded).items():
        inputs = ExportInputs(
            model=loaded.model,
            source=original,
            tokenizer=sources.tokenizer,
            candidates=candidates.names,
            folder=attempt.work / "candidates" / name,
            alive=attempt.alive,
        )
        made[name] = {}
        for candidate, folder in FORMATS[name].make(inputs).items():
            files = sorted(folder.iterdir())
            hashes = {path.name: sha256 for path, sha256 in zip(files, hash_files(files), strict=True)}
            made[name][candidate] = {"folder": str(folder.absolute()), "files": hashes, "only": candidates.only}
    return made


def _choose(
    name: str, made: Mapping[str, Mapping[str, Any]], evaluated: Mapping[str, Evaluated], dtypes: tuple[str, str]
) -> ExportRecord:
    """Which candidate is published, and why."""
    scores = {candidate: found.scores for candidate, found in evaluated.items()}
    if len(scores) == 1:
        chosen = next(iter(scores))
        reason = made[chosen]["only"]
    else:
        chosen, reason = choose_candidate(scores)
    return ExportRecord(name, chosen, reason, *dtypes, scores)


def _publish(attempt: Attempt, chosen: Mapping[str, Any], prefix: str) -> list[Artifact]:
    """Uploads the files of a candidate, without those that an earlier attempt uploaded."""
    known = attempt.recorded(UPLOADED, Uploaded) or Uploaded([])
    gone = set(missing(attempt.store, known.artifacts))
    there = {artifact.path: artifact for artifact in known.artifacts if artifact.path not in gone}
    found = []
    for name, sha256 in chosen["files"].items():
        attempt.alive()
        key = prefix + name
        if key not in there or there[key].sha256 != sha256:
            there[key] = attempt.publish(Path(chosen["folder"]) / name, key)
            attempt.keep(UPLOADED, json.dumps(asdict(Uploaded(list(there.values())))))
        found.append(there[key])
    return found
