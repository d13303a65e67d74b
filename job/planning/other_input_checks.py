"""The checks that `plan` makes of inputs that only some runs have.

These are the signing key, the places to push to, the adapter that training starts from, the gate's baseline and policy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from job.common.lora_readers import why_not_served
from job.errors import naming
from job.evaluation.policy import CHOICES, read_policy
from job.evaluation.tasks import Tasks, check_gate
from job.model.files import build_empty, read_config
from job.model.start_adapter import check_start, check_start_fits, local_start
from job.planning.plan_settings import adapter_options
from job.planning.preflight import After, Found, NotChecked, PreflightResult, after_answers, run_check
from job.planning.preflight_models import ModelFacts, fetch_start
from job.push.push import targets
from job.results.baseline import read_baseline
from job.results.signing import key_id, load_private_key, public_key
from job.settings.load import Settings, plain_values
from job.settings.schema import Sign
from job.storage.first_answer import answers_once
from job.storage.open import StorageOptions, is_remote


def check_other_inputs(
    settings: Settings,
    storage: StorageOptions,
    tasks: Tasks | None,
    model: ModelFacts | None = None,
    *,
    after: After | None = None,
) -> Iterator[PreflightResult]:
    """Checks of the inputs that only some runs have."""
    baseline, after = settings.gate.baseline, after or partial(after_answers, answers_once(storage))

    def check_baseline() -> Found[None]:
        return "ok", f"the gate compares with run {read_baseline(baseline or '', storage).run}", None

    if (push_targets := targets(settings.export)) and (reasons := why_not_served(plain_values(settings))):
        yield PreflightResult("serving", "note", f"vLLM cannot serve this adapter unchanged: {'; '.join(reasons)}")
    if settings.sign.key is not None:
        yield run_check("signature", lambda: _check_key(settings.sign))[0]
    for target in push_targets:
        yield run_check(target.kind, lambda target=target: ("ok", target.check(), None))[0]  # type: ignore[misc]
    if settings.lora.start is not None:
        look = after([settings.lora.start], lambda: _check_start_adapter(settings, model, storage))
        yield run_check("start", look)[0]
    if baseline is not None:
        yield run_check("baseline", after([baseline], check_baseline))[0]
    if settings.gate.policy is not None or settings.gate.metric not in CHOICES:
        yield run_check("gate", lambda: _check_gate(settings, tasks))[0]


def _check_start_adapter(settings: Settings, model: ModelFacts | None, storage: StorageOptions) -> Found[None]:
    """Whether the settings and the model fit the adapter that training starts from, if it is no hub id."""
    start = settings.lora.start or ""
    if is_remote(start):
        with tempfile.TemporaryDirectory(prefix="qlora-job-plan-") as copy:
            fetch_start(start, Path(copy), storage)
            with naming(start, copy):
                return _check_start_folder(settings, model, Path(copy))
    if (folder := local_start(start)) is None:
        raise NotChecked(f"{start}: an adapter of the hub is not fetched for a plan")
    return _check_start_folder(settings, model, folder)


def _check_start_folder(settings: Settings, model: ModelFacts | None, folder: Path) -> Found[None]:
    lora = settings.lora
    lora_settings, added = lora.model_dump(mode="json"), settings.model.add_tokens
    check_start(folder, rank=lora.rank, alpha=lora.alpha, options=lora_settings, added_tokens=added)
    if model is not None:
        empty, options = build_empty(model.folder, read_config(model.folder)), adapter_options(settings)
        check_start_fits(folder, empty, targets=lora.target_modules, rank=lora.rank, options=options)
    return "ok", f"training continues from {lora.start}", None


def _check_key(sign: Sign) -> Found[None]:
    """Whether the key signs, and by which hash signatures will name it."""
    password = None if sign.password is None else sign.password.get_secret_value()
    pem = public_key(load_private_key(sign.key or "", password))
    return "ok", f"{sign.key} signs the published files; its public key has the SHA-256 {key_id(pem)[:12]}", None


def _check_gate(settings: Settings, tasks: Tasks | None) -> Found[None]:
    """Whether the gate names what the run compares."""
    gate = settings.gate
    policy = None if gate.policy is None else read_policy(gate.policy)
    if tasks is None:
        raise NotChecked("which rules are possible depends on the tasks, which could not be read")
    check_gate(tasks, gate.metric, policy, gate.policy, gate.only_choices)
    if policy is None:
        return "ok", f"the gate judges {gate.metric}", None
    return "ok", f"the gate judges {len(policy.tasks)} tasks or groups by {gate.policy}", None
