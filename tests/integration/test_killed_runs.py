"""Whole runs that are killed, lose their store, or race: they publish what an uninterrupted run publishes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from job.common.hashing import sealed
from job.results.reader import open_run, read_bytes
from job.runs.layout import facts_of
from job.storage.open import open_store
from job.verification.verify import require_verified, verify
from tests import clouds, warm
from tests.chaos.small import settings
from tests.flaky_proxy import flaky
from tests.integration.whole_runs import attempt, published
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
NAMING_THE_DATA = {"artifacts/adapter/README.md", "artifacts/bom.cdx.json"}
"""Artifacts that say where the data lies."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The chaos configuration with fewer rows: 12 steps."""
    return settings(tmp_path_factory.mktemp("survival"), rows=24, questions=16)


@pytest.fixture(scope="module")
def undisturbed(environment: dict[str, str]) -> dict[str, str]:
    """The facts of a run that nobody disturbed."""
    done = attempt(environment, JOB_RUN__ID="undisturbed")
    assert done.returncode == 0, done.stderr[-3000:]
    return published(Path(environment["JOB_RUN__OUTPUT"]), "undisturbed")


def test_killed_in_every_stage(environment: dict[str, str], undisturbed: dict[str, str], tmp_path: Path) -> None:
    """Killed or stopped in each stage, in the middle of an upload, and after a step, a run ends with the same bits."""
    faults = "kill@stage=evaluate-base,kill@step=4,kill@upload=5,sigterm@step=9,sigterm@stage=evaluate-adapter"
    codes = []
    while not codes or codes[-1] != 0:
        done = attempt(environment, JOB_RUN__ID="hit", JOB_RUN__OUTPUT=str(tmp_path), JOB_FAULT=faults)
        codes.append(done.returncode)
        assert done.returncode in {0, 75, -9}, done.stderr[-3000:]
        assert len(codes) < 9
    assert codes.count(-9) == 3
    assert codes.count(75) == 2
    assert published(tmp_path, "hit") == undisturbed
    results = json.loads((tmp_path / "hit" / "results.json").read_text(encoding="utf-8"))
    attempts = results["run"]["attempts"]
    assert [one["outcome"] for one in attempts].count("killed") == 3
    assert [one["outcome"] for one in attempts].count("preempted") == 2
    assert (results["cost"]["repeated_steps"] or 0) == sum(one["repeated_steps"] for one in attempts)
    assert results["cost"]["repeated_steps_exact"] is False  # killed after step 4, at once


@pytest.mark.long
@pytest.mark.parametrize("streams", [">&-", ">/dev/full", "2>&-", ">/dev/full 2>&1", "<&- >&- 2>&-"])
def test_a_run_needs_no_output(
    environment: dict[str, str], undisturbed: dict[str, str], tmp_path: Path, streams: str
) -> None:
    """Started with its output closed, or on a full disk, a run publishes the same results and ends with exit code 0."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    given = {**clean, **environment, "JOB_RUN__ID": "mute", "JOB_RUN__OUTPUT": str(tmp_path)}
    script = f"exec {sys.executable} -m job {streams}"
    done = subprocess.run(["sh", "-c", script], cwd=ROOT, env=given, capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (done.stdout == b"") == (streams != "2>&-")
    assert b"Traceback" not in done.stderr
    assert published(tmp_path, "mute") == undisturbed


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP, signal.SIGALRM, signal.SIGTSTP])
def test_signals_of_batch_systems_and_terminals(
    environment: dict[str, str], undisturbed: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    """Asked to stop it saves a checkpoint, killed it resumes, suspended it goes on: with the same bits."""
    changes = {"JOB_RUN__ID": "signalled", "JOB_RUN__OUTPUT": str(tmp_path)}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    with warm.followed([], {**clean, **environment, **changes}) as (process, log):
        next(line for line in log if '"done": 4,' in line)
        for one in (number, number, signal.SIGCONT):
            with suppress(ProcessLookupError):  # the first ALRM has ended it
                os.kill(process.pid, one)
            time.sleep(0.3)
        log.read()
        (code,) = process.wait(120)
    assert code == {signal.SIGALRM: -signal.SIGALRM, signal.SIGTSTP: 0}.get(number, 75)
    if code:
        assert attempt(environment, **changes).returncode == 0
    assert published(tmp_path, "signalled") == undisturbed


@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "numbers"),
    [
        ("evaluate-adapter", (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGQUIT, signal.SIGTSTP)),
        ("publish", (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU, signal.SIGQUIT, signal.SIGTSTP)),
    ],
)
def test_signals_in_the_last_stages(
    environment: dict[str, str],
    undisturbed: dict[str, str],
    tmp_path: Path,
    stage: str,
    numbers: tuple[signal.Signals, ...],
) -> None:
    """A signal while the adapter is scored or the run is published: the next start, if one is needed, gives the same.

    QUIT ends the process at once, as KILL does. What is left of publishing when a signal comes may be done first.
    """
    changes = {"JOB_RUN__ID": "late", "JOB_RUN__OUTPUT": str(tmp_path / "begun")}
    assert attempt(environment, **changes, JOB_FAULT=f"kill@stage={stage}").returncode == -9
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    for number in numbers:
        changes["JOB_RUN__OUTPUT"] = str(shutil.copytree(tmp_path / "begun", tmp_path / number.name))
        with warm.followed([], {**clean, **environment, **changes}) as (process, log):
            next(line for line in log if "stage begins" in line and f'"{stage}"' in line)
            for one in (number, signal.SIGCONT):
                with suppress(ProcessLookupError):  # QUIT has ended it
                    os.kill(process.pid, one)
                time.sleep(0.3 if number == signal.SIGTSTP else 0)
            log.read()
            (code,) = process.wait(120)
        # 0 after QUIT: on a fast machine the rest was done before it came.
        expected = {signal.SIGQUIT: {-signal.SIGQUIT, 0}, signal.SIGTSTP: {0}}.get(number, {75})
        assert code in (expected | {0} if stage == "publish" else expected), number
        if code:
            assert attempt(environment, **changes).returncode == 0
        assert published(tmp_path / number.name, "late") == undisturbed, number


@pytest.mark.long
def test_corrupt_checkpoint(environment: dict[str, str], undisturbed: dict[str, str], tmp_path: Path) -> None:
    """A bit that flips in the newest checkpoint sends the next attempt back to the one before, and says so."""
    changes = {"JOB_RUN__ID": "flip", "JOB_RUN__OUTPUT": str(tmp_path)}
    assert attempt(environment, **changes, JOB_FAULT="kill@step=8").returncode == -9
    done = attempt(environment, **changes, JOB_FAULT="corrupt@checkpoint=latest")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint is incomplete or damaged, trying an older one" in done.stderr
    assert published(tmp_path, "flip") == undisturbed


@pytest.mark.long
def test_a_restart_needs_the_model_no_more(
    environment: dict[str, str], undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """With the quantized base in the store a run goes on when the model's source has gone: with the same bits."""
    source = tmp_path / "base"
    shutil.copytree(environment["JOB_MODEL__ID"], source)
    changes = {
        "JOB_RUN__ID": "kept",
        "JOB_RUN__OUTPUT": str(tmp_path / "out"),
        "JOB_MODEL__ID": str(source),
        "JOB_MODEL__KEEP_QUANTIZED": "store",
    }
    assert attempt(environment, **changes, JOB_FAULT="kill@step=8").returncode == -9
    shutil.rmtree(source)
    done = attempt(environment, **changes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert published(tmp_path / "out", "kept") == undisturbed  # its place is in no published file


SLOW = """
import time, job.stages.pull_model, job.cli.main
plain = job.stages.pull_model.download_model
job.stages.pull_model.download_model = lambda *given: (time.sleep(600), plain(*given))[1]
raise SystemExit(job.cli.main.main([]))
"""


@pytest.mark.parametrize("why", ["SIGTERM", "bad questions"])
def test_nobody_waits_for_a_download(environment: dict[str, str], tmp_path: Path, why: str) -> None:
    """A job that has to end, or is refused, ends while its model is still on the way."""
    changes = {"JOB_RUN__ID": "slow", "JOB_RUN__OUTPUT": str(tmp_path / "out")}
    if why == "bad questions":
        (tmp_path / "bad.jsonl").write_text("{}\n{}\n", encoding="utf-8")
        changes["JOB_EVAL__DATA"] = f"arc_easy={tmp_path / 'bad.jsonl'}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    log = tmp_path / "log"
    member = warm.Member([], {**clean, **environment, **changes}, log, log, source=SLOW)
    process = warm.Processes([member])
    if why == "SIGTERM":
        wait_for((tmp_path / "out/slow/attempts/0001.json").exists)
        os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=240)[0] == (75 if why == "SIGTERM" else 65)
    ledger = json.loads((tmp_path / "out/slow/attempts/0001.json").read_text(encoding="utf-8"))
    assert ledger["outcome"] == ("preempted" if why == "SIGTERM" else "failed")


@pytest.mark.long
def test_a_base_that_was_swapped_is_not_taken(
    environment: dict[str, str], undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """Another whole base under the same key, sealed and all: the run began with another one, and goes without."""
    changes = {"JOB_RUN__ID": "swap", "JOB_RUN__OUTPUT": str(tmp_path), "JOB_MODEL__KEEP_QUANTIZED": "store"}
    assert attempt(environment, **changes, JOB_FAULT="kill@step=8").returncode == -9
    (index,) = tmp_path.glob("bases/*/base.json")
    files = json.loads(index.read_text(encoding="utf-8"))
    (weights,) = tmp_path.glob("bases/*/*/model.safetensors")
    spoiled = bytearray(weights.read_bytes())
    spoiled[-1] ^= 1
    sha256 = hashlib.sha256(spoiled).hexdigest()
    other = index.parent / sha256 / weights.name
    other.parent.mkdir()
    other.write_bytes(spoiled)
    index.write_bytes(sealed({**files, weights.name: {"bytes": len(spoiled), "sha256": sha256}}))
    done = attempt(environment, **changes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert published(tmp_path, "swap") == undisturbed


@pytest.mark.long
def test_two_attempts_at_once(environment: dict[str, str], undisturbed: dict[str, str], tmp_path: Path) -> None:
    """Of two attempts started together one finishes the run; the other ends as replaced, or finds it done."""
    codes: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: codes.append(
                attempt(environment, JOB_RUN__ID="race", JOB_RUN__OUTPUT=str(tmp_path)).returncode
            )
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) in ([0, 76], [0, 0]), codes
    assert published(tmp_path, "race") == undisturbed


@pytest.mark.long
@pytest.mark.parametrize("kind", clouds.SCHEMES)
def test_stores_that_fail(environment: dict[str, str], undisturbed: dict[str, str], tmp_path: Path, kind: str) -> None:
    """Killed and stopped, with a cloud's store that corrupts a tenth of all requests, a run completes."""
    folder, place = Path(environment["JOB_DATA__SOURCE"]).parent, clouds.place(kind)
    with clouds.imitation(kind, tmp_path) as reach:
        options = clouds.options(kind, reach)
        store = open_store(f"{place}/in", options)
        for path in [*(folder / "base").iterdir(), folder / "rows.jsonl", folder / "questions.jsonl"]:
            store.upload(path, path.relative_to(folder).as_posix())
        address = urlsplit(reach[clouds.ADDRESS[kind]])
        with flaky(f"http://{address.netloc}", share=0.1, stall_seconds=30, seed=1) as proxy:
            changes = {
                **reach,
                "JOB_RUN__ID": "hit",
                "JOB_RUN__OUTPUT": f"{place}/out",
                "JOB_MODEL__ID": f"{place}/in/base",
                "JOB_DATA__SOURCE": f"{place}/in/rows.jsonl",
                "JOB_EVAL__DATA": f"arc_easy={place}/in/questions.jsonl",
                "JOB_STORAGE__TIMEOUT_SECONDS": "2",
                "JOB_STORAGE__RETRIES": "10",
                "JOB_FAULT": "kill@step=4,kill@upload=5,sigterm@step=9",
                clouds.ADDRESS[kind]: f"{proxy.url}{address.path}",
            }
            codes = []
            while not codes or codes[-1] != 0:
                done = attempt(environment, **changes)
                codes.append(done.returncode)
                assert done.returncode in {0, 75, -9}, done.stderr[-3000:]
                assert len(codes) < 9
        assert (codes.count(-9), codes.count(75)) == (2, 1)
        run = open_run(f"{place}/out/hit", options)
        (tmp_path / "work").mkdir()
        require_verified(verify(run, tmp_path / "work"))
        found = facts_of(json.loads(read_bytes(run)))
        changed = {path for path in found if found[path] != undisturbed[path]}
        assert found.keys() == undisturbed.keys()
        assert changed <= NAMING_THE_DATA
        spoiled = sum(proxy.done.values()) - proxy.done["passed"]
        assert spoiled > 10, proxy.done


@pytest.mark.long
def test_full_disk(environment: dict[str, str], undisturbed: dict[str, str], tmp_path: Path) -> None:
    """A disk that fills up while a checkpoint is published is exit 69; what is on it is whole, and the run goes on."""
    small, larger = tmp_path / "small", tmp_path / "larger"
    small.mkdir()
    job = f"{sys.executable} -m job; code=$?; cp -a {small} {larger}; exit $code"
    script = f"mount -t tmpfs -o size=900k none {small} && {job}"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    changes = {"JOB_RUN__ID": "full", "JOB_RUN__OUTPUT": str(small)}
    # One checkpoint is to be kept, so the run may begin; but none is deleted before it is an hour old.
    changes |= {"JOB_CHECKPOINT__KEEP": "1", "JOB_CHECKPOINT__SETTLE_SECONDS": "3600"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        cwd=ROOT,
        env={**clean, **environment, **changes},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 69, done.stderr[-3000:]
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (larger / "full" / "results.json").exists()
    assert list(larger.glob("full/checkpoints/*/COMMITTED.json"))
    again = attempt(environment, JOB_RUN__ID="full", JOB_RUN__OUTPUT=str(larger))
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resuming" in again.stderr
    assert published(larger, "full") == undisturbed


@pytest.mark.long
def test_random_kills(environment: dict[str, str], undisturbed: dict[str, str], tmp_path: Path) -> None:
    """Wherever a process is killed, the run ends with the same bits (the full hundred: `make chaos`)."""
    draw = random.Random("in the suite")
    for number in range(2):
        changes = {"JOB_RUN__ID": f"random-{number}", "JOB_RUN__OUTPUT": str(tmp_path / str(number))}
        fault = f"kill@step={draw.randint(1, 11)},kill@upload={draw.randint(1, 20)}"
        code = None
        while code != 0:
            done = attempt(environment, **changes, JOB_FAULT=fault)
            code = done.returncode
            assert code in {0, -9}, done.stderr[-3000:]
        assert published(tmp_path / str(number), f"random-{number}") == undisturbed


@pytest.mark.long
def test_questions_may_not_change(environment: dict[str, str], tmp_path: Path) -> None:
    """An attempt that finds other questions than the one before ends with 65: they could not be paired."""
    questions = Path(environment["JOB_EVAL__DATA"].removeprefix("arc_easy="))
    lines = questions.read_text(encoding="utf-8").splitlines(keepends=True)
    mine = tmp_path / "questions.jsonl"
    mine.write_text("".join(lines[:8]), encoding="utf-8")
    changes = {
        "JOB_RUN__ID": "moved",
        "JOB_RUN__OUTPUT": str(tmp_path),
        "JOB_TRAIN__MAX_STEPS": "2",
        "JOB_EVAL__DATA": f"arc_easy={mine}",
    }
    assert attempt(environment, **changes, JOB_FAULT="kill@stage=evaluate-adapter").returncode == -9
    mine.write_text("".join(lines[8:]), encoding="utf-8")
    assert attempt(environment, **changes).returncode == 65
    assert not (tmp_path / "moved" / "results.json").exists()


@pytest.mark.long
def test_a_mistake_does_not_bind_the_run(environment: dict[str, str], tmp_path: Path) -> None:
    """A setting that cannot work may be corrected under the same id; one that decided a result may not be changed."""
    changes = {"JOB_RUN__ID": "typo", "JOB_RUN__OUTPUT": str(tmp_path), "JOB_TRAIN__MAX_STEPS": "2"}
    assert attempt(environment, **changes, JOB_LORA__TARGET_MODULES="q_porj").returncode == 2
    assert attempt(environment, **changes).returncode == 0
    assert attempt(environment, **{**changes, "JOB_TRAIN__MAX_STEPS": "3"}).returncode == 2
    assert attempt(environment, **changes).returncode == 0
