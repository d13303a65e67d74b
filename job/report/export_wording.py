"""Sentences about exported formats, and about what servers answered with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.common.export_formats import is_adapter
from job.common.formatting import count, size
from job.evaluation.comparison import original_tasks
from job.records import NEAR, ServeCheck

MAX_NAMES = 3
"""Names of layers in a sentence."""


def _tasks_not_scored(export: Mapping[str, Any]) -> str:
    others = export.get("tasks_not_scored")
    return f" Tasks without choices were not scored for it: {', '.join(others)}." if others else ""


def exports(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each exported format: a sentence about what is published, and a row for each candidate and task.

    A row has the accuracies of base, adapter and candidate, and the comparisons with the two; where the unquantized
    base was scored also those of it, else None for them. None without exports.
    """
    tasks, original = results["evaluation"]["tasks"], original_tasks(results)
    return [
        {
            "format": export["format"],
            "what": "a copy of the adapter" if is_adapter(export["format"]) else "the whole model",
            "sentence": _about_export(export) + _tasks_not_scored(export),
            "rows": [
                {
                    "task": task,
                    "n": figures["n"],
                    "candidate": export["format"]
                    if is_adapter(export["format"])
                    else f"{export['format']} onto {candidate}",
                    "published": candidate == export["candidate"] and export.get("published", True),
                    "base": tasks[task]["base"]["acc"],
                    "adapter": tasks[task]["adapter"]["acc"],
                    "acc": figures["scores"]["acc"],
                    "versus_base": figures["versus_base"]["acc"],
                    "versus_adapter": figures["versus_adapter"]["acc"],
                    "original": original[task]["scores"]["acc"] if task in original else None,
                    "versus_original": figures["versus_original"]["acc"] if "versus_original" in figures else None,
                }
                for candidate, figures_by_task in export["candidates"].items()
                for task, figures in figures_by_task.items()
            ],
        }
        for export in results.get("exports", ())
    ]


def _about_export(export: Mapping[str, Any]) -> str:
    """What of a format is published, how it is quantized, and whether it was scored."""
    if export.get("not_made"):
        return f"{export['format']} was requested and is NOT published, since its export failed: {export['not_made']}."
    if is_adapter(export["format"]):
        return (
            f"Published is {export['format']}: the files of the adapter with its weights in {export['dtype']}, "
            f"{size(export['bytes'], ' ')}, scored on the run's own base in {export['scored_in']}."
        )
    quantization = export.get("quantization")
    if quantization is None:
        source = "Not published, but the source of the other formats:"
        begin = "Published is" if export.get("published", True) else source
        what = f"{export['format']} onto {export['candidate']} weights, in {export['dtype']}"
        return f"{begin} {what}: {export['reason']}."
    not_quantized = quantization["kept"]
    text = (
        f"Published is {export['format']}, made from the merge onto {export['candidate']} weights: "
        f"{quantization['scheme']} ({quantization['method']}), {quantization['bits']:g} bits a weight, "
        f"{size(export['bytes'], ' ')}, by {quantization['library']} {quantization['version']}; "
        f"{count(quantization['layers'], 'layer')} quantized"
    )
    if not_quantized:
        others = " and others" if len(not_quantized) > MAX_NAMES else ""
        text += f", not quantized: {', '.join(not_quantized[:MAX_NAMES])}{others}"
    if of_gguf := quantization.get("gguf"):
        numbers = ", ".join(f"{number:,} in {name}" for name, number in of_gguf["types"].items())
        text += f", {of_gguf['bits_per_weight']:.2f} bits with all scales ({numbers})"
        if otherwise := of_gguf["tokenized_otherwise"]:
            text += f"; llama.cpp tokenizes {count(len(otherwise), 'text')} of a test differently from the tokenizer"
    if calibration := quantization["calibration"]:
        text += f"; calibrated on {count(calibration['rows'], 'row')} of the training data"
    if export.get("not_scored"):
        text += f". It was NOT scored: {export['not_scored']}"
    return f"{text}."


def about_served(check: ServeCheck) -> str:
    """What a serve check found, in a sentence."""
    basis = {"greedy": "its greedy answers"}.get(check.way, "its log-likelihoods")
    text = f"Of {count(len(check.asked), 'question')}, {check.server} predicts {check.alike} as recorded, by {basis}"
    if near := len(check.compared) - check.alike - len(check.different):
        text += f"; {near} differ in a near tie (below {NEAR} nats)"
    if check.different:
        text += f"; {len(check.different)} differ"
    if silent := len(check.asked) - len(check.compared):
        text += f"; {count(silent, 'answer')} do not begin with a choice"
    gaps = [question.difference for question in check.asked if question.difference is not None]
    if gaps:
        text += f"; log-likelihoods differ by at most {max(gaps):.3f} nats"
    return f"{text}."
