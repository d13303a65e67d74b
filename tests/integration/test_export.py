"""Whole runs that export a merged model: scored as published, killed in between, judged by the gate."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from job.results.reader import open_run
from job.runs.layout import WEIGHTS, answers_key, export_side, facts_of
from job.verification.verify import verify
from tests import warm
from tests.chaos.small import settings
from tests.forked import Forks
from tests.helpers import arc_rows, make_base, read_jsonl, write_jsonl
from tests.hub_server import TOKEN, Hub, hub_server
from tests.published_run import forge, rewrite
from tests.published_run import verified_manifest as manifest

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run of four steps on a base in bf16, as bases are published, with everything it exports on the same disk."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "base").mkdir()
    make_base(folder / "base")
    AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).save_pretrained(folder / "base")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    return {
        **clean,
        **settings(folder, rows=8, questions=12),
        "JOB_TRAIN__LEARNING_RATE": "2e-2",
        "JOB_EXPORT__FORMATS": "adapter:bf16,merged,fp8",
    }


@pytest.fixture(scope="module")
def whole(environment: dict[str, str]) -> Path:
    """The folder of a run that nobody disturbed."""
    done = warm.run([], {**environment, "JOB_RUN__ID": "whole"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "merged: arc_easy onto original weights" in done.stdout
    assert "fp8: arc_easy onto" in done.stdout
    assert re.search(
        r"^adapter:bf16: arc_easy [\d.]+ % \([+-][\d.]+ against the adapter\); published$", done.stdout, re.MULTILINE
    )
    return Path(environment["JOB_RUN__OUTPUT"]) / "whole"


@pytest.mark.parametrize("format_", ["merged", "fp8"])
def test_what_ships_is_what_was_scored(environment: dict[str, str], whole: Path, format_: str) -> None:
    """Plain transformers loads the published folder, and answers every question as its record says."""
    _, merged, fp8 = manifest(whole)["exports"]
    assert set(merged["candidates"]) == {"original", "dequantized"}
    assert set(fp8["candidates"]) == {merged["candidate"]}
    export = merged if format_ == "merged" else fp8
    assert (export["format"], export["dtype"], export["scored_in"]) == (format_, "bf16", "bf16")
    folder = whole / f"artifacts/export/{format_}"
    _answers_as_recorded(whole, export, Path(environment["JOB_EVAL__DATA"].split("=")[1]))
    files = {path.name for path in folder.iterdir()}
    assert files >= {"config.json", "generation_config.json", "tokenizer.json", "README.md"}
    report = (whole / "artifacts/report.html").read_text(encoding="utf-8")
    card = (whole / "artifacts/adapter/README.md").read_text(encoding="utf-8")
    assert "merged onto dequantized" in report
    assert "merged onto original" in card


def test_a_copy_of_the_adapter_is_what_was_scored(environment: dict[str, str], whole: Path) -> None:
    """Plain PEFT loads the adapter in bf16 on a quantized base, and answers every question as its record says."""
    copy, *_ = manifest(whole)["exports"]
    assert (copy["format"], copy["candidate"], copy["dtype"]) == ("adapter:bf16", "base", "bf16")
    folder = whole / "artifacts/export/adapter-bf16"
    assert folder.joinpath("adapter_model.safetensors").stat().st_size < 0.6 * (whole / WEIGHTS).stat().st_size
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        environment["JOB_MODEL__ID"], quantization_config=quantized, dtype=torch.bfloat16
    )
    model = PeftModel.from_pretrained(base, folder).eval()
    _same_answers(model, folder, whole, copy, Path(environment["JOB_EVAL__DATA"].split("=")[1]))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "vllm serve path/to/base --enable-lora --max-lora-rank 16 --lora-modules run=path/to/adapter-bf16" in card
    assert "library_name: peft" in card
    for page in ("artifacts/report.html", "artifacts/adapter/README.md"):
        assert "the files of the adapter with its weights in bf16" in (whole / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("what", ["number", "config", "file", "dtype", "candidate"])
def test_a_copy_that_is_not_the_adapter_is_found(whole: Path, tmp_path: Path, what: str) -> None:
    """`verify` compares every number with the adapter's own, though hashes and manifest agree."""
    run, folder = tmp_path / "run", "artifacts/export/adapter-bf16"
    shutil.copytree(whole, run)
    weights = f"{folder}/adapter_model.safetensors"
    if what in {"number", "dtype"}:
        tensors = load_file(run / weights)
        name = max(tensors)
        tensors[name] = tensors[name].float() if what == "dtype" else tensors[name] * 2
        rewrite(run, weights, save(tensors, {"format": "pt"}))
    elif what == "config":
        config = json.loads((run / folder / "adapter_config.json").read_bytes())
        rewrite(run, f"{folder}/adapter_config.json", json.dumps({**config, "lora_alpha": 1}).encode())
    elif what == "file":
        forge(run, lambda results: _without(results, f"{folder}/tokenizer.json"))
    else:
        forge(run, lambda results: results["exports"][0].update(candidate="original"))
    work = tmp_path / "work"
    work.mkdir()
    found = [difference.where for check in verify(open_run(str(run)), work) for difference in check.differences]
    assert any("exports[0]" in where or where.startswith(folder) for where in found), found


def _without(results: dict[str, Any], path: str) -> None:
    results["artifacts"] = [artifact for artifact in results["artifacts"] if artifact["path"] != path]


def _answers_as_recorded(run: Path, export: Mapping[str, Any], questions: Path) -> None:
    """Plain transformers loads a published folder, and gives each choice of a question the recorded likelihood."""
    folder = run / f"artifacts/export/{export['format']}"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == DTYPES[export["dtype"]]
    _same_answers(model, folder, run, export, questions)


def _same_answers(model: Any, folder: Path, run: Path, export: Mapping[str, Any], questions: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def likelihood(question: str, answer: str) -> float:
        asked, said = tokenizer(question).input_ids, tokenizer(f"{question} {answer}").input_ids
        with torch.no_grad():
            scores = model(torch.tensor([said])).logits[0, len(asked) - 1 : -1].float().log_softmax(-1)
        return float(scores.gather(1, torch.tensor(said[len(asked) :])[:, None]).sum())

    records = read_jsonl(run / answers_key("arc_easy", export_side(export["format"], export["candidate"])))
    # Both round to bf16, in another order where questions begin alike. In fp8 a rounded activation may then get another
    # of few values.
    rounding, margin = (0.5, 1.0) if export["format"] == "fp8" else (0.2, 0.2)
    compared = 0
    for row, record in zip(read_jsonl(questions), records, strict=True):
        scores = [likelihood(f"Question: {row['question']}\nAnswer:", text) for text in row["choices"]["text"]]
        assert scores == pytest.approx(record["log_likelihoods"], rel=0.02, abs=rounding)
        best = sorted(scores)
        if best[-1] - best[-2] > margin:
            compared += 1
            assert scores.index(best[-1]) == record["prediction"]
    assert compared


@pytest.mark.long
def test_the_demo_in_every_format(tmp_path: Path) -> None:
    """All formats that quantize are made and scored, AWQ is published as not scored, and the run verifies."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    changes = {
        "JOB_PRESET": "demo",
        "JOB_RUN__ID": "demo",
        "JOB_RUN__OUTPUT": str(tmp_path),
        "JOB_RUN__SPOT_NOTICES": "off",
        "JOB_EXPORT__FORMATS": "merged,fp8,w4a16,gptq,awq",
        "JOB_EXPORT__CALIBRATION_ROWS": "64",
        "JOB_EXPORT__QUANTIZATION_STEPS": "20",
        "JOB_GATE__ON": "w4a16",
        "JOB_GATE__MIN_DELTA": "0.2",
    }
    done = warm.run([], {**clean, **changes})
    assert done.returncode == 0, done.stderr[-3000:]
    results = manifest(tmp_path / "demo")
    assert results["gate"] == {**results["gate"], "on": "w4a16", "passed": True}
    exports = {export["format"]: export for export in results["exports"]}
    assert list(exports) == changes["JOB_EXPORT__FORMATS"].split(",")
    for name in ("merged", "fp8", "w4a16"):
        _answers_as_recorded(tmp_path / "demo", exports[name], Path("job/demo/questions.jsonl"))
    assert exports["w4a16"]["quantization"]["calibration"]["rows"] == 64
    assert exports["w4a16"]["bytes"] < exports["fp8"]["bytes"] < exports["merged"]["bytes"]
    assert exports["gptq"]["candidates"][exports["merged"]["candidate"]]["arc_easy"]["versus_base"]["acc"]["delta"] > 0
    assert exports["awq"]["not_scored"]


@pytest.mark.parametrize(
    "when", [pytest.param(name, marks=pytest.mark.long) for name in ("copying", "scoring", "stage", "quantizing")]
)
def test_killed_in_export(environment: dict[str, str], whole: Path, tmp_path: Path, when: str) -> None:
    """Killed before the merge, in the scoring of a copy or of a merge, or in quantizing: the same bytes after all."""
    changes = {"JOB_RUN__ID": "hit", "JOB_RUN__OUTPUT": str(tmp_path)}
    if when != "stage":
        signs = {
            "copying": '"event": "questions"',
            "scoring": '"export": "merged"',
            "quantizing": '"event": "quantizing"',
        }
        sign = signs[when]
        with warm.followed([], {**environment, **changes}) as (process, log):
            for line in log:
                if sign in line and '"stage": "export"' in line:
                    process.kill()
            assert process.wait(100) == [-9]
    else:
        assert warm.run([], {**environment, **changes, "JOB_FAULT": "kill@stage=export"}).returncode == -9
    assert not (tmp_path / "hit/results.json").exists()
    done = warm.run([], {**environment, **changes})
    assert done.returncode == 0, done.stderr[-3000:]
    assert facts_of(manifest(tmp_path / "hit")) == facts_of(manifest(whole))


@pytest.mark.long
def test_a_merge_that_loses_the_gain_ends_with_3(tmp_path: Path) -> None:
    """The adapter passes the gate; merged into large bf16 weights it is rounded away, which the gate sees."""
    changes = _cancelling(tmp_path)
    environment = {**{n: v for n, v in os.environ.items() if not n.startswith("JOB_")}, **changes}
    done = warm.run([], {**environment, "JOB_RUN__ID": "merged", "JOB_GATE__ON": "merged"})
    assert done.returncode == 3, done.stderr[-3000:]
    results = manifest(Path(changes["JOB_RUN__OUTPUT"]) / "merged")
    (export,) = results["exports"]
    task = results["evaluation"]["tasks"]["arc_easy"]
    assert task["verdict"] == "improved"
    assert task["ci95"][0] > 0.01  # the adapter by itself would pass
    assert export["candidates"]["original"]["arc_easy"]["versus_adapter"]["acc"]["verdict"] == "regressed"
    assert results["gate"]["on"] == "merged"
    assert re.match(r"merged, arc_easy: acc may have gained only", results["gate"]["reasons"][0])


def _cancelling(folder: Path) -> Mapping[str, str]:
    """Settings of a run on a base whose weights are large and cancel: 256 less 256, on inputs that are alike.

    In bf16 numbers near 256 are two apart, so that an adapter's difference is lost when it is added to them; in a
    product that is computed by itself it is not.
    """
    (folder / "base").mkdir()
    make_base(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
                large = 256 * (2 * torch.randint(0, 2, (weight.shape[0], 64)) - 1)
                small = 2 * (torch.rand(weight.shape[0], 64) < 0.02)
                weight.copy_(torch.cat([large + small, -large], dim=1))
            elif name.endswith(("o_proj.weight", "down_proj.weight")):  # both halves of the hidden state alike
                weight.copy_(torch.cat([weight[:64], weight[:64]]))
            elif "embed_tokens" in name:
                weight.copy_(torch.cat([weight[:, :64], weight[:, :64]], dim=1))
    model.save_pretrained(folder / "base")
    rows = [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": " of them all is"} for row in arc_rows(32)
    ]
    asked = [
        {
            **row,
            "choices": {"text": ["it is the one", "of them all is"], "label": ["A", "B"]},
            "answerKey": "B",
        }
        for row in arc_rows(40)
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    write_jsonl(folder / "questions.jsonl", asked)
    return {
        "JOB_RUN__OUTPUT": str(folder / "out"),
        "JOB_RUN__SPOT_NOTICES": "off",
        "JOB_MODEL__ID": str(folder / "base"),
        "JOB_MODEL__QUANTIZATION": "none",
        "JOB_DATA__SOURCE": str(folder / "rows.jsonl"),
        "JOB_EVAL__DATA": f"arc_easy={folder / 'questions.jsonl'}",
        "JOB_LORA__TARGET_MODULES": "q_proj,k_proj,v_proj,gate_proj,up_proj",
        "JOB_LORA__RANK": "64",
        "JOB_LORA__ALPHA": "64",
        "JOB_TRAIN__GLOBAL_BATCH_SIZE": "8",
        "JOB_TRAIN__EPOCHS": "4",
        "JOB_TRAIN__LEARNING_RATE": "5e-3",
        "JOB_TRAIN__MAX_LENGTH": "512",
        "JOB_TRAIN__LOSS_ON": "completion",
        "JOB_EXPORT__FORMATS": "merged",
        "JOB_GATE__MIN_DELTA": "0.01",
        "JOB_LOG__FORMAT": "json",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
    }


QUICK = {"JOB_EXPORT__CALIBRATION_ROWS": "8", "JOB_EXPORT__QUANTIZATION_STEPS": "4"}


@pytest.mark.long
@pytest.mark.parametrize(
    "formats", [("adapter:fp16", "w4a16"), ("merged", "gptq"), ("awq", "gguf:q4_k_m")], ids=" ".join
)
def test_killed_at_any_time_in_every_format(
    environment: dict[str, str], tmp_path: Path, formats: tuple[str, ...]
) -> None:
    """Killed at random while each format is made or scored, in processes of its own too: the same bytes after all."""
    asked = {**environment, **QUICK, "JOB_EXPORT__FORMATS": ",".join(formats), "JOB_RUN__OUTPUT": str(tmp_path)}
    done = warm.run([], {**asked, "JOB_RUN__ID": "whole"}, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = manifest(tmp_path / "whole")
    assert not any(export.get("not_made") for export in whole["exports"])
    assert [export["format"] for export in whole["exports"] if export.get("not_scored")] in ([], ["awq"])
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    for name in formats:
        seconds = _seconds(lines, name) * random.random()
        with warm.followed([], {**asked, "JOB_RUN__ID": "hit"}) as (process, log):
            timer = threading.Timer(seconds, _kill, [process.pid])
            for line in log:
                whole_line = line.startswith("{") and line.endswith("}\n")  # the last one is cut where the kill came
                event = _event(json.loads(line), name) if whole_line else ""
                if event == "exported":  # this machine was faster than before
                    _kill(process.pid)
                elif event and timer.ident is None:
                    timer.start()
            timer.cancel()
            assert process.wait(200) == [-9], f"{name}, {seconds:.2f} s"
        assert not (tmp_path / "hit/results.json").exists()
    done = warm.run([], {**asked, "JOB_RUN__ID": "hit"}, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert facts_of(manifest(tmp_path / "hit")) == facts_of(whole)


@pytest.mark.long
def test_two_processes_export_new_tokens_and_are_killed(environment: dict[str, str], tmp_path: Path) -> None:
    """Two processes, new tokens, a head trained whole, killed in each format: all is scored, and the same bytes."""
    formats = ("adapter:fp16", "merged", "fp8", "w4a16", "gguf:q8_0")
    asked = {
        **environment,
        **QUICK,
        "JOB_RUN__OUTPUT": str(tmp_path),
        "JOB_MODEL__ADD_TOKENS": "<sum>,<end of sum>",
        "JOB_LORA__MODULES_TO_SAVE": "lm_head",
        "JOB_EXPORT__FORMATS": ",".join(formats),
    }
    forks = Forks(tmp_path)
    codes, group = forks.run({**asked, "JOB_RUN__ID": "whole"}, 2, "whole")
    assert codes == [0, 0], group.logs[0].read_text(encoding="utf-8")[-3000:]
    whole = manifest(tmp_path / "whole")
    assert [export["format"] for export in whole["exports"]] == [*formats]
    assert not any(export.get("not_made") or export.get("not_scored") for export in whole["exports"])
    for export in whole["exports"][1:4]:
        _answers_as_recorded(tmp_path / "whole", export, Path(environment["JOB_EVAL__DATA"].split("=")[1]))
    for number, name in enumerate(formats):
        seconds = _seconds(group.lines(0), name) * random.random()
        hit = forks.start({**asked, "JOB_RUN__ID": "hit"}, 2, f"hit-{number}")
        begun, ends = 0.0, time.monotonic() + 200
        while not begun or time.monotonic() < begun + seconds:
            assert time.monotonic() < ends, hit.logs[0].read_text(encoding="utf-8")[-3000:]
            events = {_event(line, name) for line in hit.lines(0)} - {""}
            begun = begun or (time.monotonic() if events else 0.0)
            if "exported" in events:  # this machine was faster than before
                break
            time.sleep(0.02)
        _kill(hit.pids[number % 2])  # the other notices, and ends to be started again
        assert hit.wait()[number % 2] == -9, f"{name}, {seconds:.2f} s"
        assert not (tmp_path / "hit/results.json").exists()
    codes, last = forks.run({**asked, "JOB_RUN__ID": "hit"}, 2, "last")
    assert codes == [0, 0], last.logs[0].read_text(encoding="utf-8")[-3000:]
    assert facts_of(manifest(tmp_path / "hit")) == facts_of(whole)


def _event(line: Mapping[str, Any], name: str) -> str:
    """What a line of the log says of the making of a format: that it begins, goes on, or is done."""
    event = str(line.get("event"))
    return event if line.get("export") == name and event in {"quantizing", "evaluating", "exported"} else ""


def _seconds(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    """How long it took to make and score a format, in a run that nobody disturbed."""
    times = [datetime.fromisoformat(line["timestamp"]).timestamp() for line in lines if _event(line, name)]
    return max(times) - min(times)


def test_a_complete_run_is_pushed_once_though_it_is_killed(environment: dict[str, str], whole: Path) -> None:
    """Killed by the hub itself as the files go up and as the commit is made: one commit, and the run still verifies."""
    hub = Hub(part=1 << 20)
    pushed = {**environment, "JOB_RUN__ID": "whole", "JOB_EXPORT__HUB": "me/model", "HF_TOKEN": TOKEN}
    pushed |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    with hub_server(hub) as pushed["HF_ENDPOINT"]:
        for at in ("/lfs/", "/commits/main", "/commit/main"):
            hub.refuse = lambda _method, _path: None
            with warm.followed([], pushed) as (process, log):
                hub.refuse = lambda _method, path, at=at, pid=process.pid: _kill(pid) if at in path else None  # type: ignore[misc]
                list(log)
                assert process.wait(100) == [-9]
        hub.refuse = lambda _method, _path: None
        done = warm.run([], pushed)
        assert (done.returncode, "pushed" in done.stderr) == (0, True), done.stderr[-3000:]
        assert TOKEN not in done.stderr + done.stdout
        asked = len(hub.requests)
        assert warm.run([], pushed).returncode == 0
        assert len(hub.requests) == asked
        refused = {**pushed, "JOB_RUN__ID": "refused", "HF_TOKEN": "hf_a_token_of_yesterday"}
        done = warm.run([], refused)
        assert (done.returncode, "yesterday" in done.stderr) == (77, False), done.stderr[-3000:]
        assert not (whole.parent / "refused").exists()
    assert hub.titles("me/model") == ["initial commit", "qlora-job: run whole"]
    files = hub.files("me/model")
    for path in ("adapter_model.safetensors", "README.md"):
        assert files[path] == (whole / "artifacts/adapter" / path).read_bytes()
    for path in ("merged/model.safetensors", "merged/config.json", "adapter-bf16/adapter_model.safetensors"):
        assert files[path] == (whole / "artifacts/export" / path).read_bytes()
    manifest(whole)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # another of its requests has done it
        os.kill(pid, signal.SIGKILL)
