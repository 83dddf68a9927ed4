"""Simulated conversations of the speakers of some corpora, to measure diarisation on.

    python benchmarks/conversations.py OUT --speech SPLIT ... [--speakers FILE]

A SPLIT holds wav/SPEAKER/..., as docs/training.md describes it. Speakers whose names begin with the same letters are
one corpus, and talk with each other. Of each corpus, each place (as it is, in a simulated room, over a simulated
telephone line) and 2 to 6 speakers (or --counts) a conversation is made; corpora of real telephone speech stay as
they are, and get as many. OUT gets a FLAC of each, reference.rttm, and statistics.json, with how people take turns here
and in the recordings of --like.
"""

import argparse
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import soundfile

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.audio.domains import make_domain
from mrl_redimnet.audio.scan import speakers_files
from mrl_redimnet.diarization.conversations import Statistics, simulate_conversation
from mrl_redimnet.diarization.turns import Turn, read_rttm, rttm_text

PLACES = ("clean", "room", "telephone")


def main():
    """Parses the command line, writes the conversations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--speech", type=Path, nargs="+", required=True, metavar="SPLIT")
    parser.add_argument("--speakers", type=Path, help="a file with the names of those that may speak, one a line [all]")
    parser.add_argument("--telephone", nargs="+", default=["wu"], help="corpora of real telephone speech [wu]")
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[*range(2, 7)], help="speakers of a conversation [2 to 6]"
    )
    parser.add_argument("--like", type=Path, help="an RTTM file, for the statistics")
    parser.add_argument("--seconds", type=float, default=90.0, help="of a conversation [90]")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    allowed = set(arguments.speakers.read_text().split()) if arguments.speakers else None
    corpora: dict[str, dict[str, list[Path]]] = {}
    for split in arguments.speech:
        for name, files in speakers_files(split / "wav").items():
            if allowed is None or name in allowed:
                corpora.setdefault(re.findall("^[a-z]+", name)[0], {})[name] = files
    arguments.out.mkdir(parents=True)
    found: dict[str, list[Turn]] = {}
    telephone = make_domain("telephony")
    for corpus, speech in sorted(corpora.items()):
        if len(speech) < max(arguments.counts):
            continue
        for number, place in enumerate(PLACES):
            real = corpus in arguments.telephone
            for count in arguments.counts:
                name = f"{corpus}_{f'call{number}' if real else place}_{count}"
                rng = np.random.default_rng([arguments.seed, *name.encode()])
                names = [sorted(speech)[row] for row in rng.permutation(len(speech))[:count]]
                wave, found[name] = simulate_conversation(
                    {each: speech[each] for each in names},
                    arguments.seconds,
                    rng,
                    in_room=place == "room" and not real,
                    domain=telephone if place == "telephone" and not real else None,
                )
                soundfile.write(arguments.out / f"{name}.flac", wave, SAMPLING_RATE)
    text = "".join(rttm_text(name, turns) for name, turns in found.items())
    (arguments.out / "reference.rttm").write_text(text)
    record = {"made": statistics(found)} | ({"like": statistics(read_rttm(arguments.like))} if arguments.like else {})
    (arguments.out / "statistics.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{arguments.out}: {len(found)} conversations.", json.dumps(record, indent=1))


def statistics(recordings: dict[str, list[Turn]]) -> dict:
    """How people take turns, and the share of the time in which somebody, and in which several, speak."""
    speech, overlap, seconds = 0.0, 0.0, 0.0
    for turns in recordings.values():
        talking = np.zeros(round(100 * max(turn.end for turn in turns)) + 1, dtype=int)
        for turn in turns:
            talking[round(100 * turn.start) : round(100 * turn.end)] += 1
        speech, overlap, seconds = speech + (talking > 0).sum(), overlap + (talking > 1).sum(), seconds + len(talking)
    return {
        "recordings": len(recordings),
        "speech": round(speech / seconds, 3),
        "several_of_speech": round(overlap / speech, 3),
        **dataclasses.asdict(Statistics.of(recordings)),
    }


if __name__ == "__main__":
    main()
