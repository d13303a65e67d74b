"""Users' own tasks: described by an untrusted file, with its data next to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from job.errors import DataError, SettingsError
from job.evaluation.task_files import read_task_file
from job.evaluation.task_names import check_tasks
from job.evaluation.tasks import load_tasks
from tests.helpers import write_jsonl
from tests.unit.evaluation.example_tasks import write_task

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval.*")


def prompts(tasks: Any) -> list[str]:
    """What the questions of the only task are asked with."""
    (task,) = tasks.loaded["tasks"].values()
    task.set_fewshot_seed(1)
    return [task.fewshot_context(doc, num_fewshot=task.config.num_fewshot) for doc in task.eval_docs]


def test_a_task_is_asked_with_its_own_examples(tmp_path: Path) -> None:
    """As many as the file says, or the setting; drawn from its own split; the questions are those beside the file."""
    path = str(write_task(tmp_path))
    assert {prompt.count("Answer: ") for prompt in prompts(load_tasks([path], {}, {}))} == {2}
    assert {prompt.count("Answer: ") for prompt in prompts(load_tasks([path], {}, {}, 0))} == {0}
    asked = prompts(load_tasks([path], {}, {}, 3))
    assert {prompt.count("Answer: ") for prompt in asked} == {3}
    assert len(asked) == 12
    assert all(f"what is {n + 5} and {n + 7}?\nAnswer:" in prompt for n, prompt in enumerate(asked))


def test_the_example_of_the_guide_is_a_task(tmp_path: Path) -> None:
    """Its file and its questions, as they stand there."""
    guide = (Path(__file__).parents[3] / "job/evaluation/README.md").read_text(encoding="utf-8")
    section = guide.partition("## Questions of your own")[2]
    described, questions = re.findall(r"```(?:yaml|json)\n(.*?)```", section, re.DOTALL)[:2]
    (tmp_path / "capitals.yaml").write_text(described, encoding="utf-8")
    (tmp_path / "capitals.jsonl").write_text(questions, encoding="utf-8")
    tasks = load_tasks([str(tmp_path / "capitals.yaml")], {}, {})
    assert prompts(tasks)[0] == "Question: What is the capital of Peru?\nAnswer:"
    (task,) = tasks.loaded["tasks"].values()
    assert [task.doc_to_choice(doc)[task.doc_to_target(doc)] for doc in task.eval_docs] == ["Lima", "Nairobi"]


def test_a_changed_file_is_another_task(tmp_path: Path) -> None:
    """Questions and file both count in the fingerprint, by which a resumed run knows that nothing has changed."""
    first = load_tasks([str(write_task(tmp_path))], {}, {}).fingerprints()
    assert load_tasks([str(write_task(tmp_path))], {}, {}).fingerprints() == first
    assert load_tasks([str(write_task(tmp_path, doc_to_text="{{question}}"))], {}, {}).fingerprints() != first
    assert load_tasks([str(write_task(tmp_path, questions=13))], {}, {}).fingerprints() != first


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"class": "os.system"}, "class: is not allowed"),
        ({"include": "../other.yaml"}, "include: is not allowed"),
        ({"process_docs": "utils.docs"}, "process_docs: is not allowed"),
        ({"custom_dataset": "utils.load"}, "custom_dataset: is not allowed"),
        ({"unsafe_code": True}, "unsafe_code: is not allowed"),
        ({"group": "all"}, "output_type: is not allowed in a user's group"),
        ({"dataset_path": "./loader.py"}, "dataset_path: is './loader.py'"),
        ({"dataset_path": "someone/data"}, "dataset_path: is 'someone/data'"),
        (
            {"dataset_kwargs": {"data_files": {"test": "../x.jsonl", "train": "train.jsonl"}}},
            "is not in the folder",
        ),
        (
            {"dataset_kwargs": {"data_files": {"test": "/etc/passwd", "train": "train.jsonl"}}},
            "is not in the folder",
        ),
        ({"dataset_kwargs": {"data_files": "no.jsonl"}}, "no.jsonl does not exist"),
        ({"dataset_kwargs": {"data_files": {}, "trust_remote_code": True}}, "needs data_files and nothing else"),
        ({"metric_list": [{"metric": "someone/metric"}]}, "'someone/metric' is not a metric"),
        (
            {"metric_list": [{"metric": "exact_match", "aggregation": "utils.mean"}]},
            "'utils.mean' is not an aggregation",
        ),
        ({"filter_list": [{"name": "x", "filter": [{"function": "utils.f"}]}]}, "'utils.f' is not a filter"),
        ({"fewshot_config": {"process_docs": "x"}}, "fewshot_config: may have"),
        ({"num_fewshot": 1e9}, "num_fewshot: must be a number"),
        ({"task": "../../x"}, "must consist of letters"),
        ({"output_type": None}, "output_type: is missing"),
        ({"test_split": None}, "test_split: is missing"),
        ({"generation_kwargs": {"num_beams": 4}}, "num_beams"),
        ({"metric_list": [{"metric": "bleu"}]}, "no metric that can be paired"),
        ({"num_fewshot": 5}, "there are 5; one more"),
    ],
)
def test_what_a_file_may_not_say_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    """Code, other folders, unknown names and impossible numbers end the job with 2, in words that name the field."""
    path = str(write_task(tmp_path, **changes))
    with pytest.raises(SettingsError) as refused:
        load_tasks([path], {}, {})
    assert says in str(refused.value)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task: !function utils.py", "code of a task file is never run"),
        ("task: !!python/object/apply:os.system ['echo']", "code of a task file is never run"),
        ("a: &a [1]\nb: [*a, *a]", "uses aliases"),
        ("task: x\ndoc_to_text: a\ndoc_to_text: b", "sums.yaml:3: a key is given twice"),
        ("- task", "is not a task"),
        ("task: [", "sums.yaml:"),
        ("task: !!bool maybe", "a value does not match its tag"),
        ("task: !!int ''", "a value does not match its tag"),
        ("[" * 30_000, "brackets"),
        ("- " * 20_000, "sums.yaml"),
        ("task: x" + " " * (1 << 20), "more than"),
    ],
)
def test_yaml_that_is_more_than_data_is_refused(tmp_path: Path, text: str, says: str) -> None:
    """Tags that build objects, aliases that grow, broken and huge files: words, exit code 2, and nothing is run."""
    path = tmp_path / "sums.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError) as refused:
        check_tasks([str(path)], {})
    assert says in str(refused.value)


def test_a_template_reaches_nothing_but_its_row(tmp_path: Path) -> None:
    """A template that climbs from its values into Python is stopped by the sandbox."""
    path = str(write_task(tmp_path, doc_to_text="{{ question.__class__.__mro__[1].__subclasses__() }}", num_fewshot=0))
    with pytest.raises(DataError, match="unsafe"):
        load_tasks([path], {}, {})


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """The data lies in the folder of the file, links followed."""
    folder = tmp_path / "task"
    folder.mkdir()
    path = write_task(folder)
    outside = write_jsonl(tmp_path / "outside.jsonl", [{"question": "a", "answer": "b"}] * 3)
    (folder / "test.jsonl").unlink()
    (folder / "test.jsonl").symlink_to(outside)
    with pytest.raises(SettingsError, match="is not in the folder"):
        read_task_file(str(path))


def test_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """By file and line, with exit code 65; so is a file of one question."""
    path = write_task(tmp_path)
    (tmp_path / "test.jsonl").write_text('{"question": 1\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"test\.jsonl"):
        read_task_file(str(path))
    with pytest.raises(DataError, match="two questions"):
        read_task_file(str(write_task(tmp_path, questions=1)))


CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{% if hint %}{{hint}}: {% endif %}{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "generation_kwargs": None,
    "metric_list": [{"metric": "acc"}],
}
LIKELIHOOD = {"output_type": "loglikelihood", "generation_kwargs": None, "metric_list": [{"metric": "acc"}]}
ROW: dict[str, Any] = {"question": "Which?", "choices": ["None of these", "b"], "gold": 1, "answer": "c", "hint": "H"}


@pytest.mark.parametrize(
    ("changes", "bad", "good"),
    [
        (
            CHOICE,
            [
                *({"choices": given} for given in (["a", ""], ["a"], None, [])),
                *({"gold": given} for given in (2, -1, None)),
                *({"question": given, "hint": None} for given in (None, "")),
            ],
            [{"hint": None}, {"answer": None}],
        ),
        (CHOICE | {"doc_to_text": ""}, [{"choices": ["a", ""]}], [{"question": None}]),
        ({}, [{"question": None}, {"answer": None}], [{"answer": ""}, {"hint": None}]),
        (LIKELIHOOD | {"doc_to_target": "{{answer}}"}, [{"answer": None}, {"answer": ""}], [{"gold": None}]),
    ],
)
def test_rows_that_make_no_question_are_named(
    tmp_path: Path, changes: dict[str, Any], bad: list[dict[str, Any]], good: list[dict[str, Any]]
) -> None:
    """Before a model is loaded, with file and line; a field that a template does not write may be null."""
    path = write_task(tmp_path, **changes, num_fewshot=0)
    fitting = [ROW, *(ROW | change for change in good)]
    write_jsonl(tmp_path / "test.jsonl", [*fitting, *(ROW | change for change in bad)])
    with pytest.raises(DataError) as caught:
        load_tasks([str(path)], {}, {})
    lines = [problem.where.removeprefix(f"{tmp_path}/test.jsonl:") for problem in caught.value.problems]
    assert lines == [str(len(fitting) + number + 1) for number in range(len(bad))]
    write_jsonl(tmp_path / "test.jsonl", fitting)
    load_tasks([str(path)], {}, {})


def test_fields_that_some_rows_lack_are_used_where_they_are(tmp_path: Path) -> None:
    """Also if the first row lacks them. Refused is only a row whose prompt would have the word None for it."""
    rows = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2", "hint": {"text": "None of it"}}]
    for condition in ("hint", "hint is not none"):
        template = f"{{% if {condition} %}}{{{{hint.text}}}}: {{% endif %}}{{{{question}}}}"
        path = write_task(tmp_path, doc_to_text=template, num_fewshot=0)
        write_jsonl(tmp_path / "test.jsonl", rows)
        assert load_tasks([str(path)], {}, {}).prompts(None) == {"sums": ["a", "None of it: b"]}
        # With examples, which are compared with the questions:
        path = write_task(tmp_path, doc_to_text=template, num_fewshot=1)
        for name, mark in (("test", ""), ("train", " or so")):
            write_jsonl(tmp_path / f"{name}.jsonl", [row | {"question": f"{row['question']}{mark}"} for row in rows])
        assert load_tasks([str(path)], {}, {})
    path = write_task(tmp_path, doc_to_text="{% if hint is defined %}{{hint}}: {% endif %}{{question}}", num_fewshot=0)
    write_jsonl(tmp_path / "test.jsonl", rows)
    with pytest.raises(DataError, match=r"test\.jsonl:1: .*null is written as None"):
        load_tasks([str(path)], {}, {})


def test_examples_with_missing_fields_are_named(tmp_path: Path) -> None:
    """An example whose answer is null would be shown with the answer None, where the prompts have examples."""
    path = write_task(tmp_path)
    rows = [{"question": f"what is {n}?", "answer": None if n == 2 else str(n)} for n in range(5)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"train\.jsonl:3: does not match"):
        load_tasks([str(path)], {}, {})
    load_tasks([str(path)], {}, {}, 0)


def test_questions_that_cannot_be_asked_are_not_compared_with_examples(tmp_path: Path) -> None:
    """They are named, and do not end the job as a bug."""
    path = write_task(tmp_path, doc_to_text="{{question.strip()}}")
    write_jsonl(tmp_path / "test.jsonl", [{"question": "why?", "answer": "x"}, {"question": None, "answer": "y"}])
    with pytest.raises(DataError, match=r"test\.jsonl:2: does not match"):
        load_tasks([str(path)], {}, {})


def test_a_question_is_not_shown_with_its_answer(tmp_path: Path) -> None:
    """lm-eval leaves a question out of its own examples only where these come from `test_split`."""
    path = write_task(tmp_path)
    rows = [{"question": f"what is {n} and {n + 2}?", "answer": str(2 * n + 2)} for n in range(3, 6)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"train\.jsonl:3: is also a question of sums") as caught:
        load_tasks([str(path)], {}, {})
    assert len(caught.value.problems) == 1
    load_tasks([str(path)], {}, {}, 0)
    one = {"dataset_kwargs": {"data_files": {"test": "test.jsonl"}}, "fewshot_split": "test"}
    load_tasks([str(write_task(tmp_path, **one))], {}, {})
    with pytest.raises(DataError, match="name that split as test_split instead of validation_split"):
        load_tasks([str(write_task(tmp_path, **one, test_split=None, validation_split="test"))], {}, {})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"generation_kwargs": {"max_gen_toks": 0}}, "at most 0 tokens"),
        ({"generation_kwargs": {"max_gen_toks": "ten"}}, "are no numbers"),
        ({"generation_kwargs": {"do_sample": True, "temperature": 1, "top_k": "x"}}, "are no numbers"),
        ({"generation_kwargs": {"do_sample": True, "temperature": 1, "top_p": 2}}, "top_p 2.0"),
        ({"filter_list": [{"name": "a", "filter": [{"function": "regex", "regex_pattern": "("}]}]}, "unterminated"),
        ({"filter_list": [{"name": "a", "filter": [{"function": "regex", "other": 1}]}]}, "unexpected keyword"),
    ],
)
def test_what_would_fail_when_answers_are_there_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    """Impossible ways to generate, and filters that cannot be made: before a model is loaded, and not as a bug."""
    with pytest.raises((DataError, SettingsError), match=says):
        load_tasks([str(write_task(tmp_path, **changes))], {}, {})


def test_examples_of_which_no_prompt_is_made_are_refused(tmp_path: Path) -> None:
    """lm-eval shows no example with several right answers, which would end the run as a bug when it is asked."""
    changes = {"doc_to_text": "{{question}}", "doc_to_target": "{{[0, 1]}}", "doc_to_choice": ["a", "b"]}
    path = write_task(tmp_path, **CHOICE | changes)
    with pytest.raises(SettingsError, match="cannot ask sums with 2 examples"):
        load_tasks([str(path)], {}, {})
    load_tasks([str(path)], {}, {}, 0)


def test_texts_for_forgetting_come_with_the_job(tmp_path: Path) -> None:
    """`forgetting` names texts of this project, or the user's own; where they lie on the disk is not recorded."""
    check_tasks(["forgetting"], {})
    tasks = load_tasks(["forgetting"], {}, {})
    (task,) = tasks.loaded["tasks"].values()
    assert len({doc["text"] for doc in task.eval_docs}) == 32
    assert dict(tasks.sources) == {"forgetting": "qlora-job, forgetting"}
    assert set(tasks.metrics()["forgetting"]) == {"bits_per_byte,none", "word_perplexity,none"}
    data = {"forgetting": write_jsonl(tmp_path / "own.jsonl", [{"text": "one"}, {"text": "two"}])}
    check_tasks(["forgetting"], data)
    own = load_tasks(["forgetting"], data, {"forgetting": "own.jsonl"})
    assert [doc["text"] for doc in own.loaded["tasks"]["forgetting"].eval_docs] == ["one", "two"]
    assert dict(own.sources) == {"forgetting": "own.jsonl"}
    assert own.fingerprints() != tasks.fingerprints()
    for rows, says in (([{"words": "one"}, {"words": "two"}], "forgetting"), ([{"text": "one"}], "one question")):
        write_jsonl(data["forgetting"], rows)
        with pytest.raises(DataError, match=says):
            load_tasks(["forgetting"], data, {"forgetting": "own.jsonl"})
    with pytest.raises(SettingsError, match="does not name that task"):
        check_tasks(["arc_easy"], data)
