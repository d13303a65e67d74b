"""Compares one family with plain PEFT and the model's own eager attention: right, refused, or wrong.

The tolerance between two right computations is measured, not chosen. The plain computation is repeated with every
weight of the base changed by one rounding (a factor of 1 +- 2^-23, the sign drawn). By backward error analysis a
computed inner product of n terms is the exact one of numbers changed by about sqrt(n) roundings (Higham, Accuracy and
Stability of Numerical Algorithms, 2nd ed., sections 2.8 and 3.1), so two computations in another order may differ by
sqrt(n) times the effect of one rounding. Layers, routers and steps of Adam amplify both alike. If rounding of the
results already explains the difference, the plain computation is not repeated.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from job.errors import DataError, JobError, SettingsError
from job.records import Example, Question
from tests.families.models import VOCABULARY, make_model
from tests.helpers import make_examples

Outcome = Literal["packed", "one by one", "refused", "WRONG", "FAILED", "not built"]
STEPS = 4
RATE = 1e-3
EPSILON = 2.0**-23
"""Spacing of fp32 numbers at 1."""
TERMS = VOCABULARY
"""The largest number of terms in a sum in a tiny model: the softmax over its vocabulary."""
SAFETY = 4
"""A safety factor: the noise is a single draw, and each result has several further roundings (exponentials, norms)."""
MOST_TOLERANCE = 2e-3
"""Upper limit of the tolerance: the smallest error of a wrong computation was 4e-3 (log-likelihoods of a mamba whose
state continues into the next example). If rounding may explain more, right and wrong cannot be distinguished, and the
model fails until `models.SPECIAL` has a configuration with less rounding."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on a family, the reason, and the largest differences of loss and of log-likelihood.

    The tolerances follow from the measured noise.
    """

    family: str
    outcome: Outcome
    why: str
    loss: float | None = None
    likelihood: float | None = None
    loss_tolerance: float | None = None
    likelihood_tolerance: float | None = None


@dataclass(frozen=True)
class Figures:
    """Log-likelihoods of all choices by the base, the loss of each step, and log-likelihoods with the adapter."""

    base: list[float]
    losses: list[float]
    adapter: list[float]


def check(family: str, tokenizer: Any, **changes: Any) -> Verdict:
    """Makes a tiny model of the family, and trains and scores it by the job and by the plain computation."""
    folder = Path(tempfile.mkdtemp(prefix="family-"))
    try:
        try:
            make_model(family, folder, **changes)
        except Exception as error:  # noqa: BLE001 - whatever a stranger's class says
            if (
                not (folder / "config.json").exists()
                or (verdict := _judge(family, folder, tokenizer)).outcome != "refused"
            ):
                return Verdict(family, "not built", _first(error))
            return verdict  # the model cannot be built at all, so the job's refusal is right
        return _judge(family, folder, tokenizer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:200]}"


def _judge(family: str, folder: Path, tokenizer: Any) -> Verdict:
    from job.model.adapter_files import save_adapter
    from job.model.published_names import find_published_names

    examples = [e for e in make_examples(40, longest=45, prompt=0.3) if max(e.input_ids) < VOCABULARY]
    questions = _questions(examples)
    try:
        model, why, packed = load(folder, examples)
        names = find_published_names(model, folder)
    except (SettingsError, DataError) as error:
        return Verdict(
            family, "refused", str(error).replace(str(folder), "the folder").replace("JOB_MODEL__ID: ", "")[:300]
        )
    except Exception as error:  # noqa: BLE001 - what must not happen
        traceback.print_exc()
        return Verdict(family, "FAILED", _first(error))
    try:
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        found = ours(model, tokenizer, examples, questions)
    except JobError as error:
        return Verdict(family, "FAILED", f"refused too late: {_first(error)}")
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        return Verdict(family, "FAILED", _first(error))
    try:
        save_adapter(model, folder / "adapter", base=str(folder), revision=None, names=names)
        again = reloaded(folder, names.architecture, questions)
        expected = plain(folder, model, start, examples, questions)
        pairs = {
            "the base's scores": (found.base, expected.base),
            "the losses": (found.losses, expected.losses),
            "the adapter's scores": (found.adapter, expected.adapter),
            "the scores of the adapter that PEFT loads": (again, found.adapter),
        }
        explained = {name: _explained(EPSILON * max(map(abs, one))) for name, (_, one) in pairs.items()}
        if any(not _apart(*pairs[name]) <= explained[name] for name in pairs):  # rounding does not explain it
            noise = plain(folder, model, start, examples, questions, perturbed=1)
            moved = [
                _apart(noise.base, expected.base),
                _apart(noise.losses, expected.losses),
                *[_apart(noise.adapter, expected.adapter)] * 2,
            ]
            explained = {name: max(explained[name], _explained(by)) for name, by in zip(pairs, moved, strict=True)}
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        return Verdict(family, "FAILED", f"the plain reference: {_first(error)}")
    apart = {name: _apart(*pair) for name, pair in pairs.items()}
    outcome, why = _outcome(apart, explained, packed=packed, why=why)
    worst = max((name for name in pairs if "scores" in name), key=apart.__getitem__)
    most = {name: min(by, MOST_TOLERANCE) for name, by in explained.items()}
    return Verdict(family, outcome, why, apart["the losses"], apart[worst], most["the losses"], most[worst])


def _outcome(
    apart: Mapping[str, float], explained: Mapping[str, float], *, packed: bool, why: str
) -> tuple[Outcome, str]:
    """The verdict for these differences, given what rounding explains.

    Args:
        apart: The largest difference of each figure.
        explained: What rounding explains of it.
        packed: How the job computes the family.
        why: The job's reason for that.
    """
    wrong = [name for name, by in apart.items() if not by <= explained[name]]
    if wrong:
        return "WRONG", f"{' and '.join(wrong)} differ; {why}"
    if unclear := [f"{name} by {explained[name]:.0e}" for name in apart if explained[name] > MOST_TOLERANCE]:
        said = f"rounding alone may change {' and '.join(unclear)}, so that nothing is shown"
        return "FAILED", f"{said}: give it a milder configuration in tests/families/models.py; {why}"
    return "packed" if packed else "one by one", why


def _questions(examples: list[Example]) -> list[Question]:
    ids = [list(e.input_ids) for e in examples if len(e.input_ids) > 12][:5]
    return [Question(tuple(a[:8]), (tuple(a[8:14]), tuple(b[2:5]), (b[6],))) for a, b in pairwise(ids)]


def load(folder: Path, examples: list[Example]) -> tuple[Any, str, bool]:
    """The model as the job's load stage makes it; how it is computed, and whether packed."""
    import torch

    from job.model.load_base import load_base
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


def ours(model: Any, tokenizer: Any, examples: list[Example], questions: list[Question]) -> Figures:
    """The job's figures."""
    from job.evaluation.scoring import score_sequence
    from job.model.lora import adapter_off
    from job.training.config import Hooks, Recipe
    from job.training.prepare import prepare
    from job.training.trainer import train

    def scores() -> list[float]:
        return [choice.log_likelihood for question in score_sequence(model, questions) for choice in question]

    model.eval()
    with adapter_off(model):
        base = scores()
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
    plan = prepare(  # as in the job: activations of most families are recomputed in the backward pass
        model,
        [len(example.input_ids) for example in examples],
        global_batch_size=recipe.global_batch_size,
        quantization="none",
        optimizer=recipe.optimizer,
        budget=recipe.micro_batch_tokens,
        keep_base="auto",
        recompute="auto",
        gigabytes=None,
    )
    with tempfile.TemporaryDirectory() as states:
        trained = train(
            model,
            tokenizer,
            examples,
            recipe=recipe,
            plan=plan,
            hooks=Hooks(on_metrics=lambda _m: None, on_save=lambda *_: None, stop=lambda: False),
            folder=Path(states),
        )
    model.eval()
    return Figures(base, [m.loss for m in trained.history], scores())


def plain(
    folder: Path,
    model: Any,
    start: dict[str, Any],
    examples: list[Example],
    questions: list[Question],
    *,
    perturbed: int | None = None,
) -> Figures:
    """The same by transformers' eager attention and PEFT alone, one example at a time, the steps written out.

    Args:
        folder: The base.
        model: The job's trained model, whose target modules are used.
        start: The adapter's initial weights.
        examples: To train on.
        questions: To ask.
        perturbed: A seed, by which every weight of the base is changed by one rounding, up or down.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from job.data.batch_plan import batch
    from job.model.files import silence
    from job.model.target_modules import find_targets

    config = AutoConfig.from_pretrained(folder)
    silence(config)  # the reference recipe has no dropout in the base
    base = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="eager")
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if perturbed is not None:
        draw = torch.Generator().manual_seed(perturbed)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.mul_(1 + EPSILON * (2.0 * torch.randint(2, parameter.shape, generator=draw) - 1))
    same = model.peft_config["default"]
    peft = get_peft_model(
        base,
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=find_targets(base),
            exclude_modules=same.exclude_modules,
            fan_in_fan_out=same.fan_in_fan_out,  # GPT-2's layers: PEFT warns if it is not given
            task_type="CAUSAL_LM",
        ),
    )
    mine = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    assert mine.keys() == start.keys(), sorted(mine.keys() ^ start.keys())[:6]
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(start[name])
    with peft.disable_adapter():
        before = score(peft, questions)
    optimizer = torch.optim.AdamW(mine.values(), lr=RATE, weight_decay=0.0)
    losses = []
    peft.train()
    for module in peft.modules():  # nor noise in its routers
        if any("jitter" in name for name in vars(module)):
            module.training = False
    for step in range(STEPS):
        rows = [examples[i] for i in batch(0, len(examples), 4, step)]
        count = sum(sum(e.targets) for e in rows)
        total = 0.0
        for e in rows:
            at = [i for i, target in enumerate(e.targets) if target]
            said = _logits(peft, e.input_ids)[[i - 1 for i in at]].log_softmax(-1)
            loss = -said.gather(1, torch.tensor(e.input_ids)[at][:, None]).sum() / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(mine.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return Figures(before, losses, score(peft, questions))


def reloaded(folder: Path, architecture: str, questions: list[Question]) -> list[float]:
    """Scores with the adapter that the job saved, loaded by plain PEFT into the class that users load."""
    import torch
    import transformers
    from peft import PeftModel

    kind = getattr(transformers, architecture)
    base = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return score(PeftModel.from_pretrained(base, folder / "adapter"), questions)


def score(model: Any, questions: list[Question]) -> list[float]:
    """The log-likelihood of every choice, each by a separate forward pass."""
    import torch

    model.eval()
    found = []
    with torch.no_grad():
        for question in questions:
            for choice in question.choices:
                ids = [*question.context, *choice[:-1]]
                said = _logits(model, ids)[len(question.context) - 1 :].log_softmax(-1)
                found.append(float(said.gather(1, torch.tensor(choice)[:, None]).sum()))
    return found


def _logits(model: Any, ids: Sequence[int]) -> Any:
    import torch

    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference; infinite if a number is not finite."""
    errors = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def _explained(noise: float) -> float:
    """The tolerance, from the effect of one rounding."""
    return SAFETY * math.sqrt(TERMS) * noise
