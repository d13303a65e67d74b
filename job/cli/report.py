"""The command `report`: the HTML report of a finished run again."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from job.cli.arguments import COMMANDS, parse_arguments
from job.cli.output import REPORT_FILE, print_lines, refuse_folder, write_page
from job.cli.reading import reading
from job.errors import DataError, Problem
from job.report.report import read_report_data, render_report
from job.results.after_run import read_after_run
from job.results.promotion import open_run_or_pointer
from job.results.reader import read_published
from job.storage.verified_download import fetch_artifact


def report_command(argv: Sequence[str]) -> int:
    """`report RUN`: writes the HTML report again, with the records made since the run was published.

    Raises:
        SettingsError: It is not clear which run, or there is none.
        VerificationError: The manifest is not what the job wrote.
        DataError: What was published is gone, or was altered.
    """
    parsed = parse_arguments(argv, COMMANDS["report"].arguments)
    output = parsed.options.get("--output", REPORT_FILE)
    refuse_folder(output)
    storage, _ = reading(parsed, quick=True)
    run = read_published(open_run_or_pointer(parsed.runs[0], storage))
    with tempfile.TemporaryDirectory(prefix="qlora-job-") as folder:
        try:
            evidence = read_report_data(run.results, lambda artifact: fetch_artifact(run.store, artifact, Path(folder)))
        except (KeyError, TypeError, ValueError) as error:  # the hashes are right, so it was written like this
            raise DataError([Problem(run.store.uri, f"its records were not written by this job: {error}")]) from error
    page = render_report(run.results, evidence, read_after_run(run.store))
    write_page(output, page)
    return print_lines([f"report: {Path(output).absolute()}"])
