"""A finished run exported by another run: the same bytes as if it had been trained with these exports."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from job.common.hashing import sealed
from job.runs.layout import ADAPTER, facts_of
from tests import warm
from tests.chaos.small import CONFIGURATIONS, settings
from tests.forked import Forks
from tests.helpers import make_base, write_jsonl
from tests.published_run import verified_manifest as manifest

FORMATS = "adapter:bf16,merged,fp8"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run of four steps on a base in bf16, without exports."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "base").mkdir()
    make_base(folder / "base")
    AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).save_pretrained(folder / "base")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    return {**clean, **settings(folder, rows=8, questions=12), "JOB_TRAIN__LEARNING_RATE": "2e-2"}


@pytest.fixture(scope="module")
def machine(environment: dict[str, str]) -> dict[str, str]:
    """What is set on a machine that exports: nothing about the model, the data or the training."""
    groups = ("JOB_RUN__", "JOB_LOG__")
    return {n: value for n, value in environment.items() if not n.startswith("JOB_") or n.startswith(groups)}


@pytest.fixture(scope="module")
def trained(environment: dict[str, str]) -> Path:
    """A finished run without exports, which was killed once."""
    changes = {"JOB_RUN__ID": "trained", "JOB_FAULT": "kill@step=3"}
    assert warm.run([], {**environment, **changes}).returncode == -signal.SIGKILL
    done = warm.run([], {**environment, **changes})
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(environment["JOB_RUN__OUTPUT"]) / "trained"


@pytest.fixture(scope="module")
def at_once(environment: dict[str, str]) -> Path:
    """A run that trained and exported."""
    done = warm.run([], {**environment, "JOB_RUN__ID": "at-once", "JOB_EXPORT__FORMATS": FORMATS})
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(environment["JOB_RUN__OUTPUT"]) / "at-once"


def export(machine: dict[str, str], run: Path, output: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Exports a finished run into `output`, as the run `exported`."""
    given = {"JOB_RUN__OUTPUT": str(output), "JOB_RUN__ID": "exported", **changes}
    return warm.run(["export", str(run), FORMATS], {**machine, **given})


def test_it_is_what_training_with_these_exports_gives(
    machine: dict[str, str], trained: Path, at_once: Path, tmp_path: Path
) -> None:
    """Adapter, evaluations and exports are the same bytes; nothing was trained, and the attempts go on."""
    done = export(machine, trained, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "attempts 1 to 2 are those of run trained, which this run exports" in done.stdout
    results, before = manifest(tmp_path / "exported"), json.loads((trained / "results.json").read_bytes())
    assert facts_of(results) == facts_of(manifest(at_once))
    assert results["run"]["exported_run"]["id"] == "trained"
    attempts = results["run"]["attempts"]
    assert attempts[0] == before["run"]["attempts"][0]
    assert [attempt["number"] for attempt in attempts] == [1, 2, 3]
    assert attempts[2]["steps"] == 0
    assert "train" not in attempts[2]["stage_seconds"]
    assert results["cost"]["repeated_steps"] == before["cost"]["repeated_steps"]
    assert not (tmp_path / "exported/checkpoints").exists()


@pytest.mark.parametrize(
    "fault",
    [
        "kill@upload=5",
        "kill@stage=export",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("kill@upload=1", "kill@upload=14", "s3_503@30")),
    ],
)
def test_killed_and_resumed(machine: dict[str, str], trained: Path, at_once: Path, tmp_path: Path, fault: str) -> None:
    """While it copies, before it exports, and while it publishes what was exported: the same bytes after all."""
    first = export(machine, trained, tmp_path, JOB_FAULT=fault)
    assert first.returncode in {-signal.SIGKILL, 69}
    assert not (tmp_path / "exported/results.json").exists()
    assert "the finished run trained" in warm.run(["status", str(tmp_path / "exported")], machine).stdout
    done = export(machine, trained, tmp_path, JOB_FAULT=fault)
    assert done.returncode == 0, done.stderr[-3000:]
    assert facts_of(manifest(tmp_path / "exported")) == facts_of(manifest(at_once))


def test_other_formats_while_nothing_has_begun(
    machine: dict[str, str], trained: Path, at_once: Path, tmp_path: Path
) -> None:
    """Killed before the settings were kept, the run may still get others: its records are taken over again."""
    assert export(machine, trained, tmp_path, JOB_FAULT="kill@stage=pull").returncode == -signal.SIGKILL
    given = {"JOB_RUN__OUTPUT": str(tmp_path), "JOB_RUN__ID": "exported"}
    done = warm.run(["export", str(trained), "merged"], {**machine, **given})
    assert done.returncode == 0, done.stderr[-3000:]
    results = manifest(tmp_path / "exported")
    assert [one["format"] for one in results["exports"]] == ["merged"]
    same = facts_of(manifest(at_once))
    assert all(same[path] == fact for path, fact in facts_of(results).items() if path.startswith("artifacts/export/"))


def test_an_export_of_an_export(machine: dict[str, str], trained: Path, at_once: Path, tmp_path: Path) -> None:
    """A run that exported another one can be exported, too."""
    given = {"JOB_RUN__OUTPUT": str(tmp_path)}
    done = warm.run(["export", str(trained), "adapter:bf16"], {**machine, **given})
    assert done.returncode == 0, done.stderr[-3000:]
    done = export(machine, tmp_path / "trained-adapter-bf16", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = manifest(tmp_path / "exported")
    assert facts_of(results) == facts_of(manifest(at_once))
    assert results["run"]["exported_run"]["id"] == "trained-adapter-bf16"
    assert results["run"]["exported_run"]["earlier"] == [2]


@pytest.mark.parametrize(
    ("what", "ends"),
    [
        ("rank", (2, "JOB_LORA__RANK: is 4, but 16 in the run that is exported")),
        ("itself", (2, "is that of the run in JOB_EXPORT__RUN")),
        ("inside", (2, "JOB_RUN__OUTPUT: puts this run into")),
        ("unfinished", (65, "is missing in")),
        ("adapter", (65, "adapter_model.safetensors: is damaged")),
        ("record", (65, "stages/train.json: is damaged")),
        ("attempt", (65, "its records cannot be read")),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("lease", (65, "one lists 'lease.json', which no stage publishes")),
                ("list", (65, "its records cannot be read")),
                ("number", (65, "its manifest has an attempt 999999998")),
            )
        ),
    ],
)
def test_what_cannot_be_exported(
    machine: dict[str, str], trained: Path, tmp_path: Path, what: str, ends: tuple[int, str]
) -> None:
    """Named with its place, and before anything is computed."""
    run, changes = Path(shutil.copytree(trained, tmp_path / "run")), dict[str, str]()
    if what == "rank":
        changes = {"JOB_LORA__RANK": "4"}
    elif what == "itself":
        changes = {"JOB_RUN__ID": "trained"}
    elif what == "inside":
        changes = {"JOB_RUN__OUTPUT": str(run)}
    elif what == "unfinished":
        (run / "results.json").unlink()
    elif what in {"lease", "list", "number"}:
        _forge(run, what)
    elif what == "attempt":
        record = run / "attempts/0002.json"
        record.write_bytes(record.read_bytes().replace(b"complete", b"preempted"))
    else:
        damaged = run / (f"{ADAPTER}adapter_model.safetensors" if what == "adapter" else "stages/train.json")
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    done = export(machine, run, tmp_path, **changes)
    assert (done.returncode, ends[1] in done.stderr) == (ends[0], True), done.stderr[-3000:]
    assert "Traceback" not in done.stderr


def _forge(run: Path, what: str) -> None:
    """Writes a record or a number that the job never writes, with the seals and hashes that belong to it."""
    results, path = json.loads((run / "results.json").read_bytes()), "stages/train.json"
    record = json.loads((run / path).read_bytes())
    if what == "number":
        results["run"]["attempts"][-1]["number"] = 999_999_998
    elif what == "lease":
        lease = (run / "lease.json").read_bytes()
        entry = {"path": "lease.json", "bytes": len(lease), "sha256": hashlib.sha256(lease).hexdigest()}
        results["artifacts"].append({**entry, "facts_sha256": None})
        record["artifacts"].append({**entry, "facts_sha256": None})
        record.pop("seal")
        (run / path).write_bytes(sealed(record))
    else:
        (run / path).write_text("[1]", encoding="utf-8")
    for entry in results["evidence"]:
        data = (run / entry["path"]).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    results.pop("seal")
    (run / "results.json").write_bytes(sealed(results))


@pytest.mark.parametrize("begun", ["complete", "export", "copying", "trained by itself"])
def test_the_id_of_another_run(
    machine: dict[str, str], trained: Path, at_once: Path, tmp_path: Path, begun: str
) -> None:
    """The settings are the same: without the refusal, the results of that run would pass for those of this one."""
    if begun == "trained by itself":
        done = export(machine, trained, at_once.parent, JOB_RUN__ID="at-once")
        why = "which trains, or has trained, by itself"
    else:
        fault = {"export": "kill@stage=export", "copying": "kill@upload=3"}.get(begun, "")
        first = export(machine, trained, tmp_path, **({"JOB_FAULT": fault} if fault else {}))
        assert first.returncode == (-signal.SIGKILL if fault else 0)
        done = export(machine, at_once, tmp_path)
        why = "is another run than the one that"
    assert done.returncode == 2, done.stderr[-3000:]
    assert why in done.stderr


def test_a_run_that_trains_where_one_was_copied(
    environment: dict[str, str], machine: dict[str, str], trained: Path, tmp_path: Path
) -> None:
    """Its manifest would say that it exports the finished run."""
    assert export(machine, trained, tmp_path, JOB_FAULT="kill@upload=3").returncode == -signal.SIGKILL
    changes = {"JOB_RUN__OUTPUT": str(tmp_path), "JOB_RUN__ID": "exported", "JOB_EXPORT__FORMATS": FORMATS}
    done = warm.run([], {**environment, **changes})
    assert (done.returncode, "has begun to export a finished one" in done.stderr) == (2, True), done.stderr[-3000:]


def test_a_damaged_record_of_what_is_exported(
    environment: dict[str, str], machine: dict[str, str], trained: Path, tmp_path: Path
) -> None:
    """Started like a run that trains, it would publish a manifest that names no exported run."""
    assert export(machine, trained, tmp_path, JOB_FAULT="kill@stage=export").returncode == -signal.SIGKILL
    record = tmp_path / "exported/stages/exported-run.json"
    record.write_bytes(record.read_bytes().replace(b"trained", b"trainee"))
    assert "stages/exported-run.json" in warm.run(["status", str(tmp_path / "exported")], machine).stdout
    changes = {"JOB_RUN__OUTPUT": str(tmp_path), "JOB_RUN__ID": "exported", "JOB_EXPORT__FORMATS": FORMATS}
    done = warm.run([], {**environment, **changes})
    assert (done.returncode, "stages/exported-run.json" in done.stderr) == (65, True), done.stderr[-3000:]


def test_damage_to_what_was_taken_over(machine: dict[str, str], trained: Path, tmp_path: Path) -> None:
    """It is not trained again, which would take hours."""
    assert export(machine, trained, tmp_path, JOB_FAULT="kill@stage=export").returncode == -signal.SIGKILL
    adapter = tmp_path / f"exported/{ADAPTER}adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\x01")
    done = export(machine, trained, tmp_path)
    assert done.returncode == 65, done.stderr[-3000:]
    assert "its adapter was taken over, and is missing or damaged here" in done.stderr


def test_an_attempt_that_exports_makes_progress(machine: dict[str, str], trained: Path, tmp_path: Path) -> None:
    """Although the finished run got further: else spot machines would end with 71, which no platform starts again."""
    changes = {"JOB_FAULT": "sigterm@upload=14", "JOB_RUN__MAX_IDLE_ATTEMPTS": "1"}
    assert export(machine, trained, tmp_path, **changes).returncode == 75


def test_no_run_is_named(machine: dict[str, str]) -> None:
    """`export "$RUN" merged` without that variable: the rest would be a run that trains."""
    done = warm.run(["export", "", "merged"], machine)
    assert (done.returncode, "is given an empty word" in done.stderr) == (2, True), done.stderr


def test_data_that_has_changed_since(
    machine: dict[str, str], environment: dict[str, str], trained: Path, tmp_path: Path
) -> None:
    """What was evaluated and trained is not what the settings name any more."""
    rows = Path(environment["JOB_DATA__SOURCE"])
    before = rows.read_bytes()
    rows.write_bytes(before.replace(b"Add 0", b"Sum 0", 1))
    try:
        done = export(machine, trained, tmp_path)
    finally:
        rows.write_bytes(before)
    assert done.returncode == 65, done.stderr[-3000:]
    assert "JOB_DATA__SOURCE: its content is not that of the run in JOB_EXPORT__RUN" in done.stderr


def test_data_that_is_not_there(
    machine: dict[str, str], environment: dict[str, str], trained: Path, tmp_path: Path
) -> None:
    """The advice is not to correct the path, which is the finished run's."""
    rows = Path(environment["JOB_DATA__SOURCE"])
    moved = rows.rename(rows.with_suffix(".moved"))
    try:
        done = export(machine, trained, tmp_path)
    finally:
        moved.rename(rows)
    assert done.returncode == 65, done.stderr[-3000:]
    assert "models and data have to be where the run in JOB_EXPORT__RUN had them" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("kind", ["adalora", "dora", "early-stopping", "kto", "ipo-start", "new-tokens"])
def test_kinds_of_training(environment: dict[str, str], machine: dict[str, str], tmp_path: Path, kind: str) -> None:
    """Adapters of other shapes, and records that other methods keep, are taken over like any."""
    folder = Path(environment["JOB_MODEL__ID"]).parent
    changes = {"JOB_RUN__OUTPUT": str(tmp_path), "JOB_TRAIN__EPOCHS": "6", **CONFIGURATIONS[kind](folder)}
    for run, formats in (("trained", ""), ("at-once", "merged")):
        done = warm.run([], {**environment, **changes, "JOB_RUN__ID": run, "JOB_EXPORT__FORMATS": formats})
        assert done.returncode == 0, done.stderr[-3000:]
    done = warm.run(["export", str(tmp_path / "trained"), "merged"], {**machine, "JOB_RUN__OUTPUT": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert facts_of(manifest(tmp_path / "trained-merged")) == facts_of(manifest(tmp_path / "at-once"))


@pytest.mark.long
def test_both_stages_of_sft_dpo(environment: dict[str, str], machine: dict[str, str], tmp_path: Path) -> None:
    """The first stage is taken over as it is, and verified with the second."""
    pairs = [
        {"prompt": f"What is {n} and 1?", "chosen": f" It is {n + 1}.", "rejected": f" It is {3 * n} or so."}
        for n in range(8)
    ]
    changes = {
        "JOB_RUN__OUTPUT": str(tmp_path),
        "JOB_TRAIN__METHOD": "sft,dpo",
        "JOB_DATA__SFT_SOURCE": environment["JOB_DATA__SOURCE"],
        "JOB_DATA__SOURCE": str(write_jsonl(tmp_path / "pairs.jsonl", pairs)),
    }
    for run, formats in (("trained", ""), ("at-once", "merged")):
        done = warm.run([], {**environment, **changes, "JOB_RUN__ID": run, "JOB_EXPORT__FORMATS": formats})
        assert done.returncode == 0, done.stderr[-3000:]
    done = warm.run(["export", str(tmp_path / "trained"), "merged"], {**machine, "JOB_RUN__OUTPUT": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    results = manifest(tmp_path / "trained-merged")
    assert facts_of(results) == facts_of(manifest(tmp_path / "at-once"))
    assert (tmp_path / "trained-merged/sft/results.json").read_bytes() == (
        tmp_path / "trained/sft/results.json"
    ).read_bytes()
    given = {name: value for name, value in machine.items() if name != "JOB_RUN__OUTPUT"}
    done = warm.run(["export", str(tmp_path / "trained/sft"), "adapter:bf16"], given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert manifest(tmp_path / "trained-sft-adapter-bf16")
    assert manifest(tmp_path / "trained"), "it verifies as before"
    for number, name in enumerate(("results.json", "artifacts/report.html", "checkpoints/step-00000003/*/adapter.*")):
        (path,) = (tmp_path / "trained/sft").glob(name)
        content = path.read_bytes()
        path.write_bytes(content[:-2] + b"\0\n")
        changes = {"JOB_RUN__OUTPUT": str(tmp_path), "JOB_RUN__ID": f"damaged-{number}"}
        done = warm.run(["export", str(tmp_path / "trained"), "merged"], {**machine, **changes})
        assert (done.returncode, f"{path.name}: is damaged" in done.stderr) == (65, True), done.stderr[-3000:]
        path.write_bytes(content)


@pytest.mark.long
def test_with_two_processes(
    machine: dict[str, str], trained: Path, at_once: Path, tmp_path: Path, forked: Forks
) -> None:
    """Process 0 takes the run over, and both export."""
    changes = {"JOB_EXPORT__RUN": str(trained), "JOB_EXPORT__FORMATS": FORMATS, "JOB_RUN__ID": "exported"}
    group = forked.start({**machine, **changes, "JOB_RUN__OUTPUT": str(tmp_path)}, 2, "exported")
    assert group.wait() == [0, 0]
    assert facts_of(manifest(tmp_path / "exported")) == facts_of(manifest(at_once))
