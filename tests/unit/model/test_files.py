"""Which files of a model's folder are loaded, and what is refused before that."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from job.errors import DataError, JobError, SettingsError
from job.model.files import MAX_CONFIG_BYTES, fingerprint, read_config, readable, silence, weight_files
from job.model.load_base import load_base
from job.model.loading_errors import is_of_files
from job.model.tokenizer import load_tokenizer
from tests.families.models import make_model as make_mixture

CPU = torch.device("cpu")


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(base_folder, tmp_path / "model"))


def load(folder: Path, quantization: str = "none") -> Any:
    """The base as the job loads it, without quantization."""
    return load_base(
        folder, quantization=quantization, double_quantization=False, dtype=torch.float32, device=CPU, max_length=64
    )


def change(folder: Path, **values: Any) -> None:
    """Sets keys of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def shard(folder: Path, name: str) -> None:
    """Gives the only file of weights another name, and an index that names it."""
    names = list(_header(folder / "model.safetensors"))
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").rename(target)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    found: dict[str, Any] = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    found.pop("__metadata__", None)
    return found


@pytest.mark.parametrize("name", ["w.bin", "sub/w.safetensors", "../outside.safetensors", "..", "/tmp/w.safetensors"])
def test_an_index_names_files_of_its_own_folder_only(folder: Path, name: str) -> None:
    """Weights that the fingerprint would not cover, or that are no safetensors, are refused by name."""
    if name not in {"..", "/tmp/w.safetensors"}:
        shard(folder, name)
    else:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    for use in (weight_files, fingerprint, load):
        with pytest.raises(DataError, match="safetensors file in its folder"):
            use(folder)


def test_a_sharded_model_is_loaded_and_hashed_by_its_index(folder: Path) -> None:
    """The shards are what is loaded, and what the fingerprint covers; another file beside them is neither."""
    expected = load(folder).state_dict()
    shard(folder, "part-1.safetensors")
    before = fingerprint(folder)
    (folder / "consolidated.safetensors").write_bytes(b"something else")
    assert fingerprint(folder) == before
    found = load(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with (folder / "part-1.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert fingerprint(folder) != before


@pytest.mark.parametrize("map_", [None, {}, [], {"x": 1}, "text"])
def test_an_index_that_names_nothing_is_refused(folder: Path, map_: Any) -> None:
    """A broken index is said to be one."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": map_}))
    with pytest.raises(DataError, match="lists no weight files"):
        load(folder)


def test_a_missing_tensor_is_not_made_up(folder: Path) -> None:
    """The library would fill it with random numbers and go on."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        DataError, match=r"lacks 1 weights of MistralForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load(folder)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8"])
def test_weights_without_their_scales_are_no_weights(folder: Path, kind: str) -> None:
    """Files of FP8 or int8 whose config.json does not say so would be loaded as if their scales were 1."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors |= {name: tensors[name].to(getattr(torch, kind)), f"{name}_scale": torch.ones(1)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"holds 1 quantized weights, such as model\.layers\.1\.mlp\.up_proj"):
        load(folder)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"num_hidden_layers": 10**12}, DataError, "num_hidden_layers is 1000000000000"),
        ({"num_hidden_layers": 500}, DataError, "describes .* weights, and its files hold"),
        ({"hidden_size": 10**9}, DataError, "hidden_size is 1000000000"),
        ({"hidden_size": 1 << 20}, DataError, "weights, and its files hold"),
        ({"num_attention_heads": 0}, DataError, "num_attention_heads is 0"),
        ({"num_attention_heads": -4}, DataError, "num_attention_heads is -4"),
        ({"num_attention_heads": "four"}, DataError, "does not describe a model"),
        ({"hidden_act": "os.system"}, DataError, "no model can be built"),
        ({"dtype": "os.system"}, SettingsError, "dtype is not a dtype of weights: 'os.system'"),
        ({"torch_dtype": ["float32"]}, SettingsError, "torch_dtype is not a dtype of weights"),
        ({"model_type": "nothing-known"}, DataError, "does not describe a model"),
        ({"model_type": 5}, SettingsError, "without a model_type"),
        ({"model_type": "t5", "is_encoder_decoder": True}, SettingsError, "has an encoder-decoder"),
        ({"model_type": "vit"}, SettingsError, "transformers has no causal language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, SettingsError, "is quantized as gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, SettingsError, "is quantized as awq"),
        ({"quantization_config": {"quant_method": "fp8"}}, SettingsError, "give the original"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, SettingsError, "is quantized as mxfp4"),
        ({"quantization_config": ["x"]}, SettingsError, "is quantized as something unknown"),
        ({"rope_parameters": {"rope_type": "no-such"}}, DataError, "model"),
    ],
)
def test_a_configuration_of_no_model_is_refused_in_words(
    folder: Path, values: dict[str, Any], error: type[JobError], words: str
) -> None:
    """Before anything large is built, with what is wrong; never a traceback, never without end."""
    change(folder, **values)
    with pytest.raises(error, match=words):
        load(folder)


@pytest.mark.parametrize("text", ["[1, 2]", "null", "", "{", "[" * 100_000, '"text"'])
def test_a_configuration_that_is_no_object_is_refused(folder: Path, text: str) -> None:
    """Whatever lies there as config.json."""
    (folder / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config\.json that can be read"):
        load(folder)


def test_a_configuration_too_large_to_be_one_is_not_read(folder: Path) -> None:
    """300 MB of JSON are not parsed to find out that they are no model."""
    with (folder / "config.json").open("r+b") as file:
        file.truncate(MAX_CONFIG_BYTES + 1)
    with pytest.raises(DataError, match="more than"):
        load(folder)


def test_a_template_too_large_to_be_one_is_not_read(folder: Path) -> None:
    """A tokenizer's files have limits of their own, and `num_labels` may not ask for ten million names."""
    with (folder / "chat_template.jinja").open("wb") as file:
        file.truncate(300 << 20)  # without taking the space
    with pytest.raises(DataError, match=r"chat_template.jinja of 314,572,800 bytes"):
        load_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    change(folder, num_labels=10**7)
    with pytest.raises(DataError, match="num_labels is 10000000"):
        load_tokenizer(folder)


def test_an_adapter_is_not_taken_for_a_base(folder: Path) -> None:
    """The library would load the base that adapter_config.json names, from wherever that is."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/tmp/elsewhere"}))
    with pytest.raises(SettingsError, match="has an adapter"):
        load(folder)


def test_keys_that_steer_loading_are_left_out(folder: Path) -> None:
    """How it is computed, in which dtype and by whose code is the job's decision, not the folder's."""
    change(
        folder,
        _attn_implementation="kernels-community/no-such",
        attn_implementation="sdpa",
        auto_map={"AutoConfig": "other/repository--code.Config", "AutoModelForCausalLM": "code.Model"},
        dtype="float64",
        return_dict=False,
        _experts_implementation="no-such",
    )
    model = load(folder)
    assert model.dtype is torch.float32
    assert model(input_ids=torch.tensor([[5, 6, 7]]), **_whole(3)).logits.shape == (1, 3, 400)


def _whole(tokens: int) -> dict[str, Any]:
    from job.model.packed_layout import Segment, build_layout

    return {"layout": build_layout([Segment(0, tokens)], CPU)}


def test_a_base_has_no_dropout_of_its_own(folder: Path, tmp_path: Path) -> None:
    """Neither what its configuration says, nor what its class has as default: the recipe knows LoRA's only."""
    from transformers import GPT2Config, GPT2LMHeadModel

    change(folder, attention_dropout=0.3)
    config = read_config(folder)
    assert config.attention_dropout == 0
    small = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    assert small.resid_pdrop > 0
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "gpt2")
    silence(small)
    assert (small.resid_pdrop, small.attn_pdrop, small.embd_pdrop) == (0, 0, 0)
    model = load(tmp_path / "gpt2")
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_weights_that_are_cut_are_refused(folder: Path) -> None:
    """A download that was cut short is data, not a bug."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="has no model that can be loaded"):
        load(folder)


def _broken(kind: type[BaseException]) -> Any:
    """In place of an operation of torch or bitsandbytes: one that fails by itself, whatever the files hold."""

    def fail(*_: object, **__: object) -> None:
        raise kind("the library is broken")

    return fail


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_an_error_of_bitsandbytes_is_not_the_users_data(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """Exit code 65 would forbid a retry, and full memory has a code of its own. Transformers raises another error."""
    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", _broken(kind))
    with pytest.raises(kind, match="the library is broken"):
        load(folder, quantization="nf4")


@pytest.mark.parametrize(
    ("module", "code", "expected"),
    [
        ("transformers.utils.loading_report", "raise RuntimeError('Error(s) in loading')", True),
        ("transformers.modeling_utils", "torch.zeros(2).view(3)", False),
        ("transformers.integrations.bitsandbytes", "raise RuntimeError('no device is supported')", False),
        ("torch.cuda", "raise RuntimeError('Found no NVIDIA driver on your system')", False),
        ("transformers.modeling_utils", "raise KeyError('weight')", True),
        ("transformers.modeling_utils", "raise NotImplementedError('for this dtype')", True),
    ],
)
def test_what_raises_an_error_says_whether_it_is_of_the_files(module: str, code: str, *, expected: bool) -> None:
    """Transformers itself says what is wrong with them; torch, which it calls, fails for other reasons."""
    names: dict[str, Any] = {"__name__": module, "torch": torch}
    exec(f"def run():\n    {code}", names)
    with pytest.raises((RuntimeError, KeyError)) as raised:
        names["run"]()
    assert is_of_files(raised.value) is expected


def test_full_memory_of_the_machine_is_not_the_users_data() -> None:
    """Torch's allocator for main memory has no class of error for it."""
    with pytest.raises(RuntimeError), readable(Path("/model")):
        torch.empty(1 << 60)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_weights_of_another_shape_are_data(folder: Path, quantization: str) -> None:
    """As config.json describes them; transformers says so by a RuntimeError."""
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name].T.contiguous()}, path, {"format": "pt"})
    with pytest.raises(DataError, match="has no model that can be loaded"):
        load(folder, quantization=quantization)


def test_experts_of_another_shape_are_data(tmp_path: Path) -> None:
    """Transformers stacks them to one tensor, and torch raises the error; the message names them."""
    make_mixture("mixtral", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if ".experts.1." in name)
    save_file({**tensors, name: tensors[name].T.contiguous()}, path, {"format": "pt"})
    with pytest.raises(DataError, match=r"experts.*expects each tensor to be equal size"):
        load(tmp_path, quantization="nf4")
