"""The losses of preferences agree with TRL's trainers: one step on the same batch, in fp32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from job.common.methods import METHODS
from job.data.batch_plan import Steps, batch, epoch_order
from job.data.preferences import join, with_partners
from job.distributed.processes import ALONE
from job.model.lora import adapter_off, trainable
from job.model.tokenizer import load_tokenizer
from job.records import Example
from job.training import objectives
from job.training.config import Hooks, Preference
from job.training.flat_parameters import FlatParameters
from job.training.objectives import OBJECTIVES
from job.training.preference_gradient import PreferenceGradient, head_of, reference_log_probs, token_log_probs
from job.training.step import StepGradient
from tests.helpers import BOS, fill_adapter, make_examples, make_model
from tests.unit.training.recipes import PLAN, RECIPE

SIZE = 6
EXACT = {"rel": 1e-5, "abs": 1e-5}
"""Differences of log-probabilities near 100, whose own rounding in fp32 is 1e-5."""


def make_pairs(count: int) -> list[Example]:
    """Pairs of answers of different lengths to one prompt each."""
    prompts = make_examples(count, shortest=3, longest=12)
    answers = make_examples(2 * count, shortest=4, longest=30)
    pairs = []
    for index, prompt in enumerate(prompts):
        ids = prompt.input_ids[:-1]
        sides = [
            Example((*ids, *answer.input_ids[1:]), (*(False,) * len(ids), *(True,) * (len(answer.input_ids) - 1)))
            for answer in answers[2 * index : 2 * index + 2]
        ]
        pairs.append(join(*sides))
    return pairs


def make_labelled(count: int) -> list[Example]:
    """Answers with labels, each with a mismatched answer behind it."""
    first = [replace(pair.sequences[0], desirable=index % 3 != 0) for index, pair in enumerate(make_pairs(count))]
    return list(with_partners(first, [epoch_order(3, count, 0)], 512))


def with_references(model: Any, examples: Sequence[Example]) -> list[Example]:
    """The examples with their log-probabilities by the base."""
    with adapter_off(model):
        references = reference_log_probs(model, fused=False)(examples)
    return [replace(example, reference=tuple(sums)) for example, sums in zip(examples, references, strict=True)]


def our_step(
    model: Any, examples: Sequence[Example], options: Preference, *, budget: int = 10_000
) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Loss, metrics and gradient of the first step over all examples."""
    recipe = replace(
        RECIPE,
        global_batch_size=len(examples),
        micro_batch_tokens=budget,
        preference=options,
    )

    def backward(loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    step = StepGradient(
        model,
        Steps(examples, recipe.seed, recipe.global_batch_size, 1),
        FlatParameters(trainable(model).values(), 256),
        recipe=recipe,
        plan=PLAN,
        hooks=Hooks(lambda _: None, lambda *_: None, lambda: False),
        processes=ALONE,
        packed_gradient=lambda *_: pytest.fail("not for preferences"),
        preference=PreferenceGradient(options, lambda s: token_log_probs(model, head_of(model), s), backward),
    )
    loss = float(step(0))
    return loss, step.metrics, {name: p.grad.detach().clone() for name, p in trainable(model).items()}


def split(example: Example) -> tuple[list[int], list[list[int]]]:
    """Prompt and answers, as TRL has them."""
    at = example.targets.index(True)
    return list(example.input_ids[:at]), [list(one.input_ids[at:]) for one in example.sequences]


def trl_trainer(
    method: str, base_folder: Path, folder: Path, examples: Sequence[Example], **options: Any
) -> tuple[Any, list[dict[str, Any]]]:
    """TRL's own trainer with the same adapter, and the same tokens as its rows; all of them are one batch."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    kinds: dict[str, Any] = {"dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer)}
    config, kind = kinds.get(method, (ORPOConfig, ORPOTrainer))
    arguments = config(
        output_dir=str(folder),
        per_device_train_batch_size=len(examples),
        per_device_eval_batch_size=len(examples),
        max_length=None if method != "orpo" else 512,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    text: dict[str, list[Any]] = {"prompt": ["a", "b"]}
    labelled, pairs = {"completion": ["x", "y"], "label": [True, False]}, {"chosen": ["x", "y"], "rejected": ["z", "w"]}
    text |= labelled if method == "kto" else pairs
    model = plain_model(base_folder)
    trainer = kind(
        model, args=arguments, train_dataset=Dataset.from_dict(text), processing_class=load_tokenizer(base_folder)
    )
    for name, parameter in trainable(trainer.model).items():
        parameter.data = FILLED[name].clone()
    rows = []
    for example in examples:
        prompt, answers = split(example)
        if method == "dpo":
            rows.append({"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]})
        elif method == "kto":
            mismatched = {"KL_completion_ids": answers[1], "label": example.desirable}
            rows.append({"prompt_ids": prompt, "completion_ids": answers[0], **mismatched})
        else:
            row = {"prompt_input_ids": prompt}
            for side, answer in zip(("chosen", "rejected"), answers, strict=True):
                row[f"{side}_input_ids"] = ids = prompt + answer
                row |= {f"{side}_attention_mask": [1] * len(ids), f"{side}_labels": [-100] * len(prompt) + answer}
            rows.append(row)
    return trainer, rows


def trl_step(
    method: str, base_folder: Path, folder: Path, examples: Sequence[Example], **options: Any
) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Loss, metrics and gradient of TRL's own trainer, with its own collator, on the same tokens."""
    trainer, rows = trl_trainer(method, base_folder, folder, examples, **options)
    inputs = trainer.data_collator(rows)
    trainer.model.eval()
    if method == "orpo":
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, inputs)
    else:
        loss = trainer.compute_loss(trainer.model, inputs)
        metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    loss.backward()
    return loss.item(), metrics, {name: p.grad for name, p in trainable(trainer.model).items()}


FILLED: dict[str, torch.Tensor] = {}


def plain_model(base_folder: Path) -> Any:
    """The tiny base by transformers and PEFT alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tests.helpers import LINEAR

    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, attn_implementation="sdpa")
    return get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules=list(LINEAR), task_type="CAUSAL_LM"))


@pytest.fixture(scope="module")
def model(base_folder: Path) -> Any:
    """The tiny base with a filled adapter."""
    made = fill_adapter(make_model(base_folder))
    FILLED.update({name: p.detach().clone() for name, p in trainable(made).items()})
    return made


WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
CASES: dict[str, tuple[Preference, dict[str, Any]]] = {
    "dpo": (Preference("dpo"), {}),
    "dpo beta": (Preference("dpo", beta=0.4), {"beta": 0.4}),
    "ipo": (Preference("dpo", loss="ipo"), {"loss_type": ["ipo"]}),
    "orpo": (Preference("orpo", beta=0.3), {"beta": 0.3}),
    "kto": (Preference("kto", desirable_weight=1.5, undesirable_weight=0.5), WEIGHTS),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_trl(case: str, model: Any, base_folder: Path, tmp_path: Path) -> None:
    """Loss, gradient, and all rewards and log-probabilities are TRL's on the same batch, within 1e-5."""
    options, given = CASES[case]
    examples = make_labelled(SIZE) if options.method == "kto" else make_pairs(SIZE)
    loss, metrics, gradient = our_step(model, with_references(model, examples), options)
    theirs = trl_step(options.method, base_folder, tmp_path, examples, **given)
    assert loss == pytest.approx(theirs[0], **EXACT)
    assert metrics == {name: pytest.approx(theirs[1][name], **EXACT) for name in metrics}
    for name, found in gradient.items():
        assert (found - theirs[2][name]).norm() <= 1e-5 * found.norm() + 1e-9, name


def test_label_smoothing_is_that_of_conservative_dpo(model: Any, base_folder: Path, tmp_path: Path) -> None:
    """TRL 1.16 smooths no labels in its sigmoid loss, but does in `aot`, which is the same on a single pair."""
    options = Preference("dpo", label_smoothing=0.2)
    examples = make_pairs(1)
    loss, _, gradient = our_step(model, with_references(model, examples), options)
    given = {"loss_type": ["aot"], "label_smoothing": 0.2}
    theirs = trl_step("dpo", base_folder, tmp_path, examples, **given)
    assert loss == pytest.approx(theirs[0], **EXACT)
    assert loss != pytest.approx(our_step(model, with_references(model, examples), Preference("dpo"))[0], **EXACT)
    for name, found in gradient.items():
        assert (found - theirs[2][name]).norm() <= 1e-5 * found.norm() + 1e-9, name


@pytest.mark.parametrize("method", OBJECTIVES)
def test_micro_batches_change_nothing(method: Any, model: Any) -> None:
    """Loss, metrics and gradient of a step do not depend on how it is cut, down to one example at a time."""
    examples = with_references(model, make_labelled(SIZE) if method == "kto" else make_pairs(SIZE))
    whole, parts = (our_step(model, examples, Preference(method), budget=budget) for budget in (10_000, 1))
    assert whole[0] == pytest.approx(parts[0], **EXACT)
    assert whole[1] == {name: pytest.approx(value, **EXACT) for name, value in parts[1].items()}
    for name, found in whole[2].items():
        torch.testing.assert_close(found, parts[2][name], rtol=1e-4, atol=1e-6)


def test_a_step_without_a_side_leaves_its_metrics_out(model: Any) -> None:
    """KTO's step of bad answers alone has no rewards of good ones, and no margin."""
    bad = [replace(example, desirable=False) for example in make_labelled(4)]
    _, metrics, _ = our_step(model, with_references(model, bad), Preference("kto"))
    assert metrics.keys() == {"kl", "rewards/rejected", "logps/rejected"}


def test_mismatched_answers_are_those_of_the_step() -> None:
    """KTO pairs a prompt with the answer before it in the step, as TRL does in a batch; none gets its own."""
    examples = make_labelled(SIZE)
    order = batch(3, SIZE, SIZE, 0)
    answers = [split(examples[row])[1] for row in order]
    assert [mismatched for _, mismatched in answers] == [own for own, _ in (answers[-1:] + answers[:-1])]
    assert all(split(example)[0][0] == BOS for example in examples)


def test_the_tables_agree() -> None:
    """Every method but plain fine-tuning has an objective, and the other way round."""
    assert OBJECTIVES.keys() == METHODS.keys() - {"sft"}


def test_the_odds_of_any_likelihood_are_exact() -> None:
    """log(1 - exp(x)) and its gradient -1 / expm1(-x), in fp32 as exact as in fp64, near 0 and far from it."""
    values = [-1e-6, -1e-3, -0.5, -0.7, -1.0, -10.0, -80.0]
    x = torch.tensor(values, requires_grad=True)
    found = objectives._log1mexp(x)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    exact = [float(value) for value in x.detach().double()]
    assert found.tolist() == pytest.approx(
        [math.log(-math.expm1(value)) for value in exact[:4]] + [math.log1p(-math.exp(value)) for value in exact[4:]],
        rel=1e-6,
    )
    assert gradient.tolist() == pytest.approx([-1 / math.expm1(-value) for value in exact], rel=1e-6)
