"""`verify` on runs that exported a merged model: its figures, the choice, the gate on it, and its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from job.platforms.detect import Delivery
from job.report.model_card import render_export_card, render_model_card
from job.report.report import read_report_data, render_report
from job.results import manifest
from job.results.delivery import deliver
from job.results.summary import summary
from job.storage.local import LocalStore
from job.verification.check_exports import _gguf_file
from job.verification.check_exports import _quantized as _quantized_by
from job.verification.differences import find_differences
from job.verification.verify import verify
from tests.published_run import forge, pairs, publish_file, publish_run, rewrite

BETTER = {"original": [True] * 20, "dequantized": [True] * 19 + [False]}
ALIKE = {"original": [False] * 10 + [True] * 10, "dequantized": [True] * 10 + [False] * 10}
FOLDER = "artifacts/export/merged"
QUANTIZATION = {
    "method": "compressed-tensors",
    "scheme": "W4A16",
    "bits": 4,
    "group_size": 128,
    "activations": "16 bit",
    "library": "auto-round",
    "version": "0.16.1",
    "layers": 14,
    "kept": ["lm_head"],
    "calibration": {"rows": 16, "tokens": 99, "rows_sha256": "0" * 64, "examples_sha256": "1" * 64},
}


def published(tmp_path: Path, candidates: dict[str, list[bool]], *settings: str) -> Path:
    """A run whose adapter is right in 15 of 20 questions, of which the base knew 5."""
    return publish_run(tmp_path / "run", {"arc": pairs(20, improved=10)}, exported=candidates, settings=settings)


def wrong(folder: Path, what: str | None = None) -> list[str]:
    """What differs, by the place; with `what` by that check alone, although another one may find it, too."""
    work = folder.parent / "verified"
    work.mkdir(exist_ok=True)
    checks = [check for check in verify(LocalStore(folder), work) if what in {None, check.what}]
    return [difference.where for check in checks for difference in check.differences]


def results_of(folder: Path) -> dict[str, Any]:
    """The manifest, which fits the schema."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_bytes())
    manifest.validate(found)
    return found


@pytest.mark.parametrize(("candidates", "chosen"), [(BETTER, "original"), (ALIKE, "dequantized")])
def test_a_run_with_an_export_verifies(tmp_path: Path, candidates: dict[str, list[bool]], chosen: str) -> None:
    """Both candidates are in the manifest, paired with base and adapter; the better one ships, at a tie dequantized."""
    folder = published(tmp_path, candidates)
    assert wrong(folder) == []
    (export,) = results_of(folder)["exports"]
    assert export["candidate"] == chosen
    found = export["candidates"]["original"]["arc"]
    right = sum(candidates["original"]) / 20
    assert found["versus_base"]["acc"]["delta"] == pytest.approx(right - 0.25)
    assert found["versus_adapter"]["acc"]["delta"] == pytest.approx(right - 0.75)
    assert ("trained on the dequantized" in export["reason"]) is (chosen == "dequantized")


def test_one_candidate_is_no_choice(tmp_path: Path) -> None:
    """Where only one was asked for, its reason stands as it is."""
    assert wrong(published(tmp_path, {"original": [True] * 20})) == []


def test_the_gate_judges_what_ships(tmp_path: Path) -> None:
    """The adapter gained, the merge lost it: with the gate on the merge, the run is not passed, and that verifies."""
    lost = {"original": [True] * 3 + [False] * 17}
    folder = published(tmp_path, lost, "--gate.on=merged", "--gate.min_delta=0.01")
    assert wrong(folder) == []
    gate = results_of(folder)["gate"]
    assert (gate["on"], gate["passed"]) == ("merged", False)
    assert gate["reasons"][0].startswith("merged, arc: acc may have gained only")
    forge(folder, lambda results: results["gate"].update(passed=True, reasons=[]))
    assert "results.json gate.passed" in wrong(folder)


def test_a_gate_on_what_was_not_exported(tmp_path: Path) -> None:
    """A manifest cannot claim to have judged a format that it does not list."""
    folder = published(tmp_path, BETTER)
    forge(folder, lambda results: results["gate"].update(on="gguf"))
    assert "results.json gate.on" in wrong(folder)


def _other_choice(results: dict[str, Any]) -> None:
    results["exports"][0]["candidate"] = "dequantized"


def _other_figure(results: dict[str, Any]) -> None:
    results["exports"][0]["candidates"]["original"]["arc"]["scores"]["acc"] = 0.5


def _none(results: dict[str, Any]) -> None:
    results["exports"] = []


def _other_dtype(results: dict[str, Any]) -> None:
    results["exports"][0]["dtype"] = "bf16"


@pytest.mark.parametrize("change", [_other_choice, _other_figure, _none, _other_dtype])
def test_a_changed_claim_is_found(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Figures, choice and dtype follow from samples and files: another claim in a sealed manifest is found."""
    folder = published(tmp_path, BETTER)
    forge(folder, change)
    assert any("exports" in where or where.startswith(FOLDER) for where in wrong(folder))


def test_a_changed_answer_is_found(tmp_path: Path) -> None:
    """An answer of a candidate that was replaced, manifest and all, contradicts the figures."""
    folder = published(tmp_path, BETTER)
    path = "artifacts/evaluation/arc.merged-dequantized.jsonl"
    lines = (folder / path).read_bytes().splitlines(keepends=True)
    rewrite(
        folder,
        path,
        (folder / "artifacts/evaluation/arc.base.jsonl").read_bytes().splitlines(keepends=True)[0]
        + b"".join(lines[1:]),
    )
    assert any("exports[0].candidates.dequantized" in where for where in wrong(folder))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"reason": "it is smaller"}, "results.json exports[0].reason"),
        ({"tasks_not_scored": ["chat"]}, "results.json exports[0].tasks_not_scored"),
        ({"candidates": {"original": {}, "dequantized": {}}}, "results.json exports[0].candidates.original"),
        ({"quantization": QUANTIZATION}, "results.json exports[0].quantization.calibration.rows_sha256"),
    ],
)
def test_claims_of_an_export_are_checked(tmp_path: Path, change: dict[str, Any], where: str) -> None:
    """Why it was chosen, what was not scored, figures that are missing, and the rows of the calibration."""
    folder = published(tmp_path, BETTER)
    forge(folder, lambda results: results["exports"][0].update(change))
    assert any(one.startswith(where) for one in wrong(folder, "exports"))


def test_figures_are_checked_although_nothing_is_said_to_be_scored(tmp_path: Path) -> None:
    """A reason why a format was not scored does not let its false figures pass."""
    folder = published(tmp_path, BETTER)
    forge(folder, lambda results: results["exports"][0].update(not_scored="no reader"))
    forge(folder, _other_figure)
    assert "results.json exports[0].candidates.original.arc.scores.acc" in wrong(folder, "exports")


def test_the_candidate_is_one_of_those_made(tmp_path: Path) -> None:
    """Also where there is one only, and so no choice to compute again."""
    folder = published(tmp_path, {"original": [True] * 20})
    forge(folder, lambda results: results["exports"][0].update(candidate="dequantized"))
    assert "results.json exports[0].candidate" in wrong(folder, "exports")


def add(folder: Path, path: str, data: bytes) -> None:
    """Adds a file to the artifacts."""
    artifact = publish_file(LocalStore(folder), path, data)
    forge(folder, lambda results: results["artifacts"].append(asdict(artifact)))


def test_files_of_no_format_are_found(tmp_path: Path) -> None:
    """A listed file in the folder of a format that the manifest does not have."""
    folder = published(tmp_path, BETTER)
    add(folder, "artifacts/export/merged-2/model.safetensors", b"x")
    assert "artifacts/export/merged-2/model.safetensors" in wrong(folder)


@pytest.mark.parametrize(
    ("weights", "where"),
    [
        ({"model.q_proj.weight": "model-2.safetensors"}, f"{FOLDER}/model-2.safetensors"),
        ({"model.q_proj.weight": "model.safetensors", "lm_head.weight": "model.safetensors"}, f"{FOLDER}/"),
        ({}, f"{FOLDER}/"),
    ],
    ids=["file", "tensor", "none"],
)
def test_an_index_names_what_is_there(tmp_path: Path, weights: dict[str, str], where: str) -> None:
    """Weights in a file that is missing, or a tensor that no file has: the model could not be loaded."""
    folder = published(tmp_path, BETTER)
    add(folder, f"{FOLDER}/model.safetensors.index.json", json.dumps({"weight_map": weights}).encode())
    assert (where in wrong(folder)) is bool(weights)


@pytest.mark.parametrize(
    ("change", "different"),
    [
        ({}, []),
        ({"bits": 8}, ["x bits"]),
        ({"group_size": 64}, ["x group_size"]),
        ({"kept": []}, ["x kept"]),
        ({"method": "gptq"}, ["x method"]),
    ],
)
def test_quantization_is_that_of_the_configuration(change: dict[str, Any], different: list[str]) -> None:
    """Method, bits, group and what is not quantized, as vLLM reads them; there is one group of layers."""
    group = {"weights": {"num_bits": 4, "group_size": 128}}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    claimed, found = _quantized_by({**QUANTIZATION, **change}, {"quantization_config": config})
    assert [one.where for one in find_differences("x", claimed, found)] == different
    two = config | {"config_groups": {"group_0": group, "group_1": group}}
    assert list(find_differences("x", *_quantized_by(QUANTIZATION, {"quantization_config": two})))


@pytest.mark.parametrize("files", [[], ["a.gguf", "b.gguf"]])
def test_a_gguf_format_is_one_file(tmp_path: Path, files: list[str]) -> None:
    """None, or two of which nobody knows which is the model."""
    copies = {f"artifacts/export/gguf-q8_0/{name}": tmp_path / name for name in [*files, "README.md"]}
    (difference,) = _gguf_file({"format": "gguf:q8_0"}, copies)
    assert (difference.claimed, difference.found) == ("one file", str(len(files)))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.json", b'{"dtype": "float16", "quantization_config": {}}'),
        ("config.json", b"[]"),
        ("model.safetensors", b"no tensors"),
    ],
)
def test_a_folder_that_is_no_model_is_found(tmp_path: Path, name: str, data: bytes) -> None:
    """Weights that cannot be read, or a configuration of quantized ones, though every hash is right."""
    folder = published(tmp_path, BETTER)
    rewrite(folder, f"{FOLDER}/{name}", data)
    assert any(where.startswith(FOLDER) for where in wrong(folder))


def test_a_byte_of_the_model_is_found(tmp_path: Path) -> None:
    """The hash of every exported file is checked."""
    folder = published(tmp_path, BETTER)
    path = folder / FOLDER / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert f"{FOLDER}/model.safetensors" in wrong(folder)


def test_it_is_shown_and_delivered(tmp_path: Path) -> None:
    """Report, card and summary have a row for each candidate; the platform gets the model in a folder of its name."""
    folder = published(tmp_path, BETTER)
    results = results_of(folder)
    page = render_report(results, read_report_data(results, lambda artifact: folder / artifact.path)).decode()
    card = render_model_card(results).decode()
    for text in (page, card):
        assert text.count("merged onto") >= 3
        assert "the higher accuracy: original 100.00 %, dequantized 95.00 %" in text
    own = render_export_card(results, results["exports"][0]).decode()
    assert "hf download" not in own
    results["settings"] |= {"export.hub": {"value": "me/model"}, "export.hub_revision": {"value": "next"}}
    pushed = render_export_card(results, results["exports"][0]).decode()
    assert 'hf download me/model --revision next --include "merged/*" --local-dir path/to' in pushed
    for text in ("AutoModelForCausalLM.from_pretrained", "vllm serve", "+75.00", "+25.00", results["model"]["sha256"]):
        assert text in own
    (line,) = [line for line in summary(results, "x/results.json") if line.startswith("merged")]
    assert "published: original" in line
    deliver(LocalStore(folder), results, Delivery(tmp_path / "model", tmp_path / "data"))
    assert (tmp_path / "model/merged/model.safetensors").exists()


def test_a_quantized_format_is_shown(tmp_path: Path) -> None:
    """Report, card and summary tell scheme, bytes, what is not quantized, calibration, and what was not scored."""
    folder = published(tmp_path, BETTER)
    results = results_of(folder)
    (merged,) = results["exports"]
    made = {"format": "w4a16", "bytes": 1234567, "quantization": QUANTIZATION, "reason": "as was chosen"}
    scored = {**merged, **made, "candidates": {"original": merged["candidates"]["original"]}}
    unscored = {**scored, "format": "awq", "candidates": {"original": {}}, "not_scored": "no reader", "dtype": ""}
    failed = {"published": False, "not_made": "unknown family", "format": "gptq", "candidates": {"original": {}}}
    failed = {**{name: merged[name] for name in ("candidate", "reason", "dtype", "scored_in")}, **failed}
    results["exports"] = [{**merged, "published": False}, scored, unscored, failed]
    manifest.validate(results)
    page = render_report(results, read_report_data(results, lambda artifact: folder / artifact.path)).decode()
    for text in (page, render_model_card(results).decode()):
        for word in ("W4A16", "1.2 M", "not quantized: lm_head", "16 rows", "NOT scored: no reader", "unknown family"):
            assert word in text
    own = render_export_card(results, unscored).decode()
    assert "Nothing was measured" in own
    assert "Its files" not in own
    lines = summary(results, "x/results.json")
    assert any("awq: published, not scored" in line for line in lines)
    assert any("gptq: not published" in line for line in lines)


def _quantized(results: dict[str, Any]) -> None:
    results["exports"][0]["quantization"] = QUANTIZATION


def _not_published(results: dict[str, Any]) -> None:
    results["exports"][0]["published"] = False


def _other_bytes(results: dict[str, Any]) -> None:
    results["exports"][0]["bytes"] = 5


@pytest.mark.parametrize("change", [_quantized, _not_published, _other_bytes])
def test_a_claim_about_the_files_is_checked(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Quantization, bytes and whether it is published at all follow from the files, the settings and the plan."""
    folder = published(tmp_path, BETTER)
    forge(folder, change)
    assert any("exports" in where or where.startswith(FOLDER) for where in wrong(folder))


@pytest.mark.parametrize("side", ["merged-original", "original"])
def test_answers_in_another_order_are_found(tmp_path: Path, side: str) -> None:
    """Answers of an export, or of the unquantized base that it is compared with: a difference, not the end of it."""
    exported, original = {"original": [True] * 19 + [False]}, {"arc": [True] * 15 + [False] * 5}
    run = publish_run(tmp_path / "run", {"arc": pairs(20, improved=10)}, exported=exported, original=original)
    path = f"artifacts/evaluation/arc.{side}.jsonl"
    first, second, *rest = (run / path).read_bytes().splitlines(keepends=True)
    rewrite(run, path, b"".join([second, first, *rest]))
    assert f"{path} line 1" in wrong(run)
