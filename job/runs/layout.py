"""What can be read off a published manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RESULTS = "results.json"
CARD = "artifacts/adapter/README.md"
REPORT = "artifacts/report.html"
MADE_OF_TIMES = ("artifacts/tensorboard/", REPORT)


def facts_of(results: Mapping[str, Any]) -> dict[str, str]:
    """Path -> hash of what identical runs share: every artefact but those that tell when the run was."""
    return {
        artifact["path"]: artifact["facts_sha256"] or artifact["sha256"]
        for artifact in results["artifacts"]
        if not artifact["path"].startswith(MADE_OF_TIMES)
    }
