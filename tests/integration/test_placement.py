"""The placement of the base's 4-bit weights (device, sharded, main memory) changes no bit of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from job.runs.layout import facts_of
from tests.forked import Forks
from tests.helpers import alpaca_rows, arc_rows, deepened, write_jsonl
from tests.integration.runs_of_processes import go, metrics, results
from tests.integration.whole_runs import labelled


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> dict[str, str]:
    """A base of five layers, of which two are on the device; a validation and the export of the merged model."""
    folder = tmp_path_factory.mktemp("placement")
    write_jsonl(folder / "rows.jsonl", alpaca_rows(14))
    write_jsonl(folder / "questions.jsonl", arc_rows(7))
    return {
        "JOB_RUN__OUTPUT": str(folder / "out"),
        "JOB_RUN__SPOT_NOTICES": "off",
        "JOB_MODEL__ID": str(deepened(base_folder, folder / "base", 5)),
        "JOB_DATA__SOURCE": str(folder / "rows.jsonl"),
        "JOB_DATA__VALIDATION": "3",
        "JOB_EVAL__DATA": f"arc_easy={folder / 'questions.jsonl'}",
        "JOB_EVAL__BATCH_TOKENS": "150",
        "JOB_EVAL__PROMPTS": "2",
        "JOB_EVAL__PROMPTS_MAX_NEW_TOKENS": "5",
        "JOB_EVAL__FULL_PRECISION": "off",
        "JOB_TRAIN__GLOBAL_BATCH_SIZE": "5",
        "JOB_TRAIN__LEARNING_RATE": "2e-3",
        "JOB_TRAIN__MAX_LENGTH": "512",
        "JOB_TRAIN__MAX_STEPS": "4",
        "JOB_TRAIN__MICRO_BATCH_TOKENS": "150",
        "JOB_TRAIN__GRADIENT_CHECKPOINTING": "true",
        "JOB_LORA__DROPOUT": "0.1",
        "JOB_CHECKPOINT__EVERY_STEPS": "2",
        "JOB_EXPORT__FORMATS": "merged",
        "JOB_EXPORT__MERGE_ONTO": "dequantized",
        "JOB_LOG__FORMAT": "json",
    }


def run(forked: Forks, environment: Mapping[str, str], name: str, processes: int, **changes: str) -> list[int]:
    """A run in a folder of its own, so that it takes nothing from another."""
    return go(forked, of(environment, name), name, processes, **changes)


def of(environment: Mapping[str, str], name: str) -> dict[str, str]:
    """The environment of the run of this name."""
    output = f"{environment['JOB_RUN__OUTPUT']}-{name}"
    return {**environment, "JOB_RUN__OUTPUT": output, "JOB_STORAGE__CACHE": f"{output}-cache"}


def bits(environment: Mapping[str, str], name: str) -> tuple[list[float], dict[str, str]]:
    """The losses of a run, and the hash of every published file."""
    own = of(environment, name)
    return [step["loss"] for step in metrics(own, name)], facts_of(results(own, name))


def held(environment: Mapping[str, str], name: str) -> tuple[str, str]:
    """Where the manifest says that the base was, and why."""
    execution = results(of(environment, name), name)["training"]["execution"]
    return execution["base_held"], execution["reason"]


def test_sharded_over_two_processes(forked: Forks, environment: dict[str, str]) -> None:
    """Losses, adapter, answers, merged model: the bits of an unsharded run; killed, and resumed from the kept base."""
    assert run(forked, environment, "whole", 2) == [0, 0]
    sharded = {"JOB_MODEL__PLACEMENT": "sharded"}
    assert run(forked, environment, "sharded", 2, **sharded, JOB_FAULT="kill@step=3") == [-9, 1]
    assert run(forked, environment, "sharded", 2, **sharded) == [0, 0]
    assert held(environment, "whole")[0] == "gpu"
    place, why = held(environment, "sharded")
    assert (place, "JOB_MODEL__PLACEMENT" in why) == ("sharded", True)
    assert bits(environment, "sharded") == bits(environment, "whole")


@pytest.mark.long
def test_in_main_memory(forked: Forks, environment: dict[str, str]) -> None:
    """The same of one process whose base is in main memory; the attempt that was killed had it on the device."""
    assert run(forked, environment, "one", 1) == [0]
    assert run(forked, environment, "host", 1, JOB_FAULT="kill@step=3") == [-9]
    assert run(forked, environment, "host", 1, JOB_MODEL__PLACEMENT="host") == [0]
    assert held(environment, "host")[0] == "host"
    assert bits(environment, "host") == bits(environment, "one")


@pytest.mark.long
def test_preferences_with_a_sharded_base(forked: Forks, environment: dict[str, str]) -> None:
    """KTO: the reference's log-probabilities, the estimate of the divergence, the steps, by three processes."""
    source = write_jsonl(Path(environment["JOB_RUN__OUTPUT"]).parent / "kto.jsonl", labelled(11))
    plain = {name: value for name, value in environment.items() if "EXPORT" not in name and "PROMPTS" not in name}
    how = {"JOB_TRAIN__METHOD": "kto", "JOB_DATA__SOURCE": str(source)}
    assert run(forked, plain, "kto", 3, **how) == [0, 0, 0]
    assert run(forked, plain, "kto-sharded", 3, **how, JOB_MODEL__PLACEMENT="sharded") == [0, 0, 0]
    assert bits(plain, "kto-sharded") == bits(plain, "kto")
