"""Sentences about the figures of a manifest: verdicts, and what they do and do not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.common.formatting import count, enumeration, figure, p_value, percent, points
from job.common.methods import METHODS
from job.evaluation import policy_verdict
from job.evaluation.comparison import original_tasks
from job.evaluation.policy import of_metric
from job.evaluation.principles import verdict_words
from job.evaluation.statistics import wilson_interval
from job.records import FP8
from job.results.outcome import task_labels
from job.results.reader import scored_in

_SENTENCES = {
    "improved": "Better than its {base} on {tasks}.",
    "regressed": "Worse than its {base} on {tasks}.",
    "inconclusive": "No difference shown on {tasks}.",
}
_SENTENCES_FOR_BOTH = {
    ("improved", "improved"): "Better than its base on {tasks}, quantized or not.",
    ("improved", "inconclusive"): (
        "Better than its quantized base on {tasks}, not shown to be better than the unquantized one."
    ),
    ("improved", "regressed"): "Better than its quantized base on {tasks}, but worse than the unquantized one.",
    ("regressed", "improved"): "Worse than its quantized base on {tasks}, but better than the unquantized one.",
    ("regressed", "inconclusive"): (
        "Worse than its quantized base on {tasks}, no difference to the unquantized one shown."
    ),
    ("regressed", "regressed"): "Worse than its base on {tasks}, quantized or not.",
    ("inconclusive", "improved"): (
        "No difference to its quantized base shown on {tasks}, but better than the unquantized one."
    ),
    ("inconclusive", "inconclusive"): "No difference to its base shown on {tasks}, quantized or not.",
    ("inconclusive", "regressed"): (
        "No difference to its quantized base shown on {tasks}, and worse than the unquantized one."
    ),
}
"""By the verdicts against the quantized base and against the unquantized one."""

MAX_NAMES = 3
"""Names of tasks in a sentence."""
_INTERVAL = "95 % interval "


def scope(evaluation: Mapping[str, Any]) -> str:
    """What the figures are about, and what they are not about."""
    tasks = evaluation["tasks"] | evaluation.get("measured", {})
    prompting = (
        "" if any(task.get("num_fewshot") for task in tasks.values()) else ", asked without examples in the prompt"
    )
    return (
        f"This is about these questions{prompting}. It says nothing about other tasks, or about how the adapter writes."
    )


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
    quantized base may be what quantization had cost. A task without choices, which is not scored on the unquantized
    base, is named with the metric where its metrics have different verdicts.
    """
    evaluation, original, labels = results["evaluation"], original_tasks(results), task_labels(results)
    entries: list[tuple[str, str, str, str]] = []  # verdict, sentence, task, its name in the sentence
    for name, task in evaluation["tasks"].items():
        verdict, sentence = task["verdict"], _SENTENCES[task["verdict"]]
        if name in original:
            versus_original = original[name]["adapter_versus_original"]["acc"]["verdict"]
            sentence = _SENTENCES_FOR_BOTH[verdict, versus_original]
            verdict = "inconclusive" if verdict == "improved" != versus_original else verdict
        entries.append((verdict, sentence, name, labels[name]))
    for name, task in evaluation.get("measured", {}).items():
        verdicts = {metric: figures["verdict"] for metric, figures in task["metrics"].items()}
        several = len(set(verdicts.values())) > 1
        entries += [
            (verdict, _SENTENCES[verdict], name, f"{labels[name]} by {metric}" if several else labels[name])
            for metric, verdict in verdicts.items()
        ]
    order = [*_SENTENCES_FOR_BOTH.values(), *_SENTENCES.values()]
    base = _base(results)

    def named(sentence: str) -> str:
        names = list(dict.fromkeys(label for _, text, _, label in entries if text == sentence))
        tasks = {name for _, text, name, _ in entries if text == sentence}
        return f"{len(tasks)} of {len(labels)} tasks" if len(names) > MAX_NAMES else enumeration(names)

    distinct = dict.fromkeys((verdict, sentence) for verdict, sentence, _, _ in entries)
    return [
        (verdict, sentence.format(base=base, tasks=named(sentence)))
        for verdict, sentence in sorted(distinct, key=lambda pair: order.index(pair[1]))
    ]


def _base(results: Mapping[str, Any], plain: str = "base") -> str:
    """What the base that was trained on is called: `plain` where it is not quantized."""
    return plain if results["model"]["quantization"] == "none" else "quantized base"


def other_dtype_of_baseline(results: Mapping[str, Any]) -> str:
    """A sentence where the gate's baseline was scored in another dtype than this run; else empty.

    Manifests of older versions do not say what the baseline was scored in.
    """
    baseline, dtype = results["gate"]["baseline"], scored_in(results)["dtype"]
    baseline_dtype = dtype if baseline is None else baseline.get("dtype", dtype)
    if baseline_dtype == dtype:
        return ""
    what = f"Run {baseline['run']} was scored in {baseline_dtype}, this one in {dtype}"
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
    where = "held out of the training data" if validation_rows["held_out"] else "of a separate source"
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
        choice = (
            f"that of step {record['kept_step']:,}"
            if record["kept_step"]
            else "untrained, since no step lowered the loss"
        )
        sentences.append(
            f"The adapter is {choice}, selected on validation; accuracy is reported on the test questions."
        )
    elif record["stopped_early"]:
        sentences.append("The adapter is that of the last step; accuracy is reported on the test questions.")
    if overlap := validation_rows["duplicates"] + validation_rows["near_duplicates"]:
        sentences.append(f"{overlap:,} of the validation rows are near or exact copies of rows that were trained on.")
    return sentences


def quantization_cost(name: str, results: Mapping[str, Any]) -> list[str]:
    """Sentences on the cost of quantization, the gain of training and the sum of both; or why they are unknown."""
    full_precision = results["evaluation"].get("full_precision")
    if full_precision is None:
        return []
    if why := full_precision.get("not_scored"):
        return [f"What quantization cost is not known, since the unquantized base was not scored: {why}."]
    original, gain = full_precision["tasks"][name], results["evaluation"]["tasks"][name]
    cost, remaining = original["base_versus_original"]["acc"], original["adapter_versus_original"]["acc"]
    quantization = f"Quantization to {results['model']['quantization'].upper()} {_change(cost, 'cost', _INTERVAL)}"
    sentences = [
        f"Unquantized, the base answers {percent(original['scores']['acc'])} right.",
        f"{quantization}; training {_change(gain, 'lost')}; the adapter is {_difference_to_original(remaining)}.",
    ]
    if gain["verdict"] == "improved" and remaining["verdict"] == "regressed":
        sentences.append("Training regained only a part of what quantization cost.")
    if gain["verdict"] == "improved" and remaining["verdict"] == "inconclusive":
        sentences.append("It is not shown that training gained more than quantization cost.")
    return sentences


def _change(comparison: Mapping[str, Any], loss_word: str, unit: str = "") -> str:
    """`cost 4.84 points (3.33 to 6.38)`: a paired difference in words; `lost` is the word for a negative one."""
    word = loss_word if comparison["delta"] < 0 else "gained" if comparison["delta"] else "changed accuracy by"
    return f"{word} {_amount(comparison, unit=unit)}"


def _difference_to_original(comparison: Mapping[str, Any]) -> str:
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
        f"Of {task['n']:,} questions of {task_labels(results)[name]}, the {base} answers "
        f"{percent(task['base']['acc'])} right and the adapter {percent(task['adapter']['acc'])}: "
        f"{points(task['delta'])} percentage points (95 % interval {points(low)} to {points(high)})."
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
    comparison = task["without_overlap"]
    if comparison is None:
        contained = len(results["dataset"]["audit"]["overlap"][name])
        which = "all" if contained == task["n"] else "all but one"
        return [f"Training rows contain {which} of these questions: the accuracies say little about other questions."]
    low, high = map(points, comparison["ci95"])
    base = _base(results, "base model")
    what = {"improved": "better", "regressed": "worse"}.get(comparison["verdict"], "no difference shown")
    figures = (
        f"the {base} answers {percent(comparison['base']['acc'])} right and the adapter "
        f"{percent(comparison['adapter']['acc'])}: {points(comparison['delta'])} percentage points (95 % interval "
        f"{low} to {high}, {what})."
    )
    return [f"Training rows contain {task['n'] - comparison['n']:,} of these questions. Without them, {figures}"]


def near_ties(name: str, results: Mapping[str, Any]) -> list[str]:
    """A sentence on the questions that rounding may decide, by accuracy; none in manifests of older versions."""
    near = results["evaluation"].get("near_ties")
    if near is None:
        return []
    task = near["tasks"][name]["acc"]
    definition = (
        f"two likeliest choices at most {near['bound']:g} nats apart, which rounding in {near['dtype']} may decide"
    )
    if not task["base"] + task["adapter"]:
        return [f"No question is a near tie ({definition})."]
    low, high = (points(task[end]["delta"]) for end in ("lowest", "highest"))
    verdict = "holds" if task["holds"] else "would not hold"
    counts = f"{task['base']:,} of the base's answers and {task['adapter']:,} of the adapter's"
    extremes = f"between {low} and {high} points; in the worst case the verdict {verdict}"
    return [f"Near ties ({definition}) are {counts}. Depending on them, the difference is {extremes}."]


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
        labelled = [("base", "base", task["base"][metric]), ("adapter", "adapter", task["adapter"][metric])]
        differences = [("difference", comparison)]
        if original is not None:
            labelled = [
                ("original", "unquantized", original["scores"][metric]),
                ("base", "quantized", task["base"][metric]),
                labelled[1],
            ]
            differences = [
                ("quantization", original["base_versus_original"][metric]),
                ("training", comparison),
                ("both", original["adapter_versus_original"][metric]),
            ]
        rows.append(
            {
                "metric": metric,
                **{key: accuracy for key, _, accuracy in labelled},
                "sides": [
                    (key, label, accuracy, wilson_interval(round(accuracy * task["n"]), task["n"]))
                    for key, label, accuracy in labelled
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
            "text": policy_verdict.sentence(rule),
            "outcome": rule["outcome"],
        }
        for rule in gate.get("policy", {}).get("rules", ())
    ]


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
