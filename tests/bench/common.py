"""Shared by the benchmarks: the model and the data of both sides, the table, and the file that it is written to."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data"
MODULES = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
"""The layers that the job adapts in a Mistral, for the scripts of other libraries, which need a list."""
ALPACA, ARC_EASY = DATA / "alpaca.jsonl.gz", DATA / "arc_easy_test.jsonl"
VOCABULARY = 32_000
FAMILIES = ("llama", "mistral", "qwen2")
"""Families that the job's fused layers support."""
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
"""Sizes of a model of 25 million parameters."""
os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' progress bars, before they are imported
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "lm-eval", "accelerate")


@dataclass(frozen=True)
class Row:
    """One comparison; `met` says whether `ratio` reached the goal, None if there is no goal."""

    what: str
    ours: str
    other: str
    ratio: float
    goal: str = ""
    met: bool | None = None


def at_least(what: str, ours: float, other: float, *, unit: str, against: str, goal: float | None = None) -> Row:
    """More is better: our figure over the other's."""
    ratio = ours / other
    shown = (f"{ours:,.1f} {unit}", f"{other:,.1f} {unit} ({against})")
    return Row(what, *shown, ratio) if goal is None else Row(what, *shown, ratio, f">= {goal:g}", ratio >= goal)


def at_most(what: str, ours: float, other: float, *, unit: str, against: str, goal: float | None = None) -> Row:
    """Less is better: our figure over the other's."""
    ratio = ours / other
    shown = (f"{ours:,.3f} {unit}", f"{other:,.3f} {unit} ({against})")
    return Row(what, *shown, ratio) if goal is None else Row(what, *shown, ratio, f"<= {goal:g}", ratio <= goal)


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown, columns aligned."""
    head = ("what", "ours", "against", "ratio", "goal", "met")
    met = {True: "yes", False: "NO", None: ""}
    lines = [head, *((r.what, r.ours, r.other, f"{r.ratio:.3f}", r.goal, met[r.met]) for r in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, tuple("-" * width for width in widths))  # type: ignore[arg-type]
    return "\n".join(
        f"| {' | '.join(f'{cell:<{w}}' for cell, w in zip(line, widths, strict=True))} |" for line in lines
    )


def conditions() -> dict[str, Any]:
    """When, where and with which versions a figure was measured. `load` shows whether the machine had other load."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": names[0].partition(": ")[2] if names else platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "load": [round(load, 1) for load in os.getloadavg()],
        },
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
    }


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures there too")
    return parser


def finish(rows: Sequence[Row], details: dict[str, Any], where: dict[str, Any], file: Path | None) -> None:
    """Prints the table, and writes it to a file with its conditions if requested."""
    print(f"\n{table(rows)}\n", flush=True)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {**where, "rows": [asdict(row) for row in rows], "details": details}
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_base(folder: Path, family: str = "mistral") -> None:
    """Writes a random model of 25 million parameters, and a tokenizer of 32,000 words learned from Alpaca.

    The demo's tokenizer has 1,311 words and splits real text into three times as many tokens as Mistral's; this one
    comes close to Mistral's lengths, without a network.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with gzip.open(ALPACA, "rt", encoding="utf-8") as lines:
        backend.train_from_iterator((text for line in lines for text in json.loads(line).values()), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    make_model(folder, family, SHAPE)


def make_model(folder: Path, family: str, shape: Mapping[str, int]) -> None:
    """Writes a random model of a family, whose first three tokens are special."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        **shape,
        **({"sliding_window": None} if family == "mistral" else {}),
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.05,  # larger than usual, so that answers differ clearly, as those of a trained model
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def load_ours(folder: Path, quantization: str, dtype: str) -> Any:
    """The base with a fresh adapter, as the job loads it, with its default settings."""
    import torch

    from job.common.malloc import keep_freed_memory
    from job.model.device import choose_dtype
    from job.model.load_base import load_base
    from job.model.lora import add_adapter
    from job.settings.schema import Lora, Train

    device, lora = torch.device("cpu"), Lora()
    base = load_base(
        folder,
        quantization=quantization,
        double_quantization=True,
        dtype=choose_dtype(dtype, device),
        device=device,
        max_length=Train().max_length,
    )
    keep_freed_memory()
    return add_adapter(base, rank=lora.rank, alpha=lora.alpha, dropout=0.0, target_modules=MODULES, seed=0)


def load_plain(folder: Path, quantization: str, dtype: str, device: str = "cpu") -> Any:
    """The base as a plain script loads it: transformers and bitsandbytes, attention by torch."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from job.model.device import choose_dtype

    computed = choose_dtype(dtype, torch.device(device))
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=computed,
        quantization_config=quantized if quantization == "nf4" else None,
        attn_implementation="sdpa",
        device_map={"": device},
    )
    for module in model.modules():
        # on some CPUs bitsandbytes would compute in bf16, another precision than the job's
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
