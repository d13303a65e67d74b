"""Follows a training job: its log with a line of progress, and the outcome."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from botocore.exceptions import ClientError

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
ENDED = {"Completed", "Failed", "Stopped"}
# Code -> (meaning, whether to start the run again), as in the job's own `errors.py`; a test compares them.
EXIT_CODES = {
    1: ("a bug, or a process was killed", "counts against the limit"),
    2: ("settings are wrong", "no"),
    3: ("quality gate not met (results are published)", "no"),
    4: ("results do not verify", "no"),
    65: ("data is wrong", "no"),
    69: ("storage or hub cannot be reached after retries, or a disk is full", "yes"),
    70: ("training diverged, or memory is too small for it", "no"),
    71: ("several attempts in a row made no progress", "counts against the limit"),
    72: ("this machine cannot run the job; another one may", "counts against the limit"),
    74: ("no progress for too long; a restart resumes the run", "counts against the limit"),
    75: ("preempted; a restart resumes the run", "yes, free"),
    76: ("another attempt owns this run", "no"),
    77: ("access denied", "counts against the limit"),
}
PREEMPTED = 75


class Screen:
    """Prints lines, and at a terminal a progress line below them that is overwritten."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._live = self._out.isatty()

    def line(self, text: str) -> None:
        """Prints a permanent line."""
        self._out.write(("\r\033[K" if self._live else "") + text + "\n")
        self._out.flush()

    def progress(self, text: str) -> None:
        """Prints a line that the next one replaces; without a terminal it is permanent."""
        if self._live:
            self._out.write(f"\r\033[K{text}")
            self._out.flush()
        else:
            self.line(text)


def follow(sagemaker: Any, logs: Any, name: str, screen: Screen, pause: float = 10.0) -> dict[str, Any]:
    """Shows the job's states and log until it has ended; returns its description."""
    seen: dict[str, str] = {}
    state = ""
    while True:
        job: dict[str, Any] = sagemaker.describe_training_job(TrainingJobName=name)
        ended = job["TrainingJobStatus"] in ENDED
        if job["SecondaryStatus"] != state:
            state = job["SecondaryStatus"]
            told = job.get("SecondaryStatusTransitions") or [{}]
            screen.line(f"[{state}] {told[-1].get('StatusMessage', '')}".rstrip())
        for line in new_lines(logs, name, seen):
            show(line, screen)
        if ended:
            return job
        time.sleep(pause)


def new_lines(logs: Any, name: str, seen: dict[str, str]) -> Iterator[str]:
    """Lines since the last call. Every machine writes a stream, and a job that was interrupted has several.

    Args:
        logs: CloudWatch Logs.
        name: The job's.
        seen: Stream -> the position to continue from; updated.
    """
    try:
        pages = logs.get_paginator("describe_log_streams").paginate(
            logGroupName=LOG_GROUP, logStreamNamePrefix=f"{name}/"
        )
        streams = [stream["logStreamName"] for page in pages for stream in page["logStreams"]]
    except ClientError as error:
        if error.response["Error"]["Code"] == "ResourceNotFoundException":
            return  # an account's first job has no log group until it writes
        raise
    for stream in streams:
        while True:
            after = {"nextToken": seen[stream]} if stream in seen else {}
            answer = logs.get_log_events(logGroupName=LOG_GROUP, logStreamName=stream, startFromHead=True, **after)
            yield from (event["message"] for event in answer["events"])
            if seen.get(stream) == answer["nextForwardToken"]:
                break
            seen[stream] = answer["nextForwardToken"]


def show(line: str, screen: Screen) -> None:
    """A line of the job's log, formatted for people."""
    try:
        entry = json.loads(line)
        event, level = entry.pop("event"), entry.pop("level")
    except (ValueError, KeyError, TypeError, AttributeError):
        screen.line(line)
        return
    when, stage = str(entry.pop("timestamp", ""))[11:19], entry.pop("stage", "")
    done, total = entry.pop("done", None), entry.pop("total", None)
    facts = "  ".join(f"{key} {value}" for key, value in entry.items() if key not in {"run", "attempt"})
    if done is not None and total is not None:
        screen.progress(f"{when} {stage:<16} {event} {done}/{total}  {facts}".rstrip())
    else:
        screen.line(f"{when} {stage:<16} {'' if level == 'info' else level + ': '}{event}  {facts}".rstrip())


def outcome(job: Mapping[str, Any], results: str, again: str) -> tuple[int, list[str]]:
    """The outcome of a job: the exit code of the job's own table, and lines for a person.

    Args:
        job: Its description.
        results: Location of the run's files.
        again: How to continue the run.
    """
    lines = [*_price(job)]
    if job["TrainingJobStatus"] == "Completed":
        lines += [f"{m['MetricName']} {m['Value']:g}" for m in job.get("FinalMetricDataList", ())]
        return 0, [*lines, f"model: {job['ModelArtifacts']['S3ModelArtifacts']}", f"results: {results}/results.json"]
    if job["TrainingJobStatus"] == "Stopped":
        lines.append(f"stopped: {job['SecondaryStatus']}; what was published is kept in {results}")
        return PREEMPTED, [*lines, f"to go on: {again}"]
    reason = job.get("FailureReason", "")
    # The job's reason, from the failure file, or SageMaker's after it.
    found = re.search(r"\(exit code (\d+)\)", reason) or re.search(r"exit code: (\d+)", reason, re.IGNORECASE)
    if found is None:
        return 1, [*lines, f"failed: {reason}", f"the job did not come to say why; to go on: {again}"]
    code = int(found[1])
    meaning, retry = EXIT_CODES.get(code, ("not one of the job's own (137: killed, mostly for its memory)", "yes"))
    lines += [f"failed: {reason}", f"exit code {code}: {meaning}; start again? {retry}"]
    lines.append(f"what was published is kept in {results}")
    return code, lines if retry == "no" else [*lines, f"to go on: {again}"]


def _price(job: Mapping[str, Any]) -> Iterator[str]:
    training, billable = job.get("TrainingTimeInSeconds", 0), job.get("BillableTimeInSeconds", 0)
    if training:
        machines = job.get("ResourceConfig", {}).get("InstanceCount", 1)
        saved = f", {(1 - billable / training) * 100:.0f} % saved" if job.get("EnableManagedSpotTraining") else ""
        yield f"{training} s of training, {billable} s to pay for on each of {machines} machine(s){saved}"
