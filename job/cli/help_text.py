"""The texts of `--help`: of the program, of a command, and of the settings that words name.

All follow from `COMMANDS` in `arguments.py` and from the documentation of the settings; see `settings/help_options.py`.
"""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from difflib import get_close_matches

from job.cli.arguments import COMMANDS, Command
from job.errors import exit_codes

_RETRY = {"no": "", "yes": " (retry)", "yes, free": " (retry)", "counts against the limit": " (a retry may help)"}


def shown_commands() -> list[str]:
    """The commands that are listed: all but `train`, the word that SageMaker starts containers with."""
    return [name for name in COMMANDS if name != "train"]


def usage() -> str:
    """The text of `qlora-job --help`: the commands, and what they have in common."""
    listed = "\n".join(
        f"  {f'[{name}]' if name == 'run' else name:<13}{COMMANDS[name].summary}" for name in shown_commands()
    )
    codes = "\n".join(f"  {code:<3} {meaning}{_RETRY[retry]}" for code, (meaning, retry) in exit_codes().items())
    return f"""\
usage: qlora-job COMMAND [ARGUMENT ...] [--GROUP.NAME VALUE ...]

{listed}

`qlora-job COMMAND --help` lists the arguments of a command, and the settings that it reads; `--help train` describes
those of the group train with their defaults, `--help rank` those with rank in their names, `--help all` every setting.
A setting is given as --group.name VALUE, or as JOB_GROUP__NAME in the environment. Precedence: command line,
environment, files in the folder JOB_SECRETS_DIR, SageMaker's hyperparameters.json, the file JOB_CONFIG (--config),
SageMaker's channels, the run in JOB_EXPORT__RUN, the preset (--preset), platform, default. `qlora-job config` shows
each value with its source.

examples:
  qlora-job run --preset demo                                 # needs neither a GPU nor a network
  qlora-job plan --data.source rows.jsonl --model.id org/model
  qlora-job status s3://bucket/runs/my-first-run

exit codes:
  0   done, manifest published
{codes}
"""


def command_help(name: str, words: Sequence[str] = ()) -> str:
    """The text of `qlora-job COMMAND --help [WORD ...]`: arguments from `COMMANDS`, settings from their documentation.

    A command that takes all settings describes those that the words name, and else lists the groups.
    """
    command = COMMANDS[name]
    described = settings_help(words) if command.settings == "all" else ""
    return described or _command_help(name, command, words)


def settings_help(words: Sequence[str]) -> str:
    """What the settings are that words after `--help` name; empty if they name none."""
    from job.settings.help_options import add_options, find_settings, near_groups

    if not (names := find_settings(words)):
        return ""
    groups = "".join(f"`--help {group}` describes the group {group}.\n\n" for group in near_groups(words))
    parser = ArgumentParser(add_help=False, usage=SUPPRESS, formatter_class=RawDescriptionHelpFormatter)
    add_options(parser, names)
    return groups + parser.format_help().removeprefix("usage: ==SUPPRESS==").lstrip("\n")


def words_without_help(words: Sequence[str], asked: str = "--help", commands: Sequence[str] = ()) -> str:
    """The lines that say that words after `--help` match nothing, with the nearest names; empty without words.

    The words are not repeated: one may be a secret, given as the value of a setting. `commands` are those that the
    words could also have named.
    """
    from job.settings.help_options import near_groups, near_names

    if not words:
        return ""
    groups = near_groups(words)
    near = [f"the command {name}" for name in get_close_matches(words[0], commands, n=1)]
    near = near or [f"the group {name}" if name in groups else name for name in near_names(words)]
    similar = f"; similar: {', '.join(near)}" if near else ""
    no_command = "no command, and " if commands else ""
    return f"The words after {asked} are {no_command}in no setting's name{similar}.\n\n"


def _command_help(name: str, command: Command, words: Sequence[str]) -> str:
    """What a command does, and its arguments."""
    takes_all = command.settings == "all"
    parser = ArgumentParser(
        prog=f"qlora-job {name}",
        usage=f"qlora-job {name} {command.usage}".rstrip(),
        description=f"{command.summary}\n\n{command.notes}".rstrip(),
        epilog=_epilog(name, command),
        formatter_class=RawDescriptionHelpFormatter,
        add_help=not takes_all,
    )
    group = parser.add_argument_group("arguments")
    for argument in command.arguments:
        text = argument.help.replace("%", "%%")
        if argument.positional:
            group.add_argument(argument.name, help=text)
        elif argument.takes_value:
            group.add_argument(argument.name, help=text, metavar=argument.metavar, choices=argument.choices or None)
        else:
            group.add_argument(argument.name, help=text, action="store_true")
    if command.settings != "none":
        from job.settings.help_options import add_options, list_of_groups
        from job.settings.schema import READING

        add_options(parser, {"preset"} if takes_all else READING)
    if takes_all:
        about = "describe settings: those of a group (train), those with a word in their names (rank), or all"
        parser.add_argument("-h", "--help", nargs="*", metavar="NAME", help=about)
        listed = f"settings, as --GROUP.NAME VALUE; --help GROUP describes those of a group:\n\n{list_of_groups()}\n\n"
        return words_without_help(words) + parser.format_help().replace("examples:\n", f"{listed}examples:\n", 1)
    return parser.format_help()


def _epilog(name: str, command: Command) -> str:
    examples = "\n".join(f"  qlora-job {name} {example}".rstrip() for example in command.examples)
    return f"examples:\n{examples}\n\n`qlora-job --help` lists the exit codes, and the sources of settings."
