"""HTTP requests that follow no redirect: another address must not get their token, or a GET in place of a POST."""

from __future__ import annotations

from typing import Any
from urllib.request import HTTPRedirectHandler


class NoRedirects(HTTPRedirectHandler):
    """For `urllib.request.build_opener`: an answer that redirects raises `HTTPError`, as any other status than 2xx."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Returns None, with which urllib raises the error."""
