"""The plug for pyannote.audio: work and time beside one that runs the network for every row, errors of diarisation.

    python benchmarks/pyannote_plug.py nano --segmentation SEGMENTATION/pytorch_model.bin --meetings MEETINGS \\
        --plda PLDA [--tune trn] [--trials FOLDER/trials.txt ... --audio WAV] --out docs/results/pyannote_plug

MEETINGS holds NAME.flac, *.rttm and *.uem. Who speaks when inside of chunks is found once; then both plugs get the same
chunks and masks in turns. With --tune, clustering is tried on the meetings whose names begin so, over the grids below,
and the best values are used for all; without, those of the package are. Errors are those of pyannote.metrics without a
collar, overlap scored.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from pyannote.audio.pipelines import SpeakerDiarization
from pyannote.audio.utils.signal import binarize
from pyannote.core import Annotation, Segment, Timeline
from pyannote.metrics.diarization import DiarizationErrorRate
from timing import machine, quartiles, speedup, take_turns

from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.audio.io import SAMPLING_RATE, read_audio
from mrl_redimnet.diarization.plda import PLDA
from mrl_redimnet.diarization.pyannote import AGGLOMERATIVE, VBX, ReDimNetEmbedding, diarization_pipeline
from mrl_redimnet.scoring.metrics import eer

GRIDS = {
    "agglomerative": {
        "method": ["average", "centroid"],
        "threshold": [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        "min_cluster_size": [1, 4, 8],
    },
    "VBx": {"threshold": [0.5, 0.6, 0.7, 0.8], "Fa": [0.03, 0.07, 0.15, 0.3], "Fb": [0.4, 0.8, 2.0, 5.0]},
}


class Naive(ReDimNetEmbedding):
    """The network for every row, as any embedding that pyannote calls does it."""

    def forward(self, waveforms, weights=None):
        return self.redimnet(waveforms[:, 0], frame_weights=weights).embeddings[..., : self.dimension]


def main():
    """Parses the command line, measures, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--segmentation", type=Path, required=True)
    parser.add_argument("--meetings", type=Path, required=True)
    parser.add_argument("--plda", type=Path, required=True)
    parser.add_argument("--tune", metavar="START")
    parser.add_argument("--rounds", type=int, default=3, help="fewest in which both plugs take turns; 0: no times")
    parser.add_argument("--trials", type=Path, nargs="*", default=[])
    parser.add_argument("--audio", type=Path, help="the folder that the trials' paths are relative to")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="how long both plugs take turns, for each batch size"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    encoder = SpeakerEncoder.from_pretrained(arguments.model, device="cpu")
    files, references, scored = read_meetings(arguments.meetings)
    pipelines = {
        "agglomerative": diarization_pipeline(encoder, arguments.segmentation),
        "VBx": diarization_pipeline(encoder, arguments.segmentation, arguments.plda),
    }
    tuned = {"agglomerative": AGGLOMERATIVE, "VBx": VBX}
    results = {"cost": cost(encoder, pipelines["agglomerative"], files, arguments), "tuned": tuned}
    for name, pipeline in pipelines.items():
        pipeline.training = True  # keeps segmentation and embeddings in the file
        if arguments.tune:
            some = [uri for uri in files if uri.startswith(arguments.tune)]
            tuned[name] = tune(pipeline, GRIDS[name], files, references, scored, some)
    # What is left where clustering makes no mistake. pyannote takes the embeddings, which do not matter, from the file.
    pipelines["none (oracle)"] = SpeakerDiarization(
        segmentation=str(arguments.segmentation), plda=str(arguments.plda), clustering="OracleClustering"
    ).instantiate({"segmentation": {"min_duration_off": 0.0}})
    pipelines["none (oracle)"].training = True
    pipelines["none (oracle)"]._embedding = pipelines["VBx"]._embedding  # noqa: SLF001 -- asked for its size in silence
    for uri, file in files.items():
        file["annotation"] = references[uri]
    groups = sorted({uri.rstrip("0123456789") for uri in files})
    results["errors"] = {
        name: {
            group: errors(
                pipeline, tuned.get(name, {}), files, references, scored, [u for u in files if u.startswith(group)]
            )
            for group in groups
        }
        for name, pipeline in pipelines.items()
    }
    results["trials"] = {path.stem: trial_errors(encoder, arguments, path) for path in arguments.trials}
    arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    text = page(arguments, results, len(files))
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


def read_meetings(folder: Path) -> tuple[dict[str, dict], dict[str, Annotation], dict[str, Timeline]]:
    """Audio in memory as pyannote takes it, who spoke, and what is scored, by the meetings' names."""
    references: dict[str, Annotation] = {}
    scored: dict[str, Timeline] = {}
    for line in itertools.chain.from_iterable(file.read_text().splitlines() for file in sorted(folder.glob("*.rttm"))):
        _, uri, _, start, seconds, _, _, speaker, *_ = line.split()
        turn = Segment(float(start), float(start) + float(seconds))
        turns = references.setdefault(uri, Annotation(uri=uri))
        turns[turn, turns.new_track(turn)] = speaker
    for line in itertools.chain.from_iterable(file.read_text().splitlines() for file in sorted(folder.glob("*.uem"))):
        uri, _, start, end = line.split()
        scored.setdefault(uri, Timeline(uri=uri)).add(Segment(float(start), float(end)))
    files = {
        uri: {
            "waveform": torch.from_numpy(read_audio(folder / f"{uri}.flac"))[None],
            "sample_rate": SAMPLING_RATE,
            "uri": uri,
        }
        for uri in sorted(references)
    }
    return files, references, scored


def cost(encoder: SpeakerEncoder, pipeline, files: dict[str, dict], arguments: argparse.Namespace) -> dict:
    """Waveforms that the network goes over, and seconds, of both plugs, by the batch size."""
    segmented = {}
    for uri, file in files.items():
        found = pipeline.get_segmentations(dict(file))
        segmented[uri] = found if pipeline._segmentation.model.specifications.powerset else binarize(found, onset=0.5)  # noqa: SLF001
    results: dict = {"speech": sum(file["waveform"].shape[1] for file in files.values()) / SAMPLING_RATE}
    speakers = next(iter(segmented.values())).data.shape[2]
    for batch_size in (1, 8 * speakers) if arguments.rounds else ():
        calls, rows = {}, {}
        for name, kind in (("naive", Naive), ("once", ReDimNetEmbedding)):
            plug = kind(encoder)
            calls[name] = embedded(pipeline, plug, files, segmented, batch_size)
            counts: list[int] = []
            hook = plug.redimnet.trunk.register_forward_pre_hook(lambda _, given, to=counts: to.append(len(given[0])))
            calls[name]()  # also warms up
            hook.remove()
            rows[name] = sum(counts)
        times = take_turns(calls, arguments.seconds, fewest=arguments.rounds)
        results[batch_size] = {
            "rows": rows,
            "seconds": {name: quartiles(times[name]) for name in times},
            "ratio": speedup(times, "naive", "once"),
        }
    return results


def embedded(pipeline, plug: ReDimNetEmbedding, files, segmented, batch_size: int):
    """A function that embeds all local speakers of all files."""

    def call():
        pipeline._embedding.model_, pipeline.embedding_batch_size = plug, batch_size  # noqa: SLF001
        return [pipeline.get_embeddings(dict(file), segmented[uri]) for uri, file in files.items()]

    return call


def error_rate(pipeline, parameters: dict, files, references, scored, uris: list[str]) -> DiarizationErrorRate:
    """The metric, after it has seen these meetings."""
    segmentation = pipeline.parameters(instantiated=True)["segmentation"]
    pipeline.instantiate({"segmentation": segmentation, "clustering": parameters})
    metric = DiarizationErrorRate(collar=0.0, skip_overlap=False)
    for uri in uris:
        metric(references[uri], pipeline.apply(files[uri]).speaker_diarization, uem=scored[uri])
    return metric


def tune(pipeline, grid: dict[str, list], files, references, scored, uris: list[str]) -> dict:
    """The values of the grid with the fewest errors; of equally good ones those in the middle of the list."""
    rates = []
    for values in itertools.product(*grid.values()):
        parameters = dict(zip(grid, values, strict=True))
        rates.append((round(abs(error_rate(pipeline, parameters, files, references, scored, uris)), 4), parameters))
    lowest = min(rate for rate, _ in rates)
    best = [parameters for rate, parameters in rates if rate == lowest]
    return best[len(best) // 2]


def errors(pipeline, parameters: dict, files, references, scored, uris: list[str]) -> dict:
    """Shares of the speech: the whole error and its parts; and how many meetings have the right number of speakers."""
    metric = error_rate(pipeline, parameters, files, references, scored, uris)
    parts = metric[:]
    right = [
        len(pipeline.apply(files[uri]).speaker_diarization.labels()) == len(references[uri].labels()) for uri in uris
    ]
    return {
        "meetings": len(uris),
        "speech": parts["total"],
        "error": abs(metric),
        **{name: parts[name] / parts["total"] for name in ("missed detection", "false alarm", "confusion")},
        "right number": sum(right),
    }


def trial_errors(encoder: SpeakerEncoder, arguments: argparse.Namespace, path: Path) -> dict[str, float]:
    """EER by cosine and by PLDA, of whole utterances and of their first two seconds."""
    plda, lines = PLDA.load(arguments.plda), [line.split() for line in path.read_text().splitlines()]
    names = sorted({name for line in lines for name in line[1:]})
    row = {name: number for number, name in enumerate(names)}
    labels = np.array([int(line[0]) for line in lines])
    a, b = (np.array([row[line[side]] for line in lines]) for side in (1, 2))
    found = {}
    for what, longest in (("whole", None), ("2 s", 2.0)):
        embeddings = encoder.embed([arguments.audio / name for name in names], plda.lda.shape[0], longest=longest)
        found[f"cosine, {what}"] = eer(encoder.similarity(embeddings, embeddings)[a, b], labels)
        found[f"PLDA, {what}"] = eer(plda.scores(embeddings, embeddings)[a, b], labels)
    return found


def page(arguments: argparse.Namespace, results: dict, meetings: int) -> str:
    """The page, in Markdown."""
    options = "".join(f" --{name} {value}" for name, value in (("tune", arguments.tune),) if value)
    options += " --trials TRIALS ... --audio WAV" if arguments.trials else ""
    cost = results["cost"]
    lines = [
        "# The plug for pyannote.audio",
        "",
        f"```bash\npython benchmarks/pyannote_plug.py {arguments.model} --segmentation SEGMENTATION/pytorch_model.bin "
        f"--meetings MEETINGS --plda PLDA{options} --out docs/results/pyannote_plug\n```",
        "",
        f"{meetings} half minutes of AMI's headset mixes ({cost['speech']:.0f} s), pyannote's segmentation-3.0. "
        f"{machine()}, {arguments.threads} thread.",
        "",
    ]
    if len(cost) > 1:
        lines += [
            "## Work and time of the embeddings",
            "",
            "Waveforms of 10 s that the network goes over, and seconds for all meetings (median of rounds in turns; of "
            "the ratio also the quartiles). Naive: the network for every local speaker.",
            "",
            "| batch size | waveforms, naive | once | seconds, naive | once | times as fast |",
            "|---|---|---|---|---|---|",
        ]
    for batch_size in (key for key in cost if key != "speech"):
        found = cost[batch_size]
        ratio = found["ratio"]
        lines.append(
            f"| {batch_size} | {found['rows']['naive']} | {found['rows']['once']} | "
            f"{found['seconds']['naive']['median']:.1f} | {found['seconds']['once']['median']:.1f} | "
            f"{ratio['median']:.1f} [{ratio['low']:.1f}, {ratio['high']:.1f}] |"
        )
    tuned = f"Tuned on the meetings {arguments.tune}* alone. " if arguments.tune else "With the values of the package. "
    lines += [
        *([""] if len(cost) > 1 else []),
        "## Errors of diarisation",
        "",
        f"In % of the speech, no collar, overlap scored. {tuned}So few meetings show that it works, and no more. "
        "The last rows are what the segmentation leaves where clustering makes no mistake.",
        "",
        "| clustering | meetings | error | missed | false alarm | confusion | right number of speakers |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, groups in results["errors"].items():
        for group, found in groups.items():
            parts = (found[part] for part in ("error", "missed detection", "false alarm", "confusion"))
            lines.append(
                f"| {name} | {group}* | {' | '.join(f'{100 * part:.1f}' for part in parts)} | "
                f"{found['right number']} of {found['meetings']} |"
            )
    values = "; ".join(f"{name}: {', '.join(f'{k} {v}' for k, v in v.items())}" for name, v in results["tuned"].items())
    lines += ["", f"{values}."]
    if results["trials"]:
        kinds = list(next(iter(results["trials"].values())))
        lines += [
            "",
            "## PLDA beside cosine",
            "",
            "Equal error rate, %, of whole utterances and of their first two seconds.",
            "",
            f"| | {' | '.join(kinds)} |",
            f"|{'---|' * (len(kinds) + 1)}",
        ]
        for name, found in results["trials"].items():
            lines.append(f"| {name} | {' | '.join(f'{100 * found[kind]:.1f}' for kind in kinds)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
