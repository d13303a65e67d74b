"""Modules trained whole, and rows of new tokens: PEFT loads what was trained; unsupported cases are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from job.errors import SettingsError
from job.model.adapter_files import load_adapter, save_adapter
from job.model.adapter_options import AdapterOptions
from job.model.load_base import inspect
from job.model.lora import adapter_off, add_adapter, count_parameters, trainable
from job.model.packed_attention import use
from job.model.packing_check import choose_packing
from job.model.tokenizer import load_tokenizer
from job.model.tokenizer_files import copy_tokenizer
from job.model.whole_modules import grow_embeddings
from job.training.lm_head_loss import losses_of
from tests.helpers import (
    LINEAR,
    VOCABULARY,
    fill_adapter,
    make_examples,
    make_model,
    with_new_tokens,
    without_repacking,
)

TOKENS = ("<ask>", "<tell>")
WHOLE = ("embed_tokens", "lm_head")
CASES = {
    "whole": AdapterOptions(modules_to_save=WHOLE),
    "a norm": AdapterOptions(modules_to_save=("norm",)),
    "tokens": AdapterOptions(added_tokens=TOKENS),
    "tokens, head whole": AdapterOptions(added_tokens=TOKENS, modules_to_save=("lm_head",)),
}


@pytest.fixture(scope="module")
def tied_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with one matrix for embedding and output layer, as small models have it."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(base_folder, tmp_path_factory.mktemp("tied") / "base"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(1, tokens, vocabulary) of one sequence as it is."""
    use(model.get_base_model() if hasattr(model, "peft_config") else model, "eager")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def sequence(options: AdapterOptions) -> torch.Tensor:
    """Old tokens, and all new ones."""
    return torch.arange(380, VOCABULARY + len(options.added_tokens))[None]


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("none", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", [*CASES, "tokens, tied"])
def test_peft_loads_what_was_trained(
    base_folder: Path, tied_folder: Path, tmp_path: Path, name: str, quantization: str
) -> None:
    """Plain transformers and PEFT compute the same logits, after making room for new tokens with any numbers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder, options = (tied_folder, CASES["tokens"]) if "tied" in name else (base_folder, CASES[name])
    model = fill_adapter(make_model(folder, quantization=quantization, rank=8, options=options))
    ids = sequence(options)
    expected = logits(model, ids)
    save_adapter(model, tmp_path, base="the-base", revision=None)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    how = {"quantization_config": nf4} if quantization == "nf4" else {}
    plain = without_repacking(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how))
    if options.added_tokens:
        plain.resize_token_embeddings(VOCABULARY + len(TOKENS), mean_resizing=False)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=1e-5, atol=1e-5)
    other = make_model(folder, quantization=quantization, rank=8, options=options)
    assert (logits(other, ids) - expected).abs().max() > 1e-3
    load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_base_stays_the_base(base_folder: Path, name: str) -> None:
    """With the adapter off nothing that was trained is left, and a new one changes nothing yet."""
    options = CASES[name]
    model, ids = make_model(base_folder, rank=8, options=options), sequence(options)
    fresh = logits(model, ids)
    with adapter_off(model):
        base = logits(model, ids)
    assert torch.equal(fresh, base)
    with adapter_off(fill_adapter(model)):
        assert torch.equal(logits(model, ids), base)
    assert not torch.equal(logits(model, ids), base)


def test_new_rows_are_the_mean_of_all(base_folder: Path, tied_folder: Path) -> None:
    """They do not depend on chance; a vocabulary that has room stays as it is."""
    for folder, matrices in ((base_folder, 2), (tied_folder, 1)):
        base = make_model(folder, options=CASES["tokens"]).get_base_model()
        weights = {id(p): p for n, p in base.named_parameters() if n.startswith(("lm_head", "model.embed_tokens"))}
        whole = [weight for weight in weights.values() if weight.shape[0] == VOCABULARY + 2]
        assert len(whole) == matrices
        for weight in whole:
            torch.testing.assert_close(weight[VOCABULARY:], weight[:VOCABULARY].mean(0).expand(2, -1))
    small = make_model(base_folder).get_base_model()
    grow_embeddings(small, 300)
    assert small.get_input_embeddings().weight.shape[0] == VOCABULARY


@pytest.mark.parametrize("name", [*CASES, "tokens, tied"])
def test_parameters_are_counted_without_weights(base_folder: Path, tied_folder: Path, name: str) -> None:
    """`plan` counts what a run will train: of new tokens a few rows, of modules everything."""
    folder, options = (tied_folder, CASES["tokens"]) if "tied" in name else (base_folder, CASES[name])
    _, empty = inspect(folder, max_length=64, targets=LINEAR, rank=8, options=options)
    counted = count_parameters(empty, rank=8, target_modules=LINEAR, options=options)
    made = make_model(folder, rank=8, options=options)
    assert counted == sum(parameter.numel() for parameter in trainable(made).values())
    assert "JOB_" in (options.not_fused or "")


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.long), torch.bfloat16])
@pytest.mark.parametrize("name", [*CASES, "tokens, tied"])
def test_packed_sequences_train_them(base_folder: Path, tied_folder: Path, name: str, dtype: torch.dtype) -> None:
    """Loss and gradient of a packed sequence, head and embedding included, are those of the examples alone."""
    folder, options = (tied_folder, CASES["tokens"]) if "tied" in name else (base_folder, CASES[name])
    model = fill_adapter(make_model(folder, rank=8, options=options, dtype=dtype))
    examples = with_new_tokens(make_examples(6), len(options.added_tokens))
    found = choose_packing(model, examples, max_length=128, losses=losses_of(model))
    assert found.packed, found.reason
    losses_of(model).packed(examples).backward()
    for key, parameter in trainable(model).items():
        assert parameter.dtype is torch.float32
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


REFUSED = {
    "nothing": (AdapterOptions(modules_to_save=("head",)), "has no module head; those of its vocabulary are"),
    "adapted": (AdapterOptions(modules_to_save=("q_proj",)), "q_proj holds .*q_proj, which gets an adapter"),
    "a list": (AdapterOptions(modules_to_save=("layers",)), "ModuleList, which PEFT cannot train whole"),
    "no weights": (AdapterOptions(modules_to_save=("rotary_emb",)), "cannot train whole"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_whole_is_refused(base_folder: Path, case: str) -> None:
    """Before weights are loaded, with the setting and the reason."""
    options, why = REFUSED[case]
    with pytest.raises(SettingsError, match=f"JOB_LORA__MODULES_TO_SAVE: .*{why}"):
        inspect(base_folder, max_length=64, targets=LINEAR, rank=8, options=options)


def test_tied_matrices_do_not_come_apart(tied_folder: Path) -> None:
    """PEFT would train a copy of one of them; the rows of new tokens it ties."""
    with pytest.raises(SettingsError, match=r"lm_head is tied to model\.embed_tokens\.weight.*JOB_MODEL__ADD_TOKENS"):
        make_model(tied_folder, options=AdapterOptions(modules_to_save=("lm_head",)))


def test_a_quantized_module_is_refused(base_folder: Path) -> None:
    """Its 4-bit numbers have no gradient."""
    options = AdapterOptions(modules_to_save=("mlp",))
    base = make_model(base_folder, quantization="nf4").unload()
    with pytest.raises(SettingsError, match=r"mlp is quantized.*JOB_MODEL__QUANTIZATION=none"):
        add_adapter(base, rank=2, alpha=2, dropout=0.0, target_modules=["q_proj"], seed=0, options=options)


def test_a_short_name_means_whole_parts(base_folder: Path) -> None:
    """`norm` is the last norm; to PEFT it would be every norm whose name ends so."""
    names = [name for name in trainable(make_model(base_folder, options=CASES["a norm"])) if "lora_" not in name]
    assert names == ["base_model.model.model.norm.modules_to_save.default.weight"]


def test_new_tokens_are_in_the_published_tokenizer(base_folder: Path, tmp_path: Path) -> None:
    """The files load without this project, with the same ids as in training; the rest of them stays as it was."""
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(base_folder, TOKENS)
    copy_tokenizer(base_folder, tmp_path / "a", tokenizer, TOKENS)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    text = "Question: <ask>which is the answer?<tell> it is"
    assert loaded.encode(text) == tokenizer.encode(text)
    new = len(load_tokenizer(base_folder))
    assert {new, new + 1} <= set(loaded.encode(text))
    assert loaded.decode(loaded.encode(text), skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    copy_tokenizer(base_folder, tmp_path / "b", tokenizer, TOKENS)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    before, after = (json.loads((d / "tokenizer.json").read_text("utf-8")) for d in (base_folder, tmp_path / "a"))
    assert before["model"] == after["model"]


def test_a_token_that_is_there_already_is_refused(base_folder: Path) -> None:
    """It has a row that was trained with the base."""
    with pytest.raises(SettingsError, match=r"JOB_MODEL__ADD_TOKENS: <pad>: .* has it already"):
        load_tokenizer(base_folder, ["<pad>", "<ask>"])
