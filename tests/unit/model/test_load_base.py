"""The model: a frozen quantized base that evaluation does not change, and an adapter that plain PEFT can load."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from job.errors import DataError, SettingsError
from job.evaluation.scoring import score_sequence
from job.model.adapter_files import CONFIG_KEYS, load_adapter, portable_config, save_adapter
from job.model.device import choose_device, choose_dtype
from job.model.files import fingerprint
from job.model.gradient_checkpointing import recompute_activations
from job.model.lora import adapter_off, add_adapter, trainable
from job.model.model_record import describe_model
from job.model.packed_layout import Segment, build_layout
from job.model.quantized_cache.cache import save
from job.model.quantized_cache.layout import entry_at
from job.model.tokenizer import load_tokenizer
from job.model.tokenizer_files import copy_tokenizer, tokenizer_files
from job.records import Question
from tests.helpers import LINEAR, deepened, fill_adapter, load_plain, make_model

CPU = torch.device("cpu")
QUESTIONS = [Question((0, 5, 6, 7), ((8, 9), (10,))), Question((0, 11), ((12,), (13, 14, 15)))]


def base(folder: Path, **changes: Any) -> Any:
    """The tiny base, loaded as the job does."""
    return load_plain(folder, **{"quantization": "nf4", **changes})


def test_mistral_7b_gets_the_parameters_of_the_reference() -> None:
    """Rank 16 on all seven projections of Mistral-7B's architecture is 41,943,040 trainable parameters."""
    from transformers import MistralConfig, MistralForCausalLM

    with torch.device("meta"):
        model = add_adapter(
            MistralForCausalLM(MistralConfig()), rank=16, alpha=16, dropout=0.0, target_modules=LINEAR, seed=0
        )
    record = describe_model(model, name="x", revision=None, sha256="0")
    assert record.trainable_parameters == 41_943_040
    assert record.parameters == 7_241_732_096
    assert record.architecture == "MistralForCausalLM"
    assert record.double_quantization is False


def test_a_quantized_model_is_described_as_what_it_was(base_folder: Path) -> None:
    """Parameters are counted as of the unquantized model; the adapter's are counted apart."""
    records = {
        quantization: describe_model(
            make_model(base_folder, quantization=quantization),
            name="x",
            revision="r",
            sha256="0",
        )
        for quantization in ("nf4", "none")
    }
    assert records["nf4"].parameters == records["none"].parameters
    assert records["nf4"].trainable_parameters == records["none"].trainable_parameters > 0
    assert records["nf4"].double_quantization
    assert records["nf4"].dtype == "fp32"


def test_the_linear_layers_are_really_held_in_nf4(base_folder: Path) -> None:
    """All projections are 4-bit NormalFloat with quantized constants; nothing of the base wants a gradient."""
    from bitsandbytes.nn import Linear4bit

    model = base(base_folder)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 2 * len(LINEAR)
    for layer in layers:
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.weight.dtype is torch.uint8
        assert layer.compute_dtype is torch.float32
    assert not any(
        layer.weight.quant_state.nested
        for layer in base(base_folder, double_quantization=False).modules()
        if isinstance(layer, Linear4bit)
    )


def test_no_layer_repacks_itself_for_inference(base_folder: Path) -> None:
    """No 4-bit layer may repack itself by bitsandbytes for inference only, and none does."""
    model = fill_adapter(make_model(base_folder, quantization="nf4")).eval()
    flags = [
        module.support_avx512bf16_for_cpu for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")
    ]
    assert len(flags) == 2 * len(LINEAR)
    assert not any(flags)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score_sequence(model, QUESTIONS)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_adapter_depends_on_the_seed_alone(base_folder: Path) -> None:
    """The same seed gives the same initial weights whatever was drawn before; another seed gives others."""
    models = []
    for noise, seed in ((1, 7), (2, 7), (1, 8)):
        torch.manual_seed(noise)
        models.append(
            trainable(
                add_adapter(base(base_folder), rank=4, alpha=8, dropout=0.0, target_modules=["q_proj"], seed=seed)
            )
        )
    one, same, other = models
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert {parameter.dtype for parameter in one.values()} == {torch.float32}


def test_a_fresh_adapter_changes_no_answer(base_folder: Path) -> None:
    """Before training the model scores as its base, so what training gains is training's."""
    model = make_model(base_folder, quantization="nf4").eval()
    with adapter_off(model):
        scores = score_sequence(model, QUESTIONS)
    assert score_sequence(model, QUESTIONS) == scores


def test_adapter_off_is_the_base(base_folder: Path) -> None:
    """Within it the model scores as the base without an adapter does, and after it as adapted again."""
    model = fill_adapter(make_model(base_folder, quantization="nf4")).eval()
    adapted = score_sequence(model, QUESTIONS)
    with adapter_off(model):
        scores = score_sequence(model, QUESTIONS)
    assert scores == score_sequence(base(base_folder).eval(), QUESTIONS)
    assert adapted != scores
    assert score_sequence(model, QUESTIONS) == adapted


def test_a_saved_adapter_comes_back_bit_by_bit(base_folder: Path, tmp_path: Path) -> None:
    """Into our model by `load_adapter`, and into a plain one by `PeftModel.from_pretrained`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = fill_adapter(make_model(base_folder))
    save_adapter(model, tmp_path, base="mistralai/Mistral-7B-v0.1", revision="abc")
    again = make_model(base_folder)
    load_adapter(again, tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32), tmp_path)
    for loaded in (again, plain):
        tensors = {name: tensor for name, tensor in loaded.state_dict().items() if "lora" in name}
        expected = trainable(model)
        assert len(tensors) == len(expected)
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert plain.peft_config["default"].base_model_name_or_path == "mistralai/Mistral-7B-v0.1"
    assert plain.peft_config["default"].revision == "abc"
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


PEFT_0_13 = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"),
    *("lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern"),
    *("revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora"),
}
"""Fields of `peft.LoraConfig` in PEFT 0.13.2: what `dataclasses.fields` lists with that release's wheel from PyPI."""


def test_older_releases_of_peft_know_every_key(base_folder: Path, tmp_path: Path) -> None:
    """adapter_config.json has what tools read, and beyond that only what is not as by default, which PEFT gets back."""
    from peft import LoraConfig

    model = make_model(base_folder)
    save_adapter(model, tmp_path, base="org/model", revision="abc")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written.keys() == CONFIG_KEYS
    assert written.keys() <= PEFT_0_13
    assert written["target_modules"] == sorted(LINEAR)
    read = LoraConfig.from_pretrained(tmp_path).to_dict()
    assert read == {**model.peft_config["default"].to_dict(), "inference_mode": True}


def test_what_is_not_as_by_default_is_written() -> None:
    """A key beyond the usual ones is kept where it changes what the adapter computes."""
    from peft import LoraConfig

    config = LoraConfig(target_modules=["b", "a"], rank_pattern={"a": 4}, exclude_modules="x.*").to_dict()
    written = portable_config({**config, "target_modules": ["b", "a"], "peft_version": "0.21.2"})
    assert written.keys() == CONFIG_KEYS | {"rank_pattern", "exclude_modules"}
    assert written["target_modules"] == ["a", "b"]


def test_the_tokenizer_is_published_byte_for_byte(base_folder: Path, tmp_path: Path) -> None:
    """The files are the base's own, known by their names, and the same from its quantized cache."""
    source = Path(shutil.copytree(base_folder, tmp_path / "source"))
    given = {
        "tokenizer_config.json": (source / "tokenizer_config.json").read_bytes().replace(b"{", b"{\n\n", 1),
        "tokenizer.json": (source / "tokenizer.json").read_bytes(),
        "special_tokens_map.json": b'{ "eos_token":"</s>"}',
        "chat_template.jinja": b"{{ messages }}",
        "spiece.model": b"\x00\xff",
        "merges.txt": b"a b\n",
    }
    for name, content in {**given, "README.md": b"x", "notes.json": b"{}", "pytorch_model.bin": b"x"}.items():
        (source / name).write_bytes(content)
    (source / "added_tokens.json").mkdir()
    os.mkfifo(source / "tokenizer.model")
    copy_tokenizer(source, tmp_path / "adapter", None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == given
    load_tokenizer(tmp_path / "adapter")
    shelf = entry_at("key", tmp_path / "cache", None)
    assert save(base(base_folder), source, shelf).key == "key"
    copy_tokenizer(shelf.folder, tmp_path / "again", None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == given


def test_a_vocabulary_in_a_file_of_another_name_is_saved(base_folder: Path, tmp_path: Path) -> None:
    """Of a base with vocab.txt alone the tokenizer is published too: as transformers saves it."""
    tokenizer = load_tokenizer(base_folder)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "vocab.txt").write_text("[UNK]")
    copy_tokenizer(tmp_path / "source", tmp_path / "adapter", tokenizer)
    assert load_tokenizer(tmp_path / "adapter").get_vocab() == tokenizer.get_vocab()


def test_an_end_of_sequence_that_is_no_token_is_a_warning(base_folder: Path, tmp_path: Path) -> None:
    """A token that a tokenizer names and does not have is added to it, with an id that the model has never seen."""
    folder = shutil.copytree(base_folder, tmp_path / "base")
    with structlog.testing.capture_logs() as before:
        load_tokenizer(folder)
    assert before == []
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "</nowhere>"}))
    with structlog.testing.capture_logs() as said:
        load_tokenizer(folder)
    assert ["end-of-sequence token is not in its vocabulary" in line["event"] for line in said] == [True]
    assert said[0]["token"] == "</nowhere>"


def test_weights_that_the_configuration_does_not_name_are_a_warning(base_folder: Path, tmp_path: Path) -> None:
    """Too few layers, and an output layer that is not the embedding although config.json says so."""
    folder = deepened(base_folder, tmp_path / "base", 3)
    with structlog.testing.capture_logs() as before:
        base(folder)
    assert before == []
    config = json.loads((folder / "config.json").read_text())
    for change, words in (({"num_hidden_layers": 2}, "are not used"), ({"tie_word_embeddings": True}, "output layer")):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with structlog.testing.capture_logs() as said:
            base(folder)
        assert [words in line["event"] for line in said] == [True]
        assert said[0].get("weights", 9) == 9


def test_a_link_out_of_the_base_is_not_published(tmp_path: Path) -> None:
    """A folder of the hub's cache consists of links to its blobs; a link to elsewhere is an error about the data."""
    hub = tmp_path / "models--org--model"
    (hub / "blobs").mkdir(parents=True)
    (hub / "blobs" / "abc").write_text("{}")
    snapshot = hub / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "tokenizer.json").symlink_to(hub / "blobs" / "abc")  # the hub's client, with --local-dir
    for folder in (snapshot, tmp_path / "local"):
        assert [path.name for path in tokenizer_files(folder)] == ["tokenizer.json"]
    (tmp_path / "credentials").write_text("secret")
    (snapshot / "chat_template.jinja").symlink_to(tmp_path / "credentials")
    with pytest.raises(DataError, match=r"chat_template\.jinja is a link out of its folder"):
        tokenizer_files(snapshot)


def test_an_adapter_of_another_model_is_refused(base_folder: Path, tmp_path: Path) -> None:
    """An adapter with other layers or another rank is an error, and nothing of it is loaded."""
    model = fill_adapter(make_model(base_folder))
    save_adapter(model, tmp_path, base="x", revision=None)
    ranked = make_model(base_folder, rank=8)
    fewer = add_adapter(base(base_folder), rank=16, alpha=16, dropout=0.0, target_modules=["q_proj"], seed=1)
    for other in (ranked, fewer):
        before = {name: parameter.clone() for name, parameter in trainable(other).items()}
        with pytest.raises(ValueError, match="belongs to another model"):
            load_adapter(other, tmp_path)
        assert all(torch.equal(parameter, before[name]) for name, parameter in trainable(other).items())


def test_layers_that_are_not_there_are_named(base_folder: Path) -> None:
    """All target modules that the model lacks are in the message; the head, which the loss takes as it is, is none."""
    with pytest.raises(SettingsError, match=r"JOB_LORA__TARGET_MODULES: .* no linear nope, lm_head; it has down"):
        add_adapter(
            base(base_folder), rank=4, alpha=4, dropout=0.0, target_modules=["q_proj", "nope", "lm_head"], seed=0
        )


def test_too_few_positions_are_refused_and_a_sliding_window_is_not(base_folder: Path, tmp_path: Path) -> None:
    """A sequence longer than the model has positions is an error of settings; a window only limits what each sees."""
    folder = Path(shutil.copytree(base_folder, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    with pytest.raises(SettingsError, match=r"JOB_TRAIN__MAX_LENGTH: 512 is more than the model's window of 256"):
        base(folder)
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 100}))
    assert base(folder).config.sliding_window == 100


def test_the_device_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that has to be there and is not is an error of settings; one that is not wanted is left alone."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert (choose_device("auto").type, choose_device("cpu").type) == ("cpu", "cpu")
    with pytest.raises(SettingsError, match=r"JOB_RUN__DEVICE"):
        choose_device("gpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    assert [str(choose_device(wanted)) for wanted in ("auto", "gpu", "cpu")] == ["cuda:1", "cuda:1", "cpu"]


def test_the_dtype_is_chosen_by_the_device() -> None:
    """On a CPU `auto` is fp32; what is asked for by name is taken."""
    assert choose_dtype("auto", CPU) is torch.float32
    assert choose_dtype("bf16", CPU) is torch.bfloat16
    assert choose_dtype("fp16", CPU) is torch.float16
    assert choose_dtype("fp32", CPU) is torch.float32


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_computes_in_bf16_where_it_has_it(
    monkeypatch: pytest.MonkeyPatch, *, has_bf16: bool, dtype: torch.dtype
) -> None:
    """`auto` asks for real bf16 units: a P100 or T4, which emulate it, get fp16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation)
    assert choose_dtype("auto", torch.device("cuda")) is dtype


def test_the_fingerprint_covers_weights_configuration_and_tokenizer(base_folder: Path, tmp_path: Path) -> None:
    """Any byte of those files changes it; where the folder lies and other files in it do not."""
    copy = Path(shutil.copytree(base_folder, tmp_path / "copy"))
    assert fingerprint(copy) == fingerprint(base_folder)
    (copy / "README.md").write_text("hello")
    assert fingerprint(copy) == fingerprint(base_folder)
    seen = {fingerprint(base_folder)}
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        content = bytearray((copy / name).read_bytes())
        content[-1] ^= 1
        (copy / name).write_bytes(content)
        seen.add(fingerprint(copy))
    assert len(seen) == 4


def test_a_tokenizer_draws_nothing(base_folder: Path, tmp_path: Path) -> None:
    """Dropout of a tokenizer's merges is switched off: a text has the same tokens in every attempt."""
    shutil.copytree(base_folder, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    found["model"]["dropout"] = 0.9
    path.write_text(json.dumps(found), encoding="utf-8")
    text = "which is the answer of them " * 5
    expected = load_tokenizer(base_folder)(text).input_ids
    tokenizer = load_tokenizer(tmp_path / "base")
    assert [tokenizer(text).input_ids for _ in range(3)] == [expected] * 3


def test_a_tokenizer_without_an_end_is_refused(base_folder: Path, tmp_path: Path) -> None:
    """Nothing could end: said before any training."""
    tokenizer = load_tokenizer(base_folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)


def test_recomputing_asks_no_gradient_of_the_embeddings(base_folder: Path) -> None:
    """A model that adds to its embeddings in place, as BLT does, can be trained with recomputed activations."""
    model = make_model(base_folder)
    recompute_activations(model, on=True)
    embeddings = model.get_base_model().get_input_embeddings()
    embeddings.register_forward_hook(lambda _module, _inputs, output: output.add_(1.0))
    model.train()
    model(input_ids=torch.tensor([[5, 6, 7]]), layout=build_layout([Segment(0, 3)], CPU)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in trainable(model).values())


def written_tokenizer(folder: Path, splits: Any, decoder: Any) -> Path:
    """A BPE tokenizer of few words, in a folder whose architecture has a tokenizer class of its own: Qwen2's."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = splits, decoder
    words = ["It's one of two words, said 2023 men.\n\tx = 650841823 un café 中文"] * 3
    backend.train_from_iterator(words, trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    Qwen2Config().save_pretrained(folder)
    return folder


def test_rules_of_a_class_that_are_not_those_of_the_file_are_said(tmp_path: Path) -> None:
    """A tokenizer.json that transformers does not follow is refused if text is lost, else a warning."""
    import structlog
    from tokenizers import decoders, pre_tokenizers

    with pytest.raises(DataError, match=r"tokenizer\.json: is ignored .* its class Qwen2Tokenizer gives"):
        load_tokenizer(written_tokenizer(tmp_path / "a", pre_tokenizers.Metaspace(), decoders.Metaspace()))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # Qwen2's splits words and digits
    with structlog.testing.capture_logs() as logs:
        load_tokenizer(written_tokenizer(tmp_path / "b", whole, decoders.ByteLevel()))
    (warning,) = (line for line in logs if "tokenizer_class" in line)
    assert warning["tokenizer_class"] == "Qwen2Tokenizer"
    assert len(warning["tokens"]) > len(warning["tokens_of_file"])
