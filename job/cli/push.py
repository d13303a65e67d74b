"""The command `push`: a finished run to its targets, by the function that the job itself calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from job.cli.arguments import COMMANDS, Arguments, parse_arguments
from job.cli.output import print_lines
from job.cli.reading import reading, signer
from job.common.formatting import size
from job.common.tables import visible
from job.errors import Problem, SettingsError
from job.push.push import TARGETS, Target, content_of, push_run, require_answers, targets
from job.results.completed import require_gate
from job.results.promotion import open_run_or_pointer
from job.results.reader import read_published
from job.runs.work_folder import folder_for
from job.settings.field_types import explain
from job.settings.schema import Export
from job.verification.verify import require_verified, verify

_OPTIONS = {"--hub": "hub", "--hub-revision": "hub_revision", "--oci": "oci"}
_FLAGS = {"--public": ("hub_private", False), "--plain-http": ("oci_plain_http", True)}
_OWN = ("hub", "hub_revision", "hub_private", "oci", "oci_plain_http")
"""Settings that are the run's own, unless the command line names a place."""


def push_command(argv: Sequence[str]) -> int:
    """`push RUN`: verifies the run, then pushes it, or prints what would be pushed.

    Raises:
        SettingsError: It is not clear which run, or where to.
        VerificationError: The run is not what its manifest says.
        GateError: Its quality gate is not met.
        Unreachable: With `--dry-run`, the store or a target does not answer within seconds.
        JobError: As the target says.
    """
    parsed = parse_arguments(argv, COMMANDS["push"].arguments)
    dry_run = "--dry-run" in parsed.flags
    storage, cache = reading(parsed, quick=dry_run)
    store, key = open_run_or_pointer(parsed.runs[0], storage), signer(parsed)
    with folder_for(f"verification of {store.uri}", cache) as work:
        require_verified(verify(store, work, storage, key=key))
    results = read_published(store).results
    push_targets = _targets(parsed, results)
    if "--despite-gate" not in parsed.flags:
        require_gate(results)
    if dry_run:
        require_answers(push_targets)
        with folder_for(f"push of {store.uri}", cache) as work:
            content = content_of(store, results, work)
            lines = [
                line for target in push_targets for line in _preview(target, target.changes(content), target.check())
            ]
    else:
        pushed = push_run(store, results, push_targets, cache=cache, again=True)
        lines = [f"{one.target}: {one.place} holds the run as {one.id}" for one in pushed]
    return print_lines(map(visible, lines))


def _preview(target: Target, changes: Sequence[tuple[str, str, int]], access: str) -> list[str]:
    rows = [f"  {change:<8} {size(bytes_, ' ') if bytes_ else '':>10}  {path}" for change, path, bytes_ in changes]
    total = sum(bytes_ for change, _, bytes_ in changes if change in {"new", "changed"})
    return [
        f"{target.kind}: {target.place}",
        f"  {access}",
        *rows,
        f"  to upload: {size(total, ' ')}; nothing was written",
    ]


def _targets(parsed: Arguments, results: Mapping[str, Any]) -> tuple[Target, ...]:
    """Those of the command line, else those of the run's own settings.

    Raises:
        SettingsError: There are none, or a name is none.
    """
    values: dict[str, Any] = {n: parsed.options[option] for option, n in _OPTIONS.items() if option in parsed.options}
    if not values.keys() & set(TARGETS):
        own = {name.removeprefix("export."): setting["value"] for name, setting in results["settings"].items()}
        values = {name: own[name] for name in _OWN if name in own} | values
    values |= {name: value for flag, (name, value) in _FLAGS.items() if flag in parsed.flags}
    try:
        configured = targets(Export.model_validate(values))
    except ValidationError as error:
        options = {name: option for option, name in _OPTIONS.items()}
        records = error.errors(include_url=False, include_input=False)
        problems = [Problem(options.get(str(r["loc"][-1]), "--hub"), explain(r)) for r in records]
        raise SettingsError(problems) from None
    if not configured:
        raise SettingsError(
            [Problem("--hub or --oci", "must be given: the run's own settings name no repository or image to push to")]
        )
    return configured
