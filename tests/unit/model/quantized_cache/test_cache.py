"""Cached quantized bases: the same bits, or no base at all."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from structlog.testing import capture_logs

from job.common.hashing import sealed
from job.errors import AccessDenied, Preempted, Problem, SettingsError, Unreachable
from job.model.load_base import load_base
from job.model.model_record import describe_model
from job.model.quantized_cache.cache import find, publishing, save
from job.model.quantized_cache.layout import INDEX, CachedBase, CacheEntry, cached_base, entry_for
from job.model.tokenizer import load_tokenizer
from job.storage.open import ObjectStore, open_store
from tests.helpers import make_model
from tests.wrapped_store import FailNth, WrappedStore

FACTS = {"model": "0", "quantization": "nf4"}


def never() -> bool:
    """Has not to end."""
    return False


def nothing() -> None:
    """Is alive."""


def load(folder: Path, *, double: bool = True, dtype: torch.dtype = torch.float32, quantized: bool = False) -> Any:
    """The base, as the job loads it."""
    return load_base(
        folder,
        quantization="nf4",
        double_quantization=double,
        dtype=dtype,
        device=torch.device("cpu"),
        max_length=512,
        quantized=quantized,
    )


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Any:
    """The tiny base, freshly quantized."""
    return load(base_folder)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    """Where the runs put their results."""
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def kept(base: Any, base_folder: Path, store: ObjectStore, tmp_path: Path) -> CacheEntry:
    """An entry with the base on it, here and in the store."""
    entry = entry_for(FACTS, tmp_path / "here", store)
    save(base, base_folder, entry)
    with publishing(entry, never, nothing):
        pass
    return entry


def elsewhere(kept: CacheEntry, tmp_path: Path, store: ObjectStore | None = None) -> CacheEntry:
    """The same entry as another machine has it: with nothing on it but what the store has."""
    return entry_for(FACTS, tmp_path / "elsewhere", store or kept.store)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_base_has_the_bits_of_a_fresh_one(
    base_folder: Path, tmp_path: Path, dtype: torch.dtype, *, double: bool
) -> None:
    """Weights, constants of the quantization, what was not quantized: all bits and types, and the tokenizer."""
    fresh = load(base_folder, double=double, dtype=dtype)
    entry = entry_for(FACTS, tmp_path, None)
    save(fresh, base_folder, entry)
    folder = find(entry, nothing)
    assert folder
    again = load(folder, double=double, dtype=dtype, quantized=True)
    ours, theirs = again.state_dict(), fresh.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    state, other = (model.model.layers[0].self_attn.q_proj.weight.quant_state for model in (again, fresh))
    assert (state.dtype, state.blocksize, state.offset) == (other.dtype, other.blocksize, other.offset)
    assert load_tokenizer(folder).encode("Question: who?") == load_tokenizer(base_folder).encode("Question: who?")


def test_it_is_as_old_as_its_source(base_folder: Path, tmp_path: Path) -> None:
    """Transformers reads a tokenizer by the version beside the model: that of the source, not of who quantized it."""
    source = tmp_path / "source"
    shutil.copytree(base_folder, source)
    for version in ("4.34.0", None):
        config = json.loads((base_folder / "config.json").read_text())
        config.pop("transformers_version", None)
        (source / "config.json").write_text(json.dumps(config | ({"transformers_version": version} if version else {})))
        entry = entry_for({"version": version}, tmp_path, None)
        save(load(source), source, entry)
        assert find(entry, nothing)
        assert json.loads((entry.folder / "config.json").read_text()).get("transformers_version") == version
        assert torch.equal(load(entry.folder, quantized=True).lm_head.weight, load(source).lm_head.weight)


def test_it_is_described_alike(base_folder: Path, kept: CacheEntry) -> None:
    """The manifest says the same of a run that loaded the kept base."""
    records = [
        describe_model(model, name="x", revision=None, sha256="0")
        for model in (make_model(base_folder, quantization="nf4"), _with_adapter(kept.folder))
    ]
    assert records[0] == records[1]


def _with_adapter(folder: Path) -> Any:
    from job.model.lora import add_adapter
    from tests.helpers import LINEAR

    return add_adapter(load(folder, quantized=True), rank=16, alpha=16, dropout=0.0, target_modules=LINEAR, seed=1)


def test_another_machine_gets_it_from_the_store(kept: CacheEntry, tmp_path: Path) -> None:
    """Every file, whole; and then it lies there too."""
    entry = elsewhere(kept, tmp_path)
    folder = find(entry, nothing)
    assert folder == entry.folder
    assert contents(folder) == contents(kept.folder)
    assert find(entry_for(FACTS, tmp_path / "elsewhere", None), nothing) == folder


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_not_kept_is_not_found(tmp_path: Path, store: ObjectStore) -> None:
    """Neither here nor there; and other facts are another base."""
    entry = entry_for(FACTS, tmp_path / "here", store)
    assert find(entry, nothing) is None
    assert entry_for({**FACTS, "quantization": "none"}, tmp_path / "here", store).key != entry.key
    with publishing(entry, never, nothing), publishing(None, never, nothing):
        pass
    assert list(store.list("bases/")) == []


def flip(path: Path) -> None:
    """Changes the last bit of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: flip(next(folder.glob("*.safetensors"))),
        lambda folder: flip(folder / "tokenizer.json"),
        lambda folder: flip(folder / INDEX),
        lambda folder: (folder / INDEX).unlink(),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "more.json").write_text("{}"),
    ],
    ids=["weights", "tokenizer", "index", "no index", "a file less", "a file more"],
)
def test_a_damaged_one_is_dropped(kept: CacheEntry, spoil: Callable[[Path], None]) -> None:
    """Whatever is wrong with what lies here, it is not loaded: it goes, and the store's takes its place."""
    good = contents(kept.folder)
    spoil(kept.folder)
    with capture_logs() as logs:
        assert find(CacheEntry(kept.key, kept.folder, None), nothing) is None
    assert [line["event"] for line in logs] == ["the quantized base is damaged: the base is quantized again"]
    assert not kept.folder.exists()
    assert find(kept, nothing) == kept.folder
    assert contents(kept.folder) == good


@pytest.mark.parametrize("ending", [".safetensors", "tokenizer.json", INDEX])
def test_a_damaged_one_in_the_store_is_put_there_anew(
    base: Any, base_folder: Path, kept: CacheEntry, tmp_path: Path, ending: str
) -> None:
    """It is not loaded, and the attempt that quantizes the base again stores it again."""
    flip(next(path for path in (tmp_path / "store/bases").rglob("*") if path.name.endswith(ending)))
    entry = elsewhere(kept, tmp_path)
    with capture_logs() as logs:
        assert find(entry, nothing) is None
    assert [line["event"] for line in logs] == ["the quantized base is damaged: the base is quantized again"]
    assert not entry.folder.exists()
    save(base, base_folder, entry)
    with publishing(entry, never, nothing):
        pass
    third = entry_for(FACTS, tmp_path / "third", kept.store)
    assert find(third, nothing) == third.folder


@pytest.mark.parametrize("name", ["../../escaped.json", "/tmp/escaped.json", "a/b.json", "weights.bin", "run.py"])
def test_no_file_leaves_its_folder(kept: CacheEntry, tmp_path: Path, name: str) -> None:
    """Names from a store are hostile: neither a path nor a pickle nor code is fetched."""
    assert kept.store
    index = {name: {"bytes": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}}
    kept.store.write(f"bases/{kept.key}/{INDEX}", sealed(index))
    asked: list[str] = []
    watched = WrappedStore(kept.store, before=lambda verb, key: asked.append(verb))
    assert find(elsewhere(kept, tmp_path, watched), nothing) is None
    assert "download" not in asked
    assert not list(tmp_path.rglob("escaped.json"))


def test_a_disk_that_is_full_costs_a_warning(
    base: Any, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on, and nothing half is left."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(base), "save_pretrained", full)
    entry = entry_for(FACTS, tmp_path, None)
    with capture_logs() as logs:
        save(base, base_folder, entry)
    assert [line["event"] for line in logs] == ["the quantized base cannot be kept"]
    assert list((tmp_path / "bases").iterdir()) == []


def test_whatever_goes_wrong_in_keeping_costs_a_warning(
    base: Any, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safetensors and transformers raise what they like: a full disk, a base that came quantized; no disk at all."""
    for error in (SafetensorError("No space left on device"), NotImplementedError("reverse_op")):
        monkeypatch.setattr(type(base), "save_pretrained", Mock(side_effect=error))
        save(base, base_folder, entry := entry_for(FACTS, tmp_path, None))
        assert not entry.folder.exists()
    monkeypatch.undo()
    monkeypatch.setattr("job.model.quantized_cache.cache.check_disk", Mock(side_effect=Unreachable("too small")))
    save(base, base_folder, entry)
    assert not entry.folder.exists()


@pytest.mark.parametrize("error", [AccessDenied("403"), Unreachable("503"), SettingsError([Problem("x", "y")])])
def test_a_store_that_refuses_bases_costs_a_warning(kept: CacheEntry, tmp_path: Path, error: Exception) -> None:
    """A role may have rights on its run alone: the job goes on without the base. What ends a job ends it here too."""
    store = Mock(wraps=kept.store, uri="s3://b", read=Mock(side_effect=error))
    with capture_logs() as logs:
        assert find(elsewhere(kept, tmp_path, store), nothing) is None
    assert [line["event"] for line in logs] == ["the quantized base cannot be fetched"]
    with pytest.raises(Preempted):
        find(elsewhere(kept, tmp_path), Mock(side_effect=Preempted("SIGTERM")))


def test_who_comes_second_has_kept_nothing(base: Any, base_folder: Path, tmp_path: Path) -> None:
    """Two runs that quantize the same at once: only the first may say that its own bits lie there."""
    entry = entry_for(FACTS, tmp_path, None)
    first = save(base, base_folder, entry)
    assert first == cached_base(entry)
    assert first.key
    (entry.folder / INDEX).write_bytes((entry.folder / INDEX).read_bytes() + b"\n")
    assert save(base, base_folder, entry) == CachedBase()


def test_a_spoiled_index_in_the_store_is_written_again(kept: CacheEntry, tmp_path: Path) -> None:
    """A later attempt expects the recorded index, finds another, and stores its own."""
    assert kept.store
    key, noted = f"bases/{kept.key}/{INDEX}", cached_base(kept).index_sha256
    kept.store.write(key, b"{")
    with capture_logs() as logs:
        assert find(replace(elsewhere(kept, tmp_path), index_sha256=noted), nothing) is None
    assert ["not the one with which the run began" in line["why"] for line in logs] == [True]
    with publishing(kept, never, nothing):
        pass
    assert find(replace(elsewhere(kept, tmp_path), index_sha256=noted), nothing)


def test_only_the_base_that_was_noted_will_do(kept: CacheEntry, tmp_path: Path) -> None:
    """The same key is no proof of the same bits: neither here nor from the store another index is taken."""
    noted = cached_base(kept)
    assert noted.key == kept.key
    assert noted.index_sha256
    assert find(replace(kept, index_sha256=noted.index_sha256), nothing)
    assert find(replace(kept, index_sha256="0" * 64), nothing) is None
    assert kept.folder.exists()
    assert find(replace(elsewhere(kept, tmp_path), index_sha256="0" * 64), nothing) is None
    assert find(replace(elsewhere(kept, tmp_path), index_sha256=noted.index_sha256), nothing)
    assert cached_base(None) == cached_base(entry_for({}, tmp_path, None)) == CachedBase()


def test_trouble_with_this_disk_deletes_nothing(
    kept: CacheEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that cannot be written, or removed, says nothing of what the store has."""
    assert kept.store
    before = [info.key for info in kept.store.list("bases/")]
    monkeypatch.setattr(
        "job.model.quantized_cache.cache.new_folder", Mock(side_effect=PermissionError(13, "Permission denied"))
    )
    assert find(elsewhere(kept, tmp_path), nothing) is None
    monkeypatch.undo()
    flip(kept.folder / "tokenizer.json")
    monkeypatch.setattr("job.model.quantized_cache.cache.shutil.rmtree", Mock())
    assert find(kept, nothing) is None
    assert [info.key for info in kept.store.list("bases/")] == before


def test_an_index_of_any_size_and_claim_costs_a_warning(kept: CacheEntry, tmp_path: Path) -> None:
    """Neither one that is too large to read nor one that claims a disk is an error of the run."""
    assert kept.store
    index = {"model.safetensors": {"bytes": 10**18, "sha256": "0" * 64}}
    for data in (b" " * (17 << 20), sealed(index)):
        (path := tmp_path / "index").write_bytes(data)
        kept.store.upload(path, f"bases/{kept.key}/{INDEX}")
        assert find(elsewhere(kept, tmp_path), nothing) is None


def test_what_a_kill_left_goes_after_a_day(base: Any, base_folder: Path, tmp_path: Path) -> None:
    """And not before: it may be another process's."""
    for name, age in (("old", 90_000), ("young", 60)):
        (left := tmp_path / f"bases/.new-{name}").mkdir(parents=True)
        os.utime(left, (time.time() - age,) * 2)
    save(base, base_folder, entry_for(FACTS, tmp_path, None))
    assert {path.name for path in (tmp_path / "bases").glob(".new-*")} == {".new-young"}


def test_a_job_that_is_stopped_begins_no_other_file(
    base: Any, base_folder: Path, store: ObjectStore, tmp_path: Path
) -> None:
    """Also when no exception says so: the work was done, and the deadline holds all the same."""
    entry = entry_for(FACTS, tmp_path / "here", store)
    save(base, base_folder, entry)
    with publishing(entry, lambda: True, nothing):
        pass
    assert list(store.list("bases/")) == []


def test_a_store_that_fails_costs_a_warning(base: Any, base_folder: Path, store: ObjectStore, tmp_path: Path) -> None:
    """Whichever request fails, there is a whole base in the store or none, and the next run completes it."""
    entry = entry_for(FACTS, tmp_path / "here", store)
    save(base, base_folder, entry)
    files = len(list(entry.folder.iterdir()))
    for nth in range(files):
        broken = WrappedStore(store, before=FailNth(nth, Unreachable("gone")))
        with capture_logs() as logs, publishing(CacheEntry(entry.key, entry.folder, broken), never, nothing):
            pass
        assert [line["event"] for line in logs] == ["the quantized base cannot be published"]
        assert find(elsewhere(entry, tmp_path), nothing) is None
        for info in list(store.list("bases/")):
            store.delete(info.key)
    with publishing(entry, never, nothing):
        pass
    assert find(elsewhere(entry, tmp_path), nothing)


def test_what_is_there_is_not_put_there_again(kept: CacheEntry) -> None:
    """Another run of the same model uploads nothing; after a broken upload only what is missing."""
    assert kept.store
    asked: list[str] = []
    watched = CacheEntry(kept.key, kept.folder, WrappedStore(kept.store, before=lambda verb, _key: asked.append(verb)))
    with publishing(watched, never, nothing):
        pass
    assert asked == ["list", "read"]
    kept.store.delete(f"bases/{kept.key}/{INDEX}")
    victim = next(info.key for info in kept.store.list(f"bases/{kept.key}/"))
    kept.store.delete(victim)
    with publishing(watched, never, nothing):
        pass
    assert asked[2:] == ["list", "upload", "write"]


def test_a_job_that_has_to_end_waits_for_one_file_at_most(
    base: Any, base_folder: Path, store: ObjectStore, tmp_path: Path
) -> None:
    """The file in hand is finished, no other one is begun, and the base does not count."""
    entry = entry_for(FACTS, tmp_path / "here", store)
    save(base, base_folder, entry)
    uploading, go_on, uploads = threading.Event(), threading.Event(), []

    def slow(verb: str, key: str) -> None:
        if verb == "upload":
            uploads.append(key)
            uploading.set()
            assert go_on.wait(60)

    def preempted() -> None:
        with publishing(CacheEntry(entry.key, entry.folder, WrappedStore(store, before=slow)), never, nothing):
            assert uploading.wait(60)
            threading.Timer(0.2, go_on.set).start()
            raise Preempted("stopped")

    with pytest.raises(Preempted):
        preempted()
    assert len(uploads) == 1
    assert find(elsewhere(entry, tmp_path), nothing) is None


def test_a_download_ends_when_the_job_has_to(kept: CacheEntry, tmp_path: Path) -> None:
    """Between two files; nothing half is left."""

    def stop() -> None:
        raise Preempted("stopped")

    entry = elsewhere(kept, tmp_path)
    with pytest.raises(Preempted):
        find(entry, stop)
    assert list((tmp_path / "elsewhere/bases").iterdir()) == []


def test_two_runs_at_once_do_not_mix(base: Any, base_folder: Path, store: ObjectStore, tmp_path: Path) -> None:
    """Two machines that put different bytes under one key leave one base, whole."""
    shelves = [entry_for(FACTS, tmp_path / name, store) for name in ("a", "b")]
    for entry in shelves:
        save(base, base_folder, entry)
    tokenizer = shelves[1].folder / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "more": 1}))
    index = json.loads((shelves[1].folder / INDEX).read_text())
    from job.common.hashing import hash_file

    index[tokenizer.name] = {"bytes": tokenizer.stat().st_size, "sha256": hash_file(tokenizer)}
    (shelves[1].folder / INDEX).write_bytes(sealed(index))
    meeting = threading.Barrier(2)

    def publish(entry: CacheEntry) -> None:
        def meet(verb: str, _key: str) -> None:
            if verb == "list":
                meeting.wait(60)

        with publishing(CacheEntry(entry.key, entry.folder, WrappedStore(store, before=meet)), never, nothing):
            pass

    threads = [threading.Thread(target=publish, args=[entry]) for entry in shelves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    third = elsewhere(shelves[0], tmp_path)
    assert find(third, nothing)
    assert contents(third.folder) in [contents(entry.folder) for entry in shelves]
