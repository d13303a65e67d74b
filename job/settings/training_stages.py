"""Several methods in one run: `JOB_TRAIN__METHOD=sft,dpo` stands for two runs, one after the other.

The first one fine-tunes, in the folder `sft` of the run's folder. The second starts from its adapter, which is also the
reference model of the preferences. Each is a whole run with its own checkpoints and results, so each resumes by itself;
why, is in .github/decisions/0019-training-stages-are-runs.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from job.common.methods import FIRST_STAGE, FIRST_STAGE_SETTINGS, INHERITED, SFT
from job.errors import DataError, Problem, SettingsError, environment_name
from job.settings.load import Settings, describe
from job.settings.sources import nested
from job.storage.location import join

SUFFIX = "-sft"
"""What the id of the first stage ends with, in logs and trackers."""
_LONGEST_ID = 128
_LEFT = {
    *("train.beta", "train.preference_loss", "train.label_smoothing", "train.desirable_weight"),
    "train.undesirable_weight",
    *FIRST_STAGE_SETTINGS.values(),
}
"""Settings of preferences and of two stages, which the first stage is without."""
_OF_THE_WHOLE = ("gate.", "export.", "eval.prompts", "eval.principles", "eval.judge", "sign.")
"""Settings that begin so are left out in the first stage as well: they are about what the last one publishes."""

_VALIDATION = {
    *("data.validation", "data.validation_revision", "data.validation_split"),
    *("train.validate_every_steps", "train.stop_after", "train.keep"),
}
"""Settings that the first stage is without, too, where the rows for validation have a source: it holds pairs."""
_OWN = {environment_name(name): environment_name(own) for name, own in FIRST_STAGE_SETTINGS.items()}


def split_stages(settings: Settings) -> tuple[Settings, ...]:
    """The settings of each stage, in their order; those of the whole are those of its last stage."""
    if settings.train.is_one_stage:
        return (settings,)
    given = {name: value for name, value, _ in describe(settings)}
    own = {
        "run.id": f"{settings.run.id[: _LONGEST_ID - len(SUFFIX)]}{SUFFIX}",
        "train.method": SFT,
        **{
            name: given[of_first]
            for name, of_first in FIRST_STAGE_SETTINGS.items()
            if name not in INHERITED or given[of_first] is not None
        },
    }
    pairs = "data.validation" not in own and isinstance(settings.data.validation, str)
    left = _LEFT | _VALIDATION if pairs else _LEFT
    plain = {name: value for name, value, _ in describe(Settings())}
    defaults = {name: value for name, value in plain.items() if name in left or name.startswith(_OF_THE_WHOLE)}
    values = given | own | defaults
    first = Settings(**nested(values))
    sources = dict(settings.sources) | dict.fromkeys(own, f"first stage of {settings.run.id}")
    first.keep_sources(sources | dict.fromkeys(defaults, "default"))
    first.keep_whole(settings.run.id)
    return first, settings


@contextmanager
def naming_its_settings(part_of: str | None) -> Iterator[None]:
    """Within it, errors about a first stage's data name the settings that it comes from: `JOB_DATA__SFT_SOURCE`.

    Args:
        part_of: The run that the stage is the first one of, as `Settings.part_of` has it; None for a run of its own.
    """
    try:
        yield
    except (DataError, SettingsError) as error:
        if part_of is None:
            raise
        problems = [Problem(_renamed(one.where), _renamed(one.what)) for one in error.problems]
        raise type(error)(problems, error.total, _renamed(error.advice)) from None


def _renamed(text: str) -> str:
    return re.sub(r"\bJOB_\w+", lambda found: _OWN.get(found[0], found[0]), text)


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
