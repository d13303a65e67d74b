"""The figures of a run by the names that TensorBoard and the trackers have for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.records import StepMetrics, ValidationMetrics


def step_figures(metrics: StepMetrics) -> dict[str, float]:
    """The numbers of a step, by TensorBoard's names."""
    facts = {"loss": metrics.loss, "learning_rate": metrics.learning_rate, "grad_norm": metrics.grad_norm}
    facts |= metrics.preference
    named = {f"train/{name}": value for name, value in facts.items()}
    named |= {f"measured/{name}": value for name, value in metrics.measured.items()}
    return {name: float(value) for name, value in named.items() if value is not None}


def validation_figures(metrics: ValidationMetrics) -> dict[str, float]:
    """Loss and rewards of a validation, by the names that users of TRL know."""
    return {"eval/loss": metrics.loss} | {f"eval/{name}": value for name, value in metrics.preference.items()}


def final_figures(results: Mapping[str, Any]) -> dict[str, float]:
    """The final numbers of a manifest: accuracies before and after, and the cost."""
    summary = {
        f"cost/{name}": results["cost"][name] for name in ("seconds", "usd", "wasted_seconds", "goodput", "energy_kwh")
    }
    for task, figures in results["evaluation"]["tasks"].items():
        for side in ("base", "adapter"):
            summary |= {f"evaluation/{task}/{side}_{metric}": figures[side][metric] for metric in ("acc", "acc_norm")}
        summary |= {f"evaluation/{task}/{name}": figures[name] for name in ("delta", "mcnemar_p")}
    for task, figures in results["evaluation"].get("measured", {}).items():
        for metric, values in figures["metrics"].items():
            name = f"evaluation/{task}/{metric.replace(',', '_')}"
            summary |= {f"{name}_{side}": values[side] for side in ("base", "adapter")}
    return {name: float(value) for name, value in summary.items() if value is not None}
