"""Evaluation: lm-eval's own numbers, question by question."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from string import ascii_letters
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from job.errors import DataError, SettingsError, Unreachable
from job.evaluation import harness
from job.evaluation.harness import evaluate
from job.evaluation.question_lengths import count_questions
from job.evaluation.samples import Sample, write_samples
from job.evaluation.scorer import score_questions
from job.evaluation.scoring import plan_sequences, score_sequence, tokens_to_compute
from job.evaluation.statistics import standard_error
from job.evaluation.task_names import check_tasks
from job.evaluation.tasks import load_tasks, restart_examples
from job.records import ChoiceScore, Question, TaskScores
from tests.helpers import ARC_EASY, arc_rows, make_model, read_jsonl, write_jsonl
from tests.unit.evaluation.example_tasks import local_tasks, whole_index

Results = dict[str, tuple[TaskScores, list[dict[str, Any]]]]

pytestmark = [
    pytest.mark.usefixtures("one_index"),
    # lm-eval 0.4.13 calls parts of itself by names that it has deprecated
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval.*"),
]


@cache
def model(folder: Path) -> Any:
    """The tiny base with a fresh adapter, as the job evaluates it."""
    return make_model(folder).eval()


def run(
    folder: Path,
    tokenizer: Any,
    budget: int = 4096,
    limit: int | None = None,
    cut_to: int | None = None,
    **files: Path,
) -> Results:
    """Evaluates the tiny model the way the job does."""

    def score(questions: list[Question]) -> list[list[ChoiceScore]]:
        rows = plan_sequences(questions, budget)
        return [scores for row in rows for scores in score_sequence(model(folder), questions[row.start : row.stop])]

    found = evaluate(local_tasks(**files), tokenizer, score, limit=limit, cut_to=cut_to)
    return {task: (scores, [sample.model_dump() for sample in samples]) for task, (scores, samples) in found.items()}


def by_lm_eval(
    folder: Path, tokenizer: Any, limit: int | None = None, max_length: int | None = None, **files: Path
) -> dict[str, Any]:
    """lm-eval by its own command's means: HFLM on a plainly loaded model, questions by its JSON loader."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    splits = {"training_split": None, "validation_split": None, "test_split": "test"}
    source = {"dataset_path": "json", "dataset_name": None, **splits}
    results = simple_evaluate(
        model=HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=8, device="cpu", max_length=max_length),
        tasks=[
            {
                **load_yaml(whole_index().task_index[name].yaml_path),
                **source,
                "dataset_kwargs": {"data_files": {"test": str(file)}},
            }
            for name, file in files.items()
        ],
        task_manager=whole_index(),
        num_fewshot=0,
        limit=limit,
        bootstrap_iters=1,  # the standard error of a mean needs no bootstrap, but 0 switches it off
    )
    tracker = EvaluationTracker(output_path=str(folder.parent / "lm-eval"))
    tracker.save_results_aggregated(results=results, samples=results["samples"])
    return results


def assert_equal(ours: Results, theirs: dict[str, Any]) -> None:
    """Same task hash and version; same log-likelihoods, predictions and scores for each question; same figures."""
    assert ours.keys() == theirs["results"].keys()
    for name, (scores, records) in ours.items():
        samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
        assert scores.task_hash == theirs["task_hashes"][name]
        assert scores.version == str(theirs["versions"][name])
        assert scores.n == len(records) == len(samples)
        for record, sample in zip(records, samples, strict=True):
            likelihoods = [answer[0] for answer in sample["filtered_resps"]]
            assert record["log_likelihoods"] == pytest.approx(likelihoods, abs=1e-4)
            assert record["prediction"] == likelihoods.index(max(likelihoods))
            assert (record["acc"], record["acc_norm"]) == (sample["acc"], sample["acc_norm"])
            assert (record["id"], record["gold"]) == (sample["doc"]["id"], sample["target"])
            assert record["doc_hash"] == sample["doc_hash"]
        figures = theirs["results"][name]
        assert scores.acc == pytest.approx(figures["acc,none"], abs=1e-12)
        assert scores.acc_norm == pytest.approx(figures["acc_norm,none"], abs=1e-12)
        assert scores.stderr == pytest.approx(figures["acc_stderr,none"], abs=1e-12)
        assert scores.acc_norm_stderr == pytest.approx(figures["acc_norm_stderr,none"], abs=1e-12)


def test_scores_are_lm_evals_own(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Two tasks at once, 3 to 5 choices, labels that are letters or digits: all as lm-eval's HFLM has it."""
    files = {
        "arc_easy": write_jsonl(tmp_path / "easy.jsonl", arc_rows(30)),
        "arc_challenge": write_jsonl(tmp_path / "challenge.jsonl", arc_rows(12)),
    }
    ours = run(base_folder, tokenizer, **files)
    assert_equal(ours, by_lm_eval(base_folder, tokenizer, **files))
    scores, records = ours["arc_easy"]
    assert scores.n == 30
    assert {len(record["log_likelihoods"]) for record in records} == {3, 4, 5}
    assert 0 < sum(scores.correct) < 30
    assert scores.correct != scores.correct_norm


def test_long_questions_are_cut_as_lm_eval_cuts_them(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Questions that are too long lose their beginning, each choice by its own length, as HFLM has it."""
    rows = arc_rows(12)
    for row in rows[::2]:
        row["question"] = "Long ago it was said that " * 6 + row["question"]
    file = write_jsonl(tmp_path / "long.jsonl", rows)
    longest = max(len(tokenizer.encode(row["question"])) for row in rows)
    most = longest - 20
    ours = run(base_folder, tokenizer, cut_to=most, arc_easy=file)
    assert_equal(ours, by_lm_eval(base_folder, tokenizer, max_length=most, arc_easy=file))
    assert ours != run(base_folder, tokenizer, arc_easy=file)


@pytest.mark.parametrize("same", [True, False])
def test_questions_after_examples_are_scored_as_lm_eval_scores_them(
    base_folder: Path, tokenizer: Any, tmp_path: Path, *, same: bool
) -> None:
    """By HFLM in fp32; the same examples for all questions are computed once, and those drawn for each are not."""
    from lm_eval import evaluate as evaluate_by_lm_eval
    from lm_eval.api.samplers import FirstNSampler
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    examples = [{**row, "question": f"Of another file: {row['question']}"} for row in arc_rows(9)]
    files = {
        "arc_easy": write_jsonl(tmp_path / "q.jsonl", arc_rows(10)),
        "arc_easy:examples": write_jsonl(tmp_path / "e.jsonl", examples),
    }
    tasks = load_tasks(["arc_easy"], files, {name: path.name for name, path in files.items()}, 3)
    (task,) = tasks.loaded["tasks"].values()
    if same:  # as a task with `sampler: first_n` has it
        task.sampler.__class__ = FirstNSampler
    tokens: list[int] = []

    def score(questions: list[Question]) -> list[list[ChoiceScore]]:
        tokens.extend((tokens_to_compute(questions, 4096), sum(map(tokens_alone, questions))))
        return score_questions(model(base_folder), questions, 4096)

    _, samples = evaluate(tasks, tokenizer, score, limit=None)["arc_easy"]
    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, attn_implementation="sdpa")
    restart_examples(task)
    lm = HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=8, device="cpu")
    theirs = evaluate_by_lm_eval(lm=lm, task_dict=tasks.loaded, bootstrap_iters=0)["samples"]["arc_easy"]
    assert len(samples) == len(theirs) == 10
    for mine, other in zip(samples, sorted(theirs, key=lambda sample: sample["doc_id"]), strict=True):
        likelihoods = [answer[0] for answer in other["filtered_resps"]]
        assert mine.log_likelihoods == pytest.approx(likelihoods, abs=2e-4)
        assert mine.prediction == likelihoods.index(max(likelihoods))
        assert mine.prompt_hash == other["prompt_hash"]
    computed, alone = tokens
    assert computed < alone / 4 if same else computed > alone / 2


def tokens_alone(question: Question) -> int:
    """Of a question's context once, and its choices without their last tokens."""
    return len(question.context) + sum(len(choice) - 1 for choice in question.choices)


@pytest.mark.skipif(not ARC_EASY.exists(), reason=f"the real ARC-Easy is not at {ARC_EASY}")
def test_scores_are_lm_evals_own_on_the_real_arc_easy(base_folder: Path, tokenizer: Any) -> None:
    """The first 24 questions of the real test set."""
    ours = run(base_folder, tokenizer, limit=24, arc_easy=ARC_EASY)
    assert_equal(ours, by_lm_eval(base_folder, tokenizer, limit=24, arc_easy=ARC_EASY))


@pytest.mark.parametrize("budget", [1, 300])
def test_the_cut_into_rows_changes_no_answer(base_folder: Path, tokenizer: Any, tmp_path: Path, budget: int) -> None:
    """Predictions, scores and the task's hash are the same however many tokens are scored at once."""
    file = write_jsonl(tmp_path / "q.jsonl", arc_rows(30))
    (one, records), (other, cut) = (
        run(base_folder, tokenizer, b, arc_easy=file)["arc_easy"] for b in (100_000, budget)
    )
    assert one == other
    kept = ("id", "prediction", "prediction_norm", "gold", "acc", "acc_norm", "choice_lengths")
    assert [[record[key] for key in kept] for record in records] == [[record[key] for key in kept] for record in cut]


def test_a_record_is_enough_to_score_the_question_again(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Predictions, accuracies and standard errors follow from the written lines alone."""
    rows = arc_rows(30)
    scores, records = run(base_folder, tokenizer, arc_easy=write_jsonl(tmp_path / "q.jsonl", rows))["arc_easy"]
    write_samples(tmp_path / "deep" / "records.jsonl", [Sample.model_validate(record) for record in records])
    lines = read_jsonl(tmp_path / "deep" / "records.jsonl")
    assert lines == records
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        normalized = [
            value / len(text) for value, text in zip(line["log_likelihoods"], row["choices"]["text"], strict=True)
        ]
        assert line["prediction"] == line["log_likelihoods"].index(max(line["log_likelihoods"]))
        assert line["prediction_norm"] == normalized.index(max(normalized))
        assert line["gold"] == row["choices"]["label"].index(row["answerKey"])
        assert line["question"] == f"Question: {row['question']}\nAnswer:"
        assert line["choices"] == row["choices"]["text"]
        assert line["acc"] == (line["prediction"] == line["gold"])
        assert line["acc_norm"] == (line["prediction_norm"] == line["gold"])
    correct = [line["prediction"] == line["gold"] for line in lines]
    assert scores.correct == tuple(correct)
    assert scores.acc == sum(correct) / 30
    assert scores.stderr == standard_error(correct)


def test_tasks_can_be_run_twice(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Base and adapter are scored with the same loaded tasks; the second run asks each question once, as the first."""
    tasks = local_tasks(arc_easy=write_jsonl(tmp_path / "q.jsonl", arc_rows(10)))
    asked: list[list[Question]] = []

    def score(questions: list[Question]) -> list[list[ChoiceScore]]:
        asked.append(questions)
        return [[ChoiceScore(-float(len(choice)), greedy=False) for choice in q.choices] for q in questions]

    first, second = (evaluate(tasks, tokenizer, score, limit=None)["arc_easy"] for _ in range(2))
    assert first == second
    assert asked[0] == asked[1]
    assert len(asked[0]) == 10


@pytest.mark.parametrize("limit", [None, 5])
def test_questions_are_known_before_they_are_asked(
    base_folder: Path, tokenizer: Any, tmp_path: Path, limit: int | None
) -> None:
    """Ids and hashes of the rows are those that the records are going to have, without ids in the file too."""
    files = {
        "arc_easy": write_jsonl(tmp_path / "easy.jsonl", arc_rows(8)),
        "arc_challenge": write_jsonl(
            tmp_path / "challenge.jsonl", [{k: v for k, v in row.items() if k != "id"} for row in arc_rows(7)]
        ),
    }
    known = local_tasks(**files).questions(limit)
    results = run(base_folder, tokenizer, limit=limit, **files)
    assert known == {task: [(r["id"], r["doc_hash"]) for r in records] for task, (_, records) in results.items()}
    assert [len(asked) for asked in known.values()] == [limit or 8, limit or 7]


def test_templates_are_compiled_once(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More questions take no more compilations, and lm-eval is left as it was."""
    from lm_eval.utils import env

    compiled: list[str] = []
    plain = type(env).compile
    monkeypatch.setattr(
        type(env), "compile", lambda self, source, *rest: compiled.append(source) or plain(self, source, *rest)
    )
    counts = []
    for number in (5, 20):
        compiled.clear()
        run(base_folder, tokenizer, arc_easy=write_jsonl(tmp_path / f"{number}.jsonl", arc_rows(number)))
        counts.append(len(compiled))
    assert counts[0] == counts[1] < 20
    assert "from_string" not in vars(env)


def test_the_limit_takes_the_first_questions(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """With a limit the first questions of the file are asked, and the hash is theirs."""
    rows = arc_rows(12)
    limited = run(base_folder, tokenizer, limit=5, arc_easy=write_jsonl(tmp_path / "q.jsonl", rows))["arc_easy"]
    short = run(base_folder, tokenizer, arc_easy=write_jsonl(tmp_path / "short.jsonl", rows[:5]))["arc_easy"]
    assert limited == short
    assert limited[0].n == 5


def test_the_source_is_what_the_user_wrote(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """A fetched file goes by the name it was asked for, not by where it was put."""
    file = write_jsonl(tmp_path / "q.jsonl", arc_rows(4))
    assert run(base_folder, tokenizer, arc_easy=file)["arc_easy"][0].source == "file://arc_easy"


def test_a_task_with_examples_is_never_asked_without_them(tmp_path: Path) -> None:
    """GSM8K is asked with five examples, which a file of questions lacks: refused, unless the setting says 0."""
    rows = [{"question": f"How many are {n} and 2?", "answer": f"#### {n + 2}"} for n in range(4)]
    files = {"gsm8k": write_jsonl(tmp_path / "q.jsonl", rows)}
    with pytest.raises(
        SettingsError, match=r"JOB_EVAL__NUM_FEWSHOT: gsm8k is asked with 5 examples, but its data has only questions"
    ):
        load_tasks(["gsm8k"], files, {"gsm8k": "q.jsonl"})
    (task,) = load_tasks(["gsm8k"], files, {"gsm8k": "q.jsonl"}, 0).loaded["tasks"].values()
    assert (task.OUTPUT_TYPE, task.config.num_fewshot) == ("generate_until", 0)


def test_examples_come_from_a_file_of_their_own(tmp_path: Path) -> None:
    """Beside the questions; they are in the prompts and in the fingerprint, and enough of them are needed."""

    def rows(first: int, count: int) -> list[dict[str, str]]:
        return [
            {"question": f"How many are {n} and 2?", "answer": f"#### {n + 2}"} for n in range(first, first + count)
        ]

    files = {"gsm8k": write_jsonl(tmp_path / "q.jsonl", rows(0, 4)), "gsm8k:examples": tmp_path / "e.jsonl"}
    found = []
    for first in (100, 200):
        write_jsonl(tmp_path / "e.jsonl", rows(first, 8))
        tasks = load_tasks(["gsm8k"], files, {name: path.name for name, path in files.items()})
        (task,) = tasks.loaded["tasks"].values()
        prompt = task.fewshot_context(task.eval_docs[0], num_fewshot=5)
        assert sum(f"How many are {n} and 2?" in prompt for n in range(first, first + 8)) == 5
        assert prompt.count("How many are 0 and 2?") == 1
        assert "How many are 1 and 2?" not in prompt
        found.append(tasks.fingerprints()["gsm8k"])
    assert found[0] != found[1]
    write_jsonl(tmp_path / "e.jsonl", rows(0, 5))
    with pytest.raises(SettingsError, match="there are 5; one more"):
        load_tasks(["gsm8k"], files, {name: path.name for name, path in files.items()})
    write_jsonl(tmp_path / "e.jsonl", [*rows(100, 6), {"question": "?"}, *rows(3, 1)])
    with pytest.raises(DataError, match="undefined") as raised:
        load_tasks(["gsm8k"], files, {name: path.name for name, path in files.items()})
    places, whys = zip(*((problem.where, problem.what) for problem in raised.value.problems), strict=True)
    assert places == ("e.jsonl:7", "e.jsonl:8")
    assert "is also a question of gsm8k" in whys[1]
    alone = {"gsm8k:examples": files["gsm8k:examples"]}
    for check in (lambda: load_tasks(["gsm8k"], alone, {}), lambda: check_tasks(["gsm8k"], alone)):
        with pytest.raises(SettingsError, match="JOB_EVAL__DATA: gives examples of gsm8k, and no questions"):
            check()


def test_a_task_without_accuracy_is_refused(tmp_path: Path) -> None:
    """Multiple choice that is scored by something else than right or wrong answers cannot be compared."""
    file = write_jsonl(tmp_path / "q.jsonl", [{"sentence": "It is.", "label": 1, "idx": 0}] * 3)
    with pytest.raises(SettingsError, match=r"JOB_EVAL__TASKS: cola has no accuracy"):
        local_tasks(cola=file)


def test_a_task_with_fractions_of_a_point_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    """An accuracy that is no count of right answers is an error and never rounded to one."""
    targets = {"choices": ["yes", "no", "both"], "labels": [1, 0, 1]}
    file = write_jsonl(tmp_path / "q.jsonl", [{"question": f"Is it {n}?", "mc2_targets": targets} for n in range(3)])

    def score(questions: list[Question]) -> list[list[ChoiceScore]]:
        return [[ChoiceScore(-1.0 - n, greedy=False) for n in range(len(q.choices))] for q in questions]

    with pytest.raises(SettingsError, match="truthfulqa_mc2 gives fractions of a point"):
        evaluate(local_tasks(truthfulqa_mc2=file), tokenizer, score, limit=None)


@pytest.mark.parametrize(
    ("known", "choices", "what"), [(ascii_letters, ["red", "42"], "its choice ' 42'"), ("z", ["z", "zz"], "it$")]
)
def test_a_question_without_tokens_is_an_error_of_the_data(
    tmp_path: Path, known: str, choices: list[str], what: str
) -> None:
    """A tokenizer may drop what it does not know: what is left of nothing has no likelihood, and is named."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE({letter: n for n, letter in enumerate(known)}, []))
    letters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="z")
    rows = [row | {"choices": {"text": choices, "label": ["A", "B"]}, "answerKey": "A"} for row in arc_rows(2)]
    file = write_jsonl(tmp_path / "q.jsonl", rows)
    with pytest.raises(DataError, match=f"no tokens for {what}") as caught:
        evaluate(local_tasks(arc_easy=file), tokenizer, lambda _: pytest.fail("scored"), limit=None)
    assert len(caught.value.problems) == len(rows)
    with pytest.raises(DataError, match="no tokens for a part of it"):  # a plan finds it too
        count_questions(local_tasks(arc_easy=file), tokenizer, None)


def test_a_hub_that_cannot_be_reached_is_worth_a_retry() -> None:
    """Without a file the questions come from the hub; offline that is exit code 69 and no bug."""
    with pytest.raises(Unreachable, match="questions of arc_easy"):
        load_tasks(["arc_easy"], {}, {})


def test_questions_that_put_the_choices_in_front_are_accepted(tokenizer: Any, tmp_path: Path) -> None:
    """Winogrande's way: each choice makes its own context, and one continuation follows them all."""
    rows = [
        {"sentence": f"{n} is less than _ and fine.", "option1": "one", "option2": "two", "answer": str(1 + n % 2)}
        for n in range(4)
    ]
    asked: list[Question] = []

    def score(questions: list[Question]) -> list[list[ChoiceScore]]:
        asked.extend(questions)
        return [[ChoiceScore(-1.0, greedy=False)] for _ in questions]

    tasks = local_tasks(winogrande=write_jsonl(tmp_path / "q.jsonl", rows))
    scores, records = evaluate(tasks, tokenizer, score, limit=None)["winogrande"]
    assert len(asked) == 8
    assert (records[1].question, records[1].choices) == (
        "and fine.",
        ["1 is less than one", "1 is less than two"],
    )
    assert scores.correct == (True, False, True, False)


def test_choices_in_front_are_scored_as_lm_eval_scores_them(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Winogrande's likelihoods of the common ending, predictions, hashes and accuracy are those of lm-eval's HFLM."""
    options = ("one", "a cat on the mat", "seven hundred", "the other one, too")
    rows = [
        {
            "sentence": f"Item {n} is less than _ and {'fine' * (n % 3)} apples.",
            "option1": options[n % 4],
            "option2": options[(n + 1 + n // 4) % 4] + " of two",
            "answer": str(1 + n % 2),
        }
        for n in range(9)
    ]
    file = write_jsonl(tmp_path / "q.jsonl", rows)
    theirs = by_lm_eval(base_folder, tokenizer, winogrande=file)
    (scores, records) = run(base_folder, tokenizer, budget=64, winogrande=file)["winogrande"]
    samples = sorted(theirs["samples"]["winogrande"], key=lambda sample: sample["doc_id"])
    assert (scores.task_hash, scores.n) == (theirs["task_hashes"]["winogrande"], len(rows))
    assert scores.acc == pytest.approx(theirs["results"]["winogrande"]["acc,none"], abs=1e-12)
    for record, sample in zip(records, samples, strict=True):
        likelihoods = [answer[0] for answer in sample["filtered_resps"]]
        assert record["log_likelihoods"] == pytest.approx(likelihoods, abs=1e-4)
        assert (record["prediction"], record["acc"]) == (likelihoods.index(max(likelihoods)), sample["acc"])
        assert record["doc_hash"] == sample["doc_hash"]


def test_texts_are_tokenized_together_as_they_are_one_by_one(tokenizer: Any) -> None:
    """Contexts with and without spaces at their end, choices, an empty context: the tokens that `encode` gives."""
    pairs = [(f"What is {n}?", f" It is {m}.") for n in range(70) for m in range(4)]
    pairs += [("two  ", " spaces"), ("a\n", "b"), ("", "nothing before"), ("again", ""), ("\u00e9\u4e2d", "\u6587")]
    found = harness._encoded(tokenizer, pairs, "<s>")
    assert set(found) == {text for a, b in pairs if a for text in (a.rstrip(), a + b)}
    assert all(ids == tokenizer.encode(text) for text, ids in found.items())
    slow = SimpleNamespace(encode=lambda text: [len(text)])
    assert harness._encoded(slow, [("ab ", "c")], "<s>") == {"ab": [2], "ab c": [4]}
    assert harness._encoded(tokenizer, [("", "x")], "<s>") == {}


@pytest.mark.parametrize("begin", ["", "<s>", "</s>", " <s>"])
@pytest.mark.parametrize("bos", [True, False])
def test_prompts_that_begin_with_a_special_token_are_tokenized_as_lm_eval_does(
    tokenizer: Any, begin: str, *, bos: bool
) -> None:
    """Scored prompts and texts: the tokens of HFLM's own code, which never puts the first one in front twice."""
    from lm_eval.models.huggingface import HFLM

    known = deepcopy(tokenizer)
    if not bos:
        known.bos_token = None
    asked: list[Question] = []

    def score(questions: list[Question]) -> list[list[ChoiceScore]]:
        asked.extend(questions)
        return [[ChoiceScore(-1.0, greedy=False) for _ in one.choices] for one in questions]

    lm = harness._scoring_model(known, score, None, harness.Generating(lambda *_: [], 64, 0))
    hflm = SimpleNamespace(add_bos_token=None, tokenizer=known, prefix_token_id=lm.prefix_token_id)
    text = f"{begin}What is it?"
    lm.loglikelihood([SimpleNamespace(args=(text, " This."))])
    lm.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    scored, read = asked
    assert [*scored.context, *scored.choices[0]] == HFLM.tok_encode(hflm, f"{text} This.")
    assert list(read.choices[0]) == HFLM.tok_encode(hflm, text)
