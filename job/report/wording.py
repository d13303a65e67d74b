"""Sentences about the figures of a manifest: verdicts, and what they do and do not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.common.findings import KINDS, statistics
from job.common.formatting import count, enumeration, figure, p_value, percent, points, size
from job.common.methods import METHODS
from job.evaluation import policy
from job.evaluation.comparison import of_metric
from job.evaluation.statistics import wilson_interval
from job.records import NEAR, ServeCheck

_SAYS = {
    "improved": "Better than its base at {}.",
    "regressed": "Worse than its base at {}.",
    "inconclusive": "No difference shown at {}.",
}
MAX_NAMES = 3


def scope(tasks: Mapping[str, Any]) -> str:
    """What the figures are about, and what they are not about."""
    how = "" if any(task.get("num_fewshot") for task in tasks.values()) else ", asked without examples in the prompt"
    return f"This is about these questions{how}. It says nothing about other tasks, or about how the adapter writes."


def shots(evaluation: Mapping[str, Any]) -> str:
    """With how many examples in the prompt the questions were asked."""
    found = {
        name: task.get("num_fewshot", 0)
        for name, task in (*evaluation["tasks"].items(), *evaluation.get("measured", {}).items())
    }
    if not any(found.values()):
        return "without examples in the prompt"
    return "with " + enumeration(
        [f"{count(number, 'example')} in the prompt of {name}" for name, number in found.items()]
    )


_SAYS_OF_BOTH = {
    ("improved", "improved"): "Better than its base at {}, and than that base unquantized.",
    ("improved", "inconclusive"): "Better than its quantized base at {}; no difference to the unquantized base shown.",
    ("improved", "regressed"): "Better than its quantized base at {}, but worse than the unquantized base.",
    ("regressed", "improved"): "Worse than its quantized base at {}, but better than the unquantized base.",
    ("regressed", "inconclusive"): "Worse than its quantized base at {}; no difference to the unquantized base shown.",
    ("regressed", "regressed"): "Worse than its base at {}, and than that base unquantized.",
    ("inconclusive", "improved"): "No difference to its quantized base shown at {}; better than the unquantized base.",
    ("inconclusive", "inconclusive"): "No difference shown at {}, to the quantized base or to the unquantized one.",
    ("inconclusive", "regressed"): "No difference to its quantized base shown at {}; worse than the unquantized base.",
}
"""By the verdicts against the quantized base and against the original one."""


def headline(tasks: Mapping[str, Any], full_precision: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    """(verdict, sentence) for each verdict among the tasks; improved first.

    With the manifest's `evaluation.full_precision`, the verdict counts as improved only against both bases, since a
    gain on the quantized base may be what quantization had cost.
    """
    found = []
    if full_precision is not None and full_precision["tasks"]:
        of_both = {
            name: (task["verdict"], full_precision["tasks"][name]["adapter_versus_original"]["acc"]["verdict"])
            for name, task in tasks.items()
        }
        for pair, sentence in _SAYS_OF_BOTH.items():
            if names := [name for name, both in of_both.items() if both == pair]:
                shown = f"{len(names)} of {len(tasks)} tasks" if len(names) > MAX_NAMES else enumeration(names)
                found.append((pair[0] if pair[0] == pair[1] else "inconclusive", sentence.format(shown)))
        return found
    for verdict, sentence in _SAYS.items():
        names = [name for name, task in tasks.items() if task["verdict"] == verdict]
        if names:
            shown = f"{len(names)} of {len(tasks)} tasks" if len(names) > MAX_NAMES else enumeration(names)
            found.append((verdict, sentence.format(shown)))
    return found


def validation(training: Mapping[str, Any], dataset: Mapping[str, Any]) -> list[str]:
    """Sentences about the validation losses, and about the step that was chosen by them; none without validation."""
    found, rows = training.get("validation"), dataset.get("validation")
    if not found or not rows:
        return []
    losses = (
        f"{figure(found['first_loss'])} before training, {figure(found['last_loss'])} after step {training['steps']}"
    )
    lowest = f"lowest after step {found['best_step']} ({figure(found['best_loss'])})"
    where = "held out of the training data" if rows["held_out"] else "of a source of their own"
    unit = "" if found.get("preference") else ", in nats a token"
    sentences = [f"Loss on {count(rows['rows'], 'validation row')} {where}{unit}: {losses}, {lowest}."]
    if "rewards/accuracies" in found.get("preference", {}):
        share = percent(found["preference"]["rewards/accuracies"])
        sentences.append(f"By the adapter of step {found['kept_step']:,}, {share} of their pairs are ranked right.")
    if found["stopped_early"]:
        sentences.append(
            f"Training stopped after step {training['steps']:,} of {found['planned_steps']:,}, when "
            f"{count(found['stale'], 'validation')} in a row had not lowered the loss."
        )
    if found["keep"] == "best":
        what = (
            f"that of step {found['kept_step']:,}"
            if found["kept_step"]
            else "untrained, since no step lowered the loss"
        )
        sentences.append(f"The adapter is {what}, selected on validation; accuracy is reported on the test questions.")
    elif found["stopped_early"]:
        sentences.append("The adapter is that of the last step; accuracy is reported on the test questions.")
    if overlap := rows["duplicates"] + rows["near_duplicates"]:
        sentences.append(f"{overlap:,} of the validation rows are near or exact copies of rows that were trained on.")
    return sentences


def quantization_cost(name: str, task: Mapping[str, Any], full_precision: Mapping[str, Any] | None) -> list[str]:
    """Sentences on what quantization cost, what training gave and what is left; or why that is not known."""
    if full_precision is None:
        return []
    if full_precision.get("not_scored"):
        return [f"What quantization had cost is not known: {full_precision['not_scored']}."]
    one = full_precision["tasks"][name]
    cost, left = one["base_versus_original"]["acc"], one["adapter_versus_original"]["acc"]

    def said(found: Mapping[str, Any]) -> str:
        low, high = found["ci95"]
        return f"95 % interval {points(low)} to {points(high)}, p = {p_value(found['holm_p'])}"

    first = f"Unquantized, the base answers {percent(one['scores']['acc'])} right."
    second = (
        f"Quantization changed that by {points(cost['delta'])} points ({said(cost)}), training by "
        f"{points(task['delta'])}: against the unquantized base the adapter stands at {points(left['delta'])} points "
        f"({said(left)})."
    )
    return [first, second]


def explanation(name: str, task: Mapping[str, Any], tasks: int) -> list[str]:
    """Sentences that explain a task's verdict; `tasks` is the number of tasks that Holm's correction covers."""
    low, high = task["ci95"]
    holm = f" and Holm's correction for {tasks} tasks" if tasks > 1 else ""
    changed = (
        "Not one question was answered right by only one of the two."
        if not task["improved"] + task["regressed"]
        else f"{count(task['improved'], 'question')} got better and {task['regressed']:,} worse; chance alone splits "
        f"them as unevenly with p = {p_value(task['holm_p'])} (exact McNemar test{holm})."
    )
    scored = (
        f"Of {task['n']:,} questions of {name}, the base model answers {percent(task['base']['acc'])} right and the "
        f"adapter {percent(task['adapter']['acc'])}: {points(task['delta'])} percentage points (95 % interval "
        f"{points(low)} to {points(high)})."
    )
    sentences = [scored, changed]
    if task["verdict"] == "inconclusive":
        least = points(task["minimum_detectable_effect"]).removeprefix("+")
        sentences.append(
            f"That is not the same as no difference: this test finds a true difference of {least} points in four of "
            "five repetitions, and a smaller one less often."
        )
    return [*sentences, *_without_overlap(task)]


def _without_overlap(task: Mapping[str, Any]) -> list[str]:
    """A sentence on the result without the questions that training rows have in them, if there are any."""
    if "without_overlap" not in task:
        return []
    rest = task["without_overlap"]
    if rest is None:
        return ["Training rows have its questions in them, and fewer than two are left without these."]
    low, high = map(points, rest["ci95"])
    figures = (
        f"the base model answers {percent(rest['base']['acc'])} right and the adapter "
        f"{percent(rest['adapter']['acc'])}: {points(rest['delta'])} percentage points (95 % interval "
        f"{low} to {high}), {rest['verdict']}."
    )
    return [f"Training rows have {task['n'] - rest['n']:,} of these questions in them. Without these, {figures}"]


def audit(dataset: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each kind of finding of the audit: what it is, in how many rows, where, and what became of the rows."""
    found = dataset.get("audit") or {"checks": {}}
    words = {"record": "kept", "skip": "left out", "error": "none"}
    return [
        {
            "kind": kind,
            "title": _plural(KINDS.get(kind, kind)),
            "rows": check["rows"],
            "places": check["places"],
            "more": max(0, (check["rows"] or 0) - len(check["places"])),
            "became": words[check["action"]] if check["rows"] else "",
            "checked_by": check["checked_by"],
            "not_checked": check["not_checked"],
        }
        for kind, check in found["checks"].items()
    ]


def audit_statistics(dataset: Mapping[str, Any]) -> list[str]:
    """What kind of text the rows are, in sentences; none for runs without an audit."""
    return statistics(dataset.get("audit") or {}, dataset.get("long_rows", {}))


def audit_sentence(dataset: Mapping[str, Any]) -> str:
    """What the audit found, in a sentence or two for the model card; empty for runs without one."""
    kinds = audit(dataset)
    found = [f"{_plural(KINDS.get(one['kind'], one['kind'])).lower()}: {one['rows']:,}" for one in kinds if one["rows"]]
    missing = [one["kind"].replace("_", "-") for one in kinds if one["not_checked"]]
    parts = []
    if kinds:
        parts.append(f"The audit of the data found {'; '.join(found) or 'nothing'}.")
    if missing:
        parts.append(f"It could not check {enumeration(missing)}.")
    return " ".join(parts)


def _plural(title: str) -> str:
    """The title of a kind of rows as a heading, such as `Rows with an e-mail address`."""
    return (
        title.replace("that is an", "that are an").replace("that is", "that are").replace("row", "rows", 1).capitalize()
    )


def accuracies(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each metric of a task: both accuracies with 95 % Wilson intervals, and the paired comparison."""
    found = []
    for metric in ("acc", "acc_norm"):
        comparison = of_metric(task, metric)
        if comparison is not None:
            sides = {side: task[side][metric] for side in ("base", "adapter")}
            intervals = {f"{side}_ci": wilson_interval(round(x * task["n"]), task["n"]) for side, x in sides.items()}
            found.append({"metric": metric, **sides, **intervals, "comparison": comparison})
    return found


def policy_rules(gate: Mapping[str, Any]) -> list[dict[str, str]]:
    """Each rule of the gate's policy in words; none without a policy."""
    return [
        {
            "task": rule["task"] or "critical and supporting tasks together",
            "role": rule["role"],
            "text": policy.sentence(rule),
            "outcome": rule["outcome"],
        }
        for rule in gate.get("policy", {}).get("rules", ())
    ]


def exports(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each exported format: a sentence about what is published, and a row for each candidate and task.

    A row has the accuracies of base, adapter and candidate, and the comparisons with the two. None without exports.
    """
    tasks = results["evaluation"]["tasks"]
    others = results["evaluation"].get("measured")
    unscored = f" Tasks without choices were not scored for it: {', '.join(others)}." if others else ""
    return [
        {
            "format": export["format"],
            "sentence": _about_export(export) + unscored,
            "rows": [
                {
                    "task": task,
                    "n": one["n"],
                    "candidate": f"{export['format']} onto {candidate}",
                    "published": candidate == export["candidate"] and export.get("published", True),
                    "base": tasks[task]["base"]["acc"],
                    "adapter": tasks[task]["adapter"]["acc"],
                    "acc": one["scores"]["acc"],
                    "versus_base": one["versus_base"]["acc"],
                    "versus_adapter": one["versus_adapter"]["acc"],
                }
                for candidate, found in export["candidates"].items()
                for task, one in found.items()
            ],
        }
        for export in results.get("exports", ())
    ]


def _about_export(export: Mapping[str, Any]) -> str:
    """What of a format is published, how it is quantized, and whether it was scored."""
    if export.get("not_made"):
        return (
            f"{export['format']} was asked for and is NOT published, since it could not be made: {export['not_made']}."
        )
    held = export.get("quantization")
    if held is None:
        begin = "Published is" if export.get("published", True) else "Not published, but what the others are made from:"
        what = f"{export['format']} onto {export['candidate']} weights, in {export['dtype']}"
        return f"{begin} {what}: {export['reason']}."
    kept = held["kept"]
    text = (
        f"Published is {export['format']}, made from the merge onto {export['candidate']} weights: {held['scheme']} "
        f"({held['method']}), {held['bits']:g} bits a weight, {size(export['bytes'], ' ')}, by {held['library']} "
        f"{held['version']}; {count(held['layers'], 'layer')} quantized"
    )
    if kept:
        text += f", not quantized: {', '.join(kept[:MAX_NAMES])}{' and others' if len(kept) > MAX_NAMES else ''}"
    if of_gguf := held.get("gguf"):
        numbers = ", ".join(f"{number:,} in {name}" for name, number in of_gguf["types"].items())
        text += f", {of_gguf['bits_per_weight']:.2f} bits with all scales ({numbers})"
        if otherwise := of_gguf["tokenized_otherwise"]:
            text += f"; llama.cpp tokenizes {count(len(otherwise), 'text')} of a test otherwise than the tokenizer"
    if rows := held["calibration"]:
        text += f"; calibrated on {count(rows['rows'], 'row')} of the training data"
    if export.get("not_scored"):
        text += f". It was NOT scored: {export['not_scored']}"
    return f"{text}."


def about_served(check: ServeCheck) -> str:
    """What a serve check found, in a sentence."""
    how = {"greedy": "its greedy answers"}.get(check.way, "its log-likelihoods")
    text = (
        f"Of {count(len(check.asked), 'question')}, {check.server} answers {check.alike} as the records say, by {how}"
    )
    if near := len(check.compared) - check.alike - len(check.different):
        text += f"; {near} differ in a near tie (below {NEAR} nats)"
    if check.different:
        text += f"; {len(check.different)} differ"
    if silent := len(check.asked) - len(check.compared):
        text += f"; {count(silent, 'answer')} begin with no choice"
    gaps = [one.difference for one in check.asked if one.difference is not None]
    if gaps:
        text += f"; log-likelihoods differ by at most {max(gaps):.3f} nats"
    return f"{text}."


def learned(training: Mapping[str, Any]) -> str:
    """How preferences were learned, from the manifest's `training`; nothing for plain fine-tuning."""
    method = training.get("method", "sft")
    if method == "sft":
        return ""
    compared = {"base": ", compared with the base model", "start": ", compared with the adapter it started from"}
    text = f"{METHODS[method].title} ({method}, beta {training['beta']:g}){compared.get(training['reference'], '')}"
    first = training.get("first_stage")
    return text if not first else f"{text}, after {count(first['steps'], 'step')} of {METHODS[first['method']].title}"
