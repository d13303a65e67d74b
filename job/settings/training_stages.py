"""Several methods in one run: `JOB_TRAIN__METHOD=sft,dpo` is carried out as two runs, one after the other.

The first fine-tunes, in the folder `sft` of the run's folder. The second starts from the adapter of the first, which is
also the reference model of the preferences. Each is a whole run with its own checkpoints and results, so each resumes
alone; the reasons are in .github/decisions/0019-training-stages-are-runs.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from job.common.methods import FIRST_STAGE, FIRST_STAGE_SETTINGS, INHERITED, SFT
from job.errors import DataError, JobError, Problem, SettingsError, environment_name
from job.settings.field_types import LONGEST_RUN_ID
from job.settings.load import Settings, describe
from job.settings.sources import nested
from job.storage.location import join

SUFFIX = "-sft"
"""Suffix of the first stage's run id, in logs and trackers."""
_NOT_IN_FIRST_STAGE = {
    *("train.beta", "train.preference_loss", "train.label_smoothing", "train.desirable_weight"),
    "train.undesirable_weight",
    *FIRST_STAGE_SETTINGS.values(),
}
"""Settings of preferences and of two-stage runs; the first stage has their defaults."""
_OF_LAST_STAGE = ("gate.", "export.", "eval.prompts", "eval.principles", "eval.judge", "sign.")
"""Prefixes of settings about what the last stage publishes; the first stage has their defaults, too."""

_VALIDATION = {
    *("data.validation", "data.validation_revision", "data.validation_split"),
    *("train.validate_every_steps", "train.stop_after", "train.keep"),
}
"""The first stage has the defaults of these, too, if JOB_DATA__VALIDATION is a source: its rows are preferences."""
_FIRST = "first stage of "
"""Beginning of the source of a value that the first stage has from a setting of its own."""
_FIRST_STAGE_NAMES = {environment_name(name): environment_name(own) for name, own in FIRST_STAGE_SETTINGS.items()}
"""Setting -> the setting of the first stage that replaces it, both as environment variables."""


def split_stages(settings: Settings) -> tuple[Settings, ...]:
    """The settings of each training stage, in their order; the last stage has the settings of the run unchanged."""
    if settings.train.is_one_stage:
        return (settings,)
    of_run = {name: value for name, value, _ in describe(settings)}
    of_run["notify.webhook"] = settings.notify.webhook  # the only secret; `describe` gives asterisks
    first_stage = {
        "run.id": f"{settings.run.id[: LONGEST_RUN_ID - len(SUFFIX)]}{SUFFIX}",
        "train.method": SFT,
        **{
            name: of_run[of_first]
            for name, of_first in FIRST_STAGE_SETTINGS.items()
            if name not in INHERITED or of_run[of_first] is not None
        },
    }
    validates_on_pairs = "data.validation" not in first_stage and isinstance(settings.data.validation, str)
    reset = _NOT_IN_FIRST_STAGE | _VALIDATION if validates_on_pairs else _NOT_IN_FIRST_STAGE
    all_defaults = {name: value for name, value, _ in describe(Settings())}
    defaults = {name: value for name, value in all_defaults.items() if name in reset or name.startswith(_OF_LAST_STAGE)}
    values = of_run | first_stage | defaults
    first = Settings(**nested(values))
    sources = dict(settings.sources) | dict.fromkeys(first_stage, f"{_FIRST}{settings.run.id}")
    first.set_sources(sources | dict.fromkeys(defaults, "default"))
    first.set_part_of(settings.run.id)
    return first, settings


@contextmanager
def settings_renamed_in_errors(part_of: str | None, names: Mapping[str, str] = _FIRST_STAGE_NAMES) -> Iterator[None]:
    """Context manager in which errors of a first stage name the settings of that stage, such as `JOB_DATA__SFT_SOURCE`.

    Args:
        part_of: `Settings.part_of` of the stage: the id of its run if it is a first stage. If None, errors are raised
            unchanged.
        names: Setting -> the setting of the first stage, by the names of messages.
    """
    try:
        yield
    except JobError as error:
        if part_of is None:
            raise

        def renamed(text: str) -> str:
            return re.sub(r"\bJOB_\w+", lambda match: names.get(match[0], match[0]), text)

        if not isinstance(error, DataError | SettingsError):
            error.args = tuple(renamed(part) if isinstance(part, str) else part for part in error.args)
            raise
        problems = [Problem(renamed(problem.where), renamed(problem.what)) for problem in error.problems]
        raise type(error)(problems, error.total, renamed(error.advice)) from None


def given_settings_renamed_in_errors(settings: Settings) -> AbstractContextManager[None]:
    """`settings_renamed_in_errors` for errors about the values of settings, such as that one has changed.

    A setting that the first stage takes from the second (`INHERITED`), since its own is not set, keeps its name.
    """
    set_for_first_stage = {
        environment_name(name) for name, source in settings.sources.items() if source.startswith(_FIRST)
    }
    names = {name: first_name for name, first_name in _FIRST_STAGE_NAMES.items() if name in set_for_first_stage}
    return settings_renamed_in_errors(settings.part_of, names)


def folder_of(settings: Settings) -> str:
    """Folder of a run's files: below JOB_RUN__OUTPUT, or, for a first stage, below the folder of its run."""
    if settings.part_of is None:
        return join(settings.run.output, settings.run.id)
    return join(join(settings.run.output, settings.part_of), FIRST_STAGE)


def start_of(settings: Settings, adapter: str) -> str | None:
    """Location of the adapter that training starts from: JOB_LORA__START, or the adapter of the previous stage.

    Args:
        settings: Settings of one stage.
        adapter: Path of the adapter within a run's folder.
    """
    if settings.train.is_one_stage:
        return settings.lora.start
    return join(join(folder_of(settings), FIRST_STAGE), adapter)
