"""Object stores in Google Cloud Storage: `gs://bucket/prefix`.

Credentials come from Google's own variables, which obstore reads itself: GOOGLE_APPLICATION_CREDENTIALS (a service
account's key, or a user's own login), or the identity of the machine or of GKE's workload identity, from the metadata
service. Another server: GOOGLE_BASE_URL, and GOOGLE_BEARER_TOKEN if it accepts any token.
"""

from __future__ import annotations

from typing import Any

from obstore.exceptions import PreconditionError
from obstore.store import GCSStore as GcsClient

from job.storage.base import conflict
from job.storage.obstore_store import ObstoreStore


class GcsStore(ObstoreStore):
    """An `ObjectStore` in Google Cloud Storage. A tag is the object's generation, which no two writes share."""

    scheme = "gs"
    sorted_by_key = True

    def _make_client(self, **options: Any) -> Any:
        return GcsClient(self._bucket, **options)

    def _tag(self, meta: Any) -> str | None:
        version: str | None = meta.get("version")
        return version

    def _version_condition(self, tag: str) -> dict[str, str]:
        return {"version": _generation(tag)}

    def _delete_version(self, key: str, tag: str) -> None:
        # obstore has no condition for this, but a client with an additional header has.
        client = self._connect(headers={"x-goog-if-generation-match": _generation(tag)})
        try:
            self._delete(client, key)
        except PreconditionError:
            raise conflict(f"{self.uri}/{key}") from None


def _generation(tag: str) -> str:
    """A tag as Google understands it; one of another store becomes a generation that no object has."""
    return tag if tag.isdecimal() and int(tag) else "1"
