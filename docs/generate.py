"""Writes the pages of this folder that are made from the code: `python docs/generate.py`, or `make docs`.

cli.md is the help of every command, recipe.md has every setting of training, published.md lists the published
checkpoints; architecture.svg shows the parts of the package and which import which. A test says when one is not what
the code would give today.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from test_architecture import FLOORS, SOURCES, imports, room_of  # noqa: E402

from mrl_redimnet_cli import make_parser  # noqa: E402

# ---------------------------------------------------------------- cli.md

HEAD = """# Command line

What `mrl-redimnet COMMAND --help` prints, for every command. This page is written by `python docs/generate.py`: change
the help of the command, not this page. Training has a script of its own, `train_hf.py`: see [Training](training.md) and
its [settings](recipe.md).

In the help, square brackets at the end of a line give the default. An error is one message on standard error, and the
exit status is 2.
"""


def help_of(command: list[str]) -> str:
    """What `mrl-redimnet COMMAND --help` prints, in lines of 100 characters."""
    text = io.StringIO()
    os.environ |= {"COLUMNS": "102", "NO_COLOR": "1"}  # argparse leaves a margin of two
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        make_parser().parse_args([*command, "--help"])
    return text.getvalue().strip()


def commands(command: list[str]) -> Iterator[tuple[list[str], str]]:
    """`command` and the commands below it, each with its help."""
    text = help_of(command)
    yield command, text
    # Commands below it stand in braces, alone at the start of the list of positional arguments.
    if below := re.search(r"^positional arguments:\n  \{([\w,-]+)\}$", text, flags=re.MULTILINE):
        for name in below[1].split(","):
            yield from commands([*command, name])


def command_line_page() -> str:
    """docs/cli.md."""
    parts = [HEAD]
    for command, text in commands([]):
        name = " ".join(["mrl-redimnet", *command])
        parts.append(f"{'#' * (1 + max(1, len(command)))} {name}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


# ---------------------------------------------------------------- architecture.svg

BOX_HEIGHT, GAP, FLOOR_HEIGHT, MARGIN, LETTER = 34, 18, 92, 16, 7.6
PURPOSES = {
    "configuration_mrl_redimnet": "fields, checks, sizes",
    "modeling_mrl_redimnet": "network, models",
    "frontend_mrl_redimnet": "log-mel features",
    "masking_mrl_redimnet": "padding, batch norm",
    "losses_mrl_redimnet": "AAM, SphereFace2",
    "pretrained_mrl_redimnet": "loading, saving",
    "pipeline_mrl_redimnet": "for transformers' pipeline",
    "feature_extraction_mrl_redimnet": "waveforms to batches",
    "audio": "files, codecs, rooms, domains",
    "data": "corpora, crops, loaders",
    "scoring": "trials, metrics, thresholds",
    "evaluation": "results, robustness, page",
    "diarization": "who spoke when",
    "extraction": "bulk embedding, search",
    "serving": "batches, HTTP, speakers",
    "demo": "a page in the browser",
    "training": "recipe, tasks, schedules",
    "adapters": "LoRA: train, serve, publish",
    "hub_cards": "model cards",
    "train_hf": "the training loop",
    "encoder": "SpeakerEncoder",
    "published": "checkpoints by name",
    "recordings": "three, for first steps",
    "speed": "faster forms of modules",
    "mrl_redimnet_cli": "one module per command",
}


def arrows() -> set[tuple[str, str]]:
    """(room, room it imports), for every two different rooms."""
    pairs = {(room_of(module), room_of(imported)) for module in SOURCES for imported, _ in imports(module)}
    return {(above, below) for above, below in pairs if above and below and above != below}


def direct(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The pairs without those that follow from two or more others: a picture of all of them could not be read."""
    below: dict[str, set[str]] = {}

    def reached(room: str) -> set[str]:
        if room not in below:
            nexts = {to for start, to in pairs if start == room}
            below[room] = nexts.union(*map(reached, nexts))
        return below[room]

    return {
        (start, to)
        for start, to in pairs
        if not any(to in reached(other) for first, other in pairs if first == start and other != to)
    }


def picture() -> str:
    """docs/architecture.svg: rooms as boxes on their floors, arrows to what each imports."""
    width_of = {
        room: round(LETTER * max(len(room) + 2, 0.85 * len(PURPOSES.get(room, "")) + 2))
        for floor in FLOORS
        for room in floor
    }
    rows = [sum(width_of[room] + GAP for room in floor) - GAP for floor in FLOORS]
    width, height = max(rows) + 2 * MARGIN + 300, FLOOR_HEIGHT * len(FLOORS) - 30 + MARGIN
    boxes: dict[str, tuple[float, float]] = {}
    for number, floor in enumerate(FLOORS):
        x = (width - rows[number]) / 2 + (130 if number % 2 else -130) * (len(floor) < 3)
        for room in sorted(floor):
            boxes[room] = (x, height - MARGIN - BOX_HEIGHT - 10 - number * FLOOR_HEIGHT)
            x += width_of[room] + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="sans-serif" font-size="13">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#607d8b"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
    ]
    for start, to in sorted(direct(arrows())):
        (x1, y1), (x2, y2) = boxes[start], boxes[to]
        x1, x2, y1 = x1 + width_of[start] / 2, x2 + width_of[to] / 2, y1 + BOX_HEIGHT + 6
        bend = (y2 - y1) / 2
        lines.append(
            f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}" '
            'fill="none" stroke="#90a4ae" marker-end="url(#tip)"/>'
        )
    for room, (x, y) in boxes.items():
        purpose = PURPOSES.get(room)
        colour = "#e3f2fd" if room.endswith("mrl_redimnet") else "#fff8e1" if room in FLOORS[-1] else "#f5f5f5"
        middle, text = x + width_of[room] / 2, y + (16 if purpose else 24)
        lines.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{width_of[room]}" height="{BOX_HEIGHT + 6}" rx="6" '
            f'fill="{colour}" stroke="#607d8b"/>'
            f'<text x="{middle:.0f}" y="{text:.0f}" text-anchor="middle" font-weight="bold">{escape(room)}</text>'
        )
        if purpose:
            lines.append(
                f'<text x="{middle:.0f}" y="{y + 32:.0f}" text-anchor="middle" font-size="11">{escape(purpose)}</text>'
            )
    return "\n".join([*lines, "</svg>", ""])


def recipe_page() -> str:
    """docs/recipe.md."""
    from mrl_redimnet.training.recipe_page import page

    return page()


# ---------------------------------------------------------------- published.md

PUBLISHED_HEAD = """# List of published checkpoints

The names that `mrl-redimnet convert`, every other command and `SpeakerEncoder.from_pretrained` take. This page is
written by `python docs/generate.py` from the list in the package, `published.json`; how to use the names is said in
[Models by name](checkpoints.md).

The parts of a name are the size, the training data and the kind of training: `ptn` is the first training, `ft_lm` and
`lm` the large-margin fine-tuning after it, `ft_mix` fine-tuning with mixed utterances, `dis` distillation.

**Sizes and hashes are not the authors'.** Those below were recorded by other public projects that pin these files. A
dash means that none was found; such a file is only checked by its conversion. None of the addresses could be reached
where this list was made.
"""


def linked(text: str) -> str:
    """Addresses in brackets as links."""
    return re.sub(r"\((https://[^)]+)\)", r"(<\1>)", text)


def published_page() -> str:
    """docs/published.md."""
    from mrl_redimnet.published import PUBLISHED

    parts, groups = [PUBLISHED_HEAD], {}
    for checkpoint in PUBLISHED.values():
        groups.setdefault(checkpoint.owner, {}).setdefault(checkpoint.corpora, []).append(checkpoint)
    for owner, by_data in groups.items():
        (first, *_), *_ = by_data.values()
        parts.append(
            f"## {first.network}, from {owner}\n\nRepository: <{first.repository}>. Files: `{first.address}`.\n"
        )
        for corpora, checkpoints in by_data.items():
            parts.append(f"### {first.network}: {', '.join(corpora)}\n\n{linked(checkpoints[0].terms)}\n")
            rows = ["| name | bytes | SHA-256 |", "|---|---|---|"]
            for one in checkpoints:
                size, digest = f"{one.size:,}" if one.size else "-", f"`{one.sha256}`" if one.sha256 else "-"
                rows.append(f"| `{one.id}` | {size} | {digest} |")
            parts.append("\n".join([*rows, ""]))
    return "\n".join(parts)


GENERATED = {
    "cli.md": command_line_page,
    "recipe.md": recipe_page,
    "published.md": published_page,
    "architecture.svg": picture,
}


def main() -> None:
    """Writes every generated page."""
    for name, page in GENERATED.items():
        (ROOT / "docs" / name).write_text(page())


if __name__ == "__main__":
    main()
