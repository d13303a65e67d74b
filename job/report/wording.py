"""Sentences about the figures of a manifest: verdicts, and what they do and do not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from job.common.export_formats import is_adapter
from job.common.findings import KINDS, statistics
from job.common.formatting import count, enumeration, figure, p_value, percent, points, size
from job.common.methods import METHODS
from job.evaluation import policy
from job.evaluation.comparison import original_tasks
from job.evaluation.policy import of_metric
from job.evaluation.principles import verdict_words
from job.evaluation.statistics import wilson_interval
from job.records import FP8, NEAR, ServeCheck
from job.results.reader import scored_in

_SAYS = {
    "improved": "Better than its {base} at {tasks}.",
    "regressed": "Worse than its {base} at {tasks}.",
    "inconclusive": "No difference shown at {tasks}.",
}
_SAYS_OF_BOTH = {
    ("improved", "improved"): "Better than its base at {tasks}, quantized or not.",
    ("improved", "inconclusive"): (
        "Better than its quantized base at {tasks}, not shown to be better than the unquantized one."
    ),
    ("improved", "regressed"): "Better than its quantized base at {tasks}, but worse than the unquantized one.",
    ("regressed", "improved"): "Worse than its quantized base at {tasks}, but better than the unquantized one.",
    ("regressed", "inconclusive"): (
        "Worse than its quantized base at {tasks}, no difference to the unquantized one shown."
    ),
    ("regressed", "regressed"): "Worse than its base at {tasks}, quantized or not.",
    ("inconclusive", "improved"): (
        "No difference to its quantized base shown at {tasks}, but better than the unquantized one."
    ),
    ("inconclusive", "inconclusive"): "No difference to its base shown at {tasks}, quantized or not.",
    ("inconclusive", "regressed"): (
        "No difference to its quantized base shown at {tasks}, and worse than the unquantized one."
    ),
}
"""By the verdicts against the quantized base and against the unquantized one."""

MAX_NAMES = 3
_INTERVAL = "95 % interval "


def scope(tasks: Mapping[str, Any]) -> str:
    """What the figures are about, and what they are not about."""
    how = "" if any(task.get("num_fewshot") for task in tasks.values()) else ", asked without examples in the prompt"
    return f"This is about these questions{how}. It says nothing about other tasks, or about how the adapter writes."


def shots(evaluation: Mapping[str, Any]) -> str:
    """With how many examples in the prompt the questions were asked."""
    shots_by_task = {
        name: task.get("num_fewshot", 0)
        for name, task in (*evaluation["tasks"].items(), *evaluation.get("measured", {}).items())
    }
    if not any(shots_by_task.values()):
        return "without examples in the prompt"
    return "with " + enumeration(
        [f"{count(number, 'example')} in the prompt of {name}" for name, number in shots_by_task.items()]
    )


def headline(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(verdict, sentence) for each verdict among the tasks of a manifest; improved first.

    Where the unquantized base was scored, the verdict counts as improved only against both bases, since a gain on the
    quantized base may be what quantization had cost.
    """
    tasks, original = results["evaluation"]["tasks"], original_tasks(results)
    tasks_by_verdict: dict[tuple[str, str], list[str]] = {}
    for name, task in tasks.items():
        if name in original:
            verdict, versus_original = task["verdict"], original[name]["adapter_versus_original"]["acc"]["verdict"]
            shown = "inconclusive" if verdict == "improved" != versus_original else verdict
            tasks_by_verdict.setdefault((shown, _SAYS_OF_BOTH[verdict, versus_original]), []).append(name)
        else:
            tasks_by_verdict.setdefault((task["verdict"], _SAYS[task["verdict"]]), []).append(name)
    order = [*_SAYS_OF_BOTH.values(), *_SAYS.values()]
    base = _base(results)

    def named(names: Sequence[str]) -> str:
        return f"{len(names)} of {len(tasks)} tasks" if len(names) > MAX_NAMES else enumeration(names)

    return [
        (verdict, sentence.format(base=base, tasks=named(names)))
        for (verdict, sentence), names in sorted(tasks_by_verdict.items(), key=lambda item: order.index(item[0][1]))
    ]


def _base(results: Mapping[str, Any], plain: str = "base") -> str:
    """What the base that was trained on is called: `plain` where it is not quantized."""
    return plain if results["model"]["quantization"] == "none" else "quantized base"


def other_dtype_of_baseline(results: Mapping[str, Any]) -> str:
    """A sentence where the gate's baseline was scored in another dtype than this run; else empty.

    Manifests of older versions do not say what the baseline was scored in.
    """
    baseline, own = results["gate"]["baseline"], scored_in(results)["dtype"]
    before = own if baseline is None else baseline.get("dtype", own)
    if before == own:
        return ""
    what = f"Run {baseline['run']} was scored in {before}, this one in {own}"
    return f"{what}: the comparison includes the difference of the two."


def validation(training: Mapping[str, Any], dataset: Mapping[str, Any]) -> list[str]:
    """Sentences about the validation losses, and about the step that was chosen by them; none without validation."""
    record, validation_rows = training.get("validation"), dataset.get("validation")
    if not record or not validation_rows:
        return []
    losses = (
        f"{figure(record['first_loss'])} before training, {figure(record['last_loss'])} after step {training['steps']}"
    )
    lowest = f"lowest after step {record['best_step']} ({figure(record['best_loss'])})"
    where = "held out of the training data" if validation_rows["held_out"] else "of a source of their own"
    unit = "" if record.get("preference") else ", in nats a token"
    sentences = [f"Loss on {count(validation_rows['rows'], 'validation row')} {where}{unit}: {losses}, {lowest}."]
    if "rewards/accuracies" in record.get("preference", {}):
        share = percent(record["preference"]["rewards/accuracies"])
        sentences.append(f"By the adapter of step {record['kept_step']:,}, {share} of their pairs are ranked right.")
    if record["stopped_early"]:
        sentences.append(
            f"Training stopped after step {training['steps']:,} of {record['planned_steps']:,}, when "
            f"{count(record['stale'], 'validation')} in a row had not lowered the loss."
        )
    if record["keep"] == "best":
        what = (
            f"that of step {record['kept_step']:,}"
            if record["kept_step"]
            else "untrained, since no step lowered the loss"
        )
        sentences.append(f"The adapter is {what}, selected on validation; accuracy is reported on the test questions.")
    elif record["stopped_early"]:
        sentences.append("The adapter is that of the last step; accuracy is reported on the test questions.")
    if overlap := validation_rows["duplicates"] + validation_rows["near_duplicates"]:
        sentences.append(f"{overlap:,} of the validation rows are near or exact copies of rows that were trained on.")
    return sentences


def quantization_cost(name: str, results: Mapping[str, Any]) -> list[str]:
    """Sentences on what quantization cost, what training gave and what is left; or why that is not known."""
    full_precision = results["evaluation"].get("full_precision")
    if full_precision is None:
        return []
    if why := full_precision.get("not_scored"):
        return [f"What quantization cost is not known, since the unquantized base was not scored: {why}."]
    one, gain = full_precision["tasks"][name], results["evaluation"]["tasks"][name]
    cost, left = one["base_versus_original"]["acc"], one["adapter_versus_original"]["acc"]
    quantization = f"Quantization to {results['model']['quantization'].upper()} {_change(cost, 'cost', _INTERVAL)}"
    sentences = [
        f"Unquantized, the base answers {percent(one['scores']['acc'])} right.",
        f"{quantization}; training {_change(gain, 'lost')}; the adapter is {_stands(left)}.",
    ]
    if gain["verdict"] == "improved" and left["verdict"] == "regressed":
        sentences.append("Training regained only a part of what quantization cost.")
    if gain["verdict"] == "improved" and left["verdict"] == "inconclusive":
        sentences.append("It is not shown that training gained more than quantization cost.")
    return sentences


def _change(comparison: Mapping[str, Any], lost: str, unit: str = "") -> str:
    """`cost 4.84 points (3.33 to 6.38)`: a paired difference in words; `lost` is the word for a negative one."""
    word = lost if comparison["delta"] < 0 else "gained" if comparison["delta"] else "changed accuracy by"
    return f"{word} {_amount(comparison, unit=unit)}"


def _stands(comparison: Mapping[str, Any]) -> str:
    """`2.95 points below the unquantized base (1.47 to 4.44)`."""
    word = "below" if comparison["delta"] < 0 else "above" if comparison["delta"] else "from"
    return _amount(comparison, after=f" {word} the unquantized base")


def _amount(comparison: Mapping[str, Any], *, unit: str = "", after: str = "") -> str:
    """A paired difference in points without its sign, and its interval, whose bounds have signs where these differ.

    Of a negative difference the interval is negated too, so that it is about the same amount.
    """
    low, high = comparison["ci95"]
    if comparison["delta"] < 0:
        low, high = -high, -low
    bounds = " to ".join(points(bound).removeprefix("+" if low >= 0 else "") for bound in (low, high))
    remark = ", no difference shown" if comparison["verdict"] == "inconclusive" else ""
    return f"{100 * abs(comparison['delta']):.2f} points{after} ({unit}{bounds}{remark})"


def explanation(name: str, results: Mapping[str, Any]) -> list[str]:
    """Sentences that explain a task's verdict against the base that was trained on."""
    tasks, task = len(results["evaluation"]["tasks"]), results["evaluation"]["tasks"][name]
    base = _base(results, "base model")
    low, high = task["ci95"]
    holm = f" and Holm's correction for {tasks} tasks" if tasks > 1 else ""
    changed = (
        "No question was answered right by only one of the two."
        if not task["improved"] + task["regressed"]
        else f"{count(task['improved'], 'question')} got better and {task['regressed']:,} worse; if both were "
        f"equally good, a split at least as uneven would have p = {p_value(task['holm_p'])} (exact McNemar test{holm})."
    )
    scored = (
        f"Of {task['n']:,} questions of {name}, the {base} answers {percent(task['base']['acc'])} right and the "
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
    return sentences


def without_overlap(name: str, results: Mapping[str, Any]) -> list[str]:
    """Sentences on the result without the questions that training rows have in them, if there are any."""
    task = results["evaluation"]["tasks"][name]
    if "without_overlap" not in task:
        return []
    rest = task["without_overlap"]
    if rest is None:
        return ["Training rows contain its questions, and fewer than two questions are left without these."]
    low, high = map(points, rest["ci95"])
    base = _base(results, "base model")
    what = {"improved": "better", "regressed": "worse"}.get(rest["verdict"], "no difference shown")
    figures = (
        f"the {base} answers {percent(rest['base']['acc'])} right and the adapter "
        f"{percent(rest['adapter']['acc'])}: {points(rest['delta'])} percentage points (95 % interval "
        f"{low} to {high}, {what})."
    )
    return [f"Training rows contain {task['n'] - rest['n']:,} of these questions. Without them, {figures}"]


def near_ties(name: str, results: Mapping[str, Any]) -> list[str]:
    """A sentence on the questions that rounding may decide, by accuracy; none in manifests of older versions."""
    near = results["evaluation"].get("near_ties")
    if near is None:
        return []
    task = near["tasks"][name]["acc"]
    what = f"two likeliest choices at most {near['bound']:g} nats apart, which rounding in {near['dtype']} may decide"
    if not task["base"] + task["adapter"]:
        return [f"No question is a near tie ({what})."]
    low, high = (points(task[end]["delta"]) for end in ("lowest", "highest"))
    verdict = "holds" if task["holds"] else "would not hold"
    counts = f"{task['base']:,} of the base's answers and {task['adapter']:,} of the adapter's"
    extremes = f"between {low} and {high} points; in the worst case the verdict {verdict}"
    return [f"Near ties ({what}) are {counts}. Depending on them, the difference is {extremes}."]


def audit(dataset: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each kind of finding of the audit: what it is, in how many rows, where, and what became of the rows."""
    record = dataset.get("audit") or {"checks": {}}
    words = {"record": "kept", "skip": "left out", "error": "none"}
    return [
        {
            "kind": kind,
            "title": _plural(KINDS.get(kind, kind)),
            "rows": check["rows"],
            "places": _by_file(check["places"]),
            "more": max(0, (check["rows"] or 0) - len(check["places"])),
            "became": words[check["action"]] if check["rows"] else "",
            "checked_by": check["checked_by"],
            "not_checked": check["not_checked"],
        }
        for kind, check in record["checks"].items()
    ]


def audit_statistics(dataset: Mapping[str, Any]) -> list[str]:
    """What kind of text the rows are, in sentences; none for runs without an audit."""
    return statistics(dataset.get("audit") or {}, dataset.get("long_rows", {}))


def audit_safety(dataset: Mapping[str, Any]) -> str:
    """What the classifier of JOB_DATA__SAFETY_MODEL is, and when a row is unsafe; empty without one."""
    safety = (dataset.get("audit") or {}).get("safety")
    if safety is None:
        return ""
    at = f" at commit {safety['revision'][:12]}" if safety["revision"] else ""
    return (
        f"Unsafe rows are those to which the classifier {safety['model']}{at} (SHA-256 {safety['sha256'][:12]}...) "
        f"gives a probability of at least {safety['threshold']:g} for {enumeration(safety['unsafe_labels'])}."
    )


def unsafe_answers(results: Mapping[str, Any]) -> str:
    """How many answers to the prompts are unsafe, in a sentence; empty where no classifier scored them."""
    counts = results["evaluation"].get("unsafe_answers")
    if counts is None:
        return ""
    safety = results["dataset"]["audit"]["safety"]
    return (
        f"By the classifier {safety['model']}, {counts['base']:,} of the base's answers and {counts['adapter']:,} of "
        f"the adapter's are unsafe, with a probability of at least {safety['threshold']:g}."
    )


def principles(results: Mapping[str, Any]) -> str:
    """What the judge says of the answers, in sentences; empty where nothing was judged."""
    judged = results["evaluation"].get("principles")
    if judged is None:
        return ""
    name = judged["model"] + (f" ({judged['served']})" if judged["served"] else "")
    text = (
        f"The judge {name} compared the answers by {count(len(judged['rules']), 'written rule')}, in both orders: it "
        f"prefers the adapter's {judged['adapter']:,} times, the base's {judged['base']:,} times, and "
        f"{count(judged['ties'], 'pair')} {'is a tie' if judged['ties'] == 1 else 'are ties'} ({judged['same']:,} with "
        f"the same text, {judged['inconsistent']:,} judged by position, {judged['undecided']:,} undecided)."
    )
    if judged["p"] is None:
        return f"{text} There is no preference to test."
    low, high = (100 * end for end in judged["ci95"])
    word = {"inconclusive": "No preference is shown"}.get(verdict_words(judged), verdict_words(judged).capitalize())
    share = f"of {judged['adapter'] + judged['base']:,} preferences {100 * judged['share']:.0f} % are for the adapter"
    return f"{text} {word}: {share} (95 % interval {low:.0f} % to {high:.0f} %, sign test p = {judged['p']:.2g})."


def audit_sentence(dataset: Mapping[str, Any]) -> str:
    """What the audit found, in a sentence or two for the model card; empty for runs without one."""
    kinds = audit(dataset)
    findings = [f"{kind['title'][0].lower()}{kind['title'][1:]}: {kind['rows']:,}" for kind in kinds if kind["rows"]]
    missing = [kind["kind"].replace("_", "-") for kind in kinds if kind["not_checked"]]
    parts = []
    if kinds:
        parts.append(f"The audit of the data found {'; '.join(findings) or 'nothing'}.")
    if missing:
        parts.append(f"It could not check {enumeration(missing)}.")
    return " ".join(parts)


def _plural(title: str) -> str:
    """The title of a kind of rows as a heading, such as `Rows with an e-mail address`."""
    rows = title.replace("row", "rows", 1)
    return f"{rows[0].upper()}{rows[1:]}"


def _by_file(places: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Places such as `file:17`, one after the other of the same file as one: the file, and what comes after it."""
    files: list[tuple[str, list[str]]] = []
    for place in places:
        file, colon, number = place.rpartition(":")
        if not colon:
            file, number = place, ""
        if not files or files[-1][0] != file:
            files.append((file, []))
        files[-1][1].append(number)
    return files


def accuracies(name: str, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each metric of a task: the accuracies with 95 % Wilson intervals, and the paired comparisons.

    `sides` are (key, name, accuracy, interval): the unquantized base where it was scored, the base, the adapter.
    `differences` are (name, comparison): what quantization cost, what training gave, and both. `comparison` is that of
    the adapter with the base it was trained on.
    """
    task, original = results["evaluation"]["tasks"][name], original_tasks(results).get(name)
    rows = []
    for metric in ("acc", "acc_norm"):
        comparison = of_metric(task, metric)
        if comparison is None:
            continue
        sides = [("base", "base", task["base"][metric]), ("adapter", "adapter", task["adapter"][metric])]
        differences = [("difference", comparison)]
        if original is not None:
            sides = [
                ("original", "unquantized", original["scores"][metric]),
                ("base", "quantized", task["base"][metric]),
                sides[1],
            ]
            differences = [
                ("quantization", original["base_versus_original"][metric]),
                ("training", comparison),
                ("both", original["adapter_versus_original"][metric]),
            ]
        rows.append(
            {
                "metric": metric,
                **{key: accuracy for key, _, accuracy in sides},
                "sides": [
                    (key, said, accuracy, wilson_interval(round(accuracy * task["n"]), task["n"]))
                    for key, said, accuracy in sides
                ],
                "differences": differences,
                "comparison": comparison,
            }
        )
    return rows


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
                    "n": one["n"],
                    "candidate": export["format"]
                    if is_adapter(export["format"])
                    else f"{export['format']} onto {candidate}",
                    "published": candidate == export["candidate"] and export.get("published", True),
                    "base": tasks[task]["base"]["acc"],
                    "adapter": tasks[task]["adapter"]["acc"],
                    "acc": one["scores"]["acc"],
                    "versus_base": one["versus_base"]["acc"],
                    "versus_adapter": one["versus_adapter"]["acc"],
                    "original": original[task]["scores"]["acc"] if task in original else None,
                    "versus_original": one["versus_original"]["acc"] if "versus_original" in one else None,
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
        return f"{export['format']} was requested and is NOT published, since its export failed: {export['not_made']}."
    if is_adapter(export["format"]):
        return (
            f"Published is {export['format']}: the files of the adapter with its weights in {export['dtype']}, "
            f"{size(export['bytes'], ' ')}, scored on the run's own base in {export['scored_in']}."
        )
    quantization = export.get("quantization")
    if quantization is None:
        begin = "Published is" if export.get("published", True) else "Not published, but the source of the other "
        "formats:"
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
    how = {"greedy": "its greedy answers"}.get(check.way, "its log-likelihoods")
    text = f"Of {count(len(check.asked), 'question')}, {check.server} predicts {check.alike} as recorded, by {how}"
    if near := len(check.compared) - check.alike - len(check.different):
        text += f"; {near} differ in a near tie (below {NEAR} nats)"
    if check.different:
        text += f"; {len(check.different)} differ"
    if silent := len(check.asked) - len(check.compared):
        text += f"; {count(silent, 'answer')} do not begin with a choice"
    gaps = [one.difference for one in check.asked if one.difference is not None]
    if gaps:
        text += f"; log-likelihoods differ by at most {max(gaps):.3f} nats"
    return f"{text}."


def in_fp8(training: Mapping[str, Any]) -> bool:
    """Whether training computed the products with the frozen weights in FP8, from the manifest's `training`."""
    return str((training.get("execution") or {}).get("forward", "")).endswith(f", {FP8}")


def learned(training: Mapping[str, Any]) -> str:
    """How preferences were learned, from the manifest's `training`; nothing for plain fine-tuning."""
    method = training.get("method", "sft")
    if method == "sft":
        return ""
    compared = {"base": ", compared with the base model", "start": ", compared with the adapter it started from"}
    text = f"{METHODS[method].title} ({method}, beta {training['beta']:g}){compared.get(training['reference'], '')}"
    first = training.get("first_stage")
    return text if not first else f"{text}, after {count(first['steps'], 'step')} of {METHODS[first['method']].title}"
