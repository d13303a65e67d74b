"""The adapter: put on a base, taken off for a while, saved and loaded in PEFT's layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from job.errors import Problem, SettingsError


def add_adapter(model: Any, *, rank: int, alpha: int, dropout: float, target_modules: Sequence[str], seed: int) -> Any:
    """Wraps the base in a fresh LoRA adapter in fp32, whose initial weights depend on the seed alone.

    The adapter stays in fp32 whatever the base is: rounding it would make a resumed run differ from a whole one.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    head = model.get_output_embeddings()  # whose weights the loss takes as they are
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if missing := [name for name in target_modules if name not in linear]:
        fix = f"it has {', '.join(sorted(linear))}"
        raise SettingsError([Problem("lora.target_modules", f"the model has no linear {', '.join(missing)}; {fix}")])
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for parameter in trainable(adapted).values():
        parameter.data = parameter.data.to(torch.float32)
    return adapted


def trainable(model: Any) -> dict[str, Any]:
    """The adapter's parameters by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Within it the model is its base: the same loaded weights, adapter switched off."""
    with model.disable_adapter():
        yield


def save_adapter(model: Any, folder: Path, *, base: str, revision: str | None) -> None:
    """Writes the adapter in PEFT's layout; `PeftModel.from_pretrained(base, folder)` loads it.

    Without the card that PEFT puts beside it, which is a form to fill in: ours needs the evaluation, and comes later.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base, revision
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["target_modules"] = sorted(written["target_modules"])  # PEFT keeps a set, in another order every time
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(model: Any, folder: Path) -> None:
    """Puts saved adapter weights into the model, bit by bit; a missing or unexpected tensor is an error."""
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    state = load_file(folder / "adapter_model.safetensors", device="cpu")
    expected = get_peft_model_state_dict(model)
    wrong = sorted(
        expected.keys() ^ state.keys()
        | {k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape}
    )
    if wrong:
        raise ValueError(f"the adapter in {folder} is not of this model: {', '.join(wrong[:5])}")
    with torch.no_grad():
        set_peft_model_state_dict(model, state)
