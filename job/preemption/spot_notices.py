"""Notices of preemption: a thread asks the cloud whether this machine is about to be taken away.

A signal often comes later than the notice, or not at all: EC2 gives two minutes, Google and Azure half a minute.
No answer of a metadata service, however wrong, can end or delay the job: what is not understood is logged and ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from threading import Event, Thread
from typing import Literal

from job import log
from job.preemption.metadata_services import BASE, CLOUDS, FAILURES, Cloud
from job.preemption.stop_flag import Stop

_JOIN_SECONDS = 2.0

Provider = Literal["auto", "off", "ec2", "gcp", "azure"]


@contextmanager
def watch_notices(
    stop: Stop, provider: Provider, *, bases: Mapping[str, str] | None = None, poll_seconds: float | None = None
) -> Iterator[None]:
    """Within it a thread polls for notices and raises the flag when one comes.

    Args:
        stop: The flag.
        provider: Whose service to ask; `auto` tries them all, for three seconds at most, and gives up where none is.
        bases: Base URLs by provider, instead of the clouds' own; with them `auto` tries no others.
        poll_seconds: Seconds between two looks, instead of the cloud's usual.
    """
    if provider == "off":
        yield
        return
    bases = dict.fromkeys(CLOUDS, BASE) if bases is None else bases
    clouds = [CLOUDS[name](base) for name, base in bases.items() if provider in {"auto", name}]
    done = Event()
    # A copy of the context gives the thread's lines the run and the attempt that they belong to.
    run, arguments = copy_context().run, (_watch, stop, provider, clouds, poll_seconds, done)
    thread = Thread(target=run, args=arguments, name="notices", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(_JOIN_SECONDS)  # longer only if a service trickles; nothing is lost with a thread that reads


def _watch(stop: Stop, provider: Provider, clouds: Sequence[Cloud], poll_seconds: float | None, done: Event) -> None:
    cloud = _find(clouds, done) if provider == "auto" else next(iter(clouds), None)
    if cloud is None:
        log.get_logger().debug("no metadata service here, so no notices of preemption")
        return
    log.get_logger().debug("watching for notices of preemption", provider=cloud.name)
    answered = provider == "auto"
    while not done.is_set():
        try:
            notice = cloud.look()
        except FAILURES as error:
            log.get_logger().debug("no usable answer of the metadata service", provider=cloud.name, why=str(error))
            if not answered:  # the user said that there is one
                fix = "check JOB_RUN__SPOT_NOTICES; on EC2 a container needs a hop limit of 2"
                log.get_logger().warning("the metadata service does not answer", provider=cloud.name, fix=fix)
        else:
            if notice is not None:
                log.get_logger().warning("this machine is being taken away", why=notice.reason, seconds=notice.seconds)
                stop.request(notice.reason, notice.seconds)
                return
        answered = True
        done.wait(cloud.poll_seconds if poll_seconds is None else poll_seconds)


def _find(clouds: Sequence[Cloud], done: Event) -> Cloud | None:
    for cloud in clouds:
        if done.is_set():
            return None
        try:
            if cloud.present():
                return cloud
        except FAILURES as error:
            log.get_logger().debug("not this cloud", provider=cloud.name, why=str(error))
    return None
