"""Pictures without a screen: figures that no global state holds, text as it is, files whole or not at all.

Matplotlib is imported when a picture is drawn: it takes a second, and what draws nothing needs no `evaluation` extra.
"""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mrl_redimnet.extras import extra
from mrl_redimnet.files import replace_file

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches. Raises ModuleNotFoundError without the `evaluation` extra."""
    with extra("evaluation"):
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def new_panels(
    count: int, across: int, width: float, height: float, below: float = 0.0
) -> tuple["Figure", list["Axes"]]:
    """A figure of `count` panels, at most `across` in a row, each of width x height inches; below: room for a legend.

    Raises ModuleNotFoundError without the `evaluation` extra.
    """
    across = min(across, count)
    down = -(-count // across)
    figure = new_figure(width * across, height * down + below)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def plain(text: str, width: int | None = None) -> str:
    """Text as Matplotlib shows it, where a dollar sign would begin a formula. width: letters in a line [one line]."""
    return (text if width is None else textwrap.fill(text, width)).replace("$", r"\$")


def shades(count: int, first: float = 0.0, last: float = 0.9) -> NDArray:
    """Colours [count, 4] of one scale, dark (0) to bright (1), for what has an order."""
    with extra("evaluation"):
        from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(first, last, count))


def legend_line(**style: Any) -> "Artist":
    """A line as an entry of a legend."""
    with extra("evaluation"):
        from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def legend_patch(**style: Any) -> "Artist":
    """An area as an entry of a legend."""
    with extra("evaluation"):
        from matplotlib.patches import Patch

    return Patch(**style)


def save_figure(figure: "Figure", file: str | Path, dpi: int = 110) -> None:
    """Writes a picture whole or not at all, of the kind that the file's suffix says (PNG without one)."""
    kind = Path(file).suffix.removeprefix(".") or "png"
    replace_file(Path(file), lambda temporary: figure.savefig(temporary, dpi=dpi, format=kind))
