"""The `mrl-redimnet` command: parses, checks that paths are there, and only then imports what runs.

This is a package of its own because `mrl_redimnet` registers its models with transformers when it is imported, and so
imports torch: help and errors in a command line should not take seconds. `run` of each command names the function that
does the work, MODULE:FUNCTION, which takes the parsed arguments and may return an exit status.
"""

import argparse
import contextlib
import importlib
import io
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version

from mrl_redimnet_cli import corpora, hub, models, speakers, trials
from mrl_redimnet_cli.arguments import check_paths

COMMANDS = (
    models.add_convert,
    models.add_rotate,
    trials.add_evaluate,
    trials.add_calibrate,
    speakers.add_verify,
    speakers.add_identify,
    corpora.add_embed,
    trials.add_robustness,
    hub.add_push,
    hub.add_adapters,
    models.add_export,
    corpora.add_prepare,
    corpora.add_synthesise,
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command (argv None: the process's own arguments); returns the exit status: 0, 2 for an error that is
    told in one message, or what the command's help says."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = make_parser().parse_args(argv, argparse.Namespace(command_line=argv))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that are no UTF-8
    try:
        check_paths(arguments)
        run = _function(arguments.run)
        with _notes():
            return run(arguments) or 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"mrl-redimnet {arguments.command}: {error}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Warnings about audio are shown in one line each, without the place in the code."""
    from mrl_redimnet.audio.io import AudioWarning

    with warnings.catch_warnings():
        show = warnings.showwarning

        def shown(message, category, *where, **more):
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
    for add in COMMANDS:
        add(commands)
    return parser


def _function(run: str):
    """The function that MODULE:FUNCTION names, its module imported now."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()  # of reading and writing models
    set_verbosity_error()  # its report on tensors that do not fit: our errors name them
    module, name = run.split(":")
    return getattr(importlib.import_module(module), name)
