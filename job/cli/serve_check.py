"""The command `serve-check`: the run's own questions to a server of its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from job.cli.arguments import COMMANDS, Arguments, parse_arguments
from job.cli.output import print_json, print_lines
from job.cli.reading import reading, signer
from job.common.export_formats import is_adapter
from job.common.lora_readers import published_rank
from job.common.tables import visible
from job.errors import DataError, Problem, SettingsError
from job.evaluation import samples
from job.evaluation.samples import Sample
from job.records import Artifact
from job.results.after_run import write_serve_check
from job.results.promotion import open_run_or_pointer
from job.results.public_bases import public_base
from job.results.reader import MAX_SAMPLES_BYTES, PublishedRun, read_published
from job.runs.layout import ADAPTER, answers_key, export_folder, export_side
from job.runs.work_folder import folder_for
from job.serving.check import Served, as_json, as_lines, require_alike, serve_check
from job.serving.client import Client
from job.serving.servers import SERVERS, Model, installed_server, model_name, running_server, server_kind
from job.settings.load import environment
from job.storage.verified_download import fetch_artifact
from job.verification.verify import require_verified, verify

QUESTIONS = 50


def serve_check_command(argv: Sequence[str]) -> int:
    """`serve-check RUN`: prints how a server answers the run's questions, and how fast.

    Raises:
        SettingsError: It is not clear which run, format or server, or there is none.
        VerificationError: The server answers otherwise than the records say, or with `--key` the run does not verify.
        DataError: A file of the run is not what was published.
        AccessDenied, Unreachable: As the server answers.
    """
    parsed = parse_arguments(argv, COMMANDS["serve-check"].arguments)
    storage, cache = reading(parsed)
    store = open_run_or_pointer(parsed.runs[0], storage)
    if (key := signer(parsed)) is not None:
        with folder_for(f"verification of {store.uri}", cache) as checked:
            require_verified(verify(store, checked, storage, key=key))
    run = read_published(store)
    count, server = _count(parsed), parsed.options.get("--server")
    if server is not None and server not in SERVERS:
        raise SettingsError([Problem("--server", f"must be {' or '.join(SERVERS)}")])
    shipped, side = _served(parsed, run.results)
    with ExitStack() as stack:
        work = stack.enter_context(folder_for(f"serving of {store.uri}", cache))
        questions = _records(run, side, work)
        if url := parsed.options.get("--url"):
            client = Client(url.rstrip("/").removesuffix("/v1"), environment().get("OPENAI_API_KEY"))
            name = model_name(client, parsed.options.get("--model"))
            server = server or server_kind(client)
        else:
            model = _fetched(run, shipped, work)
            server = server or installed_server(model)
            client, name = stack.enter_context(running_server(server, model))
        result = serve_check(Served(client, server, name, shipped), questions, count)
    if "--record" in parsed.flags:
        write_serve_check(run.store, result)
    as_object = parsed.options["--format"] == "json"
    code = print_json(as_json(result)) if as_object else print_lines(map(visible, as_lines(result)))
    require_alike(result)
    return code


def _count(parsed: Arguments) -> int:
    try:
        count = int(parsed.options.get("--questions", str(QUESTIONS)))
    except ValueError:
        count = 0
    if count < 1:
        raise SettingsError([Problem("--questions", "must be a whole number of at least 1")])
    return count


def _served(parsed: Arguments, results: Mapping[str, Any]) -> tuple[str, str]:
    """What is served, and the side of its records."""
    exports = {export["format"]: export["candidate"] for export in results.get("exports", ())}
    gate_format = (results["settings"].get("gate.on") or {}).get("value", "adapter")
    shipped = parsed.options.get("--served", gate_format)
    if shipped == "adapter":
        return shipped, shipped
    if shipped not in exports:
        known = ", ".join(["adapter", *exports])
        what = f"is not in this run, which has {known}; `qlora-job export` makes a run that has other formats"
        raise SettingsError([Problem("--served", what)])
    return shipped, export_side(shipped, exports[shipped])


def _records(run: PublishedRun, side: str, work: Path) -> list[tuple[str, Sample]]:
    """(task, record) of every question, verified."""
    listed = {artifact["path"]: Artifact(**artifact) for artifact in run.results["artifacts"]}
    records = []
    for task in run.results["evaluation"]["tasks"]:
        artifact = listed.get(answers_key(task, side))
        if artifact is None or artifact.bytes > MAX_SAMPLES_BYTES:
            raise DataError(
                [Problem(answers_key(task, side), "is not among the artifacts, so nothing can be compared")]
            )
        try:
            parsed = samples.parse(fetch_artifact(run.store, artifact, work).read_bytes())
        except ValueError as error:
            raise DataError([Problem(artifact.path, str(error))]) from error
        records += [(task, sample) for sample in parsed]
    return records


def _fetched(run: PublishedRun, shipped: str, work: Path) -> Model:
    """The verified files of the served model, in a local folder."""
    prefix = ADAPTER if shipped == "adapter" else export_folder(shipped)
    files = [Artifact(**one) for one in run.results["artifacts"] if one["path"].startswith(prefix)]
    for artifact in files:
        fetch_artifact(run.store, artifact, work)
    settings = {name: setting["value"] for name, setting in run.results["settings"].items()}
    model = run.results["model"]
    base = public_base(model["id"], model["revision"], settings.get("model.name"))[0]
    if Path(model["id"]).is_dir():
        base = model["id"]
    if shipped == "adapter" or is_adapter(shipped):
        return Model("adapter", work / prefix, base, published_rank(settings))
    return Model(shipped, work / prefix)
