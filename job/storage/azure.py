"""Object stores in Azure Blob Storage: `az://container/prefix`.

The account and its credentials come from Azure's own variables, which obstore reads itself: AZURE_STORAGE_ACCOUNT_NAME,
and one of AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN, AKS's workload identity (AZURE_CLIENT_ID,
AZURE_TENANT_ID, AZURE_FEDERATED_TOKEN_FILE, which AKS sets), a service principal's AZURE_CLIENT_SECRET, or the
machine's identity. Another server or cloud: AZURE_STORAGE_ENDPOINT, and AZURE_AUTHORITY_HOST for where tokens come
from. obstore reads no AZURE_STORAGE_CONNECTION_STRING: the command line takes it apart (`azure_connection_string.py`).
"""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from http import HTTPStatus
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import obstore
from obstore.store import AzureStore as AzureClient

from job.errors import Unreachable
from job.storage import base
from job.storage.base import Conflict, conflict
from job.storage.obstore_errors import FAILED_CONDITION_CODES, FAILURES
from job.storage.obstore_store import ObstoreStore

# Version of Azure's protocol, of the one request that obstore does not send.
_API_VERSION = "2023-11-03"
_HAS_SNAPSHOTS = "while the blob has snapshots"


class AzureStore(ObstoreStore):
    """An `ObjectStore` in Azure Blob Storage. A tag is the ETag, which no two writes share."""

    scheme = "az"
    # Accounts with a hierarchical namespace list folder by folder: `a/b` before `a-b`.
    sorted_by_key = False

    def _make_client(self, **options: Any) -> Any:
        return AzureClient(self._bucket, **options)

    def _tag(self, meta: Any) -> str | None:
        tag: str | None = meta.get("e_tag")
        return tag

    def _version_condition(self, tag: str) -> dict[str, str]:
        return {"e_tag": tag}

    def _delete_version(self, key: str, tag: str) -> None:
        """Deletes by a signed address, since obstore has no condition for this and signs the headers that it sends.

        A shared access signature, or an identity that may not sign, cannot make such an address. Then the version is
        checked right before the object is deleted.
        """
        if not self._delete_signed(key, {"If-Match": tag}):
            description = self._describe(key)
            if description is not None and description[1] != tag:
                raise conflict(f"{self.uri}/{key}")
            self._delete(self._client, key)

    def _delete(self, client: Any, key: str) -> None:
        try:
            super()._delete(client, key)
        except FAILURES as error:
            # obstore's request does not name the snapshots of the blob, which have to go with it.
            with suppress(Conflict):  # gone meanwhile
                if _HAS_SNAPSHOTS not in str(error) or not self._delete_signed(key, {}):
                    raise

    def _signed_address(self, key: str) -> str | None:
        seconds = timedelta(seconds=max(60.0, 2 * self._options.timeout_seconds))
        try:
            return str(self._ask(obstore.sign, self._client, "DELETE", self._root + key, seconds))
        except FAILURES:
            return None

    def _delete_signed(self, key: str, condition: dict[str, str]) -> bool:
        """Deletes a blob and its snapshots; whether there is a signed address, and the service took it.

        Raises:
            Conflict: The condition does not hold, or the blob is gone.
        """
        if (address := self._signed_address(key)) is None:
            return False
        headers = {"x-ms-version": _API_VERSION, "x-ms-delete-snapshots": "include", **condition}
        request = Request(address, method="DELETE", headers=headers)  # noqa: S310
        for attempt in range(self._options.retries):
            time.sleep(base.pause_seconds(attempt) if attempt else 0)
            try:
                with urlopen(request, timeout=self._options.timeout_seconds):  # noqa: S310 - obstore made the address
                    return True
            except HTTPError as error:
                with error:
                    condition_failed = error.code == HTTPStatus.PRECONDITION_FAILED
                    condition_failed &= error.headers.get("x-ms-error-code", "") in FAILED_CONDITION_CODES
                    if condition_failed or error.code == HTTPStatus.NOT_FOUND:
                        raise conflict(f"{self.uri}/{key}") from None
                    if error.code < HTTPStatus.INTERNAL_SERVER_ERROR and error.code != HTTPStatus.TOO_MANY_REQUESTS:
                        return False
                    why = f"HTTP {error.code}"
            except (OSError, HTTPException) as error:
                why = type(error).__name__
        raise Unreachable(f"{self.uri}/{key}: cannot delete: the store does not answer ({why})")
