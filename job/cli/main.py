"""The command line: which command is run; an exception becomes an exit code in `error_report`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module

from job import __version__, log
from job.cli.arguments import COMMANDS
from job.cli.error_report import report, translated
from job.cli.help_text import command_help, settings_help, shown_commands, usage, words_without_help
from job.cli.library_variables import configure_azure, take_secret_files
from job.cli.output import print_text
from job.common.interrupt import was_interrupted
from job.common.out_of_memory import check_address_space
from job.common.secrets_in_text import shown
from job.errors import Problem, SettingsError
from job.settings.load import current_platform, environment, secrets

HELP = frozenset({"-h", "--help"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Raises:
        KeyboardInterrupt: By Ctrl-C, but in a run.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    platform = current_platform()
    take_secret_files()
    configure_azure()
    # Before the settings are read: errors in them are log lines, too.
    asked = environment().get("JOB_LOG__FORMAT", "")
    log.configure(asked if asked in {"json", "console"} else "auto", "info", secrets())
    try:
        return _dispatch(argv)
    except Exception as error:  # this is the one handler
        if was_interrupted():  # by the time a library has turned it into an error of its own
            raise KeyboardInterrupt from error
        return report(translated(error), platform)


def _dispatch(argv: list[str]) -> int:
    if argv and argv[0] in {*HELP, "help"}:
        return print_text(_help(argv[1:], argv[0]))
    if argv and argv[0] in {"--version", "version"}:
        return print_text(f"qlora-job {__version__}\n")
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = "".join(f"; the nearest is {name}" for name in get_close_matches(argv[0], COMMANDS, n=1))
        if argv[0].lower().endswith((".yaml", ".yml", ".toml")):
            near = f"; give a settings file as --config {shown(argv[0])}"
        raise SettingsError(
            [Problem(shown(argv[0]), f"is not a command{near}; commands are {', '.join(shown_commands())}")]
        )
    command = argv.pop(0) if argv and argv[0] in COMMANDS else "run"
    if HELP & set(argv):
        first = min(argv.index(word) for word in HELP & set(argv))
        return print_text(command_help(command, argv[first + 1 :]))
    if command in {"run", "train", "plan"}:
        check_address_space()
    return function_of(command)(argv)


def _help(words: Sequence[str], asked: str) -> str:
    """What `--help` without a command before it prints: of a command, of the settings that words name, or of all.

    `asked` is how it was asked for: `-h`, `--help` or `help`.
    """
    command, *others = words or [""]
    if command in shown_commands():
        return command_help(command, others)
    return settings_help(words) or words_without_help(words, asked, shown_commands()) + usage()


def function_of(command: str) -> Callable[[Sequence[str]], int]:
    """The function of a command of `COMMANDS`: takes the words after it, and returns the exit code.

    It is `verify_command` of `job/cli/verify.py` for `verify`, and so on. Only this file is imported, so that no
    command waits for the libraries of another.
    """
    name = {"train": "run"}.get(command, command).replace("-", "_")
    function: Callable[[Sequence[str]], int] = getattr(import_module(f"job.cli.{name}"), f"{name}_command")
    return function
