"""`compare --history`: a metric over published runs in order of time, and whether the newest is outside the limits.

The limits are those of Shewhart's chart for individual values (NIST/SEMATECH e-Handbook of Statistical Methods, section
6.3.2.2; Wheeler and Chambers, Understanding Statistical Process Control):

    centre = mean of the values of the earlier runs
    limits = centre +- 2.66 * mean of |value - previous value| over the earlier runs

2.66 is 3 / d2, with d2 = 1.128 for the range of two values: three standard deviations of a process whose values vary
independently. The limits do not include the newest run, which is judged by them. A run that exports another one of them
is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from statistics import fmean
from typing import Any, Literal

from job.common import tables
from job.common.formatting import count
from job.errors import DataError, JobError, Problem, SettingsError, VerificationError, combine
from job.results.promotion import open_run_or_pointer
from job.results.reader import PublishedRun, read_published
from job.runs.layout import LEASE, RESULTS
from job.storage.location import join
from job.storage.open import ObjectStore, StorageOptions

FACTOR = 2.66
LEAST_EARLIER = 5
"""Minimum number of earlier runs for limits; with fewer, the mean would be of fewer than four moving ranges."""
ROUGH = 20
"""With fewer earlier runs, the message calls the limits rough."""
MOST_LISTED = 100_000
"""Objects of a folder of runs that are looked at: on S3 a hundred requests."""
_TOLERANCE = 1e-9
"""Relative to the values: equal values may differ from their own mean by rounding."""


@dataclass(frozen=True)
class Point:
    """A run: its id, its location, when it finished, its base, and the metric's value for its adapter."""

    run: str
    results: str
    finished: str
    base: str
    value: float


@dataclass(frozen=True)
class Limits:
    """The mean of the earlier runs and the control limits."""

    centre: float
    low: float
    high: float


@dataclass(frozen=True)
class History:
    """A metric over runs.

    Attributes:
        metric: `task/metric`.
        questions: Number of questions of the task.
        points: In order of time; the last is judged.
        limits: None if there are too few earlier runs.
        outcome: Where the newest run is, relative to the limits.
        left_out: Runs that cannot be compared with the newest, or export another one of the runs, and why.
    """

    metric: str
    questions: int
    points: tuple[Point, ...]
    limits: Limits | None
    outcome: Literal["within", "above", "below", "too few runs"]
    left_out: tuple[str, ...]

    @property
    def out(self) -> bool:
        """Whether the newest run is outside of the limits."""
        return self.outcome in {"above", "below"}

    @property
    def verdict(self) -> str:
        """The outcome as a sentence."""
        newest, earlier = self.points[-1], len(self.points) - 1
        if self.limits is None:
            return (
                f"too few runs for a control limit: {count(earlier, 'earlier run')}, {LEAST_EARLIER} are needed; "
                "the newest is not judged"
            )
        text = f"run {newest.run} with {newest.value:.6g} is " + (
            f"within the limits of {count(earlier, 'earlier run')}, {self.limits.low:.6g} to {self.limits.high:.6g}"
            if not self.out
            else f"{self.outcome} the {'upper' if self.outcome == 'above' else 'lower'} limit "
            f"{self.limits.high if self.outcome == 'above' else self.limits.low:.6g} of {count(earlier, 'earlier run')}"
        )
        return f"{text}; limits of fewer than {ROUGH} runs are rough" if earlier < ROUGH else text


def find_runs(locations: Sequence[str], storage: StorageOptions) -> tuple[list[PublishedRun], tuple[str, ...]]:
    """The runs at these locations, without duplicates, and those that cannot be read, with the reason.

    A location is a run, a pointer to one, or a folder of runs. A run without results, or with a manifest that is not
    what the job wrote, says nothing about the others.

    Raises:
        JobError: One or more locations cannot be read; the error lists them all.
    """
    runs: dict[str, PublishedRun] = {}
    unreadable: dict[str, str] = {}
    errors: list[tuple[str, JobError]] = []
    for location in locations:
        try:
            for store in _stores_at(location, storage):
                try:
                    run = read_published(store)
                except VerificationError as error:
                    unreadable[store.uri] = f"{store.uri} cannot be read: {_first_line(error)}"
                else:
                    runs.setdefault(run.sha256, run)
        except JobError as error:
            errors.append((location, error))
    if errors:
        raise combine(errors)
    return list(runs.values()), tuple(unreadable.values())


def _first_line(error: JobError) -> str:
    return str(error).partition("\n")[0][:300]


def _stores_at(location: str, storage: StorageOptions) -> Iterator[ObjectStore]:
    """The stores of the runs at a location.

    Raises:
        SettingsError: It holds none, or too many objects to look for runs among them.
    """
    store: ObjectStore = open_run_or_pointer(location, storage)
    if store.tag(RESULTS) is not None:
        yield store
        return
    listed = [info.key for info in islice(store.list(), MOST_LISTED + 1)]
    if len(listed) > MOST_LISTED:  # the newest run may be among those that were not seen
        what = f"holds more than {MOST_LISTED:,} objects; name the runs themselves, such as {store.uri}/RUN"
        raise SettingsError([Problem(location, what)])
    inside = [key.removesuffix(f"/{RESULTS}") for key in listed if _is_manifest_of_run(key)]
    if not inside:
        if LEASE in listed:
            yield store  # a run without results
            return
        raise SettingsError([Problem(location, "is neither a run nor a folder with complete runs")])
    for name in inside:
        yield open_run_or_pointer(join(store.uri, name), storage)


def _is_manifest_of_run(key: str) -> bool:
    return key.count("/") == 1 and key.endswith(f"/{RESULTS}")


def history(runs: Sequence[PublishedRun], metric: str | None, unreadable: Sequence[str] = ()) -> History:
    """A metric over runs, with the newest judged by the earlier ones.

    Args:
        runs: In any order; at least one.
        metric: `task/metric`, such as `arc_easy/acc`; None for the accuracy of the newest run's first task.
        unreadable: From `find_runs`: further runs that are left out.

    Raises:
        SettingsError: The newest run does not have the metric.
        DataError: There is no run.
    """
    if not runs:
        raise DataError([Problem("--history", f"there is no run to show; {why}") for why in unreadable or ("none",)])
    # An export has the values of the run that it exports, which lies beside it: twice, they would narrow the limits.
    exports = {run.sha256: exported_id for run in runs if (exported_id := _exported(run, runs)) is not None}
    ordered = sorted(
        (run for run in runs if run.sha256 not in exports),
        key=lambda run: (str(run.results["run"]["finished"]), run.id),
    )
    newest = ordered[-1]
    metrics = list(_metrics(newest.results))
    metric_name = metric or (metrics[0] if metrics else "")
    if metric_name not in metrics:
        what = f"{metric} is not a metric of the newest run, {newest.id}; it has {', '.join(metrics) or 'none'}"
        raise SettingsError([Problem("--metric", what)])
    task, _, name = metric_name.partition("/")
    newest_task = _task(newest.results, task)
    points = []
    left_out = [*unreadable, *(f"{run.id} exports {exports[run.sha256]}" for run in runs if run.sha256 in exports)]
    for run in ordered:
        figures = _task(run.results, task)
        value = None if figures is None else _value(figures, name)
        if figures is None or value is None:
            left_out.append(f"{run.id} has no {metric_name}")
        elif figures["task_hash"] != newest_task["task_hash"]:
            left_out.append(f"{run.id} was asked other questions of {task}")
        else:
            points.append(
                Point(run.id, run.store.uri, run.results["run"]["finished"], run.results["model"]["id"], value)
            )
    limits = control_limits([point.value for point in points[:-1]])
    return History(
        metric_name, newest_task["n"], tuple(points), limits, _outcome(points[-1].value, limits), tuple(left_out)
    )


def _exported(run: PublishedRun, runs: Sequence[PublishedRun]) -> str | None:
    """The id of the run that a run exports, if that is among the runs."""
    exported = run.results["run"].get("exported_run")
    return next(
        (candidate.id for candidate in runs if exported and candidate.sha256 == exported["results_sha256"]), None
    )


def control_limits(earlier: Sequence[float]) -> Limits | None:
    """The limits from the values of the earlier runs, in order of time; None if there are too few.

    Formula and source: the module docstring.
    """
    if len(earlier) < LEAST_EARLIER:
        return None
    centre, width = fmean(earlier), FACTOR * fmean(abs(b - a) for a, b in pairwise(earlier))
    return Limits(centre, centre - width, centre + width)


def _outcome(value: float, limits: Limits | None) -> Literal["within", "above", "below", "too few runs"]:
    if limits is None:
        return "too few runs"
    spare = _TOLERANCE * max(abs(value), abs(limits.centre))
    if value > limits.high + spare:
        return "above"
    return "below" if value < limits.low - spare else "within"


def _metrics(results: Mapping[str, Any]) -> Iterator[str]:
    """`task/metric` of every metric of the adapter."""
    for task, comparison in results["evaluation"]["tasks"].items():
        yield f"{task}/acc"
        if comparison["adapter"].get("acc_norm") is not None:
            yield f"{task}/acc_norm"
    for task, comparison in results["evaluation"].get("measured", {}).items():
        yield from (f"{task}/{metric}" for metric in comparison["metrics"])


def _task(results: Mapping[str, Any], task: str) -> Any:
    evaluation = results["evaluation"]
    return evaluation["tasks"].get(task) or evaluation.get("measured", {}).get(task)


def _value(task: Mapping[str, Any], metric: str) -> float | None:
    figure = task["metrics"].get(metric, {}).get("adapter") if "metrics" in task else task["adapter"].get(metric)
    return None if figure is None else float(figure)


def as_json(result: History) -> dict[str, Any]:
    """The history as a dictionary for JSON."""
    return {**asdict(result), "out": result.out, "verdict": result.verdict}


def as_lines(result: History, *, markdown: bool = False) -> list[str]:
    """The history as a table, in plain text or Markdown, and the verdict below it."""
    head = ("finished", "run", "base", result.metric, "change")
    rows = []
    for before, point in zip((None, *result.points), result.points, strict=False):
        change = "" if before is None else f"{point.value - before.value:+.6g}"
        rows.append((point.finished, point.run, point.base, f"{point.value:.6g}", change))
    table = tables.markdown(head, rows) if markdown else tables.plain(head, rows)
    limits = result.limits
    lines = [] if limits is None else [f"mean {limits.centre:.6g}, limits {limits.low:.6g} to {limits.high:.6g}"]
    left_out = [f"left out: {tables.visible(reason)}" for reason in result.left_out]
    return [*table, "", *lines, *left_out, tables.visible(result.verdict)]
