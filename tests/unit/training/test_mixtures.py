"""Training of a mixture of experts: equal to TRL and PEFT, and the same after a stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from job.model.adapter_options import AdapterOptions
from job.model.experts import expert_tensors, packed
from job.model.lora import add_adapter, trainable
from job.records import Example
from tests.families.models import make_model
from tests.helpers import fill_adapter, load_plain, make_examples
from tests.unit.training.recipes import RECIPE
from tests.unit.training.training_runs import adapter_hash, assert_same, facts, gradients, run

ROUTED = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "experts": ("gate_up_proj", "down_proj")}


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture; its router's loss would be a large part of the loss, if it were added."""
    folder: Path = tmp_path_factory.mktemp("mixture") / request.param
    make_model(request.param, folder, router_aux_loss_coef=0.5, output_router_logits=True)
    return folder


def adapted(folder: Path, quantization: str) -> Any:
    """With an adapter on attention and experts, by the job."""
    how: dict[str, Any] = {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": "attention", "seed": 1}
    base = load_plain(folder, quantization=quantization)
    return fill_adapter(add_adapter(base, **how, options=AdapterOptions(experts=True)))


def plain_trl(
    folder: Path, tokenizer: Any, examples: Sequence[Example], work: Path, values: Mapping[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    """One step by TRL and PEFT alone, without the router's loss, from these values of the adapter."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    parameters = [f"mlp.experts.{name}" for name in ROUTED["experts"]]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(ROUTED["attention"]), target_parameters=parameters)
    model = get_peft_model(base, config)
    for name, parameter in trainable(model).items():
        parameter.data.copy_(values[name])
    columns = {
        "input_ids": [list(example.input_ids) for example in examples],
        "completion_mask": [[int(target) for target in example.targets] for example in examples],
    }
    arguments = SFTConfig(
        output_dir=str(work),
        max_steps=1,
        per_device_train_batch_size=len(examples),
        completion_only_loss=True,
        max_grad_norm=1e9,
        optim="adamw_torch",
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        router_aux_loss_coef=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer)
    with gradients(model) as found:
        trainer.train()
    return trainer.state.log_history[0]["loss"], found[0]


def test_a_step_is_what_trl_and_peft_learn(mixture: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Loss and gradient of adapters on attention and on experts; the router is frozen, and has no loss of its own."""
    examples = make_examples(8, prompt=0.3)
    model = adapted(mixture, "none")
    assert not any("gate" in name.split(".") or "router" in name for name in trainable(model))
    values = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    loss, gradient = plain_trl(mixture, tokenizer, examples, tmp_path, values)
    recipe = replace(RECIPE, max_grad_norm=1e9, save_every_steps=1000, micro_batch_tokens=90)
    with gradients(model) as found:
        trained, _ = run(model, tokenizer, examples, recipe, tmp_path)
    assert trained.history[0].loss == pytest.approx(loss, rel=1e-5)
    assert_same(gradient, found[0], 2e-5)


def test_a_stopped_run_ends_as_a_whole_one(mixture: Path, tokenizer: Any, tmp_path: Path) -> None:
    """With experts in NF4 and adapters on them: the same bits and facts."""
    recipe = replace(RECIPE, total_steps=4, global_batch_size=4, save_every_steps=2, optimizer="adamw_8bit")
    made: list[tuple[str, str, Path]] = []
    for part, stop_after in (("whole", None), ("stopped", 2), ("resumed", None)):
        model = adapted(mixture, "nf4")
        assert all(packed(module, name) is not None for _, module, name in expert_tensors(model))
        resume = made[-1][2] if part == "resumed" else None
        work = tmp_path / part
        trained, saved = run(model, tokenizer, make_examples(16), recipe, work, stop_after=stop_after, resume=resume)
        made.append((adapter_hash(model), facts(trained), saved[-1]))
    whole, stopped, resumed = made
    assert resumed[:2] == whole[:2]
    assert stopped[0] != whole[0]
