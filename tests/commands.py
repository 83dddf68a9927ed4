"""The `mrl-redimnet` command, run in this process."""

from pathlib import Path

from mrl_redimnet_cli import main


def run(*argv) -> int:
    """The exit status of `mrl-redimnet argv...`."""
    return main([str(argument) for argument in argv])


def refusal(capsys, *argv) -> str:
    """The one message of a command that fails."""
    assert run(*argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"mrl-redimnet {argv[0]}: ") and printed.err.endswith("\n")
    return printed.err


def lists(speech: Path, *names: str) -> list:
    """The arguments for trial lists of the fixture `speech` of conftest: all.txt, or those that are named."""
    return ["--trials", *(speech / f"{name}.txt" for name in names or ("all",)), "--folder", speech / "wav"]
