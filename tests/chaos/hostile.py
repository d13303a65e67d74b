"""`make hostile`: malicious model folders and chat templates, and folders as a full disk leaves them.

With each of them the job must end within `SECONDS` and `MEMORY_BYTES`, with a code of the table and the reason, without
a traceback, and without running code of the folder. If the job ignores the malicious part (`auto_map`), it may also end
with 0 and the adapter of the original base, byte for byte.

To add one: an entry in `_configs`, `_weights`, `_tokenizers`, `_files` or `TEMPLATES`.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import warm
from tests.helpers import arc_rows, make_base, write_jsonl

SECONDS = 30
MEMORY_BYTES = 4 << 30
CODES = {2, 65, 69, 70, 77}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Change = Callable[[Path], Any]


@dataclass(frozen=True)
class Outcome:
    """How the job ended: its code (None: it did not end), seconds, the violated requirement, its log's last line."""

    name: str
    code: int | None
    seconds: float
    broken: str | None
    last: str


class _Code:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def _set(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**found, **values}), encoding="utf-8")


def _write(folder: Path, name: str, data: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def _index(folder: Path, name: str, place: str | None = None) -> None:
    """Puts the weights at the path in an index."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="np") as file:
        names = list(file.keys())
    target = folder / (place or name)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder / WEIGHTS, target)
    _write(folder, INDEX, json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}).encode())


def _tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.numpy import load_file, save_file

    found = load_file(folder / WEIGHTS)
    change(found)
    save_file(found, folder / WEIGHTS, {"format": "pt"})


def _fill(tensors: dict[str, Any], value: float) -> None:
    for tensor in tensors.values():
        tensor.reshape(-1)[:1] = value


def _drop(tensors: dict[str, Any]) -> None:
    del tensors[next(name for name in tensors if "q_proj" in name)]


def _reshape(tensors: dict[str, Any]) -> None:
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = tensors[name][:5].copy()


def _pickled(folder: Path, canary: Path, name: str = "pytorch_model.bin", *, alone: bool = True) -> None:
    _write(folder, name, pickle.dumps(_Code(canary)))
    if alone:
        (folder / WEIGHTS).unlink()


def _auto_map(folder: Path, canary: Path, kind: str = "mistral") -> None:
    _write(folder, "modeling_own.py", f"import os\nos.system('touch {canary}')\n".encode())
    names = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    _set(folder, auto_map=names, model_type=kind)


def _no_file(folder: Path, name: str, kind: str) -> None:
    """Something that looks like a file of the model, but is none, or never ends."""
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "itself" else kind)


def _header(folder: Path, change: Callable[[dict[str, Any]], Any], behind: bytes = b"") -> None:
    """Replaces the header of the weights."""
    data = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    _write(folder, WEIGHTS, struct.pack("<Q", len(text)) + text + data[8 + size :] + behind)


def _entry(header: dict[str, Any], **values: Any) -> None:
    header[next(name for name in header if "q_proj" in name)].update(values)


def _tokenizer(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    change(found)
    path.write_text(json.dumps(found), encoding="utf-8")


def _many_files(folder: Path) -> None:
    for number in range(20_000):
        (folder / f"{number}.json").write_bytes(b"{}")


def _cut(folder: Path, size: int, name: str = WEIGHTS) -> None:
    os.truncate(folder / name, size)


def _configs(canary: Path) -> Mapping[str, Change]:
    raw = {
        "a list": b"[]",
        "a string": b'"mistral"',
        "null": b"null",
        "a number": b"1e999",
        "empty": b"",
        "no UTF-8": b"\xff\xfe{}",
        "nested": b"[" * 200_000,
        "an object of lists": b'{"model_type": ' + b"[" * 50_000,
        "300 MB": b"{" + b" " * (300 << 20) + b"}",
    }
    values: Mapping[str, dict[str, Any]] = {
        "layers 1e12": {"num_hidden_layers": 10**12},
        "layers -1": {"num_hidden_layers": -1},
        "layers of text": {"num_hidden_layers": "two"},
        "layers NaN": {"num_hidden_layers": float("nan")},
        "heads 0": {"num_attention_heads": 0},
        "key-value heads 0": {"num_key_value_heads": 0},
        "head_dim 1e9": {"head_dim": 10**9},
        "hidden size 1e9": {"hidden_size": 10**9},
        "intermediate size 1e12": {"intermediate_size": 10**12},
        "vocabulary 1e12": {"vocab_size": 10**12},
        "vocabulary 3": {"vocab_size": 3},
        "positions 1e15": {"max_position_embeddings": 10**15},
        "dtype os.system": {"dtype": "os.system", "torch_dtype": "os.system"},
        "another family": {"model_type": "gpt2"},
        "no family": {"model_type": "nothing-of-the-kind"},
        "family of text": {"model_type": {"a": 1}},
        "a speech model": {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]},
        "quantized by a stranger": {"quantization_config": {"quant_method": "../../evil"}},
        "quantized by a list": {"quantization_config": [1]},
        "activation os.system": {"hidden_act": "os.system"},
        "rope of lists": {"rope_parameters": [[]], "rope_scaling": [[]]},
        "attention of a stranger": {"_attn_implementation": "evil/kernel", "attn_implementation": "evil/kernel"},
        "padding -5": {"pad_token_id": -5},
        "answers as tuples": {"return_dict": False, "torchscript": True, "use_return_dict": False},
        "answers with all states": {"output_hidden_states": True, "output_attentions": True},
        "numbers are booleans": {"num_hidden_layers": True, "num_attention_heads": True},
        "numbers are fractions": {"num_hidden_layers": 2.0, "hidden_size": 128.5},
        "numbers are lists": {"hidden_size": [128], "vocab_size": {"a": 400}},
        "an epsilon of text": {"rms_norm_eps": "os.system"},
        "an epsilon of NaN": {"rms_norm_eps": float("nan")},
        "rope theta 0": {"rope_theta": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        "rope of no kind": {"rope_parameters": {"rope_type": "../../evil", "rope_theta": 1e4}},
        "rope by a factor of 0": {"rope_parameters": {"rope_type": "linear", "factor": 0, "rope_theta": 1e4}},
        "a window of 0": {"sliding_window": 0},
        "layer types too few": {"layer_types": ["full_attention"], "model_type": "qwen2"},
        "layer types of a stranger": {"layer_types": ["evil", "evil"], "model_type": "qwen2"},
        "itself as its text part": {"text_config": {"model_type": "mistral", "text_config": {"text_config": {}}}},
        "1e7 labels": {"num_labels": 10**7},
        "a plan for tensors": {"base_model_tp_plan": {"*": "os.system"}, "tp_plan": "auto", "device_map": "auto"},
        "heads to prune": {"pruned_heads": {"0": [0, 1, 2, 3]}},
        "bitsandbytes without its weights": {"quantization_config": {"quant_method": "bitsandbytes"}},
        "bitsandbytes of lists": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": [1]}},
        "a gguf file": {"gguf_file": "/etc/passwd"},
        "a name with a path": {"_name_or_path": "../../../etc", "name_or_path": "/etc"},
    }
    return {
        **{f"config: {name}": partial(_write, name="config.json", data=data) for name, data in raw.items()},
        **{f"config: {name}": partial(_set, **given) for name, given in values.items()},
        "config: is missing": lambda folder: (folder / "config.json").unlink(),
        "config: code for a known family": partial(_auto_map, canary=canary),
        "config: code for an unknown family": partial(_auto_map, canary=canary, kind="own"),
    }


def _weights(canary: Path) -> Mapping[str, Change]:
    return {
        "weights: none": lambda folder: (folder / WEIGHTS).unlink(),
        "weights: pickled only": partial(_pickled, canary=canary),
        "weights: pickled under another name": partial(_pickled, canary=canary, name=WEIGHTS, alone=False),
        "weights: index names w.bin": partial(_index, name="w.bin"),
        "weights: index names ../outside": partial(_index, name="../outside.safetensors"),
        "weights: index names sub/x": partial(_index, name="sub/x.safetensors"),
        "weights: index names what is missing": partial(_index, name="a.safetensors", place="b.safetensors"),
        "weights: header of 1e18 bytes": partial(_write, name=WEIGHTS, data=struct.pack("<Q", 10**18) + b"{}"),
        "weights: header of 1e8 bytes": partial(_write, name=WEIGHTS, data=struct.pack("<Q", 10**8) + b"{" * 99),
        "weights: cut in two": lambda folder: _cut(folder, (folder / WEIGHTS).stat().st_size // 2),
        "weights: cut in the header": partial(_cut, size=40),
        "weights: empty": partial(_cut, size=0),
        "weights: a tensor is missing": partial(_tensors, change=_drop),
        "weights: a tensor has another shape": partial(_tensors, change=_reshape),
        "weights: NaN": partial(_tensors, change=partial(_fill, value=float("nan"))),
        "weights: overlapping tensors": partial(_header, change=partial(_entry, data_offsets=[0, 65536])),
        "weights: backwards": partial(_header, change=partial(_entry, data_offsets=[65536, 0])),
        "weights: beyond the end": partial(_header, change=partial(_entry, data_offsets=[0, 10**15])),
        "weights: a shape of 2^64": partial(_header, change=partial(_entry, shape=[2**32, 2**32])),
        "weights: a type of a stranger": partial(_header, change=partial(_entry, dtype="OS")),
        "weights: bytes behind the end": partial(_header, change=len, behind=bytes(1000)),
        "weights: nested metadata": partial(_header, change=lambda header: header.update(__metadata__={"a": ["b"]})),
        "weights: integers": partial(_tensors, change=_integers),
        "weights: index is a number": partial(_raw_index, data=b"1"),
        "weights: index nested": partial(_raw_index, data=b"[" * 200_000),
        "weights: index names /etc/passwd": partial(_raw_index, data=b'{"weight_map": {"a": "/etc/passwd"}}'),
        "weights: infinite": partial(_tensors, change=partial(_fill, value=float("inf"))),
    }


def _tokenizers(canary: Path) -> Mapping[str, Change]:
    write = partial(partial, _write, name="tokenizer.json")
    return {
        "tokenizer: broken": write(data=b'{"model": '),
        "tokenizer: a list": write(data=b"[]"),
        "tokenizer: nested": write(data=b"[" * 200_000),
        "tokenizer: 300 MB": write(data=b"{" + b" " * (300 << 20) + b"}"),
        "tokenizer: is missing": lambda folder: (folder / "tokenizer.json").unlink(),
        "tokenizer: class of a stranger": partial(_set, name="tokenizer_config.json", tokenizer_class="os.system"),
        "tokenizer: code": partial(
            _set, name="tokenizer_config.json", auto_map={"AutoTokenizer": [f"os.system('touch {canary}')", None]}
        ),
        **{f"tokenizer: {name}": partial(_tokenizer, change=change) for name, change in _TOKENIZER.items()},
        **{
            f"tokenizer: {name}": partial(_set, name="tokenizer_config.json", **values)
            for name, values in _TOKENIZER_CONFIG.items()
        },
        "tokenizer: special tokens of a list": partial(_write, name="special_tokens_map.json", data=b"[]"),
        "tokenizer: added tokens of a number": partial(_write, name="added_tokens.json", data=b"7"),
    }


_TOKENIZER: Mapping[str, Change] = {
    "cuts each text": lambda found: found.update(
        truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    ),
    "pads to 1e9": lambda found: found.update(
        padding={
            "strategy": {"Fixed": 10**9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 2,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        }
    ),
    "draws its tokens": lambda found: found["model"].update(dropout=0.5),
    "number 1e9": lambda found: found["model"]["vocab"].update(evil=10**9),
    "number -1": lambda found: found["model"]["vocab"].update(evil=-1),
    "no words": lambda found: found["model"].update(vocab={}, merges=[]),
    "merges of nothing": lambda found: found["model"].update(merges=[["evil", "er"]]),
    "a slow pattern": lambda found: found.update(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(([a-zA-Z .]+)+)+#"},
            "behavior": "Isolated",
            "invert": False,
        }
    ),
    "replaces nothing": lambda found: found.update(
        normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x" * 10**5}
    ),
    "special tokens beyond the model": lambda found: found["post_processor"].update(
        special_tokens={"<s>": {"id": "<s>", "ids": [10**6], "tokens": ["<s>"]}}
    ),
    "is empty of all": lambda found: found.clear(),
}
_TOKENIZER_CONFIG: Mapping[str, dict[str, Any]] = {
    "an end that is no token": {"eos_token": "there is no such token"},
    "an end that is a list": {"eos_token": ["</s>"]},
    "an end that is an object": {"eos_token": {"a": 1}},
    "no end": {"eos_token": None},
    "at most 1 token": {"model_max_length": 1},
    "at most 1e400 tokens": {"model_max_length": float("inf")},
    "templates by a number": {"chat_template": 5},
    "templates by a list of lists": {"chat_template": [["default", "{{ 1 }}"]]},
    "inputs of a stranger": {"model_input_names": ["evil"], "padding_side": "up"},
    "extra tokens of numbers": {"extra_special_tokens": {"evil": 7}, "additional_special_tokens": [7]},
}


def _integers(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.astype("int64")


def _raw_index(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS).unlink()
    _write(folder, INDEX, data)


def _files(canary: Path) -> Mapping[str, Change]:
    names = ("config.json", "tokenizer.json", WEIGHTS, "chat_template.jinja", "generation_config.json")
    return {
        **{f"files: {name} is a {kind}": partial(_no_file, name=name, kind=kind) for name in names for kind in KINDS},
        **{f"files: {name} without end": partial(_no_file, name=name, kind="/dev/zero") for name in names},
        "files: generation_config.json a list": partial(_write, name="generation_config.json", data=b"[]"),
        "files: generation_config.json ends at os": partial(
            _set, name="generation_config.json", eos_token_id="os.system", max_length=-1
        ),
        "files: generation_config.json nested": partial(_write, name="generation_config.json", data=b"[" * 99_999),
        "files: a template in no encoding": partial(_write, name="chat_template.jinja", data=b"\xff\xfe{{ 1 }}"),
        "files: 300 MB of template": partial(_write, name="chat_template.jinja", data=b"x" * (300 << 20)),
        "files: a pickle beside the weights": partial(_pickled, canary=canary, alone=False),
        "files: 20,000": _many_files,
        "files: a folder of templates": partial(_write, name="additional_chat_templates/../x.jinja", data=b"{{ 1 }}"),
    }


KINDS = ("pipe", "folder", "itself")


TEMPLATES = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "ranges": "{% for a in range(10**15) %}x{% endfor %}",
    "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "divides by zero": "{{ 1 / 0 }}",
    "raises": "{{ raise_exception('no') }}",
    "builds gigabytes": "{{ 'x' * 10**11 }}",
    "doubles": "{% set n = namespace(t='x') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a wide format": "{{ '%99999999999d' % 1 }}",
    "imports os": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "imports os by a name": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "imports os by a filter": "{{ ''|attr('__class__')|attr('__mro__')|last|attr('__subclasses__')() }}",
    "includes a file": "{% include '/etc/passwd' %}",
    "is no template": "{% for %}",
    "writes nothing": "",
    "appends without end": "{% set l = [] %}{% for i in range(10**5) %}{{ l.append('x' * 10**5) or '' }}{% endfor %}",
    "a list of gigabytes": "{{ ([0] * 10**10)|length }}",
    "centers": "{{ 'x'|center(10**11) }}",
    "indents": "{{ messages|tojson(indent=10**10) }}",
    "replaces": "{{ ('x' * 10**6)|replace('x', 'y' * 10**6) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "draws": "{{ range(10**5)|random }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}",
    "walks itself": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "changes the rows": "{{ messages.clear() }}{{ messages.append(messages) }}{{ messages[0].update(content='x') }}",
    "a format of attributes": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "a date without end": "{{ strftime_now('%Y' * 10**8) }}",
    "writes no text": "{{ messages[0].content.encode('utf-8') }}{{ '\\ud800' }}{{ eos_token }}",
    "sums": "{{ range(10**12)|sum }}",
    "sorts": "{{ (range(10**8)|list + range(10**8)|list)|sort|last }}",
    "a join of joins": "{{ (['x' * 10**6] * 10**6)|join('y' * 10**6) }}",
    "many macros": "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}",
    "nests": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


def cases(folder: Path) -> dict[str, Change]:
    """Name -> what makes a copy of the tiny base hostile; code that runs would create `folder / "canary"`."""
    canary = folder / "canary"
    templates = {
        f"template: {name}": partial(
            _write, name="chat_template.jinja", data=text.replace("CANARY", str(canary)).encode()
        )
        for name, text in TEMPLATES.items()
    }
    return {**_configs(canary), **_weights(canary), **_tokenizers(canary), **_files(canary), **templates}


IGNORED = {
    "config: code for a known family",
    "config: dtype os.system",
    "config: attention of a stranger",
    "config: positions 1e15",
    "config: padding -5",
    "config: answers with all states",
    "config: a plan for tensors",
    "config: heads to prune",
    "config: bitsandbytes without its weights",
    "config: a gguf file",
    "config: a name with a path",
    "tokenizer: code",
    "tokenizer: class of a stranger",
    "tokenizer: cuts each text",
    "tokenizer: pads to 1e9",
    "tokenizer: draws its tokens",
    "tokenizer: number 1e9",
    "tokenizer: at most 1 token",
    "tokenizer: at most 1e400 tokens",
    "tokenizer: templates by a number",
    "tokenizer: templates by a list of lists",
    "files: generation_config.json is a folder",
    "files: generation_config.json ends at os",
    "files: a pickle beside the weights",
    "files: 20,000",
    "files: a folder of templates",
}
"""Cases whose malicious part the job ignores, so that it may also end with 0."""
OTHER_ADAPTER = {
    "tokenizer: a slow pattern",
    "tokenizer: an end that is no token",
    "template: draws",  # always the same, see `template_process`
    "weights: integers",  # numbers are converted to the dtype of the run
}
"""Cases that give another valid tokenizer, text or model: the job may end with 0 and another adapter."""
PLAIN = "the base as it was"


def prepare(folder: Path) -> dict[str, str]:
    """Writes the base and the data; returns the environment of a run on them."""
    (folder / "base").mkdir()
    make_base(folder / "base")
    said = [[{"role": "user", "content": f"Add {n}."}, {"role": "assistant", "content": f"{n}"}] for n in range(8)]
    write_jsonl(folder / "chat.jsonl", ({"messages": messages} for messages in said))
    write_jsonl(folder / "questions.jsonl", arc_rows(4))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    _write(folder / "base", "chat_template.jinja", template.encode())
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("JOB_")},
        "JOB_RUN__SPOT_NOTICES": "off",
        "JOB_DATA__SOURCE": str(folder / "chat.jsonl"),
        "JOB_EVAL__DATA": f"arc_easy={folder / 'questions.jsonl'}",
        "JOB_TRAIN__MAX_STEPS": "1",
        "JOB_TRAIN__GLOBAL_BATCH_SIZE": "4",
        "JOB_TRAIN__MAX_LENGTH": "256",
        "JOB_LOG__FORMAT": "json",
        "JOB_STORAGE__RETRIES": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }


def explore(
    folder: Path, environment: Mapping[str, str], names: Sequence[str], seconds: float = SECONDS
) -> Iterator[Outcome]:
    """Runs the job on each of the named cases."""
    known = {PLAIN: str, **cases(folder)}
    warm.run(["--version"], environment)  # so that the first case does not include the server's imports
    if IGNORED & set(names):
        names = [PLAIN, *names]
    right: bytes | None = None
    for name in names:
        model = folder / "models" / "model"
        shutil.rmtree(folder / "models", ignore_errors=True)
        shutil.copytree(folder / "base", model)
        known[name](model)
        outcome = _run(name, folder, {**environment, "JOB_MODEL__ID": str(model)}, seconds)
        if name == PLAIN:
            right = _adapter(folder)
        elif outcome.code == 0 and name in IGNORED and outcome.broken is None and _adapter(folder) != right:
            yield replace(outcome, broken="published another adapter")
        else:
            yield outcome


def _adapter(folder: Path) -> bytes:
    return (folder / "out" / "run" / "artifacts" / "adapter" / "adapter_model.safetensors").read_bytes()


def _run(name: str, folder: Path, environment: Mapping[str, str], seconds: float) -> Outcome:
    log, canary = folder / "log", folder / "canary"
    log.write_text("")
    shutil.rmtree(folder / "out", ignore_errors=True)
    began = time.monotonic()
    given = {**environment, "JOB_RUN__OUTPUT": str(folder / "out"), "JOB_RUN__ID": "run"}
    process = warm.Processes([warm.Member([], given, log, log, memory=MEMORY_BYTES)])
    code: int | None = None
    with suppress(TimeoutError):
        (code,) = process.wait(seconds)
    took = time.monotonic() - began
    text = log.read_text(encoding="utf-8", errors="replace")
    broken = None
    if code is None:
        broken = f"did not end within {seconds} s"
    elif code not in CODES | ({0} if name in {PLAIN} | IGNORED | OTHER_ADAPTER else set()):
        broken = f"ended with {code}"
    elif "Traceback" in text or "a bug:" in text:
        broken = "ended with a traceback"
    if canary.exists():
        canary.unlink()
        broken = "ran code of the folder"
    said = [line for line in text.splitlines() if '"error"' in line] or text.splitlines() or [""]
    return Outcome(name, code, took, broken, said[-1])


def main() -> int:
    """Tries all of them and prints how each ended; exit code 1 if a requirement was violated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qlora-job-hostile-") as name:
        folder = Path(name)
        environment = prepare(folder)
        names = [name for name in cases(folder) if chosen.only in name][chosen.first :]
        outcomes, began = [], time.monotonic()
        for outcome in explore(folder, environment, names):
            outcomes.append(outcome)
            end = "BROKEN" if outcome.broken else "exit"
            print(
                f"{end:<7}{outcome.code!s:<5}{outcome.seconds:5.1f} s  {outcome.name}  {outcome.broken or ''}",
                flush=True,
            )
            print(f"       {outcome.last[-3000 if outcome.broken else -400 :]}", flush=True)
            if time.monotonic() - began > 60 * chosen.minutes:
                break
    ends = Counter("broken" if outcome.broken else f"exit {outcome.code}" for outcome in outcomes)
    print(f"{len(outcomes)} hostile models: {', '.join(f'{n} x {end}' for end, n in sorted(ends.items()))}")
    return 1 if any(outcome.broken for outcome in outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
