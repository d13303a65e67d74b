"""The adapter that training starts from: loaded bit by bit if it fits, otherwise refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from job.errors import DataError, JobError, SettingsError
from job.model.adapter_files import save_adapter
from job.model.adapter_options import AdapterOptions
from job.model.lora import trainable
from job.model.published_names import PublishedNames
from job.model.start_adapter import CONFIG, WEIGHTS, check_start, check_start_fits, find_start, hash_start, load_start
from job.storage.open import StorageOptions, open_store
from tests.dataset_hub import COMMIT, OTHER, Hub, ask, serving
from tests.helpers import fill_adapter, make_model
from tests.s3_server import BUCKET, credentials, moto_server

NAMES = PublishedNames("")


@pytest.fixture(scope="module")
def saved(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A filled adapter of the tiny base, as the job publishes it."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(fill_adapter(make_model(base_folder)), folder, base="base", revision=None, names=NAMES)
    return folder


def test_an_adapter_is_loaded_bit_by_bit(saved: Path, base_folder: Path) -> None:
    """What the job published is found by its path, fits, and is in the model afterwards."""
    folder = find_start(str(saved), Path("unused"), StorageOptions()).folder
    check_start(folder, rank=16, alpha=16)
    model = make_model(base_folder)
    load_start(model, folder, NAMES)
    expected = trainable(fill_adapter(make_model(base_folder)))
    assert all(torch.equal(parameter, expected[name]) for name, parameter in trainable(model).items())


def config(**changes: Any) -> Callable[[Path], None]:
    """Changes fields of the adapter's configuration."""

    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), encoding="utf-8")

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Changes the adapter's tensors."""

    def write(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return write


def pickled(folder: Path) -> None:
    """Leaves a pickle where safetensors were."""
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    """Writes a NaN into one of the tensors."""
    next(iter(tensors.values()))[0, 0] = torch.nan


WRONG: dict[str, tuple[Callable[[Path], None], type[JobError], str]] = {
    "rank": (config(r=8), SettingsError, "JOB_LORA__RANK"),
    "scale": (config(lora_alpha=32), SettingsError, "JOB_LORA__ALPHA"),
    "another method": (config(peft_type="IA3"), SettingsError, "only LoRA"),
    "DoRA": (config(use_dora=True), SettingsError, "JOB_LORA__USE_DORA"),
    "rank by layer": (config(rank_pattern={"q_proj": 4}), SettingsError, "JOB_LORA__RANK_PATTERN"),
    "trained whole": (config(modules_to_save=["lm_head"]), SettingsError, "JOB_LORA__MODULES_TO_SAVE"),
    "changed base": (config(init_lora_weights="pissa"), SettingsError, "changes the base"),
    "pickle": (pickled, DataError, "pickle"),
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), DataError, CONFIG),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{") and None, DataError, "cannot|can be read"),
    "cut": (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99) and None, DataError, "is no safetensors file"),
    "NaN": (weights(spoil), DataError, "not finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_without_the_base(case: str, saved: Path, tmp_path: Path) -> None:
    """Each refusal says why, in terms of the settings."""
    change, kind, why = WRONG[case]
    folder = Path(shutil.copytree(saved, tmp_path / "adapter"))
    change(folder)
    with pytest.raises(kind, match=why):
        check_start(find_start(str(folder), Path("unused"), StorageOptions()).folder, rank=16, alpha=16)


def test_modules_and_tokens_have_to_be_the_same(base_folder: Path, tmp_path: Path) -> None:
    """An adapter with a whole module and rows of new tokens goes on as it is; other tokens or modules are refused."""
    options = AdapterOptions(modules_to_save=("lm_head",), added_tokens=("<ask>", "<tell>"))
    trained = fill_adapter(make_model(base_folder, options=options))
    save_adapter(trained, tmp_path, base="base", revision=None, names=NAMES)
    wanted: dict[str, Any] = {"rank": 16, "alpha": 16, "options": {"modules_to_save": ["lm_head"]}}
    check_start(tmp_path, **wanted, added_tokens=["<ask>", "<tell>"])
    model = make_model(base_folder, options=options)
    load_start(model, tmp_path, NAMES)
    expected = trainable(trained)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in trainable(model).items())
    with pytest.raises(SettingsError, match=r"JOB_LORA__MODULES_TO_SAVE: is empty, but the adapter .* has lm_head"):
        check_start(tmp_path, rank=16, alpha=16)
    config(trainable_token_indices={"model.embed_tokens": [398, 399]})(tmp_path)
    with pytest.raises(SettingsError, match="does not fit JOB_MODEL__ADD_TOKENS"):
        load_start(model, tmp_path, NAMES)


@pytest.mark.parametrize("change", [lambda t: t.popitem(), lambda t: t.update({"x": torch.zeros(1)})])
def test_other_layers_are_refused(change: Any, saved: Path, base_folder: Path, tmp_path: Path) -> None:
    """A tensor too few or too many means another base or other target modules."""
    folder = Path(shutil.copytree(saved, tmp_path / "adapter"))
    weights(change)(folder)
    with pytest.raises(SettingsError, match="JOB_LORA__TARGET_MODULES"):
        load_start(make_model(base_folder), folder, NAMES)


def empty_base(folder: Path, **changes: int) -> Any:
    """The base with another configuration, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **changes))


@pytest.mark.parametrize(
    ("rank", "options"),
    [
        (16, AdapterOptions()),
        (4, AdapterOptions(layers=(1,), rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 3})),
        (16, AdapterOptions(use_dora=True, modules_to_save=("lm_head",), added_tokens=("<ask>",))),
    ],
)
def test_what_was_saved_fits_without_the_weights(
    rank: int, options: AdapterOptions, base_folder: Path, tmp_path: Path
) -> None:
    """With the same settings; of others, those with another layer or rank are refused."""
    save_adapter(make_model(base_folder, rank=rank, options=options), tmp_path, base="base", revision=None, names=NAMES)
    empty = empty_base(base_folder)
    check_start_fits(tmp_path, empty, targets="auto", rank=rank, options=options)
    for other in ({"targets": "attention"}, {"rank": rank + 1}, {"options": replace(options, layers=(0,))}):
        with pytest.raises(SettingsError, match="JOB_LORA__START: does not fit JOB_MODEL__ID and JOB_LORA__TARGET"):
            check_start_fits(tmp_path, empty, **{"targets": "auto", "rank": rank, "options": options} | other)


def test_rows_of_new_tokens_are_compared_with_all_else(saved: Path) -> None:
    """An adapter without them cannot go on with new tokens, and is refused together with what else does not fit."""
    with pytest.raises(SettingsError, match="it trains no rows of new tokens") as refused:
        check_start(saved, rank=8, alpha=16, added_tokens=["<ask>"])
    assert [problem.where for problem in refused.value.problems] == ["JOB_LORA__RANK", "JOB_LORA__START"]


@pytest.mark.parametrize("tokens", [None, ["<tell>", "<ask>"], ["<ask>"]])
def test_other_tokens_of_the_same_ids_are_refused(saved: Path, tmp_path: Path, tokens: list[str] | None) -> None:
    """In another order they have the same ids: each would go on with the other's row."""
    folder = Path(shutil.copytree(saved, tmp_path / "adapter"))
    config(trainable_token_indices={"embed_tokens": [398, 399]})(folder)
    there = [{"id": 0, "content": "<s>"}, {"id": 398, "content": "<ask>"}, {"id": 399, "content": "<tell>"}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": there}), encoding="utf-8")
    check_start(folder, rank=16, alpha=16, added_tokens=["<ask>", "<tell>"])
    with pytest.raises(SettingsError, match="does not fit JOB_MODEL__ADD_TOKENS: it trains"):
        check_start(folder, rank=16, alpha=16, added_tokens=tokens)


@pytest.mark.parametrize("changes", [{"intermediate_size": 192}, {"num_hidden_layers": 3}])
def test_an_adapter_of_another_base_is_refused_without_the_weights(
    changes: dict[str, int], saved: Path, base_folder: Path
) -> None:
    """A base of another shape, or with more layers."""
    with pytest.raises(SettingsError, match="belongs to another model: base_model"):
        check_start_fits(saved, empty_base(base_folder, **changes), targets="auto", rank=16, options=AdapterOptions())


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    """It is not taken for a name on the hub."""
    with pytest.raises(DataError, match=r"JOB_LORA__START: .* does not exist"):
        find_start(str(tmp_path / "none"), tmp_path, StorageOptions())


def test_the_hash_is_over_both_files(saved: Path, tmp_path: Path) -> None:
    """A changed scale is another start as well as a changed number."""
    found = {hash_start(saved)}
    for name, change in (("scale", config(lora_alpha=32)), ("number", weights(spoil))):
        folder = Path(shutil.copytree(saved, tmp_path / name))
        change(folder)
        found.add(hash_start(folder))
    assert len(found) == 3


CLIENT = """
import json, sys
from pathlib import Path
from job.errors import JobError
from job.model.start_adapter import find_start, hash_start
from job.storage.open import StorageOptions

for place in json.loads(sys.argv[1]):
    place, _, known = place.partition(" of commit ")
    try:
        found = find_start(place, Path("unused"), StorageOptions(), known or None)
        print(json.dumps([hash_start(found.folder), found.commit]))
    except JobError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""
"""In a process of its own: the hub's library reads its address when it is imported."""


def hub_of(commits: Mapping[str, Path]) -> type[Hub]:
    """A hub with `some/adapter`: for each commit its files, the newest commit first; `@nothing` is not there."""

    class Adapters(Hub):
        """What the hub's library asks for a snapshot."""

        def do_GET(self) -> None:  # noqa: N802 - of http.server
            """Answers for metadata, listings and files."""
            path = self.path.split("?")[0]
            commit = next((name for name in commits if name in path), next(iter(commits)))
            file = commits[commit] / path.rpartition("/")[2]
            if path.endswith("/nothing"):
                self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif "/tree/" in path:
                sizes = {found.name: found.stat().st_size for found in commits[commit].iterdir()}
                listed = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
                self._answer(200, json.dumps(listed).encode())
            elif path.startswith("/some/adapter/resolve/") and file.is_file():
                etag = f'"{commit[:9]}{file.name}"'
                self._answer(200, file.read_bytes(), {"ETag": etag, "X-Repo-Commit": commit})
            elif path.startswith("/api/models/some/adapter"):
                siblings = [{"rfilename": found.name} for found in commits[commit].iterdir()]
                self._answer(200, json.dumps({"id": "some/adapter", "sha": commit, "siblings": siblings}).encode())
            else:
                super().do_GET()

    return Adapters


def test_an_adapter_of_the_hub_is_of_the_revision_that_is_named(saved: Path, tmp_path: Path) -> None:
    """Behind `@` is a commit or a branch; without one it is the newest; a revision that is not there is named.

    The commit of an earlier attempt goes before all of them: the branch may have moved.
    """
    older = Path(shutil.copytree(saved, tmp_path / "older"))
    config(lora_alpha=32)(older)
    (saved / "README.md").write_text("card")

    places = ["some/adapter", f"some/adapter@{OTHER}", "some/adapter@main", "some/adapter@nothing", "some/missing"]
    places += [f"some/adapter@main of commit {OTHER}", f"some/adapter of commit {OTHER}"]
    with serving(hub_of({COMMIT: saved, OTHER: older})) as endpoint:
        found = ask(endpoint, tmp_path / "home", *places, client=CLIENT)
    new, old = [hash_start(saved), COMMIT], [hash_start(older), OTHER]
    assert (found[:3], found[5:]) == ([new, old, new], [old, old])
    assert found[3][0] == "DataError"
    assert "some/adapter@nothing" in str(found[3][1])
    assert found[4][0] == "AccessDenied"
    assert not list((tmp_path / "home").rglob("README.md"))  # only what training needs


@pytest.mark.usefixtures("_credentials")
def test_an_adapter_in_a_store(saved: Path, tmp_path: Path) -> None:
    """It is downloaded whole; a folder of nothing is refused with its address."""
    with moto_server() as endpoint:
        options = StorageOptions(endpoint_url=endpoint)
        store = open_store(f"s3://{BUCKET}/runs/first/artifacts/adapter", options)
        for name in (CONFIG, WEIGHTS):
            store.upload(saved / name, name)
        found = find_start(f"s3://{BUCKET}/runs/first/artifacts/adapter", tmp_path / "there", options)
        assert hash_start(found.folder) == hash_start(saved)
        with pytest.raises(JobError, match=f"s3://{BUCKET}/runs/nothing"):
            find_start(f"s3://{BUCKET}/runs/nothing", tmp_path / "nothing", options)


@pytest.fixture
def _credentials() -> Iterator[None]:
    with credentials():
        yield
