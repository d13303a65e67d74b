"""Checks the exported formats of a manifest: scores, choice of the candidate, and files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from job.common.export_formats import ADAPTER, GGUF, MERGED, is_adapter, to_make
from job.common.formatting import count
from job.common.gguf_file import gguf_contents
from job.data.calibration import calibration_rows, hash_rows
from job.evaluation.comparison import choose_candidate, compare_export
from job.records import TaskScores
from job.runs.layout import EXPORT, EXPORT_CARD, ORIGINAL_SIDE, RESULTS, SIGNATURE, export_folder, export_side
from job.verification.check_adapter_copy import adapter_files
from job.verification.check_evaluation import SamplesByTask, read_samples, scores_of, unpaired
from job.verification.differences import MAX_SHOWN, CheckResult, Copies, Difference, find_differences, show

_ADDED = (EXPORT_CARD, SIGNATURE)
"""Files that the stage `publish` adds to those of a format."""


def check_exports(results: Mapping[str, Any], copies: Copies) -> CheckResult | None:
    """Recomputes every figure of every candidate from the samples, and the choice; checks the published files.

    Returns:
        None if the run has no exports and its settings request none.
    """
    exports = results.get("exports", ())
    requested = results["settings"].get("export.formats", {}).get("value") or []
    if not exports and not requested:
        return None
    tasks = results["evaluation"]["tasks"]
    formats = [export["format"] for export in exports]
    differences = list(find_differences(f"{RESULTS} exports", formats, to_make(requested)))
    shipped = [export["format"] for export in exports if export.get("published", True)]
    to_ship = [entry["format"] for entry in exports if entry["format"] in requested and not entry.get("not_made")]
    differences += find_differences(f"{RESULTS} exports published", shipped, to_ship)
    listed = {artifact["path"] for artifact in results["artifacts"]}
    folders = tuple(map(export_folder, shipped))
    differences += [
        Difference(path, "a file of an exported format", "a file of no format in the manifest")
        for path in sorted(listed)
        if path.startswith(EXPORT) and not path.startswith(folders)
    ]
    left_out = sorted(results["evaluation"].get("measured", {}))
    for number, export in enumerate(exports):
        if (not_scored := export.get("tasks_not_scored")) is not None:  # older versions do not record it
            differences += find_differences(f"{RESULTS} exports[{number}].tasks_not_scored", not_scored, left_out)
    (base, base_wrong), (adapter, adapter_wrong) = (read_samples(tasks, side, copies) for side in ("base", "adapter"))
    if not base_wrong and not adapter_wrong:  # else reported by the check of the evaluation
        for number, export in enumerate(exports):
            differences += _check_one(export, f"{RESULTS} exports[{number}]", results, copies, (base, adapter))
    extent = ", ".join(f"{export['format']} of {count(len(export['candidates']), 'candidate')}" for export in exports)
    return CheckResult("exports", extent or "none", tuple(differences))


def _check_one(
    export: Mapping[str, Any],
    where: str,
    results: Mapping[str, Any],
    copies: Copies,
    base_and_adapter: tuple[SamplesByTask, SamplesByTask],
) -> Iterator[Difference]:
    """Checks one format: the figures of its candidates, the choice among them, and its files.

    Args:
        export: Its entry in the manifest.
        where: Where that entry is, for differences.
        results: The manifest.
        copies: Local copies by path.
        base_and_adapter: The samples of base and adapter.
    """
    tasks, (base, adapter) = results["evaluation"]["tasks"], base_and_adapter
    scores: dict[str, dict[str, TaskScores]] = {}
    for candidate, claimed in export["candidates"].items():
        side = export_side(export["format"], candidate)
        if (export.get("not_scored") or export.get("not_made")) and not claimed:
            continue
        if claimed.keys() != tasks.keys():
            yield Difference(f"{where}.candidates.{candidate}", show(sorted(tasks)), show([*claimed]))
            continue
        samples, wrong = read_samples(tasks, side, copies)
        wrong = wrong or [*unpaired(samples, adapter, side)]
        yield from wrong
        if not wrong:
            claimed_entries = {task: {**tasks[task], side: figures["scores"]} for task, figures in claimed.items()}
            scores[candidate] = scores_of(samples, claimed_entries, side)
            pair = scores_of(base, tasks, "base"), scores_of(adapter, tasks, "adapter")
            original = None
            if any("versus_original" in figures for figures in claimed.values()):
                # The check of the evaluation reports what is wrong with these samples.
                original_samples, _ = read_samples(tasks, ORIGINAL_SIDE, copies)
                recorded_tasks = (results["evaluation"].get("full_precision") or {}).get("tasks", {})
                original_entries = {
                    task: {**tasks[task], ORIGINAL_SIDE: figures["scores"]} for task, figures in recorded_tasks.items()
                }
                paired = original_samples.keys() == original_entries.keys() and not any(
                    unpaired(original_samples, base, ORIGINAL_SIDE)
                )
                original = scores_of(original_samples, original_entries, ORIGINAL_SIDE) if paired else None
            recomputed = compare_export(*pair, scores[candidate], original)
            yield from find_differences(f"{where}.candidates.{candidate}", claimed, recomputed)
    if len(export["candidates"]) > 1 and scores.keys() == export["candidates"].keys():
        candidate, reason = choose_candidate(scores)
        claim = {name: export[name] for name in ("candidate", "reason")}
        yield from find_differences(where, claim, {"candidate": candidate, "reason": reason})
    if export["candidate"] not in export["candidates"]:
        yield Difference(f"{where}.candidate", export["candidate"], "no such candidate")
    if export["format"] != MERGED and not is_adapter(export["format"]):
        merged = next((entry["candidate"] for entry in results["exports"] if entry["format"] == MERGED), None)
        yield from find_differences(f"{where}.candidate", export["candidate"], merged)
    if export.get("published", True):
        yield from _files(export, results, copies)
    yield from _calibration(export, results, where)


def _files(export: Mapping[str, Any], results: Mapping[str, Any], copies: Copies) -> Iterator[Difference]:
    """Checks the total size of a format's files, and their content."""
    folder = export_folder(export["format"])
    if "bytes" in export:  # without model card and signature, which are written later
        paths = {
            artifact["path"]: artifact["bytes"]
            for artifact in results["artifacts"]
            if artifact["path"].startswith(folder)
        }
        total = sum(size for path, size in paths.items() if path.removeprefix(folder) not in _ADDED)
        yield from find_differences(f"{folder} bytes", export["bytes"], total)
    family = export["format"].partition(":")[0]
    yield from {ADAPTER: adapter_files, GGUF: _gguf_file}.get(family, _model_files)(export, copies)


def _calibration(export: Mapping[str, Any], results: Mapping[str, Any], where: str) -> Iterator[Difference]:
    """Recomputes which rows of the batch plan were used for calibration; their text is not part of a run."""
    claimed = (export.get("quantization") or {}).get("calibration")
    if claimed is None:
        return
    seed, number = (results["settings"][name]["value"] for name in ("run.seed", "export.calibration_rows"))
    rows = calibration_rows(seed, results["dataset"]["rows"], number)
    recomputed = {"rows": len(rows), "rows_sha256": hash_rows(rows)}
    recorded = {name: claimed[name] for name in recomputed}
    yield from find_differences(f"{where}.quantization.calibration", recorded, recomputed)


def _model_files(export: Mapping[str, Any], copies: Copies) -> Iterator[Difference]:
    """Checks a model's files: dtype and quantization in its configuration, and all tensors of the index."""
    from safetensors import SafetensorError

    folder = export_folder(export["format"])
    names = {path.removeprefix(folder): copy for path, copy in copies.items() if path.startswith(folder)}
    try:
        config = json.loads(names["config.json"].read_bytes())
        config_dtype = str(config.get("dtype"))
        if "model.safetensors.index.json" in names:
            index = json.loads(names["model.safetensors.index.json"].read_bytes())["weight_map"]
        else:
            index = dict.fromkeys(_tensor_names(names["model.safetensors"]), "model.safetensors")
        missing = sorted(set(index.values()) - names.keys())
        tensors = {name for file in set(index.values()) & names.keys() for name in _tensor_names(names[file])}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
        yield Difference(folder, "a model that can be loaded", f"{type(error).__name__}: {str(error)[:MAX_SHOWN]}")
        return
    yield from (Difference(f"{folder}{name}", "a file of weights", "no readable file") for name in missing)
    if not missing and tensors != index.keys():
        yield Difference(folder, "the tensors that its index names", "other tensors")
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(config_dtype)
    if not export.get("not_scored"):  # the dtype is recorded when the export is loaded to be scored
        yield from find_differences(f"{folder}config.json dtype", export["dtype"], dtype)
    quantization = export.get("quantization")
    if quantization is None and "quantization_config" in config:
        yield Difference(f"{folder}config.json", "unquantized weights", "quantized weights")
    if quantization is not None:
        yield from find_differences(f"{folder}config.json quantization_config", *_quantized(quantization, config))


def _gguf_file(export: Mapping[str, Any], copies: Copies) -> Iterator[Difference]:
    """Checks the types of the tensors in a GGUF file, if the package `gguf` is installed."""
    folder = export_folder(export["format"])
    copies_by_name = {path.removeprefix(folder): copy for path, copy in copies.items() if path.startswith(folder)}
    files = [copy for name, copy in copies_by_name.items() if name not in _ADDED]
    if len(files) != 1:
        yield Difference(folder, "one file", str(len(files)))
    elif find_spec("gguf") is not None:
        claimed = (export.get("quantization") or {}).get("gguf") or {}
        try:
            content = gguf_contents(files[0])
        except (ValueError, KeyError, IndexError, OSError, OverflowError) as error:
            yield Difference(folder, "a GGUF file", f"{type(error).__name__}: {str(error)[:MAX_SHOWN]}")
            return
        yield from find_differences(
            f"{folder} quantization.gguf", {name: claimed.get(name) for name in content}, content
        )


def _quantized(recorded: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the weights are quantized: by the manifest (`recorded`), and by the model's own configuration."""
    model_config = config.get("quantization_config")
    model_config = model_config if isinstance(model_config, dict) else {}
    claimed = {name: recorded[name] for name in ("method", "bits", "group_size")}
    computed = {
        "method": model_config.get("quant_method"),
        "bits": model_config.get("bits"),
        "group_size": model_config.get("group_size"),
    }
    if computed["method"] == "compressed-tensors":
        groups = list((model_config.get("config_groups") or {}).values())
        weights = groups[0]["weights"] if len(groups) == 1 else {}
        computed |= {"bits": weights.get("num_bits"), "group_size": weights.get("group_size")}
        claimed["kept"], computed["kept"] = sorted(recorded["kept"]), sorted(model_config.get("ignore") or [])
    return claimed, computed


def _tensor_names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as opened:
        return list(opened.keys())
