"""Separates the settings that affect the result of a run from those that affect only how it is carried out.

Each field in `schema` says which of the two it is (`AffectsResult`, `ExecutionOnly`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.settings.load import Settings, plain_values
from job.settings.markers import ResultEffect, SameInAllProcesses, find_markers

_EFFECTS = find_markers(Settings, ResultEffect)
_SAME = find_markers(Settings, SameInAllProcesses)


def affects_result(name: str) -> bool:
    """Whether a setting, given by its dotted name, affects the result."""
    return _EFFECTS[name].affects_result


def decisive_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that affect the result, out of the `plain_values` of all settings."""
    return {name: value for name, value in values.items() if affects_result(name)}


def common_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that must be equal in all processes of a run, out of the `plain_values` of all settings."""
    return {name: value for name, value in values.items() if affects_result(name) or name in _SAME}


def default_settings() -> dict[str, Any]:
    """The settings that affect the result with their defaults and no preset.

    A run that began before a setting was added has this value for it.
    """
    return decisive_settings(plain_values(Settings()))
