"""`mrl-redimnet diarize`: who spoke when in recordings?"""

import argparse
import sys
from functools import partial
from pathlib import Path

from mrl_redimnet_cli.arguments import (
    Commands,
    add_command,
    add_decision,
    add_model,
    anything,
    folder,
    load_encoder,
    must_be_there,
)


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    parser = add_command(
        commands,
        "diarize",
        run,
        help="who spoke when in recordings?",
        epilog="Exit status: 0 all recordings are done; 1 some cannot be read (listed, the rest is done); 2 an error.",
    )
    add_model(parser)
    parser.add_argument("recordings", type=Path, nargs="+", metavar="PATH", help="recordings, and folders of them")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="for every recording, NAME.rttm, NAME.json with embeddings, and NAME.png are written there",
    )
    parser.add_argument("--speakers", type=int, metavar="N", help="how many speak in each recording [found]")
    parser.add_argument(
        "--most-speakers", type=int, default=10, metavar="N", help="how many are looked for at most [10]"
    )
    parser.add_argument(
        "--enrolled",
        type=Path,
        metavar="DIR",
        help="a folder that has a folder with audio for every known speaker; who is recognised gets that name, all "
        "others the same number in all recordings",
    )
    add_decision(parser)
    must_be_there(parser, recordings=anything, enrolled=folder)


def run(arguments: argparse.Namespace) -> int:
    """Diarises, writes the files, prints a line for every recording."""
    from mrl_redimnet.audio.io import AudioError
    from mrl_redimnet.audio.scan import named_files, printable, speakers_files
    from mrl_redimnet.diarization.naming import Roll
    from mrl_redimnet.diarization.pipeline import Diarizer
    from mrl_redimnet.diarization.writing import write_diarization

    if arguments.out.exists() and not arguments.out.is_dir():
        raise FileExistsError(f"--out: {arguments.out} is a file: give a folder.")
    files = named_files(arguments.recordings)
    stems = _stems(files, arguments.out)
    encoder = load_encoder(arguments)
    dim = encoder.dim(arguments.dim)
    diarizer = Diarizer(partial(encoder.embed, dim=dim), most_speakers=arguments.most_speakers)
    roll = Roll.of(
        encoder,
        speakers_files(arguments.enrolled) if arguments.enrolled else None,
        dim,
        threshold=arguments.threshold,
        thresholds=arguments.thresholds,
        progress="embedding enrolled speakers",
    )
    facts = {"model": encoder.name, "adapter": encoder.adapter, "dim": dim, "fingerprint": encoder.fingerprint}
    adapter = f" with {encoder.adapter}" if encoder.adapter else ""
    print(f"{encoder.name}{adapter}, {dim} dimensions. The same speaker in several recordings: {roll.unknown}.")
    if roll.enrolled:
        print(f"{len(roll.counts)} enrolled speaker{'s' * (len(roll.counts) > 1)}: {roll.enrolled}.")
    unreadable = 0
    for name, file in files.items():
        try:
            found = diarizer(file, speakers=arguments.speakers, progress=printable(name))
        except AudioError as error:
            unreadable += 1
            print(f"mrl-redimnet diarize: {error}: left out.", file=sys.stderr)
            continue
        named, recognised = roll.named(found)
        rttm, *_ = write_diarization(named, stems[name], facts, recognised)
        spoken = ", ".join(f"{printable(each)} {named.spoken(each):.0f} s" for each in named.voices) or "nobody speaks"
        print(f"{printable(rttm)}: {named.seconds:.0f} s, {len(named.turns)} turns: {spoken}")
    return 1 if unreadable else 0


def _stems(files: dict[str, Path], out: Path) -> dict[str, Path]:
    """{name of a recording: what its files begin with}. Raises ValueError for two that would get the same."""
    from mrl_redimnet.diarization.turns import rttm_name

    stems: dict[str, Path] = {}
    first: dict[Path, str] = {}
    for name in files:
        path = Path(Path(name).name) if Path(name).is_absolute() or ".." in Path(name).parts else Path(name)
        stem = out / path.with_name(rttm_name(path.stem))
        if stem in first:
            raise ValueError(f"{first[stem]} and {name} would both be written as {stem}.rttm: give other names.")
        first[stem] = name
        stems[name] = stem
    return stems
