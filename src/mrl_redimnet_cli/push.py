"""`mrl-redimnet push`: a saved model to the Hub."""

import argparse

from mrl_redimnet_cli.arguments import (
    Commands,
    add_command,
    add_push_options,
    print_pushed,
    push_options,
    saved_model,
)


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    parser = add_command(commands, "push", run, help="push a saved model to a Hub repository")
    add_push_options(parser, "folder of a saved model, or the name of one in the package", saved_model)


def run(arguments: argparse.Namespace) -> None:
    """Pushes the model's folder in one commit."""
    from mrl_redimnet.adapters.hub import push_base

    print_pushed(push_base(arguments.folder, arguments.repository, **push_options(arguments)))
