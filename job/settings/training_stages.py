"""Several methods in one run: `JOB_TRAIN__METHOD=sft,dpo` stands for two runs, one after the other.

The first one fine-tunes, under the run's id with `-sft` behind it. Its adapter is where the second starts, and what the
second compares preferences with. Each is a whole run with its own checkpoints and results, so each resumes by itself.
"""

from __future__ import annotations

from job.common.methods import SFT
from job.settings.load import Settings, describe
from job.settings.sources import nested
from job.storage.location import join

SUFFIX = "-sft"
"""What the id of the run of the first stage ends with."""
_LEFT = {
    *("train.beta", "train.preference_loss", "train.label_smoothing", "train.desirable_weight"),
    *("train.undesirable_weight", "train.sft_epochs", "train.sft_learning_rate"),
    *("data.sft_source", "data.sft_revision"),
}
"""Settings of preferences and of two stages, which the first stage is without."""
_OF_THE_WHOLE = ("gate.", "export.")
"""Groups that the first stage is without as well: they are about what the last one publishes."""


def split_stages(settings: Settings) -> tuple[Settings, ...]:
    """The settings of each stage, in their order; those of the whole are those of its last stage."""
    if settings.train.is_one_stage:
        return (settings,)
    own = {
        "run.id": f"{settings.run.id}{SUFFIX}",
        "train.method": SFT,
        "train.epochs": settings.train.sft_epochs,
        "train.learning_rate": settings.train.sft_learning_rate,
        "data.source": settings.data.sft_source,
        "data.revision": settings.data.sft_revision,
        "data.format": "auto",
    }
    defaults = {
        name: value for name, value, _ in describe(Settings()) if name in _LEFT or name.startswith(_OF_THE_WHOLE)
    }
    values = {name: value for name, value, _ in describe(settings)} | defaults | own
    first = Settings(**nested(values))
    sources = dict(settings.sources) | dict.fromkeys(defaults, "default")
    first.keep_sources(sources | dict.fromkeys(own, f"first stage of {settings.run.id}"))
    return first, settings


def start_of(settings: Settings, adapter: str) -> str | None:
    """Where the adapter lies that training starts from: the setting, or what the stage before published.

    Args:
        settings: Those of a stage.
        adapter: Where a run's adapter lies below the run's folder.
    """
    if settings.train.is_one_stage:
        return settings.lora.start
    return join(join(settings.run.output, f"{settings.run.id}{SUFFIX}"), adapter)
