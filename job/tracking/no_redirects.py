"""Requests that go to the address that was named, or nowhere: they carry tokens, or mean a POST."""

from __future__ import annotations

from typing import Any
from urllib.request import HTTPRedirectHandler


class NoRedirects(HTTPRedirectHandler):
    """For `urllib.request.build_opener`: an answer that redirects raises `HTTPError`, as any other than 2xx."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Refuses."""
