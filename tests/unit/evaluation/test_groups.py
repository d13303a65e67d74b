"""Groups of tasks: their figures are lm-eval's, and two models are compared on them, paired by question."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scipy.stats import ttest_1samp, ttest_ind

from job.errors import SettingsError
from job.evaluation import statistics
from job.evaluation.groups import compare_groups, groups_from, read_groups
from job.evaluation.harness import _scoring_model, evaluate, measure
from job.evaluation.task_names import check_tasks, tasks_of
from job.evaluation.tasks import Tasks, load_tasks
from job.records import Answer, ChoiceScore, Evaluated, GroupSpec, MeasuredScores, Metric, Question, TaskScores
from tests.helpers import write_jsonl
from tests.unit.evaluation.example_tasks import SIZES, write_group

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval.*")


def scored(tasks: Tasks, tokenizer: Any, seed: int) -> Evaluated:
    """A made-up model on all tasks."""
    chance = random.Random(seed)

    def score(questions: list[Question]) -> list[list[ChoiceScore]]:
        return [[ChoiceScore(-chance.random(), False) for _ in asked.choices] for asked in questions]  # noqa: FBT003

    def answer(prompts: list[tuple[int, ...]], _: Any) -> list[Answer]:
        return [Answer(f" {2 * n + chance.choice([12, 14])}", 1, "stop") for n in range(len(prompts))]

    found = evaluate(tasks, tokenizer, score, limit=None)
    others = measure(tasks, tokenizer, score, answer, limit=None, max_length=64)
    scores, measured = ({name: one for name, (one, _) in side.items()} for side in (found, others))
    return Evaluated(scores, [], measured)  # type: ignore[arg-type]


@pytest.mark.parametrize("by_size", [True, False])
def test_figures_are_those_of_lm_eval(tokenizer: Any, tmp_path: Path, *, by_size: bool) -> None:
    """Weighted by size or not, over the tasks that have the metric: lm-eval's own aggregation of the tasks' figures."""
    asked = [{"metric": name, "weight_by_size": by_size} for name in ("acc", "acc_norm", "exact_match")]
    tasks = load_tasks([str(write_group(tmp_path, aggregate_metric_list=asked))], {}, {})
    assert list(tasks.loaded["tasks"]) == list(SIZES)
    base, adapter = (scored(tasks, tokenizer, seed) for seed in (1, 2))
    found = compare_groups(tasks.groups, base, adapter)["own"]
    for side, of in (("base", base), ("adapter", adapter)):
        figures: dict[str, Any] = {
            name: {"acc,none": one.acc, "acc_norm,none": one.acc_norm, "sample_len": one.n}
            for name, one in of.scores.items()
        }
        figures["few"].pop("acc_norm,none")
        values = [value for value, _ in of.measured["said"].values["exact_match,none"]]
        figures["said"] = {"exact_match,none": sum(values) / len(values), "sample_len": len(values)}
        theirs = tasks.loaded["groups"]["own"].aggregate(figures)
        assert set(found["metrics"]) == {"acc,none", "acc_norm,none", "exact_match,none"}
        for metric, one in found["metrics"].items():
            assert one[side] == pytest.approx(theirs[metric], abs=1e-12)
            assert one["n"] == theirs["sample_count"][metric]
    acc = found["metrics"]["acc,none"]
    assert (acc["tasks"], found["metrics"]["acc_norm,none"]["tasks"], found["version"]) == (2, 1, "3")
    assert acc["delta"] == pytest.approx(acc["adapter"] - acc["base"], abs=1e-12)
    assert acc["test"] == ("mcnemar" if by_size else "stratified_t")
    assert groups_from({"own": found}) == dict(tasks.groups)


def made_up(answers: dict[str, list[bool]]) -> Evaluated:
    """Scores with these answers."""
    rest: dict[str, Any] = {"stderr": 0, "acc_norm": None, "acc_norm_stderr": None, "correct_norm": None}
    return Evaluated(
        {
            n: TaskScores(n, "s", "h", "1", len(a), sum(a) / len(a), correct=tuple(a), **rest)
            for n, a in answers.items()
        },
        [],
    )


def test_questions_that_weigh_the_same_are_compared_as_one_sample(tokenizer: Any, tmp_path: Path) -> None:
    """By size, the comparison is that of all answers in one list; else each task is a stratum with its own share."""
    tasks = load_tasks([str(write_group(tmp_path))], {}, {})
    spec = tasks.groups["own"]
    chance = random.Random(3)
    before = {name: [chance.random() < 0.4 for _ in range(50 * size)] for name, size in SIZES.items() if name != "said"}
    after = {name: [one or chance.random() < 0.3 for one in values] for name, values in before.items()}
    only = replace(spec, metrics={"acc,none": True})
    found = compare_groups({"own": only}, made_up(before), made_up(after))["own"]["metrics"]["acc,none"]
    flat = statistics.compare(*([one for values in side.values() for one in values] for side in (before, after)))
    assert (found["p"], found["ci95"], found["improved"]) == (flat.mcnemar_p, flat.ci95, flat.improved)
    assert found["verdict"] == "improved"
    assert found["regressed"] == 0
    apart = replace(spec, metrics={"acc,none": False})
    found = compare_groups({"own": apart}, made_up(before), made_up(after))["own"]["metrics"]["acc,none"]
    assert found["delta"] == pytest.approx(
        sum(sum(after[n]) / len(after[n]) - sum(before[n]) / len(before[n]) for n in after) / 2
    )
    low, high = found["ci95"]
    assert low < found["delta"] < high


def test_one_stratum_is_the_paired_t_test() -> None:
    """With one task the stratified test is scipy's paired t test, and two halves of it are nearly that."""
    chance = random.Random(4)
    values = [chance.gauss(0.1, 1) for _ in range(200)]
    ours = statistics.stratified([values], [1.0])
    theirs = ttest_1samp(values, 0)
    interval = theirs.confidence_interval(0.95)
    expected = (sum(values) / 200, interval.low, interval.high, theirs.pvalue, 199)
    assert (ours.delta, *ours.ci95, ours.p, ours.freedom) == pytest.approx(expected)
    halves = statistics.stratified([values[:100], values[100:]], [0.5, 0.5])
    assert halves.delta == pytest.approx(ours.delta)
    assert halves.ci95 == pytest.approx(ours.ci95, abs=0.01)


def test_two_strata_are_welch_s_test() -> None:
    """A small task with most of the variance decides the degrees of freedom, as scipy has it."""
    chance = random.Random(6)
    few, many = [chance.gauss(0.5, 1) for _ in range(3)], [chance.gauss(0.5, 1) for _ in range(2000)]
    ours = statistics.stratified([few, many], [0.5, 0.5])
    theirs = ttest_ind(few, [-value for value in many], equal_var=False)
    low, high = theirs.confidence_interval(0.95)
    assert (ours.p, ours.freedom) == pytest.approx((theirs.pvalue, theirs.df))
    assert ours.ci95 == pytest.approx((low / 2, high / 2))
    assert ours.freedom < 3


def test_a_few_answers_that_all_changed_settle_nothing() -> None:
    """Five questions in two tasks, all wrong before and right after: not significant, as by McNemar's test (0.0625)."""
    ours = statistics.stratified([[1.0, 1.0], [1.0, 1.0, 1.0]], [0.5, 0.5])
    assert ours.delta == 1
    assert ours.p > 0.05 or ours.ci95[0] <= 0
    alike = statistics.stratified([[0.25, 0.25], [0.25, 0.25, 0.25]], [0.5, 0.5])
    assert (alike.delta, alike.p) == (0.25, 1.0)


def test_unweighted_tasks_of_few_answers_keep_the_error_rate() -> None:
    """Without a difference, about 5 % of 1,000 groups of a small and a large task of right and wrong answers differ."""
    chance, found = random.Random(7), 0
    for _ in range(1000):
        strata = [[float(chance.choice((-1, 0, 0, 1))) for _ in range(n)] for n in (4, 60)]
        found += statistics.stratified(strata, [0.5, 0.5]).p < 0.05
    assert found <= 65


def test_a_stratified_interval_covers_the_truth() -> None:
    """Of 400 groups of unequal tasks with equal weights, 95 % of the intervals hold the true difference."""
    chance, inside = random.Random(5), 0
    for _ in range(400):
        strata = [[chance.gauss(mean, 1 + mean) for _ in range(n)] for mean, n in ((0.2, 20), (0.8, 60), (-0.4, 200))]
        low, high = statistics.stratified(strata, [1 / 3] * 3).ci95
        inside += low <= 0.2 <= high
    assert 0.925 <= inside / 400 <= 0.975


def test_a_lower_figure_may_be_the_better_one() -> None:
    """The verdict goes by the metric's direction."""

    def side(values: list[float]) -> Evaluated:
        pairs = tuple((value, 1.0) for value in values)
        metrics = {"ter,none": Metric("mean", False)}  # noqa: FBT003
        one = MeasuredScores("t", "generate_until", "s", "h", "1", len(pairs), 0, metrics, {"ter,none": pairs})
        return Evaluated({}, [], {"t": one})

    spec = GroupSpec("1", ("t",), {"ter,none": True}, {"ter,none": False})
    chance = random.Random(6)
    before = [chance.random() + 1 for _ in range(50)]
    found = compare_groups({"g": spec}, side(before), side([one - chance.random() for one in before]))
    assert found["g"]["metrics"]["ter,none"]["verdict"] == "improved"
    assert found["g"]["metrics"]["ter,none"]["improved"] == 50


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": ["few.yaml", "../other.yaml"]}, "is not in the folder of the group"),
        ({"task": ["\0.yaml"]}, "is not in the folder of the group"),
        ({"task": ["own.yaml"]}, "own.yaml is a group, too"),
        ({"task": "few.yaml"}, "task: must be a list of task names"),
        ({"task": []}, "task: must be a list of task names"),
        ({"group": "a/b"}, "group: must consist of letters"),
        ({"group": "few"}, "names few twice"),
        ({"task": ["few.yaml", "few.yaml"]}, "names few twice"),
        ({"include": "other.yaml"}, "include: is not allowed in a user's group"),
        ({"aggregate_metric_list": [{"metric": "acc", "aggregation": "utils.mean"}]}, "aggregation must be mean"),
        ({"aggregate_metric_list": [{"metric": "acc", "weight_by_size": "no"}]}, "weight_by_size true or false"),
        (
            {"aggregate_metric_list": [{"metric": "acc", "filter_list": 5}]},
            "filter_list must be a name or a list of names",
        ),
        ({"aggregate_metric_list": {"metric": "acc"}}, "must be a list of metrics"),
        ({"metadata": 3}, "metadata: is no mapping"),
        ({"aggregate_metric_list": [{"metric": "f1"}]}, "own has no metric that is an average over questions"),
    ],
)
def test_what_is_not_supported_is_refused_in_words(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    """A group's file cannot lead out of its folder or name code, and figures that cannot be compared are an error."""
    path = write_group(tmp_path, **changes)
    with pytest.raises(SettingsError, match=says):
        load_tasks([str(path)], {}, {})


def test_tasks_that_disagree_on_what_is_better_are_refused() -> None:
    """A mean of one metric that is better higher in one task and lower in another has no direction to be judged by."""
    asked = [SimpleNamespace(metric=name, filter_list=None, weight_by_size=True) for name in ("loss", "acc")]
    members = [SimpleNamespace(task_name=name) for name in ("one", "two")]
    group = SimpleNamespace(
        has_aggregation=True, version="1", aggregate_metric_list=asked, get_all_tasks=lambda: members
    )
    metrics = {
        name: {"loss,none": Metric("mean", higher_is_better=better), "acc,none": Metric("mean", higher_is_better=True)}
        for name, better in (("one", True), ("two", False))
    }
    with pytest.raises(SettingsError, match=r"own has loss,none, where higher is better for one and lower for two"):
        read_groups({"own": group}, metrics)
    metrics["two"]["loss,none"] = Metric("perplexity", higher_is_better=False)
    assert read_groups({"own": group}, metrics)["own"].higher_is_better == {"loss,none": True, "acc,none": True}


def test_a_metric_that_no_task_has_is_left_out(tmp_path: Path) -> None:
    """Others of the group are compared; a group without figures only stands for its tasks."""
    asked = [{"metric": "f1"}, {"metric": "acc"}]
    tasks = load_tasks([str(write_group(tmp_path, aggregate_metric_list=asked))], {}, {})
    assert dict(tasks.groups["own"].metrics) == {"acc,none": True}
    tasks = load_tasks([str(write_group(tmp_path, aggregate_metric_list=None))], {}, {})
    assert (dict(tasks.groups), len(tasks.loaded["tasks"])) == ({}, 3)


def test_a_changed_group_is_another(tmp_path: Path) -> None:
    """The group's file counts in the fingerprints of its tasks, by which a resumed run knows that nothing changed."""
    first = load_tasks([str(write_group(tmp_path))], {}, {}).fingerprints()
    again = load_tasks([str(write_group(tmp_path, aggregate_metric_list=[{"metric": "acc"}]))], {}, {}).fingerprints()
    assert all(first[name] != again[name] for name in SIZES)


@pytest.mark.long
def test_questions_of_a_task_of_a_group_may_be_given(tmp_path: Path) -> None:
    """JOB_EVAL__DATA for a task of lm-eval that a user's group names; for a task that nothing names it is an error."""
    rows = [
        {"id": str(n), "question": f"{n}?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "A"}
        for n in range(3)
    ]
    write_jsonl(tmp_path / "arc.jsonl", rows)
    path = str(write_group(tmp_path, task=["few.yaml", "arc_easy"], aggregate_metric_list=[{"metric": "acc"}]))
    data = {"arc_easy": tmp_path / "arc.jsonl"}
    check_tasks([path], data)
    tasks = load_tasks([path], data, {"arc_easy": "arc.jsonl"})
    assert tasks.groups["own"].tasks == ("arc_easy", "few")
    for check in (
        lambda: check_tasks([path], {"arc_challenge": Path("x")}),
        lambda: load_tasks([path], {"x": Path("x")}, {}),
    ):
        with pytest.raises(SettingsError, match="does not name that task"):
            check()


@pytest.mark.long
def test_groups_of_lm_eval_are_known_with_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The group mmlu and its four parts have figures of their own, weighted by size, of the tasks of the parts."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    def download(self: Any, *_: Any, **__: Any) -> None:
        row = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 0, "subject": "s"}
        self.dataset = {split: Dataset.from_list([row] * 9) for split in ("test", "dev", "validation")}

    monkeypatch.setattr(ConfigurableTask, "download", download)
    tasks = load_tasks(["mmlu"], {}, {}, 0)
    assert set(tasks.groups) == {"mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"}
    assert len(tasks.groups["mmlu"].tasks) == len(tasks.loaded["tasks"]) == 57
    assert tasks.groups["mmlu"].metrics == {"acc,none": True}
    with pytest.raises(SettingsError, match="names a task twice"):
        load_tasks(["mmlu", "mmlu_anatomy"], {}, {}, 0)


@pytest.mark.long
def test_a_group_of_lm_eval_with_local_data_is_aggregated_as_by_lm_eval(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of mmlu from files of JOB_EVAL__DATA, 0-shot as its tasks say: lm-eval's own results of the group."""
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    names = sorted(tasks_of(manager.task_index, ["mmlu"]))
    assert len(names) == 57
    rows = {
        name: [
            {"question": f"{name} {n}?", "choices": ["a", "b", "c", "d"], "answer": n % 4, "subject": name}
            for n in range(2 + number % 4)
        ]
        for number, name in enumerate(names)
    }
    data = {name: write_jsonl(tmp_path / f"{name}.jsonl", told) for name, told in rows.items()}
    tasks = load_tasks(["mmlu"], data, {name: str(path) for name, path in data.items()})
    assert {name: task.config.num_fewshot for name, task in tasks.loaded["tasks"].items()} == dict.fromkeys(names, 0)
    assert set(tasks.sources.values()) == set(map(str, data.values()))

    def score(seed: int) -> Any:
        def of(questions: list[Question]) -> list[list[ChoiceScore]]:
            return [
                [ChoiceScore(-random.Random(f"{seed} {asked.context} {one}").random(), False) for one in asked.choices]  # noqa: FBT003
                for asked in questions
            ]

        return of

    sides = [
        Evaluated({n: one for n, (one, _) in evaluate(tasks, tokenizer, score(seed), limit=None).items()}, [])
        for seed in (1, 2)
    ]
    found = compare_groups(tasks.groups, *sides)
    assert set(found) == {"mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"}

    def download(self: Any, *_: Any, **__: Any) -> None:
        told = Dataset.from_list(rows[self.config.task])
        self.dataset = {"test": told, "dev": told}

    monkeypatch.setattr(ConfigurableTask, "download", download)
    loaded = manager.load(["mmlu"])
    for side, seed in (("base", 1), ("adapter", 2)):
        lm = _scoring_model(tokenizer, score(seed), None)
        theirs = lm_eval.evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0)["groups"]
        assert {name: one["metrics"]["acc,none"][side] for name, one in found.items()} == {
            name: pytest.approx(theirs[name]["acc,none"], abs=1e-12) for name in found
        }
    with pytest.raises(SettingsError, match="JOB_EVAL__TASKS does not name that task"):
        check_tasks(["mmlu_stem"], ["mmlu_philosophy"])
