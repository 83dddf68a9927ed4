"""What several commands take, and the check that the paths on a command line are there."""

import argparse
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mrl_redimnet_cli.names import CHOICES, VALUES, adapter_names, model_names, packaged_names, published_names

MODEL = "a path, Hub id, or name such as b2-vox2-ft_lm"  # what a model may be given as, for help texts

if TYPE_CHECKING:
    import torch

    from mrl_redimnet import SpeakerEncoder
    from mrl_redimnet.adapters.hub import Pushed
    from mrl_redimnet.audio.domains import Domain


class Commands(Protocol):
    """The subparsers of `argparse`, whose own class has no public name."""

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:
        """The parser of a new command, which takes the options of ArgumentParser and `help`."""


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int | None], help: str, **options: Any
) -> argparse.ArgumentParser:
    """The parser of a new command that `run` carries out. Its own help begins with what the list of commands says."""
    description = f"{help[0].upper()}{help[1:]}.".replace("?.", "?")
    parser = commands.add_parser(name, help=help, description=description, **options)
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds `model`, --adapter and --depth, which `load_encoder` loads."""
    parser.add_argument("model", help=f"the model: {MODEL}")
    parser.add_argument(
        "--adapter",
        help="an adapter to put on the model: a path, a Hub id or the name of one in the package",
    )
    parser.add_argument(
        "--depth", type=int, help="the number of stages after which the network ends, one of the model's exits [all]"
    )
    must_be_there(parser, model=model_source, adapter=adapter_source)


def load_encoder(arguments: argparse.Namespace, device: "torch.device | str | None" = None) -> "SpeakerEncoder":
    """What `add_model`'s arguments name. Raises as `SpeakerEncoder.from_pretrained`."""
    from mrl_redimnet import SpeakerEncoder

    return SpeakerEncoder.from_pretrained(arguments.model, arguments.adapter, device, depth=arguments.depth)


def add_named_adapters(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds --adapter NAME=SOURCE, which `named_adapters` reads. what: the name is."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help=f"an adapter, by the name {what}: a path or Hub id; may be given several times",
    )
    must_be_there(parser, adapter=_named_source)


def named_adapters(arguments: argparse.Namespace) -> dict[str, str]:
    """{name: path or Hub id} of every --adapter."""
    return {name: where for name, _, where in (given.partition("=") for given in arguments.adapter)}


def _named_source(given: str) -> str | None:
    name, equals, where = given.partition("=")
    return source(where) if name and equals else f"{given} is not NAME=SOURCE, such as telephony=me/my-adapter"


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Adds --scoring, --cohort and --top, which `check_scoring` checks."""
    top = VALUES["scoring.scorers.TOP"]
    parser.add_argument(
        "--scoring",
        choices=CHOICES["scoring.scorers.SCORERS"],
        default="cosine",
        help="how embeddings are compared: cosine, with the cohort's mean subtracted (centred), with adaptive "
        "symmetric score normalisation (as_norm), or both [cosine]",
    )
    parser.add_argument(
        "--cohort", type=Path, metavar="AUDIO_DIR", help="speech of other speakers, for every --scoring but cosine"
    )
    parser.add_argument(
        "--top", type=int, default=top, help=f"how many of the highest cohort scores as_norm takes [{top}]"
    )
    must_be_there(parser, cohort=folder)


def check_scoring(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a --scoring without the cohort that it needs."""
    if arguments.scoring != "cosine" and arguments.cohort is None:
        raise ValueError(f"--scoring {arguments.scoring} needs --cohort, a folder with speech of other speakers.")


def add_thresholds(parser: argparse.ArgumentParser) -> None:
    """Adds --thresholds."""
    file = VALUES["scoring.calibration.THRESHOLDS_FILE"]
    parser.add_argument("--thresholds", type=Path, metavar="FOLDER", help=f"the folder of {file} [the model's folder]")
    must_be_there(parser, thresholds=folder)


def add_decision(parser: argparse.ArgumentParser) -> None:
    """Adds --dim, --threshold and --thresholds."""
    parser.add_argument(
        "--dim", type=int, help="how many numbers of the embeddings are compared, from the first on [all]"
    )
    parser.add_argument("--threshold", type=float, help="accept scores from this one on [the saved threshold]")
    add_thresholds(parser)


def add_lists(parser: argparse.ArgumentParser) -> None:
    """Adds --trials for several lists, how they are read, --domain and --noise."""
    parser.add_argument(
        "--trials",
        type=Path,
        nargs="+",
        required=True,
        help="one trial list or several, of lines such as `1|0 path path`, see --format",
    )
    add_paths_of_lists(parser)
    parser.add_argument(
        "--domain",
        choices=sorted(CHOICES["audio.domains.DOMAINS"]),
        default="clean",
        help="acoustic domain that is simulated from the audio [clean: the audio as it is]",
    )
    parser.add_argument("--noise", type=Path, metavar="AUDIO_DIR", help="noise files for the domain noisy")
    must_be_there(parser, noise=folder)


def domain_of(arguments: argparse.Namespace) -> "Domain | None":
    """The domain of --domain and --noise; None for audio as it is."""
    from mrl_redimnet.audio.domains import make_domain

    return None if arguments.domain == "clean" else make_domain(arguments.domain, noise=arguments.noise)


def add_paths_of_lists(parser: argparse.ArgumentParser) -> None:
    """Adds --folder, --format and --suffix; --enrolments is added by the commands, which differ in what it may be."""
    formats = CHOICES["scoring.trials.FORMATS"]
    parser.add_argument("--folder", type=Path, required=True, help="the folder that the lists' paths are relative to")
    parser.add_argument(
        "--format", choices=["auto", *formats], default="auto", help="format of the lists [recognised by their lines]"
    )
    parser.add_argument("--suffix", help="replaces the suffix of every path in the lists, such as .flac")
    must_be_there(parser, trials=file, folder=folder)


def add_enrolments(parser: argparse.ArgumentParser) -> None:
    """Adds --enrolments FILE."""
    parser.add_argument(
        "--enrolments",
        type=Path,
        metavar="FILE",
        help="for lists with named enrolments: their utterances, in lines `name path ...`",
    )
    must_be_there(parser, enrolments=file)


def add_dims(parser: argparse.ArgumentParser, verb: str) -> None:
    """Adds --dims."""
    parser.add_argument(
        "--dims",
        type=int,
        nargs="+",
        help=f"numbers of dimensions to {verb} [those that the model was trained at]",
    )


def add_push_options(parser: argparse.ArgumentParser, what: str, check: Callable[[str], str | None]) -> None:
    """Adds what `push` and `adapters push` take. what: is pushed; check: says what is wrong with it."""
    parser.add_argument("folder", type=Path, help=what)
    parser.add_argument("repository", help="Hub id of the repository, which is made if there is none")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made now")
    parser.add_argument("--revision", help="branch to push to, which is made if there is none [main]")
    parser.add_argument("--tag", help="a tag for what was pushed, such as v1")
    must_be_there(parser, folder=check)


def push_options(arguments: argparse.Namespace) -> dict:
    """The options of `add_push_options`, as the library's functions take them."""
    return {"private": arguments.private, "revision": arguments.revision, "tag": arguments.tag}


def print_pushed(pushed: "Pushed") -> None:
    """Prints what a push did."""
    state = "pushed" if pushed.changed else "nothing new, no commit made"
    print(f"{pushed.url}: {state}, at {pushed.commit[:12]}.")
    if pushed.left_out:
        print(f"Not for the Hub, left out: {', '.join(pushed.left_out)}.")
    if pushed.collection:
        print(f"In the collection {pushed.collection}.")


# ---------------------------------------------------------------- paths


LISTED = 5  # paths that a message names


def file(path: str | Path) -> str | None:
    """What is wrong with a path that must be a file; None for nothing."""
    return None if Path(path).is_file() else f"{path} is not a file" if Path(path).exists() else f"no file {path}"


def folder(path: str | Path) -> str | None:
    """What is wrong with a path that must be a folder; None for nothing."""
    return None if Path(path).is_dir() else f"{path} is not a folder" if Path(path).exists() else f"no folder {path}"


def anything(path: str | Path) -> str | None:
    """What is wrong with a path that must be there; None for nothing."""
    return None if Path(path).exists() else f"no file or folder {path}"


def source(adapter: str) -> str | None:
    """What is wrong with an adapter: a folder, or a Hub id, which is not looked for here."""
    may_be_hub_id = "/" in adapter and not adapter.startswith(("/", ".", "~"))
    if may_be_hub_id or Path(adapter).is_dir():
        return None
    return f"{adapter} is not a folder: give a saved folder, or a Hub id (OWNER/NAME)"


def adapter_source(given: str) -> str | None:
    """What is wrong with an adapter: as `source`, or the name of one in the package."""
    if given in adapter_names() or (problem := source(given)) is None:
        return None
    return f"{problem}{_nearest(given, adapter_names())}"


def model_source(given: str) -> str | None:
    """What is wrong with a model: as `source`, or the name of one."""
    if given in model_names() or (problem := source(given)) is None:
        return None
    return f"{problem}, or the name of a model{_nearest(given, model_names())}"


def saved_model(path: str | Path) -> str | None:
    """What is wrong with a saved model: its folder, or the name of one in the package."""
    if str(path) in packaged_names() or (problem := folder(path)) is None:
        return None
    return f"{problem}, and no model in the package of that name{_nearest(str(path), packaged_names())}"


def checkpoint(given: str) -> str | None:
    """What is wrong with a published checkpoint: its file, or its name."""
    if given in published_names() or (problem := file(given)) is None:
        return None
    return (
        f"{problem}, and no published checkpoint of that name{_nearest(given.removesuffix('.pt'), published_names())}"
    )


def _nearest(given: str, names: tuple[str, ...]) -> str:
    found = difflib.get_close_matches(given, names, cutoff=0.75)
    return f" (the nearest: {', '.join(found)})" if found else ""


def must_be_there(parser: argparse.ArgumentParser, **checks: Callable[[str], str | None]) -> None:
    """Has `check_paths` check arguments of the parser, by their names."""
    parser.set_defaults(paths={**(parser.get_default("paths") or {}), **checks})


def check_paths(arguments: argparse.Namespace) -> None:
    """Raises FileNotFoundError for arguments that name what is not there, all of them in one message."""
    wrong = []
    for name, check in arguments.paths.items():
        value = getattr(arguments, name)
        values = [] if value is None else value if isinstance(value, list) else [value]
        problems = [problem for problem in map(check, values) if problem is not None]
        if problems:
            count = f"{len(problems)} of {len(values)}: " if len(values) > 1 else ""
            more = " ..." if len(problems) > LISTED else ""
            wrong.append(f"{name.upper().replace('_', '-')}: {count}{', '.join(problems[:LISTED])}{more}")
    if wrong:
        raise FileNotFoundError(f"{'; '.join(wrong)}.")
