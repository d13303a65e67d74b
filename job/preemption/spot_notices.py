"""Spot notices: a thread polls the cloud's metadata service, and sets the stop flag when a preemption is announced.

EC2 announces a preemption two minutes ahead, Google and Azure half a minute. SIGTERM often arrives later, or never.
No answer of a metadata service can end or delay the job: an invalid answer is logged and ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from threading import Event, Thread
from typing import Literal

from job import log
from job.preemption.metadata_services import BASE_URL, CLOUDS, FAILURES, Cloud
from job.preemption.stop_flag import StopFlag

_JOIN_SECONDS = 2.0

Provider = Literal["auto", "off", "ec2", "gcp", "azure"]


@contextmanager
def watch_notices(
    stop: StopFlag, provider: Provider, *, bases: Mapping[str, str] | None = None, poll_seconds: float | None = None
) -> Iterator[None]:
    """Within it a thread polls for notices, and sets the stop flag when there is one.

    Args:
        stop: The flag.
        provider: Whose service to poll. `auto` tries all, for three seconds at most, and gives up if none answers.
        bases: Base URLs by provider, instead of the clouds' own; `auto` then tries these only.
        poll_seconds: Seconds between two polls, instead of the cloud's own.
    """
    if provider == "off":
        yield
        return
    bases = dict.fromkeys(CLOUDS, BASE_URL) if bases is None else bases
    clouds = [CLOUDS[name](base) for name, base in bases.items() if provider in {"auto", name}]
    stopped = Event()
    # With a copy of the context, the thread's log lines carry the run and the attempt as well.
    run, arguments = copy_context().run, (_watch, stop, provider, clouds, poll_seconds, stopped)
    thread = Thread(target=run, args=arguments, name="notices", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(_JOIN_SECONDS)  # a service may answer byte by byte; the thread is a daemon, and only reads


def _watch(
    stop: StopFlag, provider: Provider, clouds: Sequence[Cloud], poll_seconds: float | None, stopped: Event
) -> None:
    cloud = _find(clouds, stopped) if provider == "auto" else next(iter(clouds), None)
    if cloud is None:
        log.get_logger().debug("no metadata service answers, so there are no spot notices")
        return
    log.get_logger().debug("polling for spot notices", provider=cloud.name)
    answered = provider == "auto"
    while not stopped.is_set():
        try:
            notice = cloud.look()
        except FAILURES as error:
            log.get_logger().debug("no usable answer of the metadata service", provider=cloud.name, why=str(error))
            if not answered:  # the user has named this provider, so it should answer
                fix = "check JOB_RUN__SPOT_NOTICES; on EC2 a container needs a hop limit of 2"
                what = "the metadata service gives no usable answer"
                log.get_logger().warning(what, provider=cloud.name, why=str(error), fix=fix)
        else:
            if notice is not None:
                log.get_logger().warning(
                    "spot notice: this machine will be taken away", why=notice.reason, seconds=notice.seconds
                )
                stop.request(notice.reason, notice.seconds)
                return
        answered = True
        stopped.wait(cloud.poll_seconds if poll_seconds is None else poll_seconds)


def _find(clouds: Sequence[Cloud], stopped: Event) -> Cloud | None:
    for cloud in clouds:
        if stopped.is_set():
            return None
        try:
            if cloud.present():
                return cloud
        except FAILURES as error:
            log.get_logger().debug("this machine is not in this cloud", provider=cloud.name, why=str(error))
    return None
