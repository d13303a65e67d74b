"""Checks the files of answers to JOB_EVAL__PROMPTS. The answers themselves cannot be recomputed without the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from job.common.formatting import count
from job.data.evaluation_prompts import prompts_sha256
from job.evaluation.prompt_answers import count_unsafe, parse_answers
from job.records import PromptAnswer
from job.runs.layout import PROMPTS, RESULTS, prompts_key
from job.verification.differences import CheckResult, Copies, Difference, find_differences, show

_ENDS = ("eos", "length")


def check_prompts(results: Mapping[str, Any], copies: Copies) -> CheckResult | None:
    """Checks that both files have one answer to each prompt, and that the manifest has the prompts' number and hash.

    Returns:
        None if prompts are neither set, nor in the manifest, nor among the files.
    """
    settings = {name: setting["value"] for name, setting in results["settings"].items()}
    claimed, setting = results["evaluation"].get("prompts"), settings.get("eval.prompts")
    if claimed is None and setting is None and not any(path.startswith(PROMPTS) for path in copies):
        return None
    where = f"{RESULTS} evaluation.prompts"
    if claimed is None or setting is None:
        return CheckResult("prompts", "", (Difference(where, show(claimed), f"JOB_EVAL__PROMPTS {show(setting)}"),))
    differences: list[Difference] = []
    answers = [_read(prompts_key(side), copies, claimed["max_new_tokens"], differences) for side in ("base", "adapter")]
    if not differences:
        base, adapter = ([(line.prompt, line.reference) for line in side] for side in answers)
        computed = {
            "source": setting if isinstance(setting, str) else "validation rows",
            "count": len(base),
            "max_new_tokens": settings.get("eval.prompts_max_new_tokens"),
            "sha256": prompts_sha256(base),
        }
        differences += find_differences(where, claimed, computed)
        differences += _unsafe(results, dict(zip(("base", "adapter"), answers, strict=True)))
        if base != adapter or [line.where for line in answers[0]] != [line.where for line in answers[1]]:
            differences.append(
                Difference(prompts_key("adapter"), "the prompts that the base answered", "other prompts")
            )
    return CheckResult("prompts", f"{count(claimed['count'], 'prompt')} answered twice", tuple(differences))


def _unsafe(results: Mapping[str, Any], answers_by_side: Mapping[str, Sequence[PromptAnswer]]) -> Iterator[Difference]:
    """Checks that each answer has a probability if, and only if, there is a classifier, and recounts unsafe answers."""
    safety = (results.get("dataset", {}).get("audit") or {}).get("safety")
    for side, lines in answers_by_side.items():
        for number, line in enumerate(lines, start=1):
            if (line.unsafe is None) != (safety is None) or not 0 <= (line.unsafe or 0) <= 1:
                what = "a probability that the answer is unsafe" if safety else "no score without a classifier"
                yield Difference(f"{prompts_key(side)} line {number}", what, show(line.unsafe))
                break
    counted = safety and {side: count_unsafe(lines, safety["threshold"]) for side, lines in answers_by_side.items()}
    yield from find_differences(
        f"{RESULTS} evaluation.unsafe_answers", results["evaluation"].get("unsafe_answers"), counted
    )


def _read(path: str, copies: Copies, most: int, differences: list[Difference]) -> list[PromptAnswer]:
    try:
        lines = parse_answers(copies[path].read_bytes())
    except KeyError:
        differences.append(Difference(path, "the answers to the prompts", "no readable file"))
        return []
    except ValueError as error:
        differences.append(Difference(path, "one answer on each line", str(error).splitlines()[0]))
        return []
    for number, line in enumerate(lines, start=1):
        if line.ended_by not in _ENDS or (line.tokens == most) != (line.ended_by == "length") or line.tokens > most:
            what = f"{line.tokens} tokens, ended by {show(line.ended_by)}"
            differences.append(
                Difference(f"{path} line {number}", f"at most {most} tokens, all of them if cut off", what)
            )
            break
    return lines
