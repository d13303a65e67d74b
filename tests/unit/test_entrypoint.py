"""The image's entrypoint, run by bash on this machine with a fake `nvidia-smi`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from job.cli.arguments import COMMANDS
from job.errors import Preempted, UnfitMachine
from job.settings.load import secrets
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
SECRET = "a-secret-that-no-message-may-hold"

# Answers questions about settings like the image's Python; starting the job is only noted.
PYTHON = f"""#!/bin/sh
[ "$3" = config ] && exec {sys.executable} "$@"
echo "pid $$"
echo "started $*"
UMASK=$(umask) BLOCKED=$(sed -n 's/^SigBlk:.//p' /proc/$$/status) env
"""
BANNER = "| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: {} |"
NEW_BANNER = "| NVIDIA-SMI 610.43.02   KMD Version: 610.43.02   CUDA UMD Version: {} |"


@dataclass(frozen=True)
class Done:
    """How the entrypoint ended; `started` is what the job was started with, None where it was not."""

    code: int
    started: str | None
    environment: Mapping[str, str]
    log: str
    pids: tuple[int, int]

    @property
    def events(self) -> list[str]:
        """What the entrypoint said; every line of it is JSON."""
        return [json.loads(line)["event"] for line in self.log.splitlines()]


Start = Callable[..., Done]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Runs the entrypoint as it lies in the image."""
    for folder in ("opt", "bin", "home"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "entrypoint.sh", tmp_path / "opt")
    tool(tmp_path / "bin/python", PYTHON)

    def run(*words: str, image: str = "13.0 7.5", **environ: str) -> Done:
        (tmp_path / "opt/cuda").write_text(image + "\n")
        process = subprocess.Popen(
            [tmp_path / "opt/entrypoint.sh", *words],
            env={
                "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
                "PYTHONPATH": str(ROOT),
                "HOME": f"{tmp_path}/home",
                "KUBERNETES_TERMINATION_LOG": str(tmp_path / "termination-log"),
                **environ,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        out, log = process.communicate(timeout=60)
        lines = out.splitlines()
        pid = int(lines[0].split()[1]) if lines else 0
        started = lines[1].removeprefix("started -m job").strip() if lines else None
        variables = dict(line.split("=", 1) for line in lines[2:] if "=" in line)
        return Done(process.returncode, started, variables, log, (process.pid, pid))

    return run


def tool(path: Path, script: str) -> None:
    """Puts a program on the entrypoint's PATH."""
    path.write_text(script)
    path.chmod(0o755)


def gpus(folder: Path, cuda: str, *lines: str, banner: str = BANNER) -> None:
    """Puts GPUs into the machine: `lines` is what nvidia-smi answers to the query."""
    answer = "\n".join(lines)
    asked = f"case $1 in --query*) cat <<'END'\n{answer}\nEND\n;; *) cat <<'END'\n{banner.format(cuda)}\nEND\n;; esac"
    tool(folder / "bin/nvidia-smi", f"#!/bin/sh\necho asked >>{folder}/asked\n{asked}\n")


def test_it_is_short() -> None:
    """What runs before the job can be read in a minute."""
    assert len((ROOT / "entrypoint.sh").read_text().splitlines()) <= 80


def test_files_are_of_the_group(start: Start) -> None:
    """What the job writes to a volume another user id of its group can replace."""
    assert start("plan").environment["UMASK"] == "0002"


class TestSecrets:
    """Credentials that a platform mounts as files."""

    NAMES = tuple(re.findall(r"[A-Z_]{8,}", (ROOT / "entrypoint.sh").read_text().split("secrets=(")[1].split(")")[0]))

    @pytest.mark.parametrize("name", NAMES)
    def test_a_file_becomes_the_variable(self, start: Start, tmp_path: Path, name: str) -> None:
        """The job gets the content without its line break, under the name that the log scrubs, and nobody prints it."""
        (tmp_path / "secret").write_text(SECRET + "\n")
        done = start("plan", **{f"{name}_FILE": str(tmp_path / "secret")})
        assert done.environment[name] == SECRET
        assert f"{name}_FILE" not in done.environment
        assert SECRET not in done.log
        assert secrets(done.environment) == (SECRET,)

    def test_all_problems_come_at_once(self, start: Start, tmp_path: Path) -> None:
        """A missing file, an empty one and a secret given twice end the job before it starts, with exit code 2."""
        (tmp_path / "empty").touch()
        done = start(
            JOB_PRESET="demo",
            HF_TOKEN=SECRET,
            HF_TOKEN_FILE=str(tmp_path / "empty"),
            WANDB_API_KEY_FILE=str(tmp_path / "empty"),
            AWS_SECRET_ACCESS_KEY_FILE=str(tmp_path / "missing"),
        )
        assert (done.code, done.started) == (2, None)
        (event,) = done.events
        assert "HF_TOKEN and HF_TOKEN_FILE are both given" in event
        assert f"WANDB_API_KEY_FILE: {tmp_path}/empty is empty" in event
        assert re.search(rf"AWS_SECRET_ACCESS_KEY_FILE: user \d+ cannot read {tmp_path}/missing", event)
        assert SECRET not in done.log
        assert (tmp_path / "termination-log").read_text() == event

    @pytest.mark.parametrize("content", [f"{SECRET}\r\n", f"{SECRET}\n{SECRET}\n", f"{SECRET}\x1b[0m"])
    def test_control_characters_are_refused_in_one_line(self, start: Start, tmp_path: Path, content: str) -> None:
        """No protocol takes such a secret: said once, in words, and without the secret."""
        (tmp_path / "secret").write_bytes(content.encode())
        done = start("plan", HF_TOKEN_FILE=str(tmp_path / "secret"))
        assert (done.code, done.started) == (2, None)
        (event,) = done.events
        assert event == f"HF_TOKEN_FILE: {tmp_path}/secret has several lines or control characters: keep one."
        assert SECRET not in done.log

    def test_a_path_with_control_characters_is_one_line_of_the_log(self, start: Start) -> None:
        """A secret that was put into the variable for its path does not tear the log apart."""
        (event,) = start("plan", HF_TOKEN_FILE="a\nb\tc").events
        assert "cannot read a'b'c: mount it readable, or start as its owner (--user)" in event

    def test_files_that_all_can_read_are_named(self, start: Start, tmp_path: Path) -> None:
        """All of them in one warning, and the job begins; a private file is not worth a word."""
        for name, mode in (("private", 0o400), ("open", 0o644), ("wide", 0o604)):
            (tmp_path / name).write_text(SECRET)
            (tmp_path / name).chmod(mode)
        done = start(
            "plan",
            HF_TOKEN_FILE=f"{tmp_path}/private",
            WANDB_API_KEY_FILE=f"{tmp_path}/open",
            MLFLOW_TRACKING_TOKEN_FILE=f"{tmp_path}/wide",
        )
        assert done.started == "plan"
        (event,) = done.events
        assert event.startswith("Readable for every user of this machine: MLFLOW_TRACKING_TOKEN_FILE")
        assert f"WANDB_API_KEY_FILE ({tmp_path}/open)" in event
        assert "HF_TOKEN" not in event

    def test_the_ecosystem_s_own_files_stay(self, start: Start) -> None:
        """Names that end in _FILE and belong to a library reach it as they are."""
        names = ("AWS_WEB_IDENTITY_TOKEN", "AWS_SHARED_CREDENTIALS", "AZURE_FEDERATED_TOKEN", "SSL_CERT")
        own = {f"{name}_FILE": "/x" for name in names}
        assert own.items() <= start("plan", **own).environment.items()


class TestWithoutGpu:
    """A machine without a GPU, or a container that was not given one."""

    def test_a_preset_for_a_gpu_is_refused(self, start: Start, tmp_path: Path) -> None:
        """The message says how to give it one, and stands where Kubernetes and SageMaker look for it."""
        (tmp_path / "ml/output").mkdir(parents=True)
        done = start(SAGEMAKER_BASE_DIR=str(tmp_path / "ml"))
        assert (done.code, done.started) == (2, None)
        (event,) = done.events
        assert event.startswith("No GPU is visible")
        assert "--gpus all" in event
        assert "JOB_RUN__DEVICE=cpu" in event
        assert (tmp_path / "termination-log").read_text() == event
        assert (tmp_path / "ml/output/failure").read_text() == event

    @pytest.mark.parametrize("words", [["run"], ["train"], ["--run.seed", "1"]])
    def test_with_or_without_a_command(self, start: Start, words: list[str]) -> None:
        """`run` may be left out, and SageMaker says `train`."""
        assert start(*words).code == 2
        done = start(*words, JOB_PRESET="demo")
        assert (done.code, done.started) == (0, " ".join(words))
        assert done.environment["CUDA_VISIBLE_DEVICES"] == ""
        assert done.events == ["No GPU is visible: going on without"]

    def test_who_says_so_may_do_without(self, start: Start) -> None:
        """A model of one's own needs a GPU like the preset's, unless the run is told to use what there is."""
        assert start(JOB_MODEL__ID="/model").code == 2
        assert start(JOB_MODEL__ID="/model", JOB_RUN__DEVICE="auto").code == 0
        done = start(JOB_RUN__DEVICE="cpu")
        assert done.code == 0
        # Process 1 of a container would lose it until Python has a handler.
        assert int(done.environment["BLOCKED"], 16) >> (signal.SIGTERM - 1) & 1

    def test_the_preset_counts_wherever_it_is_given(self, start: Start, tmp_path: Path) -> None:
        """On the command line, in a file, in SageMaker's hyperparameters."""
        assert start("run", "--preset", "demo").code == 0
        (tmp_path / "job.yaml").write_text("preset: demo\n")
        assert start(JOB_CONFIG=str(tmp_path / "job.yaml")).code == 0
        (tmp_path / "ml/input/config").mkdir(parents=True)
        (tmp_path / "ml/input/config/hyperparameters.json").write_text('{"preset": "\\"demo\\""}')
        assert start("train", TRAINING_JOB_NAME="a", SAGEMAKER_BASE_DIR=str(tmp_path / "ml")).code == 0

    def test_the_job_speaks_for_itself_of_its_settings(self, start: Start) -> None:
        """Help and wrong settings are the job's to answer: it names all problems."""
        assert start("--help").started == "--help"
        done = start("run", "--help")
        assert (done.started, done.log) == ("run --help", "")  # no GPU is asked for, nothing is logged
        done = start("--version")
        assert (done.started, done.log) == ("--version", "")
        assert start(JOB_TRAIN__EPOCHS="x").started == ""

    def test_a_program_is_run(self, start: Start, tmp_path: Path) -> None:
        """SageMaker's SDK changes the mode of files by the image; a word that is no program is the job's to refuse."""
        tool(tmp_path / "bin/made-up", '#!/bin/sh\necho "pid 0"; echo "ran $*"\n')
        assert start("made-up", "-R", "777").started == "ran -R 777"
        assert start("no-such-program").started == "no-such-program"

    def test_a_program_of_a_command_s_name_is_not_run(self, start: Start, tmp_path: Path) -> None:
        """`compare` is the job's command, whatever else lies on PATH."""
        ours = re.findall(r"^ours='(.*)'$", (ROOT / "entrypoint.sh").read_text(), re.MULTILINE)[0].split()
        assert set(ours) >= {*COMMANDS, "train"}
        tool(tmp_path / "bin/compare", "#!/bin/sh\nexit 9\n")
        assert start("compare", "a", "b").started == "compare a b"

    def test_other_commands_need_none(self, start: Start, tmp_path: Path) -> None:
        """`config` and its like start at once; nobody looks for a GPU."""
        gpus(tmp_path, "13.0")
        for word in ("selftest", "verify", "plan"):
            assert start(word, "x").started == f"{word} x"
        assert not (tmp_path / "asked").exists()


class TestWithGpu:
    """What nvidia-smi says is logged once, and compared with what the image was built for."""

    H100 = "9.0, NVIDIA H100 80GB HBM3, 81559 MiB, 580.65.06"

    def test_the_files_of_imports_are_read_ahead(self, start: Start, tmp_path: Path) -> None:
        """While nvidia-smi answers and Python starts, the files that the image lists are read, those that exist."""
        gpus(tmp_path, "13.0", self.H100)
        os.mkfifo(pipe := tmp_path / "-a module\n")
        (tmp_path / "opt/read-ahead").write_text(f"{tmp_path}/missing\0{pipe}")
        done = start("run")
        assert (done.code, done.started) == (0, "run")
        assert len(done.events) == 1

        def is_read() -> bool:
            with suppress(OSError):  # nobody reads it yet
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
                return True
            return False

        wait_for(is_read)

    @pytest.mark.parametrize("banner", [BANNER, NEW_BANNER])
    def test_the_facts_are_logged(self, start: Start, tmp_path: Path, banner: str) -> None:
        """Equal GPUs are counted; the job starts in the same process, so that signals reach it."""
        gpus(tmp_path, "13.0", self.H100, self.H100, banner=banner)
        (tmp_path / "opt/triton/KEY").mkdir(parents=True)
        (tmp_path / "opt/triton/KEY/cuda_utils.so").touch()
        done = start("run")
        assert (done.code, done.started) == (0, "run")
        assert done.events == [f"GPUs: 2 {self.H100}; CUDA of driver 13.0, of image 13.0"]
        assert "CUDA_VISIBLE_DEVICES" not in done.environment
        assert done.pids[0] == done.pids[1]
        assert (tmp_path / "home/.triton/cache/KEY/cuda_utils.so").exists()

    @pytest.mark.parametrize(("driver", "image"), [("12.8", "13.0 7.5"), ("11.8", "12.6 6.0"), ("9.2", "12.6 6.0")])
    def test_a_driver_that_is_too_old_is_refused(self, start: Start, tmp_path: Path, driver: str, image: str) -> None:
        """Both versions are named, and both ways out."""
        gpus(tmp_path, driver, 'Field "compute_cap" is not a valid field to query.')
        done = start(image=image)
        assert (done.code, done.started) == (2, None)
        assert f"The driver serves CUDA {driver}, this image needs {image.partition(' ')[0]}: update" in done.events[-1]
        assert "infra/docker/README.md" in done.events[-1]

    @pytest.mark.parametrize(("driver", "image"), [("13.3", "13.0 7.5"), ("12.2", "12.6 6.0"), ("14.0", "13.0 7.5")])
    def test_a_driver_of_the_same_major_version_serves(
        self, start: Start, tmp_path: Path, driver: str, image: str
    ) -> None:
        """CUDA is compatible within a major version, and drivers with all that are older."""
        gpus(tmp_path, driver, self.H100)
        assert start(image=image).code == 0

    def test_a_driver_that_does_not_say_is_let_through(self, start: Start, tmp_path: Path) -> None:
        """What cannot be read is not taken for too old."""
        gpus(tmp_path, "N/A", "[N/A], GPU, 1 MiB, 580.65.06")
        assert start().code == 0

    @pytest.mark.parametrize(
        ("capability", "image", "code"),
        [
            ("6.0", "13.0 7.5", 2),
            ("6.0", "12.6 6.0", 0),
            ("7.0", "13.0 7.5", 2),
            ("7.5", "13.0 7.5", 0),
            ("12.0", "13.0 7.5", 0),
        ],
    )
    def test_a_gpu_that_is_too_old_is_refused(
        self, start: Start, tmp_path: Path, capability: str, image: str, code: int
    ) -> None:
        """A P100 (6.0) is no use to torch for CUDA 13, whatever lies beside it, and is welcome to that for 12.6."""
        gpus(tmp_path, "13.0", f"{capability}, Some GPU, 16384 MiB, 580.65.06", "12.0, New GPU, 1 MiB, 580.65.06")
        done = start(image=image)
        assert done.code == code
        if code:
            assert f"A GPU has compute capability {capability}, this image serves 7.5 and up" in done.events[-1]

    def test_the_demo_goes_on_without(self, start: Start, tmp_path: Path) -> None:
        """A GPU that is no use is hidden from a run that can do without one."""
        gpus(tmp_path, "13.0", "6.0, Tesla P100-PCIE-16GB, 16384 MiB, 580.65.06")
        done = start(JOB_PRESET="demo")
        assert (done.code, done.environment["CUDA_VISIBLE_DEVICES"]) == (0, "")

    @pytest.mark.parametrize(
        ("driver", "capability", "said"),
        [
            (None, "9.0", "nvidia-smi does not answer: a GPU or its driver is broken"),
            ("broken", "9.0", "No GPU is visible: give it one"),
            ("12.8", "9.0", "The driver serves CUDA 12.8, this image needs 13.0"),
            ("13.0", "6.0", "A GPU has compute capability 6.0"),
        ],
    )
    def test_another_node_of_kubernetes_may_serve(
        self, start: Start, tmp_path: Path, driver: str | None, capability: str, said: str
    ) -> None:
        """There the code is one that counts, and the message names the node."""
        gpus(tmp_path, driver or "13.0", f"{capability}, A GPU, 16384 MiB, 580.65.06")
        if driver in {None, "broken"}:
            tool(tmp_path / "bin/timeout", f"#!/bin/sh\nexit {124 if driver is None else 9}\n")
        done = start(KUBERNETES_SERVICE_HOST="10.0.0.1", KUBERNETES_NODE_NAME="gpu-7")
        assert (done.code, done.started) == (UnfitMachine.exit_code, None)
        assert done.events[-1].startswith(f"node gpu-7: {said}")
        assert (tmp_path / "termination-log").read_text() == done.events[-1]

    def test_an_nvidia_smi_that_no_signal_ends_is_not_waited_for(self, start: Start, tmp_path: Path) -> None:
        """It hangs in the kernel, and `timeout` waits for it; the entrypoint refuses the machine all the same."""
        script = tmp_path / "opt/entrypoint.sh"
        assert " -t 61 " in script.read_text()
        script.write_text(script.read_text().replace(" -t 61 ", " -t 0.3 "))
        tool(tmp_path / "bin/timeout", f"#!/bin/sh\necho $$ >{tmp_path}/hangs\necho half an answer\nexec sleep 50\n")
        (hangs := tmp_path / "hangs").touch()
        done = start(KUBERNETES_SERVICE_HOST="10.0.0.1")
        os.kill(int(wait_for(hangs.read_text)), signal.SIGKILL)  # it still hangs, or has not even begun
        assert (done.code, done.started) == (UnfitMachine.exit_code, None)
        assert done.events[-1].startswith("nvidia-smi does not answer")

    def test_a_signal_while_the_machine_is_checked_is_a_preemption(self, start: Start, tmp_path: Path) -> None:
        """Bash would end with 143, which a Job counts as a failure."""
        parent = "#!/bin/sh\nparent() { awk '/^PPid/ { print $2 }' /proc/$1/status; }\n"
        tool(tmp_path / "bin/nvidia-smi", f"{parent}kill -TERM $(parent $(parent $PPID))\nsleep 0.2\n")
        done = start()
        assert (done.code, done.started) == (Preempted.exit_code, None)
        assert "stopped by a signal" in done.events[-1]
        assert (tmp_path / "termination-log").read_text() == done.events[-1]

    def test_torch_without_cuda_is_refused(self, start: Start, tmp_path: Path) -> None:
        """An image that was built with another torch says so."""
        gpus(tmp_path, "13.0", self.H100)
        done = start(image="none 0.0", KUBERNETES_SERVICE_HOST="10.0.0.1")  # no other node helps
        assert done.code == 2
        assert "built without CUDA" in done.events[-1]


def test_arguments_arrive_as_they_are(start: Start) -> None:
    """Spaces and all."""
    assert start("plan", "--data.source", "a  b", "").started == "plan --data.source a  b"
