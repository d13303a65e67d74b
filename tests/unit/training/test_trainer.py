"""Training: the result of a step does not depend on how it is carried out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import environment as accelerate_environment
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from job.checkpoints.trainer_state import ComputationOptions, read_computation_options, validate_trainer_state
from job.common.optimizers import OPTIMIZERS
from job.data import batch_plan
from job.distributed.processes import Alone
from job.distributed.ranks import Place
from job.errors import TrainingFailed
from job.evaluation.scoring import score_sequence
from job.model.adapter_options import AdaLora, AdapterOptions
from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.kernels import TORCH
from job.model.lora import add_adapter, trainable
from job.model.packed_layout import Segment
from job.records import Example, Question, StepMetrics
from job.training import packing, padded_shapes
from job.training.config import Hooks, step_seed, total_steps
from job.training.packing import packed_inputs
from job.training.trainer import train
from tests.helpers import EOS, LINEAR, PAD, fill_adapter, make_examples, make_model, with_new_tokens
from tests.unit.training.recipes import PLAN
from tests.unit.training.training_runs import (
    EXAMPLES,
    LAYERS,
    LONGER,
    RECIPE,
    RESUMED,
    THROUGHOUT,
    adapter_hash,
    assert_same,
    facts,
    fused_model,
    gradients,
    run,
)


def plain_trl(
    base_folder: Path, tokenizer: Any, examples: Sequence[Example], folder: Path, rows: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """One step over all examples by TRL as its manual has it: padded batches of `rows`, its collator and its loss."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, attn_implementation="sdpa")
    model = fill_adapter(add_adapter(base, rank=16, alpha=16, dropout=0.0, target_modules=LINEAR, seed=1))
    columns = {
        "input_ids": [list(example.input_ids) for example in examples],
        "completion_mask": [[int(target) for target in example.targets] for example in examples],
    }
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=len(examples) // rows,
        completion_only_loss=True,
        max_grad_norm=1e9,
        optim="adamw_torch",
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer)
    with gradients(model) as found:
        trainer.train()
    return trainer.state.log_history[0]["loss"], found[0]


def ours(
    base_folder: Path, tokenizer: Any, examples: Sequence[Example], folder: Path, **changes: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """One step over all examples by the job."""
    model = fill_adapter(make_model(base_folder))
    with gradients(model) as found:
        trained, _ = run(model, tokenizer, examples, replace(RECIPE, **changes), folder)
    return trained.history[0].loss, found[0]


@pytest.mark.parametrize(
    "prompt", [pytest.param(0.0, id="all", marks=pytest.mark.long), pytest.param(0.5, id="completion")]
)
def test_a_step_is_what_plain_trl_learns(base_folder: Path, tokenizer: Any, tmp_path: Path, prompt: float) -> None:
    """Loss and gradient agree between padded TRL, one flat batch, and micro-batches of three budgets."""
    examples = make_examples(8, prompt=prompt)
    loss, gradient = plain_trl(base_folder, tokenizer, examples, tmp_path, rows=8)
    pieces = {
        budget: len(batch_plan.micro_batches([len(e.input_ids) for e in examples], budget))
        for budget in (10_000, 160, 90, 30)
    }
    assert len(set(pieces.values())) == 4, pieces
    for budget in pieces:
        own_loss, own = ours(base_folder, tokenizer, examples, tmp_path, micro_batch_tokens=budget)
        assert own_loss == pytest.approx(loss, rel=1e-5)
        assert_same(gradient, own)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_reference_itself_does_not_depend_on_its_batches(
    base_folder: Path, tokenizer: Any, tmp_path: Path, rows: int
) -> None:
    """TRL with gradient accumulation agrees too, so what is compared is the step and not one way to pad."""
    loss, gradient = plain_trl(base_folder, tokenizer, EXAMPLES, tmp_path, rows=rows)
    own_loss, own = ours(base_folder, tokenizer, EXAMPLES, tmp_path)
    assert own_loss == pytest.approx(loss, rel=1e-5)
    assert_same(gradient, own)


def test_activation_checkpointing_changes_nothing(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Recomputed activations give the same loss, gradient and adapter after the step to the bit, dropout included."""
    results = {}
    for on in (True, False):
        model = fill_adapter(make_model(base_folder, dropout=0.1))
        with gradients(model) as found:
            plan = replace(PLAN, kept_activations=not on)
            trained, _ = run(model, tokenizer, EXAMPLES, RECIPE, tmp_path, plan=plan)
        results[on] = trained.history[0].loss, found[0], [p.detach() for p in trainable(model).values()]
    assert results[True][0] == results[False][0]
    assert_same(results[True][1], results[False][1], 0)
    assert all(torch.equal(one, other) for one, other in zip(results[True][2], results[False][2], strict=True))


def test_activation_checkpointing_is_on_while_training(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """It is switched on for the steps, and off again for the evaluation that follows."""
    seen: list[bool] = []
    model = make_model(base_folder)
    layer = model.get_base_model().model.layers[0]
    hook = layer.register_forward_pre_hook(lambda module, _: seen.append(module.gradient_checkpointing))
    run(model, tokenizer, EXAMPLES, RECIPE, tmp_path, plan=replace(PLAN, kept_activations=False))
    hook.remove()
    assert seen
    assert all(seen)
    assert not layer.gradient_checkpointing
    assert not model.training


def log_probs(model: Any, examples: Sequence[Example]) -> list[torch.Tensor]:
    """Log-probabilities of the targets of examples that lie in one row, by example."""
    inputs = packed_inputs(examples, torch.device("cpu"))
    with torch.no_grad():
        logits = model(**{**inputs, "labels": None}, use_cache=False).logits[0].log_softmax(-1)
    result, start = [], 0
    for example in examples:
        end = start + len(example.input_ids)
        wanted = [place for place, target in enumerate(example.targets) if target]
        tokens = torch.tensor([example.input_ids[place] for place in wanted])
        result.append(logits[start:end][[place - 1 for place in wanted]].gather(1, tokens[:, None])[:, 0])
        start = end
    return result


def test_examples_in_a_row_never_see_each_other(base_folder: Path) -> None:
    """Other examples of the same lengths in the sequence leave the bits of an example's log-likelihoods unchanged."""
    model = fill_adapter(make_model(base_folder)).eval()
    others = [Example(e.input_ids[:1] + tuple(reversed(e.input_ids[1:])), e.targets) for e in EXAMPLES]
    mixed = [own if place % 2 else other for place, (own, other) in enumerate(zip(EXAMPLES, others, strict=True))]
    for place, (one, other) in enumerate(zip(log_probs(model, EXAMPLES), log_probs(model, mixed), strict=True)):
        assert torch.equal(one, other) is bool(place % 2), place


def test_an_example_alone_is_as_in_a_row(base_folder: Path) -> None:
    """Positions start anew with every example: in a row it scores as it does alone."""
    model = fill_adapter(make_model(base_folder)).eval()
    for example, in_a_row in zip(EXAMPLES, log_probs(model, EXAMPLES), strict=True):
        torch.testing.assert_close(log_probs(model, [example])[0], in_a_row, rtol=1e-5, atol=1e-5)


def test_the_loss_is_over_the_targets_only(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """A step's loss is the mean negative log-likelihood of all targets of its examples, and of no other token."""
    examples = make_examples(8, prompt=0.7)
    model = fill_adapter(make_model(base_folder)).eval()
    expected = -torch.cat(log_probs(model, examples))
    trained, _ = run(model, tokenizer, examples, RECIPE, tmp_path)
    assert trained.history[0].loss == pytest.approx(expected.mean().item(), rel=1e-5)
    assert trained.history[0].target_tokens == len(expected) == sum(sum(example.targets) for example in examples)


def test_the_end_is_learned(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Training makes the model say where an example ends: the end mark is a target like any other."""
    model = make_model(base_folder)

    def ending() -> float:
        return float(torch.stack([scores[-1] for scores in log_probs(model.eval(), EXAMPLES)]).mean())

    assert all(example.input_ids[-1] == EOS and example.targets[-1] for example in EXAMPLES)
    before = ending()
    run(model, tokenizer, EXAMPLES, replace(RECIPE, total_steps=10, learning_rate=1e-2), tmp_path)
    assert ending() > before + 1


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_padding_cannot_be_confused_with_the_end(
    base_folder: Path, tokenizer: Any, tmp_path: Path, pad: str | None
) -> None:
    """Without a padding token (Mistral has none), or with the end mark for one, the step is the same to the bit."""
    expected_loss, expected = ours(base_folder, tokenizer, EXAMPLES, tmp_path)
    other = type(tokenizer).from_pretrained(base_folder)
    other.pad_token = pad
    loss, gradient = ours(base_folder, other, EXAMPLES, tmp_path)
    assert loss == expected_loss
    assert_same(gradient, expected, 0.0)
    assert other.eos_token_id == EOS


def test_a_flat_row_holds_no_padding() -> None:
    """Every token of a row is a token of an example, and labels repeat exactly the targets."""
    examples = make_examples(5, prompt=0.5)
    inputs = packed_inputs(examples, torch.device("cpu"))
    ids = [token for example in examples for token in example.input_ids]
    assert inputs["input_ids"].tolist() == [ids]
    assert PAD not in ids
    targets = [target for example in examples for target in example.targets]
    assert inputs["labels"].tolist() == [[t if target else -100 for t, target in zip(ids, targets, strict=True)]]
    assert inputs["position_ids"].tolist() == [[place for e in examples for place in range(len(e.input_ids))]]


@pytest.mark.parametrize("prompt", [0.0, 0.5], ids=["all", "completion"])
@pytest.mark.parametrize("budget", [10_000, 90])
def test_padding_changes_nothing_but_rounding(
    base_folder: Path, tokenizer: Any, tmp_path: Path, prompt: float, budget: int
) -> None:
    """Rows padded to few lengths, as a GPU gets them, have the loss and the gradient of rows without padding."""
    examples, results = make_examples(8, prompt=prompt), []
    for plan in (LAYERS, THROUGHOUT):
        model = fused_model(base_folder)
        recipe = replace(RECIPE, micro_batch_tokens=budget)
        with gradients(model) as found:
            trained, _ = run(model, tokenizer, examples, recipe, tmp_path, plan=plan)
        results.append((trained.history[0].loss, found[0]))
    (loss, gradient), (padded_loss, padded_gradient) = results
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    assert_same(gradient, padded_gradient)


def test_what_lies_in_the_padding_does_not_matter(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tokens in the padding leave loss and gradient as they were, to the bit."""
    results = []
    for token in (0, 7):

        def padded_row(*given: Any, token: int = token) -> Any:
            row = packing.padded_sequence(*given)
            row.tokens[0, row.segments[-1].start :] = token
            return row

        monkeypatch.setattr("job.training.micro_batch.padded_sequence", padded_row)
        model = fused_model(base_folder)
        with gradients(model) as found:
            trained, _ = run(model, tokenizer, EXAMPLES, RECIPE, tmp_path, plan=THROUGHOUT)
        results.append((trained.history[0].loss, found[0]))
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1], 0.0)


KNOBS: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name} for name, spec in OPTIMIZERS.items() if "cpu" in spec.devices},
    "cosine": {"scheduler": "cosine"},
    "cosine with a minimum": {"scheduler": "cosine", "min_lr_ratio": 0.1},
    "warmup, stable, decay": {"scheduler": "warmup_stable_decay", "decay_steps": 3, "min_lr_ratio": 0.1},
    "noise": {"neftune_noise_alpha": 5.0},
    "no clipping": {"max_grad_norm": 0.0},
    "another order": {"data_seed": 8},
}
"""Changes to the recipe; each makes another adapter, and resumes exactly."""
QUICK = {"adamw_8bit", "muon", "noise"}
"""The others differ from these in numbers only: `make test-long`."""
STOPPED = "adamw_8bit"
"""The run that is really stopped; with the others, one resumes from what the whole run saved on its way."""


@pytest.mark.parametrize(
    "knob", [pytest.param(knob, marks=() if knob in QUICK else pytest.mark.long) for knob in KNOBS]
)
def test_a_resumed_run_is_the_same_run(base_folder: Path, tokenizer: Any, tmp_path: Path, knob: str) -> None:
    """Resumed in the middle of an epoch, NF4 training with dropout ends with the same bits and facts."""
    recipe = replace(RESUMED, **KNOBS[knob])
    whole = make_model(base_folder, quantization="nf4", dropout=0.1, rank=32)
    uninterrupted, saved = run(whole, tokenizer, LONGER, recipe, tmp_path / "whole")
    assert uninterrupted.complete
    assert [path.name for path in saved] == ["step-00000002", "step-00000004", "step-00000006"]
    state = saved[1]
    if knob == STOPPED:
        first = make_model(base_folder, quantization="nf4", dropout=0.1, rank=32)
        stopped, (*_, state) = run(first, tokenizer, LONGER, recipe, tmp_path / "stopped", stop_after=4)
        assert not stopped.complete
        assert adapter_hash(first) != adapter_hash(whole)

    # Nothing of the new process may matter: neither its fresh adapter nor its random state.
    second = fill_adapter(make_model(base_folder, quantization="nf4", dropout=0.1, rank=32))
    torch.manual_seed(12345)
    resumed, _ = run(second, tokenizer, LONGER, recipe, tmp_path / "resumed", resume=state)
    assert adapter_hash(second) == adapter_hash(whole)
    assert facts(resumed) == facts(uninterrupted)
    assert len({step.loss for step in resumed.history}) == 6


@pytest.mark.long
def test_every_knob_does_something(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Each change of the recipe ends with another adapter, but for an optimizer that computes the same otherwise."""
    hashes = {}
    for knob, changes in KNOBS.items():
        model = make_model(base_folder)
        run(model, tokenizer, LONGER, replace(RESUMED, **{"max_grad_norm": 0.1} | changes), tmp_path)
        hashes[knob] = adapter_hash(model)
    assert len(set(hashes.values())) >= len(hashes) - 1


def test_without_clipping_the_norm_is_measured_and_the_gradient_left(
    base_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """A norm of 0 is no limit: the optimizer gets the gradient that a huge limit lets through, and metrics its norm."""
    found = []
    for limit in (0.0, 1e9):
        model = fill_adapter(make_model(base_folder))
        with gradients(model) as seen:
            trained, _ = run(model, tokenizer, EXAMPLES, replace(RECIPE, max_grad_norm=limit), tmp_path)
        found.append((seen[0], trained.history[0].grad_norm))
    assert_same(found[0][0], found[1][0], 0.0)
    assert found[0][1] == found[1][1] > 0


ADALORA = AdaLora(init_r=12, target_r=8, tinit=1, tfinal=1, delta_t=1, orth_reg_weight=0.5, total_step=6)
ADAPTERS = {
    "rslora": AdapterOptions(use_rslora=True),
    "dora": AdapterOptions(use_dora=True),
    "patterns": AdapterOptions(layers=(1,), rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 64}),
    "gaussian": AdapterOptions(init="gaussian"),
    "pissa": AdapterOptions(init="pissa"),
    "olora": AdapterOptions(init="olora"),
    "adalora": AdapterOptions(kind="adalora", adalora=ADALORA),
    "orthogonal": AdapterOptions(init="orthogonal"),
    "pissa_niter_16": AdapterOptions(init="pissa_niter_16"),
    "new tokens, a module whole": AdapterOptions(added_tokens=("<ask>", "<tell>"), modules_to_save=("norm",)),
}


LIKE_OTHERS = {"rslora", "gaussian", "olora", "orthogonal", "pissa_niter_16", "patterns"}
"""They train like another one, with another scale or from other first values."""


@pytest.mark.parametrize(
    ("name", "at"),
    [
        *(pytest.param(name, 3, marks=pytest.mark.long if name in LIKE_OTHERS else ()) for name in ADAPTERS),
        *(pytest.param("adalora", at, marks=pytest.mark.long) for at in (1, 2, 4)),
    ],
)
def test_every_adapter_resumes_exactly(base_folder: Path, tokenizer: Any, tmp_path: Path, name: str, at: int) -> None:
    """Whatever the adapter, a stopped run ends with the bits, the ranks and the facts of a whole one.

    Of AdaLoRA in each of its phases: steps 2, 3 and 4 take ranks away, 5 does so for the last time.
    """
    recipe, made = replace(RESUMED, optimizer="adamw_8bit"), []
    examples = with_new_tokens(LONGER, len(ADAPTERS[name].added_tokens))
    how: dict[str, Any] = {"rank": 8, "options": ADAPTERS[name]}
    how["quantization"] = "none" if name == "orthogonal" else "nf4"
    for part, stop_after in (("whole", None), ("stopped", at), ("resumed", None)):
        model = make_model(base_folder, **how)
        resume = made[-1][2] if part == "resumed" else None
        if resume is not None:
            fill_adapter(model)
        trained, saved = run(model, tokenizer, examples, recipe, tmp_path / part, stop_after=stop_after, resume=resume)
        validate_trainer_state(saved[-1], trained.history[-1].step)
        made.append((adapter_hash(model), facts(trained), saved[-1], model.peft_config["default"].rank_pattern))
    whole, stopped, resumed = made
    assert (resumed[0], resumed[1], resumed[3]) == (whole[0], whole[1], whole[3])
    assert stopped[0] != whole[0]


@pytest.mark.parametrize("name", ["rslora", "patterns", "pissa"])
def test_fused_decoders_learn_the_same(base_folder: Path, tokenizer: Any, tmp_path: Path, name: str) -> None:
    """Other scales, other ranks side by side, layers without an adapter: the whole fused decoder agrees with PEFT."""
    found = []
    for plan in (PLAN, THROUGHOUT):
        model = make_model(base_folder, rank=8, options=ADAPTERS[name])
        if name != "pissa":  # whose values are none to overwrite
            fill_adapter(model)
        if plan.fused:
            assert fuse_layers(model, keep_dequantized=True, kernels=TORCH) == "all"
        with gradients(model) as seen:
            trained, _ = run(model, tokenizer, EXAMPLES, RECIPE, tmp_path, plan=plan)
        found.append((trained.history[0].loss, seen[0]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert_same(found[0][1], found[1][1], 1e-3 if name == "pissa" else 1e-4)


def test_the_frozen_half_of_a_decomposition_stays(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Training moves the half that PEFT would train, and no bit of what takes the base's part away."""
    model = make_model(base_folder, rank=8, options=ADAPTERS["pissa"])
    before = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    run(model, tokenizer, LONGER, replace(RESUMED, optimizer="lion_8bit", weight_decay=0.1), tmp_path)
    for name, parameter in trainable(model).items():
        rows, old = (parameter, before[name]) if ".lora_A." in name else (parameter.T, before[name].T)
        assert torch.equal(rows[8:], old[8:]), name
        assert not torch.equal(rows[:8], old[:8]), name


def test_adalora_takes_pefts_steps(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """With torch's AdamW the parameters and the ranks are those of PEFT's loop: its loss, its allocator."""
    from peft.tuners.adalora.layer import AdaLoraLayer

    options = AdapterOptions(kind="adalora", adalora=replace(ADALORA, total_step=3))
    recipe = replace(RECIPE, total_steps=3, weight_decay=0.0, scheduler="constant")
    ours = make_model(base_folder, rank=8, options=options)
    run(ours, tokenizer, EXAMPLES, recipe, tmp_path)
    theirs = make_model(base_folder, rank=8, options=options)
    optimizer = torch.optim.AdamW(trainable(theirs).values(), lr=1e-3, weight_decay=0.0)
    inputs = packed_inputs(EXAMPLES, torch.device("cpu"))
    for step in (1, 2, 3):
        theirs(**inputs, use_cache=False).loss.backward()  # the mean over the targets, and PEFT's penalty
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert ours.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern
    expected = trainable(theirs)
    for name, parameter in trainable(ours).items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-4)
    kept = sum(int((layer.lora_E["default"] != 0).sum()) for layer in ours.modules() if isinstance(layer, AdaLoraLayer))
    assert kept == 8 * 2 * len(LINEAR)


def test_a_checkpoint_of_other_ranks_is_refused(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """What AdaLoRA remembers has to be of this model: it decides which ranks go."""
    model = make_model(base_folder, rank=8, options=ADAPTERS["adalora"])
    _, saved = run(model, tokenizer, LONGER, RESUMED, tmp_path, stop_after=2)
    path = saved[-1] / "adalora.safetensors"
    state = load_file(path)
    save_file({name: tensor[:1] for name, tensor in state.items()}, path)
    with pytest.raises(ValueError, match="belongs to another model"):
        run(model, tokenizer, LONGER, RESUMED, tmp_path, resume=saved[-1])


@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
def test_a_fused_run_on_padded_sequences_resumes_exactly(
    base_folder: Path, tokenizer: Any, tmp_path: Path, *, fp8: bool
) -> None:
    """The way of a GPU with dropout, but for the recording: stopped and resumed, it has the bits of a whole run.

    In FP8, too, multiplied as a CPU does it.
    """
    recipe = replace(RESUMED, optimizer="adamw_8bit")
    whole = fused_model(base_folder, quantization="nf4", dropout=0.1, fp8=fp8)
    uninterrupted, _ = run(whole, tokenizer, LONGER, recipe, tmp_path / "whole", plan=THROUGHOUT)
    first = fused_model(base_folder, quantization="nf4", dropout=0.1, fp8=fp8)
    _, (*_, state) = run(first, tokenizer, LONGER, recipe, tmp_path / "stopped", plan=THROUGHOUT, stop_after=3)
    second = fused_model(base_folder, quantization="nf4", dropout=0.1, fp8=fp8)
    resumed, _ = run(second, tokenizer, LONGER, recipe, tmp_path / "resumed", plan=THROUGHOUT, resume=state)
    assert adapter_hash(second) == adapter_hash(whole) != adapter_hash(first)
    assert facts(resumed) == facts(uninterrupted)


def test_padded_shapes_are_those_of_the_checkpoint(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that would pad to other shapes resumes with those of the checkpoint, bit for bit, and records them.

    Of a checkpoint without them, and of one that was computed by other layers, the log says what differs.
    """
    whole = fused_model(base_folder)
    run(whole, tokenizer, LONGER, RESUMED, tmp_path / "whole", plan=THROUGHOUT)
    first = fused_model(base_folder)
    _, (*_, state) = run(first, tokenizer, LONGER, RESUMED, tmp_path / "stopped", plan=THROUGHOUT, stop_after=3)
    before = read_computation_options(state)
    other = padded_shapes.Shapes(((4096, 64),))
    monkeypatch.setattr(padded_shapes, "choose_shapes", lambda *_: other)
    second = fused_model(base_folder)
    with capture_logs() as logs:
        _, saved = run(second, tokenizer, LONGER, RESUMED, tmp_path / "resumed", plan=THROUGHOUT, resume=state)
    assert adapter_hash(second) == adapter_hash(whole)
    assert before is not None
    assert (
        read_computation_options(saved[-1]) == before != ComputationOptions("fused all, torch", None, 1, [(4096, 64)])
    )
    assert not [line for line in logs if line["log_level"] == "warning"]

    progress = json.loads((state / "progress.json").read_text())
    said = {"tile": {**progress["computed"], "tile_tokens": 8192}, "old": None}
    for name, computed in said.items():
        (state / "progress.json").write_text(json.dumps(progress | {"computed": computed}))
        with capture_logs() as logs:
            run(fused_model(base_folder), tokenizer, LONGER, RESUMED, tmp_path / name, plan=THROUGHOUT, resume=state)
        (line,) = [line for line in logs if line["log_level"] == "warning"]
        assert line.get("tile_tokens") == ("8192 before, None now" if name == "tile" else None)
        assert ("does not have the lengths of its padded sequences" in line["event"]) == (name == "old")


def test_a_killed_run_goes_on_from_any_state(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Whichever periodic state is left, the run ends with the same bits; from the last one nothing is left to do."""
    recipe = replace(RESUMED, optimizer="adamw_8bit")
    whole = make_model(base_folder, quantization="nf4", dropout=0.1)
    uninterrupted, saved = run(whole, tokenizer, LONGER, recipe, tmp_path / "whole")
    assert len(saved) == 3, "after every second of six steps"
    for state in saved:
        model = make_model(base_folder, quantization="nf4", dropout=0.1)
        resumed, _ = run(model, tokenizer, LONGER, recipe, tmp_path / "resumed", resume=state)
        assert resumed.complete
        assert adapter_hash(model) == adapter_hash(whole)
        assert facts(resumed) == facts(uninterrupted)


@pytest.mark.parametrize("in_time", [True, False])
def test_an_abandoned_step_leaves_no_trace(base_folder: Path, tokenizer: Any, tmp_path: Path, *, in_time: bool) -> None:
    """Without time for the rest of a step, the state of the step before is saved, if there is time for that."""
    recipe = replace(RESUMED, save_every_steps=1000)
    whole = make_model(base_folder, dropout=0.1)
    run(whole, tokenizer, LONGER, recipe, tmp_path / "whole")

    steps: list[StepMetrics] = []
    saved: list[Path] = []
    passes_of_step_4: list[object] = []
    asked: list[float] = []

    def fits(share: float) -> bool:
        asked.append(share)
        return in_time and share == 0

    stopped = make_model(base_folder, dropout=0.1)
    decoder = stopped.get_base_model().base_model
    decoder.register_forward_pre_hook(lambda *_: passes_of_step_4.append(None) if len(steps) == 3 else None)
    hooks = Hooks(steps.append, lambda path, _: saved.append(path), lambda: bool(passes_of_step_4), fits)
    trained = train(stopped, tokenizer, LONGER, recipe=recipe, plan=PLAN, hooks=hooks, folder=tmp_path / "stopped")
    assert len(passes_of_step_4) == 1
    assert 0 < asked[0] < 1
    assert not trained.complete
    assert [path.name for path in saved] == (["step-00000003"] if in_time else [])
    for state in saved:
        again = make_model(base_folder, dropout=0.1)
        run(again, tokenizer, LONGER, recipe, tmp_path / "again", resume=state)
        assert adapter_hash(again) == adapter_hash(whole)


def test_the_same_training_twice_is_the_same(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Two runs of one recipe agree in all bits; another seed trains in another order and does not."""
    hashes = []
    for seed in (3, 3, 4):
        model = make_model(base_folder, dropout=0.1)
        run(model, tokenizer, LONGER, replace(RESUMED, seed=seed), tmp_path)
        hashes.append(adapter_hash(model))
    assert hashes[0] == hashes[1] != hashes[2]


def test_dropout_is_drawn_anew_every_step(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """With a learning rate of 0 only dropout can make the losses of the same examples differ, and it does."""
    recipe = replace(RECIPE, total_steps=3, learning_rate=0.0)
    for dropout, losses in ((0.0, 1), (0.3, 3)):
        model = fill_adapter(make_model(base_folder, dropout=dropout))
        trained, _ = run(model, tokenizer, EXAMPLES, recipe, tmp_path)
        assert len({round(step.loss, 5) for step in trained.history}) == losses


def test_the_environment_is_not_emptied(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other threads read it while training starts: accelerate would remove all variables for a moment."""
    cleared = list[str]()
    monkeypatch.setattr(os.environ, "clear", lambda: cleared.append("cleared"))
    with accelerate_environment.clear_environment():
        assert cleared.pop() == "cleared"  # that is how it does so
    cleared.clear()
    run(fill_adapter(make_model(base_folder)), tokenizer, EXAMPLES, replace(RECIPE, total_steps=1), tmp_path)
    assert cleared == []
    with accelerate_environment.clear_environment():
        assert cleared == ["cleared"]  # for others it is as it was


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_torch"])
def test_learning_rate_zero_trains_nothing(base_folder: Path, tokenizer: Any, tmp_path: Path, optimizer: str) -> None:
    """The control experiment: no bit of the adapter changes, weight decay or not."""
    model = fill_adapter(make_model(base_folder, quantization="nf4"))
    before = adapter_hash(model)
    recipe = replace(RESUMED, learning_rate=0.0, weight_decay=0.1, optimizer=optimizer, total_steps=3)
    run(model, tokenizer, LONGER, recipe, tmp_path)
    assert adapter_hash(model) == before


def test_only_the_adapter_is_trained(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Training moves every weight matrix of the adapter and no bit of the base."""
    model = fill_adapter(make_model(base_folder))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run(model, tokenizer, EXAMPLES, RECIPE, tmp_path)
    after = dict(model.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(trainable(model))
    assert len(moved) == 2 * 2 * len(LINEAR)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}


def test_an_adapter_on_a_quantized_base_stays_exact(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """TRL would round the adapter of a 4-bit model to bf16; here it is and stays in fp32."""
    model = fill_adapter(make_model(base_folder, quantization="nf4"))
    before = adapter_hash(model)
    run(model, tokenizer, EXAMPLES, replace(RECIPE, learning_rate=0.0), tmp_path)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    assert adapter_hash(model) == before


def test_metrics_tell_the_plan(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Each step's line has its examples, its targets, its epoch, and the learning rate it was done with."""
    recipe = replace(RESUMED, learning_rate=1e-3)
    trained, _ = run(make_model(base_folder), tokenizer, LONGER, recipe, tmp_path)
    assert [step.step for step in trained.history] == [1, 2, 3, 4, 5, 6]
    assert [step.examples for step in trained.history] == [8, 8, 4, 8, 8, 4]
    assert [step.epoch for step in trained.history] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    for step in trained.history:
        rows = batch_plan.batch(recipe.seed, 20, 8, step.step - 1)
        assert step.target_tokens == sum(sum(LONGER[row].targets) for row in rows)
        assert min(step.measured[name] or 0 for name in ("seconds", "tokens_per_second", "memory_bytes")) > 0
        assert step.grad_norm > 0
    assert [step.learning_rate for step in trained.history] == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_a_constant_rate_stays_at_its_peak(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """`constant` warms up and then stays."""
    recipe = replace(RESUMED, scheduler="constant", learning_rate=1e-3)
    trained, _ = run(make_model(base_folder), tokenizer, LONGER, recipe, tmp_path)
    assert [step.learning_rate for step in trained.history] == pytest.approx([0, 5e-4, 1e-3, 1e-3, 1e-3, 1e-3])


def test_a_loss_that_is_not_finite_ends_the_job(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The step is named, what to do about it is said, and no state is saved from then on."""
    model = make_model(base_folder)
    with torch.no_grad():
        model.get_base_model().lm_head.weight[5, 0] = float("nan")
    saved: list[Path] = []
    hooks = Hooks(lambda _: None, lambda path, _: saved.append(path), lambda: False)
    recipe = replace(RECIPE, total_steps=3, save_every_steps=1)
    with pytest.raises(TrainingFailed, match=r"loss of step 1 is nan.*JOB_TRAIN__LEARNING_RATE"):
        train(model, tokenizer, EXAMPLES, recipe=recipe, plan=PLAN, hooks=hooks, folder=tmp_path)
    assert not saved


def run_out_of_memory(model: Any, failing: Callable[[int], bool]) -> list[int]:
    """Makes forward passes fail as on a full GPU, by their number (from 1); returns the tokens of all of them."""
    sizes: list[int] = []

    def fail(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        sizes.append(inputs["input_ids"].shape[1])
        if failing(len(sizes)):
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.get_base_model().base_model.register_forward_pre_hook(fail, with_kwargs=True)
    return sizes


def test_out_of_memory_shrinks_the_micro_batch_and_repeats_the_step(
    base_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The budget is halved once and stays so; loss and gradient of both steps are unchanged."""
    recipe = replace(RECIPE, total_steps=2, micro_batch_tokens=160)
    calm, shaken = fill_adapter(make_model(base_folder)), fill_adapter(make_model(base_folder))
    with gradients(calm) as expected:
        undisturbed, _ = run(calm, tokenizer, EXAMPLES, recipe, tmp_path)
    # The second micro-batch of the first step fails: what the first one left behind must not be counted twice.
    sizes = run_out_of_memory(shaken, lambda number: number == 2)
    with gradients(shaken) as found:
        trained, _ = run(shaken, tokenizer, EXAMPLES, recipe, tmp_path)
    assert (undisturbed.micro_batch_tokens, trained.micro_batch_tokens) == (160, 80)
    assert max(sizes[2:]) <= 80 < max(sizes[:2])
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)
    for before, after in zip(undisturbed.history, trained.history, strict=True):
        assert after.loss == pytest.approx(before.loss, rel=1e-5)
    assert [step.measured["micro_batch_tokens"] for step in trained.history] == [80, 80]


def test_the_shrunken_micro_batch_survives_a_restart(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """A resumed run goes on with the budget that fitted, instead of running out of memory again."""
    recipe = replace(RECIPE, total_steps=2, micro_batch_tokens=160, save_every_steps=1)
    model = make_model(base_folder)
    run_out_of_memory(model, lambda number: number == 2)
    _, (state, *_) = run(model, tokenizer, EXAMPLES, recipe, tmp_path, stop_after=1)
    again = make_model(base_folder)
    sizes = run_out_of_memory(again, lambda _: False)
    resumed, _ = run(again, tokenizer, EXAMPLES, recipe, tmp_path / "resumed", resume=state)
    assert resumed.micro_batch_tokens == 80
    assert max(sizes) <= 80


class Beside(Alone):
    """The second of two processes; the other has no examples and runs out of memory at the chosen steps."""

    place = Place(rank=0, world_size=2)

    def __init__(self, *failing: int) -> None:
        self.failing = failing
        self.asked: list[bool] = []
        self.sizes: list[int] = []

    def agree(self, *, repeat: bool) -> bool:
        """The neighbour's wish counts like ours."""
        self.asked.append(repeat)
        return repeat or len(self.asked) in self.failing

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """The neighbour adds what it has."""
        self.sizes.append(tensor.numel())


@pytest.fixture
def undealt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives process 0 all examples."""
    monkeypatch.setattr(batch_plan, "assign", lambda lengths, processes: [list(range(len(lengths))), []][:processes])


@pytest.mark.usefixtures("undealt")
def test_a_step_is_repeated_by_all_when_one_runs_out_of_memory(
    base_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """All processes halve their micro-batches and repeat; loss and gradient are unchanged."""
    recipe = replace(RECIPE, total_steps=2, micro_batch_tokens=160)
    calm = fill_adapter(make_model(base_folder))
    with gradients(calm) as expected:
        undisturbed, _ = run(calm, tokenizer, EXAMPLES, recipe, tmp_path)
    for fails_here in (True, False):
        model, beside = fill_adapter(make_model(base_folder)), Beside(*([] if fails_here else [1, 2]))
        run_out_of_memory(model, lambda number, here=fails_here: here and number == 2)
        hooks = Hooks(lambda _: None, lambda *_: None, lambda: False)
        with gradients(model) as found:
            trained = train(
                model, tokenizer, EXAMPLES, recipe=recipe, plan=PLAN, hooks=hooks, folder=tmp_path, processes=beside
            )
        assert trained.micro_batch_tokens == 80
        assert beside.asked == [fails_here, fails_here, False, False]  # whether it ran out, and has nothing left
        assert beside.sizes == [1 + sum(p.numel() for p in trainable(model).values())] * 2
        for one, other in zip(expected, found, strict=True):
            assert_same(one, other)
        for before, after in zip(undisturbed.history, trained.history, strict=True):
            assert after.loss == pytest.approx(before.loss, rel=1e-5)


def test_a_process_without_examples_follows(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a step has fewer examples than there are processes, one adds nothing, takes the sum, writes no state."""

    class Idle(Beside):
        leads = False
        place = Place(rank=1, world_size=2)

        def all_reduce(self, tensor: torch.Tensor) -> None:
            assert not tensor.any()
            tensor += 0.5

    monkeypatch.setattr(batch_plan, "assign", lambda lengths, _: [list(range(len(lengths))), []])
    model = make_model(base_folder)
    saved: list[Path] = []
    hooks = Hooks(lambda _: None, lambda path, _: saved.append(path), lambda: False)
    with gradients(model) as found:
        trained = train(
            model,
            tokenizer,
            EXAMPLES,
            recipe=replace(RECIPE, save_every_steps=1),
            plan=PLAN,
            hooks=hooks,
            folder=tmp_path,
            processes=Idle(),
        )
    assert trained.history[0].loss == 0.5
    assert all((gradient == 0.5).all() for gradient in found[0].values())
    assert not saved


class Launched:
    """Replaces the launching of CUDA graphs: does the work at once, and knows what had to be recorded first."""

    possible = True

    def __init__(self, work: Callable[..., torch.Tensor], *_: Any) -> None:
        self.work = work
        self.prepared: list[int] = []

    def prepare(self, tokens: torch.Tensor, *_: torch.Tensor) -> None:
        """Records nothing."""
        self.prepared.append(tokens.shape[1])

    def __call__(self, tokens: torch.Tensor, ends: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """No row is longer than the one that was recorded first."""
        assert tokens.shape[1] <= self.prepared[0]
        last = int((ends == ends[-1]).nonzero()[0])
        return self.work(tokens, ends, weight, tuple(map(Segment, ends[:last].tolist(), ends[1 : last + 1].tolist())))


@pytest.mark.long
def test_out_of_memory_takes_time_before_it_takes_bits(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept weights, kept activations and recordings are given up one by one: the gradient stays, to the bit.

    Only then is the budget halved.
    """
    monkeypatch.setattr("job.training.padded_gradient.CudaGraphs", Launched)
    recipe, plan = replace(RECIPE, micro_batch_tokens=160), replace(THROUGHOUT, kept_base=True, recorded=True)
    results = []
    for failures in (0, 1, 2, 3, 4):
        model = fused_model(base_folder, quantization="nf4")
        run_out_of_memory(model, lambda number, failures=failures: number <= failures)
        with gradients(model) as found:
            trained, _ = run(model, tokenizer, EXAMPLES, recipe, tmp_path, plan=plan)
        results.append((trained, found[0]))
    assert [trained.plan.droppable for trained, _ in results] == [
        ("kept_base", "kept_activations", "recorded"),
        ("kept_activations", "recorded"),
        ("recorded",),
        *[()] * 2,
    ]
    assert [trained.micro_batch_tokens for trained, _ in results] == [160, 160, 160, 160, 80]
    for trained, gradient in results[:4]:
        assert trained.history[0].loss == results[0][0].history[0].loss
        assert_same(gradient, results[0][1], 0.0)


@pytest.mark.long
def test_memory_that_is_too_small_for_one_example_ends_the_job(
    base_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """When halving cannot help any more, the job ends with 70 and says what to lower, instead of trying forever."""
    model = make_model(base_folder)
    sizes = run_out_of_memory(model, lambda _: True)
    said = r"one row at a time: the longest row, rows.jsonl:17, has .*JOB_TRAIN__MAX_LENGTH or JOB_LORA__RANK"
    with pytest.raises(TrainingFailed, match=said):
        run(model, tokenizer, EXAMPLES, RECIPE, tmp_path, longest_at="rows.jsonl:17")
    assert len(sizes) < 30


def test_an_evaluation_before_changes_no_gradient(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """NF4: scoring questions with the base first leaves loss and gradient of the next step as they were, to the bit."""
    results = []
    for evaluated in (False, True):
        model = fill_adapter(make_model(base_folder, quantization="nf4"))
        if evaluated:
            with model.eval().disable_adapter():
                score_sequence(model, [Question(example.input_ids, ((5, 6), (7,))) for example in EXAMPLES])
        with gradients(model) as found:
            trained, _ = run(model, tokenizer, EXAMPLES, RECIPE, tmp_path)
        results.append((trained.history[0].loss, found[0]))
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1], 0.0)


def test_a_state_of_another_model_is_refused(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """A checkpoint is never loaded in part."""
    recipe = replace(RECIPE, save_every_steps=1)
    _, (state,) = run(make_model(base_folder), tokenizer, EXAMPLES, recipe, tmp_path)
    other = make_model(base_folder)
    other.get_base_model().model.layers[0].self_attn.q_proj.requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="not of this model"):
        run(other, tokenizer, EXAMPLES, recipe, tmp_path, resume=state)


def test_a_state_is_safetensors_and_json(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Restoring can run nobody's code: no pickle lies in a state, and 8-bit optimizer states lie there in 8 bit."""
    from safetensors.torch import load_file

    recipe = replace(RECIPE, save_every_steps=1, optimizer="adamw_8bit")
    _, (state,) = run(make_model(base_folder), tokenizer, EXAMPLES, recipe, tmp_path)
    assert {path.suffix for path in state.iterdir()} == {".safetensors", ".json", ".jsonl"}
    dtypes = {tensor.dtype for tensor in load_file(state / "optimizer.safetensors").values()}
    assert torch.uint8 in dtypes


def test_total_steps_counts_whole_epochs() -> None:
    """Every epoch has its own last, smaller step; `max_steps` can only make the run shorter."""
    assert total_steps(20, 8, 2, None) == 6
    assert total_steps(1500, 32, 2, None) == 94
    assert total_steps(20, 8, 2, 4) == 4
    assert total_steps(20, 8, 2, 100) == 6


def test_step_seeds_differ() -> None:
    """Steps, seeds and processes have seeds of their own, all valid for torch."""
    seeds = {step_seed(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(4)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
