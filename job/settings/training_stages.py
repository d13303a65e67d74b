"""Several methods in one run: `JOB_TRAIN__METHOD=sft,dpo` stands for two runs, one after the other.

The first one fine-tunes, in the folder `sft` of the run's folder. The second starts from its adapter, which is also the
reference model of the preferences. Each is a whole run with its own checkpoints and results, so each resumes by itself;
why, is in .github/decisions/0019-training-stages-are-runs.md.
"""

from __future__ import annotations

from job.common.methods import FIRST_STAGE, SFT
from job.settings.load import Settings, describe
from job.settings.sources import nested
from job.storage.location import join

SUFFIX = "-sft"
"""What the id of the first stage ends with, in logs and trackers."""
_LONGEST_ID = 128
_LEFT = {
    *("train.beta", "train.preference_loss", "train.label_smoothing", "train.desirable_weight"),
    *("train.undesirable_weight", "train.sft_epochs", "train.sft_learning_rate"),
    *("data.sft_source", "data.sft_revision"),
}
"""Settings of preferences and of two stages, which the first stage is without."""
_OF_THE_WHOLE = ("gate.", "export.")
"""Groups that the first stage is without as well: they are about what the last one publishes."""

_VALIDATION = {
    *("data.validation", "data.validation_revision", "data.validation_split"),
    *("train.validate_every_steps", "train.stop_after", "train.keep"),
}
"""Settings that the first stage is without, too, where the rows for validation have a source: it holds pairs."""


def split_stages(settings: Settings) -> tuple[Settings, ...]:
    """The settings of each stage, in their order; those of the whole are those of its last stage."""
    if settings.train.is_one_stage:
        return (settings,)
    own = {
        "run.id": f"{settings.run.id[: _LONGEST_ID - len(SUFFIX)]}{SUFFIX}",
        "train.method": SFT,
        "train.epochs": settings.train.sft_epochs,
        "train.learning_rate": settings.train.sft_learning_rate,
        "data.source": settings.data.sft_source,
        "data.revision": settings.data.sft_revision,
        "data.format": "auto",
    }
    left = _LEFT if isinstance(settings.data.validation, int | float | None) else _LEFT | _VALIDATION
    plain = {name: value for name, value, _ in describe(Settings())}
    defaults = {name: value for name, value in plain.items() if name in left or name.startswith(_OF_THE_WHOLE)}
    values = {name: value for name, value, _ in describe(settings)} | defaults | own
    first = Settings(**nested(values))
    sources = dict(settings.sources) | dict.fromkeys(defaults, "default")
    first.keep_sources(sources | dict.fromkeys(own, f"first stage of {settings.run.id}"))
    first.keep_whole(settings.run.id)
    return first, settings


def folder_of(settings: Settings) -> str:
    """Where a run's files lie: below the output, or, for a first stage, below the run that it belongs to."""
    if settings.part_of is None:
        return join(settings.run.output, settings.run.id)
    return join(join(settings.run.output, settings.part_of), FIRST_STAGE)


def start_of(settings: Settings, adapter: str) -> str | None:
    """Where the adapter lies that training starts from: the setting, or what the stage before published.

    Args:
        settings: Those of a stage.
        adapter: Where a run's adapter lies below the run's folder.
    """
    if settings.train.is_one_stage:
        return settings.lora.start
    return join(join(folder_of(settings), FIRST_STAGE), adapter)
