"""`mrl-redimnet adapters ...`: adapters to and from the Hub, looked at, chosen by audio, mixed, cut and merged."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mrl_redimnet_cli.arguments import (
    MODEL,
    Commands,
    adapter_source,
    add_command,
    add_push_options,
    file,
    folder,
    model_source,
    must_be_there,
    print_pushed,
    push_options,
)
from mrl_redimnet_cli.names import CHOICES

if TYPE_CHECKING:
    from mrl_redimnet.adapters.facts import AdapterFacts


def add(commands: Commands) -> None:
    """Adds the commands to the subparsers `commands`."""
    parser = commands.add_parser(
        "adapters",
        help="push, pull, list, look at, mix, cut and merge adapters",
        description="Push, pull, list, look at, mix, cut and merge adapters.",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    _add_those_of_the_hub(actions)
    _add_those_that_look(actions)
    _add_those_that_make(actions)


def _add_those_of_the_hub(actions: Commands) -> None:
    push = add_command(actions, "push", push_folder, help="push a saved adapter to a Hub repository")
    add_push_options(push, "folder of a saved adapter", folder)
    push.add_argument("--base", help="Hub id of the adapter's base [what the folder says]")
    push.add_argument(
        "--collection", action="store_true", help="also put base and adapter into your collection 'Adapters of BASE'"
    )

    pull = add_command(
        actions, "pull", pull_folder, help="download an adapter from the Hub into the cache, and print the folder"
    )
    pull.add_argument("repository", help="Hub id of the adapter")
    pull.add_argument("--revision", help="branch, tag or commit")

    listing = add_command(actions, "list", show_list, help="list the adapters of a base on the Hub")
    listing.add_argument("base", help="Hub id of the base")
    listing.add_argument("--author", help="only adapters of this user or organisation")


def _add_those_that_look(actions: Commands) -> None:
    info = add_command(actions, "info", show_info, help="show an adapter's base, domain, layers, rank and size")
    info.add_argument("adapter", help="the adapter: a path or Hub id")
    info.add_argument("--revision", help="branch, tag or commit")
    must_be_there(info, adapter=adapter_source)

    detect = add_command(actions, "detect", show_domains, help="say which domain each file sounds like")
    detect.add_argument("detector", type=Path, help="folder of a saved domain detector")
    detect.add_argument("files", nargs="+", type=Path, metavar="AUDIO", help="audio files")
    must_be_there(detect, detector=folder, files=file)


def _add_those_that_make(actions: Commands) -> None:
    mix = add_command(actions, "mix", mix_into, help="mix several adapters of one base into a new adapter")
    mix.add_argument("base", help=f"the base: {MODEL}")
    mix.add_argument(
        "weights", nargs="+", metavar="ADAPTER=WEIGHT", help="an adapter (a path or Hub id) and its weight in the mix"
    )
    mix.add_argument("--out", type=Path, required=True, help="a new folder")
    mix.add_argument(
        "--method", choices=CHOICES["adapters.combining.METHODS"], default="svd", help="how they are combined [svd]"
    )
    mix.add_argument(
        "--rank", type=int, help="rank of the mix, for the methods with svd [the largest rank of each layer]"
    )
    mix.add_argument(
        "--density", type=float, help="share of the numbers that the methods ties, dare and magnitude_prune keep"
    )
    must_be_there(mix, base=model_source)

    cut = add_command(actions, "cut", cut_to_rank, help="save an adapter cut to a lower rank, as a new adapter")
    cut.add_argument("base", help=f"the base: {MODEL}")
    cut.add_argument("adapter", help="the adapter: a path or Hub id")
    cut.add_argument("out", type=Path, help="a new folder")
    cut.add_argument("--rank", type=int, required=True, help="the highest rank that a layer keeps")
    must_be_there(cut, base=model_source, adapter=adapter_source)

    merge = add_command(
        actions,
        "merge",
        merge_into,
        help="merge an adapter into the weights of its base, and save that as a plain model",
    )
    merge.add_argument("base", help=f"the base: {MODEL}")
    merge.add_argument("adapter", help="the adapter: a path or Hub id")
    merge.add_argument("out", type=Path, help="a new folder")
    must_be_there(merge, base=model_source, adapter=adapter_source)


def push_folder(arguments: argparse.Namespace) -> None:
    """`mrl-redimnet adapters push`."""
    from mrl_redimnet.adapters.hub import push_adapter

    options = {"base": arguments.base, "collection": arguments.collection, **push_options(arguments)}
    print_pushed(push_adapter(arguments.folder, arguments.repository, **options))


def pull_folder(arguments: argparse.Namespace) -> None:
    """`mrl-redimnet adapters pull`."""
    from mrl_redimnet.adapters.hub import pull

    print(pull(arguments.repository, revision=arguments.revision))


def show_list(arguments: argparse.Namespace) -> None:
    """`mrl-redimnet adapters list`."""
    from mrl_redimnet.adapters.hub import list_adapters

    rows = list_adapters(arguments.base, author=arguments.author)
    if not rows:
        print(f"No adapter on the Hub names {arguments.base} as its base.")
    for row in rows:
        when = f"{row.modified:%Y-%m-%d}" if row.modified else "-"
        print(f"{row.repository:<50} {row.domain or '-':<16} {when}  {'private' if row.private else 'public'}")


def show_info(arguments: argparse.Namespace) -> None:
    """`mrl-redimnet adapters info`."""
    from mrl_redimnet.adapters.hub import adapter_info

    info = adapter_info(arguments.adapter, revision=arguments.revision)
    facts = info.facts
    lines = {
        "adapter": info.source + (f" at {info.revision[:12]}" if info.revision else ""),
        "base": str(facts.base) if facts else info.base,
        "domain": facts.domain if facts else None,
        "task": f"{facts.task} {', '.join(facts.labels)}".strip() if facts else None,
        "layers": info.placement,
        "rank": None if info.rank is None else f"{info.rank}{nested_ranks(facts)}",
        "size": f"{info.parameters:,} parameters, {info.size:,} bytes",
        "training": facts.training if facts else None,
    }
    for name, value in lines.items():
        print(f"{name:<9}{value or 'not said'}")


def nested_ranks(facts: "AdapterFacts | None") -> str:
    """Which ranks an adapter was trained to be cut to, as a part of a line; nothing for most."""
    ranks = [] if facts is None else facts.nested_ranks[:-1]
    return f" (trained to be cut to {', '.join(map(str, ranks))})" if ranks else ""


def show_domains(arguments: argparse.Namespace) -> None:
    """`mrl-redimnet adapters detect`."""
    from mrl_redimnet.adapters.detector import DomainDetector
    from mrl_redimnet.audio.io import read_audio

    detector = DomainDetector.load(arguments.detector)
    for path in arguments.files:
        found = detector.detect(read_audio(path))
        odds = ", ".join(f"{domain} {share:.2f}" for domain, share in found.probabilities.items())
        print(f"{path}: {found.domain or 'the base'} ({odds})")


def mix_into(arguments: argparse.Namespace) -> None:
    """`mrl-redimnet adapters mix`."""
    from mrl_redimnet.adapters.publishing import mix_adapters
    from mrl_redimnet.files import refuse_existing

    refuse_existing(arguments.out)
    weights = {}
    for pair in arguments.weights:
        adapter, _, weight = pair.rpartition("=")
        if adapter in weights:
            raise ValueError(f"{adapter} is named twice: give it one weight.")
        try:
            weights[adapter] = float(weight)
        except ValueError as error:
            raise ValueError(f"{pair!r}: expected ADAPTER=WEIGHT, a path or Hub id and a number.") from error
    mix_adapters(arguments.base, weights, arguments.out, arguments.method, arguments.rank, arguments.density)
    print(f"{arguments.out}: {arguments.method} of {', '.join(arguments.weights)}.")


def cut_to_rank(arguments: argparse.Namespace) -> None:
    """`mrl-redimnet adapters cut`."""
    from mrl_redimnet.adapters.hub import adapter_info
    from mrl_redimnet.adapters.publishing import cut_adapter
    from mrl_redimnet.files import refuse_existing

    refuse_existing(arguments.out)
    cut_adapter(arguments.base, arguments.adapter, arguments.rank, arguments.out)
    size = adapter_info(arguments.out).size
    print(f"{arguments.out}: {arguments.adapter} cut to rank {arguments.rank}, {size:,} bytes.")


def merge_into(arguments: argparse.Namespace) -> None:
    """`mrl-redimnet adapters merge`."""
    from mrl_redimnet.adapters.publishing import merge_adapter
    from mrl_redimnet.files import refuse_existing

    refuse_existing(arguments.out)
    merge_adapter(arguments.base, arguments.adapter, arguments.out)
    print(f"{arguments.out}: {arguments.base} with {arguments.adapter} folded in; a model without adapters.")
