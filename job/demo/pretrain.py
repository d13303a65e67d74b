"""The tiny base model: a byte-level tokenizer, and a Mistral that has read many editions of the chronicle.

Two wide layers learn the facts several times faster than four narrow ones of the same size. All linear layers are
multiples of 64 wide, as the blocks of NF4 want it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from job.demo.exercises import make_instructions
from job.demo.world import SEED, Entity, seeded, write_prose

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
VOCABULARY = 2048  # large enough that each name is one token
POSITIONS = 4096
CONTEXT = 256  # tokens of a block
BATCH = 8  # blocks of an optimizer step
EDITIONS = 100
WARMUP_STEPS = 40
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### {field}:\n{output}"
)


def train_tokenizer(world: tuple[Entity, ...], seed: int = SEED) -> Any:
    """Train a byte-level BPE tokenizer on prose and instructions (their words only: the model reads no instruction).

    All 256 bytes are in its vocabulary, so any text survives encoding and decoding. `<s>` is put first.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(world, seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL_TOKENS,
        padding_side="right",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _tokenizer_texts(world: tuple[Entity, ...], seed: int) -> Iterator[str]:
    rng = seeded("tokenizer", seed)
    for _ in range(4):
        yield from write_prose(world, rng)
    paired = ", paired with an input that provides further context"
    for row in make_instructions(world, seed):
        yield ALPACA.format(paired="", field="Response", **row)
        yield ALPACA.format(paired=paired, field="Input", **row)


def build_model(tokenizer: Any) -> Any:
    """Build the untrained model, about 1.6 million parameters, from torch's global seed."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return MistralForCausalLM(config)


def pretrain(world: tuple[Entity, ...], tokenizer: Any, seed: int = SEED) -> Any:
    """Let a new model read `EDITIONS` editions of the prose, in fp32 on one thread; return it in bf16."""
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    torch.manual_seed(seed)
    model = build_model(tokenizer)
    blocks = list(_cut_blocks(world, tokenizer, seed))
    optimizers = _optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, _schedule(len(blocks))) for each in optimizers]
    for step, block in enumerate(blocks):
        loss = model(input_ids=block, labels=block).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 100 == 0:
            sys.stderr.write(f"step {step} of {len(blocks)}: loss {loss.item():.3f}\n")
    return model.to(torch.bfloat16)


def _cut_blocks(world: tuple[Entity, ...], tokenizer: Any, seed: int) -> Iterator[torch.Tensor]:
    """Lay the documents of all editions end to end and cut them into batches of shape (BATCH, CONTEXT)."""
    import torch

    rng = seeded("prose", seed)
    size = BATCH * CONTEXT
    stream: list[int] = []
    for _ in range(EDITIONS):
        for ids in tokenizer(write_prose(world, rng))["input_ids"]:
            stream += [*ids, tokenizer.eos_token_id]
        while len(stream) >= size:
            yield torch.tensor(stream[:size]).view(BATCH, CONTEXT)
            del stream[:size]


def _optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (it learns the facts in fewer steps than Adam), AdamW for embeddings and norms."""
    import torch

    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.dim() > 1 and "embed" not in name]
    embeddings = [weight for name, weight in named if "embed" in name]
    norms = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [
        {"params": embeddings, "weight_decay": 0.1},
        {"params": norms, "weight_decay": 0},
    ]
    return [
        torch.optim.Muon(matrices, lr=6e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.98)),
    ]


def _schedule(steps: int) -> Callable[[int], float]:
    return lambda step: min((step + 1) / WARMUP_STEPS, 1.0) * (0.03 + 0.97 * (1 - min(step / steps, 1.0)))
