"""Tables as text, for the screen and for Markdown. A table is its lines of cells, headings first."""

from collections.abc import Collection, Sequence

Lines = Sequence[Sequence[str]]


def text_table(lines: Lines, left: Collection[int] = (0,)) -> str:
    """Columns side by side, aligned to the right. left: the numbers of those that are aligned to the left."""
    return "\n".join("  ".join(cells).rstrip() for cells in _aligned(lines, left))


def markdown_table(lines: Lines, left: Collection[int] = (0,), aligned: bool = True) -> str:
    """The same as Markdown. aligned: to be read as it is, else each cell is as short as it can be.

    Cells may hold anything: white space becomes one space, and a bar, which would end a cell, is escaped.
    """
    lines = [[" ".join(cell.split()).replace("|", "\\|") for cell in cells] for cells in lines]
    if aligned:
        lines = _aligned(lines, left)
    widths = [len(cell) + 2 if aligned else 3 for cell in lines[0]]
    if aligned:
        rules = ["-" * width if column in left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    else:
        rules = ["---" if column in left else "---:" for column in range(len(widths))]
    heading, *rest = ("| " + " | ".join(cells) + " |" for cells in lines)
    return "\n".join([heading, "|" + "|".join(rules) + "|", *rest])


def _aligned(lines: Lines, left: Collection[int]) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        for cells in lines
    ]
