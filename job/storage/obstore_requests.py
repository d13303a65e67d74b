"""Requests by obstore: off the main thread, repeated with the job's own pauses, bodies checked for their end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from job.common.threads import in_thread
from job.errors import Problem, SettingsError
from job.storage import base
from job.storage.obstore_errors import (
    FAILURES,
    Missing,
    has_no_metadata,
    is_failed_condition,
    is_permanent,
    is_transient,
)

_METADATA_TRIES = 4
"""The metadata service of a pod that has just started may not answer yet; most other machines have none."""


class OtherContent(Exception):
    """An object differs from what an earlier answer said of it: it was changed, or the answer arrived damaged."""


def ask(function: Callable[..., Any], *arguments: Any, retries: int, **options: Any) -> Any:
    """Sends a request, and again after failures that may pass, such as an answer that is cut off.

    Raises:
        Missing: In place of obstore's FileNotFoundError.
        PreconditionError: A condition does not hold.
        SettingsError: The cloud's own variables are not valid.
    """
    tries = 0
    while True:
        try:
            return ask_once(function, *arguments, **options)
        except FAILURES as error:
            if is_failed_condition(error) or isinstance(error, Missing):
                raise
            tries = pause_or_raise(tries, error, retries)


def pause_or_raise(tries: int, error: BaseException, retries: int) -> int:
    """The number of tries of a request, after a pause; raises `error` after the last, or if no other try helps."""
    tries += 1
    may_help = is_transient(error) or (has_no_metadata(error) and tries < _METADATA_TRIES)
    if tries >= retries or not may_help or is_permanent(error):
        raise error
    time.sleep(base.pause_seconds(tries))
    return tries


def ask_once(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls obstore in another thread than the main one.

    While obstore waits, Python runs no signal handlers in the thread that called it. If that were the main thread, a
    signal to stop would be noticed minutes late when a store does not answer.

    Raises:
        Missing: In place of obstore's FileNotFoundError.
        SettingsError: The cloud's own variables are not valid.
    """
    try:
        if threading.current_thread() is not threading.main_thread():
            return function(*arguments, **options)
        try:
            answer = in_thread(lambda: function(*arguments, **options), "obstore")
        except RuntimeError:  # at interpreter shutdown no new thread can be started
            return function(*arguments, **options)
        return answer.result()
    except FileNotFoundError as error:
        raise Missing(str(error)) from None
    except BaseException as error:
        # obstore panics on values that it cannot parse; the class of this exception cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        what = "are not valid; correct GOOGLE_BASE_URL or AZURE_STORAGE_ENDPOINT, and the credentials"
        raise SettingsError([Problem("the cloud's own variables", what)]) from None


def read_body(answer: Any) -> bytes:
    """The content behind an answer.

    Raises:
        OtherContent: It broke off.
    """
    try:
        return bytes(ask_once(answer.bytes))
    except FAILURES as error:
        if not is_transient(error):
            raise
        raise OtherContent from error
