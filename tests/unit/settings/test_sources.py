"""The sources of settings: when a preset's values apply, which repository a revision belongs to, the secrets folder."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from job.errors import SettingsError
from job.records import RecordedSettings
from job.settings.load import Settings, load_reading, load_settings, preset_values
from job.settings.schema import NAMES
from job.settings.sources import _ELSEWHERE

DEFAULTS = Settings()


def problems(arguments: list[str], environ: dict[str, str]) -> dict[str, str]:
    """Where -> what of everything wrong with a configuration that must be wrong."""
    with pytest.raises(SettingsError) as caught:
        load_settings(arguments, environ)
    return {problem.where: problem.what for problem in caught.value.problems}


def config(folder: Path, text: str) -> dict[str, str]:
    """The environment that names a file of settings."""
    (folder / "job.yaml").write_text(text, encoding="utf-8")
    return {"JOB_CONFIG": str(folder / "job.yaml")}


class TestPresets:
    """A preset speaks of its own model and data only."""

    def test_what_a_preset_says_of_its_data_goes_with_the_data(self) -> None:
        """Another data set is read whole and a bad row in it is an error; `config` shows these as defaults."""
        settings = load_settings([], {"JOB_DATA__SOURCE": "mine.jsonl"})
        assert (settings.data.limit, settings.data.on_bad_row, settings.data.revision) == (None, "error", None)
        for name in ("data.limit", "data.on_bad_row", "data.revision"):
            assert settings.sources[name] == "default"
        assert settings.sources["model.revision"] == "preset mistral-7b-alpaca"

    def test_what_a_preset_says_of_its_model_goes_with_the_model(self) -> None:
        """The demo's fp32 is for its tiny model; the recipe, such as the epochs, stays."""
        settings = load_settings(["--preset=demo", "--model.id=org/other"], {})
        assert (settings.model.dtype, settings.sources["model.dtype"]) == ("auto", "default")
        assert settings.sources["run.device"] == "default"
        assert (settings.train.epochs, settings.sources["train.epochs"]) == (4, "preset demo")
        assert settings.sources["data.limit"] == "preset demo"

    @pytest.mark.parametrize("where", ["environment", "file"])
    def test_what_the_user_says_stays(self, tmp_path: Path, where: str) -> None:
        """Settings of the data count in whichever source they stand, also if another one names the data."""
        environ = {"JOB_DATA__LIMIT": "7", "JOB_DATA__ON_BAD_ROW": "skip"}
        if where == "file":
            environ = config(tmp_path, "data: {limit: 7, on_bad_row: skip}")
        settings = load_settings(["--data.source=mine.jsonl"], environ)
        assert (settings.data.limit, settings.data.on_bad_row) == (7, "skip")

    def test_the_presets_own_data_by_name_changes_nothing(self) -> None:
        """Writing the preset's data set and model into a manifest keeps all that the preset says of them."""
        settings = load_settings([], {"JOB_DATA__SOURCE": "tatsu-lab/alpaca", "JOB_MODEL__ID": DEFAULTS.model.id})
        assert (settings.data.limit, settings.run.device) == (1500, "gpu")
        assert settings.data.revision
        assert settings.model.revision


class TestExportedRun:
    """The settings of the run in JOB_EXPORT__RUN hold where no others are given."""

    GIVEN = ("--export.run=runs/mine", "--export.formats=merged")

    def load(self, recorded: dict[str, Any], environ: dict[str, str]) -> Settings:
        """The settings of a run that exports one with these settings, and the defaults of its preset."""
        values = {**preset_values("demo"), **recorded, "export.formats": ["fp8"]}
        return load_settings(self.GIVEN, environ, of_run=lambda _: RecordedSettings("mine", "s3://bucket/runs", values))

    def test_they_are_stronger_than_a_preset_and_weaker_than_the_user(self) -> None:
        """Each names the run as its source; those that the preset gives too, name the preset."""
        settings = self.load({"lora.rank": 8, "train.epochs": 2}, {"JOB_LORA__RANK": "4"})
        assert (settings.lora.rank, settings.train.epochs, settings.run.id) == (4, 2, "mine-merged")
        assert settings.export.formats == ("merged",)
        assert settings.sources["train.epochs"] == settings.sources["run.id"] == "run runs/mine"
        assert settings.sources["train.learning_rate"] == settings.sources["model.dtype"] == "preset demo"

    def test_what_a_preset_says_of_another_model_is_the_runs(self) -> None:
        """The preset gives nothing about a model that is not its own, also not what the run had like the preset."""
        settings = self.load({"model.id": "org/other", "data.source": "rows.jsonl"}, {})
        assert (settings.model.id, settings.model.dtype) == ("org/other", "fp32")
        assert settings.sources["model.dtype"] == "run runs/mine"

    def test_a_preset_that_this_version_does_not_have(self) -> None:
        """All that differs from what this version's default preset gives is the run's."""
        settings = self.load({"preset": "gone", "model.id": "org/other", "data.source": "rows.jsonl"}, {})
        assert (settings.model.id, settings.train.epochs) == ("org/other", 4)

    def test_machine_gate_and_exports(self) -> None:
        """How the other machine was set does not matter here; what the gate requires does, but not of which format."""
        recorded = {"train.gpu_memory_gb": 20, "gate.on": "fp8", "gate.min_delta": 0.01, "run.output": "s3://b/r"}
        settings = self.load(recorded, {})
        assert (settings.gate.on, settings.gate.min_delta) == ("adapter", 0.01)
        assert (settings.train.gpu_memory_gb, settings.run.output) == (None, "s3://bucket/runs")

    def test_the_id_of_the_exported_run_is_no_id_of_this_one(self) -> None:
        """Such as in a shell that ran it, whose JOB_RUN__ID is still set."""
        with pytest.raises(SettingsError, match=r"JOB_RUN__ID \(environment\): is that of the run in JOB_EXPORT__RUN"):
            self.load({}, {"JOB_RUN__ID": "mine", "JOB_RUN__OUTPUT": "elsewhere"})

    def test_another_preset_is_refused_by_its_name(self) -> None:
        """Not by the settings that it would give, none of which the user wrote."""
        with pytest.raises(SettingsError, match=r"JOB_PRESET \(environment\): is demo-dpo, but demo in the run"):
            self.load({}, {"JOB_PRESET": "demo-dpo"})
        assert self.load({}, {"JOB_PRESET": "demo"}).preset == "demo"

    def test_a_setting_that_is_newer_than_the_run(self) -> None:
        """It had no effect on that run, whatever a preset says of it today."""
        recorded = {name: value for name, value in preset_values("demo").items() if name != "train.epochs"}
        given = RecordedSettings("mine", "s3://bucket/runs", recorded)
        assert preset_values("demo")["train.epochs"] != (default := Settings().train.epochs)
        assert load_settings(self.GIVEN, {}, of_run=lambda _: given).train.epochs == default

    def test_a_platform_names_the_run_itself(self) -> None:
        """The same name after each restart of the platform's job, by which its owner looks for the run."""
        assert self.load({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_JOB_NAME": "job-1"}).run.id == "job-1"

    @pytest.mark.parametrize("given", [(), ("--export.run=runs/mine", "--lora.rank=none")])
    def test_no_run_is_read_in_vain(self, given: tuple[str, ...]) -> None:
        """Without the setting, or with settings that are wrong without it."""
        with suppress(SettingsError):
            load_settings(given, {}, of_run=lambda _: pytest.fail("it was read"))


class TestRevisions:
    """A revision that the user wrote is used, or refused in words; it never vanishes."""

    def test_a_revision_in_a_file_is_kept(self, tmp_path: Path) -> None:
        """The repository may be named elsewhere, such as in the environment."""
        for group, key in (("model", "id"), ("data", "source")):
            environ = config(tmp_path, f"{group}: {{revision: mine}}") | {f"JOB_{group}__{key}".upper(): "org/other"}
            settings = load_settings([], environ)
            assert getattr(settings, group).revision == "mine"
            assert settings.sources[f"{group}.revision"].startswith("file ")

    def test_a_revision_of_another_repository_is_refused(self, tmp_path: Path) -> None:
        """The file pins its own model; who names another model must say which revision of that one."""
        environ = config(tmp_path, "model: {id: org/one, revision: abc}") | {"JOB_MODEL__ID": "org/two"}
        file = environ["JOB_CONFIG"]
        assert problems([], environ) == {
            f"JOB_MODEL__REVISION (file {file})": f"is for the JOB_MODEL__ID of file {file}, but environment "
            "JOB_MODEL__ID names another; set JOB_MODEL__REVISION there too, or set it to empty there for the newest"
            " revision"
        }
        assert load_settings([], environ | {"JOB_MODEL__REVISION": "def"}).model.revision == "def"
        assert load_settings([], environ | {"JOB_MODEL__REVISION": ""}).model.revision is None
        assert load_settings([], environ | {"JOB_MODEL__ID": "org/one"}).model.revision == "abc"

    def test_a_weaker_repository_does_not_matter(self, tmp_path: Path) -> None:
        """A revision that stands with the repository that wins is its own."""
        environ = config(tmp_path, "data: {source: org/one}")
        settings = load_settings(["--data.source=org/two", "--data.revision=abc"], environ)
        assert (settings.data.source, settings.data.revision) == ("org/two", "abc")


class TestSecretsFolder:
    """JOB_SECRETS_DIR: files named like variables."""

    def test_files_are_settings(self, tmp_path: Path) -> None:
        """In capitals or not; weaker than variables, stronger than a file; others' files are left alone."""
        (tmp_path / "JOB_TRAIN__EPOCHS").write_text("7\n")
        (tmp_path / "job_storage__kms_key_id").write_text("key")
        (tmp_path / "token").write_text("x")
        environ = {"JOB_SECRETS_DIR": str(tmp_path), "JOB_RUN__OUTPUT": "s3://bucket/runs"}
        settings = load_settings([], environ)
        assert (settings.train.epochs, settings.sources["train.epochs"]) == (7, "secret JOB_TRAIN__EPOCHS")
        assert settings.storage.kms_key_id == load_reading([], environ).storage.kms_key_id == "key"
        assert load_settings([], environ | {"JOB_TRAIN__EPOCHS": "8"}).train.epochs == 8

    def test_a_file_of_settings_may_be_named_there(self, tmp_path: Path) -> None:
        """JOB_CONFIG is read like a variable."""
        (tmp_path / "JOB_CONFIG").write_text(config(tmp_path, "train: {epochs: 9}")["JOB_CONFIG"])
        assert load_settings([], {"JOB_SECRETS_DIR": str(tmp_path)}).train.epochs == 9

    @pytest.mark.parametrize("place", ["missing", "file"])
    @pytest.mark.parametrize("load", [load_settings, load_reading])
    def test_a_folder_that_is_missing_is_an_error(self, tmp_path: Path, place: str, load: type) -> None:
        """A mount that failed must not become a run with other settings."""
        (tmp_path / "file").touch()
        with pytest.raises(SettingsError, match=r"^JOB_SECRETS_DIR \(environment\): is not a folder"):
            load([], {"JOB_SECRETS_DIR": str(tmp_path / place)})

    def test_its_exit_code(self, tmp_path: Path) -> None:
        """The command ends with 2 and says why, without a warning of Python's."""
        done = subprocess.run(
            [sys.executable, "-m", "job", "config"],
            env={"PYTHONPATH": str(Path(__file__).parents[3]), "JOB_SECRETS_DIR": str(tmp_path / "missing")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert "JOB_SECRETS_DIR" in done.stderr
        assert "Warning" not in done.stderr

    def test_wrong_files_are_named_and_not_quoted(self, tmp_path: Path) -> None:
        """A misspelt name and a wrong value are two problems; what the files hold is in neither."""
        (tmp_path / "JOB_TRAIN__EPOCS").write_text("hf_secret1")
        (tmp_path / "JOB_LORA__RANK").write_text("hf_secret2")
        found = problems([], {"JOB_SECRETS_DIR": str(tmp_path)})
        assert found["secret JOB_TRAIN__EPOCS"] == "is not a setting; the nearest is JOB_TRAIN__EPOCHS"
        assert "JOB_LORA__RANK (secret JOB_LORA__RANK)" in found
        assert len(found) == 2
        assert "hf_secret" not in str(found)

    def test_a_file_that_is_no_text(self, tmp_path: Path) -> None:
        """It is a problem, not a traceback."""
        (tmp_path / "JOB_LORA__RANK").write_bytes(b"\xff\xfe\x00")
        assert list(problems([], {"JOB_SECRETS_DIR": str(tmp_path)})) == ["JOB_SECRETS_DIR (environment)"]

    def test_a_misspelt_name_of_the_folder(self) -> None:
        """Is told like that of a setting."""
        assert problems([], {"JOB_SECRET_DIR": "/x"})["environment JOB_SECRET_DIR"].endswith("JOB_SECRETS_DIR")


def test_a_group_as_json_hides_nothing_else() -> None:
    """It is the one problem; a setting of that group beside it is read."""
    assert list(problems([], {"JOB_LORA": "{}", "JOB_LORA__RANK": "8"})) == ["environment JOB_LORA"]


def test_a_mapping_is_one_value(tmp_path: Path) -> None:
    """Task files of a stronger source replace those of a weaker one; they are not merged."""
    environ = config(tmp_path, "eval: {tasks: [a, b], data: {a: x.jsonl}}")
    assert dict(load_settings(["--eval.data=b=y.jsonl"], environ).eval.data) == {"b": "y.jsonl"}


class TestOtherNames:
    """Names that other trainers have."""

    def test_they_name_the_setting_that_does_it_here(self) -> None:
        """Where the most similar name would be another thing; all that are listed name settings."""
        given = {"JOB_TRAIN__PER_DEVICE_TRAIN_BATCH_SIZE": "4", "JOB_DATA__VAL_SET_SIZE": "0.1", "JOB_TRAIN__LR": "1"}
        found = problems([], given)
        assert "JOB_TRAIN__GLOBAL_BATCH_SIZE" in found["environment JOB_TRAIN__PER_DEVICE_TRAIN_BATCH_SIZE"]
        assert "JOB_DATA__VALIDATION" in found["environment JOB_DATA__VAL_SET_SIZE"]
        assert found["environment JOB_TRAIN__LR"].endswith("use JOB_TRAIN__LEARNING_RATE")
        assert {name for names in _ELSEWHERE.values() for name in names} <= set(NAMES)
        assert not _ELSEWHERE.keys() & {name.rpartition(".")[2] for name in NAMES}
