"""Judges the answers of base and adapter to JOB_EVAL__PROMPTS by the rules of JOB_EVAL__PRINCIPLES."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from job import log
from job.common.hashing import code_hashes, seal
from job.common.out_of_memory import memory_errors, out_of_memory
from job.errors import Unreachable, naming
from job.evaluation.judges import SECONDS, SETTING, Judge, LocalJudge, ServedJudge, check_folder, is_encrypted
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
from job.model.device import choose_device, choose_dtype
from job.model.files import fingerprint, weight_files
from job.records import Artifact, Judgement, JudgeRecord, PromptAnswer
from job.runs.attempt import Attempt
from job.runs.layout import JUDGEMENTS, SCORES, prompts_key
from job.settings.field_types import is_server
from job.settings.schema import Eval, Run
from job.storage.hub import download_model, local_model
from job.storage.location import is_remote

T = TypeVar("T")

_CODE = ("job.evaluation.judges", "job.evaluation.principles")
"""Modules whose code decides a judgement, besides those of all scores."""
CHECK_SECONDS = 30.0
"""Longest wait for a server's answer before training."""
_CHOICES = ("A", "B", None)
"""A stored judgement is the index of its choice here."""


@dataclass(frozen=True)
class FoundJudge:
    """The judge of a run, and the folder of its files; None for a server."""

    record: JudgeRecord
    folder: Path | None


def find_judge(options: Eval, source: str, revision: str | None) -> FoundJudge:
    """The judge, downloaded where it is on the hub, and the rules.

    Args:
        options: JOB_EVAL__PRINCIPLES and JOB_EVAL__JUDGE are given.
        source: JOB_EVAL__JUDGE, or the path of a copy.
        revision: Revision of a hub repository; None for its newest commit.

    Raises:
        DataError, SettingsError: It is not there, or has no weights in safetensors; or the rules cannot be read.
        Unreachable, AccessDenied: The hub cannot be used.
    """
    rules, name = read_principles(Path(options.principles or "")), options.judge or ""
    rule_facts = (list(rules), rules_sha256(rules))
    if is_server(name):
        return FoundJudge(JudgeRecord(name, options.judge_model, None, None, *rule_facts), None)
    with naming(SETTING):
        folder, commit = download_model(source, revision)
        return FoundJudge(JudgeRecord(name, None, commit, fingerprint(folder), *rule_facts), folder)


def check_judge(options: Eval, judge: FoundJudge, check_stop: Callable[[], None]) -> None:
    """Checks the judge before training: afterwards its settings could not be corrected any more.

    That a server does not answer is only a warning, since it may answer when it is needed.

    Raises:
        DataError, SettingsError: The judge cannot be used.
        AccessDenied: The server refuses the key.
    """
    if judge.folder is not None:
        check_folder(judge.folder)
        return
    server = _served_judge(options, judge, seconds=CHECK_SECONDS)
    if server.key is not None and not is_encrypted(server.url):
        log.get_logger().warning("JOB_EVAL__JUDGE_KEY is sent to the judge unencrypted; use an https:// address")
    try:
        server.check(check_stop)
    except Unreachable as error:
        log.get_logger().warning("the judge does not answer now; it is asked again after training", why=str(error))


def judge_sha256(record: JudgeRecord) -> str:
    """SHA-256 of what may change under the same settings: the rules, and the files of a local judge."""
    return seal({"rules": record.rules_sha256, "judge": record.sha256})


def check_local(options: Eval) -> None:
    """Refuses rules that cannot be read, and a judge that is named by its path and not there.

    Raises:
        DataError, SettingsError: With what is wrong.
    """
    read_principles(Path(options.principles or ""))
    with naming(SETTING):
        if not options.judge or is_server(options.judge) or is_remote(options.judge):
            return
        if (folder := local_model(options.judge)) is not None:
            weight_files(folder)


def judge_answers(
    attempt: Attempt, options: Eval, run: Run, judge: FoundJudge, answers: Mapping[str, Artifact]
) -> Artifact:
    """Asks the judge for each prompt twice, and publishes what it says.

    Args:
        attempt: Where it is published. Answers are kept, so that a restart requests only the missing ones.
        options: Settings of the requests to a server.
        run: The device, and the run's id.
        judge: The judge.
        answers: The published files with the answers, by side: `base` and `adapter`.

    Raises:
        AccessDenied, Unreachable, SettingsError: As the server answers.
        DataError: The local judge cannot be used.
        TrainingFailed: Memory ran out on the CPU, too.
        Preempted: The job was asked to stop.
    """
    sides = [parse_answers(attempt.fetch(artifact).read_bytes()) for artifact in (answers["base"], answers["adapter"])]
    pairs = list(zip(*sides, strict=True))
    to_judge = [number for number, (base, adapter) in enumerate(pairs) if base.answer != adapter.answer]
    answers_hash = sha256(json.dumps([[base.prompt, base.answer, adapter.answer] for base, adapter in pairs]).encode())
    facts = {**score_conditions({"judge": asdict(judge.record)}), "judge code": code_hashes(*_CODE)}

    def open_cache(device: str) -> tuple[ScoreCache, dict[int, list[float]]]:
        """The stored judgements by this judge on this device, which affects the last bits of its scores."""
        cache = ScoreCache(attempt.store, SCORES, run.id, {**facts, "device": device})
        return cache, cache.load_chances(answers_hash.hexdigest(), [2] * len(to_judge))

    devices = _devices(run.device, judge)
    caches = {device: open_cache(device) for device in devices}
    if caches[devices[-1]][1]:
        devices = devices[-1:]  # an earlier attempt changed to this device
    before = attempt.questions

    def judged_on(device: str) -> dict[int, list[float]]:
        cache, known_chances = caches[device]

        def on_progress(numbers: int) -> None:
            attempt.questions = before + numbers // 2
            show_progress(numbers // 2)

        def compute() -> Iterator[tuple[int, list[float]]]:
            if len(known_chances) == len(to_judge):
                return
            opened_judge = open_judge(options, judge, device)
            for position, number in enumerate(to_judge):
                if position not in known_chances:
                    base, adapter = pairs[number]
                    orders = ((base, adapter), (adapter, base))
                    texts = [question(judge.record.rules, base.prompt, a.answer, b.answer) for a, b in orders]
                    yield (
                        position,
                        [float(_CHOICES.index(opened_judge.choose(text, attempt.check_stop))) for text in texts],
                    )

        with log.progress("judged", len(to_judge), every=max(1, len(to_judge) // 10)) as show_progress:
            return complete(dict(known_chances), compute(), cache, on_progress)

    choices = _on_one_device(devices, judged_on)
    choices_by_pair = {
        number: [_CHOICES[int(choice)] for choice in choices[position]] for position, number in enumerate(to_judge)
    }
    return _publish_judgements(
        attempt, judge, [_judgement(base, choices_by_pair.get(number)) for number, (base, _) in enumerate(pairs)]
    )


def _publish_judgements(attempt: Attempt, judge: FoundJudge, judgements: Sequence[Judgement]) -> Artifact:
    """Logs how often each side is preferred, and publishes the judgements."""
    counts = {
        word: [preference(judgement) for judgement in judgements].count(word) for word in ("adapter", "base", "tie")
    }
    log.get_logger().info("judged answers", judge=judge.record.model, **counts)
    write_judgements(attempt.work / JUDGEMENTS, judgements)
    return attempt.publish(attempt.work / JUDGEMENTS, JUDGEMENTS)


def _judgement(base: PromptAnswer, verdicts: Sequence[str | None] | None) -> Judgement:
    return Judgement(base.where, verdicts is None, *(verdicts or (None, None)))


def _devices(device: str, judge: FoundJudge) -> list[str]:
    """The devices on which the judge may compute, best first, named as in JOB_RUN__DEVICE; a server's is not known."""
    if judge.folder is None:
        return ["server"]
    kind = choose_device(device).type
    return ["cpu"] if kind == "cpu" else [kind, "cpu"]


def _on_one_device(devices: Sequence[str], judged_on: Callable[[str], T]) -> T:
    """The judgements by the first device whose memory is large enough.

    If memory runs out, all pairs are judged again on the next device. Otherwise the moment when memory ran out would
    decide which pairs each device judges.
    """
    with memory_errors("judging", "take a smaller JOB_EVAL__JUDGE"):
        for device in devices[:-1]:
            try:
                return judged_on(device)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            log.get_logger().warning("the judge does not fit into the GPU's memory; all pairs are judged on the CPU")
            gc.collect()  # the error's traceback keeps the judge alive, in a reference cycle
        return judged_on(devices[-1])


def open_judge(options: Eval, judge: FoundJudge, device: str) -> Judge:
    """Opens the judge; `device` as JOB_RUN__DEVICE.

    Raises:
        DataError, SettingsError: A local model cannot be loaded.
    """
    if judge.folder is None:
        return _served_judge(options, judge)
    torch_device = choose_device(device)
    return LocalJudge(judge.folder, torch_device, choose_dtype("auto", torch_device))


def _served_judge(options: Eval, judge: FoundJudge, seconds: float = SECONDS) -> ServedJudge:
    key = None if options.judge_key is None else options.judge_key.get_secret_value()
    return ServedJudge(judge.record.model, judge.record.served or "", key, seconds)


def published_answers(artifacts: Sequence[Artifact], side: str) -> Artifact:
    """The file of a side's answers among what an evaluation has published."""
    return next(artifact for artifact in artifacts if artifact.path == prompts_key(side))
