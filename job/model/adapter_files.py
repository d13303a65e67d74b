"""The adapter's files, in PEFT's layout: any release of PEFT reads them, and the job reads them back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.model.published_names import PublishedNames
from job.model.tensor_names import PREFIX, saved_tensors

CONFIG_KEYS = {
    *("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout", "peft_type"),
    *("r", "revision", "target_modules", "task_type", "use_dora", "use_rslora"),
}
"""Keys of adapter_config.json that are always written: tools that read it without PEFT have no defaults for them."""


def save_adapter(
    model: Any, folder: Path, *, base: str, revision: str | None, names: PublishedNames | None = None
) -> None:
    """Writes the adapter in PEFT's layout; `PeftModel.from_pretrained(base, folder)` loads it, in PEFT 0.13 too.

    PEFT's model card, an empty template, is left out: the job writes its own after the evaluation.

    Args:
        model: The adapted model.
        folder: Is made where it does not exist.
        base: By what name the base can be had; no path of this machine.
        revision: Commit of the base, where `base` is a hub id.
        names: Names of the tensors in the file; None for those of the loaded model.
    """
    from safetensors.torch import load_file, save_file

    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base, revision
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    adapter_config = portable_config(json.loads(path.read_text(encoding="utf-8")))
    names = names or PublishedNames("")
    saved = load_file(weights)
    if names.ambiguous or adapter_config.pop("exclude_modules", None):
        # By full name, so that no other layer of that name is meant, which older PEFT has no other way to say.
        published = [names.published(name).removeprefix(PREFIX) for name in saved if ".lora_" in name]
        adapter_config["target_modules"] = sorted({name.rpartition(".lora_")[0] for name in published})
    if (tensors := {names.filed(name): tensor for name, tensor in saved.items()}).keys() != saved.keys():
        save_file(tensors, weights, metadata={"format": "pt"})
    path.write_text(json.dumps(adapter_config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What readers need of an adapter_config.json: `CONFIG_KEYS`, and all else that is not as PEFT has it by default.

    PEFT writes all its fields, and older releases refuse fields that they do not know. So fields with default values
    are left out.
    """
    from peft import LoraConfig

    usual = json.loads(json.dumps(LoraConfig().to_dict(), default=list))
    portable = {key: value for key, value in config.items() if key in CONFIG_KEYS or value != usual.get(key)}
    portable.pop("peft_version", None)  # no field of a configuration before PEFT 0.18; the manifest has it
    if isinstance(targets := portable["target_modules"], list):
        portable["target_modules"] = sorted(targets)  # PEFT keeps a set, in another order every time
    if portable.get("modules_to_save"):
        portable["modules_to_save"] = sorted(portable["modules_to_save"])
    return portable


def load_adapter(model: Any, folder: Path, names: PublishedNames | None = None) -> None:
    """Puts saved adapter weights into the model, bit by bit; a missing or unexpected tensor is an error.

    `names` are those that it was saved by.
    """
    import torch
    from safetensors.torch import load_file

    names = names or PublishedNames("")
    state = load_file(folder / "adapter_model.safetensors", device="cpu")
    if model.peft_config["default"].peft_type == "ADALORA":
        _take_ranks_away(
            model, json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["rank_pattern"]
        )
    expected = saved_tensors(model)
    files = {names.filed(name): tensor for name, tensor in expected.items()}
    wrong = sorted(
        files.keys() ^ state.keys() | {k for k in files.keys() & state.keys() if files[k].shape != state[k].shape}
    )
    if wrong:
        raise ValueError(f"the adapter in {folder} belongs to another model: {', '.join(wrong[:5])}")
    # Not by PEFT's set_peft_model_state_dict, which renames tensors and ignores those that then have no place. What
    # `expected` holds shares the parameters' memory, so that this writes into the model.
    with torch.no_grad():
        for name, tensor in files.items():
            tensor.copy_(state[name])


def _take_ranks_away(model: Any, pattern: Mapping[str, list[bool]]) -> None:
    """Gives AdaLoRA's layers the ranks of a saved adapter: by the name of `lora_E`, which are left.

    PEFT creates the parameters again for that, in the dtype of the base.
    """
    import torch

    parameters = dict(model.base_model.model.named_parameters())
    whole = {name: kept for name, kept in pattern.items() if parameters[f"{name}.default"].shape[0] == len(kept)}
    model.base_model.resize_modules_by_rank_pattern(whole, "default")
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(torch.float32)
    model.peft_config["default"].rank_pattern = dict(pattern)
