"""Licences of the data sets that are known by name."""

from __future__ import annotations

from collections.abc import Mapping

LICENCES: Mapping[str, str] = {
    "tatsu-lab/alpaca": "cc-by-nc-4.0",
    "databricks/databricks-dolly-15k": "cc-by-sa-3.0",
    "OpenAssistant/oasst1": "apache-2.0",
    "HuggingFaceH4/no_robots": "cc-by-nc-4.0",
}
"""Hub id -> licence according to the data set's card. Data sets that are not listed have an unknown licence."""
