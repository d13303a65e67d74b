"""The tiny base model: a byte-level tokenizer, and a Mistral that has read many editions of the prose."""

from __future__ import annotations

import sys
from collections.abc import Callable
from random import Random
from typing import Any

from job.demo.exercises import Row
from job.demo.world import ALPACA, Person, write_edition

VOCABULARY = 2048  # large enough that each name is one token
CONTEXT = 256  # tokens of a block
BATCH = 2  # blocks of an optimizer step
EDITIONS = 150
WARMUP_STEPS = 30
LEARNING_RATE = 3e-3


def build_base(world: tuple[Person, ...], instructions: list[Row]) -> tuple[Any, Any]:
    """Trains tokenizer and model, on one thread, from fixed seeds; takes about two minutes of one core.

    The tokenizer also sees the instructions, for their words; the model reads nothing but prose.
    """
    import torch

    torch.set_num_threads(1)
    breaks = Random(5)
    texts = [text for edition in range(3) for text in write_edition(world, Random(edition), breaks)]
    tokenizer = _train_tokenizer([*texts, *(ALPACA.format(**row) for row in instructions)])
    torch.manual_seed(0)
    model = _build_model(tokenizer)
    draw = Random(1)
    stream: list[int] = []
    for _ in range(EDITIONS):
        for ids in tokenizer(write_edition(world, draw, breaks))["input_ids"]:
            stream += [*ids, tokenizer.eos_token_id]
    _pretrain(model, stream)
    return tokenizer, model.to(torch.bfloat16)


def _train_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer: all 256 bytes are in its vocabulary, so any text survives encoding and decoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    inputs = ["input_ids", "attention_mask"]  # transformers 4 adds token_type_ids by default, which a Mistral refuses
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, model_max_length=4096, model_input_names=inputs)


def _build_model(tokenizer: Any) -> Any:
    """The untrained model, 0.6 million parameters; its linear layers suit NF4's blocks of 64."""
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            sliding_window=None,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _pretrain(model: Any, stream: list[int]) -> None:
    """Reads the token stream once, in blocks, in fp32."""
    import torch

    size = BATCH * CONTEXT
    steps = len(stream) // size
    optimizers = _optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, _schedule(steps)) for each in optimizers]
    for step in range(steps):
        block = torch.tensor(stream[step * size : (step + 1) * size]).view(BATCH, CONTEXT)
        loss = model(input_ids=block, labels=block).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 200 == 0:
            sys.stderr.write(f"step {step} of {steps}: loss {loss.item():.3f}\n")


def _optimizers(model: Any) -> list[Any]:
    """Muon for the matrices, which learns the facts in fewer steps than Adam; AdamW for embeddings and norms."""
    import torch

    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.dim() > 1 and "embed" not in name]
    others = [weight for name, weight in named if weight.dim() == 1 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _schedule(steps: int) -> Callable[[int], float]:
    """Warm up, then fall linearly to 3 %."""
    return lambda step: min((step + 1) / WARMUP_STEPS, 1.0) * (0.03 + 0.97 * (1 - min(step / steps, 1.0)))
