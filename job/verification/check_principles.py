"""Checks the figures about judgements in the manifest. The judge itself is not asked again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from job.common.formatting import count
from job.evaluation.principles import parse_judgements, rules_sha256, summarize
from job.evaluation.prompt_answers import parse_answers
from job.runs.layout import JUDGEMENTS, RESULTS, prompts_key
from job.verification.differences import CheckResult, Copies, Difference, find_differences, show

_LETTERS = ("A", "B", None)


def check_principles(results: Mapping[str, Any], copies: Copies) -> CheckResult | None:
    """Recomputes the figures from the judgements, which must be of the prompts that were answered.

    Returns:
        None if principles are neither set, nor in the manifest, nor among the files.
    """
    claimed = results["evaluation"].get("principles")
    setting = results["settings"].get("eval.principles", {}).get("value")
    if claimed is None and setting is None and JUDGEMENTS not in copies:
        return None
    where = f"{RESULTS} evaluation.principles"
    if claimed is None or setting is None:
        set_to = f"JOB_EVAL__PRINCIPLES {show(setting)}"
        return CheckResult("principles", "", (Difference(where, show(claimed), set_to),))
    try:
        differences = tuple(_differences(results, copies, claimed, where))
    except KeyError as error:
        differences = (Difference(str(error.args[0]), "a file of the run", "no readable file"),)
    except ValueError as error:
        differences = (Difference(JUDGEMENTS, "one judgement on each line", str(error).splitlines()[0]),)
    return CheckResult("principles", f"{count(claimed['n'], 'pair')} of answers", differences)


def _differences(
    results: Mapping[str, Any], copies: Copies, claimed: Mapping[str, Any], where: str
) -> Iterator[Difference]:
    judgements = parse_judgements(copies[JUDGEMENTS].read_bytes())
    settings = {name: setting["value"] for name, setting in results["settings"].items()}
    expected = {
        **summarize(judgements),
        "model": settings.get("eval.judge"),
        "served": settings.get("eval.judge_model"),
        "rules_sha256": rules_sha256(claimed["rules"]),
    }
    yield from find_differences(where, {name: claimed[name] for name in expected}, expected)
    base, adapter = (parse_answers(copies[prompts_key(side)].read_bytes()) for side in ("base", "adapter"))
    if [judgement.where for judgement in judgements] != [judgement.where for judgement in base]:
        yield Difference(JUDGEMENTS, "a line for each prompt", "other prompts")
        return
    for number, (judgement, first, second) in enumerate(zip(judgements, base, adapter, strict=True), start=1):
        letters = (judgement.base_first, judgement.adapter_first)
        wrong = judgement.same != (first.answer == second.answer) or not set(letters) <= set(_LETTERS)
        if wrong or (judgement.same and any(letters)):
            what = "a choice in each order, and none where both answers are the same"
            yield Difference(f"{JUDGEMENTS} line {number}", what, show([judgement.same, *letters]))
