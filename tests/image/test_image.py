"""The image, run by Docker Engine: read-only, stopped, without or with a network, and as another user."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from job.runs.layout import facts_of
from tests.image.engine import DOCKER, IMAGE, RUNS, Container, Engine, docker

ROOT = Path(__file__).parents[2]
BASE = os.environ.get("BASE_IMAGE")
pytestmark = pytest.mark.timeout(600)
SHORT = {"JOB_PRESET": "demo", "JOB_TRAIN__MAX_STEPS": "2", "JOB_EVAL__LIMIT": "20"}


def documented() -> list[str]:
    """The options of the first command in infra/docker/README.md, which locks the demo up; less its volume and name."""
    command = (ROOT / "infra/docker/README.md").read_text(encoding="utf-8").split("```sh\n")[1].split("```")[0]
    words = shlex.split(command.replace("\\\n", ""))
    assert (words[:2], words[-1]) == (["docker", "run"], "qlora-job")
    options = words[2:-1]
    for option in ("-v", "-e"):
        del options[options.index(option) : options.index(option) + 2]
    return [option for option in options if option != "--rm"]


LOCKED = documented()


def label(name: str) -> str:
    """A label of the image."""
    labels = json.loads(docker("image", "inspect", "--format", "{{json .Config.Labels}}", IMAGE))
    return str(labels[f"org.opencontainers.image.{name}"])


@dataclass(frozen=True)
class Undisturbed:
    """What a run that nobody disturbed left behind."""

    results: dict[str, Any]
    container: Container


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, figures: list[str]) -> Undisturbed:
    """The demo, as documented."""
    engine = Engine()
    try:
        container = engine.start(*LOCKED, "-v", f"{engine.volume()}:{RUNS}", JOB_PRESET="demo", JOB_RUN__ID="demo")
        code = container.end()
        seconds = time.monotonic() - container.began
        assert code == 0, container.text[-3000:]
        results = engine.results(container, "demo", tmp_path_factory.mktemp("undisturbed"))
        container.text  # noqa: B018 - read before its file is closed
        figures.append(f"docker run to the first log line: {container.first_line:.2f} s")
        figures.append(f"docker run to the demo's first training step: {container.first_step:.1f} s")
        figures.append(f"docker run to the demo's end: {seconds:.1f} s")
        return Undisturbed(results, container)
    finally:
        engine.remove_all()


def test_the_demo_locked_up(undisturbed: Undisturbed) -> None:
    """Not root, on a root file system that cannot be written, without network or capabilities, the demo learns."""
    assert {"--read-only", "--network", "none", "--cap-drop", "ALL", "no-new-privileges"} <= set(LOCKED)
    results = undisturbed.results
    (task,) = results["evaluation"]["tasks"].values()
    assert task["verdict"] == "improved"
    assert task["mcnemar_p"] < 0.01
    assert results["software"]["git"] == label("revision") != ""


def test_labels() -> None:
    """The image says which version of what it is, and runs as a user by number."""
    assert label("version") == re.search(r'__version__ = "(.+)"', (ROOT / "job/__init__.py").read_text()).group(1)
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", label("revision"))
    assert docker("image", "inspect", "--format", "{{.Config.User}}", IMAGE).strip() == "65532:65532"


def test_stopped_and_started_again(
    engine: Engine, undisturbed: Undisturbed, tmp_path: Path, figures: list[str]
) -> None:
    """`docker stop` in the middle of training ends with 75; the same command goes on and comes to the same bits."""
    volume = engine.volume()
    start = lambda: engine.start(  # noqa: E731
        *LOCKED, "--stop-timeout", "40", "-v", f"{volume}:{RUNS}", JOB_PRESET="demo", JOB_RUN__ID="stopped"
    )
    container = start()
    for event in container.events():
        if event["event"] == "steps" and event["done"] >= event["total"] // 2:
            break
    began = time.monotonic()
    stop = subprocess.Popen([DOCKER, "stop", container.name], stdout=subprocess.DEVNULL)
    code = container.end()
    stop.wait(timeout=60)
    figures.append(f"docker stop to the end of the container: {time.monotonic() - began:.1f} s")
    assert code == 75, container.text[-3000:]
    again = start()
    first = next(event["done"] for event in again.events() if event["event"] == "steps")
    assert again.end() == 0, again.text[-3000:]
    assert first > 1
    results = engine.results(again, "stopped", tmp_path)
    assert [attempt["outcome"] for attempt in results["run"]["attempts"]] == ["preempted", "complete"]
    assert facts_of(results) == facts_of(undisturbed.results)


def test_any_user_id(engine: Engine, tmp_path: Path) -> None:
    """Under a user id that nobody knows, group 0 as on OpenShift, called as by SageMaker, told which image it is."""
    options = [*LOCKED, "--user", "1234567:0", "-v", f"{engine.volume()}:{RUNS}"]
    digest = f"sha256:{'5' * 64}"
    container = engine.start(*options, words=["train"], **SHORT, JOB_RUN__ID="anybody", JOB_RUN__IMAGE_DIGEST=digest)
    assert container.end() == 0, container.text[-3000:]
    results = engine.results(container, "anybody", tmp_path)
    assert (results["run"]["status"], results["software"]["image_digest"]) == ("complete", digest)


def test_no_gpu_for_a_preset_that_needs_one(engine: Engine) -> None:
    """The default preset without a GPU ends at once with 2 and says what to do; so does another model."""
    for environ in ({}, {"JOB_MODEL__ID": "/model"}):
        container = engine.start(*LOCKED, "-v", f"{engine.volume()}:{RUNS}", **environ)
        (event,) = container.events()
        assert container.end() == 2
        assert event["level"] == "error"
        assert event["event"].startswith("No GPU is visible: give it one: docker run --gpus all")


def test_wrong_settings(engine: Engine, figures: list[str]) -> None:
    """A settings error comes from the job, all problems at once, with 2, and soon."""
    options = [*LOCKED, "-v", f"{engine.volume()}:{RUNS}"]
    container = engine.start(*options, JOB_PRESET="demo", JOB_TRAIN__EPOCHS="x", JOB_LORA__RNAK="8")
    *_, event = container.events()
    assert container.end() == 2
    figures.append(f"docker run to the end after a settings error: {time.monotonic() - container.began:.2f} s")
    assert len(event["problems"]) == 2


def test_a_secret_that_is_not_there(engine: Engine) -> None:
    """A file that cannot be read ends the job with 2 and its name."""
    container = engine.start(*LOCKED, JOB_PRESET="demo", HF_TOKEN_FILE="/run/secrets/hf")
    (event,) = container.events()
    assert container.end() == 2
    assert "HF_TOKEN_FILE: user 65532 cannot read /run/secrets/hf" in event["event"]


def test_nothing_that_does_not_belong(engine: Engine) -> None:
    """No compiler, no installer, no caches; the job can write to the places it was given, and to no other."""
    script = """
    for tool in gcc cc clang pip pip3 uv; do command -v $tool && echo "has $tool"; done
    for module in pip uv ensurepip; do python -c "import $module" 2>/dev/null && echo "has $module"; done
    ls -A /var/lib/apt/lists /var/cache /build 2>/dev/null | grep -v :
    for place in / /opt/job /opt/job/job /opt/torch /etc; do touch $place/x 2>/dev/null && echo "writes $place"; done
    for place in /tmp /work/runs /work/cache; do touch $place/x || echo "cannot write $place"; done
    [ "$(id -u):$(id -g)" = 65532:65532 ] || id
    """
    assert engine.shell(f"{script}\ntrue").strip() == ""


TRITON = """
import hashlib, pathlib, sysconfig, torch
from triton.backends.nvidia import driver
from triton.runtime import build, cache
source = pathlib.Path(driver.dirname, "driver.c").read_text()
key = hashlib.sha256((source + build.platform_key()).encode()).hexdigest()
print(torch.version.cuda, cache.get_cache_manager(key).get_file("cuda_utils" + sysconfig.get_config_var("EXT_SUFFIX")))
"""


def test_what_torch_needs_of_a_gpu_is_known(engine: Engine) -> None:
    """The entrypoint's figures are those of the torch in the image; Triton finds its compiled file in its cache."""
    cuda, oldest = engine.shell("cat /opt/job/cuda").split()
    if cuda == "none":
        pytest.skip("this image's torch is built without CUDA")
    version, file = engine.shell(f"TRITON_CACHE_DIR=/opt/job/triton python -c {shlex.quote(TRITON)}").split()
    assert cuda == version
    assert (cuda, oldest) in {("13.0", "7.5"), ("12.6", "6.0")}
    assert file.startswith("/opt/job/triton/")
    # It is linked against the driver's library, which is not here: without it the loader would name a missing symbol.
    load = f"import ctypes; ctypes.CDLL({file!r})"
    assert "libcuda.so.1: cannot open" in engine.shell(f"python -c {shlex.quote(load)} 2>&1 || true")


def test_a_volume_of_another_user_id(engine: Engine, tmp_path: Path) -> None:
    """User ids of group 0 take turns at a run; one of another group is told so, with 2, before anything is read."""
    volume = engine.volume()
    here = [*LOCKED, "-v", f"{volume}:{RUNS}"]
    begun = {**SHORT, "JOB_RUN__ID": "turns"}
    container = engine.start(*here, "--user", "1001:0", **begun, JOB_FAULT="kill@stage=evaluate-adapter")
    assert container.end() != 0, container.text[-3000:]
    container = engine.start(*here, "--user", "1002:1002", **begun)
    assert container.end() == 2, container.text[-3000:]
    assert re.search(r"JOB_RUN__OUTPUT.* runs/turns is not writable for this user; .* --user 1001:0", container.text)
    assert "downloading" not in container.text
    container = engine.start(*here, "--user", "1002:0", **begun)
    assert container.end() == 0, container.text[-3000:]
    results = engine.results(container, "turns", tmp_path)
    assert [attempt["outcome"] for attempt in results["run"]["attempts"]] == ["killed", "complete"]


def test_no_setuid_programs_and_nothing_that_no_run_opens(engine: Engine) -> None:
    """No file of the image gives its caller other rights; libraries for other CUDA versions and tests are gone."""
    script = """
    find / -xdev -perm /6000 2>/dev/null
    find /opt -name '*.a'
    cd /opt/venv/lib/python3*/site-packages && ls bitsandbytes/*.so
    find networkx numpy pandas pyarrow scipy sklearn sympy -type d -name tests
    """
    cuda = engine.shell("cat /opt/job/cuda").split()[0].replace(".", "")
    found = engine.shell(f"{script}\ntrue").split()
    library = "bitsandbytes/libbitsandbytes_{}.so".format
    # bitsandbytes takes the library for torch's own CUDA version, or else one of the same major version.
    usable = [name for name in found if fnmatch(name, library(f"cuda{cuda[:-1]}?"))]
    exact = library(f"cuda{cuda}")
    assert bool(usable) == (cuda != "none")
    assert set(found) == {library("cpu"), *([exact] if exact in usable else usable)}
    modules = "bitsandbytes, networkx, numpy.testing, pandas, pyarrow.parquet, scipy.stats, sklearn.metrics, sympy"
    assert engine.shell(f"python -c 'import {modules}' 2>/dev/null && echo imported").split()[-1] == "imported"


def test_no_variable_of_the_build_machine() -> None:
    """Beside the base's own variables the image has those of the Dockerfile, and no proxy or setting of its builder."""
    inspect = ("image", "inspect", "--format", "{{json .Config.Env}}")
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    last = text.rpartition("\nFROM base\n")[2]
    own = set(re.findall(r"(\w+)=", " ".join(re.findall(r"^ENV ((?:.*\\\n)*.*)$", last, re.MULTILINE)))) | {"PATH"}
    found = dict(variable.partition("=")[::2] for variable in json.loads(docker(*inspect, IMAGE)))
    if BASE is not None:
        base = dict(variable.partition("=")[::2] for variable in json.loads(docker(*inspect, BASE)))
        assert {name: value for name, value in found.items() if name not in own} == {
            name: value for name, value in base.items() if name not in own
        }
    assert own <= found.keys()


def test_history_and_size(figures: list[str]) -> None:
    """Nothing in the image's history or settings looks like a credential; its layers are printed."""
    told = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE)
    told += docker("image", "inspect", "--format", "{{json .Config}}", IMAGE)
    assert not re.search(r"(TOKEN|SECRET|PASSWORD|ACCESS_KEY)\w*\s*=", told, re.IGNORECASE), told
    size = int(docker("image", "inspect", "--format", "{{.Size}}", IMAGE))
    figures.append(f"image: {size / 1e9:.2f} GB")
    for layer in docker("history", "--format", "{{.Size}}\t{{.CreatedBy}}", IMAGE).splitlines():
        weight, how = layer.split("\t")
        if weight != "0B":
            figures.append(f"  {weight:>7}  {re.sub(r'^/bin/sh -c (#.nop. )?', '', how)[:90]}")
