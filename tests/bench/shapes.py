"""Random models of real shapes, and examples and questions of real lengths; speed does not depend on their content."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from job.records import Example, Question

MISTRAL_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTHS = json.loads(Path(__file__).with_name("lengths.json").read_text())


def random_base(shape: dict[str, int], device: torch.device, attention: str) -> Any:
    """A random Mistral in bf16 whose layers are quantized as the job's are: NF4 with double quantization.

    Made in place without a file, in a fraction of the time of loading. Attention has no window, as in Mistral-7B-v0.3.
    """
    from transformers import MistralConfig

    config = MistralConfig(**shape, sliding_window=None, attn_implementation=attention, use_cache=False)
    return quantized(config, device)


def quantized(config: Any, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A random decoder of a configuration in `dtype`, whose linear layers are NF4 with double quantization."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoModelForCausalLM

    from job.model.packed_attention import register

    register()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=config._attn_implementation
            )
    finally:
        torch.set_default_dtype(torch.float32)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if not isinstance(linear, torch.nn.Linear):
                    continue
                with torch.device("meta"):
                    small = Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=linear.bias is not None,
                        compute_dtype=dtype,
                        compress_statistics=True,
                        quant_type="nf4",
                    )
                small.bias = linear.bias
                small.weight = Params4bit(
                    linear.weight.data.cpu() if device.type == "cpu" else linear.weight.data,
                    requires_grad=False,
                    compress_statistics=True,
                    quant_type="nf4",
                )
                small.weight = small.weight._quantize(device)
                small.support_avx512bf16_for_cpu = False
                setattr(parent, name, small)
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)  # noqa: FBT003
    return model.eval()


def examples(vocabulary: int, count: int = 1500) -> list[Example]:
    """Random tokens, as long as Alpaca's first valid rows in Mistral's tokenizer; all but the first are targets."""
    chance = random.Random(0)
    drawn = []
    for length in LENGTHS["alpaca"][:count]:
        ids = tuple(chance.randrange(3, vocabulary) for _ in range(length))
        drawn.append(Example(ids, (False, *[True] * (length - 1))))
    return drawn


def questions(vocabulary: int, count: int | None = None) -> list[Question]:
    """Random tokens, as long as ARC-Easy's questions and choices in Mistral's tokenizer."""
    chance = random.Random(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(chance.randrange(3, vocabulary) for _ in range(length))

    return [
        Question(tokens(context), tuple(tokens(choice) for choice in choices))
        for context, choices in LENGTHS["arc_easy"][:count]
    ]


def tokenizer() -> Any:
    """A tokenizer with special tokens only: training data here consists of token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 1, "</s>": 2, "<unk>": 0}, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        unk_token="<unk>",
    )
