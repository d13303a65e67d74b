"""Judges the answers of base and adapter to JOB_EVAL__PROMPTS by the rules of JOB_EVAL__PRINCIPLES."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from job import log
from job.common.hashing import code_hashes
from job.common.out_of_memory import memory_errors, out_of_memory
from job.errors import naming
from job.evaluation.judges import SETTING, Judge, LocalJudge, ServedJudge
from job.evaluation.principles import (
    preference,
    question,
    read_principles,
    rules_sha256,
    write_judgements,
)
from job.evaluation.prompt_answers import parse_answers
from job.evaluation.resumable import complete
from job.evaluation.score_cache import ScoreCache, score_conditions
from job.model.base import choose_device, choose_dtype
from job.model.files import fingerprint, weight_files
from job.records import Artifact, Judgement, JudgeRecord, PromptAnswer
from job.runs.attempt import Attempt
from job.runs.layout import JUDGEMENTS, SCORES, prompts_key
from job.settings.field_types import is_server
from job.settings.load import Settings
from job.settings.schema import Eval
from job.storage.hub import download_model, local_model

_CODE = ("job.evaluation.judges", "job.evaluation.principles")
"""Modules whose code decides a judgement, beside those of all scores."""
_CHOICES = ("A", "B", None)
"""A choice as it is kept: its number here."""


@dataclass(frozen=True)
class FoundJudge:
    """The judge of a run, and the folder of its files; None for a server."""

    record: JudgeRecord
    folder: Path | None


def find_judge(options: Eval, source: str) -> FoundJudge:
    """The judge, downloaded where it is on the hub, and the rules.

    Args:
        options: JOB_EVAL__PRINCIPLES and JOB_EVAL__JUDGE are given.
        source: JOB_EVAL__JUDGE, or the path of a copy.

    Raises:
        DataError, SettingsError: It is not there, or has no weights in safetensors; or the rules cannot be read.
        Unreachable, AccessDenied: The hub cannot be used.
    """
    rules, name = read_principles(Path(options.principles or "")), options.judge or ""
    known = (list(rules), rules_sha256(rules))
    if is_server(name):
        return FoundJudge(JudgeRecord(name, options.judge_model, None, None, *known), None)
    with naming(SETTING):
        folder, revision = download_model(source, options.judge_revision)
        return FoundJudge(JudgeRecord(name, None, revision, fingerprint(folder), *known), folder)


def check_local(options: Eval) -> None:
    """Refuses rules that cannot be read, and a judge that is named by its path and not there.

    Raises:
        DataError, SettingsError: With what is wrong.
    """
    read_principles(Path(options.principles or ""))
    with naming(SETTING):
        if options.judge and not is_server(options.judge) and (folder := local_model(options.judge)) is not None:
            weight_files(folder)


def judge_answers(
    attempt: Attempt, settings: Settings, judge: FoundJudge, base_answers: Artifact, adapter_answers: Artifact
) -> Artifact:
    """Asks the judge for each prompt twice, and publishes what it says.

    Args:
        attempt: Where it is published. What was answered is kept, so that a restart asks for the rest only.
        settings: Those of the run.
        judge: Who judges.
        base_answers: The published file.
        adapter_answers: The same of the adapter.

    Raises:
        AccessDenied, Unreachable, SettingsError: As the server answers.
        DataError: The local judge cannot be used.
        TrainingFailed: Memory ran out, on the processor, too.
        Preempted: The job was asked to stop.
    """
    sides = [parse_answers(attempt.fetch(one).read_bytes()) for one in (base_answers, adapter_answers)]
    pairs = list(zip(*sides, strict=True))
    asked = [number for number, (base, adapter) in enumerate(pairs) if base.answer != adapter.answer]
    conditions = {
        **score_conditions({"judge": asdict(judge.record), "device": settings.run.device}),
        "judge code": code_hashes(*_CODE),
    }
    cache = ScoreCache(attempt.store, SCORES, settings.run.id, conditions)
    texts = sha256(json.dumps([[base.prompt, base.answer, adapter.answer] for base, adapter in pairs]).encode())
    known = cache.load_chances(texts.hexdigest(), [2] * len(asked))
    before = attempt.questions

    with log.progress("judged", len(asked), every=max(1, len(asked) // 10)) as show_progress:

        def on_progress(numbers: int) -> None:
            attempt.questions = before + numbers // 2
            show_progress(numbers // 2)

        def compute() -> Iterator[tuple[int, list[float]]]:
            if len(known) == len(asked):
                return
            choose = _chooser(settings, judge, attempt.alive)
            for part, number in enumerate(asked):
                if part not in known:
                    base, adapter = pairs[number]
                    orders = ((base, adapter), (adapter, base))
                    texts = [question(judge.record.rules, base.prompt, a.answer, b.answer) for a, b in orders]
                    yield part, [float(_CHOICES.index(choose(text))) for text in texts]

        found = complete(dict(known), compute(), cache, on_progress)
    said = {number: [_CHOICES[int(choice)] for choice in found[part]] for part, number in enumerate(asked)}
    judgements = [_judgement(base, said.get(number)) for number, (base, _) in enumerate(pairs)]
    counts = {word: [preference(one) for one in judgements].count(word) for word in ("adapter", "base", "tie")}
    log.get_logger().info("judged answers", judge=judge.record.model, **counts)
    write_judgements(attempt.work / JUDGEMENTS, judgements)
    return attempt.publish(attempt.work / JUDGEMENTS, JUDGEMENTS)


def _judgement(base: PromptAnswer, said: Sequence[str | None] | None) -> Judgement:
    return Judgement(base.where, said is None, *(said or (None, None)))


def _chooser(settings: Settings, judge: FoundJudge, alive: Callable[[], None]) -> Callable[[str], str | None]:
    """Asks the judge; a local one that does not fit beside the trained model moves to the CPU."""
    devices = ["cpu"] if choose_device(settings.run.device).type == "cpu" else [settings.run.device, "cpu"]
    loaded: list[Judge] = []

    def choose(text: str) -> str | None:
        while True:
            try:
                with nullcontext() if len(devices) > 1 else memory_errors("judging", "take a smaller JOB_EVAL__JUDGE"):
                    if not loaded:
                        loaded.append(open_judge(settings, judge, devices[0]))
                    return loaded[0].choose(text, alive)
            except RuntimeError as error:
                if len(devices) == 1 or not out_of_memory(error):
                    raise
                log.get_logger().warning("the judge does not fit into the GPU's memory; it goes on on the processor")
                loaded.clear()
                devices.pop(0)

    return choose


def open_judge(settings: Settings, judge: FoundJudge, device: str) -> Judge:
    """The judge, ready to be asked; `device` as JOB_RUN__DEVICE.

    Raises:
        DataError, SettingsError: A local model cannot be loaded.
    """
    if judge.folder is None:
        key = settings.eval.judge_key
        return ServedJudge(
            judge.record.model, judge.record.served or "", None if key is None else key.get_secret_value()
        )
    chosen = choose_device(device)
    return LocalJudge(judge.folder, chosen, choose_dtype("auto", chosen))


def published_answers(artifacts: Sequence[Artifact], side: str) -> Artifact:
    """The file of a side's answers among what an evaluation has published."""
    return next(one for one in artifacts if one.path == prompts_key(side))
