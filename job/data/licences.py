"""Licences of data sets and models: from their card, else from a table of known data sets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from job import log
from job.data.hub_dataset import is_hub_id
from job.errors import JobError
from job.storage.hub import CARD, cached_card, fetch_card
from job.storage.location import is_remote

LICENCES: Mapping[str, str] = {
    "tatsu-lab/alpaca": "cc-by-nc-4.0",
    "databricks/databricks-dolly-15k": "cc-by-sa-3.0",
    "OpenAssistant/oasst1": "apache-2.0",
    "HuggingFaceH4/no_robots": "cc-by-nc-4.0",
}
"""Hub id -> licence according to the data set's card. Data sets that are not listed have an unknown licence."""
_METADATA = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_NAME = re.compile(r"[\w.+-]{1,96}( [\w.+-]{1,96}){0,7}")
_MOST_BYTES = 64 << 10
"""Bytes of a card that are read: its metadata are at the beginning."""
_MOST_BRACKETS = 1_000
"""In the metadata: the time that PyYAML takes grows with the square of their depth."""


def find_licence(
    source: str, revision: str | None, kind: Literal["model", "dataset"], *, ask_hub: bool = True
) -> str | None:
    """The licence of a source, from its card, else from `LICENCES`; None if neither has one.

    A card that cannot be downloaded is no error: training does not depend on it.

    Args:
        source: Hub id, path or URI; a URI has no card.
        revision: Commit, tag or branch of a hub id.
        kind: Whether a hub id names a model or a data set.
        ask_hub: Whether the hub is asked for a card; else only its cache on this machine is looked at.
    """
    card = None
    if (path := Path(source)).exists():
        beside = (path if path.is_dir() else path.parent) / CARD
        card = beside if beside.is_file() else None
    elif not is_remote(source) and is_hub_id(source):
        try:
            card = fetch_card(source, revision, kind) if ask_hub else cached_card(source, revision, kind)
        except JobError as error:
            log.get_logger().warning("the card cannot be read, so the licence is not known", of=source, why=str(error))
    return (read_licence(card) if card is not None else None) or LICENCES.get(source)


def read_licence(card: Path) -> str | None:
    """The `license` in the metadata of a card, several separated by commas; None if it has none.

    For `other`, the `license_name` is used, as on the hub.
    """
    import yaml

    try:
        with card.open("rb") as file:
            text = file.read(_MOST_BYTES).decode(errors="replace")
        metadata = _METADATA.match(text)
        if metadata is None or metadata[1].count("[") + metadata[1].count("{") > _MOST_BRACKETS:
            return None
        if any(isinstance(one, yaml.AliasEvent) for one in yaml.parse(metadata[1], yaml.SafeLoader)):
            return None  # YAML aliases can expand a short text into a huge one
        fields = yaml.safe_load(metadata[1])
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return None
    except (KeyError, IndexError, AttributeError, TypeError):  # by PyYAML, of a value that does not fit its tag
        return None
    if not isinstance(fields, dict):
        return None
    named = fields.get("license")
    if named == "other" and isinstance(fields.get("license_name"), str):
        named = fields["license_name"]
    names = named if isinstance(named, list) else [named]
    known = [name for name in names[:8] if isinstance(name, str) and _NAME.fullmatch(name)]
    return ", ".join(known) or None
