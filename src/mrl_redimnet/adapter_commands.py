"""`mrl-redimnet push` and `mrl-redimnet adapters ...`: models and adapters to and from the Hub, mixed and merged."""

from collections.abc import Callable
from pathlib import Path

from mrl_redimnet.adapters.bank import AdapterBank
from mrl_redimnet.adapters.detector import DomainDetector
from mrl_redimnet.adapters.hub import adapter_info, list_adapters, pull, push_adapter, push_base
from mrl_redimnet.adapters.publishing import write_adapter_card
from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.files import refuse_existing
from mrl_redimnet.saving import save_model


def push_model(arguments):
    """`mrl-redimnet push`."""
    _push(push_base, arguments)


def push_adapter_folder(arguments):
    """`mrl-redimnet adapters push`."""
    _push(push_adapter, arguments, base=arguments.base)


def _push(send: Callable, arguments, **options):
    pushed = send(
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


def pull_adapter(arguments):
    """`mrl-redimnet adapters pull`."""
    print(pull(arguments.repository, revision=arguments.revision))


def show_adapters(arguments):
    """`mrl-redimnet adapters list`."""
    rows = list_adapters(arguments.base, author=arguments.author)
    if not rows:
        print(f"No adapter on the Hub names {arguments.base} as its base.")
    for row in rows:
        when = f"{row.modified:%Y-%m-%d}" if row.modified else "-"
        print(f"{row.repository:<50} {row.domain or '-':<16} {when}  {'private' if row.private else 'public'}")


def show_info(arguments):
    """`mrl-redimnet adapters info`."""
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


def detect(arguments):
    """`mrl-redimnet adapters detect`."""
    detector = DomainDetector.load(arguments.detector)
    for file in arguments.files:
        found = detector.detect(read_audio(file))
        odds = ", ".join(f"{domain} {share:.2f}" for domain, share in found.probabilities.items())
        print(f"{file}: {found.domain or 'the base'} ({odds})")


def mix(arguments):
    """`mrl-redimnet adapters mix`."""
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


def merge(arguments):
    """`mrl-redimnet adapters merge`."""
    refuse_existing(arguments.out)
    bank = AdapterBank.load(arguments.base, {"adapter": arguments.adapter})
    base, adapter = (
        Path(source).name if Path(source).is_dir() else source for source in (arguments.base, arguments.adapter)
    )
    save_model(bank.merged("adapter"), arguments.out, training=f"{base} with the adapter {adapter} folded in.")
    print(f"{arguments.out}: {arguments.base} with {arguments.adapter} folded in; a model without adapters.")
