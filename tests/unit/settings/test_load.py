"""Settings: where they come from, which source has precedence, and how errors are reported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from job.errors import MAX_SHOWN, SettingsError, environment_name
from job.log import scrub
from job.settings.combinations import sharded_alone
from job.settings.load import (
    Settings,
    current_platform,
    describe,
    json_schema,
    load_reading,
    load_settings,
    new_run_id,
    preset_values,
    redacted,
    secrets,
    trackers,
)
from job.settings.presets import PRESETS
from job.settings.schema import NAMES
from job.settings.training_stages import folder_of, split_stages, start_of

SECRET = "hf_qWertYuiOpAsdFghJkl"
EPOCHS = "train.epochs"


def problems(arguments: list[str] | None = None, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Where -> what of everything wrong with a configuration that must be wrong."""
    with pytest.raises(SettingsError) as caught:
        load_settings(arguments or [], environ or {})
    return {problem.where: problem.what for problem in caught.value.problems}


@pytest.fixture
def sagemaker(tmp_path: Path) -> Callable[[object], dict[str, str]]:
    """Writes hyperparameters.json (text as it is, anything else as JSON) and gives the job's environment."""

    def environment(hyperparameters: object) -> dict[str, str]:
        path = tmp_path / "ml/input/config/hyperparameters.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(hyperparameters if isinstance(hyperparameters, str) else json.dumps(hyperparameters))
        return {"TRAINING_JOB_NAME": "alpaca-1", "SAGEMAKER_BASE_DIR": str(tmp_path / "ml")}

    return environment


class TestDefaults:
    """What holds when nothing is said."""

    def test_nothing_said_is_the_reference_recipe(self) -> None:
        """The default preset is the published recipe, field for field."""
        settings = load_settings([], {})
        assert settings.preset == "mistral-7b-alpaca"
        assert settings.model.id == "mistralai/Mistral-7B-v0.1"
        assert (settings.model.quantization, settings.model.double_quantization) == ("nf4", True)
        assert (settings.lora.rank, settings.lora.alpha, settings.lora.dropout) == (16, 16, 0.0)
        assert settings.lora.target_modules == "auto"
        assert (settings.data.source, settings.data.limit, settings.data.on_bad_row) == (
            "tatsu-lab/alpaca",
            1500,
            "skip",
        )
        assert (settings.train.epochs, settings.train.learning_rate, settings.train.global_batch_size) == (2, 2e-4, 32)
        assert (settings.train.optimizer, settings.train.gradient_checkpointing) == ("adamw_8bit", "auto")
        assert settings.eval.tasks == ("arc_easy",)

    def test_the_default_preset_pins_its_hub_revisions(self) -> None:
        """What the hub serves may change; the reference recipe does not."""
        settings = load_settings([], {})
        for revision in (settings.model.revision, settings.data.revision):
            assert re.fullmatch(r"[0-9a-f]{40}", revision or "")

    @pytest.mark.parametrize("preset", PRESETS)
    def test_every_preset_is_valid_and_says_so(self, preset: str) -> None:
        """All of a preset's values pass, and carry its name as their source."""
        settings = load_settings(["--preset", preset], {})
        assert settings.preset == preset
        assert {settings.sources[name] for name in PRESETS[preset]} == {f"preset {preset}"}

    def test_presets_and_their_type_name_the_same(self) -> None:
        """The first preset is the default, and the schema offers exactly those that exist."""
        assert Settings().preset == next(iter(PRESETS))
        assert json_schema()["properties"]["preset"]["enum"] == list(PRESETS)

    def test_the_demo_needs_no_network(self) -> None:
        """Model, data and questions of the demo lie in the package."""
        demo = load_settings(["--preset=demo"], {})
        package = Path(__file__).parents[3] / "job/demo"
        assert Path(demo.model.id) == package / "base"
        assert Path(demo.data.source) == package / "instructions.jsonl"
        assert dict(demo.eval.data) == {"arc_easy": str(package / "questions.jsonl")}
        assert (demo.model.revision, demo.data.revision, demo.data.limit) == (None, None, None)

    def test_every_default_passes_its_own_check(self) -> None:
        """Defaults are not validated when used, so they are validated here."""
        plain = Settings()
        assert Settings.model_validate(plain.model_dump()).model_dump() == plain.model_dump()

    def test_settings_are_frozen(self) -> None:
        """What was checked at the start still holds at the end."""
        settings = load_settings([], {})
        with pytest.raises(ValidationError, match="frozen"):
            settings.train.epochs = 3


class TestPrecedence:
    """Command line > environment > hyperparameters > file > preset > default."""

    def test_each_layer_wins_over_those_below(self, tmp_path: Path, sagemaker: Callable) -> None:
        """Taking the layers away one by one uncovers the next, with its source."""
        config = tmp_path / "job.yaml"
        config.write_text("train: {epochs: 4}\n")
        base = {"JOB_PRESET": "demo"}
        file = base | {"JOB_CONFIG": str(config)}
        hyperparameters = file | sagemaker({"train.epochs": "5"})
        environment = hyperparameters | {"JOB_TRAIN__EPOCHS": "6"}
        layers = [
            (["--train.epochs=7"], environment, 7, "command line"),
            ([], environment, 6, "environment JOB_TRAIN__EPOCHS"),
            ([], hyperparameters, 5, "hyperparameters.json"),
            ([], file, 4, f"file {config}"),
            ([], base, PRESETS["demo"][EPOCHS], "preset demo"),
            ([], {}, 2, "default"),
        ]
        for arguments, environ, epochs, source in layers:
            settings = load_settings(arguments, environ)
            assert (settings.train.epochs, settings.sources[EPOCHS]) == (epochs, source)

    def test_the_preset_itself_follows_the_precedence(self, tmp_path: Path) -> None:
        """A preset named in a file holds until the environment or the command line names another."""
        config = tmp_path / "job.toml"
        config.write_text('preset = "demo"\n')
        environ = {"JOB_CONFIG": str(config)}
        assert load_settings([], environ).preset == "demo"
        assert load_settings([], environ | {"JOB_PRESET": "mistral-7b-alpaca"}).preset == "mistral-7b-alpaca"
        assert load_settings(["--preset=demo"], environ | {"JOB_PRESET": "mistral-7b-alpaca"}).model.dtype == "fp32"

    def test_the_file_of_the_command_line_replaces_that_of_the_environment(self, tmp_path: Path) -> None:
        """`--config` wins over JOB_CONFIG; the two are not mixed."""
        one, two = tmp_path / "one.yaml", tmp_path / "two.yml"
        one.write_text("train: {epochs: 8, max_steps: 3}\n")
        two.write_text("train: {epochs: 9}\n")
        settings = load_settings(["--config", str(two)], {"JOB_CONFIG": str(one)})
        assert (settings.train.epochs, settings.train.max_steps) == (9, None)

    def test_a_pin_stays_behind_when_its_repository_is_replaced(self) -> None:
        """The commit of one repository means nothing in another."""
        settings = load_settings(["--model.id=org/other"], {"JOB_DATA__SOURCE": "mine.jsonl"})
        assert (settings.model.revision, settings.data.revision) == (None, None)

    def test_a_pin_stays_when_its_repository_is_only_repeated(self) -> None:
        """Writing the default model into a manifest does not unpin it."""
        again = load_settings([], {"JOB_MODEL__ID": "mistralai/Mistral-7B-v0.1"})
        assert again.model.revision == load_settings([], {}).model.revision

    def test_a_pin_given_with_its_repository_holds(self) -> None:
        """The user's own revision belongs to the user's own model."""
        settings = load_settings([], {"JOB_MODEL__ID": "org/other", "JOB_MODEL__REVISION": "abc"})
        assert settings.model.revision == "abc"

    def test_a_need_for_a_gpu_belongs_to_the_model(self) -> None:
        """The default model wants a GPU, the demo takes what there is; of a model of one's own neither is said."""
        assert load_settings([], {}).run.device == "gpu"
        assert load_settings(["--preset=demo"], {}).sources["run.device"] == "preset demo"
        assert load_settings(["--model.id=org/other"], {}).sources["run.device"] == "default"
        assert load_settings(["--model.id=org/other", "--run.device=cpu"], {}).run.device == "cpu"

    def test_every_setting_has_a_source(self) -> None:
        """Provenance is complete: none is missing, none is made up."""
        assert set(load_settings([], {"JOB_LOG__LEVEL": "debug"}).sources) == set(NAMES)


class TestSpelling:
    """How names and values may be written."""

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--train.learning-rate=3e-4"],
            ["--train.learning_rate", "3e-4"],
            ["--TRAIN.learning-rate", "3e-4"],
            ["--train.learning-rate=1", "--train.learning_rate=3e-4"],
        ],
    )
    def test_command_line_spellings(self, arguments: list[str]) -> None:
        """Dash or underscore, equals sign or space; the last of two wins."""
        assert load_settings(arguments, {}).train.learning_rate == 3e-4

    def test_a_negative_number_is_a_value(self) -> None:
        """One dash begins a number, two a name."""
        assert load_settings(["--gate.min-delta", "-0.01"], {}).gate.min_delta == -0.01

    @pytest.mark.parametrize(
        "key",
        [
            "train.learning_rate",
            "train.learning-rate",
            "train__learning-rate",
            "Train.Learning_Rate",
            "JOB_TRAIN__LEARNING_RATE",
            "job_train__learning_rate",
            "train-learning-rate",
            "Train_Learning_Rate",
        ],
    )
    @pytest.mark.parametrize("value", ["3e-4", '"3e-4"', "0.0003", 3e-4])
    def test_hyperparameter_spellings(self, sagemaker: Callable, key: str, value: object) -> None:
        """SageMaker's users and SDKs write names and values in many ways; all mean the same."""
        settings = load_settings([], sagemaker({key: value}))
        assert (settings.train.learning_rate, settings.sources["train.learning_rate"]) == (3e-4, "hyperparameters.json")

    def test_hyperparameters_of_every_type(self, sagemaker: Callable) -> None:
        """Strings of JSON, of Python and of people become values of the right type."""
        given_ = {
            "eval.tasks": '["arc_easy", "hellaswag"]',
            "eval.data": '{"arc_easy": "s3://bucket/questions.jsonl"}',
            "model.quantization": '"none"',
            "model.double-quantization": "False",
            "data.limit": "null",
            "lora.target_modules": "q_proj,v_proj",
            "config": "",
            "sagemaker_program": '"train.py"',
            "_tuning_objective_metric": "loss",
        }
        settings = load_settings([], sagemaker(given_))
        assert settings.eval.tasks == ("arc_easy", "hellaswag")
        assert dict(settings.eval.data) == {"arc_easy": "s3://bucket/questions.jsonl"}
        assert (settings.model.quantization, settings.model.double_quantization) == ("none", False)
        assert settings.data.limit is None
        assert settings.lora.target_modules == ("q_proj", "v_proj")

    @pytest.mark.parametrize("text", ['{"epochs": 3, "max_steps": 5}', "{'epochs': 3, 'max_steps': 5}"])
    def test_a_group_as_a_hyperparameter(self, sagemaker: Callable, text: str) -> None:
        """The SDKs send an object for a group (train={"epochs": 3}): its settings are read, its typos named."""
        settings = load_settings([], sagemaker({"train": text, "lora.rank": "4"}))
        assert (settings.train.epochs, settings.train.max_steps, settings.lora.rank) == (3, 5, 4)
        assert settings.sources["train.epochs"] == "hyperparameters.json"
        assert "train.epochs" in problems([], sagemaker({"train": '{"epocs": 3}'}))["hyperparameters.json train.epocs"]
        twice = problems([], sagemaker({"train": text, "train.epochs": "4"}))
        assert "twice" in twice["JOB_TRAIN__EPOCHS (hyperparameters.json)"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("['q_proj', 'v_proj']", ("q_proj", "v_proj")), ("('q_proj',)", ("q_proj",)), ("[unclosed", None)],
    )
    def test_python_s_literals(self, sagemaker: Callable, text: str, expected: tuple[str, ...] | None) -> None:
        """SDK v2 writes lists and None as Python does; what is no literal stays the text that it is."""
        environ = sagemaker({"lora.target_modules": text, "data.limit": "None"})
        if expected is None:
            assert "JOB_LORA__TARGET_MODULES (hyperparameters.json)" in problems([], environ)
        else:
            settings = load_settings([], environ)
            assert (settings.lora.target_modules, settings.data.limit) == (expected, None)

    def test_a_sagemaker_job_without_hyperparameters_is_fine(self) -> None:
        """The file is optional; the job's name is the run id all the same."""
        settings = load_settings([], {"TRAINING_JOB_NAME": "alpaca-1", "SAGEMAKER_BASE_DIR": "/nowhere"})
        assert (settings.run.id, settings.sources["run.id"]) == ("alpaca-1", "platform")

    @pytest.mark.parametrize("text", ["true", "True", "1", "yes", "ON", " on "])
    def test_true(self, text: str) -> None:
        """What people write for true."""
        assert load_settings([], {"JOB_STORAGE__REQUEST_PAYER": text}).storage.request_payer is True

    @pytest.mark.parametrize("text", ["false", "False", "0", "no", "OFF"])
    def test_false(self, text: str) -> None:
        """What people write for false; "False" is not true because it is a non-empty string."""
        assert load_settings([], {"JOB_MODEL__DOUBLE_QUANTIZATION": text}).model.double_quantization is False

    @pytest.mark.parametrize("text", ["t", "y", "2", "maybe", "none"])
    def test_neither_true_nor_false(self, text: str) -> None:
        """Anything else is an error, not a guess."""
        assert (
            "true or false"
            in problems([], {"JOB_STORAGE__REQUEST_PAYER": text})["JOB_STORAGE__REQUEST_PAYER (environment)"]
        )

    @pytest.mark.parametrize("text", ["a,b", " a , b ", '["a", "b"]'])
    def test_lists(self, text: str) -> None:
        """Commas or JSON."""
        assert load_settings([], {"JOB_EVAL__TASKS": text}).eval.tasks == ("a", "b")

    @pytest.mark.parametrize(
        "text", ["arc_easy=x.jsonl,b=s3://bucket/y", '{"arc_easy": "x.jsonl", "b": "s3://bucket/y/"}']
    )
    def test_mappings(self, text: str) -> None:
        """Pairs or JSON."""
        environ = {"JOB_EVAL__TASKS": "arc_easy,b", "JOB_EVAL__DATA": text}
        assert dict(load_settings([], environ).eval.data) == {"arc_easy": "x.jsonl", "b": "s3://bucket/y"}

    def test_empty_text_is_none_for_an_optional(self) -> None:
        """An empty variable takes back what preset or default say."""
        settings = load_settings([], {"JOB_DATA__LIMIT": "", "JOB_MODEL__REVISION": " ", "JOB_EVAL__DATA": ""})
        assert (settings.data.limit, settings.model.revision, dict(settings.eval.data)) == (None, None, {})

    @pytest.mark.parametrize("suffix", ["yaml", "toml"])
    def test_files_may_nest_or_dot(self, tmp_path: Path, suffix: str) -> None:
        """A file may nest groups or write dotted names, and an empty group says nothing."""
        text = {
            "yaml": "lora:\ntrain: {learning-rate: 1e-3, epochs: 3}\nlora.rank: 8\neval: {tasks: [a, b]}\n",
            "toml": '"lora.rank" = 8\n[lora]\n[train]\nlearning-rate = 1e-3\nepochs = 3\n[eval]\ntasks = ["a", "b"]\n',
        }[suffix]
        config = tmp_path / f"job.{suffix}"
        config.write_text(text)
        settings = load_settings([f"--config={config}"], {})
        assert (settings.train.learning_rate, settings.train.epochs, settings.lora.rank) == (1e-3, 3, 8)
        assert settings.eval.tasks == ("a", "b")

    def test_an_empty_file_says_nothing(self, tmp_path: Path) -> None:
        """A file of comments only is a file of no settings."""
        config = tmp_path / "job.yaml"
        config.write_text("# nothing yet\n")
        assert load_settings([f"--config={config}"], {}).train.epochs == 2

    def test_an_s3_output_loses_the_slash_at_its_end(self) -> None:
        """So that joining a key to it never makes an empty part."""
        assert load_settings([], {"JOB_RUN__OUTPUT": "s3://bucket/runs/"}).run.output == "s3://bucket/runs"


class TestRunId:
    """What a run is called."""

    def test_a_generated_id_is_valid_and_new(self) -> None:
        """Without a name from user or platform, time and chance make one, and say so."""
        settings = load_settings([], {"JOB_RUN__ID": ""})
        assert settings.sources["run.id"] == "generated"
        assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", settings.run.id)
        assert len({new_run_id() for _ in range(20)}) > 1

    def test_the_users_id_wins_over_the_platforms(self) -> None:
        """A user who names the run means it."""
        settings = load_settings(["--run.id=mine"], {"TRAINING_JOB_NAME": "alpaca-1"})
        assert (settings.run.id, settings.sources["run.id"]) == ("mine", "command line")

    def test_the_platform_is_known_without_valid_settings(self) -> None:
        """The failure file has to be found to report that the settings are wrong."""
        environ = {"TRAINING_JOB_NAME": "a", "JOB_TYPO": "1"}
        assert current_platform(environ).failure_file == Path("/opt/ml/output/failure")

    @pytest.mark.parametrize("run_id", ["bases", "scores"])
    def test_an_id_that_is_a_shared_folder(self, run_id: str) -> None:
        """Below JOB_RUN__OUTPUT both lie side by side, and the shared ones may be deleted."""
        assert "runs share" in problems([f"--run.id={run_id}"])["JOB_RUN__ID (command line)"]

    @pytest.mark.parametrize("run_id", ["-a", ".a", "a/b", "a b", "a" * 129, "ä", "a\nb"])
    def test_an_id_that_is_no_folder_name(self, run_id: str) -> None:
        """The id is a folder, an object key and a label, so it holds only what all of them allow."""
        assert "128" in problems([f"--run.id={run_id}"])["JOB_RUN__ID (command line)"]


class TestUnknownNames:
    """A misspelt setting is never ignored."""

    @pytest.mark.parametrize(
        ("variable", "nearest"),
        [
            ("JOB_TRAIN__LEARNING_RAET", "JOB_TRAIN__LEARNING_RATE"),
            ("JOB_TRIAN__EPOCHS", "JOB_TRAIN__EPOCHS"),
            ("JOB_PRESTE", "JOB_PRESET"),
            ("JOB_CONFG", "JOB_CONFIG"),
            ("JOB_TRAIN_EPOCHS", "JOB_TRAIN__EPOCHS"),
            ("JOB_train__epochs", "JOB_TRAIN__EPOCHS"),
            ("JOB_EVAL__DATA__ARC", "JOB_EVAL__DATA"),
        ],
    )
    def test_in_the_environment(self, variable: str, nearest: str) -> None:
        """At every level, the top included, with the nearest name spelled as a variable."""
        assert problems([], {variable: "1"})[f"environment {variable}"].endswith(f"the nearest is {nearest}")

    def test_on_the_command_line(self) -> None:
        """With the nearest name spelled as an option; the value after it is no second problem."""
        assert problems(["--train.epocs", "3"]) == {
            "command line --train.epocs": "is not a setting; the nearest is --train.epochs",
        }

    def test_a_group_that_was_forgotten(self) -> None:
        """A name without its group is answered with all settings of this name, and a command's own options count."""
        assert problems(["--rank", "3"])["command line --rank"].endswith("the nearest is --lora.rank")
        typed = ["--train.rank", "3", "--train.lr", "1", "--gpus", "2", "--modle.id", "a"]
        found = problems(typed, {"JOB_MODEL_ID": "a"})
        nearest = {where.rpartition(" ")[2]: what.rpartition(" ")[2] for where, what in found.items()}
        assert nearest == {
            "--train.rank": "--lora.rank",
            "--train.lr": "--train.learning_rate",
            "--gpus": "--run.processes",
            "--modle.id": "--model.id",
            "JOB_MODEL_ID": "JOB_MODEL__ID",
        }
        found = problems([], {"JOB_SEED": "3"})["environment JOB_SEED"]
        assert found.endswith("the nearest is JOB_RUN__SEED or JOB_LORA__SEED or JOB_DATA__SEED")
        with pytest.raises(SettingsError, match="the nearest is --schema"):
            load_settings(["--shema"], {}, options=("schema",))

    def test_a_group_that_was_mistyped(self, tmp_path: Path) -> None:
        """A mapping in a file whose name is nearly that of a group is answered with the group."""
        config = tmp_path / "job.toml"
        config.write_text('[modle]\nid = "x"\n')
        assert problems([f"--config={config}"])[f"file {config} modle"].endswith("the group of settings model")

    def test_none_is_better_than_a_wrong_one(self) -> None:
        """Where no name is similar, the command that lists them all is named."""
        assert problems([], {"JOB_QQQQ": "1"})["environment JOB_QQQQ"].endswith("`qlora-job config` lists all settings")

    def test_in_hyperparameters(self, sagemaker: Callable) -> None:
        """Also where SageMaker would let it pass."""
        assert problems([], sagemaker({"epochs": "3"})) == {
            "hyperparameters.json epochs": "is not a setting; the nearest is train.epochs",
        }

    def test_in_a_file(self, tmp_path: Path) -> None:
        """Nested or at the top, whatever the type of the key."""
        config = tmp_path / "job.yaml"
        config.write_text("trian: {epochs: 3}\ntrain: {epocs: 3}\n5: x\nconfig: other.yaml\n")
        found = problems([], {"JOB_CONFIG": str(config)})
        assert set(found) == {f"file {config} {name}" for name in ("trian", "train.epocs", "5", "config")}
        assert found[f"file {config} train.epocs"].endswith("train.epochs")

    def test_a_group_is_not_a_setting(self) -> None:
        """A group where a setting belongs is answered with its members."""
        assert "JOB_LORA__RANK" in problems([], {"JOB_LORA": '{"rank": 8}'})["environment JOB_LORA"]

    def test_what_a_pod_gets_from_kubernetes_is_no_mistake(self) -> None:
        """Kubernetes' own JOB_ variables do not stop a job; elsewhere those of services are unknown names."""
        environ = {"JOB_COMPLETION_INDEX": "0", "JOB_TRACKER_PORT_443_TCP_ADDR": "10.0.0.2"}
        assert load_settings([], environ | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
        assert list(problems([], environ)) == ["environment JOB_TRACKER_PORT_443_TCP_ADDR"]

    def test_other_variables_are_none_of_our_business(self) -> None:
        """Only names that begin with JOB_, in capitals, are read."""
        assert load_settings([], {"job_typo": "1", "MY_JOB_TYPO": "1", "JOBS": "4"})

    def test_strange_names_stay_on_one_line(self) -> None:
        """Names that are not text, or a page of it, neither break the message nor the encoding of it."""
        with pytest.raises(SettingsError) as caught:
            load_settings([], {"JOB_\udc80\n": "1", "JOB_" + "A" * 10_000: "1"})
        assert len(str(caught.value).encode("utf-8").splitlines()) == 2
        assert len(str(caught.value)) < 500


BAD_VALUES: list[tuple[str, list[str]]] = [
    ("preset", ["", "nonsense", "DEMO"]),
    ("run.id", ["-x", "a/b", "../up"]),
    (
        "run.output",
        ["", "s3://", "s3://B/x", "s3://bucket//x", "s3://bucket/../x", "oss://bucket/x", "~/x", "a\x00b", "\udc80"],
    ),
    ("run.seed", ["-1", "4294967296", "x", "", "1.5"]),
    ("run.grace_seconds", ["0", "-1", "nan", "inf", "1e300"]),
    ("run.spot_notices", ["true", "aws"]),
    ("run.device", ["", "cuda", "GPU"]),
    ("run.image_digest", ["latest", "sha256:abc", f"sha256:{'A' * 64}", f"registry/image@sha256:{'a' * 64}"]),
    ("data.date", ["today", "2026-02-30", "31.01.2026"]),
    ("data.chat_template_arguments", ["thinking", "[1]", "{", '{"a b": 1}', '{"a": NaN}']),
    ("eval.long_questions", ["true", "truncate"]),
    ("model.id", ["", "https://host/model", "s3://a/b"]),
    ("model.name", ["/models/base", "./base", "a/b/c", "s3://bucket/base", "org/", "a b"]),
    ("model.pretraining_tokens", ["0", "-1", "nan", "2T", "1e17"]),
    ("model.quantization", ["int8", "NF4", ""]),
    ("sign.key", ["s3://bucket/key.pem", "a\x00b"]),
    ("sign.password", ["two\nlines"]),
    ("model.double_quantization", ["maybe", "2", ""]),
    ("model.dtype", ["float16"]),
    ("lora.rank", ["0", "-1", "1.5", "sixteen", "9" * 5000]),
    ("lora.alpha", ["0", "-16"]),
    ("train.compute", ["", "bf16", "FP8"]),
    ("lora.dropout", ["1", "-0.1", "nan", "1e400"]),
    ("lora.modules_to_save", ["lm_head,lm_head", "lm_head,,", "[1]"]),
    ("model.add_tokens", ["<a>,<a>", "<a>,,", "[", '{"a": 1}']),
    ("lora.layers", ["3-1", "a", "1,1", "1-", "-1"]),
    ("lora.rank_pattern", ["q_proj", "q_proj=0", "q_proj=x", "q_proj=1,q_proj=2", "(=4", "{"]),
    ("lora.alpha_pattern", ["q_proj=-1"]),
    ("lora.use_rslora", ["maybe"]),
    ("lora.use_dora", ["2"]),
    ("lora.init", ["pissa_niter_x", "loftQ", "eva_2", "orthogonal"]),  # the last needs an unquantized base
    ("lora.seed", ["-1"]),
    ("lora.kind", ["loha"]),
    ("lora.init_rank", ["0", "24"]),  # the last has no effect without AdaLoRA
    ("lora.tinit", ["-1", "3"]),
    ("lora.tfinal", ["-1", "3"]),
    ("lora.delta_t", ["0", "3"]),
    ("lora.orth_reg_weight", ["-1", "0.1"]),
    ("lora.target_modules", ["", "q_proj,q_proj", "q_proj,,v_proj", "[", "[1]", "[" * 5000, '{"a": 1}']),
    ("data.source", ["", "http://host/x", "s3://x", "s3:/bucket/x", "a,", "a=2,b", "a,s3://x", "a,a", "a=0x"]),
    ("data.fields", ["prompt", "prompt=a,prompt=b", "{", "prompt="]),
    ("data.on_long_row", ["cut", "true"]),
    ("data.limit", ["0", "-5", "many"]),
    ("data.format", ["csv"]),
    ("data.validation", ["0", "1", "1.0", "0.0", "-0.1", "1.5", "-3", "9" * 12, "1e400", "https://host/x", "a\x00b"]),
    ("data.validation_split", [""]),
    ("eval.judge", ["http://", "https://user@host", "s3://", "~/judge"]),
    ("data.unsafe_threshold", ["0", "1.1", "-0.1", "half"]),
    ("data.on_finding", ["", "drop", "secrets=skip", "secret=drop", "secret", "secret=skip,secret=error"]),
    ("train.validate_every_steps", ["0", "x"]),
    ("train.stop_after", ["0", "-1"]),
    ("train.keep", ["", "first"]),
    ("train.method", ["", "DPO", "ppo"]),
    ("train.beta", ["0", "-0.1", "nan"]),
    ("train.preference_loss", ["hinge", ""]),
    ("train.label_smoothing", ["0.5", "-0.1"]),
    ("train.desirable_weight", ["0", "inf"]),
    ("train.undesirable_weight", ["0", "x"]),
    ("data.on_bad_row", ["ignore"]),
    ("train.epochs", ["0", "-1", "2e6", "inf", "nan", "true", ""]),
    ("train.max_steps", ["0", "x"]),
    ("train.learning_rate", ["-1e-4", "nan", "inf", "-inf", "fast"]),
    ("train.scheduler", ["step"]),
    ("train.warmup_steps", ["-1"]),
    ("train.weight_decay", ["-0.1", "1e19"]),
    ("train.warmup_ratio", ["-0.1", "1.5", "x"]),
    ("train.min_lr_ratio", ["-0.1", "1.1", "0.1"]),  # the last has no effect on a linear schedule
    ("train.decay_ratio", ["-0.1", "1.1", "0.2"]),
    ("train.neftune_noise_alpha", ["-1", "inf", "1e19"]),
    ("data.seed", ["-1", "x"]),
    ("train.max_grad_norm", ["-1", "inf"]),
    ("train.global_batch_size", ["0", "-32"]),
    ("train.micro_batch_tokens", ["0"]),
    ("train.optimizer", ["sgd"]),
    ("train.stall_seconds", ["0"]),
    ("checkpoint.every_steps", ["0"]),
    ("checkpoint.keep", ["0"]),
    ("eval.tasks", ["", "a,a", "[]", '["a", 1]', "[[[["]),
    ("eval.prompts", ["0", "-1", "1001", "0.5", "https://host/x", "a\x00b"]),
    ("eval.prompts_max_new_tokens", ["0", "-1", "x"]),
    ("eval.data", ["x", "a=1,a=2", "{", "[]", '{"arc_easy": 1}', '{"arc_easy": "ftp://x"}', "arc_esay=x.jsonl"]),
    ("export.formats", ["merge", "merged,merged", "gguf"]),
    ("export.merge_onto", ["", "nf4"]),
    ("export.calibration_rows", ["0"]),
    ("export.quantization_steps", ["-1"]),
    ("gate.on", ["", "base", "gguf"]),
    ("gate.metric", [""]),
    ("gate.min_delta", ["1.1", "-1.1", "nan", "1%", "1 %"]),
    ("gate.max_regression", ["-0.1", "1.1"]),
    (
        "storage.endpoint_url",
        ["host", "ftp://host", "https://", "http://[", "https://h:x", "https://u@h", "https://h/?a=b"],
    ),
    ("run.processes", ["0", "-1", "1025", "999999999", "two", "1.5", "٢", "true", ""]),
    ("run.nodes", ["0", "x"]),
    ("run.node_rank", ["-1", "x"]),
    ("run.rendezvous", ["host", ":29400", "host:", "host:0", "host:65536", "http://host:1", "a b:1", "host:1:2"]),
    ("storage.storage_class", ["GLACIER", "DEEP_ARCHIVE", "Archive"]),
    ("storage.timeout_seconds", ["0"]),
    ("storage.retries", ["-1", "0", "1000"]),
    ("storage.cache", ["s3://bucket/cache", "~/cache"]),
    ("log.format", ["text"]),
    ("log.level", ["INFO", "trace"]),
    ("cost.usd_per_hour", ["-1", "nan", "free"]),
]
BAD_PAIRS = [(name, value) for name, values in BAD_VALUES for value in values]


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return "JOB_" + name.upper().replace(".", "__")


class TestAdapters:
    """Options of the adapter, alone and together."""

    def test_layers_and_patterns_are_read(self) -> None:
        """Ranges, pairs and JSON."""
        given = {"LAYERS": "8-10, 2", "RANK_PATTERN": "q_proj=8,v_proj=16", "ALPHA_PATTERN": '{"k": 4}'}
        lora = load_settings([], {f"JOB_LORA__{name}": value for name, value in given.items()}).lora
        assert (lora.layers, dict(lora.rank_pattern), dict(lora.alpha_pattern)) == (
            (2, 8, 9, 10),
            {"q_proj": 8, "v_proj": 16},
            {"k": 4},
        )
        assert load_settings([], {"JOB_LORA__TARGET_MODULES": "mlp"}).lora.target_modules == "mlp"

    def test_adapters_of_experts_are_plain(self) -> None:
        """What PEFT does not have for them is refused, and so is what would need a merge."""
        given = {"JOB_LORA__DROPOUT": "0.1", "JOB_LORA__USE_DORA": "1", "JOB_EXPORT__FORMATS": "merged"}
        given |= {"JOB_TRAIN__COMPUTE": "fp8"}
        found = problems([], {"JOB_LORA__EXPERTS": "true"} | given)
        assert set(found) == {f"{name} (environment)" for name in given}
        assert load_settings([], {"JOB_LORA__EXPERTS": "true"}).lora.experts
        assert not load_settings([], {}).lora.experts

    def test_what_cannot_be_together_is_said_at_once(self) -> None:
        """AdaLoRA has no other option; a decomposition no dropout, no magnitudes and no other scale."""
        options = {"JOB_LORA__USE_DORA": "1", "JOB_LORA__USE_RSLORA": "1"}
        adalora = {"JOB_LORA__KIND": "adalora", "JOB_LORA__INIT": "gaussian", "JOB_LORA__INIT_RANK": "16"}
        found = problems([], adalora | options)
        assert set(found) == {
            f"JOB_LORA__{name} (environment)" for name in ("INIT", "INIT_RANK", "USE_DORA", "USE_RSLORA")
        }
        found = problems([], {"JOB_LORA__INIT": "pissa", "JOB_LORA__DROPOUT": "0.1"} | options)
        assert set(found) == {f"JOB_LORA__{name} (environment)" for name in ("DROPOUT", "USE_DORA", "USE_RSLORA")}

    def test_a_schedule_that_contradicts_itself(self) -> None:
        """Both ways to say a warmup, and a warmup and a decay that overlap."""
        both = {"JOB_TRAIN__WARMUP_RATIO": "0.6", "JOB_TRAIN__WARMUP_STEPS": "3", "JOB_TRAIN__DECAY_RATIO": "0.5"}
        found = problems([], {"JOB_TRAIN__SCHEDULER": "warmup_stable_decay"} | both)
        assert set(found) == {"JOB_TRAIN__WARMUP_RATIO (environment)", "JOB_TRAIN__DECAY_RATIO (environment)"}


class TestWrongValues:
    """Wrong values, alone and together."""

    @pytest.mark.parametrize(("name", "value"), BAD_PAIRS, ids=[f"{name}={value[:20]!r}" for name, value in BAD_PAIRS])
    def test_each_is_named_with_its_source(self, name: str, value: str) -> None:
        """One wrong value is one problem, which names the setting and the variable."""
        assert list(problems([], {variable(name): value})) == [f"{variable(name)} (environment)"]

    def test_all_at_once(self, tmp_path: Path, sagemaker: Callable) -> None:
        """Wrong names, wrong values and impossible combinations of all layers come in one error."""
        config = tmp_path / "job.yaml"
        config.write_text("lora: {rank: 0}\ntypo: 1\n")
        environ = sagemaker({"train.epochs": "-1"}) | {
            "JOB_CONFIG": str(config),
            "JOB_RUN__SEED": "x",
            "JOB_TYPO": "1",
            "WORLD_SIZE": "three",
            "RANK": "0",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "a",
            "MASTER_PORT": "1",
        }
        assert set(problems(["--data.limit=0", "--nope=1"], environ)) == {
            f"file {config} typo",
            "environment JOB_TYPO",
            "command line --nope",
            "JOB_RUN__SEED (environment)",
            f"JOB_LORA__RANK (file {config})",
            "JOB_DATA__LIMIT (command line)",
            "JOB_TRAIN__EPOCHS (hyperparameters.json)",
            "WORLD_SIZE (environment)",
        }

    def test_numbers_in_a_file_are_not_true_or_false(self, tmp_path: Path) -> None:
        """`epochs: true` is a mistake, though Python counts True as 1."""
        config = tmp_path / "job.yaml"
        config.write_text("train: {epochs: true, learning_rate: yes}\nmodel: {double_quantization: 1.0}\n")
        assert len(problems([], {"JOB_CONFIG": str(config)})) == 3

    @pytest.mark.parametrize("arguments", [["--train.epochs"], ["--train.epochs", "--lora.rank=8"]])
    def test_an_option_needs_a_value(self, arguments: list[str]) -> None:
        """An option without a value does not consume the next option."""
        assert list(problems(arguments)) == ["command line --train.epochs"]

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ("my-rows", {"my-rows": "the name of a run is given as --run.id my-rows, its data as --data.source PATH"}),
            ("my rows", {"my": "--run.id my,", "rows": "--run.id rows,"}),
            ("-v", {"-v": "`qlora-job --version` prints the version, `qlora-job --help` what can be given"}),
            (f"-k={SECRET}", {"-k": "is not an option"}),
            ("-train.epochs=3", {"-train.epochs": "has one dash; write --train.epochs"}),
            ("x -v --lora.rnk=8", {"x": "--run.id x", "-v": "--help", "--lora.rnk": "the nearest is --lora.rank"}),
        ],
    )
    def test_a_word_that_is_no_option(self, arguments: str, named: dict[str, str]) -> None:
        """It is named, together with all others, with what may be meant."""
        found = problems(arguments.split())
        assert list(found) == [f"command line {word}" for word in named]
        assert all(words in found[f"command line {word}"] for word, words in named.items())

    @pytest.mark.parametrize("arguments", [["--lora.rank=8", SECRET], ["-k", SECRET], ["-v", f"-{SECRET}"]])
    def test_a_stray_argument_behind_an_option(self, arguments: list[str]) -> None:
        """It is named by its place only, because it may be anything."""
        found = problems(arguments)
        assert list(found)[-1] == "command line, argument 2"
        assert SECRET not in str(found)

    @pytest.mark.parametrize("spelling", ["train__epochs", "train-epochs", "TRAIN_EPOCHS"])
    def test_two_spellings_of_one_hyperparameter(self, sagemaker: Callable, spelling: str) -> None:
        """Which of the two was meant cannot be known."""
        found = problems([], sagemaker({"train.epochs": "1", spelling: "2"}))
        assert "twice" in found["JOB_TRAIN__EPOCHS (hyperparameters.json)"]

    def test_a_name_without_its_dot_is_for_hyperparameters(self) -> None:
        """Tuners and templates write them so; elsewhere a name is written as it is documented."""
        assert list(problems([], {"JOB_TRAIN_EPOCHS": "3"})) == ["environment JOB_TRAIN_EPOCHS"]

    def test_flat_names_are_told_apart(self) -> None:
        """No two settings have the same name once their dots are underscores."""
        assert len({name.replace(".", "_") for name in NAMES}) == len(NAMES)

    @pytest.mark.parametrize("text", ["{", "[]", "3", "\ufeff{]", "[" * 100_000])
    def test_broken_hyperparameters(self, sagemaker: Callable, text: str) -> None:
        """A file that is not a JSON object is one problem."""
        assert list(problems([], sagemaker(text))) == ["hyperparameters.json"]

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.yaml", b"train: {epochs: 3"),
            ("a.yaml", b"- a\n- b\n"),
            ("a.yaml", b"0"),
            ("a.yaml", b"\xff\xfe\xfa"),
            ("a.yaml", b"a: 2026-99-99"),
            ("a.yaml", b"!!python/object/apply:os.system [x]"),
            ("a.yaml", b"[" * 5000),
            ("a.yaml", b" " * 2_000_000),
            ("a.toml", b"train = {"),
            ("a.toml", b"x = " + b"[" * 5000),
            ("a.toml", b"a = 1\na = 2\n"),
            ("a.ini", b"[train]\n"),
            ("missing.yaml", None),
            ("folder.yaml", "folder"),
        ],
    )
    def test_a_file_that_cannot_be_used(self, tmp_path: Path, name: str, content: bytes | str | None) -> None:
        """A broken, missing or foreign file is one problem, with the variable that named it."""
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content:
            path.mkdir()
        assert list(problems([], {"JOB_CONFIG": str(path)})) == ["JOB_CONFIG (environment)"]

    @pytest.mark.parametrize(
        ("name", "content", "place"),
        [
            ("job.yaml", b"train:\n  epochs: [3\nlora: 1\n", "line 3, column 5"),
            ("job.toml", b"[train]\nepochs = = 3\n", "line 2, column 10"),
            ("job.yaml", b"a: 1\nb: \xff\n", "line 2, column 4"),
        ],
    )
    def test_a_broken_file_names_the_place(self, tmp_path: Path, name: str, content: bytes, place: str) -> None:
        """Line and column, as far as the parser knows them."""
        path = tmp_path / name
        path.write_bytes(content)
        assert f"({place}); correct it" in problems([f"--config={path}"])["JOB_CONFIG (command line)"]

    @pytest.mark.parametrize(
        ("content", "what"),
        [
            (
                "train:\n  epochs: 3\ndata:\n  limit: 9\ntrain:\n  max_steps: 3\n",
                "line 5 column 1: a key is given twice",
            ),
            ("eval:\n  tasks: [arc_easy]\n  tasks: [boolq]\n", "line 3 column 3: a key is given twice"),
            ("lora:\n  layers: &a [1]\n  target_modules: *a\n", "line 3 column 19: an alias of a list"),
        ],
    )
    def test_what_a_parser_would_drop_or_unfold_is_refused(self, tmp_path: Path, content: str, what: str) -> None:
        """Of a key given twice YAML takes the last; a few nested aliases unfold to more than any memory holds."""
        (tmp_path / "job.yaml").write_text(content, encoding="utf-8")
        assert what in problems([f"--config={tmp_path / 'job.yaml'}"])["JOB_CONFIG (command line)"]

    @pytest.mark.parametrize("value", ["!!bool maybe", "!!int ''", "!!timestamp now"])
    def test_a_value_that_does_not_fit_its_tag(self, tmp_path: Path, value: str) -> None:
        """PyYAML has no error of its own for it."""
        (tmp_path / "job.yaml").write_text(f"lora:\n  rank: {value}\n", encoding="utf-8")
        assert "is not valid YAML" in problems([f"--config={tmp_path / 'job.yaml'}"])["JOB_CONFIG (command line)"]

    def test_an_alias_of_a_value_is_that_value(self, tmp_path: Path) -> None:
        """It unfolds to nothing larger."""
        (tmp_path / "job.yaml").write_text("lora:\n  rank: &r 32\n  alpha: *r\n", encoding="utf-8")
        lora = load_settings([f"--config={tmp_path / 'job.yaml'}"], {}).lora
        assert (lora.rank, lora.alpha) == (32, 32)

    def test_a_broken_json_file_names_the_place(self, sagemaker: Callable) -> None:
        """SageMaker's hyperparameters as well."""
        found = problems([], sagemaker('{"epochs": "3",\n "rank": }'))
        assert "(line 2, column 10); correct it" in found["hyperparameters.json"]

    def test_a_fraction_is_no_percentage(self) -> None:
        """A percent sign, and a number of per cent, are told what a fraction is."""
        found = problems(["--gate.min_delta=1%", "--gate.max_regression=5"])
        assert found["JOB_GATE__MIN_DELTA (command line)"] == "must be a number without a percent sign: 1 % is 0.01"
        assert "5 % is 0.05" in found["JOB_GATE__MAX_REGRESSION (command line)"]

    def test_a_broken_file_is_not_quoted(self, tmp_path: Path) -> None:
        """The line number is given, the line is not: it may hold a secret."""
        for name, text in (("a.yaml", f"x: 1\ny: {{ {SECRET}\n"), ("a.toml", f"x = 1\ny = {SECRET}\n")):
            (tmp_path / name).write_text(text)
            what = problems([f"--config={tmp_path / name}"])["JOB_CONFIG (command line)"]
            assert re.search(r"line [23]", what)
            assert SECRET not in what


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


class TestCombinations:
    """Values that are right alone and impossible together."""

    @pytest.mark.parametrize("world_size", ["2", "3", "64"])
    def test_any_number_of_processes_shares_a_batch(self, world_size: str) -> None:
        """A step's examples need not divide evenly, and some processes may have none."""
        assert load_settings(["--run.id=a"], TORCHRUN | {"WORLD_SIZE": world_size})

    @pytest.mark.parametrize("world_size", ["0", "-1", "x", "1.5", "9" * 5000, "٣"])
    def test_a_world_size_that_is_none(self, world_size: str) -> None:
        """The variables of torchrun are checked like settings."""
        assert list(problems([], TORCHRUN | {"WORLD_SIZE": world_size})) == ["WORLD_SIZE (environment)"]

    def test_torchruns_variables_come_together(self) -> None:
        """The number of processes alone says not which of them this is."""
        missing = ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
        assert list(problems([], {"WORLD_SIZE": "2"})) == [f"{name} (environment)" for name in missing]

    def test_several_processes_need_one_name(self) -> None:
        """Each process would make up a run id of its own and write elsewhere."""
        assert list(problems([], TORCHRUN)) == ["JOB_RUN__ID (generated)"]
        assert load_settings([], TORCHRUN | {"TRAINING_JOB_NAME": "alpaca-1"})
        assert load_settings([], TORCHRUN | {"WORLD_SIZE": "1"}).sources["run.id"] == "generated"
        assert list(problems(["--run.nodes=2", "--run.rendezvous=a:1"])) == ["JOB_RUN__ID (generated)"]

    def test_several_machines_need_an_address_and_numbers(self) -> None:
        """Where machine 0 listens, and which one this is."""
        found = problems(["--run.nodes=2", "--run.node_rank=2", "--run.id=a"])
        assert list(found) == ["JOB_RUN__RENDEZVOUS (default)", "JOB_RUN__NODE_RANK (command line)"]
        assert load_settings(["--run.node_rank=5"])  # an Indexed Job whose runs have nothing to do with each other

    def test_an_address_without_a_number_of_machines(self) -> None:
        """Each of them would run the whole run, and end the others' attempts by taking over."""
        (found,) = problems(["--run.rendezvous=a:1", "--run.id=a"]).items()
        assert found[0] == "JOB_RUN__RENDEZVOUS (command line)"
        assert "without JOB_RUN__NODES" in found[1]
        assert load_settings(["--run.rendezvous=a:1", "--run.id=a"], TORCHRUN)
        assert load_settings(["--run.rendezvous=a:1", "--run.nodes=1"])  # manifests that are scaled down to one pod

    def test_where_torchrun_starts_the_processes_it_knows_the_machines(self) -> None:
        """Our own settings of machines are then not asked for."""
        assert load_settings(["--run.nodes=2", "--run.id=a"], TORCHRUN)

    def test_a_pod_of_an_indexed_job_knows_its_number(self) -> None:
        """From the platform, unless the user says otherwise."""
        pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
        common = ["--run.nodes=2", "--run.rendezvous=a-0.a:29400", "--run.id=a"]
        settings = load_settings(common, pod)
        assert settings.run.node_rank == 1
        assert settings.sources["run.node_rank"] == "platform"
        assert load_settings([*common, "--run.node_rank=0"], pod).run.node_rank == 0

    def test_sagemaker_tells_its_hosts(self, tmp_path: Path, sagemaker: Callable) -> None:
        """Number of machines, which one, and where to meet; a file that tells nothing is a problem."""
        environ = sagemaker({"run.output": "s3://bucket/runs"})
        file = Path(environ["SAGEMAKER_BASE_DIR"], "input/config/resourceconfig.json")
        file.write_text(json.dumps({"current_host": "algo-2", "hosts": ["algo-1", "algo-2"]}))
        run = load_settings([], environ).run
        assert (run.nodes, run.node_rank, run.rendezvous) == (2, 1, "algo-1:29400")
        file.write_text("{}")
        assert list(problems([], environ)) == ["resourceconfig.json"]

    def test_sagemakers_hosts_share_no_folder(self, tmp_path: Path, sagemaker: Callable) -> None:
        """What SageMaker copies is another folder on each host; a file system that all have mounted is fine."""
        environ = sagemaker({})
        base = Path(environ["SAGEMAKER_BASE_DIR"])
        hosts = {"current_host": "algo-1", "hosts": ["algo-1", "algo-2"]}
        (base / "input/config/resourceconfig.json").write_text(json.dumps(hosts))
        assert "this machine only" in problems([], environ)["JOB_RUN__OUTPUT (platform)"]
        assert load_settings([f"--run.output={tmp_path}/shared"], environ)

    def test_an_output_below_a_file(self, tmp_path: Path) -> None:
        """A folder cannot be made inside a file, nor in its place."""
        (tmp_path / "file").touch()
        for output in (tmp_path / "file", tmp_path / "file/below/it"):
            assert "is a file" in problems([f"--run.output={output}"])["JOB_RUN__OUTPUT (command line)"]

    def test_an_output_in_a_folder_that_refuses(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Asked of the system before anything is written (root may write anywhere, so the answer is faked)."""
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        assert "not writable" in problems([f"--run.output={tmp_path}/new"])["JOB_RUN__OUTPUT (command line)"]

    def test_the_plain_image_on_sagemaker(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its user cannot write to SageMaker's folders: all of them are named at once, and the image that can."""
        (tmp_path / "ml").mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(tmp_path))
        environ = {"TRAINING_JOB_NAME": "a", "SAGEMAKER_BASE_DIR": str(tmp_path / "ml")}
        found = problems([], environ)
        assert found.keys() == {
            "JOB_RUN__OUTPUT (platform)",
            f"{tmp_path}/ml/model",
            f"{tmp_path}/ml/output/data",
        }
        assert all("infra/sagemaker/Dockerfile" in what for what in found.values())
        assert problems(["--run.output=s3://bucket/runs"], environ).keys() == found.keys() - {
            "JOB_RUN__OUTPUT (platform)"
        }

    def test_a_folder_is_asked_for_both_rights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """To make a file in a folder takes the right to write to it, and that to enter it."""
        asked = []
        monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)) is None)
        load_settings([f"--run.output={tmp_path}/new", f"--storage.cache={tmp_path}"], {})
        assert asked == [(tmp_path, os.W_OK | os.X_OK)] * 2
        load_settings(["--run.output=s3://bucket/runs"], {})
        assert len(asked) == 2  # a bucket is no folder

    def test_an_output_that_is_mounted_read_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The fix is said once, and no other user is advised."""
        monkeypatch.setattr(os, "access", lambda *_: False)
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))
        what = problems([f"--run.output={tmp_path}"])["JOB_RUN__OUTPUT (command line)"]
        fix = "its volume is mounted read-only: mount it writable, or give another path"
        assert what == f"cannot be written: {tmp_path} is not writable for this user; {fix}"

    def test_another_folder_on_sagemaker(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file system that is mounted elsewhere is no matter of the image."""
        (tmp_path / "fsx").mkdir()
        monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path / "fsx")
        environ = {"TRAINING_JOB_NAME": "a", "SAGEMAKER_BASE_DIR": str(tmp_path / "ml")}
        ((where, what),) = problems([f"--run.output={tmp_path}/fsx/runs"], environ).items()
        assert where == "JOB_RUN__OUTPUT (command line)"
        assert "give another path, or" in what
        assert "infra/sagemaker" not in what

    def test_an_output_behind_a_broken_link(self, tmp_path: Path) -> None:
        """A link to a volume that is not mounted is found now, not after the training."""
        (tmp_path / "link").symlink_to(tmp_path / "unmounted")
        assert "broken link" in problems([f"--run.output={tmp_path}/link/runs"])["JOB_RUN__OUTPUT (command line)"]

    def test_an_output_with_too_long_a_name(self) -> None:
        """The system's own refusal becomes a problem."""
        assert "cannot be written" in problems([f"--run.output={'a' * 300}"])["JOB_RUN__OUTPUT (command line)"]

    def test_looking_at_an_output_creates_nothing(self, tmp_path: Path) -> None:
        """`config` and a settings error leave no traces."""
        load_settings([f"--run.output={tmp_path}/a/b", f"--storage.cache={tmp_path}/c"], {})
        assert list(tmp_path.iterdir()) == []

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path) -> None:
        """The cache is checked as the output is."""
        (tmp_path / "file").touch()
        assert "is a file" in problems([f"--storage.cache={tmp_path}/file"])["JOB_STORAGE__CACHE (command line)"]

    @pytest.mark.parametrize("place", ["s3://bucket/base", "/models/base", "./base"])
    def test_a_revision_of_something_that_has_none(self, place: str) -> None:
        """Only a hub repository has commits; a pin without effect would be believed."""
        found = problems(
            [f"--model.id={place}", "--model.revision=abc", f"--data.source={place}", "--data.revision=abc"]
        )
        assert set(found) == {"JOB_MODEL__REVISION (command line)", "JOB_DATA__REVISION (command line)"}

    def test_values_that_a_file_of_variables_or_a_template_left_behind(self) -> None:
        """Quotes that no shell removed, and empty values, are named; a Windows line end is no fault."""
        quoted = {"JOB_TRAIN__EPOCHS": '"3"', "JOB_MODEL__ID": "'org/name'", "JOB_RUN__OUTPUT": '"runs"'}
        quoted["JOB_MODEL__REVISION"] = '""'
        found = problems([], quoted)
        assert set(found) == {f"{name} (environment)" for name in quoted}
        assert all("has quotes around its value" in what for what in found.values())
        assert load_settings([], {"JOB_MODEL__ADD_TOKENS": "'a','b'"}).model.add_tokens == ("'a'", "'b'")
        empty = dict.fromkeys(("JOB_LORA__RANK", "JOB_DATA__SOURCE", "JOB_LORA__TARGET_MODULES"), "")
        found = problems([], empty)
        assert set(found) == {f"{name} (environment)" for name in empty}
        assert all("must not be empty" in what and "leave it out" in what for what in found.values())
        windows = load_settings([], {"JOB_TRAIN__EPOCHS": "3\r", "JOB_DATA__SOURCE": "a.jsonl\r"})
        assert (windows.train.epochs, windows.data.source) == (3, "a.jsonl")
        found = problems([], {"JOB_LORA__TARGET_MODULES": "['q_proj', 'v_proj']"})
        assert "with texts in double quotes" in found["JOB_LORA__TARGET_MODULES (environment)"]

    def test_a_question_file_for_no_task(self) -> None:
        """A misspelt task would silently be fetched from the hub; a preset's unused file is left out."""
        found = problems(["--eval.data=arc_esay=questions.jsonl"])
        assert "JOB_EVAL__TASKS" in found["JOB_EVAL__DATA (command line)"]
        assert load_settings(["--preset=demo", "--eval.tasks=hellaswag"], {}).eval.data == {}
        for tasks in ("arc_easy,hellaswag", '["hellaswag", "arc_easy"]'):
            assert load_settings(["--preset=demo", f"--eval.tasks={tasks}"], {}).eval.data.keys() == {"arc_easy"}

    def test_a_question_file_for_a_task_of_a_group(self) -> None:
        """Its name need not begin with the group's; a preset's questions are not mixed with those of a group."""
        given = ["--preset=demo", "--eval.tasks=ai2_arc"]
        assert load_settings(given, {}).eval.data == {}
        own = load_settings([*given, "--eval.data=arc_easy=questions.jsonl"], {}).eval.data
        assert own == {"arc_easy": "questions.jsonl"}

    def test_a_gate_without_a_threshold(self) -> None:
        """A gate that can never close is not what was meant."""
        assert "threshold" in problems(["--gate.metric=acc_norm"])["JOB_GATE__METRIC (command line)"]
        assert load_settings(["--gate.metric=acc_norm", "--gate.min_delta=0"], {}).gate.min_delta == 0
        assert "threshold" in problems(["--gate.baseline=runs/a"])["JOB_GATE__BASELINE (command line)"]
        assert load_settings(["--gate.baseline=s3://bucket/a/results.json", "--gate.max_regression=0"], {})

    def test_a_gate_on_what_is_not_exported(self) -> None:
        """The gate cannot judge a model that is not made, nor can what it is made of be chosen."""
        found = problems(["--gate.on=merged", "--gate.min_delta=0"])
        assert "add it to JOB_EXPORT__FORMATS" in found["JOB_GATE__ON (command line)"]
        assert "threshold" in problems(["--gate.on=merged", "--export.formats=merged"])["JOB_GATE__ON (command line)"]
        found = problems(["--export.merge_onto=original"])
        assert "has no effect without" in found["JOB_EXPORT__MERGE_ONTO (command line)"]
        found = problems(["--export.formats=fp8", "--export.calibration_rows=9", "--export.quantization_steps=0"])
        assert set(found) == {
            f"JOB_EXPORT__{name} (command line)" for name in ("CALIBRATION_ROWS", "QUANTIZATION_STEPS")
        }
        assert load_settings(["--export.formats=awq", "--export.quantization_steps=0"], {}).export.formats == ("awq",)
        whole = load_settings(["--gate.on=merged", "--export.formats=merged", "--gate.min_delta=0"], {})
        assert (whole.export.formats, whole.export.merge_onto) == (("merged",), "best")
        assert load_settings(["--export.formats="], {}).export.formats == ()

    def test_gates_that_contradict_each_other(self) -> None:
        """Allowing a loss of 5 points and forbidding one of 1 cannot both be meant."""
        found = problems(["--gate.min-delta=-0.05", "--gate.max-regression=0.01"])
        assert "JOB_GATE__MAX_REGRESSION" in found["JOB_GATE__MIN_DELTA (command line)"]
        assert load_settings(["--gate.min-delta=0.01", "--gate.max-regression=0.01"], {})


class TestMethods:
    """Settings that belong to one method of training."""

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--train.beta=0.2"],
            ["--train.method=kto", "--train.label_smoothing=0.1"],
            ["--train.method=dpo", "--train.desirable_weight=2"],
            ["--train.method=orpo", "--train.preference_loss=sigmoid"],
            ["--train.method=dpo", "--train.preference_loss=ipo", "--train.label_smoothing=0.1"],
            ["--train.method=dpo", "--train.sft_epochs=3"],
            ["--data.sft_source=rows.jsonl"],
        ],
    )
    def test_a_setting_without_effect_is_refused(self, arguments: list[str]) -> None:
        """It would seem to be tuned; the message names what it belongs to."""
        (found,) = problems(arguments).values()
        assert "has no effect with" in found

    @pytest.mark.parametrize(
        ("given", "name"),
        [(["--lora.init=pissa"], "JOB_LORA__INIT"), (["--lora.kind=adalora"], "JOB_LORA__KIND")],
    )
    def test_an_adapter_to_go_on_with_is_plain(self, given: list[str], name: str) -> None:
        """A beginning made of the base, and AdaLoRA, are refused before anything is trained, in two stages as well."""
        assert f"{name} (command line)" in problems(["--lora.start=adapter", *given])
        assert f"{name} (command line)" in problems(["--train.method=sft,dpo", "--data.sft_source=a.jsonl", *given])

    @pytest.mark.parametrize(
        ("given", "name"),
        [
            (["--eval.prompts=3"], "JOB_EVAL__PROMPTS"),
            (["--eval.prompts_max_new_tokens=3"], "JOB_EVAL__PROMPTS_MAX_NEW_TOKENS"),
            (["--eval.prompts=p.txt", "--train.max_length=128"], "JOB_EVAL__PROMPTS_MAX_NEW_TOKENS"),
        ],
    )
    def test_prompts_that_cannot_be_asked(self, given: list[str], name: str) -> None:
        """Rows of no validation, a length of no answers, and answers as long as the longest example are refused."""
        assert any(where.startswith(name) for where in problems(given))

    @pytest.mark.parametrize(
        "given", ["--data.safety_revision=abc", "--data.unsafe_labels=bad", "--data.unsafe_threshold=0.7"]
    )
    def test_a_safety_model_is_needed(self, given: str) -> None:
        """Its revision, labels and threshold, and the kind that it finds, are refused without one."""
        (found,) = problems([given]).values()
        assert "JOB_DATA__SAFETY_MODEL" in found
        (found,) = problems(["--data.on_finding=unsafe=skip"]).values()
        assert "JOB_DATA__SAFETY_MODEL" in found
        both = load_settings(["--data.on_finding=unsafe=skip", "--data.safety_model=org/x", given], {})
        assert both.data.safety_model == "org/x"

    @pytest.mark.parametrize(
        ("given", "name"),
        [
            (["--eval.judge=org/j"], "JOB_EVAL__JUDGE "),
            (["--eval.principles=p", "--eval.prompts=p.txt"], "JOB_EVAL__PRINCIPLES "),
            (["--eval.principles=p", "--eval.judge=org/j"], "JOB_EVAL__PRINCIPLES "),
            (["--eval.principles=p", "--eval.prompts=p.txt", "--eval.judge=http://j"], "JOB_EVAL__JUDGE_MODEL "),
            (
                ["--eval.principles=p", "--eval.prompts=p.txt", "--eval.judge=org/j", "--eval.judge_model=m"],
                "JOB_EVAL__JUDGE_MODEL ",
            ),
        ],
    )
    def test_principles_that_cannot_be_judged(self, given: list[str], name: str) -> None:
        """Without a judge, without answers, without the server's name of the model, or with one of a local judge."""
        (where,) = problems(given)
        assert f"{where} ".startswith(name)

    def test_only_the_last_stage_is_asked(self) -> None:
        """What people look at is what the run publishes."""
        given = ["--train.method=sft,dpo", "--data.sft_source=a.jsonl", "--eval.prompts=p.txt"]
        first, last = split_stages(load_settings(given, {}))
        assert (first.eval.prompts, last.eval.prompts) == (None, "p.txt")

    @pytest.mark.parametrize("given", ["--lora.use_dora=true", "--lora.kind=adalora"])
    def test_muon_is_for_matrices(self, given: str) -> None:
        """What trains vectors is refused before anything is loaded."""
        assert "JOB_TRAIN__OPTIMIZER (command line)" in problems(["--train.optimizer=muon", given])

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            (["--run.device=cpu"], "JOB_RUN__DEVICE=cpu"),
            (["--model.dtype=fp16"], "JOB_MODEL__DTYPE"),
            (
                ["--lora.use_dora=true", "--model.add_tokens=<x>"],
                "do not support JOB_LORA__USE_DORA and JOB_MODEL__ADD_TOKENS",
            ),
            (["--lora.kind=adalora"], "JOB_LORA__KIND"),
            (["--lora.modules_to_save=lm_head"], "JOB_LORA__MODULES_TO_SAVE"),
            (["--model.add_tokens=<x>"], "JOB_MODEL__ADD_TOKENS"),
            (["--train.method=dpo"], "JOB_TRAIN__METHOD=dpo"),
        ],
    )
    def test_what_is_not_computed_in_fp8(self, given: list[str], named: str) -> None:
        """What needs a CPU, another dtype, PEFT's own layers or a reference is refused before anything is loaded."""
        assert named in problems(["--train.compute=fp8", *given])["JOB_TRAIN__COMPUTE (command line)"]
        assert load_settings(["--train.compute=fp8", "--lora.dropout=0.1"], {}).train.compute == "fp8"

    def test_rows_that_the_method_cannot_learn_from(self) -> None:
        """A format by name is checked before any file is read."""
        found = problems(["--train.method=dpo", "--data.format=alpaca"])["JOB_DATA__FORMAT (command line)"]
        assert "sft" in found
        assert load_settings(["--train.method=orpo", "--data.format=preference"], {})

    def test_two_stages_need_two_sources(self) -> None:
        """The first stage is a run of its own: its id, data and schedule, no gate, nothing of preferences."""
        assert "must be set" in problems(["--train.method=sft,dpo"])["JOB_DATA__SFT_SOURCE (default)"]
        given = ["--train.method=sft,dpo", "--data.sft_source=a.jsonl", "--train.sft_epochs=3", "--train.beta=0.3"]
        whole = load_settings(
            [*given, "--run.id=x", "--run.output=out", "--gate.min_delta=0.1", "--export.formats=merged"], {}
        )
        first, second = split_stages(whole)
        assert second is whole
        assert (first.run.id, first.train.method, first.train.epochs) == ("x-sft", "sft", 3)
        assert first.data.source == "a.jsonl"
        assert (first.gate.min_delta, first.train.beta, first.data.revision) == (None, 0.1, None)
        assert (first.export.formats, second.export.formats) == ((), ("merged",))
        assert (start_of(first, "artifacts/adapter"), start_of(second, "artifacts/adapter")) == (
            None,
            "out/x/sft/artifacts/adapter",
        )
        assert (folder_of(first), folder_of(second)) == ("out/x/sft", "out/x")
        assert split_stages(first) == (first,)

    def test_the_first_stage_has_data_settings_of_its_own(self) -> None:
        """Fields, limit, schema, split and more are those of its own data; what is empty it may have in common."""
        base = {"JOB_TRAIN__METHOD": "sft,dpo", "JOB_DATA__SFT_SOURCE": "a.jsonl=2x,b.jsonl"}
        shared = {"JOB_DATA__SPLIT": "train_prefs", "JOB_DATA__ON_LONG_ROW": "skip", "JOB_DATA__VALIDATION": "0.1"}
        ours = {"JOB_DATA__LIMIT": "5", "JOB_DATA__FIELDS": "chosen=good", "JOB_DATA__SOURCE": "pairs.jsonl"}
        first, second = split_stages(load_settings([], {**base, **shared, **ours, "JOB_TRAIN__LOSS_ON": "assistant"}))
        data = first.data
        assert (data.source, data.limit, data.fields, data.format) == ("a.jsonl=2x,b.jsonl", None, {}, "auto")
        assert (data.split, data.on_long_row, data.validation) == ("train_prefs", "skip", 0.1)
        assert (first.train.rows_loss_on, second.train.rows_loss_on) == ("assistant", "all")
        own = {"SOURCE": "a.jsonl", "SPLIT": "train_sft", "ON_LONG_ROW": "truncate", "VALIDATION": "held.jsonl"}
        own |= {"LIMIT": "7", "FIELDS": "prompt=question", "FORMAT": "prompt_completion", "VALIDATION_SPLIT": "test"}
        given = {f"JOB_DATA__SFT_{name}": value for name, value in own.items()}
        first, second = split_stages(load_settings([], {**base, **shared, **ours, **given}))
        assert {name: str(getattr(first.data, name.lower())) for name in own} == {
            **own,
            "FIELDS": str({"prompt": "question"}),
        }
        assert (second.data.limit, second.data.split, second.data.validation) == (5, "train_prefs", 0.1)
        assert first.data.sft_fields == {}

    def test_both_stages_have_the_webhook(self) -> None:
        """The address itself, not the asterisks that stand for it in what is printed."""
        given = ["--train.method=sft,dpo", "--data.sft_source=a.jsonl"]
        stages = split_stages(load_settings(given, {"JOB_NOTIFY__WEBHOOK": "https://hooks.example/x"}))
        assert len(stages) == 2
        for stage in stages:
            assert stage.notify.webhook is not None
            assert stage.notify.webhook.get_secret_value() == "https://hooks.example/x"

    def test_what_is_wrong_with_the_first_stage_is_told_by_its_own_settings(self) -> None:
        """A limit of several sources, a revision of none; and without two stages none of these has an effect."""
        given = ["--train.method=sft,dpo", "--data.sft_source=a.jsonl,b.jsonl", "--data.sft_limit=5"]
        given += ["--data.sft_validation=0.1", f"--data.sft_validation_revision={'0' * 40}"]
        found = problems(given)
        assert "JOB_DATA__SFT_SOURCE=name=1000rows" in found["JOB_DATA__SFT_LIMIT (command line)"]
        assert "JOB_DATA__SFT_VALIDATION is not one" in found["JOB_DATA__SFT_VALIDATION_REVISION (command line)"]
        alone = problems(["--train.method=dpo", "--data.sft_fields=prompt=q", "--train.loss_on=completion"])
        assert "only with two" in alone["JOB_DATA__SFT_FIELDS (command line)"]
        assert "only with sft" in alone["JOB_TRAIN__LOSS_ON (command line)"]

    def test_the_longest_id_has_a_first_stage(self) -> None:
        """The first stage's id is still a valid one."""
        given = ["--train.method=sft,dpo", "--data.sft_source=a.jsonl", f"--run.id={'x' * 128}"]
        first, whole = split_stages(load_settings(given, {}))
        assert (len(first.run.id), len(whole.run.id)) == (128, 128)
        assert folder_of(first) == f"{folder_of(whole)}/sft"

    def test_the_demo_of_preferences_needs_no_network(self) -> None:
        """It is the demo with pairs in place of instructions."""
        demo = load_settings(["--preset=demo-dpo"], {})
        assert demo.train.method == "dpo"
        assert Path(demo.data.source).is_file()


class TestReading:
    """What commands that read published runs take from settings that may be meant for a run."""

    def test_only_what_reading_needs_counts(self, tmp_path: Path) -> None:
        """Storage and log are taken; what a run would refuse is left alone, and its default is there."""
        (tmp_path / "file").write_text("")
        shared = {
            "JOB_STORAGE__REGION": "eu-west-1",
            "JOB_RUN__OUTPUT": str(tmp_path / "file"),
            "JOB_GATE__METRIC": "acc",
        }
        found = load_reading(["--log.level=error"], shared)
        assert (found.storage.region, found.log.level, found.run.output) == ("eu-west-1", "error", "runs")

    def test_mistakes_are_told_all_the_same(self) -> None:
        """Unknown names anywhere, wrong values of settings that matter, and settings without effect; all at once."""
        with pytest.raises(SettingsError) as caught:
            load_reading(["--train.epochs=2", "--log.level=loud"], {"JOB_STROAGE__REGION": "x"})
        assert {problem.where for problem in caught.value.problems} == {
            "environment JOB_STROAGE__REGION",
            "JOB_TRAIN__EPOCHS (command line)",
            "JOB_LOG__LEVEL (command line)",
        }


class TestSecrets:
    """Nothing that was given is repeated in an error."""

    @pytest.mark.parametrize("name", NAMES)
    def test_a_secret_in_the_wrong_place_goes_nowhere(self, name: str) -> None:
        """A token pasted into any setting, with a line break that makes it wrong, is in no message."""
        for environ in ({variable(name): f"https://user:{SECRET}@host\n/x"}, {f"{variable(name)}X": SECRET}):
            with pytest.raises(SettingsError) as caught:
                load_settings([], environ)
            assert SECRET not in str(caught.value)

    def test_a_secret_in_an_unknown_option_goes_nowhere(self, tmp_path: Path, sagemaker: Callable) -> None:
        """Also from the command line, from hyperparameters and from a file."""
        config = tmp_path / "job.yaml"
        config.write_text(f"hf_token: {SECRET}\ntrain: {SECRET}\neval: {{data: {{{SECRET}: 1}}}}\n")
        environ = sagemaker({"hf_token": SECRET, "train.epochs": SECRET}) | {"JOB_CONFIG": str(config)}
        found = problems(["--hf-token", SECRET, f"--aws={SECRET}", SECRET], environ)
        assert len(found) == 8
        assert SECRET not in str(found)

    def test_credentials_are_not_among_the_settings(self) -> None:
        """The ecosystem's own variables are not read, so the manifest cannot hold them."""
        settings = load_settings([], {"HF_TOKEN": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET})
        assert SECRET not in json.dumps(redacted(settings))
        assert SECRET not in repr(settings)


class TestDescription:
    """What `config` prints and the manifest keeps."""

    def test_describe_is_every_setting_in_order(self) -> None:
        """Name, value, source."""
        rows = describe(load_settings(["--eval.tasks=a,b"], {"JOB_LORA__RANK": "8"}))
        assert [name for name, _, _ in rows] == list(NAMES)
        assert ("lora.rank", 8, "environment JOB_LORA__RANK") in rows
        assert ("eval.tasks", ["a", "b"], "command line") in rows
        assert ("preset", "mistral-7b-alpaca", "default") in rows

    def test_redacted_is_json(self) -> None:
        """The manifest holds it as it is, and loading those values again gives the same settings."""
        settings = load_settings(["--preset=demo", "--run.id=a"], {})
        kept = json.loads(json.dumps(redacted(settings)))
        assert kept["train.epochs"] == {"value": settings.train.epochs, "source": "preset demo"}
        tree: dict[str, dict[str, object]] = {}
        for name, item in kept.items():
            group, _, key = name.partition(".")
            if key:
                tree.setdefault(group, {})[key] = item["value"]
        assert Settings.model_validate({"preset": "demo", **tree}).model_dump() == settings.model_dump()

    def test_the_schema_documents_every_setting(self) -> None:
        """Each name is there, with a description, and nothing else is allowed."""
        schema = json_schema()
        for name in NAMES:
            group, _, key = name.partition(".")
            if key:
                fields = schema["$defs"][schema["properties"][group]["$ref"].rpartition("/")[2]]
                assert fields["properties"][key]["description"]
                assert fields["additionalProperties"] is False
        assert schema["additionalProperties"] is False


BAD = st.sampled_from(BAD_PAIRS)
UNKNOWN = st.text(st.characters(exclude_characters="\0="), max_size=30).map(lambda text: f"JOB_{text}!")
ANY_TEXT = st.text(st.characters(exclude_characters="\0"), max_size=40)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def outcome(arguments: list[str], environ: Mapping[str, str]) -> Settings | SettingsError:
    """The settings, or the error that a configuration gives; any other exception escapes."""
    try:
        return load_settings(arguments, environ)
    except SettingsError as error:
        return error


class TestProperties:
    """Whatever is given, the answer is settings or a SettingsError."""

    @hypothesis_settings(max_examples=60, deadline=None)
    @given(
        bad=st.lists(BAD, min_size=1, max_size=6, unique_by=lambda pair: pair[0]),
        layer=st.sampled_from(["environment", "command line", "hyperparameters.json", "file"]),
        unknown=st.dictionaries(UNKNOWN, ANY_TEXT, max_size=3),
        world_size=st.sampled_from(["1", "2", "7", "x"]),
    )
    def test_a_bad_configuration_is_always_a_settings_error(
        self,
        bad: list[tuple[str, str]],
        layer: str,
        unknown: dict[str, str],
        world_size: str,
    ) -> None:
        """Every wrong value and every unknown name is reported, in whichever layer; no other exception escapes."""
        environ = {"WORLD_SIZE": world_size, **unknown}
        arguments: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            if layer == "environment":
                environ |= {variable(name): value for name, value in bad}
            elif layer == "command line":
                arguments = [f"--{name}={value}" for name, value in bad]
            else:
                path = Path(folder, "input/config/hyperparameters.json")
                path.parent.mkdir(parents=True)
                path.write_text(json.dumps(dict(bad)))
                environ |= {"TRAINING_JOB_NAME": "a", "SAGEMAKER_BASE_DIR": folder}
                if layer == "file":
                    config = path.rename(Path(folder, "job.yaml"))
                    environ |= {"JOB_CONFIG": str(config)}
            with pytest.raises(SettingsError) as caught:
                load_settings(arguments, environ)
        assert caught.value.total >= len(bad) + len(unknown)
        assert 0 < len(caught.value.problems) <= MAX_SHOWN

    @hypothesis_settings(max_examples=50, deadline=None)
    @given(
        arguments=st.lists(st.sampled_from(NAMES).map(lambda name: f"--{name}") | ANY_TEXT, max_size=6),
        environ=st.dictionaries(st.sampled_from(NAMES).map(variable), ANY_TEXT, max_size=6),
    )
    def test_any_text_gives_settings_or_a_settings_error(self, arguments: list[str], environ: dict[str, str]) -> None:
        """Arbitrary text anywhere is answered, never with a traceback."""
        answer = outcome(arguments, environ)
        assert isinstance(answer, Settings) or answer.problems

    @hypothesis_settings(max_examples=50, deadline=None)
    @given(tree=st.dictionaries(st.sampled_from([*NAMES, "train", "eval", "x"]), TREES, max_size=4))
    def test_any_hyperparameters_give_settings_or_a_settings_error(self, tree: dict[str, object]) -> None:
        """Arbitrary JSON in place of strings is answered, never with a traceback."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "input/config/hyperparameters.json")
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(tree))
            answer = outcome([], {"TRAINING_JOB_NAME": "a", "SAGEMAKER_BASE_DIR": folder})
        if isinstance(answer, Settings):
            assert {answer.sources[name] for name in tree if name in NAMES} <= {"hyperparameters.json", "platform"}
        else:
            assert answer.problems


def test_the_environment_is_the_processs_own_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mapping, os.environ is read."""
    for name in [name for name in os.environ if name.startswith("JOB_") or name == "WORLD_SIZE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JOB_TRAIN__EPOCHS", "9")
    assert load_settings().train.epochs == 9


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_can_be_looked_up(preset: str) -> None:
    """Every setting as the preset has it, as the manifest writes it, whatever the environment says."""
    found = preset_values(preset)
    expected = {name: value for name, value, _ in describe(load_settings(["--preset", preset], {}))}
    assert found.keys() == set(NAMES)
    assert {n for n in NAMES if found[n] != expected[n]} <= {"run.id"}


def test_an_unknown_preset_has_no_values() -> None:
    """A manifest of another version may name one."""
    assert preset_values("of-the-future") == {}


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, {}),
        ({"WANDB_API_KEY": ""}, {}),
        ({"WANDB_API_KEY": "x"}, {"wandb": "qlora-job"}),
        ({"WANDB_MODE": "offline"}, {"wandb": "qlora-job"}),
        ({"WANDB_PROJECT": "mine"}, {"wandb": None}),
        ({"WANDB_PROJECT": "mine", "WANDB_MODE": "disabled"}, {}),
        ({"WANDB_DIR": "/tmp", "MLFLOW_EXPERIMENT_NAME": "mine"}, {}),
        ({"MLFLOW_TRACKING_URI": "sqlite:///x"}, {"mlflow": "qlora-job"}),
        ({"MLFLOW_TRACKING_URI": "http://x", "MLFLOW_EXPERIMENT_ID": "1"}, {"mlflow": None}),
        ({"WANDB_MODE": "online", "MLFLOW_TRACKING_URI": "x"}, {"wandb": "qlora-job", "mlflow": "qlora-job"}),
    ],
)
def test_trackers_are_asked_for_by_their_own_variables(environ: dict[str, str], found: dict[str, str | None]) -> None:
    """Each tracker whose variables are set, under our project unless the user names one; none where it is off."""
    assert trackers(load_settings([], environ), environ) == found
    assert trackers(load_settings(["--log.trackers=off"], environ), environ) == {}


def test_secrets_are_keys_and_logins() -> None:
    """What names of variables say, and the user and password in an address; not what only looks like one."""
    environ = {
        "WANDB_API_KEY": "0123456789",
        "MLFLOW_TRACKING_PASSWORD": "swordfish",
        "MLFLOW_TRACKING_URI": "https://me:hunter2@tracker.example/x",
        "HTTPS_PROXY": "http://proxy.example:8080",
        "HF_TOKEN_PATH": "/root/token",
    }
    assert set(secrets(environ)) == {"0123456789", "swordfish", "me:hunter2@"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--run.output=gs://bucket/runs"], "ENDPOINT_URL.*only for s3://.*set GOOGLE_BASE_URL for gs:// instead"),
        (
            ["--run.output=az://bucket/runs"],
            "JOB_STORAGE__ENDPOINT_URL.*only for s3://.*AZURE_STORAGE_ENDPOINT for az://",
        ),
        (["--run.output=gs://bucket/runs", "--data.source=s3://bucket/rows.jsonl"], None),
        (["--run.output=s3://bucket/runs"], None),
        ([], None),
    ],
)
def test_options_of_s3_in_other_clouds(words: list[str], expected: str | None) -> None:
    """An address of S3's in a run whose places are all in other clouds is an error: it would do nothing, silently."""
    environ = {"JOB_STORAGE__ENDPOINT_URL": "http://127.0.0.1:9000"}
    if expected is None:
        assert load_settings(words, environ).storage.endpoint_url == "http://127.0.0.1:9000"
    else:
        with pytest.raises(SettingsError, match=expected):
            load_settings(words, environ)


@pytest.mark.parametrize(
    "name",
    [
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AZURE_CLIENT_SECRET",
        "AZURE_STORAGE_ACCESS_KEY",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_MASTER_KEY",
        "AZURE_STORAGE_SAS_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "GOOGLE_BEARER_TOKEN",
        "GOOGLE_SERVICE_ACCOUNT_KEY",
        "JOB_EVAL__JUDGE_KEY",
    ],
)
def test_secrets_of_the_clouds(name: str) -> None:
    """Every variable that holds a cloud's key or the judge's counts as a secret; the path of a file does not."""
    assert secrets({name: "0123456789", f"{name}_FILE": "/run/secrets/key"}) == ("0123456789",)


def test_files_may_be_of_tasks_of_a_group() -> None:
    """Named after lm-eval's group; whether it has such a task, the check of the tasks knows."""
    found = load_settings(["--eval.tasks=mmlu", "--eval.data=mmlu_anatomy=a.jsonl,mmlu_virology=v.jsonl"], {})
    assert set(found.eval.data) == {"mmlu_anatomy", "mmlu_virology"}


def test_a_secret_that_begins_with_another_is_hidden_whole() -> None:
    """Whichever comes first in the environment."""
    names = {"HF_TOKEN": "01234567", "WANDB_API_KEY": "01234567-the-rest"}
    for environ in (names, dict(reversed(names.items()))):
        assert scrub("01234567-the-rest, 01234567", secrets(environ)) == "***, ***"


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"HF_TOKEN": "abcdefgh", "WANDB_API_KEY": "efghijkl"}, "abcdefghijkl"),
        ({"HF_TOKEN": "a.*b+c(d)[e"}, "a.*b+c(d)[e"),
        ({"HF_TOKEN": " abc/defgh= \n"}, "abc/defgh="),
        ({"HF_TOKEN": "abc/defgh="}, "abc%2Fdefgh%3D"),
        ({"AZURE_STORAGE_SAS_TOKEN": "abc%2Fdefgh%3D"}, "abc/defgh="),
        ({"GOOGLE_SERVICE_ACCOUNT_KEY": "{\n  first-line\n}"}, "first-line"),
        ({"HTTPS_PROXY": "http://me:p%40ssw0rd@proxy:1"}, "p@ssw0rd"),
        ({"HTTPS_PROXY": "http://me:pass@word@proxy:1"}, "pass@word"),
    ],
)
def test_a_secret_is_hidden_in_every_form(environ: dict[str, str], text: str) -> None:
    """Overlapping another, with characters of patterns, without white space, as in a URL, or a line of it alone."""
    assert scrub(f"<{text}>", secrets(environ)) == "<***>"


def test_secrets_in_files_are_kept_out_of_the_log(tmp_path: Path) -> None:
    """As Kubernetes mounts them, by links into a folder; other files are not looked for in the log."""
    (tmp_path / "..data").mkdir()
    files = {"JOB_EVAL__JUDGE_KEY": "judge-0123\n", "HF_TOKEN": "hf-0123456", "JOB_MODEL__ID": "org/a-model"}
    for name, text in files.items():
        (tmp_path / "..data" / name).write_text(text)
        (tmp_path / name).symlink_to(tmp_path / "..data" / name)
    found = secrets({"JOB_SECRETS_DIR": str(tmp_path), "HF_TOKEN": "0123456789"})
    assert sorted(found) == ["0123456789", "hf-0123456", "judge-0123"]
    assert secrets({"JOB_SECRETS_DIR": str(tmp_path / "missing")}) == ()


def test_every_secret_setting_is_kept_out_of_the_log() -> None:
    """The log knows the variable of each setting whose value is a secret."""
    named = [
        f"JOB_{section}__{name}".upper()
        for section, part in Settings.model_fields.items()
        if isinstance(part.annotation, type) and issubclass(part.annotation, BaseModel)
        for name, field in part.annotation.model_fields.items()
        if "SecretStr" in f"{field.annotation} {field.metadata}"
    ]
    assert {"JOB_EVAL__JUDGE_KEY", "JOB_SIGN__PASSWORD"} <= set(named)
    assert set(secrets({name: f"value-of-{name}" for name in named})) == {f"value-of-{name}" for name in named}


def test_few_packages_are_imported() -> None:
    """Settings and their errors answer at once: what checks them is imported, and not even YAML without a file."""
    code = (
        "import sys; before = {*sys.modules}; from job.settings.load import load_settings; load_settings([], {});"
        "print(*{name.partition('.')[0] for name in {*sys.modules} - before} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.split() if name != "job" and not name.startswith("_sysconfigdata")}
    assert loaded == {
        *("annotated_types", "dotenv", "pydantic", "pydantic_core", "pydantic_settings"),
        *("typing_extensions", "typing_inspection"),
    }


class TestValidation:
    """What to validate on, and what goes by it."""

    @pytest.mark.parametrize(
        ("text", "value"),
        [("0.05", 0.05), ("5e-2", 0.05), ("200", 200), (" 200 ", 200), ("rows.jsonl", "rows.jsonl"), ("", None)],
    )
    def test_share_number_or_source(self, text: str, value: object) -> None:
        """The text says which of the three it is."""
        found = load_settings([], {"JOB_DATA__VALIDATION": text}).data.validation
        assert found == value
        assert type(found) is type(value)

    def test_what_needs_a_validation(self) -> None:
        """Patience, interval and the best adapter without one are errors, all named at once."""
        environ = {"JOB_TRAIN__STOP_AFTER": "2", "JOB_TRAIN__VALIDATE_EVERY_STEPS": "5", "JOB_TRAIN__KEEP": "best"}
        found = problems([], environ)
        assert set(found) == {f"{name} (environment)" for name in environ}
        assert all("JOB_DATA__VALIDATION" in what for what in found.values())

    def test_a_revision_of_nothing(self) -> None:
        """A revision without a hub id is refused."""
        found = problems([], {"JOB_DATA__VALIDATION_REVISION": "c0ffee", "JOB_DATA__VALIDATION": "0.1"})
        assert list(found) == ["JOB_DATA__VALIDATION_REVISION (environment)"]


@pytest.mark.parametrize(
    ("with_it", "said"),
    [
        ({"JOB_MODEL__QUANTIZATION": "none"}, "JOB_MODEL__QUANTIZATION is none"),
        ({"JOB_MODEL__KEEP_DEQUANTIZED": "true"}, "JOB_MODEL__KEEP_DEQUANTIZED keeps the base on the GPU"),
        ({"JOB_RUN__PROCESSES": "1"}, "the run has one process"),
        ({"JOB_RUN__ID": "a", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "the run has one process"),
    ],
)
def test_a_placement_that_cannot_be(with_it: dict[str, str], said: str) -> None:
    """What JOB_MODEL__PLACEMENT cannot be combined with is refused before anything is read."""
    with pytest.raises(SettingsError, match=said):
        load_settings(environ={"JOB_MODEL__PLACEMENT": "sharded", **with_it})


def test_a_base_is_sharded_over_several_processes() -> None:
    """Asked again once the GPUs are counted; another placement needs no second process."""
    sharded, host = (load_settings([f"--model.placement={placement}"], {}) for placement in ("sharded", "host"))
    problem = sharded_alone(sharded, 1)
    assert problem is not None
    assert problem.where == "JOB_MODEL__PLACEMENT"
    assert [sharded_alone(sharded, 2), sharded_alone(host, 1)] == [None, None]


def test_a_placement_beside_wrong_variables_of_torchrun() -> None:
    """The number of processes is unknown, which is the only problem."""
    assert list(problems(["--model.placement=host"], TORCHRUN | {"WORLD_SIZE": "x"})) == ["WORLD_SIZE (environment)"]


def test_processes_of_torchrun_are_counted() -> None:
    """Whatever JOB_RUN__PROCESSES says, which is for the job's own launcher."""
    given = ["--model.placement=sharded", "--run.processes=1", "--run.id=a"]
    assert load_settings(given, TORCHRUN).model.placement == "sharded"


@pytest.mark.parametrize(
    "given",
    [
        ["--export.hub_private=true"],
        ["--export.oci_plain_http=false"],
        ["--data.validation=0.1", "--data.validation_split=test"],
        ["--train.method=sft,dpo", "--data.sft_source=a", "--data.sft_validation=a", "--data.validation_split=test"],
    ],
)
def test_defaults_and_what_belongs_to_a_run_are_not_refused(given: list[str]) -> None:
    """A template may write out all defaults; a split is a record of runs, whose settings nobody can remove any more."""
    assert not [place for place in problems([*given, "--run.seed=-1"]) if not place.startswith("JOB_RUN__SEED")]


@pytest.mark.parametrize(
    ("alone", "with_it"),
    [
        (["--export.hub_private=false"], ["--export.hub=org/name"]),
        (["--export.oci_plain_http=true"], ["--export.oci=localhost:5000/a:b"]),
        (["--sign.password=some-words"], ["--sign.key=key.pem"]),
        (["--cost.on_demand_usd_per_hour=3"], ["--cost.usd_per_hour=1"]),
        (["--storage.kms_key_id=a-key"], ["--run.output=s3://bucket/runs"]),
        (["--storage.kms_key_id=a-key", "--run.output=gs://bucket/runs"], ["--run.output=s3://bucket/runs"]),
        (["--storage.kms_key_id=a-key", "--data.source=s3://bucket/a"], ["--run.output=s3://bucket/runs"]),
        (["--storage.storage_class=GLACIER_IR"], ["--run.output=s3://bucket/runs"]),
        (["--storage.storage_class=COLDLINE", "--eval.data=a=gs://bucket/a"], ["--run.output=gs://bucket/runs"]),
    ],
)
def test_a_setting_of_what_is_not_there_is_refused(alone: list[str], with_it: list[str]) -> None:
    """Results that are not signed or encrypted in spite of a setting, for example, would be noticed by nobody."""
    name = environment_name(alone[0].removeprefix("--").partition("=")[0])
    found = problems(alone)
    assert [place for place in found if place.startswith(f"{name} (")], found
    found = problems([*alone, *with_it, "--run.seed=-1"])
    assert not [place for place in found if place.startswith(f"{name} (")], found
