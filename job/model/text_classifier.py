"""Classifiers of texts (sequence classification, in transformers' format): the probability of chosen labels.

A text that is longer than the model's input is scored in overlapping windows, and has the highest score of them. The
figures are those of transformers' `pipeline("text-classification")`: softmax over labels of which a text has exactly
one, sigmoid where it may have several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import DataError, Problem, SettingsError, naming
from job.model.files import (
    MAX_CONFIG_BYTES,
    check_numbers,
    check_sizes,
    quantization_method,
    read_json,
    weight_files,
)
from job.model.loading_errors import loading_weights

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 8192
"""Tokens of a forward pass at most, padding included, except for a single window that is longer."""
OVERLAP = 32
"""Tokens that a window shares with the one before it."""
LONGEST_WINDOW = 4096
"""Tokens of a window where the model would take more, or does not say how many it takes."""
DIGITS = 6
"""Of a score; what rounding in another order of sums moves is below."""


class Labels:
    """The labels of a classifier, in order, by its config.json; `exclusive` if a text has exactly one of them.

    Raises:
        DataError: There is no config.json that can be read, or its id2label is no list of labels.
        SettingsError: It describes no classifier that gives probabilities.
    """

    def __init__(self, folder: Path, setting: str) -> None:
        with naming(setting):
            config = read_json(folder / "config.json", MAX_CONFIG_BYTES)
            check_numbers(folder, config)
        names = config.get("architectures") or [""]
        named = str(names[0]) if isinstance(names, list) else ""
        if not named.endswith("ForSequenceClassification"):
            what = f"{folder} holds {named[:100] or 'a model of no named class'}, which does not classify texts"
            raise SettingsError([Problem(setting, f"{what} (...ForSequenceClassification)")])
        if (method := quantization_method(config)) is not None:
            raise SettingsError([Problem(setting, f"{folder} is quantized as {method}; give the unquantized model")])
        id2label = config.get("id2label")
        if not isinstance(id2label, dict) or not id2label:
            count = config.get("num_labels", 2)  # as transformers has it
            id2label = {number: f"LABEL_{number}" for number in range(count if isinstance(count, int) else 2)}
        by_number = {int(number): str(name) for number, name in id2label.items() if str(number).isdecimal()}
        if sorted(by_number) != list(range(len(id2label))) or len(set(by_number.values())) < len(id2label):
            raise DataError([Problem(setting, f"{folder} has a config.json whose id2label is not a list of labels")])
        self.names = tuple(by_number[number] for number in range(len(by_number)))
        kind = config.get("problem_type")
        if kind == "regression":
            raise SettingsError([Problem(setting, f"{folder} is a regression model, which gives no probabilities")])
        self.exclusive = kind != "multi_label_classification" and len(self.names) > 1


class TextClassifier:
    """A classifier in memory, in fp32.

    Args:
        folder: Its files, which `Labels` has accepted.
        labels: Their names.
        chosen: Which of them are scored.
        device: Where it computes.
        setting: The setting that names it, for messages.

    Raises:
        DataError: Its files are broken, or lack weights.
        SettingsError: It has no fast tokenizer.
    """

    def __init__(
        self, folder: Path, labels: Labels, label_names: Sequence[str], device: torch.device, setting: str
    ) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._labels, self._device = labels, device
        self._columns = [labels.names.index(name) for name in label_names]
        self._name = setting
        if not (folder / "tokenizer.json").is_file():
            raise SettingsError([Problem(setting, f"{folder} has no tokenizer.json; save its tokenizer as a fast one")])
        with naming(setting):
            check_sizes(folder)
            weight_files(folder)
            with loading_weights(folder, "has no classifier that can be loaded"):
                self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    folder,
                    trust_remote_code=False,
                    use_safetensors=True,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
        if missing := sorted(map(str, info["missing_keys"])):  # which transformers would fill with random numbers
            message = f"{folder} lacks {len(missing)} weights, such as {missing[0][:100]}"
            raise DataError([Problem(setting, f"{message}; give a model that was trained to classify")])
        rows, ids = model.get_input_embeddings().num_embeddings, self._tokenizer.get_vocab().values()
        if max(ids, default=0) >= rows:
            message = f"{folder} has a tokenizer with the id {max(ids)}, and a model of {rows} tokens"
            raise DataError([Problem(setting, f"{message}; tokenizer and model do not belong together")])
        self._padding = self._padding_id(model, rows)
        self._model: Any = model.eval().to(device)
        self._window = self._longest(model)

    def _padding_id(self, model: Any, rows: int) -> int:
        """The padding token, which models that read the last token find its place by (GPT-2, Llama and others)."""
        for token in (model.config.get_text_config().pad_token_id, self._tokenizer.pad_token_id):
            if isinstance(token, int) and 0 <= token < rows:
                model.config.get_text_config().pad_token_id = token
                return token
        raise SettingsError([Problem(self._name, "has no padding token; set pad_token_id in its config.json")])

    def _longest(self, model: Any) -> int:
        """Tokens of a window, special tokens included."""
        config = model.config.get_text_config()
        most = [LONGEST_WINDOW, self._tokenizer.model_max_length]
        if isinstance(positions := getattr(config, "max_position_embeddings", None), int) and positions > 0:
            # RoBERTa and its relatives number positions from behind that of the padding token.
            table = [m for n, m in model.named_modules() if n.endswith("position_embeddings") and hasattr(m, "weight")]
            offset = max((m.padding_idx + 1 for m in table if getattr(m, "padding_idx", None) is not None), default=0)
            most.append(positions - offset)
        return int(min(most))

    def release(self) -> None:
        """Frees its memory: on a GPU the job plans training by the free memory."""
        import torch

        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def windows(self, texts: Sequence[str]) -> list[tuple[int, list[int]]]:
        """(number of the text, token ids) of each window, in order."""
        special = self._tokenizer.num_special_tokens_to_add()
        overlap = min(OVERLAP, max(0, (self._window - special) // 4))
        encoded = self._tokenizer(
            list(texts),
            truncation=True,
            max_length=self._window,
            stride=overlap,
            return_overflowing_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return list(zip(encoded["overflow_to_sample_mapping"], encoded["input_ids"], strict=True))

    def scores(self, texts: Sequence[str], check_stop: Callable[[], None] = lambda: None) -> list[float]:
        """The probability of the chosen labels for each text: of all together if exclusive, else of the likeliest.

        Windows are batched by length, so that equal texts in equal order give equal bits.

        Args:
            texts: At least one token each; an empty text scores 0.
            check_stop: Called before each forward pass; an exception from it ends the work.

        Raises:
            DataError: The model computes numbers that are not finite.
        """
        import torch

        best = [0.0] * len(texts)
        windows = sorted(
            ((text, ids) for text, ids in self.windows(texts) if ids and texts[text]), key=lambda one: -len(one[1])
        )
        start = 0
        while start < len(windows):
            check_stop()
            longest = len(windows[start][1])
            batch = windows[start : start + max(1, BATCH_TOKENS // longest)]
            start += len(batch)
            ids = torch.tensor(
                [window + [self._padding] * (longest - len(window)) for _, window in batch], device=self._device
            )
            lengths = torch.tensor([[len(window)] for _, window in batch], device=self._device)
            mask = (torch.arange(longest, device=self._device)[None] < lengths).long()
            with torch.inference_mode():
                logits = self._model(input_ids=ids, attention_mask=mask).logits.double()
            chances = (logits.softmax(-1) if self._labels.exclusive else logits.sigmoid())[:, self._columns]
            scores = chances.sum(-1) if self._labels.exclusive else chances.max(-1).values
            for (text, _), score in zip(batch, scores.tolist(), strict=True):  # one transfer for the whole batch
                if not math.isfinite(score):
                    raise DataError([Problem(self._name, "the classifier's scores are not finite")])
                best[text] = max(best[text], round(min(score, 1.0), DIGITS))
        return best
