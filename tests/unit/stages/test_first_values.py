"""Initial values from data or weights: computed once in a run, the same after a restart; new tokens as loaded."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from job.data.batch_plan import Steps
from job.distributed.processes import ALONE, Alone, Processes
from job.errors import DataError, Problem
from job.model.adapter_options import AdapterOptions
from job.model.lora import trainable
from job.model.tokenizer import load_tokenizer
from job.records import Artifact, DatasetRecord, FirstValues, Pulled
from job.settings.load import Settings, load_settings
from job.stages import first_values
from job.stages.first_values import EVA_BATCHES, EVA_TOKENS, begin_alike, eva_batches, put_first_values
from job.stages.handoff import Sources
from job.stages.load import load
from tests.helpers import make_examples, make_model
from tests.unit.distributed.test_process_group import Team

EXAMPLES = make_examples(12, shortest=30)


class Kept:
    """Of an attempt what is used here: its store is a folder, its records are in memory."""

    def __init__(self, folder: Path, processes: Processes = ALONE) -> None:
        self.store, self.work, self.records = folder / "store", folder / "work", dict[str, str]()
        self.processes = processes

    def check_stop(self) -> None:
        """Goes on."""

    def recorded(self, name: str, kind: Any) -> Any:
        """What was kept."""
        return TypeAdapter(kind).validate_json(self.records[name]) if name in self.records else None

    def write_record(self, name: str, record: str) -> None:
        """Keeps a record."""
        self.records[name] = record

    def publish(self, path: Path, key: str) -> Artifact:
        """Copies the file."""
        target = self.store / key
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        return Artifact(key, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())

    def fetch(self, artifact: Artifact) -> Path:
        """The file, if it is what was published."""
        path = self.store / artifact.path
        if hashlib.sha256(path.read_bytes()).hexdigest() != artifact.sha256:
            raise DataError([Problem(artifact.path, "is damaged")])
        return path


def settings_of(base_folder: Path, **changes: str) -> Settings:
    """A small run on the tiny base, in one layer of two."""
    fixed = {"JOB_MODEL__ID": str(base_folder), "JOB_TRAIN__MAX_LENGTH": "512", "JOB_TRAIN__GLOBAL_BATCH_SIZE": "4"}
    return load_settings([], {**fixed, "JOB_LORA__RANK": "4", "JOB_LORA__LAYERS": "1", **changes})


def sources_of(settings: Settings, folder: Path) -> Sources:
    """As the pull stage would find them."""
    data = DatasetRecord("rows", None, "train", "text", len(EXAMPLES), {}, "0" * 64, 1, 1, 1)
    tokenizer = load_tokenizer(folder, settings.model.add_tokens)
    record = Pulled(data, "0" * 64, None, {})
    return Sources(record=record, folder=folder, quantized=False, tokenizer=tokenizer, examples=EXAMPLES, validation=[])


def begun(settings: Settings, folder: Path, attempt: Kept) -> dict[str, torch.Tensor]:
    """The adapter's first values, of a model that is loaded anew."""
    sources: Any = sources_of(settings, folder)
    begin = partial(put_first_values, attempt, settings.lora.init, sources)  # type: ignore[arg-type]
    return {name: p.detach().clone() for name, p in trainable(load(settings, sources, begin=begin).model).items()}


@pytest.mark.parametrize("init", [pytest.param("eva", marks=pytest.mark.long), "loftq"])
def test_they_are_computed_once(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str) -> None:
    """A restart before the first checkpoint reads them, to the bit; damaged ones are computed again, the same."""
    settings, attempt = settings_of(base_folder, JOB_LORA__INIT=init), Kept(tmp_path)
    first = begun(settings, base_folder, attempt)
    assert any(bool(value.any()) for name, value in first.items() if ".lora_A." in name)
    (artifact,) = attempt.recorded("first-values", FirstValues).artifacts
    computed: list[str] = []
    for name in ("init_eva", "init_loftq"):
        monkeypatch.setattr(first_values, name, partial(counted, computed, getattr(first_values, name)))
    again = begun(settings, base_folder, attempt)
    assert not computed
    (tmp_path / "store" / artifact.path).write_bytes(b"damaged")
    once_more = begun(settings, base_folder, attempt)
    assert len(computed) == 1
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, once_more[name]), name


@pytest.mark.long
def test_all_processes_begin_alike(base_folder: Path, tmp_path: Path) -> None:
    """Three processes on two machines begin with the values, to the bit, that one process publishes and begins with."""
    settings = settings_of(base_folder, JOB_LORA__INIT="eva")
    sources: Any = sources_of(settings, base_folder)
    models = [make_model(base_folder, rank=4, options=AdapterOptions(init="eva")) for _ in range(4)]
    alone = Kept(tmp_path / "alone")
    steps = Steps(EXAMPLES, seed=0, global_batch_size=4, total=6)
    put_first_values(alone, "eva", sources, models[0], steps)  # type: ignore[arg-type]
    team = Team()
    attempts = [Kept(tmp_path / "team", member) for member in team.members]

    def begin(attempt: Any, model: Any, _: Processes) -> None:
        put_first_values(attempt, "eva", sources, model, steps)

    for done in team.start(*(partial(begin, *each) for each in zip(attempts, models[1:], strict=True))):
        done.result(60)
    assert [attempt.records for attempt in attempts] == [alone.records, {}, {}]  # the same file, by its hash
    for model in models[1:]:
        for name, value in trainable(models[0]).items():
            assert torch.equal(value, trainable(model)[name]), name


class Two(Alone):
    """Two processes in one; `other` has the values of the first, and of this second one it has none yet."""

    leads = False

    def __init__(self, other: Sequence[torch.Tensor]) -> None:
        self.other = iter(other)

    def gather(self, what: str, value: Any) -> list[Any]:
        """The first process has another hash."""
        return ["other", value]

    def all_reduce(self, tensor: Any) -> None:
        """Adds what the first process has."""
        tensor += next(self.other)


def test_another_machines_decomposition_is_not_kept(base_folder: Path) -> None:
    """A process whose adapter differs in a bit from that of process 0 gets that one."""
    theirs, mine = (make_model(base_folder) for _ in range(2))
    wanted = {name: parameter.detach().clone() for name, parameter in trainable(theirs).items()}
    name, parameter = next(iter(trainable(mine).items()))
    parameter.data.view(torch.int32).view(-1)[0] ^= 1
    assert not torch.equal(parameter, wanted[name])
    begin_alike(Two(list(wanted.values())), mine)
    assert all(torch.equal(value, wanted[name]) for name, value in trainable(mine).items())


def counted(calls: list[str], function: Any, *args: Any) -> Any:
    """Calls the function, and notes it."""
    calls.append(function.__name__)
    return function(*args)


def test_eva_sees_the_first_rows_of_the_plan() -> None:
    """In the order of the steps, in micro-batches of their own size; one by one where sequences are not packed."""
    steps = Steps(EXAMPLES, seed=0, global_batch_size=4, total=6)
    packed, alone = (eva_batches(steps, packed=packed) for packed in (True, False))
    assert all(sum(len(example.input_ids) for example in batch) <= EVA_TOKENS for batch in packed)
    assert {len(batch) for batch in alone} == {1}
    assert sum(len(batch) for batch in packed) == len(alone) == 2 * len(EXAMPLES) <= EVA_BATCHES
    assert {batch[0].input_ids for batch in alone[:12]} == {example.input_ids for example in EXAMPLES}


def test_new_tokens_have_rows_and_are_recorded(base_folder: Path) -> None:
    """The model is loaded with room for them, and trains their rows beside the adapter; the record names them."""
    settings = settings_of(base_folder, JOB_MODEL__ADD_TOKENS="<ask>,<tell>", JOB_MODEL__QUANTIZATION="none")
    loaded = load(settings, sources_of(settings, base_folder))
    assert loaded.record.added_tokens == ["<ask>", "<tell>"]
    rows = {name: p.shape for name, p in trainable(loaded.model).items() if "trainable_tokens_delta" in name}
    assert list(rows.values()) == [(2, 128), (2, 128)]
    assert loaded.packing.packed
    assert loaded.record.trainable_parameters == sum(p.numel() for p in trainable(loaded.model).values())
