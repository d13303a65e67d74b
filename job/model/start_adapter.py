"""The adapter that training starts from: found, checked without the base's weights, and put into the model.

It has to be a plain LoRA adapter in safetensors, of the rank and scale of the settings: another scale would
change what it computes, and another rank cannot be loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from job.common.hashing import hash_file
from job.errors import DataError, Problem, SettingsError
from job.model.adapter_files import load_adapter
from job.model.adapter_options import AdapterOptions, pattern_matches
from job.model.files import read_json
from job.model.published_names import PublishedNames
from job.model.target_modules import adapted_layers, resolve_targets
from job.model.tensor_names import PREFIX, tensor_files
from job.storage.hub_errors import hub_errors
from job.storage.location import is_remote
from job.storage.open import StorageOptions, fetch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZER = "tokenizer.json"
"""Of an adapter with new tokens; others may lack it."""
MAX_CONFIG_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 256 << 20
_SETTING = "JOB_LORA__START"
_MISFIT = "does not fit JOB_MODEL__ID and JOB_LORA__TARGET_MODULES"
_MATRIX = re.compile(r"\.lora_[AB]\.weight$")
_SAME = {"use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
"""Options of `JOB_LORA__...` by PEFT's names, which have to be the same; absent is as given here."""
_INITS = {True, None, "gaussian", "orthogonal"}
"""Values of `init_lora_weights` that leave the base unchanged; others, such as `pissa`, belong to a changed base."""


@dataclass(frozen=True)
class FoundStart:
    """The folder of an adapter's files, and their commit if they are of the hub."""

    folder: Path
    commit: str | None


def find_start(location: str, folder: Path, storage: StorageOptions, commit: str | None = None) -> FoundStart:
    """The adapter's files, downloaded where they are not local.

    Args:
        location: A path, the URI of a folder in a store, or a hub id, with `@` and a revision behind it or without.
        folder: Where to put what is downloaded from a store.
        storage: Options of the store.
        commit: Commit on the hub, found by the first attempt of a run: a branch, or none, may be at another by now.

    Raises:
        DataError: There is no adapter in safetensors.
        Unreachable, AccessDenied, SettingsError: As the store or the hub says.
    """
    if is_remote(location):
        downloaded = Path(fetch(location.rstrip("/") + "/", folder, storage))
    elif (local := local_start(location)) is not None:
        return FoundStart(local, None)
    else:
        from huggingface_hub import HfApi, snapshot_download

        name, _, revision = location.partition("@")
        with hub_errors(f"adapter {location}"):
            wanted = commit or revision or None
            commit = str(HfApi().resolve_revision(name, repo_type="model", revision=wanted).resolved)
            downloaded = Path(snapshot_download(name, revision=commit, allow_patterns=[CONFIG, WEIGHTS, TOKENIZER]))
        return FoundStart(_with_adapter(downloaded, location), commit)
    return FoundStart(_with_adapter(downloaded, location), None)


def local_start(location: str) -> Path | None:
    """The folder of an adapter that is named by its path; None for a hub id.

    Raises:
        DataError: A path, but not to a folder with an adapter in safetensors.
    """
    if Path(location).is_dir():
        return _with_adapter(Path(location), location)
    if location.startswith((".", "/", "~")) or location.count("/") > 1:
        what = "is not a folder" if Path(location).exists() else "does not exist"
        raise DataError([Problem(_SETTING, f"{location} {what}; give the folder of an adapter, or a hub id")])
    return None


def _with_adapter(folder: Path, location: str) -> Path:
    """The folder, if an adapter's files are in it; else DataError, whose message names it by `location`."""
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        pickled = (folder / "adapter_model.bin").exists()
        what = "; its weights are a pickle, which can run arbitrary code: save it as safetensors" if pickled else ""
        raise DataError([Problem(_SETTING, f"{location} has no {' and no '.join(missing)}{what}")])
    return folder


def hash_start(folder: Path) -> str:
    """SHA-256 over the adapter's configuration and weights."""
    hashes = [hash_file(folder / name) for name in (CONFIG, WEIGHTS)]
    return sha256("\n".join(hashes).encode()).hexdigest()


def check_start(
    folder: Path,
    *,
    rank: int,
    alpha: int,
    options: Mapping[str, Any] | None = None,
    added_tokens: Sequence[str] | None = None,
) -> None:
    """Refuses an adapter that the settings do not fit, or of a kind that is not trained here.

    Args:
        folder: The adapter's files.
        rank: `JOB_LORA__RANK`.
        alpha: `JOB_LORA__ALPHA`.
        options: Other settings of `JOB_LORA__...` by PEFT's names; None for plain LoRA.
        added_tokens: `JOB_MODEL__ADD_TOKENS`.

    Raises:
        DataError: Its files cannot be read.
        SettingsError: It needs other settings, or is of another kind.
    """
    config = read_json(folder / CONFIG, MAX_CONFIG_BYTES, _SETTING)
    problems = [Problem(_SETTING, message) for message in _other_kind(config)]
    ours, theirs = ((said.get("modules_to_save") or []) for said in (options or {}, config))
    if not _same_modules(ours, theirs):
        message = f"is {', '.join(ours) or 'empty'}, but the adapter of {_SETTING} has {', '.join(theirs) or 'none'}"
        problems.append(Problem("JOB_LORA__MODULES_TO_SAVE", f"{message}; set the same"))
    wanted = {"r": rank, "lora_alpha": alpha} | {
        name: (options or {}).get(name, usual) for name, usual in _SAME.items()
    }
    for field, value in wanted.items():
        actual = config.get(field) or _SAME.get(field)
        if actual != (value or _SAME.get(field)):
            name = {"r": "RANK", "lora_alpha": "ALPHA"}.get(field, field.upper())
            message = f"is {value!r}, but the adapter of {_SETTING} has {str(actual)[:100]}; set the same"
            problems.append(Problem(f"JOB_LORA__{name}", message))
    problems += _token_problems(folder, config, added_tokens or (), whole=bool(ours))
    if problems:
        raise SettingsError(problems)
    _check_finite(folder / WEIGHTS)


def check_start_fits(
    folder: Path, empty: Any, *, targets: Sequence[str] | str | None, rank: int, options: AdapterOptions
) -> None:
    """Refuses an adapter that is on other layers than the settings name, or of a base of another shape.

    It needs no weights of the base, and sees less than `load_start`: only the matrices of linear layers, and only of a
    base that readers load as the class that is trained.

    Args:
        folder: The adapter's files.
        empty: The base on the meta device.
        targets: `JOB_LORA__TARGET_MODULES`.
        rank: `JOB_LORA__RANK`.
        options: The adapter's other options.

    Raises:
        SettingsError: It does not fit.
    """
    from safetensors import safe_open

    if type(empty).__name__ not in (empty.config.architectures or []):
        return
    layers = adapted_layers(empty, resolve_targets(empty, targets), options)
    names = tensor_files(empty, layers)
    with safe_open(folder / WEIGHTS, "pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys() if _MATRIX.search(name)}  # noqa: SIM118
    of_experts = {name for name in found if ".experts." in name} if options.experts else set[str]()
    wrong = (found.keys() - of_experts) ^ {file for file in names.values() if file is not None}
    if options.experts and not of_experts:
        wrong |= {"the adapters of experts"}
    for layer in layers:
        wanted = next((r for key, r in options.rank_pattern.items() if pattern_matches(key, layer)), rank)
        height, width = _outputs_and_inputs(empty.get_submodule(layer))
        shapes = {"A": [wanted, width], "B": [height, wanted]}
        filed = {names[f"{PREFIX}{layer}.lora_{matrix}.weight"]: shape for matrix, shape in shapes.items()}
        wrong |= {file for file, shape in filed.items() if file in found and found[file] != shape}
    if wrong:
        what = f"the adapter in {folder} belongs to another model: {', '.join(sorted(wrong)[:5])}"
        raise SettingsError([Problem(_SETTING, f"{_MISFIT}: {what}")])


def _outputs_and_inputs(layer: Any) -> tuple[int, int]:
    """The sizes of a linear layer; GPT-2's `Conv1D` holds its weights transposed."""
    one, two = layer.weight.shape
    return (one, two) if hasattr(layer, "in_features") else (two, one)


def load_start(model: Any, folder: Path, names: PublishedNames) -> None:
    """Puts the adapter into the model.

    Raises:
        SettingsError: It is on other layers, of a base of another shape, or trains rows of other tokens.
    """
    theirs = read_json(folder / CONFIG, MAX_CONFIG_BYTES, _SETTING).get("trainable_token_indices")
    if (theirs or None) != (model.peft_config["default"].trainable_token_indices or None):
        raise SettingsError([_other_tokens(theirs)])
    try:
        load_adapter(model, folder, names)
    except ValueError as error:
        raise SettingsError([Problem(_SETTING, f"{_MISFIT}: {error}")]) from error


def _token_problems(
    folder: Path, config: Mapping[str, Any], added_tokens: Sequence[str], *, whole: bool
) -> Iterator[Problem]:
    """What of the rows that the adapter trains differs from JOB_MODEL__ADD_TOKENS, as far as its own files say.

    Its tokenizer, where it is there, has the tokens by their ids: the same tokens in another order get the same ids,
    and would train on with each other's rows.

    Args:
        folder: The adapter's files.
        config: Its configuration.
        added_tokens: The new tokens.
        whole: Whether modules are trained whole. The embedding may be one of them; then no single rows are trained.
    """
    theirs = config.get("trainable_token_indices")
    if bool(theirs) != bool(added_tokens):
        if theirs or not whole:
            yield _other_tokens(theirs)
        return
    if not theirs or not (folder / TOKENIZER).is_file():
        return
    entries = read_json(folder / TOKENIZER, MAX_TOKENIZER_BYTES, _SETTING).get("added_tokens")
    known = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    names = {str(entry.get("id")): entry.get("content") for entry in known}
    for rows in theirs.values() if isinstance(theirs, dict) else [theirs]:
        trained = [names.get(str(row)) for row in rows] if isinstance(rows, list) else [None]
        if None not in trained and trained != list(added_tokens):
            what = f"it trains the tokens {', '.join(map(str, trained))}; set the same, in this order"
            yield Problem(_SETTING, f"does not fit JOB_MODEL__ADD_TOKENS: {what}")
            return


def _other_tokens(theirs: object) -> Problem:
    rows = f"the rows of {json.dumps(theirs)[:200]}" if theirs else "no rows of new tokens"
    return Problem(_SETTING, f"does not fit JOB_MODEL__ADD_TOKENS: it trains {rows}")


def _same_modules(targets: Sequence[str], adapter_targets: Sequence[str]) -> bool:
    """Whether both name the same modules; an adapter's file may have their full names, or their ends."""
    return all(
        any(a == b or a.endswith(f".{b}") or b.endswith(f".{a}") for b in others)
        for names, others in ((targets, adapter_targets), (adapter_targets, targets))
        for a in names
    )


def _other_kind(config: dict[str, Any]) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield f"is an adapter of the kind {config.get('peft_type')!r}; only LoRA is trained"
    if config.get("bias") not in {None, "none"}:
        yield f"trains biases (bias={json.dumps(config['bias'])[:50]}); only LoRA is trained"
    if (init := config.get("init_lora_weights")) not in _INITS:
        yield f"was initialized by {json.dumps(init)[:50]}, which changes the base; convert it to a plain LoRA adapter"


def _check_finite(path: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise DataError([Problem(_SETTING, f"{path} is no safetensors file: {str(error)[:200]}")]) from error
    if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor.float()).all())]:
        raise DataError([Problem(_SETTING, f"{path} has numbers that are not finite, in {broken[0]}")])
