"""The arguments of each command: one table for the usage and `--help` (`help_text.py`) and the parser, which is here.

How to add a command: an entry in `COMMANDS` here, and a file in `job/cli/` with its name, in which the function has its
name, too: `verify_command` in `verify.py`. Everything after the command that is not one of its own arguments is a
setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from job.common.secrets_in_text import secret_in, shown
from job.errors import Problem, SettingsError, raise_problems

_RUN_HELP = "path or URI of a finished run: its folder, or the results.json in it"
_POINTER_HELP = f"{_RUN_HELP}; or of a pointer that `promote` wrote"


@dataclass(frozen=True)
class Argument:
    """An argument of a command: positional (`RESULTS`), an option with a value (`--output FILE`) or a flag (`--gate`).

    An option with `choices` that is not given has the first of them.
    """

    name: str
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    runs: tuple[int, int | None] | None = None
    """Of a flag that changes the number of runs: (smallest, largest). None: one run for each positional argument."""
    required: bool = False
    """Of an option: whether it must be given."""

    @property
    def positional(self) -> bool:
        """Whether it is given by position, without a name."""
        return not self.name.startswith("--")

    @property
    def takes_value(self) -> bool:
        """Whether its name is followed by a value."""
        return bool(self.metavar or self.choices)

    @property
    def value(self) -> str:
        """What stands for its value in the usage line: `FILE`, or `{table,json}`."""
        return self.metavar or f"{{{','.join(self.choices)}}}"

    @property
    def usage(self) -> str:
        """Its form in the usage line."""
        if self.positional:
            return self.name
        shown = f"{self.name} {self.value}" if self.takes_value else self.name
        return shown if self.required else f"[{shown}]"


@dataclass(frozen=True)
class Command:
    """What a command does, its own arguments, which settings it takes as well, and examples for `--help`.

    Attributes:
        summary: One line for the list of commands.
        notes: What `--help` says of it besides.
        settings: `reading`: those about reading a store. They can also be set in the environment.
        examples: What follows `qlora-job COMMAND` in a shell.
    """

    summary: str
    arguments: tuple[Argument, ...] = ()
    settings: Literal["all", "reading", "none"] = "all"
    examples: tuple[str, ...] = ()
    notes: str = ""

    @property
    def usage(self) -> str:
        """What follows the command's name."""
        settings = [] if self.settings == "none" else ["[--GROUP.NAME VALUE ...]"]
        return " ".join([*(argument.usage for argument in self.arguments), *settings])


def _format(*choices: str) -> Argument:
    return Argument("--format", f"output format (default: {choices[0]})", choices=choices)


_KEY = Argument(
    "--key", "the signer's public key (PEM): a run without a signature by this key is an error", metavar="FILE"
)
_SHOW = Argument("--show", "print the first N rows as tokenized, and mark the tokens that the loss counts", metavar="N")
_CONFIG = Argument("--config", "YAML or TOML file with settings (environment: JOB_CONFIG)", metavar="FILE")
_EXPORT_NOTES = """\
RUN is not changed. The exports are in a new run beside it, <id of RUN>-<formats>, whose last lines of output name its
folder. --run.output gives another place, --run.id another id; a JOB_RUN__ID that still names RUN has to be unset. If
the export is interrupted, the same command resumes it.

Settings that are not given are those of RUN, not the defaults; only those of exports, the gate and the machine
may differ. Relative paths among them begin at the folder in which this command is run, as in every run."""
_RUN = Command(
    "run the job, or resume the run of this name; the default command",
    (_CONFIG,),
    examples=(
        "--preset demo",
        "--run.id my-first-run --data.source rows.jsonl --model.id org/model",
        "--config settings.yaml --run.output s3://bucket/runs",
    ),
)

COMMANDS = {
    "run": _RUN,
    "train": _RUN,
    "plan": Command(
        "check settings and inputs; forecast memory, time and cost; needs no GPU",
        (_format("table", "json"), _SHOW, _CONFIG),
        examples=("--data.source rows.jsonl --show 3", "--config settings.yaml --format json"),
    ),
    "status": Command(
        "show the state of a run from its store: stage, step, time left, why it ended, results; needs no GPU",
        (
            Argument("RUN", "path or URI of a run, finished or not: its folder, or the results.json in it"),
            Argument(
                "--stalled-after",
                "call the run stalled if its attempt wrote no record for so long (default: 1.2 times the run's "
                "JOB_TRAIN__STALL_SECONDS)",
                metavar="SECONDS",
            ),
            _format("table", "json"),
        ),
        settings="reading",
        examples=("runs/my-first-run", "s3://bucket/runs/my-first-run --format json"),
    ),
    "config": Command(
        "show every setting, its value, and where it came from",
        (Argument("--schema", "print the JSON Schema of all settings instead"), _CONFIG),
        examples=("--config settings.yaml", "--schema"),
    ),
    "report": Command(
        "write the HTML report of a finished run again",
        (
            Argument("RUN", _POINTER_HELP),
            Argument("--output", "file for the report (default: report.html)", metavar="FILE"),
        ),
        settings="reading",
        examples=("runs/my-first-run --output report.html",),
    ),
    "verify": Command(
        "check every file and figure of a finished run; exit code 4 if one is wrong",
        (Argument("RUN", _POINTER_HELP), _KEY, _format("table", "json")),
        settings="reading",
        examples=("runs/my-first-run", "s3://bucket/runs/my-first-run --key pub.pem"),
    ),
    "compare": Command(
        "compare two finished runs: what differs, and their adapters question by question",
        (
            Argument("A", _POINTER_HELP),
            Argument("B", "another finished run, given in the same ways"),
            _format("table", "json", "markdown"),
            Argument("--gate", "exit code 3 if B is worse than A by more than the thresholds allow"),
            Argument(
                "--metric",
                "metric of the thresholds: acc, acc_norm, exact_match, ...; with --history the task and its "
                "metric, such as arc_easy/acc (default: that of the first task)",
                metavar="METRIC",
            ),
            Argument("--min-delta", "smallest accepted gain of B over A, as a fraction; implies --gate", metavar="X"),
            Argument(
                "--max-regression", "largest accepted loss of B against A, as a fraction; implies --gate", metavar="X"
            ),
            Argument("--policy", "judge B against A by the rules of a JOB_GATE__POLICY file", metavar="FILE"),
            Argument(
                "--history",
                "instead of A and B, give runs or folders of runs: shows a metric of all runs by time, with the "
                "control limits of the earlier runs; exit code 3 if the newest run is outside of them",
                runs=(1, None),
            ),
            Argument("--output", "with --history: also draw the chart into this HTML file", metavar="FILE"),
        ),
        settings="reading",
        examples=(
            "runs/first runs/second",
            "runs/first runs/second --gate --max-regression 0.01",
            "--history s3://bucket/runs --output history.html",
        ),
    ),
    "export": Command(
        "export a finished run in other formats, each scored, as a new run that trains nothing",
        (
            Argument("RUN", _RUN_HELP),
            Argument("FORMATS", "formats, separated by commas, such as merged,gguf:q4_k_m; see JOB_EXPORT__FORMATS"),
            _CONFIG,
        ),
        examples=(
            "runs/my-first-run gguf:q4_k_m",
            "s3://bucket/runs/my-first-run merged,fp8 --run.output s3://bucket/runs --run.id my-first-run-fp8",
        ),
        notes=_EXPORT_NOTES,
    ),
    "push": Command(
        "verify a finished run, and push adapter, model card and exports to the hub or a registry",
        (
            Argument("RUN", _POINTER_HELP),
            Argument(
                "--hub",
                "repository of the hub, namespace/name (default: the run's own JOB_EXPORT__HUB)",
                metavar="REPO",
            ),
            Argument("--hub-revision", "branch of the repository (default: main)", metavar="BRANCH"),
            Argument("--public", "create a new repository as public, and accept an existing public one"),
            Argument(
                "--oci", "image, registry/repository:tag (default: the run's own JOB_EXPORT__OCI)", metavar="IMAGE"
            ),
            Argument("--plain-http", "connect to the registry without TLS"),
            _KEY,
            Argument("--despite-gate", "push the run even if its quality gate is not met"),
            Argument("--dry-run", "print what would be pushed, and write nothing"),
        ),
        settings="reading",
        examples=(
            "runs/my-first-run --hub namespace/name --dry-run",
            "runs/my-first-run --oci ghcr.io/lab/model:first",
        ),
    ),
    "promote": Command(
        "verify a finished run whose gate is met, and write a pointer to it; exit code 76 if another promotion won",
        (
            Argument("RUN", _RUN_HELP),
            Argument(
                "--to",
                "path or URI of the pointer, a small file, such as s3://bucket/models/current",
                metavar="POINTER",
                required=True,
            ),
            _KEY,
            Argument(
                "--without-gate", "also promote a run without a quality gate; one that missed its gate is refused"
            ),
            Argument("--rollback", "without RUN: point to the previous run again", runs=(0, 0)),
        ),
        settings="reading",
        examples=("runs/my-first-run --to s3://bucket/models/current", "--rollback --to s3://bucket/models/current"),
    ),
    "serve-check": Command(
        "ask a server of a run's model the run's own questions; exit code 4 if its answers differ",
        (
            Argument("RUN", _POINTER_HELP),
            Argument(
                "--served", "adapter, or an exported format (default: the one that the gate judged)", metavar="FORMAT"
            ),
            Argument("--url", "a running server, http://host:port (default: one is started here)", metavar="URL"),
            Argument(
                "--server",
                "vllm, llama.cpp or transformers (default: detected with --url, else the first that is installed). "
                "pip install '.[export]' in the repository installs the last two; vllm is started from PATH",
                metavar="KIND",
            ),
            Argument("--model", "name of the model on the server (default: the last that it lists)", metavar="NAME"),
            Argument("--questions", "number of questions to ask (default: 50)", metavar="N"),
            _KEY,
            Argument("--record", "also store the result in the run's folder, for `report` and `verify`"),
            _format("table", "json"),
        ),
        settings="reading",
        examples=("runs/my-first-run", "runs/my-first-run --url http://host:8000 --record"),
    ),
    "selftest": Command(
        "kill and resume a run on this machine, and compare it bit by bit with an uninterrupted one", (), "none", ("",)
    ),
}
"""SageMaker starts the container of a training job with the argument `train`."""


@dataclass(frozen=True)
class Arguments:
    """The arguments after a command: runs, options with their values, flags, and settings for `load_reading`."""

    runs: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    settings: list[str] = field(default_factory=list)


def parse_arguments(argv: Sequence[str], arguments: Sequence[Argument]) -> Arguments:
    """Parses the words after a command that reads published runs.

    Raises:
        SettingsError: With all problems together.
    """
    parsed, problems = Arguments(), []
    options = {argument.name: argument for argument in arguments if not argument.positional}
    remaining = iter(argv)
    for word in remaining:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            parsed.runs.append(word)
        elif name in options and not options[name].takes_value and not equals:
            parsed.flags.add(name)
        elif name in options or ("." in name and word.startswith("--")):
            value = value if equals else next(remaining, "")
            if not value:
                wanted = options[name].value if name in options else "VALUE"
                problems.append(Problem(name, f"needs a value: {name} {wanted}"))
            elif "." in name:
                parsed.settings.append(f"{name}={value}")
            else:
                parsed.options[name] = value
        else:
            problems.append(Problem(name, f"is unknown; {_instead(name, options)}"))
    # Refused before other problems, which repeat words; a setting among them is checked by its type.
    words = [*((shown(run), run) for run in parsed.runs), *parsed.options.items()]
    raise_problems(Problem(where, secret) for where, word in words if (secret := secret_in(word)) is not None)
    missing = list(_missing(parsed, arguments))
    if problems and len(parsed.runs) > sum(argument.positional for argument in arguments):
        missing = missing[1:]  # the run that is one too many may be the value of the unknown option
    problems += missing
    if problems:
        raise SettingsError(problems)
    return parsed


def _missing(parsed: Arguments, arguments: Sequence[Argument]) -> Iterator[Problem]:
    """The problems with the number of runs and with choices; sets defaults of choices in `parsed.options`."""
    runs = [argument.name for argument in arguments if argument.positional]
    with_flag = next((argument for argument in arguments if argument.runs and argument.name in parsed.flags), None)
    least, most = (with_flag and with_flag.runs) or (len(runs), len(runs))
    if most is not None and len(parsed.runs) > most:
        taken = f"{with_flag.name} takes no run" if with_flag else f"the command takes {' and '.join(runs)} only"
        yield Problem(" ".join(parsed.runs[most:]), f"is one argument too many: {taken}; remove it")
    if with_flag and len(parsed.runs) < least:
        yield Problem(with_flag.name, "needs runs, or folders of runs; give their paths or URIs")
    elif not with_flag:
        what = "is missing; give the path or URI of a run, such as runs/my-first-run or s3://bucket/runs/my-first-run"
        yield from (Problem(name, what) for name in runs[len(parsed.runs) :])
    for argument in arguments:
        if argument.required and argument.name not in parsed.options:
            yield Problem(argument.name, f"is missing; give the {argument.help}")
        if argument.choices and parsed.options.setdefault(argument.name, argument.choices[0]) not in argument.choices:
            yield Problem(argument.name, f"must be {' or '.join(argument.choices)}")


def _instead(name: str, options: Mapping[str, Argument]) -> str:
    """What to type instead of an unknown option."""
    if near := get_close_matches(name, options, n=1):
        return f"the nearest is {near[0]}"
    word = name.lstrip("-")
    if choice := next((option for option in options.values() if word in option.choices), None):
        return f"write {choice.name} {word}"
    return "see the command's --help"
