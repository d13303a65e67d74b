"""Checks before a run takes its lease that need neither the store nor the network: of paths and names.

All problems are reported together, and a run that cannot begin leaves no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from job.common.export_formats import EXTRA, not_installed
from job.common.source_list import parse_sources
from job.data.evaluation_prompts import find_prompts
from job.data.sources import check_source
from job.data.training_and_validation import ValidationSource
from job.errors import Problem, SettingsError, check_all, named_by, raise_problems
from job.evaluation.policy import read_policy
from job.evaluation.question_files import find_questions
from job.evaluation.task_names import check_tasks
from job.model.files import weight_files
from job.model.start_adapter import local_start
from job.results.baseline import check_run
from job.results.signing import load_private_key
from job.settings.combinations import sharded_alone
from job.settings.load import Settings
from job.settings.schema import Sign
from job.settings.training_stages import settings_renamed_in_errors
from job.stages import principles, safety
from job.stages.pull_rows import validation_of
from job.storage.hub import local_model
from job.storage.location import is_remote

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey


def check_inputs(
    settings: Settings, later: Sequence[Settings] = (), *, has_record: bool = False, processes: int | None = None
) -> None:
    """Refuses paths that are not there, data sets of the hub without a revision, unknown tasks, too few processes.

    Args:
        settings: The settings of this training stage.
        later: The settings of the training stages after it.
        has_record: Whether an earlier attempt recorded the stage `pull`. Then the quantized base may come from a cache,
            and the model is not needed.
        processes: Number of processes on all machines; None to leave out the checks that depend on it.

    Raises:
        DataError, SettingsError: All problems, in one error.
    """
    checks = list(_data_sources(settings, later))
    checks += [(location, partial(find_questions, location)) for location in settings.eval.data.values()]
    last = later[-1] if later else settings  # has prompts, principles, gate, exports and signature
    if isinstance(last.eval.prompts, str):
        checks.append((last.eval.prompts, partial(_check_prompts, last.eval.prompts)))
    if not has_record:
        checks.append((settings.model.id, partial(_check_model, settings.model.id)))
    path_checks: list[tuple[str | None, Callable[[str], object]]] = [
        (settings.data.safety_model, lambda _: safety.check_local(settings.data)),
        (last.eval.principles, lambda _: principles.check_local(last.eval)),
        (settings.lora.start, local_start),
        (last.gate.baseline, check_run),
        (last.gate.policy, read_policy),
    ]
    checks += [(location, partial(check, location)) for location, check in path_checks if location is not None]
    checks = [(location, check) for location, check in checks if not is_remote(location)]
    if not has_record:
        checks.append(("tasks", partial(check_tasks, settings.eval.tasks, settings.eval.data)))
    checks.append(("export", partial(_check_extra, last.export.formats)))
    checks.append(("sign", partial(private_key, last.sign)))
    if processes is not None and (problem := sharded_alone(settings, processes)) is not None:
        checks.append(("placement", partial(raise_problems, [problem])))
    check_all(checks)


def _data_sources(settings: Settings, later: Sequence[Settings]) -> Iterator[tuple[str, Callable[[], object]]]:
    """(location, check) of the rows to train and to validate on."""
    for stage in (settings, *later):
        data, check = stage.data, settings_renamed_in_errors(stage.part_of)(check_source)
        for source in parse_sources(data.source):
            yield source.location, partial(check, source.location, source.revision or data.revision, data.split)
        validation = validation_of(data)
        if isinstance(validation, ValidationSource):
            yield (
                validation.name,
                partial(check, validation.name, validation.revision, validation.split, "JOB_DATA__VALIDATION"),
            )


def private_key(sign: Sign) -> EllipticCurvePrivateKey | None:
    """The key of JOB_SIGN__KEY; None without one. Raises SettingsError if the file holds none that can be used."""
    password = sign.password.get_secret_value() if sign.password is not None else None
    return None if sign.key is None else load_private_key(sign.key, password)


def _check_prompts(location: str) -> None:
    """Refuses a file of prompts that is not there."""
    with named_by("JOB_EVAL__PROMPTS"):
        find_prompts(location)


def _check_extra(formats: Sequence[str]) -> None:
    """Refuses formats whose packages are not installed, before hours of training."""
    if lacking := not_installed(formats):
        what = f"needs {', '.join(lacking)}, which is not installed: run pip install '{EXTRA}' in the repository"
        raise SettingsError([Problem("JOB_EXPORT__FORMATS", what)])


def _check_model(source: str) -> None:
    """Refuses a folder that is not there or has no weights; a hub id is not looked up."""
    folder = local_model(source)
    if folder is not None:
        weight_files(folder)
