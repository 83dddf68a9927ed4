"""The development speakers of the packaged models, whom none of their training heard."""

import random
from pathlib import Path

HELD_OUT = {"an4": 12, "so": 14, "ds": 5, "aa": 5}  # by the beginning of a speaker's name
UTTERANCES = 3  # that each of them has at least


def training_folders(splits: list[Path]) -> dict[str, Path]:
    """{speaker: folder} of SPLIT/wav."""
    return {folder.name: folder for split in splits for folder in sorted((split / "wav").iterdir())}


def development_speakers(speakers: dict[str, Path], rng: random.Random) -> set[str]:
    """Drawn of those with enough utterances. With `random.Random(0)` and all of the training speech: the packaged
    models' own.
    """
    drawn = set()
    for beginning, count in HELD_OUT.items():
        drawn |= set(rng.sample(with_enough(speakers, beginning), count))
    return drawn


def with_enough(speakers: dict[str, Path], beginning: str) -> list[str]:
    """The speakers with enough utterances whose names begin so, by name."""
    return [
        name
        for name in sorted(speakers)
        if name.startswith(beginning) and len([*speakers[name].rglob("*.*")]) >= UTTERANCES
    ]
