"""The `mrl-redimnet` command: parses, checks that paths are there, and only then imports what runs.

This is a package of its own because `mrl_redimnet` registers its models with transformers when it is imported, and so
imports torch: help and errors in a command line should not take seconds. Each command is a module with `add(commands)`,
which adds its parser, and `run(arguments)`, which imports what it needs, calls the library, prints, and may return an
exit status. A new command is one more module, and one more entry in `COMMANDS`.
"""

import argparse
import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from mrl_redimnet_cli import (
    adapters,
    calibrate,
    convert,
    demo,
    diarize,
    embed,
    evaluate,
    export,
    identify,
    plda,
    prepare,
    push,
    robustness,
    rotate,
    serve,
    synthesise,
    verify,
)
from mrl_redimnet_cli.arguments import check_paths

COMMANDS = (
    convert,
    rotate,
    evaluate,
    calibrate,
    verify,
    identify,
    diarize,
    embed,
    serve,
    demo,
    robustness,
    push,
    adapters,
    export,
    plda,
    prepare,
    synthesise,
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command (argv None: the process's own arguments).

    Returns the exit status: 0, 2 for an error, which is printed in one message, 130 after Ctrl-C, or what the command's
    help says.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = make_parser().parse_args(argv, argparse.Namespace(command_line=argv))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that are no UTF-8
    try:
        check_paths(arguments)
        _quieten_transformers()
        with _notes():
            return arguments.run(arguments) or 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"mrl-redimnet {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mrl-redimnet {arguments.command}: stopped.", file=sys.stderr)
        return 130  # as of shells: 128 and the number of the signal


def _quieten_transformers():
    """No progress bars of reading and writing models, no report on tensors that do not fit: our errors name them."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Warnings about audio are shown in one line each, without the place in the code."""
    from mrl_redimnet.audio.io import AudioWarning

    with warnings.catch_warnings():
        show = warnings.showwarning

        def shown(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, AudioWarning):
                print(f"Note: {message}", file=sys.stderr)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = shown
        yield


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="mrl-redimnet", description="Matryoshka ReDimNet speaker embeddings.")
    parser.add_argument("--version", action="version", version=f"mrl-redimnet {version('mrl-redimnet')}")
    parser.set_defaults(paths={})
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser
