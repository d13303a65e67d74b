"""Texts are scored as by transformers' own pipeline, long ones completely; what is no classifier is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import pipeline

from job.errors import DataError, Preempted, SettingsError
from job.model import text_classifier
from job.model.text_classifier import Labels, TextClassifier
from tests.toy_classifier import SAFE_OR_NOT, WINDOW, WORD, WORDS, make_classifier

CPU = torch.device("cpu")
SETTING = "JOB_DATA__SAFETY_MODEL"
SEVERAL = {0: "neutral", 1: "insult", 2: "threat"}


def load(folder: Path, *chosen: str) -> TextClassifier:
    """The classifier in a folder, asked for these labels."""
    return TextClassifier(folder, Labels(folder, SETTING), chosen, CPU, SETTING)


def some_texts() -> list[str]:
    """Texts of 1 to 40 words."""
    draw = Random(0)
    return [" ".join(draw.choices(WORDS, k=length)) for length in (1, 40, 3, 17, 17, 2, 30, 5)]


def change(folder: Path, **values: Any) -> Path:
    """Changes config.json; returns the folder."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.mark.parametrize(
    ("labels", "kind", "chosen"),
    [
        (SAFE_OR_NOT, None, ["unsafe"]),
        (SEVERAL, None, ["insult", "threat"]),
        (SEVERAL, "multi_label_classification", ["insult", "threat"]),
        ({0: "toxic"}, None, ["toxic"]),
    ],
)
def test_scores_are_those_of_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: dict[int, str], kind: str | None, chosen: list[str]
) -> None:
    """Softmax or sigmoid, one by one or padded in a batch: within 1e-5 of `pipeline("text-classification")`."""
    folder = make_classifier(tmp_path, labels, kind=kind, random=True)
    reference = pipeline("text-classification", str(folder), top_k=None, device=CPU)
    expected = []
    for found in reference(some_texts(), batch_size=1):
        by_label = {one["label"]: one["score"] for one in found}
        scores = [by_label[name] for name in chosen]
        expected.append(max(scores) if kind else sum(scores))
    assert len({round(score, 3) for score in expected}) > 4
    for tokens in (8192, 64, 1):
        monkeypatch.setattr(text_classifier, "BATCH_TOKENS", tokens)
        assert load(folder, *chosen).scores(some_texts()) == pytest.approx(expected, abs=1e-5)


def test_a_word_at_the_end_of_a_long_text_is_found(tmp_path: Path) -> None:
    """What is longer than the model's input is scored in windows that leave no word out; an empty text scores 0."""
    classifier = load(make_classifier(tmp_path), "unsafe")
    plain = "the row is about something else and it " * 40
    texts = [plain, f"{plain} {WORD}", f"{WORD} {plain}", f"{plain} {WORD} {plain}", WORD, "row", ""]
    assert [score > 0.5 for score in classifier.scores(texts)] == [False, True, True, True, True, False, False]
    assert classifier.scores([""]) == [0]
    windows = [ids for _, ids in classifier.windows(texts[:1])]
    assert max(map(len, windows)) == WINDOW
    assert len(windows) > 320 / WINDOW


def test_it_can_be_stopped_between_batches(tmp_path: Path) -> None:
    """What `check_stop` raises ends the work."""

    def stop() -> None:
        raise Preempted("stopped")

    with pytest.raises(Preempted):
        load(make_classifier(tmp_path), "unsafe").scores(["row"], stop)


def no_head(folder: Path) -> None:
    """Removes the classifier's own weights from the file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({name: one for name, one in tensors.items() if "classifier" not in name}, folder / "model.safetensors")


def pickled(folder: Path) -> None:
    """Leaves only pickled weights."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def not_finite(folder: Path) -> None:
    """Makes the bias not a number."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (no_head, DataError, "lacks 2 weights"),
        (pickled, DataError, "no weights in safetensors"),
        (not_finite, DataError, "not finite"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 9), DataError, "can be loaded"),
        (lambda folder: (folder / "tokenizer.json").unlink(), SettingsError, "no tokenizer.json"),
        (lambda folder: change(folder, architectures=["BertForMaskedLM"]), SettingsError, "does not classify texts"),
        (lambda folder: change(folder, problem_type="regression"), SettingsError, "no probabilities"),
        (lambda folder: change(folder, quantization_config={"quant_method": "gptq"}), SettingsError, "gptq"),
        (lambda folder: change(folder, id2label={"0": "a", "5": "b"}), DataError, "id2label"),
        (lambda folder: change(folder, id2label={"0": "unsafe", "1": "unsafe"}), DataError, "id2label"),
    ],
)
def test_what_is_no_classifier_is_refused(
    tmp_path: Path, damage: Callable[[Path], Any], error: type[Exception], words: str
) -> None:
    """Missing, pickled or broken files and other models end with a message that names the setting, never with noise."""
    damage(make_classifier(tmp_path))
    with pytest.raises(error) as caught:
        load(tmp_path, "unsafe").scores(["row"])
    assert words in str(caught.value)
    assert SETTING in str(caught.value)
    assert "JOB_MODEL__ID" not in str(caught.value)
