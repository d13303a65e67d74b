"""Settings that contradict each other: each is named with the fix, and values at the limit are valid."""

from __future__ import annotations

import pytest

from job.errors import SettingsError, environment_name
from job.settings.load import load_settings

PROMPTS = "--eval.prompts=p.txt --data.validation=0.05"
JUDGED = "--eval.principles=p.txt --eval.prompts=p.txt"
POLICY = "--gate.policy=policy.json"
WSD = "--train.scheduler=warmup_stable_decay"
TWO_STAGES = "--train.method=sft,dpo --data.sft_source=a.jsonl"
NO_EFFECT = "has no effect with"
WITH_ADALORA = "does not work with JOB_LORA__KIND=adalora"
WITH_EXPERTS = "does not work with JOB_LORA__EXPERTS"
ONLY_ADALORA = "has an effect only with JOB_LORA__KIND=adalora"
NEEDS_VALIDATION = "needs a validation loss; set JOB_DATA__VALIDATION"
VALID: dict[str, str] = {}

TABLE: dict[str, list[tuple[str, dict[str, str]]]] = {
    "processes": [
        ("--run.nodes=2 --run.id=a --run.rendezvous=h:1", VALID),
        ("--run.nodes=2 --run.id=a", {"run.rendezvous": "must be set if JOB_RUN__NODES is more than 1"}),
        ("--run.nodes=2 --run.rendezvous=h:1", {"run.id": "must be set: otherwise each machine"}),
        ("--run.nodes=2 --run.node_rank=1 --run.id=a --run.rendezvous=h:1", VALID),
        (
            "--run.nodes=2 --run.node_rank=2 --run.id=a --run.rendezvous=h:1",
            {"run.node_rank": "must be less than JOB_RUN__NODES (2)"},
        ),
    ],
    "clouds": [
        ("--storage.endpoint_url=http://h --run.output=s3://bucket/x", VALID),
        (
            "--storage.kms_key_id=k --run.output=gs://bucket/x --data.source=s3://bucket/a.jsonl",
            {"storage.kms_key_id": "which would not be encrypted with it"},
        ),
        ("--storage.kms_key_id=k", {"storage.kms_key_id": "which would not be encrypted with it"}),  # a folder
        (
            "--storage.kms_key_id=k --run.output=gs://bucket/x",
            {"storage.kms_key_id": "which would not be encrypted with it"},
        ),
        (
            "--storage.request_payer=true --run.output=az://bucket/x",
            {"storage.request_payer": "does not use; remove it"},
        ),
        (
            "--storage.endpoint_url=http://h --run.output=az://bucket/x --data.source=gs://bucket/a.jsonl",
            {"storage.endpoint_url": "set AZURE_STORAGE_ENDPOINT for az:// and GOOGLE_BASE_URL for gs:// instead"},
        ),
    ],
    "placement": [
        ("--model.placement=host", VALID),
        ("--model.placement=gpu --model.quantization=none", VALID),
        ("--model.placement=host --model.quantization=none", {"model.placement": "is host, which needs 4-bit weights"}),
        ("--model.placement=host --model.keep_dequantized=false", VALID),
        (
            "--model.placement=host --model.keep_dequantized=true",
            {"model.placement": "is host, but JOB_MODEL__KEEP_DEQUANTIZED"},
        ),
        ("--model.placement=sharded --run.processes=2", VALID),
        ("--model.placement=sharded --run.processes=auto", VALID),
        ("--model.placement=sharded --run.nodes=2 --run.id=a --run.rendezvous=h:1", VALID),
        ("--model.placement=sharded --run.processes=1", {"model.placement": "is sharded, but the run has one process"}),
        ("--model.placement=host --run.processes=1", VALID),
    ],
    "prompts": [
        (f"{PROMPTS} --train.max_length=257 --eval.prompts_max_new_tokens=256", VALID),
        (
            f"{PROMPTS} --train.max_length=256 --eval.prompts_max_new_tokens=256",
            {"eval.prompts_max_new_tokens": "must be less than JOB_TRAIN__MAX_LENGTH (256)"},
        ),
        ("--eval.prompts=3 --data.validation=0.05", VALID),
        ("--eval.prompts=p.txt", VALID),
        ("--eval.prompts=3", {"eval.prompts": "is a number of validation rows; set JOB_DATA__VALIDATION"}),
        (
            "--eval.prompts_max_new_tokens=9",
            {"eval.prompts_max_new_tokens": "has no effect without JOB_EVAL__PROMPTS"},
        ),
    ],
    "safety": [
        (
            "--data.safety_model=org/x --data.safety_revision=a --data.unsafe_labels=b --data.unsafe_threshold=0.7",
            VALID,
        ),
        (
            "--data.safety_revision=a --data.unsafe_labels=b --data.unsafe_threshold=0.7",
            dict.fromkeys(
                ("data.safety_revision", "data.unsafe_labels", "data.unsafe_threshold"),
                "has no effect without JOB_DATA__SAFETY_MODEL",
            ),
        ),
        ("--data.on_finding=secret=skip", VALID),
        ("--data.on_finding=unsafe=skip", {"data.on_finding": "names the kind unsafe, which needs JOB_DATA__SAFETY"}),
    ],
    "judge": [
        (f"{JUDGED} --eval.judge=org/j --eval.judge_revision=a", VALID),
        (f"{JUDGED} --eval.judge=http://h --eval.judge_model=m --eval.judge_key=k", VALID),
        (
            "--eval.judge=org/j --eval.judge_revision=a --eval.judge_model=m --eval.judge_key=k",
            dict.fromkeys(
                ("eval.judge", "eval.judge_revision", "eval.judge_model", "eval.judge_key"),
                "has no effect without JOB_EVAL__PRINCIPLES",
            ),
        ),
        (JUDGED, {"eval.principles": "needs a judge"}),
        ("--eval.principles=p.txt --eval.judge=org/j", {"eval.principles": "needs answers to judge"}),
        (f"{JUDGED} --eval.judge=http://h", {"eval.judge_model": "must be set if JOB_EVAL__JUDGE is a server"}),
        (
            f"{JUDGED} --eval.judge=http://h --eval.judge_model=m --eval.judge_revision=a",
            {"eval.judge_revision": "is a commit of a hub repository, but JOB_EVAL__JUDGE is a server"},
        ),
        (
            f"{JUDGED} --eval.judge=org/j --eval.judge_model=m --eval.judge_key=k",
            dict.fromkeys(("eval.judge_model", "eval.judge_key"), "is for a server, but JOB_EVAL__JUDGE is not"),
        ),
    ],
    "sources": [
        ("--data.source=a.jsonl --data.limit=5", VALID),
        ("--data.source=a.jsonl,b.jsonl", VALID),
        (
            "--data.source=a.jsonl,b.jsonl --data.limit=5",
            {"data.limit": "is for one source; give each source its number of rows: JOB_DATA__SOURCE=name"},
        ),
        (
            f"{TWO_STAGES},b.jsonl --data.sft_limit=5",
            {"data.sft_limit": "is for one source; give each source its number of rows: JOB_DATA__SFT_SOURCE=name"},
        ),
    ],
    "validation": [
        ("--data.validation=org/x --data.validation_revision=a", VALID),
        ("--data.validation=0.1 --data.validation_revision=a", {"data.validation_revision": "is for a hub id"}),
        (f"{TWO_STAGES} --data.sft_validation=org/x --data.sft_validation_revision=a", VALID),
        (
            f"{TWO_STAGES} --data.sft_validation=0.1 --data.sft_validation_revision=a",
            {"data.sft_validation_revision": "is for a hub id, but JOB_DATA__SFT_VALIDATION is not one"},
        ),
        ("--data.validation=0.1 --train.validate_every_steps=5 --train.stop_after=2 --train.keep=best", VALID),
        ("--train.keep=last", VALID),
        (
            "--train.validate_every_steps=5 --train.stop_after=2 --train.keep=best",
            dict.fromkeys(("train.validate_every_steps", "train.stop_after", "train.keep"), NEEDS_VALIDATION),
        ),
        (
            "--data.validation=0.1 --train.stop_after=2 --train.keep=best --lora.kind=adalora",
            dict.fromkeys(("train.stop_after", "train.keep"), WITH_ADALORA),
        ),
        ("--data.validation=0.1 --train.validate_every_steps=5 --lora.kind=adalora", VALID),
    ],
    "gate": [
        ("--gate.min_delta=0 --gate.metric=acc --gate.baseline=s3://bucket/run", VALID),
        ("--gate.max_regression=0.1 --gate.metric=acc --gate.baseline=s3://bucket/run", VALID),
        (
            "--gate.metric=acc --gate.baseline=s3://bucket/run",
            dict.fromkeys(("gate.metric", "gate.baseline"), "has no threshold; set JOB_GATE__MIN_DELTA"),
        ),
        ("--gate.min_delta=-0.1 --gate.max_regression=0.1", VALID),
        (
            "--gate.min_delta=-0.2 --gate.max_regression=0.1",
            {"gate.min_delta": "allows a larger loss than JOB_GATE__MAX_REGRESSION"},
        ),
        (f"{POLICY} --gate.baseline=s3://bucket/run", VALID),
        (
            f"{POLICY} --gate.min_delta=0.1 --gate.max_regression=0.1 --gate.metric=acc",
            {
                "gate.min_delta": "is a rule for all tasks, but JOB_GATE__POLICY",
                "gate.max_regression": "is a rule for all tasks, but JOB_GATE__POLICY",
                "gate.metric": "has no effect with JOB_GATE__POLICY",
            },
        ),
    ],
    "export": [
        ("--gate.on=merged --export.formats=merged --gate.min_delta=0", VALID),
        ("--gate.on=merged --export.formats=merged --gate.max_regression=0", VALID),
        (f"--gate.on=merged --export.formats=merged {POLICY}", VALID),
        ("--gate.on=merged --export.formats=merged", {"gate.on": "has no threshold"}),
        ("--gate.on=merged --gate.min_delta=0", {"gate.on": "is merged, which is not exported"}),
        ("--gate.on=adapter", VALID),
        ("--export.hub=me/m --export.hub_revision=b", VALID),
        ("--export.hub_revision=b", {"export.hub_revision": "is a branch of JOB_EXPORT__HUB, which is not set"}),
        ("--export.formats=merged --export.merge_onto=original", VALID),
        ("--export.formats=fp8 --export.merge_onto=original", VALID),
        (
            "--export.formats=adapter:bf16 --export.merge_onto=original",
            {"export.merge_onto": "has no effect without a merged model"},
        ),
        ("--export.merge_onto=original", {"export.merge_onto": "has no effect without a merged model"}),
        ("--export.formats=w4a16 --export.calibration_rows=16 --export.quantization_steps=5", VALID),
        (
            "--export.formats=fp8 --export.calibration_rows=16 --export.quantization_steps=5",
            dict.fromkeys(("export.calibration_rows", "export.quantization_steps"), "has an effect only with"),
        ),
    ],
    "schedule": [
        ("--train.scheduler=cosine --train.min_lr_ratio=0.1", VALID),
        ("--train.scheduler=linear", VALID),
        (
            "--train.scheduler=linear --train.min_lr_ratio=0.1",
            {"train.min_lr_ratio": "has no effect with JOB_TRAIN__SCHEDULER=linear"},
        ),
        (f"{WSD} --train.decay_ratio=0.75 --train.warmup_ratio=0.25", VALID),
        (f"{WSD} --train.decay_ratio=1", VALID),
        (
            f"{WSD} --train.decay_ratio=0.75 --train.warmup_ratio=0.5",
            {"train.decay_ratio": "and JOB_TRAIN__WARMUP_RATIO together exceed 1"},
        ),
        (
            "--train.scheduler=linear --train.decay_ratio=0.5",
            {"train.decay_ratio": "only with JOB_TRAIN__SCHEDULER=warmup_stable_decay"},
        ),
        ("--train.warmup_ratio=0.1", VALID),
        (
            "--train.warmup_ratio=0.1 --train.warmup_steps=5",
            {"train.warmup_ratio": "and JOB_TRAIN__WARMUP_STEPS are both set"},
        ),
    ],
    "adapter": [
        ("--train.optimizer=muon", VALID),
        ("--train.optimizer=muon --lora.use_dora=true", {"train.optimizer": "but JOB_LORA__USE_DORA trains vectors"}),
        (
            "--train.optimizer=muon --lora.kind=adalora",
            {"train.optimizer": "but JOB_LORA__KIND=adalora trains vectors"},
        ),
        (
            (
                "--lora.kind=adalora --lora.init=gaussian --lora.use_rslora=true --lora.use_dora=true "
                "--lora.rank_pattern=q_proj=4 --lora.alpha_pattern=q_proj=4 --lora.modules_to_save=lm_head "
                "--model.add_tokens=<x>"
            ),
            {
                **dict.fromkeys(
                    (
                        "lora.init",
                        "lora.use_rslora",
                        "lora.use_dora",
                        "lora.rank_pattern",
                        "lora.alpha_pattern",
                        "lora.modules_to_save",
                        "model.add_tokens",
                    ),
                    WITH_ADALORA,
                )
            },
        ),
        ("--lora.kind=adalora --lora.rank=8 --lora.init_rank=9 --lora.tinit=1 --lora.tfinal=1 --lora.delta_t=1", VALID),
        (
            "--lora.kind=adalora --lora.rank=8 --lora.init_rank=8",
            {"lora.init_rank": "must be more than JOB_LORA__RANK, 8"},
        ),
        (
            "--lora.init_rank=20 --lora.tinit=1 --lora.tfinal=1 --lora.delta_t=1 --lora.orth_reg_weight=0.1",
            dict.fromkeys(
                ("lora.init_rank", "lora.tinit", "lora.tfinal", "lora.delta_t", "lora.orth_reg_weight"), ONLY_ADALORA
            ),
        ),
    ],
    "experts": [
        ("--lora.experts=true", VALID),
        (
            (
                "--lora.experts=true --lora.init=gaussian --lora.use_dora=true --lora.dropout=0.1 "
                "--lora.modules_to_save=lm_head"
            ),
            dict.fromkeys(("lora.init", "lora.use_dora", "lora.dropout", "lora.modules_to_save"), WITH_EXPERTS),
        ),
        ("--lora.experts=true --lora.kind=adalora", {"lora.kind": WITH_EXPERTS}),
        (
            "--lora.experts=true --train.optimizer=muon",
            {"train.optimizer": "the adapters of all experts as one matrix"},
        ),
        ("--lora.experts=true --train.compute=fp8", {"train.compute": "does not support a mixture's experts"}),
        ("--lora.experts=true --export.formats=merged", {"export.formats": "adapters of experts cannot be merged"}),
    ],
    "init": [
        ("--lora.init=orthogonal --model.quantization=none", VALID),
        ("--lora.init=orthogonal", {"lora.init": "orthogonal needs a base in floating point"}),
        ("--lora.init=loftq", VALID),
        ("--lora.init=loftq --model.quantization=none", {"lora.init": "loftq compensates the error of quantization"}),
        ("--lora.init=loftq --lora.use_rslora=true --lora.dropout=0.1", VALID),
        ("--lora.init=loftq --lora.use_dora=true", {"lora.use_dora": "does not work with JOB_LORA__INIT=loftq"}),
        ("--lora.init=eva --lora.use_dora=true --lora.dropout=0.1", VALID),
        (
            "--lora.init=eva --lora.rank_pattern=q_proj=4",
            {"lora.rank_pattern": "does not work with JOB_LORA__INIT=eva"},
        ),
        *(
            (
                f"--lora.init={init} --lora.use_rslora=true --lora.use_dora=true --lora.dropout=0.1",
                dict.fromkeys(
                    ("lora.use_rslora", "lora.use_dora", "lora.dropout"), f"does not work with JOB_LORA__INIT={init}"
                ),
            )
            for init in ("pissa", "pissa_niter_16", "olora")
        ),
    ],
    "method": [
        ("--train.method=dpo --train.beta=0.2 --train.preference_loss=ipo --data.format=preference", VALID),
        ("--train.method=kto --train.beta=0.2 --train.desirable_weight=2 --train.undesirable_weight=2", VALID),
        ("--train.method=orpo --train.beta=0.2", VALID),
        ("--train.label_smoothing=0.1 --train.neftune_noise_alpha=5 --data.row_weights=true", VALID),
        ("--train.method=dpo --train.label_smoothing=0.1", VALID),
        (
            "--train.method=dpo --train.preference_loss=ipo --train.label_smoothing=0.1",
            {"train.label_smoothing": "has no effect with JOB_TRAIN__PREFERENCE_LOSS=ipo"},
        ),
        (
            (
                "--train.method=orpo --train.preference_loss=sigmoid --train.desirable_weight=2 "
                "--train.undesirable_weight=2 --train.label_smoothing=0.1 --train.neftune_noise_alpha=5 "
                "--data.row_weights=true --train.loss_on=completion"
            ),
            dict.fromkeys(
                (
                    "train.preference_loss",
                    "train.desirable_weight",
                    "train.undesirable_weight",
                    "train.label_smoothing",
                    "train.neftune_noise_alpha",
                    "data.row_weights",
                    "train.loss_on",
                ),
                NO_EFFECT,
            ),
        ),
        ("--train.beta=0.2", {"train.beta": "only with dpo and kto and orpo"}),
        (TWO_STAGES, VALID),
        (f"{TWO_STAGES} --train.loss_on=completion --train.beta=0.2 --train.sft_epochs=2", VALID),
        (f"{TWO_STAGES} --train.neftune_noise_alpha=5", {"train.neftune_noise_alpha": "only with sft; remove it"}),
        ("--train.method=sft,dpo", {"data.sft_source": "must be set with JOB_TRAIN__METHOD=sft,dpo"}),
        (
            "--data.format=preference",
            {"data.format": "is preference, which JOB_TRAIN__METHOD=sft cannot train on; dpo or orpo can"},
        ),
    ],
    "compute": [
        ("--train.compute=fp8 --model.dtype=bf16", VALID),
        ("--train.compute=fp8 --model.dtype=fp32", {"train.compute": "which needs JOB_MODEL__DTYPE=bf16 or auto"}),
        ("--train.compute=fp8 --train.method=orpo", VALID),
        ("--train.compute=fp8 --train.method=kto", {"train.compute": "which excludes JOB_TRAIN__METHOD=kto"}),
        (f"--train.compute=fp8 {TWO_STAGES}", {"train.compute": "which excludes JOB_TRAIN__METHOD=sft,dpo"}),
    ],
    "start": [
        ("--lora.start=adapter --lora.init=gaussian", VALID),
        ("--lora.start=adapter --lora.init=orthogonal --model.quantization=none", VALID),
        (
            "--lora.start=adapter --lora.init=pissa",
            {"lora.init": "is pissa, which initializes a new adapter, and training continues from one; remove it"},
        ),
        ("--lora.start=adapter --lora.kind=adalora", {"lora.kind": "cannot start from an adapter; use lora"}),
        (
            f"{TWO_STAGES} --lora.init=pissa",
            {"lora.init": "continues from one, as JOB_TRAIN__METHOD=sft,dpo does after its first stage; remove it"},
        ),
    ],
}


@pytest.mark.parametrize(
    ("words", "expected"),
    [pytest.param(*row, id=f"{group}: {row[0]}") for group, rows in TABLE.items() for row in rows],
)
def test_what_contradicts_what(words: str, expected: dict[str, str]) -> None:
    """All that is wrong, and nothing else."""
    try:
        load_settings(words.split(), {})
        found = {}
    except SettingsError as error:
        found = {problem.where.partition(" ")[0]: problem.what for problem in error.problems}
    assert found.keys() == {environment_name(name) for name in expected}
    for name, text in expected.items():
        assert text in found[environment_name(name)]
