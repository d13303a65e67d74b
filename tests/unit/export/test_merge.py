"""Merging gives the same weights as PEFT's own merge, as a checkpoint that plain transformers loads."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from job.common.export_formats import EXPORT_FORMATS
from job.common.hashing import hash_files
from job.errors import SettingsError, TrainingFailed
from job.export import tensor_files
from job.export.formats import DERIVED
from job.export.merge import write_merged
from job.export.merge_plan import DEQUANTIZED, ORIGINAL, candidates, plan_merge
from job.model.adapter_options import AdaLora, AdapterOptions
from job.model.free_model import free_model
from job.model.fused.frozen_weights import dequantized
from job.model.load_base import PLAIN
from job.model.lora import add_adapter, trainable
from job.model.packed_attention import use
from job.model.tokenizer import load_tokenizer
from tests.helpers import LINEAR, VOCABULARY, fill_adapter, load_plain, make_base, make_model

IDS = torch.tensor([[0, 7, 90, 211, 35, 398, 12]])
OPTIONS: Mapping[str, AdapterOptions] = {
    "plain": AdapterOptions(),
    "rslora": AdapterOptions(use_rslora=True),
    "patterns": AdapterOptions(rank_pattern={"q_proj": 4}, alpha_pattern={"down_proj": 64}, layers=(1,)),
    "dora": AdapterOptions(use_dora=True),
    "pissa": AdapterOptions(init="pissa"),
    "olora": AdapterOptions(init="olora"),
    "adalora": AdapterOptions(kind="adalora", adalora=AdaLora(6, 4, 0, 0, 1, 0.5, 10)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy base, in fp32."""
    folder = tmp_path_factory.mktemp("base")
    make_base(folder)
    return folder


@pytest.fixture(scope="module")
def half(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bf16, as bases are published."""
    folder = tmp_path_factory.mktemp("half") / "base"
    shutil.copytree(base, folder)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def merged(model: Any, source: Path, onto: str, folder: Path, tokens: Sequence[str] = ()) -> Path:
    """The merged model's folder."""
    how: dict[str, Any] = {"tokenizer": load_tokenizer(source, tokens), "added_tokens": tokens}
    write_merged(model, plan_merge(model, source), onto, folder, **how)
    return folder


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Of a few tokens, (tokens, vocabulary) fp32, with transformers' plain attention."""
    use(model.get_base_model() if hasattr(model, "get_base_model") else model, PLAIN)
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits[0].float()


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_weights_are_those_of_pefts_own_merge(base: Path, tmp_path: Path, kind: str) -> None:
    """Every kind of adapter, merged in fp32, gives PEFT's bits, and logits equal to those with the adapter."""
    model = fill_adapter(make_model(base, options=OPTIONS[kind])).eval()
    with_adapter = logits(model)
    folder = merged(model, base, ORIGINAL, tmp_path / "merged")
    reference = model.merge_and_unload()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.dtype == torch.float32
    expected = reference.state_dict()
    assert plain.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in plain.state_dict().items())
    torch.testing.assert_close(logits(plain), with_adapter, rtol=1e-4, atol=2e-4)
    assert (logits(plain) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.01


TOKENS = ("<ask>", "<tell>")
WHOLE: Mapping[str, AdapterOptions] = {
    "whole": AdapterOptions(modules_to_save=("embed_tokens", "lm_head")),
    "a norm": AdapterOptions(modules_to_save=("norm",)),
    "tokens": AdapterOptions(added_tokens=TOKENS),
    "tokens, head whole": AdapterOptions(added_tokens=TOKENS, modules_to_save=("lm_head",)),
}


@pytest.mark.parametrize("kind", [*WHOLE, "tokens, tied", "tokens, tied in two copies"])
def test_what_was_trained_whole_takes_the_place_of_the_bases(base: Path, tmp_path: Path, kind: str) -> None:
    """Whole modules and rows of new tokens: PEFT's bits in fp32, with tokenizer and configuration that fit them."""
    options, source = WHOLE[kind.split(", tied", maxsplit=1)[0]], base
    if "tied" in kind:
        source = _tied(base, tmp_path / "base", copies=kind.endswith("copies"))
    model = fill_adapter(make_model(source, options=options)).eval()
    ids = torch.tensor([[0, 7, 90, 211, *range(VOCABULARY, VOCABULARY + len(options.added_tokens)), 398, 12]])
    with_adapter = logits(model, ids)
    folder = merged(model, source, ORIGINAL, tmp_path / "merged", options.added_tokens)
    expected = model.merge_and_unload().state_dict()
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert plain.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in plain.state_dict().items())
    torch.testing.assert_close(logits(plain, ids), with_adapter, rtol=1e-4, atol=2e-4)
    assert plain.config.vocab_size == VOCABULARY + len(options.added_tokens)
    known = load_tokenizer(source, options.added_tokens)  # of fewer tokens than the embedding has rows
    assert all(tokenizer.tokenize(f"a{token}b") == known.tokenize(f"a{token}b") for token in ("", *TOKENS))
    heads = {id(plain.get_input_embeddings().weight), id(plain.get_output_embeddings().weight)}
    assert len(heads) == (1 if "tied" in kind else 2)


def _tied(base: Path, folder: Path, *, copies: bool) -> Path:
    """The base with one matrix for embedding and output layer, which lies in its file once or twice."""
    shutil.copytree(base, folder)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    del tensors["lm_head.weight"]
    if copies:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["whole", "tokens, head whole"])
def test_what_was_trained_whole_beside_a_quantized_base(half: Path, tmp_path: Path, kind: str) -> None:
    """In the dtype of the base's file, rounded once; both candidates have the same of it."""
    options = WHOLE[kind]
    model = fill_adapter(make_model(half, quantization="nf4", options=options, dtype=torch.bfloat16)).eval()
    tensors = [
        load_file(merged(model, half, onto, tmp_path / onto, options.added_tokens) / "model.safetensors")
        for onto in (ORIGINAL, DEQUANTIZED)
    ]
    trained = model.get_base_model().lm_head.modules_to_save["default"].weight.detach()
    for found in tensors:
        assert torch.equal(found["lm_head.weight"], trained.bfloat16())
        assert torch.equal(found["model.embed_tokens.weight"], tensors[0]["model.embed_tokens.weight"])
    rows = tensors[0]["model.embed_tokens.weight"]
    assert rows.shape[0] == VOCABULARY + len(options.added_tokens)
    same = torch.equal(rows[:VOCABULARY], load_file(half / "model.safetensors")["model.embed_tokens.weight"])
    assert same == bool(options.added_tokens)


def test_biases_of_the_base_are_kept(base: Path, tmp_path: Path) -> None:
    """Layers with a bias, as Qwen's: the adapter changes the weight alone, DoRA's too; PEFT's bits."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=VOCABULARY, num_hidden_layers=1, **shape)
    filled = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in filled.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    filled.save_pretrained(tmp_path / "base")
    for path in base.glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "base" / path.name)
    for kind in ("plain", "dora"):
        model = fill_adapter(make_model(tmp_path / "base", options=OPTIONS[kind])).eval()
        with_adapter = logits(model)
        folder = merged(model, tmp_path / "base", ORIGINAL, tmp_path / kind)
        expected = model.merge_and_unload().state_dict()
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in plain.state_dict().items())
        torch.testing.assert_close(logits(plain), with_adapter, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["plain", "dora", "adalora"])
def test_merged_onto_what_it_was_trained_on(half: Path, tmp_path: Path, kind: str) -> None:
    """Merged onto the dequantized weights the model computes what base and adapter do, up to rounding; else not."""
    model = fill_adapter(make_model(half, quantization="nf4", options=OPTIONS[kind])).eval()
    with_adapter = logits(model)
    for onto in (ORIGINAL, DEQUANTIZED):
        merged(model, half, onto, tmp_path / onto)
    gaps = {}
    for onto in (ORIGINAL, DEQUANTIZED):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / onto, dtype=torch.float32)
        gaps[onto] = (logits(plain) - with_adapter).abs().mean().item()
    assert gaps[DEQUANTIZED] < gaps[ORIGINAL] / 4
    one, two = (load_file(tmp_path / onto / "model.safetensors") for onto in (ORIGINAL, DEQUANTIZED))
    assert {tensor.dtype for tensor in (one | two).values()} == {torch.bfloat16}
    source = load_file(half / "model.safetensors")
    same = {name for name in source if torch.equal(one[name], source[name]) and torch.equal(two[name], source[name])}
    assert same == {name for name in source if name.split(".")[-2] not in LINEAR}


def test_layers_without_an_adapter_are_dequantized_too(half: Path, tmp_path: Path) -> None:
    """Where attention alone is adapted, the rest of the quantized base is what training computed with, bit for bit."""
    model = load_plain(half, quantization="nf4", dtype=torch.bfloat16)
    how: dict[str, Any] = {"rank": 4, "alpha": 8, "dropout": 0.0, "seed": 0}
    model = fill_adapter(add_adapter(model, target_modules="attention", **how))
    found = load_file(merged(model, half, DEQUANTIZED, tmp_path / "merged") / "model.safetensors")
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    assert torch.equal(found["model.layers.1.mlp.down_proj.weight"], dequantized(layer, torch.bfloat16))


def test_a_base_that_is_published_quantized(half: Path, tmp_path: Path) -> None:
    """There are no original weights then: it is merged onto the dequantized ones, into a plain 16-bit checkpoint."""
    how: dict[str, Any] = {"quantization": "nf4", "dtype": torch.bfloat16}
    quantized = load_plain(half, **how)
    quantized.save_pretrained(tmp_path / "base")
    for path in half.glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "base" / path.name)
    model = fill_adapter(make_model(tmp_path / "base"))
    found = candidates(model, tmp_path / "base", "best")
    assert (found.names, found.only) == ((DEQUANTIZED,), "the base is only published quantized")
    with pytest.raises(
        SettingsError, match="JOB_EXPORT__MERGE_ONTO: is original, but the base is only published quantized"
    ):
        candidates(model, tmp_path / "base", ORIGINAL)
    folder = merged(model, tmp_path / "base", DEQUANTIZED, tmp_path / "merged")
    adapter: dict[str, Any] = {"rank": 16, "alpha": 16, "dropout": 0.0, "target_modules": LINEAR, "seed": 1}
    other = fill_adapter(add_adapter(load_plain(half, **how), **adapter))
    expected = load_file(merged(other, half, DEQUANTIZED, tmp_path / "other") / "model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_gpt2_holds_its_weights_the_other_way(base: Path, tmp_path: Path) -> None:
    """`Conv1D` of GPT-2 lies as (inputs, outputs) in the file: quantized or not, the merge finds its way."""
    source = tmp_path / "base"
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(bos_token_id=0, eos_token_id=1, vocab_size=400, n_embd=64, n_layer=1, n_head=2, n_positions=512)
    ).save_pretrained(source)
    for path in base.glob("tokenizer*"):
        shutil.copyfile(path, source / path.name)
    for quantization in ("none", "nf4"):
        model = load_plain(source, quantization=quantization)
        how: dict[str, Any] = {"rank": 4, "alpha": 8, "dropout": 0.0, "seed": 0}
        model = fill_adapter(add_adapter(model, target_modules=["c_attn", "c_fc"], **how)).eval()
        with_adapter, onto = logits(model), ORIGINAL if quantization == "none" else DEQUANTIZED
        folder = merged(model, source, onto, tmp_path / quantization)
        plain = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(plain), with_adapter, rtol=1e-4, atol=2e-4)


def test_the_files_are_those_of_a_plain_model(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards with an index, a configuration without quantization, the tokenizer byte for byte: twice the same bytes."""
    monkeypatch.setattr(tensor_files, "SHARD", 100_000)
    source = tmp_path / "base"
    shutil.copytree(half, source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/me/base", "torch_dtype": "x"}))
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype"] = "float32"
    (source / "config.json").write_text(json.dumps(config))
    model = fill_adapter(make_model(source, quantization="nf4"))
    one, two = (merged(model, source, DEQUANTIZED, tmp_path / name) for name in ("one", "two"))
    names = sorted(path.name for path in one.iterdir())
    assert hash_files([one / name for name in names]) == hash_files([two / name for name in names])
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 3
    index = json.loads((one / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    for name, file in index["weight_map"].items():
        with safe_open(one / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - no mapping
    written = json.loads((one / "config.json").read_text())
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert not {"quantization_config", "_name_or_path", "auto_map"} & written.keys()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (one / name).read_bytes() == (source / name).read_bytes()
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(one), AutoTokenizer.from_pretrained(one)
    assert plain.dtype == torch.bfloat16
    assert tokenizer.get_chat_template() == "{{ messages }}"


def test_what_cannot_be_merged_is_refused_before_training(half: Path, tmp_path: Path) -> None:
    """A weight that two modules share, one that the files lack, and a setting of the merge without effect."""
    model = make_model(half)
    assert candidates(model, half, "best").only == "no weight of the base is quantized"
    with pytest.raises(SettingsError, match="JOB_EXPORT__MERGE_ONTO: is dequantized, but no weight of the base is"):
        candidates(model, half, DEQUANTIZED)
    tied = _tied(half, tmp_path / "tied", copies=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT and transformers, of what they would do with it
        adapted_head = get_peft_model(load_plain(tied), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(
        SettingsError, match=r"the weight of lm_head is shared with another module, .* JOB_LORA__TARGET"
    ):
        candidates(adapted_head, tied, "best")
    lacking = tmp_path / "lacking"
    shutil.copytree(half, lacking)
    tensors = load_file(half / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.packed"] = tensors.pop("model.layers.0.mlp.gate_proj.weight")
    save_file(tensors, lacking / "model.safetensors")
    with pytest.raises(SettingsError, match=r"the weight of model.layers.0.mlp.gate_proj is not one tensor"):
        candidates(model, lacking, "best")


def test_a_merge_that_overflows_is_refused(half: Path, tmp_path: Path) -> None:
    """Numbers beyond the base's dtype would be published as infinity."""
    model = make_model(half)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.fill_(1e30)
    with pytest.raises(TrainingFailed, match="are not finite in bf16"):
        merged(model, half, ORIGINAL, tmp_path / "merged")


def test_a_model_that_is_given_up_holds_no_memory(half: Path) -> None:
    """The exported model is loaded where the other one was, though others still hold references to that."""
    model = make_model(half, quantization="nf4")
    free_model(model)
    assert sum(tensor.untyped_storage().nbytes() for tensor in (*model.parameters(), *model.buffers())) == 0


def test_the_table_and_the_setting_name_the_same() -> None:
    """JOB_EXPORT__FORMATS offers exactly the formats that there are."""
    assert ("merged", "adapter", *DERIVED) == tuple(EXPORT_FORMATS)


@pytest.mark.long
def test_memory_of_a_merge(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of many files, the peak is one file in fp32 and one in its own dtype, not the model."""
    shard = 16_000_000
    monkeypatch.setattr(tensor_files, "SHARD", shard)
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = MistralConfig(vocab_size=400, num_hidden_layers=8, tie_word_embeddings=True, **shape)
    source = tmp_path / "base"
    MistralForCausalLM(config).to(torch.bfloat16).save_pretrained(source, max_shard_size=shard)
    for path in base.glob("tokenizer*"):
        shutil.copyfile(path, source / path.name)
    model = fill_adapter(make_model(source, quantization="nf4"))
    plan, tokenizer = plan_merge(model, source), load_tokenizer(source)
    before, seen, ended = _anonymous_bytes(), [0], Event()

    def watch() -> None:
        while not ended.wait(0.001):
            seen.append(_anonymous_bytes())

    watcher = Thread(target=watch)
    watcher.start()
    try:
        write_merged(model, plan, DEQUANTIZED, tmp_path / "merged", tokenizer=tokenizer)
    finally:
        ended.set()
        watcher.join()
    peak = max(seen) - before
    print(f"model {plan.bytes / 1e6:.0f} MB, files of up to {shard / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) >= 4
    assert 0 < peak <= 3 * shard < plan.bytes


def _anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
