"""The model card: the hub's own library reads it, it claims no more than the manifest, and identical runs share it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from job.report import model_card
from tests.example_run import ATTEMPTS, DATASET, MODEL, TRAINING, answers, evidence, results


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """The manifest of a run on hub's model and data."""
    return results(evidence(arc_easy=answers(60, 10, 400)))


def read(made: dict[str, Any]) -> ModelCard:
    """The card as the hub's library reads it."""
    return ModelCard(model_card.render_model_card(made).decode(), ignore_metadata_errors=False)


def test_the_hub_reads_its_metadata(made: dict[str, Any]) -> None:
    """Base, library, task, data, licence of the data, tags, and both metrics as evaluation results."""
    data: ModelCardData = read(made).data
    assert data.base_model == "mistralai/Mistral-7B-v0.1"
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert data.datasets == ["tatsu-lab/alpaca"]
    assert data.license == "cc-by-nc-4.0"
    assert {"lora", "qlora"} <= set(data.tags or [])
    task = made["evaluation"]["tasks"]["arc_easy"]
    accuracy, normalized = data.eval_results or []
    assert (accuracy.dataset_type, accuracy.dataset_name) == ("allenai/ai2_arc", "arc_easy")
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", round(task["adapter"]["acc"], 4))
    assert (normalized.metric_type, normalized.metric_value) == ("acc_norm", round(task["adapter"]["acc_norm"], 4))
    assert accuracy.dataset_args == {"num_few_shot": 0}


def test_nothing_is_made_up_for_files_of_ones_own() -> None:
    """Paths are no hub ids: no base, no data set, no licence in the metadata; the text says what is not known."""
    own = results(
        evidence(arc_easy=answers(3, 1, 40)),
        ["--eval.data", "arc_easy=q.jsonl"],
        model=replace(MODEL, id="models/base", revision=None, quantization="none", double_quantization=False),
        dataset=replace(DATASET, source="tatsu-lab/alpaca", revision=None, format="text"),
    )
    found = read(own)
    assert (found.data.base_model, found.data.datasets, found.data.license) == (None, None, None)
    assert "qlora" not in (found.data.tags or [])
    assert {result.dataset_type for result in found.data.eval_results or []} == {"arc_easy"}
    assert "The job does not know the data's licence" in found.text
    assert "BitsAndBytesConfig" not in found.text
    assert "revision=" not in found.text
    assert "NF4" not in found.text


@pytest.mark.parametrize(
    ("place", "revision", "name", "called"),
    [
        ("org/model", "c0ffee", None, ("org/model", "c0ffee")),
        ("/srv/models/base-v2/", None, None, ("base-v2", None)),
        ("s3://bucket/in/base", None, None, ("base", None)),
        ("models/base", None, None, ("base", None)),
        ("..", None, None, ("base", None)),
        (f"/cache/hub/models--org--a-model/snapshots/{'0' * 40}", None, None, ("org/a-model", "0" * 40)),
        ("/srv/models/base", None, "org/model", ("org/model", None)),
        ("mirror/model", "c0ffee", "org/model", ("org/model", None)),  # a commit of the mirror's
        ("org/model", "c0ffee", "org/model", ("org/model", "c0ffee")),
    ],
)
def test_the_base_has_a_name_that_means_something_elsewhere(
    place: str, revision: str | None, name: str | None, called: tuple[str, str | None]
) -> None:
    """What the user named, or the hub id it was fetched as, or the last part of a path; never the whole path."""
    assert model_card.public_base(place, revision, name) == called


def test_a_path_of_this_machine_is_not_published() -> None:
    """Neither the base's nor the data's; a name that was given stands where the hub and the code read it."""
    model = replace(MODEL, id="/srv/secret/place/base", revision=None)
    dataset = replace(DATASET, source="/srv/secret/place/rows.jsonl", revision=None)
    answered = evidence(arc_easy=answers(3, 1, 40))
    unnamed = read(results(answered, model=model, dataset=dataset))
    named = read(results(answered, ["--model.name", "org/model"], model=model, dataset=dataset))
    assert "/srv/" not in unnamed.content
    assert "/srv/" not in named.content
    assert '"path/to/base",' in unnamed.text
    assert "The base has no\npublic name here" in unnamed.text
    assert (named.data.base_model, unnamed.data.base_model) == ("org/model", None)
    assert '"org/model",' in named.text
    assert "No public name" not in named.text
    assert "`rows.jsonl`" in named.text


def test_several_sources_are_named_without_their_paths(made: dict[str, Any]) -> None:
    """Each source is in title and text: a hub id whole, of a path the last part; the hub's are in the metadata."""
    parts = [("/home/me/a.jsonl", None), ("org/rows", "abc")]
    sources = [{"source": source, "revision": commit, "rows": 1, "sha256": "0"} for source, commit in parts]
    dataset = {"source": "/home/me/a.jsonl=2x,org/rows@abc", "revision": None, "sources": sources}
    card = read({**made, "dataset": made["dataset"] | dataset})
    assert "fine-tuned on a.jsonl, rows" in card.text
    assert "/home/me" not in card.text
    assert card.data.datasets == ["org/rows"]


def test_it_tells_what_a_user_has_to_know(made: dict[str, Any]) -> None:
    """Verdict with interval, recipe, limits, how to load and how to verify, hashes."""
    text = read(made).text
    for told in (
        "**Better than its quantized base on arc_easy.**",
        "| arc_easy | 400 | acc | ",
        "| LoRA rank, alpha, dropout | 16, 16, 0.0 |",
        "| learning rate | 0.0002, linear after 5 steps of warmup |",
        'revision="27d67f1b5f57dc0953326b2601d68371d40ea8da"',
        "bnb_4bit_compute_dtype=torch.bfloat16",
        "### Instruction:\n{instruction}",
        "## Limits",
        "qlora-job verify",
        made["model"]["sha256"],
    ):
        assert told in text, told
    assert "[More Information Needed]" not in text
    limits = text.split("## Limits")[1].split("## ")[0]
    assert [line for line in limits.splitlines() if line and not line.startswith("- ")] == []
    assert limits.count("\n- ") == limits.count("- ") == 4


def test_the_code_in_it_is_code(made: dict[str, Any]) -> None:
    """The block that loads the adapter is Python."""
    block = model_card.render_model_card(made).decode().partition("```python\n")[2].partition("```")[0]
    compile(block, "card", "exec")
    assert "PeftModel.from_pretrained(base," in block


def test_new_tokens_need_room_in_the_base(made: dict[str, Any]) -> None:
    """The code makes it before the adapter is loaded; a run without new tokens says nothing of it."""
    text = model_card.render_model_card(
        {**made, "model": {**made["model"], "added_tokens": ["<ask>", "<|a|>"]}}
    ).decode()
    block = text.partition("```python\n")[2].partition("```")[0]
    compile(block, "card", "exec")
    assert block.index("base.resize_token_embeddings(") < block.index("PeftModel.from_pretrained(base,")
    assert "| new tokens | `<ask>`, " in text
    assert "resize_token_embeddings" not in model_card.render_model_card(made).decode()


def test_identical_runs_share_it(made: dict[str, Any]) -> None:
    """Neither the run's name nor any time, speed, price or place of reused scores is in it."""
    slower = results(
        evidence(arc_easy=answers(60, 10, 400)),
        run_id="another",
        attempts=ATTEMPTS[:1],
        training=replace(TRAINING, seconds=1.0, tokens_per_second=9.0, peak_memory_bytes=5),
        on_demand_usd_per_hour=9.0,
    )
    slower["evaluation"]["tasks"]["arc_easy"]["base"]["reused_from"] = "s3://elsewhere"
    slower["hardware"]["memory_bytes"] = 1
    assert model_card.render_model_card(slower) == model_card.render_model_card(made)


def test_what_is_not_plain_lora_is_said(made: dict[str, Any]) -> None:
    """Options of the adapter and a warmup by share are in the table of the training; without them nothing is."""
    settings = {**made["settings"]}
    for name, value in {"lora.use_dora": True, "lora.rank_pattern": {"q_proj": 4}, "train.warmup_ratio": 0.1}.items():
        settings[name] = {"value": value, "source": "environment"}
    text = read({**made, "settings": settings}).text
    assert "| adapter options | use_dora True, rank_pattern {'q_proj': 4} |\n| LoRA on | " in text
    assert "after 10 % of the steps of warmup |" in text
    assert "vLLM 0.33 applies this; older releases may silently ignore it" in text
    assert "vLLM cannot serve this adapter unchanged: it is DoRA" in text
    plain = read(made).text
    assert "adapter options" not in plain
    assert "vLLM 0.33" not in plain


def test_where_it_is_pushed_is_said(made: dict[str, Any]) -> None:
    """A card on the hub names its repository; without a target nothing is said of one."""
    settings = {**made["settings"]}
    for name, value in {"export.hub": "me/model", "export.oci": "registry/models:v1"}.items():
        settings[name] = {"value": value, "source": "environment"}
    text = read({**made, "settings": settings}).text
    assert "| pushed to, when it is complete and its gate is met | `me/model`, `registry/models:v1` |" in text
    assert "pushed to" not in read(made).text
