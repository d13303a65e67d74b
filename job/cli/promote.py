"""The command `promote`: verifies a finished run, and moves a pointer to it or back."""

from __future__ import annotations

from collections.abc import Sequence

from job import log
from job.cli.arguments import COMMANDS, parse_arguments
from job.cli.output import print_lines
from job.cli.reading import reading, signer
from job.common.tables import visible
from job.errors import Problem, SettingsError, VerificationError
from job.results.promotion import check_pointer_location, pointer_location, promote, require_gate_held, roll_back
from job.results.reader import open_run, read_published
from job.runs.work_folder import folder_for
from job.storage.open import is_remote
from job.verification.verify import require_verified, verify


def promote_command(argv: Sequence[str]) -> int:
    """`promote RUN --to PLACE`, or `promote --rollback --to PLACE`: prints what the pointer points to now.

    Raises:
        SettingsError: The place cannot hold a pointer, the run does not exist, or there is no earlier run to go back
            to.
        VerificationError: The run is not what its manifest says.
        GateError: Its quality gate is not met, or it has none.
        PointerMoved: Another process moved the pointer at the same time.
    """
    parsed = parse_arguments(argv, COMMANDS["promote"].arguments)
    storage, cache = reading(parsed)
    if "--to" not in parsed.options:
        raise SettingsError([Problem("--to", "must be given: the pointer, such as s3://bucket/models/current")])
    alone = [name for name in ("--key", "--without-gate") if name in parsed.options or name in parsed.flags]
    if "--rollback" in parsed.flags and alone:
        what = "has no effect with --rollback; remove it"
        raise SettingsError([Problem(name, what) for name in alone])
    key = signer(parsed)
    place = pointer_location(parsed.options["--to"], storage)
    check_pointer_location(place)
    if "--rollback" in parsed.flags:
        current, before = roll_back(place, storage)
        lines = [f"{place.uri} points to {current.text} again", f"moved back from {before.text}"]
        return print_lines(map(visible, lines))
    store = open_run(parsed.runs[0], storage)
    run = read_published(store)
    require_gate_held(run.results, without_gate="--without-gate" in parsed.flags)
    with folder_for(f"promotion of {store.uri}", cache) as work:
        require_verified(verify(store, work, storage, key=key))
    if read_published(store).sha256 != run.sha256:
        raise VerificationError([Problem(store.uri, "was replaced while it was verified; repeat the command")])
    if is_remote(place.store.uri) and not is_remote(store.uri):
        log.get_logger().warning(
            "the pointer names a folder of this machine, which other machines may not reach", run=store.uri
        )
    current, earlier = promote(place, run)
    if current == earlier:
        return print_lines(map(visible, [f"{place.uri} points to {current.text} already; nothing was written"]))
    lines = [f"{place.uri} points to {current.text}"]
    return print_lines(map(visible, [*lines, *([] if earlier is None else [f"before it pointed to {earlier.text}"])]))
