"""The model cards (README.md) of the adapter and of exported formats: the hub's YAML metadata, and a template's text.

Identical runs give identical cards: no times, no speed, no run id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from job.common.export_formats import MERGED, is_adapter
from job.common.formatting import count
from job.common.lora_readers import admitted_rank, has_patterns, published_rank, why_not_served
from job.common.methods import METHODS
from job.data.licences import LICENCES
from job.data.schemas import PROMPTS
from job.evaluation.comparison import original_tasks
from job.report import audit_wording, export_wording, wording
from job.report.prompts import ShownPrompt
from job.report.templating import render
from job.results.public_bases import last_part, public_base
from job.runs.layout import WEIGHTS, export_folder

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

MAX_PROMPTS = 3
"""Prompts with their answers on the card; the run's folder has all."""
_SEES = "ForConditionalGeneration"
"""Ending of the class names of multimodal models in transformers (also of encoder-decoders, which are not trained)."""
METRICS = {"acc": ("accuracy", "accuracy"), "acc_norm": ("acc_norm", "accuracy by length-normalized likelihood")}
"""Metric -> (type, name) in the hub's metadata."""
_READERS = {
    "compressed-tensors": "the package `compressed-tensors`",
    "gptq": "a reader of GPTQ: the package `gptqmodel` with `optimum`, or `auto-round`",
    "awq": "a reader of AWQ, such as the package `gptqmodel`",
}
"""What transformers needs to load a quantized model, by the method."""


def render_model_card(
    results: Mapping[str, Any], prompts: Sequence[ShownPrompt] = (), signer: str | None = None
) -> bytes:
    """The card from a manifest, as UTF-8 Markdown; of the prompts that were answered it shows the first.

    `signer` is the SHA-256 of the public key, if the folder is signed: the card is written before its signature.
    """
    settings = {name: setting["value"] for name, setting in results["settings"].items()}
    model, dataset, tasks = results["model"], results["dataset"], results["evaluation"]["tasks"]
    name, revision = public_base(model["id"], model["revision"], settings.get("model.name"))
    has_public_name = revision is not None or settings.get("model.name") is not None
    title = f"{last_part(name)}, fine-tuned on {_sources(dataset, short=True)}"
    licence = _licence(dataset)
    body = render(
        "card.md",
        escape=False,
        title=title,
        settings=settings,
        model=model,
        dataset=dataset,
        training=results["training"],
        learned=wording.learned(results["training"]),
        fp8=wording.in_fp8(results["training"]),
        tasks=tasks,
        harness=results["evaluation"]["harness"],
        measured=results["evaluation"].get("measured", {}),
        groups=results["evaluation"].get("groups", {}),
        shots=wording.shots(results["evaluation"]),
        software=results["software"],
        licence=licence,
        name=name,
        revision=revision,
        has_public_name=has_public_name,
        adapter_options=_adapter_options(settings),
        warmup=count(settings["train.warmup_steps"], "step")
        if settings.get("train.warmup_ratio") is None
        else f"{100 * settings['train.warmup_ratio']:g} % of the steps",
        auto=_auto(model),
        source=_sources(dataset, short=False),
        dtype={"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[model["dtype"]],
        prompt=PROMPTS[dataset["format"]],
        headline=[sentence for _, sentence in wording.headline(results)],
        explanations=[
            [
                *wording.explanation(name, results),
                *wording.quantization_cost(name, results),
                *wording.near_ties(name, results),
                *wording.without_overlap(name, results),
            ]
            for name in tasks
        ],
        accuracies={name: wording.accuracies(name, results) for name in tasks},
        scope=wording.scope(results["evaluation"]),
        original=original_tasks(results),
        exports=export_wording.exports(results),
        not_served=why_not_served(settings),
        patterns=has_patterns(settings),
        hub=settings.get("export.hub"),
        pushed_to=[target for target in (settings.get("export.hub"), settings.get("export.oci")) if target],
        validation=wording.validation(results["training"], dataset),
        audit=audit_wording.audit_sentence(dataset),
        prompts=prompts[:MAX_PROMPTS],
        unsafe_answers=audit_wording.unsafe_answers(results),
        principles=wording.principles(results),
        asked=results["evaluation"].get("prompts"),
        weights=next((a["sha256"] for a in results["artifacts"] if a["path"] == WEIGHTS), None),
        signer=signer,
    )
    text = f"---\n{_metadata(results, settings, title, licence, name if has_public_name else None)}\n---\n\n{body}"
    return text.encode("utf-8", errors="replace")


def render_export_card(results: Mapping[str, Any], export: Mapping[str, Any], signer: str | None = None) -> bytes:
    """The card of an exported format, for its folder, as UTF-8 Markdown.

    Args:
        results: The manifest.
        export: One of its `exports`, which is published.
        signer: As for `render_model_card`.
    """
    settings = {name: setting["value"] for name, setting in results["settings"].items()}
    model, dataset, name = results["model"], results["dataset"], export["format"]
    base, revision = public_base(model["id"], model["revision"], settings.get("model.name"))
    has_public_name = revision is not None or settings.get("model.name") is not None
    entry = next(item for item in export_wording.exports(results) if item["format"] == name)
    merged = next((item for item in results["exports"] if item["format"] == MERGED), {"reason": ""})
    quantization = export.get("quantization")
    folder = export_folder(name)
    files = [artifact["path"].removeprefix(folder) for artifact in results["artifacts"]]
    title = f"{last_part(base)}, fine-tuned on {_sources(dataset, short=True)}, {name}"
    licence = _licence(dataset)
    body = render(
        "export_card.md",
        escape=False,
        title=title,
        sentence=entry["sentence"],
        rows=[row for row in entry["rows"] if row["published"]],
        original=any(row["versus_original"] for row in entry["rows"]),
        export=export,
        merged_reason=merged["reason"],
        model=model,
        dataset=dataset,
        tasks=results["evaluation"]["tasks"],
        software=results["software"],
        name=base,
        revision=revision,
        folder=folder.rstrip("/").rpartition("/")[2],
        gguf=next((file for file in files if file.endswith(".gguf")), None),
        vllm=not name.startswith("gguf"),
        copy=is_adapter(name),
        hub=settings.get("export.hub"),
        branch=settings.get("export.hub_revision"),
        has_public_name=has_public_name,
        not_served=why_not_served(settings),
        rank=admitted_rank(published_rank(settings)),
        needs=_READERS.get(quantization["method"]) if quantization else None,
        auto=_auto(model),
        prompt=PROMPTS[dataset["format"]],
        source=_sources(dataset, short=False),
        weights=next((a["sha256"] for a in results["artifacts"] if a["path"] == WEIGHTS), None),
        signer=signer,
        calibration=quantization and quantization["calibration"],
        scope=wording.scope(results["evaluation"]),
        licence=licence,
    )
    scored = {row["task"]: row["acc"] for row in entry["rows"] if row["published"]}
    tags = ["quantized", quantization["method"]] if quantization else ["lora"] if is_adapter(name) else ["merged"]
    metadata = _export_metadata(
        results,
        scored,
        settings.get("eval.data") or {},
        title=title,
        licence=licence,
        base=base if has_public_name else None,
        tags=tags,
    )
    return f"---\n{metadata}\n---\n\n{body}".encode(errors="replace")


def _export_metadata(
    results: Mapping[str, Any],
    scored: Mapping[str, float],
    own_files: Mapping[str, str],
    *,
    title: str,
    licence: str | None,
    base: str | None,
    tags: Sequence[str],
) -> str:
    """YAML for the hub; `scored` has the accuracy by task."""
    evaluation = results["evaluation"]
    evaluations = [
        _evaluation(task, evaluation["tasks"][task], "acc", accuracy, own_files) for task, accuracy in scored.items()
    ]
    library = "gguf" if "gguf" in tags else "peft" if "lora" in tags else "transformers"
    return _hub_yaml(
        results["dataset"], evaluations, title=title, licence=licence, base=base, library=library, tags=tags
    )


def _hub_yaml(
    dataset: Mapping[str, Any],
    evaluations: Sequence[EvalResult],
    *,
    title: str,
    licence: str | None,
    base: str | None,
    library: str,
    tags: Sequence[str],
) -> str:
    """The hub's metadata, `base` being the base's public name. Only a data set with a revision is on the hub."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base,
        datasets=[part["source"] for part in dataset.get("sources") or [dataset] if part["revision"]] or None,
        license=licence,
        library_name=library,
        pipeline_tag="text-generation",
        tags=list(tags),
        model_name=re.sub(r"[^\w.-]+", "-", title).strip("-"),
        eval_results=list(evaluations),
    )
    return str(data.to_yaml())


def _auto(model: Mapping[str, Any]) -> str:
    """The class of transformers that loads a model."""
    return "AutoModelForImageTextToText" if model["architecture"].endswith(_SEES) else "AutoModelForCausalLM"


def _sources(dataset: Mapping[str, Any], *, short: bool) -> str:
    """The names of the data set's sources; of a path never more than its last part."""
    parts = dataset.get("sources") or [dataset]
    in_full = [not short and (part["revision"] or "://" in part["source"]) for part in parts]
    return ", ".join(
        part["source"] if is_full else last_part(part["source"]) for part, is_full in zip(parts, in_full, strict=True)
    )


def _adapter_options(settings: Mapping[str, Any]) -> list[str]:
    """What of the adapter is not plain LoRA, by the names of the settings; older manifests have none of them."""
    names = (
        *("kind", "init", "use_rslora", "use_dora", "layers", "rank_pattern", "alpha_pattern", "modules_to_save"),
        "experts",
    )
    plain = {"kind": "lora", "init": "default"}
    values = {name: settings.get(f"lora.{name}") for name in names}
    return [f"{name} {value}" for name, value in values.items() if value and value != plain.get(name)]


def _licence(dataset: Mapping[str, Any]) -> str | None:
    """The licence of the data, if all of it has the same; where the run records none, if it is known here by name."""
    if not (licences := dataset.get("licences")):
        return LICENCES.get(dataset["source"]) if dataset["revision"] else None
    sources = [part["source"] for part in dataset.get("sources") or [dataset]]
    named = {licences.get(source) for source in sources}
    return named.pop() if len(named) == 1 else None


def _metadata(
    results: Mapping[str, Any], settings: Mapping[str, Any], title: str, licence: str | None, base: str | None
) -> str:
    """YAML for the hub, `base` being the base's public name."""
    own_files = settings.get("eval.data") or {}
    evaluations = [
        _evaluation(name, task, row["metric"], row["adapter"], own_files)
        for name, task in results["evaluation"]["tasks"].items()
        for row in wording.accuracies(name, results)
    ]
    quantized = results["model"]["quantization"] != "none"
    method = METHODS[results["training"].get("method", "sft")]
    tags = ["lora", *(["qlora"] if quantized else []), *method.tags, "transformers", "trl"]
    return _hub_yaml(
        results["dataset"], evaluations, title=title, licence=licence, base=base, library="peft", tags=tags
    )


def _evaluation(
    name: str, task: Mapping[str, Any], metric: str, accuracy: float, own_files: Mapping[str, str]
) -> EvalResult:
    """A task's accuracy in the hub's metadata; questions of a file of JOB_EVAL__DATA are not the benchmark's."""
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="multiple-choice",
        task_name="Multiple choice",
        dataset_type=name if name in own_files else task["source"],
        dataset_name=f"{name}, questions of one's own" if name in own_files else name,
        dataset_args={"num_few_shot": task.get("num_fewshot", 0)},
        metric_type=METRICS[metric][0],
        metric_name=METRICS[metric][1],
        metric_value=round(accuracy, 4),
    )
