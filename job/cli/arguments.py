"""The arguments of each command: one table for the usage, `--help` and the parser.

How to add a command: an entry in `COMMANDS` here, and its function in `job/cli/main.py`. Everything after the command
that is not one of its own arguments is a setting.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from job.errors import Problem, SettingsError

_RUN_HELP = "a finished run: its folder or its results.json, path or URI"
_POINTER_HELP = f"{_RUN_HELP}; or a pointer that promote wrote"


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
    """Of a flag: how many runs are given with it, at least and at most, where that is not one a positional argument."""

    @property
    def positional(self) -> bool:
        """Whether it is given by position, without a name."""
        return not self.name.startswith("--")

    @property
    def takes_value(self) -> bool:
        """Whether its name is followed by a value."""
        return bool(self.metavar or self.choices)

    @property
    def usage(self) -> str:
        """Its form in the usage line."""
        if self.positional:
            return self.name
        value = self.metavar or f"{{{','.join(self.choices)}}}" if self.takes_value else ""
        return f"[{f'{self.name} {value}'.rstrip()}]"


@dataclass(frozen=True)
class Command:
    """What a command does, its own arguments, and which settings it takes beside them."""

    summary: str
    arguments: tuple[Argument, ...] = ()
    settings: Literal["all", "reading", "none"] = "all"

    @property
    def usage(self) -> str:
        """What follows the command's name."""
        settings = [] if self.settings == "none" else ["[--GROUP.NAME VALUE ...]"]
        return " ".join([*(argument.usage for argument in self.arguments), *settings])


def _format(*choices: str) -> Argument:
    return Argument("--format", f"output format (default: {choices[0]})", choices=choices)


_KEY = Argument("--key", "public key of the signer (PEM): a run without its signature does not verify", metavar="FILE")
_SHOW = Argument("--show", "print the first N rows as tokenized, the tokens that the loss counts marked", metavar="N")
_CONFIG = Argument("--config", "YAML or TOML file of settings; also as JOB_CONFIG in the environment", metavar="FILE")
_RUN = Command("run the job; the default command", (_CONFIG,))

COMMANDS = {
    "run": _RUN,
    "train": _RUN,
    "plan": Command(
        "check settings and inputs, forecast memory, time and cost; needs no GPU",
        (_format("table", "json"), _SHOW, _CONFIG),
    ),
    "status": Command(
        "show how a run is, from its store: stage, step, time left, and why it ended; needs no GPU",
        (
            Argument("RUN", "a run, finished or not: its folder or its results.json, path or URI"),
            Argument(
                "--stalled-after",
                "an attempt that is silent for longer is stalled (default: the run's JOB_TRAIN__STALL_SECONDS)",
                metavar="SECONDS",
            ),
            _format("table", "json"),
        ),
        settings="reading",
    ),
    "config": Command(
        "show every setting, its value, and where it came from",
        (Argument("--schema", "print the JSON Schema of all settings instead"), _CONFIG),
    ),
    "report": Command(
        "write the HTML report of a finished run once more",
        (
            Argument("RESULTS", _POINTER_HELP),
            Argument("--output", "file to write the page to (default: report.html)", metavar="FILE"),
        ),
        settings="reading",
    ),
    "verify": Command(
        "check every file and figure of a published run; exit code 4 if one is wrong",
        (Argument("RESULTS", _POINTER_HELP), _KEY, _format("table", "json")),
        settings="reading",
    ),
    "compare": Command(
        "compare two runs: what differs, and their adapters question by question",
        (
            Argument("A", _POINTER_HELP),
            Argument("B", "another finished run"),
            _format("table", "json", "markdown"),
            Argument("--gate", "exit code 3 if B is worse than A by more than the thresholds allow"),
            Argument(
                "--metric",
                "what the thresholds apply to: acc, acc_norm, exact_match, ...; with --history the task and its "
                "metric, such as arc_easy/acc (default: that of the first task)",
                metavar="METRIC",
            ),
            Argument("--min-delta", "smallest accepted gain of B over A, as a fraction", metavar="X"),
            Argument("--max-regression", "largest accepted loss of B against A, as a fraction", metavar="X"),
            Argument("--policy", "judge B against A by the rules of a JOB_GATE__POLICY file", metavar="FILE"),
            Argument(
                "--history",
                "instead of A and B, runs or folders of runs: a metric over them in the order of time, with the "
                "control limits of the earlier ones; exit code 3 if the newest is outside of these",
                runs=(1, None),
            ),
            Argument("--output", "with --history: also draw the chart into this HTML file", metavar="FILE"),
        ),
        settings="reading",
    ),
    "push": Command(
        "verify a finished run, and push adapter, card and exported formats to the hub or a registry",
        (
            Argument("RESULTS", _POINTER_HELP),
            Argument("--hub", "repository, namespace/name (default: the run's own JOB_EXPORT__HUB)", metavar="REPO"),
            Argument("--hub-revision", "branch of it (default: main)", metavar="BRANCH"),
            Argument("--public", "make a new repository public, and accept one that is public"),
            Argument(
                "--oci", "image, registry/repository:tag (default: the run's own JOB_EXPORT__OCI)", metavar="IMAGE"
            ),
            Argument("--plain-http", "speak to its registry without TLS"),
            _KEY,
            Argument("--despite-gate", "push a run whose quality gate is not met"),
            Argument("--dry-run", "print what would be pushed, and write nothing"),
        ),
        settings="reading",
    ),
    "promote": Command(
        "verify a finished run and point to it, if its gate is met; exit code 76 if somebody else moved the pointer",
        (
            Argument("RESULTS", _RUN_HELP),
            Argument(
                "--to", "the pointer: a file that is written, such as s3://bucket/models/current", metavar="PLACE"
            ),
            _KEY,
            Argument("--without-gate", "promote a run that has no quality gate; one whose gate is not met is refused"),
            Argument("--rollback", "move the pointer back to the run before; no RESULTS are given", runs=(0, 0)),
        ),
        settings="reading",
    ),
    "serve-check": Command(
        "ask a server of a finished run's model its own questions; exit code 4 if it answers otherwise",
        (
            Argument("RESULTS", _POINTER_HELP),
            Argument("--served", "adapter, or an exported format (default: what the gate judged)", metavar="FORMAT"),
            Argument("--url", "a server that runs, http://host:port (default: one is started here)", metavar="URL"),
            Argument(
                "--server",
                "vllm, llama.cpp or transformers (default: as it is recognized, or the first that is installed). "
                "The last two come with pip install 'qlora-job[export]', vllm from an environment of its own on PATH",
                metavar="KIND",
            ),
            Argument("--model", "name of the model on the server (default: the last that it lists)", metavar="NAME"),
            Argument("--questions", "how many to ask (default: 50)", metavar="N"),
            _KEY,
            Argument("--record", "also store the result in the run's folder, for report and verify"),
            _format("table", "json"),
        ),
        settings="reading",
    ),
    "selftest": Command(
        "kill and resume a run on this machine, and compare it bit by bit with an uninterrupted one", (), "none"
    ),
}
"""`train` is how SageMaker starts the container of a training job."""


@dataclass(frozen=True)
class Arguments:
    """The words after a command: positional ones, options with their values, flags, and settings for `load_reading`."""

    runs: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    settings: list[str] = field(default_factory=list)


def parse_arguments(words: Sequence[str], arguments: Sequence[Argument]) -> Arguments:
    """Parses the words after a command that reads published runs.

    Raises:
        SettingsError: With everything that is wrong, together.
    """
    given, problems = Arguments(), []
    known = {argument.name: argument for argument in arguments if not argument.positional}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            given.runs.append(word)
        elif name in known and not known[name].takes_value and not equals:
            given.flags.add(name)
        elif name in known or "." in name:
            value = value if equals else next(rest, "")
            if not value:
                problems.append(Problem(name, f"needs a value: {name} VALUE"))
            elif "." in name:
                given.settings.append(f"{name}={value}")
            else:
                given.options[name] = value
        else:
            near = get_close_matches(name, known, n=1)
            problems.append(Problem(name, f"is unknown; the nearest is {near[0]}" if near else "is unknown"))
    wrong = list(_missing(given, arguments))
    if problems and len(given.runs) > sum(argument.positional for argument in arguments):
        wrong = wrong[1:]  # one too many may be the value of an option that is unknown
    problems += wrong
    if problems:
        raise SettingsError(problems)
    return given


def _missing(given: Arguments, arguments: Sequence[Argument]) -> Iterator[Problem]:
    """What is wrong with the number of runs and with choices; sets the choices that are not given."""
    runs = [argument.name for argument in arguments if argument.positional]
    with_flag = next((argument for argument in arguments if argument.runs and argument.name in given.flags), None)
    least, most = (with_flag and with_flag.runs) or (len(runs), len(runs))
    if len(given.runs) < least or (most is not None and len(given.runs) > most):
        count = {0: "no run", 1: "one run"}.get(least, f"{least} runs")
        count += " or more" if most is None else ""
        name = with_flag.name if with_flag else " ".join(runs)
        yield Problem(name, f"needs {count}, path or URI; {len(given.runs)} given")
    for argument in arguments:
        if argument.choices and given.options.setdefault(argument.name, argument.choices[0]) not in argument.choices:
            yield Problem(argument.name, f"must be {' or '.join(argument.choices)}")


def command_help(name: str) -> str:
    """The help of a command: its own arguments from `COMMANDS`, and the settings it takes from their documentation."""
    command = COMMANDS[name]
    parser = ArgumentParser(
        prog=f"qlora-job {name}",
        usage=f"qlora-job {name} {command.usage}".rstrip(),
        description=command.summary,
        formatter_class=RawDescriptionHelpFormatter,
    )
    own = parser.add_argument_group("arguments")
    for argument in command.arguments:
        text = argument.help.replace("%", "%%")
        if argument.positional:
            own.add_argument(argument.name, help=text)
        elif argument.takes_value:
            own.add_argument(argument.name, help=text, metavar=argument.metavar, choices=argument.choices or None)
        else:
            own.add_argument(argument.name, help=text, action="store_true")
    if command.settings != "none":
        from job.settings.help_options import add_options

        add_options(parser, reading=command.settings == "reading")
    return parser.format_help()
