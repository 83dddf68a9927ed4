"""`mrl-redimnet push | adapters ...`."""

import argparse
from pathlib import Path

from mrl_redimnet_cli.arguments import add_command, file, folder, must_be_there, source
from mrl_redimnet_cli.names import CHOICES


def add_push(commands):
    """Adds `push` to the subparsers `commands`."""
    parser = add_command(commands, "push", help="a saved model to a Hub repository")
    _add_push(parser, "a saved model")
    parser.set_defaults(run="mrl_redimnet.adapter_commands:push_model")


def _add_push(parser: argparse.ArgumentParser, what: str):
    parser.add_argument("folder", type=Path, help=what)
    parser.add_argument("repository", help="Hub id; made if it is not there")
    parser.add_argument("--private", action="store_true", help="if it is made")
    parser.add_argument("--revision", help="a branch, made if it is not there [main]")
    parser.add_argument("--tag", help="a name for the pushed state, such as v1")
    must_be_there(parser, folder=folder)


def add_adapters(commands):
    """Adds `adapters` to the subparsers `commands`."""
    parser = add_command(commands, "adapters", help="push, pull, list, look at, mix and merge adapters")
    actions = parser.add_subparsers(dest="action", required=True)

    push = add_command(actions, "push", help="an adapter's folder to a Hub repository")
    _add_push(push, "a saved adapter")
    push.add_argument("--base", help="Hub id of its base [what the folder says]")
    push.set_defaults(run="mrl_redimnet.adapter_commands:push_adapter_folder")

    pull = add_command(actions, "pull", help="an adapter from the Hub into the cache; prints the folder")
    pull.add_argument("repository", help="Hub id")
    pull.add_argument("--revision", help="branch, tag or commit")
    pull.set_defaults(run="mrl_redimnet.adapter_commands:pull_adapter")

    listing = add_command(actions, "list", help="the adapters of a base on the Hub")
    listing.add_argument("base", help="Hub id of the base")
    listing.add_argument("--author", help="only this user's or organisation's")
    listing.set_defaults(run="mrl_redimnet.adapter_commands:show_adapters")

    info = add_command(actions, "info", help="what an adapter is: base, domain, rank, size")
    info.add_argument("adapter", help="path or Hub id")
    info.add_argument("--revision", help="branch, tag or commit")
    must_be_there(info, adapter=source)
    info.set_defaults(run="mrl_redimnet.adapter_commands:show_info")

    detect = add_command(actions, "detect", help="the domain that each file sounds like")
    detect.add_argument("detector", type=Path, help="folder of a saved detector")
    detect.add_argument("files", nargs="+", type=Path, metavar="AUDIO")
    must_be_there(detect, detector=folder, files=file)
    detect.set_defaults(run="mrl_redimnet.adapter_commands:detect")

    mix = add_command(actions, "mix", help="several adapters into a new one")
    mix.add_argument("base", help="path or Hub id")
    mix.add_argument("weights", nargs="+", metavar="ADAPTER=WEIGHT", help="path or Hub id, and its weight")
    mix.add_argument("--out", type=Path, required=True, help="a new folder")
    mix.add_argument("--method", choices=CHOICES["adapters.combining.METHODS"], default="svd")
    mix.add_argument("--rank", type=int, help="of the mix, for the svd methods [the largest of each layer]")
    mix.add_argument("--density", type=float, help="share of the numbers that ties, dare and magnitude_prune keep")
    must_be_there(mix, base=source)
    mix.set_defaults(run="mrl_redimnet.adapter_commands:mix")

    merge = add_command(actions, "merge", help="an adapter into its base: a plain model")
    merge.add_argument("base", help="path or Hub id")
    merge.add_argument("adapter", help="path or Hub id")
    merge.add_argument("out", type=Path, help="a new folder")
    must_be_there(merge, base=source, adapter=source)
    merge.set_defaults(run="mrl_redimnet.adapter_commands:merge")
