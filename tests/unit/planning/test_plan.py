"""`plan` from the command line: everything is checked despite errors, and what could not be checked is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from safetensors.torch import load_file

from job.cli.main import main
from job.errors import AccessDenied, DataError, SettingsError, Unreachable
from job.planning import plan as plan_module
from job.planning.input_checks import check_run_inputs
from job.planning.plan import Plan, PreflightResult, make_plan
from job.planning.plan_settings import place_of_run
from job.planning.plan_text import as_json, as_table
from job.planning.run_shape import _placements
from job.settings.load import Settings, load_settings
from tests.helpers import alpaca_rows, arc_rows, write_jsonl
from tests.published_run import pairs, publish_run
from tests.s3_server import BUCKET, SECRET, Request, credentials, moto_server, server
from tests.toy_classifier import make_classifier

ROOT = Path(__file__).parents[3]
CHECKS = ["storage", "model", "tokenizer", "data", "questions", "licence", "disk", "shared memory"]


@pytest.fixture
def given(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with rows and questions, and settings in the environment for a run on them and the tiny model."""
    write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(40))
    write_jsonl(tmp_path / "questions.jsonl", arc_rows(12))
    for name, value in {
        "RUN__ID": "a-run",
        "RUN__OUTPUT": str(tmp_path / "runs"),
        "MODEL__ID": str(base_folder),
        "DATA__SOURCE": str(tmp_path / "rows.jsonl"),
        "DATA__ON_BAD_ROW": "error",
        "EVAL__DATA": f"arc_easy={tmp_path / 'questions.jsonl'}",
        "TRAIN__GLOBAL_BATCH_SIZE": "8",
        "TRAIN__MAX_LENGTH": "512",
    }.items():
        monkeypatch.setenv(f"JOB_{name}", value)
    with credentials():
        yield tmp_path


def states(plan: dict[str, Any]) -> dict[str, str]:
    """What each check came to."""
    return {found["name"]: found["state"] for found in plan["checks"]}


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the plan, and what is on stderr."""
    code = main(["plan", "--format=json", *words])
    output = capsys.readouterr()
    assert SECRET not in output.out + output.err
    plan: dict[str, Any] = json.loads(output.out)
    assert plan["exit_code"] == code
    return code, plan, output.err


def test_the_default_preset_without_a_network(tmp_path: Path) -> None:
    """Exit 0, soon: clear about what was not checked, with figures for everything else, and nothing left behind."""
    environ = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environ |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "JOB_LOG__FORMAT": "json"}
    environ |= {"JOB_RUN__OUTPUT": str(tmp_path / "runs"), "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "job", "plan", "--format", "json"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - began < 60
    plan = json.loads(done.stdout)
    found = states(plan)
    assert found.pop("disk") in {"ok", "note"}  # the model takes 15 GB, which a small machine has not
    assert found == {
        **dict.fromkeys(("model", "adapter", "tokenizer", "data", "questions"), "not checked"),
        **dict.fromkeys(("storage", "shared memory"), "ok"),
        "licence": "note",
    }
    whats = {found["name"]: found["what"] for found in plan["checks"]}
    assert whats["storage"].startswith(f"a new run in {tmp_path}/runs: wrote")
    licence = whats["licence"]
    assert "cc-by-nc-4.0: no commercial use" in licence
    assert licence.endswith("unknown, since the hub was not asked and its cache here has no card")
    figures = {figure["name"]: figure for figure in plan["figures"]}
    assert figures.pop("storage")["basis"] == "measured"
    assert {figure["basis"] for figure in figures.values()} == {"assumed"}
    assert (figures["optimizer steps"]["value"], figures["adapter parameters"]["value"]) == (94, 41_943_040)
    assert 6e9 < figures["peak in training"]["value"] < 8e9
    assert len(plan["gpus"]) == 8
    assert all(gpu["hours"] > 0 and gpu["usd"] > 0 for gpu in plan["gpus"] if gpu["fits"])
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf"] == []


def test_the_plan_in_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """README's block, and the sentence on the default run, are what `plan` prints without a network, but for `...`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"without a network:\n\n```\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)  # results go to `runs` here
    assert main(["plan", "--run.id", "my-first-run"]) == 0
    printed = capsys.readouterr().out
    shown = [line for line in block.splitlines() if line != "..."]
    assert len(shown) >= 7
    assert [line for line in shown if line not in printed.splitlines()] == []
    (memory,) = re.findall(r"^peak in training +(\S+ GiB)", printed, re.MULTILINE)
    (disk,) = re.findall(r"about (\S+ GiB) are needed", printed)
    (hours,) = re.findall(r"^L4 .* (0\.\d\d) +\d+\.\d\d +\d+\.\d\d +g6", printed, re.MULTILINE)
    told = re.search(
        r"needs (\S+ GiB) of GPU memory and (\S+ GiB) of disk.*?takes (\d+) minutes on an L4", readme, re.DOTALL
    )
    assert told is not None
    assert told.groups() == (memory, disk, f"{60 * float(hours):.0f}")


def test_a_run_without_a_name_is_called_a_new_one() -> None:
    """An id that was generated for the plan is not that of any run."""
    assert place_of_run(load_settings(["--run.output=out/"], {})) == "a new run in out"
    assert place_of_run(load_settings(["--run.id=mine"], {})) == "runs/mine"


def test_a_run_on_files_is_counted(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything can be looked at: all figures are computed, from the same code that will train."""
    code, plan, log_lines = planned(capsys)
    assert (code, log_lines) == (0, "")
    assert {name: state for name, state in states(plan).items() if state != "ok"} == {"licence": "note"}
    figures = {figure["name"]: figure for figure in plan["figures"]}
    assert {figure["basis"] for figure in figures.values()} == {"computed", "measured"}
    assert (figures["examples"]["value"], figures["optimizer steps"]["value"]) == (40, 10)
    assert figures["questions"]["value"] == 12
    assert all(gpu["machine"] != "your price" for gpu in plan["gpus"])
    assert not (given / "runs").exists()


def test_the_figures_are_those_of_the_run(given: Path) -> None:
    """Rows, tokens, targets and parameters are what the manifest's records will say."""
    from job.data.dataset import load_examples
    from job.model.tokenizer import load_tokenizer

    settings = load_settings(["--train.loss_on=completion"])
    plan = make_plan(settings)
    _, record = load_examples(
        settings.data.source,
        revision=None,
        split="train",
        limit=None,
        schema=None,
        on_bad_row="error",
        loss_on="completion",
        max_length=512,
        tokenizer=load_tokenizer(Path(settings.model.id)),
    )
    figures = {figure.name: figure.value for figure in plan.figures}
    assert figures["tokens"] == settings.train.epochs * record.tokens
    assert figures["target tokens"] == settings.train.epochs * record.target_tokens
    assert figures["longest example"] == record.longest


def test_both_stages_are_planned(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows of each stage are checked and counted, and so is the pass by the reference."""
    answers = [{"prompt": row["instruction"], "chosen": row["output"], "rejected": "No."} for row in alpaca_rows(24)]
    pairs = write_jsonl(given / "pairs.jsonl", answers)
    words = ["--train.method=sft,dpo", f"--data.source={pairs}", "--train.sft_epochs=3"]
    code, plan, _ = planned(capsys, *words, f"--data.sft_source={given / 'rows.jsonl'}")
    figures = {figure["name"]: figure["value"] for figure in plan["figures"]}
    assert code == 0
    assert states(plan)["first stage"] == "ok"
    assert (figures["optimizer steps, first stage"], figures["optimizer steps"]) == (15, 6)
    assert figures["reference, once"] > 0
    code, plan, _ = planned(capsys, *words, f"--data.sft_source={pairs}")
    assert (code, states(plan)["first stage"]) == (65, "wrong")


def test_a_stage_has_data_settings_of_its_own(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of fields, a limit, what becomes of long rows and target tokens: each counts for its own data."""
    own = [{"question": row["instruction"], "answer": row["output"]} for row in alpaca_rows(24)]
    pairs = [{"prompt": row["question"], "good": row["answer"], "rejected": "No."} for row in own]
    paths = [write_jsonl(given / name, rows) for name, rows in (("sft.jsonl", own), ("pairs.jsonl", pairs))]
    words = ["--train.method=sft,dpo", f"--data.sft_source={paths[0]}", f"--data.source={paths[1]}"]
    words += ["--data.sft_fields=prompt=question,completion=answer", "--data.sft_limit=12", "--data.fields=chosen=good"]
    words += ["--data.sft_on_long_row=truncate", "--train.loss_on=completion", "--data.sft_validation=2", "--show=1"]
    code, plan, _ = planned(capsys, *words)
    checks = {check["name"]: check["what"] for check in plan["checks"]}
    assert code == 0
    assert checks["first stage"].startswith("10 rows in the schema prompt_completion, 2 for validation")
    assert checks["data"].startswith("24 rows in the schema preference")
    assert [Path(row["where"]).name for row in plan["rows"]] == ["sft.jsonl:1 prompt", "pairs.jsonl:1 chosen"]


def test_what_is_wrong_is_told_with_everything_else(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad rows, a layer that there is not, bad questions: all found in one go, with the most serious exit code."""
    write_jsonl(given / "rows.jsonl", [*alpaca_rows(3), {"instruction": "x"}])
    code, plan, log_lines = planned(capsys)
    assert code == DataError.exit_code
    assert {name: state for name, state in states(plan).items() if state == "wrong"} == {"data": "wrong"}
    assert "rows.jsonl:4" in next(found["what"] for found in plan["checks"] if found["name"] == "data")
    assert json.loads(log_lines)["event"] == "DataError"
    write_jsonl(given / "questions.jsonl", arc_rows(1))
    excluded = ["--train.max_length=4096", "--lora.experts=true", "--lora.dropout=0"]
    code, plan, _ = planned(capsys, "--lora.target_modules=q_proj,no_proj", *excluded)
    assert code == SettingsError.exit_code
    wrong = {found["name"]: found["what"] for found in plan["checks"] if found["state"] == "wrong"}
    assert wrong.keys() == {"data", "adapter", "questions"}
    assert "no linear no_proj" in wrong["adapter"]
    assert "JOB_LORA__EXPERTS: is on, and" in wrong["adapter"]
    assert "JOB_TRAIN__MAX_LENGTH: 4096 is more than the model's window of 2048" in wrong["adapter"]
    assert "a comparison needs two" in wrong["questions"]


def test_all_wrong_paths_are_in_the_error(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the log and a platform are told names every one, each by its setting, as the job itself would."""
    paths = {name: f"{given}/no-{name.replace('.', '-')}" for name in ("model.id", "lora.start", "gate.baseline")}
    options = [f"--{name}={path}" for name, path in paths.items()]
    rows = [f"--data.source={given}/no.jsonl", f"--data.validation={given}/held.jsonl", "--gate.min_delta=0"]
    code, plan, log_lines = planned(capsys, *options, rows[0], rows[2])
    line = json.loads(log_lines)
    assert code == line["exit_code"] == SettingsError.exit_code
    assert {problem.partition(":")[0] for problem in line["problems"]} == {
        *("JOB_MODEL__ID", "JOB_LORA__START", "JOB_GATE__BASELINE", "JOB_DATA__SOURCE"),
    }
    assert {states(plan)[name] for name in ("model", "data", "start", "baseline")} == {"wrong"}
    write_jsonl(given / "no.jsonl", alpaca_rows(4))
    code, _, log_lines = planned(capsys, *rows)
    (problem,) = json.loads(log_lines)["problems"]
    assert problem.startswith(f"JOB_DATA__VALIDATION: {given}/held.jsonl does not exist")


@pytest.mark.parametrize(("status", "error"), [(403, AccessDenied), (None, Unreachable)])
def test_storage_that_does_not_serve_is_an_error(
    given: Path, capsys: pytest.CaptureFixture[str], status: int | None, error: type[AccessDenied | Unreachable]
) -> None:
    """Denied is 77, no answer is 69; the rest is checked all the same, and soon."""

    def answer(request: Request) -> None:
        request.refuse(status, "AccessDenied") if status else request.hang_up()

    began = time.monotonic()
    with server(answer) as url:
        code, plan, _ = planned(capsys, "--run.output=s3://bucket/runs", f"--storage.endpoint_url={url}")
    assert code == error.exit_code
    assert states(plan)["storage"] == "wrong"
    assert states(plan)["data"] == states(plan)["questions"] == "ok"
    assert plan["gpus"]
    assert time.monotonic() - began < 60


def test_everything_may_lie_on_s3(given: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Model, data, questions and output: read and checked there, weights not fetched but counted, nothing left."""
    with moto_server() as url:
        client = boto3.client("s3", endpoint_url=url)
        files = {f"model/{path.name}": path for path in base_folder.iterdir()}
        files |= {name: given / name for name in ("rows.jsonl", "questions.jsonl")}
        for key, path in files.items():
            client.upload_file(str(path), BUCKET, key)
        code, plan, _ = planned(
            capsys,
            f"--storage.endpoint_url={url}",
            f"--run.output=s3://{BUCKET}/runs",
            f"--model.id=s3://{BUCKET}/model",
            f"--data.source=s3://{BUCKET}/rows.jsonl",
            f"--eval.data=arc_easy=s3://{BUCKET}/questions.jsonl",
        )
        left = {item["Key"] for item in client.list_objects_v2(Bucket=BUCKET)["Contents"]}
        missing, other, _ = planned(capsys, f"--storage.endpoint_url={url}", f"--model.id=s3://{BUCKET}/nothing")
        client.close()
    assert code == 0
    assert left == files.keys()
    assert {name: state for name, state in states(plan).items() if state != "ok"} == {"licence": "note"}
    disk = next(figure for figure in plan["figures"] if figure["name"] == "disk")
    assert disk["value"] > (base_folder / "model.safetensors").stat().st_size + 256 * 2**20
    assert (missing, states(other)["model"], states(other)["data"]) == (2, "wrong", "note")


def test_exports_are_planned(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of every format by its own bits, and a note on a file that is larger than the hub takes."""
    for name, value in {"FORMATS": "adapter:fp16,merged,fp8,gguf:q8_0,gguf:q4_0", "HUB": "me/model"}.items():
        monkeypatch.setenv(f"JOB_EXPORT__{name}", value)
    monkeypatch.setattr("job.planning.other_input_checks.targets", lambda _: ())
    plan = make_plan(load_settings([]))
    assert not [check for check in plan.checks if check.name == "hub"]
    figures = {figure.name: figure for figure in plan.figures}
    weights = 2 * figures["base parameters"].value  # in 16 bits
    assert 3.0 * weights < figures["exported models"].value < 3.6 * weights
    assert "evaluation, 9 times" in figures  # three bases and adapters, two merges, three formats, a copy
    monkeypatch.setattr("job.planning.plan.MAX_FILE_BYTES", int(0.45 * weights))
    (check,) = [check for check in make_plan(load_settings([])).checks if check.name == "hub"]
    assert (check.state, check.what.partition(" is one file")[0]) == ("note", "gguf:q8_0")


@pytest.fixture
def finished(given: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run with the settings of `given`, in JOB_EXPORT__RUN; only where the new one is put is set as well."""
    names = ("MODEL__ID", "DATA__SOURCE", "DATA__ON_BAD_ROW", "EVAL__DATA", "TRAIN__MAX_LENGTH")
    words = [f"--{name.replace('__', '.').lower()}={os.environ[f'JOB_{name}']}" for name in names]
    for name in (*names, "TRAIN__GLOBAL_BATCH_SIZE"):
        monkeypatch.delenv(f"JOB_{name}")
    run = publish_run(given / "runs" / "finished", {"arc_easy": pairs(12)}, settings=words)
    monkeypatch.setenv("JOB_EXPORT__RUN", str(run))
    monkeypatch.setenv("JOB_EXPORT__FORMATS", "merged,gguf:q8_0")
    return run


def test_the_export_of_a_finished_run_is_planned(
    finished: Path, given: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its settings are taken; nothing that was done is counted, and nothing is left behind."""
    code, plan, _ = planned(capsys)
    whats = {check["name"]: check["what"] for check in plan["checks"]}
    figures = {figure["name"]: figure for figure in plan["figures"]}
    weights = json.loads((finished / "results.json").read_text())["artifacts"]
    (sha256,) = (one["sha256"] for one in weights if one["path"] == "artifacts/adapter/adapter_model.safetensors")
    assert code == 0
    assert whats["exported run"] == f"run finished, whose adapter_model.safetensors has the SHA-256 {sha256[:12]}..."
    assert whats["training"] == f"JOB_EXPORT__RUN: {finished} is taken over; nothing is trained"
    assert states(plan) == {**dict.fromkeys(states(plan), "ok"), "licence": "note", "training": "note"}
    assert {"questions", "evaluation, 3 times", "merging", "exported models"} <= figures.keys()
    assert not figures.keys() & {"examples", "tokens", "training", "peak in training", "checkpoint"}
    assert not any(word in line for line in plan["assumptions"] for word in ("checkpoint", "CUDA graphs"))
    assert all(gpu["hours"] > 0 for gpu in plan["gpus"])
    assert not (given / "runs" / "a-run").exists()
    assert main(["plan"]) == 0
    table = capsys.readouterr().out
    assert "largest budget" not in table
    assert "hours, which include the evaluation of each exported format" in table


def test_what_is_wrong_with_the_run_to_export_is_a_check(
    finished: Path, given: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own line, and one error with all else: settings differ, it is missing or damaged."""

    def problems(*words: str) -> set[str]:
        code, plan, log_lines = planned(capsys, f"--sign.key={given / 'no.pem'}", *words)
        assert code == SettingsError.exit_code
        assert states(plan)["exported run"] == states(plan)["signature"] == "wrong"
        assert "training" not in states(plan)
        return {problem.partition(";")[0] for problem in json.loads(log_lines)["problems"]}

    key = f"JOB_SIGN__KEY: {given / 'no.pem'} cannot be read: No such file or directory"
    assert problems("--lora.rank=4", "--train.epochs=7") == {
        *("JOB_LORA__RANK: is 4, but 16 in the run that is exported", key),
        "JOB_TRAIN__EPOCHS: is 7, but 2 in the run that is exported",
    }
    missing = f"JOB_EXPORT__RUN: {given}/no-run: is not a run: it does not exist, or is empty"
    assert problems(f"--export.run={given}/no-run") == {missing, key}
    (finished / "results.json").write_text("{}")
    assert main(["plan"]) == DataError.exit_code
    text = capsys.readouterr().out
    assert f"JOB_EXPORT__RUN: {finished}/results.json: does not match the schema" in " ".join(text.split())
    assert text.endswith("No forecast: the run in JOB_EXPORT__RUN cannot be taken over.\n")


def test_the_classifier_and_the_judge_are_planned(
    given: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many texts they read, of how many tokens; only those of a local judge take time of the GPU."""
    (given / "rules.txt").write_text("Be kind.")
    write_jsonl(given / "prompts.jsonl", [{"prompt": "One?"}, {"prompt": "Two?"}])
    words = [
        f"--data.safety_model={make_classifier(given / 'classifier')}",
        f"--eval.prompts={given / 'prompts.jsonl'}",
        f"--eval.principles={given / 'rules.txt'}",
    ]
    for judge, told in ((str(base_folder), False), ("https://judge.example", True)):
        code, plan, _ = planned(capsys, *words, f"--eval.judge={judge}", *["--eval.judge_model=it"] * told)
        assert code == 0, plan
        figures = {figure["name"]: figure for figure in plan["figures"]}
        assert (figures["safety screen, texts"]["value"], figures["judge, texts"]["value"]) == (40 + 4, 4)
        assert figures["judge, tokens"]["value"] > 4 * 2 * 128
        assert ("server's time is not in the hours" in figures["judge, tokens"]["note"]) == told
        assert ("judge" in figures) != told
    weights = sum(one.numel() for one in load_file(given / "classifier/model.safetensors").values()) - 15 * 8
    each = figures["safety screen"]["value"] / figures["safety screen, tokens"]["value"]
    assert 2 * weights <= each < 2 * weights + 2000, "its file has a header, too"
    assert any(line.startswith("safety screen, judge: 18%") for line in plan["assumptions"])


def test_the_users_price_is_taken(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the table says: who gives a price knows it, and the plan says that it was given."""
    _, plan, _ = planned(capsys, "--cost.usd_per_hour=0.25")
    assert {(gpu["usd_per_hour"], gpu["machine"]) for gpu in plan["gpus"]} == {(0.25, "your price")}
    assert all(gpu["usd"] == pytest.approx(0.25 * gpu["hours"]) for gpu in plan["gpus"] if gpu["fits"])
    assert any("0.25 USD an hour, as set" in line for line in plan["assumptions"])


def test_fp8_is_forecast(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPUs without it do not fit; what the hours of the others rest on is said."""
    _, plan, _ = planned(capsys, "--train.compute=fp8")
    assert {gpu["name"] for gpu in plan["gpus"] if "JOB_TRAIN__COMPUTE=fp8" in gpu["note"]} == {
        *("T4", "A10G", "A100 40GB", "A100 80GB")
    }
    assert any("JOB_TRAIN__COMPUTE=fp8" in line for line in plan["assumptions"])


def test_a_gpu_is_no_larger_than_the_job_may_use(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the memory makes every larger GPU one of that size."""
    _, plan, _ = planned(capsys, "--train.gpu_memory_gb=20")
    sizes = {gpu["name"]: gpu["memory_bytes"] for gpu in plan["gpus"]}
    assert max(sizes.values()) == sizes["H200"] == 20e9
    assert sizes["T4"] < 20e9


def test_the_table_is_for_a_person(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure with what it rests on, every GPU in a line, columns in line, nothing too wide."""
    assert main(["plan"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(len(line) for line in lines if "/" not in line) <= 120  # a path is not folded
    for name in CHECKS:
        assert re.search(rf"^{name} +(ok|note)  ", text, re.MULTILINE), name
    plan = make_plan(load_settings())
    for figure in plan.figures:
        assert re.search(rf"^{re.escape(figure.name)} .*  {figure.basis}\b", text, re.MULTILINE), figure.name
    head = next(index for index, line in enumerate(lines) if line.startswith("GPU "))
    rows = lines[head + 1 : head + 9]
    assert [row.split("  ")[0] for row in rows] == [gpu.name for gpu in plan.gpus]
    at = lines[head].index("machine")
    assert all(row[at - 2 : at] == "  " and row[at] != " " for row in rows)
    assert "cheapest: " in text


def test_no_forecast_is_printed_for_wrong_data(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error is what counts, and the fields of its rows are in the setting that it names."""
    write_jsonl(given / "rows.jsonl", [{"Question": "a", "answer": "b"}] * 3)
    assert main(["plan"]) == DataError.exit_code
    text = capsys.readouterr().out
    assert "JOB_DATA__FIELDS=prompt=Question,completion=answer" in text
    assert text.endswith("No forecast: the data cannot be used.\n")
    assert "GPU " not in text


def test_why_hours_are_missing_is_said(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In fp32 no GPU's speed is known."""
    for dtype, missing in (("fp32", True), ("bf16", False)):
        assert main(["plan", f"--model.dtype={dtype}"]) == 0
        assert ("hours and USD: only for" in capsys.readouterr().out) is missing


def test_where_nothing_is_known_nothing_is_made_up() -> None:
    """A plan without a model and without data says so, in both forms; the most serious error is the plan's."""
    wrong = (
        PreflightResult("storage", "wrong", "no", Unreachable("no")),
        PreflightResult("questions", "wrong", "bad", DataError([])),
        PreflightResult("model", "not checked", "silence"),
    )
    plan = Plan("x on y", wrong, (), (), None, ("nothing",))
    assert isinstance(plan.error, DataError)
    assert "No figures for GPUs" in as_table(plan)
    assert json.loads(as_json(plan))["exit_code"] == 65
    assert Plan("x", wrong[2:], (), (), None, ()).error is None


def test_an_unknown_format_is_a_settings_error(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It names the known ones; so is a format that was forgotten."""
    for words in (["--format", "xml"], ["--format"], ["--format="]):
        assert main(["plan", *words]) == SettingsError.exit_code
        assert "must be table or json" in capsys.readouterr().err


def test_a_base_is_sharded_within_a_machine_only() -> None:
    """As the run chooses by itself: over a network, layers come slower than from main memory."""
    nodes = ["--run.nodes=2", "--run.rendezvous=there:29500", "--run.id=one"]
    assert _placements(load_settings([], {}), 2) == ("gpu", "sharded", "host")
    assert _placements(load_settings([], {}), 1) == ("gpu", "host")
    assert _placements(load_settings(nodes, {}), 2) == ("gpu", "host")


@pytest.mark.parametrize(("visible", "counted"), [(4, 4), (1, None)])
def test_a_sharded_base_is_forecast_for_the_processes_of_the_run(
    given: Path, monkeypatch: pytest.MonkeyPatch, visible: int, counted: int | None
) -> None:
    """With `auto` those that a run here would have; one process alone is refused, with the setting that gives more."""
    monkeypatch.setattr(plan_module, "count_processes", lambda _: visible)
    plan = make_plan(load_settings(["--model.placement=sharded"]))
    wrong = [found.what for found in plan.checks if found.name == "placement"]
    if counted is None:
        assert "is sharded, but the run has one process; start several, each with its GPU" in wrong[0]
        assert isinstance(plan.error, SettingsError)
        assert not plan.gpus
    else:
        assert not wrong
        assert all(f"the base's 4-bit weights are sharded over the {counted} GPUs" in gpu.note for gpu in plan.gpus)
        assert {gpu.gpus for gpu in plan.gpus} == {counted}
        assert any("2026-11-30-2xh200-processes.jsonl" in line for line in plan.assumptions)
        assert f"{counted} x H100 " in as_table(plan)


def test_a_base_in_main_memory_is_counted_for_every_process(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forecast of each GPU, and as a note where this machine or its container has less."""
    monkeypatch.setattr(plan_module, "count_processes", lambda _: 4)
    for free, state in ((1 << 50, "ok"), (1000, "note")):
        monkeypatch.setattr(plan_module, "available_bytes", lambda free=free: free)
        plan = make_plan(load_settings(["--model.placement=host"]))
        (check,) = [found for found in plan.checks if found.name == "main memory"]
        assert check.state == state
        assert "for each of 4 processes" in check.what
        assert all("for each of 4 processes" in gpu.note for gpu in plan.gpus)


@pytest.mark.parametrize("there", [True, False])
def test_downloads_go_to_the_cache(
    given: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, there: bool
) -> None:
    """In a pod the system's folder for temporary files is small. A machine that lacks the cache's disk uses it."""
    cache, folders = tmp_path / "disk", []
    if there:
        cache.mkdir()

    def check(settings: Settings, folder: Path, *others: Any) -> Any:
        folders.append(folder)
        return check_run_inputs(settings, folder, *others)

    monkeypatch.setattr(plan_module, "check_run_inputs", check)
    make_plan(load_settings([f"--storage.cache={cache}"]))
    assert (folders[0].parent == cache) is there
    assert not folders[0].exists()


def test_nothing_is_written_to_the_folder_for_temporary_files(
    given: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a cache, not even the 8 MiB that the store's check uploads: /tmp of a pod may be memory, or not writable."""
    monkeypatch.setenv("JOB_STORAGE__CACHE", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no-such-folder"))
    checks = {check.name: check for check in make_plan(load_settings([])).checks}
    assert checks["storage"].state == "ok"


@pytest.fixture
def on_the_hub(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of a model of the hub whose small files can be fetched; it has its weights as pickles, too."""
    fetched = Path(shutil.copytree(base_folder, tmp_path / "fetched"))
    sizes = {file.name: file.stat().st_size for file in fetched.iterdir()}
    (fetched / "model.safetensors").unlink()
    (fetched / "weights.gguf").write_bytes(b"which another program fetched")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "pytorch_model-00001-of-00001.bin"}}
    (fetched / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    monkeypatch.setattr("job.planning.input_checks.is_reachable", lambda: True)
    monkeypatch.setattr("job.planning.preflight_models.peek_model", lambda *_: (fetched, sizes))
    monkeypatch.setenv("JOB_MODEL__ID", "some/model")
    monkeypatch.setenv("JOB_MODEL__REVISION", "main")
    return "some/model"


@pytest.mark.usefixtures("given", "on_the_hub")
def test_gguf_is_checked_by_the_small_files_of_a_base_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By those that the converter reads: an index of weights that are not there would stop it."""
    asked: list[set[str]] = []
    gguf = SimpleNamespace(
        check=lambda *_: "",
        check_files=lambda folder, _: asked.append({one.name for one in folder.iterdir()}) or "of its tokenizer",
        cannot_score=lambda _: "",
    )
    monkeypatch.setattr("job.export.model_checks.derived_format", lambda name: (gguf, name))
    code, plan, _ = planned(capsys, "--export.formats=gguf:q8_0")
    (check,) = [check for check in plan["checks"] if check["name"] == "gguf"]
    assert (code, check["state"]) == (2, "wrong")
    assert check["what"] == "JOB_EXPORT__FORMATS: gguf:q8_0 cannot be made: of its tokenizer; remove it"
    (names,) = asked
    assert {"config.json", "tokenizer.json"} <= names
    assert not [name for name in names if "index" in name or name.endswith((".gguf", ".safetensors"))]
    monkeypatch.setattr("job.planning.input_checks.not_installed", lambda _: ["xllamacpp"])
    code, plan, _ = planned(capsys, "--export.formats=gguf:q8_0")
    assert (code, states(plan)["gguf"], len(asked)) == (0, "not checked", 1)


@pytest.mark.long
@pytest.mark.usefixtures("given", "on_the_hub")
def test_gguf_of_a_base_on_the_hub_can_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    """The converter needs no weights to try the vocabulary."""
    code, plan, _ = planned(capsys, "--export.formats=gguf:q8_0")
    assert (code, states(plan)["gguf"]) == (0, "ok")


PROMPTS_OF_ROWS = ("--data.validation=4", "--eval.prompts=3")


@pytest.mark.parametrize("sources", [("texts",), ("texts", "more")])
def test_texts_have_no_prompts(given: Path, capsys: pytest.CaptureFixture[str], sources: tuple[str, ...]) -> None:
    """A number of validation rows of plain text ends the job, so it ends the plan, with the fix."""
    for name in sources:
        write_jsonl(given / f"{name}.jsonl", [{"text": f"{name}: the sky is blue on day {day}."} for day in range(20)])
    words = f"--data.source={','.join(str(given / f'{name}.jsonl') for name in sources)}"
    code, plan, log_lines = planned(capsys, *PROMPTS_OF_ROWS, words)
    assert (code, states(plan)["data"], states(plan)["prompts"]) == (65, "ok", "wrong")
    assert "JOB_EVAL__PROMPTS: is a number of validation rows, and rows of the schema text have no prompts" in log_lines


def test_prompts_of_validation_rows_are_counted(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as there are; of data that cannot be read, nothing is known."""

    def check(*words: str) -> tuple[str, str]:
        _, plan, _ = planned(capsys, *PROMPTS_OF_ROWS, *words)
        (prompts,) = [check for check in plan["checks"] if check["name"] == "prompts"]
        return prompts["state"], prompts["what"]

    assert check() == ("ok", "3 of the 4 rows for validation")
    assert check("--eval.prompts=5") == ("note", "5 of the rows for validation, of which there are only 4")
    assert check(f"--data.source={given / 'none.jsonl'}")[0] == "not checked"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--train.learning_rate=0.1", []),
        ("--train.learning_rate=1e9", ["JOB_TRAIN__LEARNING_RATE: 1e+09"]),
        (
            "--train.method=sft,dpo --data.sft_source=a.jsonl --train.learning_rate=2 --train.sft_learning_rate=3",
            ["JOB_TRAIN__SFT_LEARNING_RATE: 3", "JOB_TRAIN__LEARNING_RATE: 2"],
        ),
        ("--export.run=runs/x --export.formats=merged --train.learning_rate=2", []),
    ],
)
def test_a_learning_rate_that_is_likely_a_typo_is_noted(words: str, named: list[str]) -> None:
    """Of each training stage; it is no error."""
    settings = load_settings(["--preset=demo", *words.split()], {})
    notes = list(plan_module._learning_rates(settings))
    assert [note.what.partition(" is likely")[0] for note in notes] == named
    assert all((note.state, note.error) == ("note", None) for note in notes)
