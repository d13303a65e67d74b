"""Mistakes in commands: the exit code, what is wrong and the fix; never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.cli.main import main
from job.common.hashing import sealed, unsealed
from tests.published_run import pairs, publish_run

DAMAGED = "; copy it again, or start its run again, which repairs it"
NEWER = "is a manifest of version 2.0; this job reads version 1.0; use the newest version of qlora-job"
NO_RUN = "is a file, but neither results.json nor a pointer that `promote` wrote; give the folder of a run"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, `good`, and what may be typed in place of one."""
    folder = tmp_path_factory.mktemp("typed")
    publish_run(folder / "good", {"quiz": pairs(20, improved=4)})
    facts = unsealed((folder / "good/results.json").read_bytes())
    made = {
        "newer": sealed({**facts, "schema_version": "2.0"}),
        "later": sealed({**facts, "novel": 1}),
        "text": b"no JSON",
        "empty": b"",
        "list": b"[]",
    }
    for name, data in made.items():
        (folder / name).mkdir()
        (folder / name / "results.json").write_bytes(data)
    (folder / "folder").mkdir()
    (folder / "file.json").write_bytes(b"no JSON")
    (folder / "file.dat").write_bytes(b"")
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("JOB_LOG__FORMAT", "json")


@pytest.mark.parametrize(
    ("typed", "code", "problem"),
    [
        ("export", 2, "export: the finished run and the formats are missing; give them"),
        ("export good", 2, "export: the formats are missing; give them"),
        ("export good --run.id x merged", 2, "export: the formats are missing; give them before the options"),
        ("export --run.id=x good merged", 2, "export: the finished run and the formats are missing; give them before"),
        ("export good merged fp8", 2, "separate the formats by commas, without spaces"),
        ("export merged,fp8 good", 2, "export: merged,fp8 is a format; give the finished run first, then the formats"),
        ("report newer", 4, f"results.json: {NEWER}"),
        ("compare good newer", 4, f"results.json: {NEWER}"),
        ("verify newer", 4, f"found {NEWER}"),
        (
            "report later",
            4,
            "('novel' was unexpected); use the newest version of qlora-job, in case",
        ),
        ("report text", 4, f"is damaged: no JSON (expected ident at line 1 column 2){DAMAGED}"),
        ("report empty", 4, f"results.json: is empty{DAMAGED}"),
        ("report list", 4, "results.json: does not match the schema: [] is not of type 'object'"),
        ("report file.json", 2, f"file.json: {NO_RUN}"),
        ("verify file.dat", 2, f"file.dat: {NO_RUN}"),
        ("status file.json", 2, "file.json: is a file; give the folder of a run, or the results.json in it"),
        ("status s3:/bucket/run", 2, "s3:/bucket/run: has one slash after the colon; write s3://bucket/run"),
        ("verify s3://", 2, "s3://: has no valid bucket name; write s3://bucket/prefix"),
        ("status s3://", 2, "s3://: has no valid bucket name; write s3://bucket/prefix"),
        ("status", 2, "RUN: is missing; give the path or URI of a run, such as runs/my-first-run or s3://bucket/"),
        ("report --output x.html", 2, "RUN: is missing; give"),
        ("compare good", 2, "B: is missing; give the path or URI of a run"),
        ("verify good more", 2, "more: is one argument too many: the command takes RUN only; remove it"),
        ("compare good good more", 2, "more: is one argument too many: the command takes A and B only; remove it"),
        ("compare --history", 2, "--history: needs runs, or folders of runs; give their paths or URIs"),
        ("promote good --rollback --to p", 2, "good: is one argument too many: --rollback takes no run; remove it"),
        ("promote good", 2, "--to: is missing; give the path or URI of the pointer, a small file, such as s3://"),
        ("status good --json", 2, "--json: is unknown; write --format json"),
        ("push good --fast", 2, "--fast: is unknown; see the command's --help"),
        ("verify good --key", 2, "--key: needs a value: --key FILE"),
        ("verify good --format", 2, "--format: needs a value: --format {table,json}"),
        ("verify none", 2, "/none: is not a run: it does not exist, or is empty; give the folder of a run, or the"),
        ("status s3:bucket/run", 2, "has no slashes after the colon; write s3://bucket/run, or ./ before a path"),
        ("config --run.output gs//bucket", 2, "JOB_RUN__OUTPUT (command line): has no colon; write gs://bucket"),
        ("verify -key good", 2, "-key: is unknown; the nearest is --key"),
        ("report good --output folder", 2, "--output folder: is a folder; name a file, such as folder/report.html"),
        ("compare --history good --output folder", 2, "--output folder: is a folder; name a file"),
        ("compare good good --policy none", 2, "--policy (none): cannot be read: No such file or directory"),
        ("verify good --storage.cache file.dat", 2, "JOB_STORAGE__CACHE: cannot make the folder file.dat"),
        (
            "config --run.output ftp://host/x",
            2,
            "use s3://bucket/key, gs://bucket/key, az://bucket/key, a path, or for",
        ),
        ("config --config none.yaml", 2, "JOB_CONFIG (command line): the file none.yaml cannot be read: No such file"),
        ("config --config job.json", 2, "must name a .yaml, .yml or .toml file, not job.json"),
        ("job.yaml", 2, "job.yaml: is not a command; give a settings file as --config job.yaml; commands are"),
        ("config --schema --foo", 2, "--schema: prints the schema of all settings; remove the other arguments"),
    ],
)
def test_what_is_wrong_is_named_with_the_fix(
    capsys: pytest.CaptureFixture[str], typed: str, code: int, problem: str
) -> None:
    """One line of the log has it, and nothing is a bug."""
    assert main(typed.split()) == code
    line = json.loads(capsys.readouterr().err)
    assert line["exit_code"] == code
    assert problem in line["problems"][0]


def test_the_version_is_asked_for_as_a_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Its nearest command would be `verify`."""
    assert main(["version"]) == main(["--version"]) == 0
    assert len(set(capsys.readouterr().out.splitlines())) == 1


def test_help_of_a_command_in_either_order(capsys: pytest.CaptureFixture[str]) -> None:
    """`help status` is `status --help`; what is no command gets the list of commands behind a line that says so."""
    said = []
    for words in (["status", "--help"], ["help", "status"], ["--help", "status"], ["help", "me"], ["help"]):
        assert main(words) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    assert said[3].partition("\n\n")[2] == said[4] != said[0]
