"""The command `verify`: whether a published run is what its manifest says."""

from __future__ import annotations

from collections.abc import Sequence

from job.cli.arguments import COMMANDS, parse_arguments
from job.cli.output import print_json, print_lines
from job.cli.reading import reading, signer
from job.results.promotion import open_run_or_pointer
from job.runs.work_folder import folder_for
from job.storage.first_answer import require_answers
from job.verification.verify import as_json, as_lines, require_verified, verify


def verify_command(argv: Sequence[str]) -> int:
    """`verify RUN`: prints every check.

    Raises:
        VerificationError: Something differs.
        Unreachable: The store does not answer; a first request is given up after about 30 s.
    """
    parsed = parse_arguments(argv, COMMANDS["verify"].arguments)
    storage, cache = reading(parsed)
    key = signer(parsed)
    require_answers(parsed.runs, storage)
    store = open_run_or_pointer(parsed.runs[0], storage)
    with folder_for(f"verification of {store.uri}", cache) as work:
        checks = verify(store, work, storage, key=key)
    as_object = parsed.options["--format"] == "json"
    code = print_json(as_json(store.uri, checks)) if as_object else print_lines(as_lines(checks))
    require_verified(checks)
    return code
