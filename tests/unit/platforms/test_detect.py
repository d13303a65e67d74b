"""Which platform an environment belongs to, and the paths there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from job.errors import JobError, Problem, SettingsError, UnfitMachine, environment_name, error_of_process
from job.platforms.detect import Delivery, Platform, detect, is_foreign
from job.settings.load import foreign_variables, load_settings
from job.settings.schema import NAMES


def test_an_ordinary_environment_is_plain_docker() -> None:
    """Nothing is promised where nothing is known: no files, no name of the run."""
    assert detect({"PATH": "/bin", "HOME": "/root"}) == Platform(name="docker")


POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "train-x7k2p"}


def test_a_pod_has_a_termination_log_and_no_run_id() -> None:
    """Kubernetes reads the termination message; a pod's name changes with every retry, so it is no run id."""
    assert detect(POD) == Platform(name="kubernetes", termination_log=Path("/dev/termination-log"))


def test_the_job_s_name_is_the_run_s() -> None:
    """A template that passes the Job's name on gives every retry the same run."""
    assert detect({**POD, "KUBERNETES_JOB_NAME": "train"}).run_id == "train"
    assert detect({**POD, "KUBERNETES_JOB_NAME": ""}).run_id is None
    assert load_settings([], {**POD, "KUBERNETES_JOB_NAME": "train"}).run.id == "train"
    assert load_settings([], {**POD, "KUBERNETES_JOB_NAME": "train", "JOB_RUN__ID": "mine"}).run.id == "mine"


def test_the_termination_log_can_lie_elsewhere() -> None:
    """A template with a terminationMessagePath of its own tells the job where that is."""
    platform = detect({**POD, "KUBERNETES_TERMINATION_LOG": "/tmp/last-words"})
    assert platform.termination_log == Path("/tmp/last-words")


def test_a_machine_is_at_fault_where_there_are_others() -> None:
    """On Kubernetes settings that a machine does not meet end with a code that counts; elsewhere they are wrong."""
    for platform, kind in ((detect(POD), UnfitMachine), (detect({}), SettingsError)):
        with pytest.raises(JobError) as caught, platform.machine_checks():
            raise SettingsError([Problem("JOB_RUN__DEVICE", "is gpu, but torch finds no GPU")])
        assert (type(caught.value), str(caught.value)) == (kind, "JOB_RUN__DEVICE: is gpu, but torch finds no GPU")
    assert detect({**POD, "KUBERNETES_NODE_NAME": "gpu-7"}).node == "gpu-7"


def test_what_another_process_reported_is_not_the_machine_s_fault() -> None:
    """Wrong settings that another process found keep their code on Kubernetes, so that the run is not tried again."""
    error = error_of_process(SettingsError.exit_code, "process 0", "JOB_TRAIN__EPOCHS: is wrong")
    with pytest.raises(SettingsError) as caught, detect(POD).machine_checks():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(("index", "expected"), [("3", 3), ("0", 0), ("", None), ("x", None), ("-1", None)])
def test_a_pod_of_an_indexed_job_has_a_number(index: str, expected: int | None) -> None:
    """Kubernetes counts from 0; outside a pod the variable means nothing."""
    environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": index}
    assert detect(environ).completion_index == expected
    assert detect({"JOB_COMPLETION_INDEX": index}).completion_index is None


def test_a_sagemaker_job_has_its_files_and_its_name() -> None:
    """SageMaker's container contract: inputs in, model and failure out, the job's name is the run's, two minutes."""
    assert detect({"TRAINING_JOB_NAME": "alpaca-1"}) == Platform(
        name="sagemaker",
        hyperparameters=Path("/opt/ml/input/config/hyperparameters.json"),
        inputs=Path("/opt/ml/input"),
        delivery=Delivery(model=Path("/opt/ml/model"), data=Path("/opt/ml/output/data")),
        failure_file=Path("/opt/ml/output/failure"),
        run_id="alpaca-1",
        resources=Path("/opt/ml/input/config/resourceconfig.json"),
        output=Path("/opt/ml/checkpoints"),
        grace_seconds=120,
    )


def test_the_sagemaker_folder_can_lie_elsewhere(tmp_path: Path) -> None:
    """SAGEMAKER_BASE_DIR moves /opt/ml, as it does for SageMaker's own toolkit."""
    platform = detect({"TRAINING_JOB_NAME": "a", "SAGEMAKER_BASE_DIR": str(tmp_path)})
    assert platform.failure_file == tmp_path / "output/failure"
    assert platform.hyperparameters == tmp_path / "input/config/hyperparameters.json"


def test_sagemaker_wins_over_kubernetes() -> None:
    """A training job keeps its contract wherever Amazon runs it."""
    assert detect({"TRAINING_JOB_NAME": "a", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}).name == "sagemaker"


def test_an_empty_job_name_is_none() -> None:
    """A variable that was passed on empty does not make a platform."""
    assert detect({"TRAINING_JOB_NAME": ""}).name == "docker"


@pytest.mark.parametrize(
    "variable",
    [
        "JOB_SERVICE_HOST",
        "JOB_SERVICE_PORT",
        "JOB_PORT",
        "JOB_TRACKER_SERVICE_HOST",
        "JOB_TRACKER_SERVICE_PORT_HTTPS",
        "JOB_TRACKER_PORT",
        "JOB_TRACKER_PORT_443_TCP",
        "JOB_TRACKER_PORT_443_TCP_ADDR",
        "JOB_TRACKER_PORT_443_TCP_PORT",
        "JOB_METRICS_PORT",
    ],
)
def test_what_kubernetes_sets_by_itself_is_known(variable: str) -> None:
    """Links to Services whose names begin with "job" are no settings; only in a pod."""
    address = "tcp://10.0.0.1:443"
    assert Platform(name="kubernetes").sets(variable, "443" if variable.endswith("_PORT_443_TCP_PORT") else address)
    assert not Platform(name="docker").sets(variable, address)


@pytest.mark.parametrize("variable", ["JOB_METRICS_PORT", "JOB_PORT"])
def test_a_number_is_no_services_address(variable: str) -> None:
    """A typo of JOB_METRICS__PORT in a pod would otherwise silently disable metrics."""
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert load_settings([], {**pod, variable: "tcp://10.0.0.7:9464"}).metrics.port is None
    with pytest.raises(SettingsError, match=f"{variable}: is not a setting"):
        load_settings([], {**pod, variable: "9464"})


@pytest.mark.parametrize("variable", ["JOB_TRAIN__EPOCS", "JOB_TYPO", "JOB_NAMES", "JOB_STORAGE__PORTS", "JOB_EXPORT"])
def test_a_misspelt_setting_is_not_taken_for_the_platforms(variable: str) -> None:
    """The exemption is narrow: a wrong name stays an error in a pod, too."""
    assert not Platform(name="kubernetes").sets(variable)


@pytest.mark.parametrize(
    "variable",
    [
        *("JOB_NAME", "JOB_URL", "JOB_BASE_NAME", "JOB_ID", "JOB_DISPLAY_URL", "JOB_SPEC", "JOB_INDEX", "JOB_RUN_OCID"),
        *("JOB_ARRAY_SIZE", "JOB_DEFINITION_ARN", "JOB_QUEUE"),
    ],
)
@pytest.mark.parametrize("platform", ["docker", "kubernetes", "sagemaker"])
def test_what_a_ci_server_or_batch_system_sets_is_known_everywhere(
    variable: str, platform: Literal["docker", "kubernetes", "sagemaker"]
) -> None:
    """They start jobs on any platform, and pass their own JOB_ variables on."""
    assert Platform(name=platform).sets(variable)
    assert load_settings([], {variable: "nightly"})
    assert foreign_variables({variable: "nightly", "JOB_PRESET": "demo"}) == [variable]


def test_an_index_of_kubernetes_is_ignored_elsewhere() -> None:
    """A pod reads the index of its Indexed Job; in a container that only inherited it, it is named as ignored."""
    assert load_settings([], {"JOB_COMPLETION_INDEX": "3"})
    assert foreign_variables({"JOB_COMPLETION_INDEX": "3"}) == ["JOB_COMPLETION_INDEX"]
    assert foreign_variables({"JOB_COMPLETION_INDEX": "3", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}) == []


def test_no_setting_has_a_name_of_a_ci_server() -> None:
    """Whatever a setting is called, it is read and not ignored, and so is one with an underscore too few an error."""
    names = [environment_name(name) for name in NAMES]
    assert not any(is_foreign(name) or is_foreign(name.replace("__", "_")) for name in names)
