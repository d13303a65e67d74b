"""What a run publishes for people, from its manifest: the adapter's card, and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from job import log
from job.errors import JobError
from job.records import Artifact
from job.report import model_card, report
from job.runs.attempt import Attempt
from job.runs.layout import CARD, REPORT


def publish_documents(attempt: Attempt, results: Mapping[str, Any]) -> dict[str, Any]:
    """Publishes both; returns the manifest with them among its artefacts.

    A page must not cost a run its results: where one cannot be drawn the log has the error, and the manifest is
    published without it. A store that does not take it is another matter, and ends the attempt as always.
    """
    complete = _with(results, _published(attempt, CARD, lambda: model_card.write(results)))
    return _with(
        complete,
        _published(attempt, REPORT, lambda: report.draw(complete, report.read_evidence(complete, attempt.fetch))),
    )


def _published(attempt: Attempt, key: str, make: Callable[[], bytes]) -> Artifact | None:
    try:
        content = make()
    except JobError:
        raise
    except Exception as error:  # noqa: BLE001 - hours of a GPU's work are behind it
        log.get_logger().error("a document cannot be made, the results come without it", document=key, exc_info=error)
        return None
    path = attempt.work / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return attempt.publish(path, key)


def _with(results: Mapping[str, Any], artifact: Artifact | None) -> dict[str, Any]:
    listed = [*results["artifacts"], *([] if artifact is None else [asdict(artifact)])]
    return {**results, "artifacts": sorted(listed, key=lambda entry: entry["path"])}
