"""Checks a run's checkpoints: files match commit markers, steps increase, and the last one is the published adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from job.checkpoints.commit_marker import MAX_MARKER_BYTES, Marker, parse_marker
from job.checkpoints.trainer_state import ADAPTER, BEST
from job.checkpoints.trainer_state import METRICS as STATE_METRICS
from job.checkpoints.trainer_state import VALIDATIONS as STATE_VALIDATIONS
from job.common.hashing import facts_of_line
from job.records import Artifact
from job.results.adapter_facts import CONFIG, published_rank_pattern
from job.results.inventory import is_marker
from job.runs.layout import METRICS, VALIDATIONS, WEIGHTS, marker_key
from job.storage.open import ObjectStore, TooLarge, is_key
from job.verification.differences import CheckResult, Copies, Difference, other_run


def read_markers(copies: Copies) -> tuple[list[Marker], list[Difference]]:
    """The valid commit markers by increasing step, and the problems of the others."""
    markers, differences = [], []
    for path in sorted(filter(is_marker, copies)):
        try:
            marker = parse_marker(copies[path].read_bytes())
        except ValueError as error:
            differences.append(Difference(path, "a commit marker", str(error)))
            continue
        if path != marker_key(marker.step):
            differences.append(Difference(path, "the step of its folder", f"step {marker.step}"))
        else:
            markers.append(marker)
    return sorted(markers, key=lambda marker: marker.step), differences


def late_markers(store: ObjectStore, keys: Iterable[str], run: str | None, last_attempt: int) -> set[str]:
    """The keys of markers that an attempt before the last one wrote after the run was published.

    An attempt that hangs just before it writes a marker, and continues later, can still write it: the write has the
    condition that the marker does not exist, which holds again once the checkpoint was deleted as an old one.
    """
    late = set()
    for key in (key for key in keys if is_key(key) and is_marker(key)):
        with suppress(TooLarge, ValueError):
            stored = store.read(key, max_bytes=MAX_MARKER_BYTES)
            marker = parse_marker(b"" if stored is None else stored.data)
            if key == marker_key(marker.step) and marker.epoch < last_attempt and marker.run == run:
                late.add(key)
    return late


def claims(marker: Marker) -> list[Artifact]:
    """The files that a commit marker lists."""
    return [Artifact(marker.folder + name, file.bytes, file.sha256) for name, file in marker.files.items()]


def check_checkpoints(
    results: Mapping[str, Any],
    markers: Sequence[Marker],
    copies: Copies,
    marker_differences: Sequence[Difference],
    run: str | None = None,
) -> CheckResult:
    """Checks that the checkpoints belong to this run and to each other.

    Attempts increase with the steps, metrics and validations are beginnings of the published ones, and the adapter of
    the published step is the published adapter. If the adapter of the best validation is published, it is compared with
    the best adapter in each checkpoint from that step on.

    Args:
        results: The manifest.
        markers: The commit markers by increasing step.
        copies: Local copies by path.
        marker_differences: Problems of single markers and files, to include in the result.
        run: The run's fingerprint; None if it is not known.
    """
    differences = [*marker_differences]
    steps, attempts = results["training"]["steps"], [attempt["number"] for attempt in results["run"]["attempts"]]
    kept_step = (results["training"].get("validation") or {"kept_step": steps})["kept_step"]
    epoch = 0
    for marker in markers:
        where = marker_key(marker.step)
        differences += other_run(where, marker.run, run)
        if marker.step > steps:
            differences.append(Difference(where, f"a step up to {steps}", f"step {marker.step}"))
        if marker.epoch < epoch or marker.epoch not in attempts:
            claimed = f"an attempt of the manifest from {epoch} on"
            differences.append(Difference(where, claimed, f"attempt {marker.epoch}"))
        epoch = marker.epoch
        differences += _metrics_differ(marker, copies)
        differences += _validations_differ(marker, copies)
        if marker.step == kept_step:
            differences += _adapters_differ(marker.folder + ADAPTER, WEIGHTS, copies)
        elif marker.step > kept_step and BEST in marker.files:
            differences += _adapters_differ(marker.folder + BEST, WEIGHTS, copies)
    packages = results["software"]["packages"]
    notes = [
        f"the checkpoint of step {marker.step} was written by other versions of {', '.join(changed)}"
        for marker in markers
        if (changed := sorted(name for name in packages if marker.software.get(name) != packages[name]))
    ]
    if markers and markers[-1].step < steps:
        notes.append(f"the newest is of step {markers[-1].step}: whether the adapter follows from it cannot be checked")
    extent = f"{len(markers)}, {', '.join(f'step {marker.step}' for marker in markers)}" if markers else "none"
    return CheckResult("checkpoints", extent, tuple(differences), tuple(notes))


def _metrics_differ(marker: Marker, copies: Copies) -> Iterator[Difference]:
    """A checkpoint's metrics must be the first lines of the published metrics, apart from measured values."""
    path = marker.folder + STATE_METRICS
    if path not in copies or METRICS not in copies:
        return
    before, after = _facts(copies[path]), _facts(copies[METRICS])
    if before is None:
        yield Difference(path, "the metrics of one step on each line", "something else")
    if before is None or after is None:  # check_training reports it
        return
    if len(before) != marker.step:
        yield Difference(path, f"the metrics of {marker.step} steps", f"{len(before)} steps")
    for step, (in_checkpoint, in_published) in enumerate(zip(before, after, strict=False), start=1):
        if in_checkpoint != in_published:
            yield Difference(f"{path} line {step}", f"step {step} as in {METRICS}", "other values")
            return


def _validations_differ(marker: Marker, copies: Copies) -> Iterator[Difference]:
    """A checkpoint's validations must be the first of the published ones, apart from measured values."""
    path = marker.folder + STATE_VALIDATIONS
    if path not in copies or VALIDATIONS not in copies:
        return
    before, after = _facts(copies[path]), _facts(copies[VALIDATIONS])
    if before is None or after is None or before != after[: len(before)]:
        yield Difference(path, f"the first validations in {VALIDATIONS}", "other validations")


def _facts(path: Path) -> list[dict[str, Any]] | None:
    """The metrics of every step without measured values; None if the file is not in this format."""
    try:
        return [facts_of_line(line) for line in path.read_bytes().splitlines()]
    except ValueError:
        return None


def _adapters_differ(checkpoint: str, published: str, copies: Copies) -> Iterator[Difference]:
    """The tensors of checkpoint and adapter must be equal bit by bit; PEFT shortens their names in the adapter."""
    from safetensors import SafetensorError, safe_open

    if checkpoint not in copies or published not in copies:
        return
    try:
        with (
            safe_open(copies[checkpoint], framework="np") as checkpoint_tensors,
            safe_open(copies[published], framework="np") as published_tensors,
        ):
            names = {_published(name): name for name in checkpoint_tensors.keys()}  # noqa: SIM118 - no mapping
            config = copies.get(f"{published.rpartition('/')[0]}/{CONFIG}")
            rank_pattern = published_rank_pattern(config) if config is not None else {}
            different_names = sorted(names.keys() ^ set(published_tensors.keys()))
            common = sorted(names.keys() & set(published_tensors.keys()))
            different_names += [
                name
                for name in common
                if not _same(
                    _kept_ranks(name, checkpoint_tensors.get_tensor(names[name]), rank_pattern),
                    published_tensors.get_tensor(name),
                )
            ]
    except (SafetensorError, TypeError, ValueError, IndexError) as error:
        yield Difference(published, f"the tensors of {checkpoint}", f"an unreadable file: {str(error)[:200]}")
        return
    if different_names:
        yield Difference(
            published, f"the tensors of {checkpoint}", f"other tensors: {', '.join(different_names[:3])[:200]}"
        )


def _published(name: str) -> str:
    """PEFT's name in the adapter's file for a tensor of the model."""
    short = name.replace(".modules_to_save.default.", ".").replace(".default.", ".").removesuffix(".default")
    return short.removesuffix(".weight") if short.endswith(".lora_magnitude_vector.weight") else short


def _kept_ranks(name: str, tensor: Any, rank_pattern: Mapping[str, list[bool]]) -> Any:
    """The published part of an AdaLoRA tensor, which has the remaining ranks only; other tensors unchanged."""
    module, _, matrix = name.removeprefix("base_model.model.").rpartition(".")
    ranks = rank_pattern.get(f"{module}.lora_E")
    if ranks is None:
        return tensor
    indices = [index for index, is_kept in enumerate(ranks) if is_kept]
    return tensor[:, indices].copy() if matrix == "lora_B" else tensor[indices]


def _same(first: Any, second: Any) -> bool:
    return bool(first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes())
