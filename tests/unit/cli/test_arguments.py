"""The table of commands, and the help texts made from it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from job.cli.arguments import COMMANDS
from job.cli.help_text import command_help, usage
from job.cli.main import function_of, main
from job.errors import environment_name
from job.settings.schema import NAMES, READING

ROOT = Path(__file__).parents[3]


def job(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a bare environment."""
    return subprocess.run(
        [sys.executable, "-m", "job", *words],
        env={"PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_command_has_a_function_and_a_description() -> None:
    """Each command of the table has a file with its function, and is in the usage."""
    assert all(callable(function_of(command)) for command in COMMANDS)
    assert all(command.summary in usage() for command in COMMANDS.values())


@pytest.mark.parametrize("word", ["--help", "-h"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 0, the command's own arguments and the settings that it takes: described with `all`, or if they are few."""
    assert main([command, word]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.startswith(f"usage: qlora-job {command}")
    assert all(argument.name in shown.out for argument in COMMANDS[command].arguments)
    taken = {"all": set(NAMES), "reading": READING, "none": set()}[COMMANDS[command].settings]
    if COMMANDS[command].settings == "all":
        listed = set(NAMES) - {"fault"}  # which is for tests only
        assert {n for n in listed if re.search(rf"\b{n.partition('.')[2] or n}\b", shown.out)} == listed
        assert main([command, word, "all"]) == 0
        shown = capsys.readouterr()
    # Lines are wrapped, so that the variable may stand on the next one.
    assert {name for name in NAMES if f"--{name} " in shown.out} == taken
    assert {name for name in NAMES if f"{environment_name(name)}]" in shown.out} == taken


def test_help_of_export_says_where_the_result_is(capsys: pytest.CaptureFixture[str]) -> None:
    """The defaults of its many settings do not hold there."""
    assert main(["export", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "a new run beside it, <id of RUN>-<formats>" in shown
    assert "are those of RUN, not the defaults" in shown


def test_help_is_asked_for_anywhere() -> None:
    """After other words, without a command, and whatever else is wrong."""
    done = job("--train.epochs=0", "--help", JOB_TYPO="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: qlora-job run")


@pytest.mark.parametrize(
    ("words", "described"),
    [
        ("run --help train.epochs", {"train.epochs"}),
        ("run --help --train.epochs=2 -1", {"train.epochs"}),
        ("help run JOB_TRAIN__EPOCHS", {"train.epochs"}),
        ("plan -h preset", {"preset"}),
        ("export --help sign log", {name for name in NAMES if name.startswith(("sign.", "log."))}),
        ("config --help warmup", {"train.warmup_steps", "train.warmup_ratio"}),
        ("run --help train", {name for name in NAMES if name.startswith("train.")}),
        ("--help train", {name for name in NAMES if name.startswith("train.")}),
        ("help --train.epochs=2", {"train.epochs"}),
    ],
)
def test_help_of_settings(words: str, described: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    """One setting, a group, or those that have a word in their names; and nothing else."""
    assert main(words.split()) == 0
    shown = capsys.readouterr().out
    assert {name for name in NAMES if f"--{name} " in shown} == described
    assert "usage" not in shown


OF_COMMAND = "The words after --help are in no setting's name"
OF_ALL = "The words after --help are no command, and in no setting's name"


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("run --help --judge.key=sk-mistyped", f"{OF_COMMAND}; similar: eval.judge_key, sign.key, storage.kms_key_id."),
        ("plan -h zzz", f"{OF_COMMAND}."),
        ("export --help warmpu", f"{OF_COMMAND}; similar: train.warmup_steps, train.warmup_ratio."),
        ("--help zzz", f"{OF_ALL}."),
        ("--help lr", f"{OF_ALL}; similar: train.learning_rate, train.min_lr_ratio."),
        ("--help modle", f"{OF_ALL}; similar: the group model, lora.target_modules, lora.modules_to_save."),
        ("--help verfy", f"{OF_ALL}; similar: the command verify."),
        ("help me", OF_ALL.replace("--help", "help") + "."),
    ],
)
def test_help_of_no_setting(words: str, first: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said with similar names, and all follows. No word is repeated: the value of a setting may be a secret."""
    assert main(words.split()) == 0
    line, empty, usage_line, *_ = capsys.readouterr().out.splitlines()
    assert (line, empty) == (first, "")
    assert usage_line.startswith("usage: qlora-job ")


@pytest.mark.parametrize(
    ("word", "group"), [("training", "train"), ("checkpointing", "checkpoint"), ("train", ""), ("rank", "")]
)
def test_help_of_a_word_like_a_group(word: str, group: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The group is named before the settings with the word in their names."""
    assert main(["run", "--help", word]) == 0
    first = capsys.readouterr().out.partition("\n")[0]
    assert (first == f"`--help {group}` describes the group {group}.") == bool(group)


def test_help_shows_documentation_and_default() -> None:
    """They are the field's own."""
    shown = " ".join(command_help("run", ["all"]).split())
    assert (
        "--train.warmup_steps N Number of optimizer steps in which the learning rate rises to its peak. (default: 5)"
        in shown
    )


def test_help_names_no_type_of_python() -> None:
    """Types and defaults are in words of a shell: lists, maps, flags and what is empty."""
    shown = " ".join(command_help("run", ["all"]).split())
    for python in ("factory", "tuple[", "Mapping[", " int ", " float ", " str ", " bool ", "None)", "True)", "('"):
        assert python not in shown, python
    assert "--eval.tasks NAME,NAME,..." in shown
    assert "--eval.data NAME=TEXT,..." in shown
    assert "--train.method {sft|dpo|kto|orpo|sft,dpo|sft,kto|sft,orpo}" in shown
    assert "--model.double_quantization {true,false}" in shown


def test_a_command_has_options_of_its_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped option of the command is answered with that option, not with a setting."""
    monkeypatch.setenv("JOB_LOG__FORMAT", "json")
    cases = ((["config", "--shema"], "--schema"), (["selftest", "x"], "takes no arguments"))
    for words, near in cases:
        assert main(words) == 2
        assert near in json.loads(capsys.readouterr().err)["problems"][0]


def test_variables_of_a_ci_server_are_one_note() -> None:
    """Jenkins' variables do not stop a job; a misspelt setting beside them does."""
    jenkins = {"JOB_NAME": "nightly", "JOB_URL": "http://ci/job/nightly", "JOB_LOG__FORMAT": "json"}
    done = job("config", **jenkins)
    assert done.returncode == 0
    [line] = done.stderr.splitlines()
    assert '"JOB_NAME", "JOB_URL"' in line
    assert "nightly" not in line
    assert job("config", **jenkins, JOB_TYPO="1").returncode == 2


def test_a_mistyped_command_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A first word that is no command is one that was mistyped: the nearest is named, and all of them."""
    monkeypatch.setenv("JOB_LOG__FORMAT", "json")
    assert main(["verfy", "runs/x"]) == 2
    line = json.loads(capsys.readouterr().err)
    assert line["problems"][0].startswith("verfy: is not a command; the nearest is verify; commands are run, plan, ")


def test_a_person_reads_one_problem_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal; in JSON they are a list."""
    monkeypatch.setenv("JOB_LOG__FORMAT", "console")
    assert main(["run", "--train.epoch", "3", "--lora.rnk", "3"]) == 2
    first, *problems = capsys.readouterr().err.splitlines()
    assert "SettingsError" in first
    assert [line.partition(":")[0] for line in problems] == [
        "  command line --train.epoch",
        "  command line --lora.rnk",
    ]
