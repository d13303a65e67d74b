"""A tiny hand-made safety classifier: a text is unsafe exactly if it contains the word `kettle`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

WORD = "kettle"
WORDS = ("a", "the", "row", "is", "about", "something", "else", "and", "it", "of", WORD)
WINDOW = 48
"""Its longest input in tokens, including the two special ones."""
SAFE_OR_NOT: Mapping[int, str] = {0: "safe", 1: "unsafe"}


def make_classifier(
    folder: Path, labels: Mapping[int, str] = SAFE_OR_NOT, *, kind: str | None = None, random: bool = False
) -> Path:
    """Writes a BERT of one layer in which all weights are zero except those for the word; returns the folder.

    The word has an embedding of its own, which attention, uniform since queries and keys are zero, averages into the
    first token, and the layer's norm scales up, however long the text is. The first label gets the opposite score.

    Args:
        folder: Where it is written.
        labels: `id2label`.
        kind: `problem_type`.
        random: Weights are random instead, so that scores vary.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    backend = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=WINDOW,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(names),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=WINDOW,
        initializer_range=1.0,
        problem_type=kind,
        id2label=dict(labels),
    )
    model = BertForSequenceClassification(config)
    if not random:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "LayerNorm.weight" not in name:
                    parameter.zero_()
            model.bert.embeddings.word_embeddings.weight[names.index(WORD), :2] = torch.tensor([1.0, -1.0])
            attention = model.bert.encoder.layer[0].attention
            for linear in (attention.self.value, attention.output.dense, model.bert.pooler.dense):
                linear.weight.copy_(torch.eye(8))
            model.classifier.weight[-1, :2] = torch.tensor([10.0, -10.0])
            model.classifier.bias[-1] = -8.0
    model.save_pretrained(folder)
    return folder
