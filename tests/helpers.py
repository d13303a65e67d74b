"""Builders for tests: a tiny model, training examples, Alpaca rows, questions in ARC's schema, all invented."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from job.data.tokenization import Encoded
from job.evaluation import statistics
from job.model.adapter_options import PLAIN, AdapterOptions
from job.records import Example, TaskScores

BOS, EOS, PAD = 0, 1, 2
VOCABULARY = 400
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARC_EASY = Path(__file__).parents[2] / "shared/data/arc_easy_test.jsonl"  # real questions, if there are any

READING: dict[str, Any] = {
    "revision": None,
    "split": "train",
    "limit": None,
    "schema": None,
    "on_bad_row": "error",
    "loss_on": "all",
    "max_length": 512,
}
"""Arguments of `load_examples` and `load_rows` that most tests leave alone; the tokenizer is missing."""


def tokens_of(examples: Iterable[Example]) -> int:
    """Tokens of all examples together."""
    return sum(len(example.input_ids) for example in examples)


def make_base(folder: Path) -> None:
    """Writes a random Mistral (2 layers, grouped heads) and a byte-level tokenizer that knows a few words.

    Adapters of rank 16 on its feed-forward layers are just large enough for 8-bit optimizer states (4,096 numbers).
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["Question: which is the answer?\nAnswer: it is the one of them"] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        sliding_window=None,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.1,  # larger than usual, so that answers differ clearly, as those of a trained model
    )
    MistralForCausalLM(config).save_pretrained(folder)


def deepened(base: Path, folder: Path, layers: int) -> Path:
    """The same base with another number of layers, in a new folder, which it returns."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    shutil.copytree(base, folder)
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig.from_pretrained(base, num_hidden_layers=layers)).save_pretrained(folder)
    return folder


def load_plain(folder: Path, **changes: Any) -> Any:
    """A base in fp32, without an adapter, loaded by the job's code; `changes` are arguments of `load_base`."""
    import torch

    from job.model.load_base import load_base

    how: dict[str, Any] = {"quantization": "none", "double_quantization": True, "dtype": torch.float32}
    return load_base(folder, **how | {"device": torch.device("cpu"), "max_length": 512} | changes)


def without_repacking(model: Any) -> Any:
    """A model of transformers that computes in fp32 on every CPU.

    With AVX512-BF16, bitsandbytes would repack 4-bit weights in evaluation mode and multiply in bf16 (decision 5).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def make_model(
    folder: Path,
    *,
    quantization: str = "none",
    dropout: float = 0.0,
    rank: int = 16,
    options: AdapterOptions = PLAIN,
    dtype: Any = None,
) -> Any:
    """The tiny base, in fp32 by default, with an adapter on all linear layers, loaded by the job's code.

    New tokens have the ids from `VOCABULARY` on.
    """
    from job.model.lora import add_adapter
    from job.model.whole_modules import grow_embeddings

    base = load_plain(folder, quantization=quantization, **({} if dtype is None else {"dtype": dtype}))
    new = range(VOCABULARY, VOCABULARY + len(options.added_tokens))
    grow_embeddings(base, new.stop)
    how: dict[str, Any] = {"rank": rank, "alpha": 16, "dropout": dropout, "target_modules": LINEAR, "seed": 1}
    return add_adapter(base, **how, options=options, token_ids=new)


def fill_adapter(model: Any, scale: float = 0.05) -> Any:
    """Makes every adapter weight random: B of a new adapter is zero, which hides errors."""
    import torch

    from job.model.lora import trainable

    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def make_examples(count: int, *, shortest: int = 4, longest: int = 60, prompt: float = 0.0) -> list[Example]:
    """Random token sequences of many lengths, from `<s>` to `</s>`; the tokens of `prompt` are not targets."""
    chance = random.Random(count)
    examples = []
    for _ in range(count):
        length = chance.randint(shortest, longest)
        ids = (BOS, *(chance.randrange(3, 400) for _ in range(length - 2)), EOS)
        learned_from = max(1, int(prompt * length))
        examples.append(Example(ids, tuple(position >= learned_from for position in range(length))))
    return examples


def with_new_tokens(examples: list[Example], count: int) -> list[Example]:
    """The same with new tokens inside: each example has all of them."""
    new = tuple(range(VOCABULARY, VOCABULARY + count))
    return [
        Example((*e.input_ids[:2], *new, *e.input_ids[2:]), (*e.targets[:2], *[True] * count, *e.targets[2:]))
        for e in examples
    ]


def encoded(text: str, ids: Sequence[int], targets: Sequence[bool], where: str = "") -> Encoded:
    """An encoded example of a text."""
    return Encoded(text, struct.pack(f"<{len(ids)}i", *ids), bytes(targets), where=where)


def alpaca_rows(count: int) -> list[dict[str, str]]:
    """Rows in Alpaca's schema."""
    return [
        {"instruction": f"Add {n} and {n + 1}.", "input": "" if n % 3 else f"Case {n}", "output": f"It is {2 * n + 1}."}
        for n in range(count)
    ]


def arc_rows(count: int) -> list[dict[str, Any]]:
    """Questions in ARC's schema: 3 to 5 choices of many lengths; labels are letters, or digits in every fourth."""
    chance = random.Random(count)
    rows = []
    for n in range(count):
        size = 3 + n % 3
        labels = list("12345" if n % 4 == 0 else "ABCDE")[:size]
        texts = [f"{'the one that ' * (choice % 3)}is {n * choice + choice}" for choice in range(size)]
        chance.shuffle(texts)
        rows.append(
            {
                "id": f"made-up-{n}",
                "question": f"{'Which is it, then? ' * (n % 3)}What is {n} and {chance.randrange(100)}?",
                "choices": {"text": texts, "label": labels},
                "answerKey": chance.choice(labels),
            }
        )
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes one JSON line per row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The inverse of `write_jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def task_scores(task: str, correct: list[bool], correct_norm: list[bool] | None = None) -> TaskScores:
    """The scores of a task with these answers."""
    return TaskScores(
        task=task,
        source="questions.jsonl",
        task_hash="0123456789abcdef" * 4,
        version="1.0",
        n=len(correct),
        acc=sum(correct) / len(correct),
        stderr=statistics.standard_error(correct),
        acc_norm=sum(correct_norm) / len(correct_norm) if correct_norm else None,
        acc_norm_stderr=statistics.standard_error(correct_norm) if correct_norm else None,
        correct=tuple(correct),
        correct_norm=tuple(correct_norm) if correct_norm else None,
    )
