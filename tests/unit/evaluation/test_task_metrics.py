"""Tasks without choices: answers and metrics of lm-eval, few-shot examples, and paired comparisons."""

from __future__ import annotations

import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from job.errors import DataError, SettingsError
from job.evaluation import statistics
from job.evaluation.generation import GenerationOptions, generate
from job.evaluation.harness import measure
from job.evaluation.question_lengths import check_lengths, count_questions
from job.evaluation.samples import MeasuredSample, parse_measured, write_samples
from job.evaluation.scorer import score_questions
from job.evaluation.task_metrics import (
    LARGEST_PERPLEXITY,
    aggregate,
    compare_measured,
    generation_options,
    measured_from,
)
from job.evaluation.tasks import check_choices, load_tasks
from job.evaluation.token_sampling import Sampling
from job.records import Answer, MeasuredScores, Metric
from job.results.reader import LARGEST_NUMBER
from tests.helpers import fill_adapter, make_model, write_jsonl
from tests.unit.evaluation.example_tasks import write_prose, write_task

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval.*")

FILTERS = [
    {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]},
    {"name": "whole", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]},
]
WINDOW = 32


@cache
def model(folder: Path) -> Any:
    """The tiny base, as the job evaluates it."""
    return fill_adapter(make_model(folder)).eval()


def run(
    folder: Path, tokenizer: Any, *files: Path, **how: Any
) -> dict[str, tuple[MeasuredScores, list[MeasuredSample]]]:
    """Measures the tiny model the way the job does."""
    own = model(folder)

    def answer(prompts: list[tuple[int, ...]], how: GenerationOptions) -> list[Answer]:
        asked: dict[str, Any] = {"max_new_tokens": how.max_new_tokens, "stop": how.stop, "sampling": how.sampling}
        return generate(own, tokenizer, prompts, batch_tokens=400, **asked)

    given: dict[str, Any] = {"limit": None, "max_length": WINDOW} | how
    tasks = load_tasks([str(file) for file in files], {}, {})
    return measure(tasks, tokenizer, lambda questions: score_questions(own, questions), answer, **given)


def by_lm_eval(folder: Path, tokenizer: Any, file: Path, max_length: int) -> Any:
    """lm-eval's own model on the same adapter and base.

    Its cache of logits is off: for windows of one text that share their tokens it gives one the logits of the other.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from job.model.load_base import PLAIN
    from job.model.packed_attention import NAME, use

    own = model(folder)
    use(own.get_base_model(), PLAIN)
    try:
        lm = HFLM(
            pretrained=own, tokenizer=tokenizer, batch_size=4, device="cpu", max_length=max_length, logits_cache=False
        )
        tasks = load_tasks([str(file)], {}, {})
        for task in tasks.loaded["tasks"].values():
            task.set_fewshot_seed(1234)
        return lm_eval.evaluate(lm=lm, task_dict=tasks.loaded, bootstrap_iters=0)
    finally:
        use(own.get_base_model(), NAME)


def test_answers_and_figures_are_those_of_lm_eval(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Few-shot prompts, stop texts, filters and metrics: each answer is HFLM's, to the letter, and each figure."""
    file = write_task(tmp_path, filter_list=FILTERS, questions=8)
    ((scores, samples),) = run(base_folder, tokenizer, file).values()
    theirs = by_lm_eval(base_folder, tokenizer, file, 512)
    by_doc = {sample["doc_id"]: sample for sample in theirs["samples"]["sums"]}
    assert [sample.responses for sample in samples] == [by_doc[n]["resps"][0] for n in range(8)]
    assert [sample.prompt for sample in samples] == [by_doc[n]["arguments"][0][0] for n in range(8)]
    assert scores.num_fewshot == 2
    assert {name.partition(",")[2] for name in scores.metrics} == {"first", "whole"}
    for name, metric in scores.metrics.items():
        assert aggregate(scores.values[name], metric.aggregation) == pytest.approx(theirs["results"]["sums"][name])


def test_perplexities_are_those_of_lm_eval(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Texts of one window and of several: word and byte perplexity and bits per byte, and each text's likelihood."""
    file = write_prose(tmp_path)
    ((scores, samples),) = run(base_folder, tokenizer, file).values()
    theirs = by_lm_eval(base_folder, tokenizer, file, WINDOW)
    said = [sample["resps"][0][0] for sample in theirs["samples"]["prose"]]
    assert [sample.responses[0] for sample in samples] == pytest.approx(said, rel=1e-5)
    assert len(scores.metrics) == 3
    for name, metric in scores.metrics.items():
        found = aggregate(scores.values[name], metric.aggregation)
        assert found == pytest.approx(theirs["results"]["prose"][name], rel=1e-4)
        assert not metric.higher_is_better


def test_sampled_answers_come_from_the_seed(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The same seed gives the same answers, another one others; several answers to one question differ."""
    kwargs = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    file = write_task(tmp_path, generation_kwargs=kwargs, repeats=2, questions=4)
    answers = [
        [sample.responses for sample in next(iter(run(base_folder, tokenizer, file, seed=seed).values()))[1]]
        for seed in (0, 0, 1)
    ]
    assert answers[0] == answers[1] != answers[2]
    assert any(one != other for one, other in answers[0])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"until": "\n", "max_gen_toks": 1}, GenerationOptions(1, ("\n",))),
        ({"until": ["a"], "do_sample": False, "temperature": 0.0}, GenerationOptions(256, ("a",))),
        ({"temperature": 0.5, "top_p": 0.9}, GenerationOptions(256, (), Sampling(0.5, 50, 0.9, 7))),
        ({"do_sample": False, "top_k": -1}, GenerationOptions(256)),
        ({"temperature": 0.5, "top_k": 0}, GenerationOptions(256, (), Sampling(0.5, 0, 1.0, 7))),
        ({"num_beams": 1}, GenerationOptions(256)),
        ({"num_beams": 2}, None),
        ({"do_sample": True}, None),  # lm-eval's temperature is 0 where a task names none
        ({"do_sample": True, "temperature": 0.0}, None),
        ({"repetition_penalty": 1.2}, None),
    ],
)
def test_ways_to_generate_are_read_as_lm_eval_does(given: dict[str, Any], expected: GenerationOptions | None) -> None:
    """Greedy or drawn, by lm-eval's names; what is not done here is refused, not left out."""
    if expected is not None:
        assert generation_options("x", given, seed=7) == expected
        return
    with pytest.raises(SettingsError, match=r"x asks to generate with"):
        generation_options("x", given)


def test_prompts_that_do_not_fit_are_found_before_a_model_is_loaded(tokenizer: Any, tmp_path: Path) -> None:
    """With their examples and the longest answer; cutting them, as lm-eval does, is a setting."""
    tasks = load_tasks([str(write_task(tmp_path))], {}, {})
    _, longest, answer, *answered = count_questions(tasks, tokenizer, 1)
    assert answered == [longest - answer, longest], "of one question"
    how: dict[str, Any] = {"limit": None, "vocabulary": None}
    check_lengths(tasks, tokenizer, max_length=longest + 40, cut=False, **how)
    check_lengths(tasks, tokenizer, max_length=20, cut=True, **how)
    with pytest.raises(DataError, match=r"may be answered with 8, 20 are allowed.*JOB_TRAIN__MAX_LENGTH"):
        check_lengths(tasks, tokenizer, max_length=20, cut=False, **how)
    with pytest.raises(DataError, match="may be answered with 8 tokens, 8 are"):
        check_lengths(tasks, tokenizer, max_length=8, cut=True, **how)


def test_settings_about_accuracy_need_choices(tmp_path: Path) -> None:
    """A gate or an export where no task has choices is refused before anything is computed."""
    tasks = load_tasks([str(write_task(tmp_path))], {}, {})
    check_choices(tasks, [])
    with pytest.raises(SettingsError, match="JOB_GATE: is about accuracy"):
        check_choices(tasks, ["JOB_GATE"])


def scores(values: list[tuple[float, float]], metric: Metric, name: str = "m,none") -> dict[str, MeasuredScores]:
    """One model on one task of one metric."""
    how: dict[str, Any] = {"kind": "generate_until", "source": "x", "task_hash": "0" * 64, "version": "1"}
    return {
        "t": MeasuredScores(
            task="t", n=len(values), num_fewshot=0, metrics={name: metric}, values={name: tuple(values)}, **how
        )
    }


def compared(before: list[tuple[float, float]], after: list[tuple[float, float]], metric: Metric) -> dict[str, Any]:
    """The manifest's comparison by that metric."""
    found: dict[str, Any] = compare_measured(scores(before, metric), scores(after, metric))["t"]["metrics"]["m,none"]
    return found


def test_right_and_wrong_answers_are_compared_as_accuracies() -> None:
    """McNemar's test and Tango's interval, as for multiple choice."""
    chance = random.Random(1)
    before = [chance.random() < 0.4 for _ in range(100)]
    after = [right or chance.random() < 0.3 for right in before]
    found = compared(
        [(float(x), 1.0) for x in before], [(float(x), 1.0) for x in after], Metric("mean", higher_is_better=True)
    )
    expected = statistics.compare(before, after)
    assert (found["delta"], found["ci95"], found["p"]) == (expected.delta, expected.ci95, expected.mcnemar_p)
    assert (found["improved"], found["regressed"]) == (expected.improved, expected.regressed)
    assert found["verdict"] == expected.verdict == "improved"


@pytest.mark.parametrize("higher", [True, False])
def test_fractions_are_compared_by_the_paired_t_test(higher: bool) -> None:  # noqa: FBT001 - a case of the test
    """With equal weights it is scipy's; which way is better decides the verdict and the counts."""
    from scipy.stats import ttest_rel

    chance = random.Random(2)
    before = [chance.random() for _ in range(40)]
    after = [value + chance.gauss(0.1, 0.05) for value in before]
    found = compared([(x, 1.0) for x in before], [(x, 1.0) for x in after], Metric("mean", higher))
    expected = ttest_rel(after, before)
    interval = expected.confidence_interval(0.95)
    assert found["p"] == pytest.approx(expected.pvalue)
    assert found["ci95"] == pytest.approx((interval.low, interval.high))
    assert found["verdict"] == ("improved" if higher else "regressed")
    assert (found["improved"] > found["regressed"]) == higher


def test_perplexities_are_compared_by_the_logarithm_of_their_ratio() -> None:
    """The difference is that of the published figures; a lower perplexity is an improvement."""
    import math

    chance = random.Random(3)
    weights = [float(chance.randint(5, 50)) for _ in range(30)]
    before = [(-3 * w + chance.gauss(0, 1), w) for w in weights]
    after = [(value + 0.2 * w + chance.gauss(0, 0.1), w) for value, w in before]
    found = compared(before, after, Metric("weighted_perplexity", higher_is_better=False))
    assert found["delta"] == pytest.approx(math.log(found["adapter"] / found["base"]))
    assert found["ci95"][0] < found["delta"] < found["ci95"][1] < 0
    assert (found["verdict"], found["improved"]) == ("improved", 30)
    bits = compared(before, after, Metric("bits_per_byte", higher_is_better=False))
    assert bits["delta"] == pytest.approx(bits["adapter"] - bits["base"])
    assert bits["verdict"] == "improved"


def test_the_interval_of_a_ratio_covers() -> None:
    """Over 400 samples with weights of many sizes, 95 % intervals hold the true ratio in 92 to 98 of 100."""
    chance = random.Random(4)
    hits = 0
    for _ in range(400):
        weights = [float(chance.randint(5, 60)) for _ in range(40)]
        _, (low, high), _ = statistics.paired_ratio([0.1 * w + chance.gauss(0, w**0.5) for w in weights], weights)
        hits += low < 0.1 < high
    assert 0.92 < hits / 400 < 0.98


def test_samples_are_read_again(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """From the published file the same figures follow; a file that lacks a metric, or has none, is told."""
    file = write_task(tmp_path, questions=4)
    ((found, samples),) = run(base_folder, tokenizer, file).values()
    path = tmp_path / "samples.jsonl"
    write_samples(path, samples)
    claimed = compare_measured({"sums": found}, {"sums": found})["sums"]
    assert measured_from(parse_measured(path.read_bytes()), "sums", claimed, "adapter") == found
    claimed["metrics"]["f1,none"] = claimed["metrics"]["exact_match,none"]
    with pytest.raises(ValueError, match="line 1: has the metrics"):
        measured_from(parse_measured(path.read_bytes()), "sums", claimed, "adapter")
    with pytest.raises(ValueError, match="line 1, "):
        parse_measured(b"{}\n{}\n")
    assert torch.is_inference_mode_enabled() is False


@pytest.mark.parametrize("nats", [41.5, 709.0, 710.0, 1e6])
def test_a_perplexity_has_a_limit(nats: float) -> None:
    """A word of so many nats, as of a text without spaces: a figure that a manifest may hold, and an exact comparison.

    e^41.5 is above what the manifest's reader allows, e^710 above all floats.
    """
    assert LARGEST_PERPLEXITY <= LARGEST_NUMBER
    assert aggregate([(-nats, 1.0)], "weighted_perplexity") == LARGEST_PERPLEXITY
    assert aggregate([(-41.4, 1.0)], "perplexity") == pytest.approx(math.exp(41.4))
    values = [((-nats - n, 1.0), (-nats - n - 2 - n / 10, 1.0)) for n in range(4)]
    base, adapter = (
        MeasuredScores(
            task="texts",
            kind="loglikelihood_rolling",
            source="file",
            task_hash="0",
            version="1",
            n=len(values),
            num_fewshot=0,
            metrics={"word_perplexity": Metric("weighted_perplexity", higher_is_better=False)},
            values={"word_perplexity": tuple(pair[side] for pair in values)},
            reused_from=None,
        )
        for side in (0, 1)
    )
    found = compare_measured({"texts": base}, {"texts": adapter})["texts"]["metrics"]["word_perplexity"]
    assert (found["base"], found["adapter"]) == (LARGEST_PERPLEXITY, LARGEST_PERPLEXITY)
    assert found["delta"] == pytest.approx(2.15)
    assert (found["verdict"], found["regressed"]) == ("regressed", 4)


def test_a_text_without_spaces_has_a_figure(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Its one word has more nats than e to that power fits into a float, where lm-eval's own perplexity fails."""
    file = write_prose(tmp_path)
    write_jsonl(tmp_path / "texts.jsonl", [{"text": "天地玄黄宇宙洪荒" * n} for n in (60, 70)])
    ((scores, _),) = run(base_folder, tokenizer, file).values()
    values = scores.values["word_perplexity,none"]
    assert all(-value / weight > 710 for value, weight in values)
    assert aggregate(values, "weighted_perplexity") == LARGEST_PERPLEXITY
