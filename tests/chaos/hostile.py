"""`make hostile`: model folders and chat templates as somebody would make them who means harm, or whose disk is full.

What is demanded of every one: the job ends within `SECONDS` with a code of the table that says why, without a
traceback, without running code of the folder, and within `MEMORY_BYTES`. Where what is hostile is left out by the job
(`auto_map`), it may also end with 0.

To add one: an entry in `_configs`, `_weights`, `_tokenizers` or `TEMPLATES`.
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
from dataclasses import dataclass
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
    """How the job ended: its code (None: it did not), seconds, the broken promise, and the last line of its log."""

    name: str
    code: int | None
    seconds: float
    broken: str | None
    last: str


class _Code:
    """Pickled, it runs a command when it is read."""

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
    """The weights go where an index names them."""
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
    }


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
    "nests": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


def cases(folder: Path) -> dict[str, Change]:
    """Name -> what makes a copy of the tiny base hostile; all canaries are one file, `folder / "canary"`."""
    canary = folder / "canary"
    templates = {
        f"template: {name}": partial(
            _write, name="chat_template.jinja", data=text.replace("CANARY", str(canary)).encode()
        )
        for name, text in TEMPLATES.items()
    }
    return {**_configs(canary), **_weights(canary), **_tokenizers(canary), **templates}


IGNORED = {
    "config: code for a known family",
    "config: dtype os.system",
    "config: attention of a stranger",
    "config: positions 1e15",
    "config: padding -5",
    "tokenizer: code",
    "tokenizer: class of a stranger",
}
"""What the job leaves out of what it loads, so that it may also go on."""


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
    known = cases(folder)
    warm.run(["--version"], environment)  # the server's imports are not on the first case's time
    for name in names:
        model = folder / "models" / "model"
        shutil.rmtree(folder / "models", ignore_errors=True)
        shutil.copytree(folder / "base", model)
        known[name](model)
        yield _run(name, folder, {**environment, "JOB_MODEL__ID": str(model)}, seconds)


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
    elif code not in CODES | ({0} if name in IGNORED else set()):
        broken = f"ended with {code}"
    elif "Traceback" in text or "a bug:" in text:
        broken = "ended with a traceback"
    if canary.exists():
        canary.unlink()
        broken = "ran code of the folder"
    said = [line for line in text.splitlines() if '"error"' in line] or text.splitlines() or [""]
    return Outcome(name, code, took, broken, said[-1])


def main() -> int:
    """Tries all of them and prints how each ended; exit code 1 if a promise was broken."""
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
