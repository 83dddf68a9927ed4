"""`mrl-redimnet push` and `mrl-redimnet adapters ...`: models and adapters to and from the Hub, mixed and merged."""

import argparse
from pathlib import Path

from mrl_redimnet.adapters.bank import AdapterBank
from mrl_redimnet.adapters.combining import METHODS
from mrl_redimnet.adapters.detector import DomainDetector
from mrl_redimnet.adapters.hub import adapter_info, list_adapters, pull, push_adapter, push_base
from mrl_redimnet.audio import read_audio
from mrl_redimnet.folders import refuse_existing
from mrl_redimnet.saving import save_model, write_adapter_card


def add_adapter_commands(commands):
    """Adds the subcommands to `commands` of an argument parser."""
    push = commands.add_parser("push", help="a saved model to a Hub repository")
    _push_arguments(push, "a saved model")
    push.set_defaults(run=_push, send=push_base)

    adapters = commands.add_parser("adapters", help="push, pull, list, look at, mix and merge adapters")
    actions = adapters.add_subparsers(dest="action", required=True)

    push = actions.add_parser("push", help="an adapter's folder to a Hub repository")
    _push_arguments(push, "a saved adapter")
    push.add_argument("--base", help="Hub id of its base [what the folder says]")
    push.set_defaults(run=_push, send=push_adapter)

    fetch = actions.add_parser("pull", help="an adapter from the Hub into the cache; prints the folder")
    fetch.add_argument("repository", help="Hub id")
    fetch.add_argument("--revision", help="branch, tag or commit")
    fetch.set_defaults(run=_pull)

    listing = actions.add_parser("list", help="the adapters of a base on the Hub")
    listing.add_argument("base", help="Hub id of the base")
    listing.add_argument("--author", help="only this user's or organisation's")
    listing.set_defaults(run=_list)

    info = actions.add_parser("info", help="what an adapter is: base, domain, rank, size")
    info.add_argument("adapter", help="path or Hub id")
    info.add_argument("--revision", help="branch, tag or commit")
    info.set_defaults(run=_info)

    detect = actions.add_parser("detect", help="the domain that each file sounds like")
    detect.add_argument("detector", type=Path, help="folder of a saved detector")
    detect.add_argument("files", nargs="+", type=Path, metavar="AUDIO")
    detect.set_defaults(run=_detect)

    mix = actions.add_parser("mix", help="several adapters into a new one")
    mix.add_argument("base", help="path or Hub id")
    mix.add_argument("weights", nargs="+", metavar="ADAPTER=WEIGHT", help="path or Hub id, and its weight")
    mix.add_argument("--out", type=Path, required=True, help="a new folder")
    mix.add_argument("--method", choices=METHODS, default="svd")
    mix.add_argument("--rank", type=int, help="of the mix, for the svd methods [the largest of each layer]")
    mix.add_argument("--density", type=float, help="share of the numbers that ties, dare and magnitude_prune keep")
    mix.set_defaults(run=_mix)

    merge = actions.add_parser("merge", help="an adapter into its base: a plain model")
    merge.add_argument("base", help="path or Hub id")
    merge.add_argument("adapter", help="path or Hub id")
    merge.add_argument("out", type=Path, help="a new folder")
    merge.set_defaults(run=_merge)


def _push_arguments(parser: argparse.ArgumentParser, what: str):
    parser.add_argument("folder", type=Path, help=what)
    parser.add_argument("repository", help="Hub id; made if it is not there")
    parser.add_argument("--private", action="store_true", help="if it is made")
    parser.add_argument("--revision", help="a branch, made if it is not there [main]")
    parser.add_argument("--tag", help="a name for the pushed state, such as v1")


def _push(arguments):
    options = {"base": arguments.base} if "base" in arguments else {}
    pushed = arguments.send(
        arguments.folder,
        arguments.repository,
        private=arguments.private,
        revision=arguments.revision,
        tag=arguments.tag,
        **options,
    )
    state = "pushed" if pushed.changed else "nothing new, no commit made"
    print(f"{pushed.url}: {state}, at {pushed.commit[:12]}.")
    if pushed.left_out:
        print(f"Not for the Hub, left out: {', '.join(pushed.left_out)}.")


def _pull(arguments):
    print(pull(arguments.repository, revision=arguments.revision))


def _list(arguments):
    rows = list_adapters(arguments.base, author=arguments.author)
    if not rows:
        print(f"No adapter on the Hub names {arguments.base} as its base.")
    for row in rows:
        when = f"{row.modified:%Y-%m-%d}" if row.modified else "-"
        print(f"{row.repository:<50} {row.domain or '-':<16} {when}  {'private' if row.private else 'public'}")


def _info(arguments):
    info = adapter_info(arguments.adapter, revision=arguments.revision)
    facts = info.facts
    lines = {
        "adapter": info.source + (f" at {info.revision[:12]}" if info.revision else ""),
        "base": str(facts.base) if facts else info.base,
        "domain": facts.domain if facts else None,
        "task": f"{facts.task} {', '.join(facts.labels)}".strip() if facts else None,
        "layers": info.placement,
        "rank": info.rank,
        "size": f"{info.parameters:,} parameters, {info.size:,} bytes",
        "training": facts.training if facts else None,
    }
    for name, value in lines.items():
        print(f"{name:<9}{value or 'not said'}")


def _detect(arguments):
    detector = DomainDetector.load(arguments.detector)
    for file in arguments.files:
        found = detector.detect(read_audio(file))
        odds = ", ".join(f"{domain} {share:.2f}" for domain, share in found.probabilities.items())
        print(f"{file}: {found.domain or 'the base'} ({odds})")


def _mix(arguments):
    refuse_existing(arguments.out)
    weights = {}
    for pair in arguments.weights:
        source, _, weight = pair.rpartition("=")
        if source in weights:
            raise ValueError(f"{source} is named twice: give it one weight.")
        try:
            weights[source] = float(weight)
        except ValueError as error:
            raise ValueError(f"{pair!r}: expected ADAPTER=WEIGHT, a path or Hub id and a number.") from error
    bank, chosen = AdapterBank.load(arguments.base), {}
    for source, weight in weights.items():
        facts = adapter_info(source).facts
        name = (facts.domain if facts else "adapter").replace(".", "-")
        name = f"{name} {len(chosen) + 1}" if name in chosen else name
        bank.add(name, source)
        chosen[name] = weight
    bank.combine("mix", chosen, arguments.method, rank=arguments.rank, density=arguments.density)
    bank.save("mix", arguments.out)
    write_adapter_card(arguments.out)
    print(f"{arguments.out}: {arguments.method} of {', '.join(arguments.weights)}.")


def _merge(arguments):
    refuse_existing(arguments.out)
    bank = AdapterBank.load(arguments.base, {"adapter": arguments.adapter})
    base, adapter = (
        Path(source).name if Path(source).is_dir() else source for source in (arguments.base, arguments.adapter)
    )
    save_model(bank.merged("adapter"), arguments.out, training=f"{base} with the adapter {adapter} folded in.")
    print(f"{arguments.out}: {arguments.base} with {arguments.adapter} folded in; a model without adapters.")
