"""Checks the exported formats of a manifest: scores, choice, and that the files are a whole model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from job.common.formatting import count
from job.evaluation.comparison import choose_candidate, compare_export
from job.records import TaskScores
from job.runs.layout import EXPORT, RESULTS, export_folder, export_side
from job.verification.check_figures import Copies, read_samples, scores_of, unpaired
from job.verification.differences import MAX_SHOWN, CheckResult, Difference, find_differences, show


def check_exports(results: Mapping[str, Any], copies: Copies) -> CheckResult | None:
    """Every figure of every candidate, from the samples; the choice among them; and the published files.

    None where nothing was exported, and none was asked for.
    """
    exports = results.get("exports", ())
    asked = results["settings"].get("export.formats", {}).get("value") or []
    if not exports and not asked:
        return None
    tasks = results["evaluation"]["tasks"]
    formats = [export["format"] for export in exports]
    differences = list(find_differences(f"{RESULTS} exports", formats, asked))
    listed = {artifact["path"] for artifact in results["artifacts"]}
    folders = tuple(map(export_folder, formats))
    differences += [
        Difference(path, "a file of an exported format", "one of none")
        for path in sorted(listed)
        if path.startswith(EXPORT) and not path.startswith(folders)
    ]
    (base, base_wrong), (adapter, adapter_wrong) = (read_samples(tasks, one, copies) for one in ("base", "adapter"))
    for number, export in enumerate(exports):
        place = f"{RESULTS} exports[{number}]"
        if base_wrong or adapter_wrong:  # reported by the check of the evaluation
            break
        scores: dict[str, dict[str, TaskScores]] = {}
        for candidate, claimed in export["candidates"].items():
            side = export_side(export["format"], candidate)
            if claimed.keys() != tasks.keys():
                differences.append(Difference(f"{place}.candidates.{candidate}", show(sorted(tasks)), show([*claimed])))
                continue
            found, wrong = read_samples(tasks, side, copies)
            differences += wrong or unpaired(found, adapter, side)
            if not wrong:
                named = {task: {**tasks[task], side: one["scores"]} for task, one in claimed.items()}
                scores[candidate] = scores_of(found, named, side)
                pair = scores_of(base, tasks, "base"), scores_of(adapter, tasks, "adapter")
                again = compare_export(*pair, scores[candidate])
                differences += find_differences(f"{place}.candidates.{candidate}", claimed, again)
        if len(export["candidates"]) > 1 and scores.keys() == export["candidates"].keys():
            chosen, reason = choose_candidate(scores)
            claim = {name: export[name] for name in ("candidate", "reason")}
            differences += find_differences(place, claim, {"candidate": chosen, "reason": reason})
        if export["candidate"] not in export["candidates"]:
            differences.append(Difference(f"{place}.candidate", export["candidate"], "no such candidate"))
        differences += _model_files(export, copies)
    extent = ", ".join(f"{export['format']} of {count(len(export['candidates']), 'candidate')}" for export in exports)
    return CheckResult("exports", extent or "none", tuple(differences))


def _model_files(export: Mapping[str, Any], copies: Copies) -> Iterator[Difference]:
    """A merged model's files: a configuration of plain weights in the claimed dtype, all files of the index."""
    from safetensors import SafetensorError

    folder = export_folder(export["format"])
    names = {path.removeprefix(folder): copy for path, copy in copies.items() if path.startswith(folder)}
    try:
        config = json.loads(names["config.json"].read_bytes())
        named = str(config.get("dtype"))
        if "model.safetensors.index.json" in names:
            where = json.loads(names["model.safetensors.index.json"].read_bytes())["weight_map"]
        else:
            where = dict.fromkeys(_tensor_names(names["model.safetensors"]), "model.safetensors")
        missing = sorted(set(where.values()) - names.keys())
        held = {name for file in set(where.values()) & names.keys() for name in _tensor_names(names[file])}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
        yield Difference(folder, "a model that can be loaded", f"{type(error).__name__}: {str(error)[:MAX_SHOWN]}")
        return
    yield from (Difference(f"{folder}{name}", "a file of weights", "nothing that can be read") for name in missing)
    if not missing and held != where.keys():
        yield Difference(folder, "the tensors that its index names", "others")
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(named)
    yield from find_differences(f"{folder}config.json dtype", export["dtype"], dtype)
    if "quantization_config" in config:
        yield Difference(f"{folder}config.json", "plain weights", "quantized ones")


def _tensor_names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as opened:
        return list(opened.keys())
