"""What is checked about the inputs before a run begins: all errors are reported together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.errors import DataError, Problem, SettingsError
from job.settings.load import Settings, load_settings
from job.settings.training_stages import split_stages
from job.stages import inputs
from job.stages.inputs import check_inputs


def settings(*words: str) -> Settings:
    """Those of the demo with some changes."""
    return load_settings(["--preset=demo", *words], {})


@pytest.fixture(autouse=True)
def no_tasks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Tasks are not looked up, which would read lm-eval's index; what they were asked for is kept."""
    asked: list[Any] = []
    monkeypatch.setattr(inputs, "check_tasks", lambda *names: asked.append(names))
    return asked


def test_every_wrong_path_is_told_with_its_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, data, adapter, questions, prompts, baseline, tasks and more in one error, with the first kind's code."""

    def refuse(*_: Any) -> None:
        raise SettingsError([Problem("JOB_EVAL__TASKS", "unknown")])

    (tmp_path / "empty").mkdir()
    wrong = {
        "JOB_MODEL__ID": f"{tmp_path}/model",
        "JOB_DATA__SOURCE": f"{tmp_path}/rows.jsonl",
        "JOB_DATA__VALIDATION": f"{tmp_path}/held.jsonl",
        "JOB_EVAL__DATA": f"{tmp_path}/questions.jsonl",
        "JOB_EVAL__PROMPTS": f"{tmp_path}/prompts.txt",
        "JOB_LORA__START": f"{tmp_path}/adapter",
        "JOB_GATE__BASELINE": f"{tmp_path}/earlier",
    }
    words = [
        f"--model.id={tmp_path}/model",
        f"--data.source={tmp_path}/rows.jsonl",
        f"--data.validation={tmp_path}/held.jsonl",
        f"--eval.data=arc_easy={tmp_path}/questions.jsonl",
        f"--eval.prompts={tmp_path}/prompts.txt",
        f"--lora.start={tmp_path}/adapter",
        f"--gate.baseline={tmp_path}/earlier",
        "--gate.min_delta=0",
    ]
    with pytest.raises(SettingsError) as caught:
        check_inputs(settings(*words))
    assert {(problem.where, problem.what.split()[0].rstrip(":")) for problem in caught.value.problems} == set(
        wrong.items()
    )
    monkeypatch.setattr(inputs, "check_tasks", refuse)
    with pytest.raises(SettingsError) as caught:
        check_inputs(settings(*words))
    assert "JOB_EVAL__TASKS" in {problem.where for problem in caught.value.problems}
    assert caught.value.total == len(wrong) + 1
    with pytest.raises(SettingsError, match=r"JOB_MODEL__ID: .*/empty has no weights in safetensors"):
        check_inputs(settings(f"--model.id={tmp_path}/empty"))


def test_a_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name alone looks like a hub id, which would be asked for until the hub answers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"JOB_MODEL__ID: model.safetensors is not a folder; give the folder of a model"
    ):
        check_inputs(settings("--model.id=model.safetensors"))


def test_a_later_attempt_needs_no_model(tmp_path: Path, no_tasks: list[Any]) -> None:
    """The quantized base may be in a cache, and the tasks were found before; data is read in every attempt."""
    gone = settings(f"--model.id={tmp_path}/gone")
    check_inputs(gone, has_record=True)
    assert no_tasks == []
    with pytest.raises(DataError, match=r"JOB_MODEL__ID: .* does not exist"):
        check_inputs(gone)
    assert no_tasks == [(("arc_easy",), gone.eval.data)]
    with pytest.raises(DataError, match=r"JOB_DATA__SOURCE: .* does not exist"):
        check_inputs(settings(f"--data.source={tmp_path}/gone.jsonl"), has_record=True)


def test_both_stages_data_is_looked_at(tmp_path: Path) -> None:
    """Of `sft,dpo` each stage's rows are named by their own setting."""
    both = settings(
        "--train.method=sft,dpo", f"--data.source={tmp_path}/two.jsonl", f"--data.sft_source={tmp_path}/one.jsonl"
    )
    first, second = split_stages(both)
    with pytest.raises(DataError) as caught:
        check_inputs(first, (second,))
    assert [str(problem).split(" does")[0] for problem in caught.value.problems] == [
        f"JOB_DATA__SFT_SOURCE: {tmp_path}/one.jsonl",
        f"JOB_DATA__SOURCE: {tmp_path}/two.jsonl",
    ]


def test_the_last_stages_own_inputs_are_looked_at_before_the_first_trains(tmp_path: Path) -> None:
    """Prompts, rules, gate: the first stage of two has none of them, and training it takes hours."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    words = [
        f"--data.source={rows}",
        f"--data.sft_source={rows}",
        f"--eval.prompts={tmp_path}/prompts.txt",
        f"--eval.principles={tmp_path}/rules.txt",
        "--eval.judge=org/judge",
        f"--gate.baseline={tmp_path}/earlier",
        "--gate.min_delta=0",
    ]
    first, second = split_stages(settings("--train.method=sft,dpo", *words))
    with pytest.raises(SettingsError) as caught:
        check_inputs(first, (second,))
    places = {problem.where.split(" ")[0] for problem in caught.value.problems}
    assert places == {"JOB_EVAL__PROMPTS", "JOB_EVAL__PRINCIPLES", "JOB_GATE__BASELINE"}
    policy = [*words[:2], f"--gate.policy={tmp_path}/policy.yaml"]
    first, second = split_stages(settings("--train.method=sft,dpo", *policy))
    with pytest.raises(SettingsError, match="JOB_GATE__POLICY"):
        check_inputs(first, (second,))


def test_one_process_shares_no_base(tmp_path: Path) -> None:
    """With `auto`, the number of processes is known when the job starts: told with all that is wrong then."""
    sharded = ("--model.placement=sharded", "--model.quantization=nf4")
    with pytest.raises(SettingsError) as caught:
        check_inputs(settings(*sharded, f"--data.source={tmp_path}/gone.jsonl"), processes=1)
    assert [problem.where for problem in caught.value.problems] == ["JOB_DATA__SOURCE", "JOB_MODEL__PLACEMENT"]
    for count in (2, None):
        check_inputs(settings(*sharded), processes=count)


def test_what_lies_in_a_store_is_not_asked_for() -> None:
    """Nothing is fetched: URIs are left to the pull, and a name of the hub to the hub."""
    remote = (
        "--model.id=org/model",
        "--data.source=s3://bucket/rows.jsonl",
        "--eval.data=arc_easy=s3://bucket/q.jsonl",
    )
    check_inputs(settings(*remote, "--lora.start=s3://bucket/adapter"))
    with pytest.raises(SettingsError, match="rows is taken for one, since the path does not exist here"):
        check_inputs(settings("--data.source=rows"))


def test_an_extra_that_is_not_installed_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages of a format are asked for before a GPU works for hours; the extra that has them is named."""
    monkeypatch.setattr("job.common.export_formats.find_spec", lambda _name: None)
    with pytest.raises(SettingsError, match=r"JOB_EXPORT__FORMATS: needs auto_round, .*pip install '.\[export\]'"):
        check_inputs(settings("--export.formats=merged,awq"))
    check_inputs(settings("--export.formats=merged"))
