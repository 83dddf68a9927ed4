"""`mrl-redimnet demo`: a page to try a model on, in a browser."""

import argparse
from pathlib import Path

from mrl_redimnet_cli.arguments import (
    MODEL,
    Commands,
    add_command,
    add_named_adapters,
    add_thresholds,
    folder,
    model_source,
    must_be_there,
    named_adapters,
)


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    parser = add_command(
        commands,
        "demo",
        run,
        help="a page to try a model on, in a browser",
        epilog="Ctrl-C or SIGTERM ends it, and deletes the recordings. See docs/demo.md.",
    )
    parser.add_argument("model", nargs="?", default="nano", help=f"the model: {MODEL} [nano, from the package]")
    add_named_adapters(parser, "that the page calls it")
    parser.add_argument(
        "--detector", type=Path, metavar="FOLDER", help="a saved domain detector, which chooses among the adapters"
    )
    add_thresholds(parser)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at [127.0.0.1: this machine alone]")
    parser.add_argument("--port", type=int, help="[the first free one from 7860 on]")
    parser.add_argument("--device", help="such as cuda:1 [an accelerator where there is one]")
    parser.add_argument("--browser", action="store_true", help="also open the page in the browser of this machine")
    must_be_there(parser, model=model_source, detector=folder)


def run(arguments: argparse.Namespace) -> None:
    """Shows the page until it is told to stop."""
    from mrl_redimnet.demo.listener import Listener
    from mrl_redimnet.demo.page import run_until_stopped

    listener = Listener.load(
        arguments.model,
        named_adapters(arguments),
        detector=arguments.detector,
        thresholds=arguments.thresholds,
        device=arguments.device,
    )
    run_until_stopped(listener, arguments.host, arguments.port, browser=arguments.browser)
