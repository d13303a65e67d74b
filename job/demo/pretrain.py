"""The tiny base model: a byte-level tokenizer, and a Mistral that reads many editions of the chronicle on one CPU core."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from job.demo.world import prose

if TYPE_CHECKING:
    pass

VOCABULARY = 2048
CONTEXT = 256  # tokens of one training block
BATCH = 8  # blocks of one optimizer step
EDITIONS = 120
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 40


def train_tokenizer(texts: Iterable[str]) -> Any:
    """Train a byte-level BPE tokenizer: any text survives encoding and decoding, and `<s>` is put first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any, hidden=128, layers=4, inter=384) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return MistralForCausalLM(config)


def blocks(world, tokenizer, rng, editions):
    import torch

    buf = []
    for e in range(editions):
        for ids in tokenizer(prose(world, rng))["input_ids"]:
            buf += [*ids, tokenizer.eos_token_id]
        n = len(buf) // (CONTEXT * BATCH)
        for k in range(n):
            yield torch.tensor(buf[k * CONTEXT * BATCH : (k + 1) * CONTEXT * BATCH]).view(BATCH, CONTEXT)
        buf = buf[n * CONTEXT * BATCH :]
