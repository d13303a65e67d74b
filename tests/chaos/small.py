"""The configurations for `make chaos`: small, with everything whose resume has to be exact."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.helpers import alpaca_rows, arc_rows, fill_adapter, make_base, make_model, write_jsonl


def settings(folder: Path, *, rows: int = 40, questions: int = 40) -> dict[str, str]:
    """Writes model and data below `folder`; returns the environment of a run on them.

    NF4, dropout, 8-bit Adam, 20 steps in two epochs, a checkpoint every third step, several sequences of questions.
    """
    if not (folder / "base").exists():
        (folder / "base").mkdir()
        make_base(folder / "base")
    write_jsonl(folder / "rows.jsonl", alpaca_rows(rows))
    write_jsonl(folder / "questions.jsonl", arc_rows(questions))
    return {
        "JOB_RUN__OUTPUT": str(folder / "out"),
        "JOB_RUN__SPOT_NOTICES": "off",
        "JOB_MODEL__ID": str(folder / "base"),
        "JOB_DATA__SOURCE": str(folder / "rows.jsonl"),
        "JOB_EVAL__DATA": f"arc_easy={folder / 'questions.jsonl'}",
        "JOB_EVAL__BATCH_TOKENS": "512",
        "JOB_LORA__DROPOUT": "0.1",
        "JOB_TRAIN__GLOBAL_BATCH_SIZE": "4",
        "JOB_TRAIN__LEARNING_RATE": "2e-3",
        "JOB_TRAIN__MAX_LENGTH": "512",
        "JOB_CHECKPOINT__EVERY_STEPS": "3",
        "JOB_LOG__FORMAT": "json",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": os.environ.get("TMPDIR", str(folder)),
    }


def validation(folder: Path) -> dict[str, str]:
    """Writes rows for validation; returns what a run adds to `settings` that stops early and keeps the best adapter.

    The answers have the right form, but are wrong: learning the form lowers their loss, learning the answers raises it.
    A checkpoint comes every third step and a validation every second one, so most kills are between the two.
    """
    rows = [row | {"output": f"It is {97 * n % 61}."} for n, row in enumerate(alpaca_rows(16))]
    return {
        "JOB_DATA__VALIDATION": str(write_jsonl(folder / "validation.jsonl", rows)),
        "JOB_TRAIN__VALIDATE_EVERY_STEPS": "2",
        "JOB_TRAIN__STOP_AFTER": "2",
        "JOB_TRAIN__KEEP": "best",
        "JOB_TRAIN__EPOCHS": "8",
        "JOB_TRAIN__LEARNING_RATE": "2e-2",
        "JOB_TRAIN__SCHEDULER": "constant",
        "JOB_TRAIN__LOSS_ON": "completion",
    }


def preferences(folder: Path) -> dict[str, str]:
    """Writes pairs and labelled answers; returns what a run adds to `settings` that learns the pairs by DPO.

    Four pairs are held out, and the adapter of the best validation is kept.
    """
    answers = [
        (row["instruction"], row["output"], f"It is not {97 * n % 61}.") for n, row in enumerate(alpaca_rows(24))
    ]
    pairs = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in answers]
    labelled = [
        {"prompt": prompt, "completion": good if n % 2 else bad, "label": n % 2 == 1}
        for n, (prompt, good, bad) in enumerate(answers)
    ]
    write_jsonl(folder / "labelled.jsonl", labelled)
    return {
        "JOB_DATA__SOURCE": str(write_jsonl(folder / "pairs.jsonl", pairs)),
        "JOB_DATA__VALIDATION": "4",
        "JOB_TRAIN__METHOD": "dpo",
        "JOB_TRAIN__VALIDATE_EVERY_STEPS": "2",
        "JOB_TRAIN__KEEP": "best",
    }


def _of_other_method(method: str) -> Callable[[Path], dict[str, str]]:
    """As `preferences`, by another method."""

    def make(folder: Path) -> dict[str, str]:
        rows = "labelled.jsonl" if method == "kto" else "pairs.jsonl"
        return {**preferences(folder), "JOB_TRAIN__METHOD": method, "JOB_DATA__SOURCE": str(folder / rows)}

    return make


def _two_stages(folder: Path) -> dict[str, str]:
    rows = [{"question": row["instruction"], "answer": row["output"]} for row in alpaca_rows(16)]
    return {
        **preferences(folder),
        "JOB_TRAIN__METHOD": "sft,dpo",
        "JOB_DATA__SFT_SOURCE": str(write_jsonl(folder / "first.jsonl", rows)),
        "JOB_DATA__SFT_FIELDS": "prompt=question,completion=answer",
        "JOB_DATA__SFT_LIMIT": "12",
        "JOB_TRAIN__LOSS_ON": "completion",
    }


def _weights(folder: Path) -> dict[str, str]:
    weights = (2, 1, 0, 0.5, "0.3")
    rows = [{**row, "weight": weights[n % len(weights)]} for n, row in enumerate(alpaca_rows(40))]
    return {"JOB_DATA__SOURCE": str(write_jsonl(folder / "weighted.jsonl", rows)), "JOB_DATA__ROW_WEIGHTS": "true"}


CHAT = (
    "{% if tools %}{{ tools | tojson }}</s>{% endif %}{% for m in messages %}{{ m.role }}: "
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""A chat template with tools, and with generation marks around the assistant's text."""
UNMARKED = CHAT.replace("{% generation %}", "").replace("{% endgeneration %}", "")
"""The same without marks: the assistant's turns are found by comparing renderings."""


def _chat(template: str, loss_on: str) -> Callable[[Path], dict[str, str]]:
    """Two sources, half of the second: OpenAI's rows with weights and tools, and ShareGPT's; long ones truncated."""

    def make(folder: Path) -> dict[str, str]:
        place = folder / f"{'marked' if template == CHAT else 'unmarked'}-base"
        base = Path(shutil.copytree(folder / "base", place, dirs_exist_ok=True))
        (base / "chat_template.jinja").write_text(template, encoding="utf-8")
        tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
        openai, sharegpt = [], []
        for n, row in enumerate(alpaca_rows(28)):
            ask, answer = (
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            )
            call = {"type": "function", "function": {"name": "add", "arguments": {"first": n}}}
            says = {"role": "assistant", "content": None, "tool_calls": [call]}
            several = [ask, answer | {"weight": n % 2}, ask, says, {"role": "tool", "content": f"{2 * n}"}, answer]
            openai.append({"messages": several, "tools": [tool]})
            turns = (("human", row["instruction"]), ("gpt", row["output"] * (1 + 79 * (n % 7 == 0))))
            sharegpt.append({"conversations": [{"from": who, "value": what} for who, what in turns]})
        paths = [str(write_jsonl(folder / f"{name}.jsonl", rows)) for name, rows in (("o", openai), ("s", sharegpt))]
        return {
            "JOB_MODEL__ID": str(base),
            "JOB_DATA__SOURCE": f"{paths[0]},{paths[1]}=0.5x",
            "JOB_DATA__ON_LONG_ROW": "truncate",
            "JOB_TRAIN__LOSS_ON": loss_on,
            "JOB_TRAIN__MAX_LENGTH": "512",
        }

    return make


def _split_texts(folder: Path) -> dict[str, str]:
    texts = [f"{row['instruction']} {row['output']} " for row in alpaca_rows(24)]
    rows = [{"content": text * (1 + n % 5)} for n, text in enumerate(texts)]
    return {
        "JOB_DATA__SOURCE": str(write_jsonl(folder / "texts.jsonl", rows)),
        "JOB_DATA__FIELDS": "text=content",
        "JOB_DATA__ON_LONG_ROW": "split",
        "JOB_TRAIN__MAX_LENGTH": "96",
    }


def _from_an_adapter(folder: Path) -> dict[str, str]:
    """IPO, starting from an existing adapter."""
    from job.model.adapter_files import save_adapter
    from job.model.published_names import PublishedNames

    start = folder / "start"
    if not start.exists():
        model = fill_adapter(make_model(folder / "base"), 0.01)
        save_adapter(model, start, base="base", revision=None, names=PublishedNames(""))
    return {**preferences(folder), "JOB_LORA__START": str(start), "JOB_TRAIN__PREFERENCE_LOSS": "ipo"}


def _new_tokens(folder: Path) -> dict[str, str]:
    rows = [{**row, "output": f"<sum>{row['output']}"} for row in alpaca_rows(40)]
    return {
        "JOB_DATA__SOURCE": str(write_jsonl(folder / "tokens.jsonl", rows)),
        "JOB_MODEL__ADD_TOKENS": "<sum>",
        "JOB_LORA__MODULES_TO_SAVE": "lm_head",
        "JOB_LORA__LAYERS": "1",
    }


def _train(**given: str) -> Callable[[Path], dict[str, str]]:
    return lambda _folder: {f"JOB_TRAIN__{name}": value for name, value in given.items()}


def _lora(**given: str) -> Callable[[Path], dict[str, str]]:
    return lambda _folder: {f"JOB_LORA__{name}": value for name, value in given.items()}


def _mixture(folder: Path) -> dict[str, str]:
    """A mixture of experts as base, with adapters on the experts, which get no dropout."""
    from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

    plain = AutoConfig.from_pretrained(folder / "base")
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings")
    sizes = {name: getattr(plain, name) for name in (*names, *tokens)}
    place = Path(shutil.copytree(folder / "base", folder / "mixture", dirs_exist_ok=True))
    (place / "model.safetensors").unlink(missing_ok=True)
    config = MixtralConfig(**sizes, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2)
    MixtralForCausalLM(config).save_pretrained(place)
    return {"JOB_MODEL__ID": str(place), "JOB_LORA__EXPERTS": "true", "JOB_LORA__DROPOUT": "0"}


CONFIGURATIONS: Mapping[str, Callable[[Path], dict[str, str]]] = {
    "plain": lambda _folder: {},
    "early-stopping": validation,
    "dpo": preferences,
    "kto": _of_other_method("kto"),
    "orpo": _of_other_method("orpo"),
    "sft,dpo": _two_stages,
    "weights": _weights,
    "stable-decay": _train(SCHEDULER="warmup_stable_decay", WARMUP_RATIO="0.2", MIN_LR_RATIO="0.1", MAX_GRAD_NORM="0"),
    "noise": _train(NEFTUNE_NOISE_ALPHA="5", SCHEDULER="cosine", MIN_LR_RATIO="0.1", EPOCHS="1.5"),
    "lion": _train(OPTIMIZER="lion_8bit"),
    "muon": _train(OPTIMIZER="muon", LABEL_SMOOTHING="0.1"),
    "ademamix": _train(OPTIMIZER="ademamix_8bit"),
    "dora": _lora(USE_DORA="true", USE_RSLORA="true", INIT="gaussian", SEED="7"),
    "pissa": _lora(INIT="pissa", DROPOUT="0", RANK_PATTERN="q_proj=4"),
    "eva": _lora(INIT="eva"),
    "loftq": _lora(INIT="loftq"),
    "new-tokens": _new_tokens,
    "chat": _chat(CHAT, "assistant"),
    "chat-last": _chat(CHAT, "last"),
    "chat-unmarked": _chat(UNMARKED, "assistant"),
    "chat-unmarked-last": _chat(UNMARKED, "last"),
    "chat-completion": _chat(UNMARKED, "completion"),
    "split-texts": _split_texts,
    "ipo-start": _from_an_adapter,
    "mixture": _mixture,
    "adalora": _lora(KIND="adalora", TINIT="3", TFINAL="5", DELTA_T="2"),
}
"""What a run adds to `settings`, by name. To have `make chaos` draw another option, add a line."""
