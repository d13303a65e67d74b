"""Environment variables that the job sets for libraries, before they are imported; it reads none here."""

from __future__ import annotations

import os

from job.common.resources import usable_cpus
from job.distributed.ranks import VARIABLES, Place, visible_gpu
from job.settings.load import environment, secret_files
from job.settings.secret_files import file_variable
from job.storage.azure_connection_string import azure_variables


def take_secret_files() -> None:
    """Gives libraries and child processes the secrets of `NAME_FILE` as `NAME`, which is also what the log hides.

    The path is then unset, as in the image, so that no process finds both. What cannot be read stays to be refused.
    """
    for name, secret in secret_files().items():
        os.environ[name] = secret
        del os.environ[file_variable(name)]


def configure_azure() -> None:
    """Gives obstore the Azure account's variables in the names that it reads."""
    for name, value in azure_variables(environment()).items():
        os.environ[name] = value


def configure_libraries(interface: str | None) -> None:
    """Sets the variables that libraries read when they are imported, unless the user has set them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP's threads would spin while they wait: beside other processes a CPU then needs four times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # cuBLAS reads it when CUDA starts; without it the same run gives other bits.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Warnings of torch's C++ code, such as about an address that does not answer, would be plain text among JSON lines.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # bitsandbytes has torch compile functions for devices that have no kernels in the library. The decorator alone
    # imports torch's compiler, 600 modules; nothing of the job is compiled.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # TRL and MLflow send telemetry when training starts, unless it is disabled.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # In a TrainJob transformers would report progress to Kubeflow from the training loop: after a resume with a wrong
    # remaining time, and 100 % when the run is preempted.
    os.environ.setdefault("DISABLE_KUBEFLOW_INTEGRATION", "TRUE")
    if interface is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def hide_all_gpus() -> None:
    """Makes the libraries compute on the CPU; they would use a GPU if there is one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def hide_other_gpus(place: Place | None) -> None:
    """Makes the libraries see a single process with a single GPU: the job itself coordinates several of them."""
    environ = environment()
    os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpu(environ, place.local_rank if place else 0)
    for name in VARIABLES:
        if name in environ:
            del os.environ[name]


def share_cpus(processes: int) -> None:
    """Limits OpenMP's threads to the CPUs that these processes may use: it does not know of a container's quota."""
    cpus = usable_cpus()
    if processes > 1 or cpus < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus // processes)))
