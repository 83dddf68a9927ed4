"""`mrl-redimnet push`: a saved model to the Hub."""

import argparse

from mrl_redimnet_cli.arguments import Commands, add_command, add_push_options, print_pushed, push_options


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    parser = add_command(commands, "push", run, help="push a saved model to a Hub repository")
    add_push_options(parser, "a saved model")


def run(arguments: argparse.Namespace) -> None:
    """Pushes the model's folder in one commit."""
    from mrl_redimnet.adapters.hub import push_base

    print_pushed(push_base(arguments.folder, arguments.repository, **push_options(arguments)))
