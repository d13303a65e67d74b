"""One family beside plain PEFT and the model's own eager attention: right, refused, or wrong."""

from __future__ import annotations

import shutil
import tempfile
import traceback
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from job.errors import DataError, JobError, SettingsError
from job.records import PEFT, ChoiceScore, Example, ExecutionPlan, Question
from tests.families.models import VOCABULARY, make_model
from tests.helpers import make_examples

Outcome = Literal["packed", "one by one", "refused", "WRONG", "FAILED", "not built"]
Scores = list[list[ChoiceScore]]
CLOSE = 1e-4
"""Most difference of losses and log-likelihoods in fp32, relative to numbers of the size of 10."""
STEPS = 4
RATE = 1e-3


@dataclass(frozen=True)
class Verdict:
    """What came of a family, why in words, and the largest differences of loss and of log-likelihood."""

    family: str
    outcome: Outcome
    why: str
    loss: float | None = None
    likelihood: float | None = None


def check(family: str, tokenizer: Any, **changes: Any) -> Verdict:
    """Makes a tiny model of the family, and trains and asks it in the job's way and in the plain one."""
    folder = Path(tempfile.mkdtemp(prefix="family-"))
    try:
        try:
            make_model(family, folder, **changes)
        except Exception as error:  # noqa: BLE001 - whatever a stranger's class says
            return Verdict(family, "not built", _first(error))
        return _judge(family, folder, tokenizer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _first(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _judge(family: str, folder: Path, tokenizer: Any) -> Verdict:
    from job.model.lora import save_adapter

    examples = [e for e in make_examples(40, longest=45, prompt=0.3) if max(e.input_ids) < VOCABULARY]
    questions = _questions(examples)
    try:
        model, why, packed = load(folder, examples)
    except (SettingsError, DataError) as error:
        return Verdict(
            family, "refused", str(error).replace(str(folder), "the folder").replace("JOB_MODEL__ID: ", "")[:300]
        )
    except Exception as error:  # noqa: BLE001 - what must not happen
        traceback.print_exc()
        return Verdict(family, "FAILED", _first(error))
    try:
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        base, losses, adapter = ours(model, tokenizer, examples, questions)
    except JobError as error:
        return Verdict(family, "FAILED", f"refused too late: {_first(error)}")
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        return Verdict(family, "FAILED", _first(error))
    try:
        save_adapter(model, folder / "adapter", base=str(folder), revision=None)
        expected = plain(folder, model, start, examples, questions, folder / "adapter")
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        return Verdict(family, "FAILED", f"the plain reference: {_first(error)}")
    loss, likelihood = _steps_apart(losses, expected[1]), _apart(adapter, expected[2])
    exact = max(_apart(base, expected[0]), _apart(adapter, expected[3])) <= 10 * CLOSE  # sums over a choice's tokens
    if exact and not (loss <= CLOSE and likelihood <= 10 * CLOSE):  # how much of it is rounding, blown up by the steps?
        again = plain(folder, model, start, examples, questions, folder / "adapter", backwards=True)
        by_loss, by_likelihood = _steps_apart(again[1], expected[1]), _apart(again[2], expected[2])
        right = loss <= max(CLOSE, 10 * by_loss) and likelihood <= max(10 * CLOSE, 10 * by_likelihood)
        why += f"; the plain steps in another order differ by {by_loss:.0e} and {by_likelihood:.0e}"
    else:
        right = exact and loss <= CLOSE and likelihood <= 10 * CLOSE
    outcome: Outcome = ("packed" if packed else "one by one") if right else "WRONG"
    return Verdict(family, outcome, why, loss, likelihood)


def _questions(examples: list[Example]) -> list[Question]:
    ids = [list(e.input_ids) for e in examples if len(e.input_ids) > 12][:12]
    return [Question(tuple(a[:8]), (tuple(a[8:14]), tuple(b[2:5]), (b[6],))) for a, b in pairwise(ids)]


def load(folder: Path, examples: list[Example]) -> tuple[Any, str, bool]:
    """The model as the job's load stage makes it; how it is computed, and whether packed."""
    import torch

    from job.model.base import load_base
    from job.model.lora import add_adapter
    from job.model.packing_check import choose_packing
    from job.training.lm_head_loss import losses_of

    cpu = torch.device("cpu")
    base = load_base(
        folder, quantization="none", double_quantization=True, dtype=torch.float32, device=cpu, max_length=64
    )
    model = add_adapter(base, rank=4, alpha=8, dropout=0.0, target_modules=None, seed=1)
    packing = choose_packing(model, examples, max_length=64, losses=losses_of(model))
    return model, packing.reason, packing.packed


def ours(
    model: Any, tokenizer: Any, examples: list[Example], questions: list[Question]
) -> tuple[Scores, list[float], Scores]:
    """Scores of the base, the loss of each step, and scores with the adapter, by the job."""
    from job.evaluation.scoring import score_sequence
    from job.model.lora import adapter_off
    from job.training.config import Hooks, Recipe
    from job.training.trainer import train

    model.eval()
    with adapter_off(model):
        base = score_sequence(model, questions)
    recipe = Recipe(
        seed=0,
        total_steps=STEPS,
        learning_rate=RATE,
        scheduler="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        global_batch_size=4,
        micro_batch_tokens=128,
        optimizer="adamw_torch",
        save_every_steps=1000,
    )
    with tempfile.TemporaryDirectory() as states:
        trained = train(
            model,
            tokenizer,
            examples,
            recipe=recipe,
            plan=ExecutionPlan(
                kept_base=False, kept_activations=True, recorded=False, reason="as tests have it", forward=PEFT
            ),
            hooks=Hooks(on_metrics=lambda _m: None, on_save=lambda *_: None, stop=lambda: False),
            folder=Path(states),
        )
    return base, [m.loss for m in trained.history], score_sequence(model.eval(), questions)


def plain(  # noqa: PLR0917
    folder: Path,
    model: Any,
    start: dict[str, Any],
    examples: list[Example],
    questions: list[Question],
    adapter: Path,
    *,
    backwards: bool = False,
) -> tuple[Scores, list[float], Scores, Scores]:
    """The same by transformers' eager attention and PEFT alone, one example at a time, the steps written out.

    And the scores with the adapter that the job published, loaded by plain PEFT.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from job.data.batch_plan import batch
    from job.model.files import silence
    from job.model.lora import find_targets

    config = AutoConfig.from_pretrained(folder)
    silence(config)  # the reference recipe has no dropout in the base
    base = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="eager")
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    outside = model.peft_config["default"].exclude_modules
    peft = get_peft_model(
        base,
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=find_targets(base),
            exclude_modules=outside,
            fan_in_fan_out=model.peft_config[
                "default"
            ].fan_in_fan_out,  # GPT-2's layers: PEFT warns where it is not given
            task_type="CAUSAL_LM",
        ),
    )
    mine = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    assert mine.keys() == start.keys(), sorted(mine.keys() ^ start.keys())[:6]
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(start[name])

    def logits(ids: Any, peft: Any = peft) -> Any:
        return peft(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()

    def score(peft: Any = peft) -> list[list[ChoiceScore]]:
        peft.eval()
        found = []
        with torch.no_grad():
            for q in questions:
                found.append([])
                for choice in q.choices:
                    said = logits([*q.context, *choice[:-1]], peft)[len(q.context) - 1 :].log_softmax(-1)
                    picked = said.gather(1, torch.tensor(choice)[:, None]).sum()
                    greedy = said.argmax(-1).tolist() == list(choice)
                    found[-1].append(ChoiceScore(float(picked), greedy))
        return found

    with peft.disable_adapter():
        before = score()
    optimizer = torch.optim.AdamW(mine.values(), lr=RATE, weight_decay=0.0)
    losses = []
    peft.train()
    for step in range(STEPS):
        rows = [examples[i] for i in batch(0, len(examples), 4, step)]
        count = sum(sum(e.targets) for e in rows)
        total = 0.0
        for e in reversed(rows) if backwards else rows:
            at = [i for i, target in enumerate(e.targets) if target]
            said = logits(e.input_ids)[[i - 1 for i in at]].log_softmax(-1)
            loss = -said.gather(1, torch.tensor(e.input_ids)[at][:, None]).sum() / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(mine.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    published = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager"), adapter
    )
    return before, losses, score(), score(published)


def _steps_apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _apart(one: list[list[ChoiceScore]], other: list[list[ChoiceScore]]) -> float:
    return max(
        abs(a.log_likelihood - b.log_likelihood)
        for mine, theirs in zip(one, other, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )
