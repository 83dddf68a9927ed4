"""Speech on disk as a Hugging Face data set: VoxCeleb1, VoxCeleb2 and any folder that names its speakers in its paths.

The data set holds paths and lengths, not samples, so that a million files fit in a small cached Arrow table and
training reads just the stretch it needs (`mrl_redimnet.audio.read_audio`).
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

from mrl_redimnet.audio import AudioError, audio_info

DEFAULT_LAYOUT = "speaker/session/utterance"
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".aac", ".opus")
# The folders between a corpus's root and its speakers: VoxCeleb1 unpacks to wav/, VoxCeleb2 to aac/.
_FORMAT_FOLDERS = frozenset({"wav", "aac", "m4a", "flac"})
# What one process scans at a time: enough pieces for any num_proc.
_SCAN_SHARDS = 256


def load_corpus(
    root: str | os.PathLike,
    layout: str = DEFAULT_LAYOUT,
    cache_dir: str | os.PathLike | None = None,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """The audio files below `root` as a data set, one row a file, sorted by path.

    `root` holds the speakers' folders, or holds them in one folder named wav, aac, m4a or flac. `layout` names the
    parts of a path from there on: `speaker` and (last) `utterance` must be there, `session` may, `*` is any folder.
    Without a session in the layout every utterance is its own session. Files without an audio suffix are ignored.

    Columns: `audio` (datasets.Audio(decode=False): {"path": absolute path, "bytes": None}), `path` (relative to the
    speakers' folder, "/" between parts, as in VoxCeleb's trial lists), `speaker`, `session`, `seconds` (float64, 0.0
    when unknown) and `problem` ("" or why the header could not be read; see `split_usable`).

    Every file's header is read once, in `num_proc` processes; the result is cached in `cache_dir` (None: the Hugging
    Face cache) under a fingerprint of all paths, sizes and modification times, so a changed folder is read anew.

    Raises FileNotFoundError when `root` or audio in it is missing, ValueError when `root` is a file, `layout` is
    malformed or files lie at another depth than `layout` has parts.
    """
    manifest = _find_utterances(Path(os.path.abspath(root)), layout)
    builder = SpeechFolder(
        cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        dataset_name="speech_folder",
        folder=str(manifest.folder),
        layout=layout,
        fingerprint=manifest.fingerprint,
    )
    builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset(split="train").cast_column("audio", datasets.Audio(decode=False))


@dataclass
class SpeechFolderConfig(datasets.BuilderConfig):
    """What identifies one state of one folder; datasets hashes these fields into the name of the cache."""

    folder: str = ""
    layout: str = DEFAULT_LAYOUT
    fingerprint: str = ""


class SpeechFolder(datasets.GeneratorBasedBuilder):
    """Builder behind `load_corpus`. Its only split is called train, whatever the folder is used for."""

    VERSION = datasets.Version("1.0.0")  # to be raised when the rows change, else old caches stay in use
    BUILDER_CONFIG_CLASS = SpeechFolderConfig

    def _info(self) -> datasets.DatasetInfo:
        text = datasets.Value("string")
        # Stored as what Audio stores, not as Audio: its encoder wants torchcodec installed even for a path.
        audio = {"bytes": datasets.Value("binary"), "path": text}
        features = {"audio": audio, "path": text, "speaker": text, "session": text}
        features |= {"seconds": datasets.Value("float64"), "problem": text}
        return datasets.DatasetInfo(features=datasets.Features(features))

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        manifest = _find_utterances(Path(self.config.folder), self.config.layout)
        if manifest.fingerprint != self.config.fingerprint:
            raise RuntimeError(f"{self.config.folder} changed while it was being read: run again when it is complete")
        size = -(-len(manifest.paths) // _SCAN_SHARDS)
        shards = [manifest.paths[i : i + size] for i in range(0, len(manifest.paths), size)]
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={"shards": shards})]

    def _generate_examples(self, shards: list[list[str]]) -> Iterator[tuple[str, dict]]:
        for path in (path for shard in shards for path in shard):
            absolute = os.path.join(self.config.folder, path)
            try:
                seconds, problem = audio_info(absolute).seconds, ""
            except AudioError as error:
                seconds, problem = 0.0, str(error)
            parts = dict(zip(self.config.layout.split("/"), path.split("/"), strict=True))
            yield (
                path,
                {
                    "audio": {"path": absolute, "bytes": None},
                    "path": path,
                    "speaker": parts["speaker"],
                    "session": parts.get("session", os.path.splitext(parts["utterance"])[0]),
                    "seconds": seconds,
                    "problem": problem,
                },
            )


@dataclass(frozen=True)
class _Manifest:
    """The utterances of one folder: sorted paths relative to it, and a hash that changes with any file."""

    folder: Path
    paths: list[str]
    fingerprint: str


def _find_utterances(root: Path, layout: str) -> _Manifest:
    """All audio files below `root` (or its wav, aac, m4a or flac folder), checked against `layout`."""
    depth = _layout_depth(layout)
    if not root.exists():
        raise FileNotFoundError(f"{root} is not there: give the folder that holds the speakers' folders")
    if not root.is_dir():
        raise ValueError(f"{root} is a file: give the folder that holds the speakers' folders")
    files = _walk(root)
    if not files:
        raise FileNotFoundError(f"no audio ({', '.join(AUDIO_SUFFIXES)}) laid out as {layout} below {root}")
    if not any(path.count("/") + 1 == depth for path in files):
        inner = {path.split("/")[0] for path in files if "/" in path} & _FORMAT_FOLDERS
        if len(inner) == 1:
            prefix = inner.pop() + "/"
            root = root / prefix
            files = {path.removeprefix(prefix): stat for path, stat in files.items() if path.startswith(prefix)}
    paths = sorted(files)
    misplaced = [path for path in paths if path.count("/") + 1 != depth]
    if misplaced:
        found = misplaced[0].count("/") + 1
        fitting = "/".join(["*"] * (found - 3) + DEFAULT_LAYOUT.split("/")) if found > 2 else "speaker/utterance"
        advice = f"layout={fitting!r} would fit the first" if found > 1 else "move it into a speaker's folder"
        raise ValueError(
            f"{len(misplaced):,} of {len(paths):,} audio files below {root} do not lie at the depth of layout "
            f"{layout!r} ({depth} parts), first {', '.join(misplaced[:3])}: {advice}, "
            "or give the folder that holds the speakers' folders"
        )
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(path) + b"\0%d\0%d\n" % files[path])
    return _Manifest(root, paths, digest.hexdigest())


def _layout_depth(layout: str) -> int:
    """The number of path parts `layout` names; ValueError unless it is well formed."""
    parts = layout.split("/")
    named = [part for part in parts if part != "*"]
    known = set(named) <= {"speaker", "session", "utterance"} and len(set(named)) == len(named)
    if not known or "speaker" not in named or parts[-1] != "utterance":
        raise ValueError(
            f"layout {layout!r} must be made of 'speaker', optionally 'session', and any number of '*', separated by "
            f"'/', each name once, with 'utterance' last, for instance {DEFAULT_LAYOUT!r}"
        )
    return len(parts)


def _walk(root: Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and modification time in ns of every audio file below `root`, by relative path with "/"."""

    def fail(error: OSError) -> None:  # os.walk would leave out a folder that it cannot list
        raise error

    files = {}
    for folder, _, names in os.walk(root, onerror=fail, followlinks=True):
        inner = "" if folder == str(root) else Path(folder).relative_to(root).as_posix() + "/"
        for name in names:
            if name.lower().endswith(AUDIO_SUFFIXES):
                path = os.path.join(folder, name)
                try:
                    stat = os.stat(path)
                except FileNotFoundError:  # a dangling link: a file with a problem, not a reason to stop
                    stat = os.lstat(path)
                files[inner + name] = (stat.st_size, stat.st_mtime_ns)
    return files


class SpeakerTable:
    """Which integer label stands for which speaker; label i is `names[i]`."""

    def __init__(self, names: list[str]):
        """Labels 0, 1, ... in the order of `names`. Raises ValueError unless they are distinct strings."""
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("a speaker table needs a list of names, all of them strings")
        self.names = tuple(names)
        self._ids = {name: label for label, name in enumerate(names)}
        if len(self._ids) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"a speaker table needs distinct names, these occur twice: {', '.join(twice[:5])}")

    def __len__(self) -> int:
        return len(self.names)

    def id(self, name: str) -> int:
        """The label of the speaker `name`. Raises ValueError, with the most similar names, when it is unknown."""
        if name not in self._ids:
            similar = difflib.get_close_matches(name, self.names) or self.names[:3]
            raise ValueError(
                f"speaker {name!r} is not among the {len(self):,} of this table (nearest: {', '.join(similar)}): "
                "add it with extended()"
            )
        return self._ids[name]

    def name(self, id: int) -> str:
        """The speaker with the label `id`. Raises ValueError when there is no such label."""
        if not 0 <= id < len(self):
            raise ValueError(f"label {id} is outside this table of {len(self):,} speakers")
        return self.names[id]

    def extended(self, names: Iterable[str]) -> "SpeakerTable":
        """A table that also knows `names`: known speakers keep their labels, new ones follow in sorted order."""
        return SpeakerTable([*self.names, *sorted(set(names) - self._ids.keys())])

    def save(self, path: str | os.PathLike) -> None:
        """Write the names as a JSON list; `path` holds either its old content or all of the new one."""
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(self.names, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SpeakerTable":
        """The table that `save` wrote. Raises ValueError, naming the file, when it is not a list of distinct names."""
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:  # JSON's and the table's own
            raise ValueError(f"{path} is not a speaker table (a JSON list of names): {error}") from error


def split_usable(dataset: datasets.Dataset, min_seconds: float) -> tuple[datasets.Dataset, list[tuple[str, str]]]:
    """The rows of `load_corpus` that have no problem and last at least `min_seconds`; the others as (path, reason)."""
    rows = dataset.select_columns(["path", "seconds", "problem"])[:]
    usable, problems = [], []
    for index, (path, seconds, problem) in enumerate(zip(*rows.values(), strict=True)):
        if not problem and seconds < min_seconds:
            problem = f"{seconds:.3f} s long, shorter than {min_seconds:g} s"
        if problem:
            problems.append((path, problem))
        else:
            usable.append(index)
    return dataset.select(usable), problems


def check_problems(
    problems: list[tuple[str, str]], total: int, max_share: float, report_path: str | os.PathLike | None = None
) -> str:
    """A printable summary of `problems`, (path, reason) pairs, among `total` files; all of them go to `report_path`.

    The report (tab-separated, with a header) is written only when there are problems. Raises ValueError with the
    summary when more than `max_share` (0 to 1) of the files have one.
    """
    if not problems:
        return f"all {total:,} files can be used"
    share = len(problems) / max(total, 1)
    first = "; ".join(f"{path} ({reason})" for path, reason in problems[:5])
    summary = f"{len(problems):,} of {total:,} files cannot be used ({100 * share:.2f} %): {first}"
    if len(problems) > 5:
        summary += f"; and {len(problems) - 5:,} more"
    if report_path is not None:
        lines = ["path\treason", *(f"{path}\t{' '.join(reason.split())}" for path, reason in problems)]
        Path(report_path).write_text("\n".join(lines) + "\n", encoding="utf-8")
        summary += f" (all in {report_path})"
    if share > max_share:
        raise ValueError(f"{summary}. At most {100 * max_share:g} % may be unusable")
    return summary
