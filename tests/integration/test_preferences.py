"""Whole runs of preference training: killed anywhere, or on several processes, they equal uninterrupted ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from job.runs.layout import LOG_PROBS, METRICS, REPORT, VALIDATIONS, facts_of
from job.storage.open import open_store
from job.verification.verify import as_lines, require_verified, verify
from tests.forked import Forks
from tests.helpers import arc_rows, write_jsonl
from tests.integration.runs_of_processes import CLOSE, EXACT, go, metrics, results, run_folder
from tests.integration.whole_runs import labelled, pairs

STEPS = 6


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> dict[str, str]:
    """DPO in fp32: 6 steps in two epochs, a checkpoint every other one."""
    folder = tmp_path_factory.mktemp("preferences")
    write_jsonl(folder / "dpo.jsonl", pairs(14))
    write_jsonl(folder / "kto.jsonl", labelled(14))
    write_jsonl(folder / "questions.jsonl", arc_rows(10))
    return {
        "JOB_RUN__OUTPUT": str(folder / "out"),
        "JOB_RUN__SPOT_NOTICES": "off",
        "JOB_MODEL__ID": str(base_folder),
        "JOB_MODEL__QUANTIZATION": "none",
        "JOB_DATA__SOURCE": str(folder / "dpo.jsonl"),
        "JOB_EVAL__DATA": f"arc_easy={folder / 'questions.jsonl'}",
        "JOB_TRAIN__METHOD": "dpo",
        "JOB_TRAIN__GLOBAL_BATCH_SIZE": "6",
        "JOB_TRAIN__LEARNING_RATE": "2e-3",
        "JOB_TRAIN__MAX_LENGTH": "512",
        "JOB_TRAIN__OPTIMIZER": "adamw_torch",
        "JOB_TRAIN__MICRO_BATCH_TOKENS": "300",
        "JOB_CHECKPOINT__EVERY_STEPS": "2",
        "JOB_LOG__FORMAT": "json",
    }


@pytest.mark.long
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_two_processes_and_kills_change_no_bit(
    forked: Forks, environment: dict[str, str], method: str, tmp_path: Path
) -> None:
    """NF4, dropout, 8-bit Adam, 2 processes, validation: killed twice, a run ends with the artifacts of a whole one."""
    changes = {**EXACT, "JOB_TRAIN__METHOD": method, "JOB_RUN__OUTPUT": f"{environment['JOB_RUN__OUTPUT']}-{method}"}
    changes["JOB_DATA__SOURCE"] = str(Path(environment["JOB_DATA__SOURCE"]).with_name(f"{method}.jsonl"))
    changes |= {"JOB_DATA__VALIDATION": "3", "JOB_TRAIN__KEEP": "best"}
    assert go(forked, environment, "whole", 2, **changes) == [0, 0]
    faults = "kill@validation=2,kill@step=3"
    codes = [go(forked, environment, "killed", 2, **changes, JOB_FAULT=faults) for _ in range(3)]
    assert codes[-1] == [0, 0]
    assert codes[0][0] == codes[1][0] == -9
    assert facts_of(results(changes, "killed")) == facts_of(results(changes, "whole"))
    found = results(changes, "whole")
    assert {LOG_PROBS, VALIDATIONS} <= facts_of(found).keys()
    assert "rewards/margins" in found["training"]["validation"]["preference"]
    require_verified(verify(open_store(str(run_folder(changes, "whole"))), tmp_path))


@pytest.mark.long
def test_the_number_of_processes_changes_no_step(forked: Forks, environment: dict[str, str]) -> None:
    """Two processes learn the same steps as one: losses and rewards differ by rounding alone."""
    assert go(forked, environment, "one", 1) == [0]
    changes = {"JOB_RUN__OUTPUT": f"{environment['JOB_RUN__OUTPUT']}-2"}  # so that nothing is reused
    assert go(forked, environment, "two", 2, **changes) == [0, 0]
    shutil.copytree(run_folder(changes, "two"), run_folder(environment, "two"))
    pairs_of_steps = list(zip(metrics(environment, "two"), metrics(environment, "one"), strict=True))
    assert len(pairs_of_steps) == STEPS
    for found, expected in pairs_of_steps:
        assert found["loss"] == pytest.approx(expected["loss"], rel=CLOSE)
        assert found["preference"] == {
            name: pytest.approx(value, rel=1e-4, abs=1e-4) for name, value in expected["preference"].items()
        }


def test_the_reference_is_computed_once(forked: Forks, environment: dict[str, str]) -> None:
    """A restart reads what the first attempt published; a run with the same base and data takes its scores over."""
    name = "once"
    assert go(forked, environment, name, 1, JOB_FAULT="kill@step=1") == [-9]
    kept = (run_folder(environment, name) / LOG_PROBS).read_bytes()
    code, group = forked.run({**environment, "JOB_RUN__ID": name}, 1, "again")
    assert code == [0]
    events = [line["event"] for line in group.lines(0)]
    assert "the reference's log-probabilities of an earlier attempt are used again" in events
    assert "reference rows" not in events
    assert (run_folder(environment, name) / LOG_PROBS).read_bytes() == kept


@pytest.mark.long
def test_a_damaged_reference_is_computed_again(forked: Forks, environment: dict[str, str]) -> None:
    """What is not whole is not believed, and the run ends with the same numbers."""
    name = "damaged"
    assert go(forked, environment, name, 1, JOB_FAULT="kill@step=3") == [-9]
    path = run_folder(environment, name) / LOG_PROBS
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"1", b"2", 1))
    assert go(forked, environment, name, 1) == [0]
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("method", "code"), [("sft", 65), ("kto", 65), pytest.param("orpo", 0, marks=pytest.mark.long)]
)
def test_data_and_method_have_to_fit(forked: Forks, environment: dict[str, str], method: str, code: int) -> None:
    """Pairs are for dpo and orpo; another method is told which fields are there and which method fits."""
    name = f"fits-{method}"
    codes, group = forked.run({**environment, "JOB_RUN__ID": name, "JOB_TRAIN__METHOD": method}, 1, name)
    assert codes == [code]
    if code:
        problem = str(group.lines(0)[-1])
        assert "JOB_TRAIN__METHOD=dpo or orpo" in problem
        assert "dpo.jsonl:1" in problem


@pytest.mark.long
@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_training_goes_on_from_an_adapter(forked: Forks, environment: dict[str, str], method: str) -> None:
    """It starts with the adapter's numbers, compares with them, and resumes to the bit; the manifest has its hash."""
    if not (run_folder(environment, "one") / "results.json").is_file():
        assert go(forked, environment, "one", 1) == [0]
    changes = {
        "JOB_LORA__START": str(run_folder(environment, "one") / "artifacts/adapter"),
        "JOB_TRAIN__METHOD": method,
    }
    if method == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(14)]
        path = Path(environment["JOB_DATA__SOURCE"]).with_name("sft.jsonl")
        changes["JOB_DATA__SOURCE"] = str(write_jsonl(path, rows))
    whole, killed = f"{method}-on", f"{method}-on-killed"
    assert go(forked, environment, whole, 1, **changes) == [0]
    assert go(forked, environment, killed, 1, **changes, JOB_FAULT="kill@step=5") == [-9]
    assert go(forked, environment, killed, 1, **changes) == [0]
    assert facts_of(results(environment, killed)) == facts_of(results(environment, whole))
    training = results(environment, whole)["training"]
    assert len(training["start_sha256"]) == 64
    assert training["reference"] == ("start" if method == "dpo" else None)
    first, fresh = metrics(environment, whole)[0], metrics(environment, "one")[0]
    if method == "dpo":
        assert first["loss"] == pytest.approx(0.6931472, rel=1e-5)
        assert first["preference"]["logps/chosen"] != pytest.approx(fresh["preference"]["logps/chosen"], rel=1e-4)


@pytest.mark.long
def test_a_start_that_changed_is_refused(forked: Forks, environment: dict[str, str], tmp_path: Path) -> None:
    """Other numbers under the same path are another run."""
    if not (run_folder(environment, "one") / "results.json").is_file():
        assert go(forked, environment, "one", 1) == [0]
    start = Path(shutil.copytree(run_folder(environment, "one") / "artifacts/adapter", tmp_path / "start"))
    changes = {"JOB_LORA__START": str(start)}
    assert go(forked, environment, "moved", 1, **changes, JOB_FAULT="kill@step=3") == [-9]
    tensors = load_file(start / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, start / "adapter_model.safetensors")
    code, group = forked.run({**environment, **changes, "JOB_RUN__ID": "moved"}, 1, "moved-again")
    assert code == [65]
    assert "JOB_LORA__START: its content has changed" in str(group.lines(0)[-1])


def two_stages(environment: dict[str, str], output: str) -> dict[str, str]:
    """SFT on the good answers, then DPO on the pairs."""
    rows = [{"question": row["prompt"], "completion": row["chosen"]} for row in pairs(16)]
    path = Path(environment["JOB_DATA__SOURCE"]).with_name("first.jsonl")
    return {
        "JOB_DATA__SFT_FIELDS": "prompt=question",
        "JOB_DATA__SFT_LIMIT": "12",
        "JOB_DATA__SFT_ON_LONG_ROW": "truncate",
        "JOB_TRAIN__LOSS_ON": "completion",
        "JOB_RUN__OUTPUT": f"{environment['JOB_RUN__OUTPUT']}-{output}",
        "JOB_TRAIN__METHOD": "sft,dpo",
        "JOB_TRAIN__SFT_EPOCHS": "2",
        "JOB_TRAIN__SFT_LEARNING_RATE": "5e-3",
        "JOB_DATA__SFT_SOURCE": str(write_jsonl(path, rows)),
    }


@pytest.mark.long
def test_two_methods_in_one_run(forked: Forks, environment: dict[str, str], tmp_path: Path) -> None:
    """Both stages resume to the bit, killed in each; the second goes on from the first and compares with it."""
    changes = two_stages(environment, "two")
    assert go(forked, environment, "both", 2, **changes) == [0, 0]
    codes = []
    while not codes or codes[-1] != [0, 0]:
        codes.append(go(forked, environment, "killed", 2, **changes, JOB_FAULT="kill@step=3,kill@stage=train"))
        assert len(codes) < 8
    assert [code[0] for code in codes] == [-9] * 4 + [0]
    for stage in ("both", "both/sft"):
        assert facts_of(results(changes, stage.replace("both", "killed"))) == facts_of(results(changes, stage))
    first, second = results(changes, "both/sft"), results(changes, "both")
    assert (first["training"]["method"], first["training"]["steps"]) == ("sft", 4)
    assert (second["training"]["method"], second["training"]["reference"]) == ("dpo", "start")
    assert metrics(changes, "both")[0]["loss"] == pytest.approx(0.6931472, rel=1e-5)
    assert {path.name for path in Path(changes["JOB_RUN__OUTPUT"]).iterdir() if path.name[0] != "."} >= {"both"}
    assert second["training"]["first_stage"]["steps"] == 4
    assert first["run"]["part_of"] == second["run"]["id"]
    store = open_store(str(run_folder(changes, "both")))
    found = verify(store, tmp_path)
    require_verified(found)
    assert "sft: training" in {check.what for check in found}
    assert b"Loss of the first stage" in (run_folder(changes, "both") / REPORT).read_bytes()
    # Damage in the first stage is found by way of the second.
    (run_folder(changes, "both") / "sft" / METRICS).write_bytes(b"")
    assert any("sft/artifacts/metrics.jsonl" in line for line in as_lines(verify(store, tmp_path)))


def test_rows_of_the_second_stage_are_checked_before_the_first(
    forked: Forks, environment: dict[str, str], tmp_path: Path
) -> None:
    """What is wrong with the pairs is not found out after hours of training."""
    changes = two_stages(environment, "wrong")
    bad = write_jsonl(tmp_path / "bad.jsonl", [*pairs(3), {"prompt": "a", "chosen": "b", "rejected": "b"}])
    code, group = forked.run({**environment, **changes, "JOB_RUN__ID": "x", "JOB_DATA__SOURCE": str(bad)}, 1, "wrong")
    assert code == [65]
    assert "bad.jsonl:4" in str(group.lines(0)[-1])
    assert not any(line["event"] == "steps" for line in group.lines(0))
