"""What `Listener` found, as HTML and pictures. What comes from outside, such as names, is escaped."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from mrl_redimnet.demo.listener import Choice, Match, Take, Verdict, flat_map
from mrl_redimnet.plotting import new_figure, plain
from mrl_redimnet.scoring.calibration import Threshold

NOTHING = "-"


def problem(text: str) -> str:
    """A sentence on what went wrong."""
    return f'<p class="mrl-card mrl-bad"><strong>Not possible.</strong> {escape(text.rstrip("."))}.</p>'


def hint(text: str) -> str:
    """What to do next."""
    return f'<p class="mrl-card">{escape(text)}</p>'


def warnings_of(takes: Sequence[Take]) -> str:
    """What makes the recordings less certain; nothing where nothing does."""
    lines = [f"<li>{escape(take.name)}: {escape(note)}</li>" for take in takes for note in take.notes]
    if not lines:
        return ""
    return f'<div class="mrl-card mrl-warn"><strong>Take care:</strong><ul>{"".join(lines)}</ul></div>'


def verdict(found: Verdict, same: str, other: str, no_decision: str) -> str:
    """One decision. same, other, no_decision: what is said of it."""
    decision = found.decision
    kind, word, text = {
        True: ("mrl-good", "Accepted", same),
        False: ("mrl-bad", "Rejected", other),
        None: ("", "No decision", no_decision),
    }[decision.accepted]
    return (
        f'<div class="mrl-card {kind}"><p class="mrl-verdict"><strong>{word}:</strong> {escape(text)}</p>'
        f"<dl>{''.join(f'<dt>{name}</dt><dd>{value}</dd>' for name, value in _facts(found))}</dl>"
        f"<p>With {found.dim} numbers: {escape(found.rule)}.</p></div>"
    )


def _facts(found: Verdict) -> list[tuple[str, str]]:
    decision = found.decision
    return [
        ("Score (cosine)", f"{decision.score:.3f}"),
        ("Accepted from", _value(decision.threshold)),
        ("Calibrated probability of one speaker", f"{percent(found.probability)}, where both are equally likely before"
         if found.probability is not None else "not known: no calibration is saved"),
    ]  # fmt: skip


def _value(threshold: float | None) -> str:
    return NOTHING if threshold is None else f"{threshold:.3f}"


def percent(share: float | None) -> str:
    """A probability or rate, without claiming certainty."""
    if share is None:
        return NOTHING
    return "below 0.1 %" if share < 0.001 else "above 99.9 %" if share > 0.999 else f"{100 * share:.1f} %"


def sizes(found: Sequence[Verdict], dim: int) -> str:
    """What is lost by comparing fewer numbers: a row for each size, the chosen one marked."""
    rows = []
    for each in found:
        decision, saved = each.decision, each.saved
        chosen = ' aria-current="true" class="mrl-chosen"' if each.dim == dim else ""
        cells = [
            f"{4 * each.dim:,} bytes",
            f"{decision.score:.3f}",
            _value(decision.threshold),
            {True: "accepted", False: "rejected", None: NOTHING}[decision.accepted],
            percent(each.probability),
            NOTHING if saved is None else percent(saved.misses),
        ]
        rows.append(f'<tr{chosen}><th scope="row">{each.dim}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    wanted = {each.saved.wanted for each in found if each.saved is not None}
    at = f" at {100 * wanted.pop():g} % false accepts" if len(wanted) == 1 else ""
    return _table(
        f"What is lost with fewer numbers: these two recordings, and the misses{at} on the trials that the thresholds "
        "were set on",
        ["numbers", "size", "score", "accepted from", "verdict", "probability", "misses"],
        rows,
    )


def operating_points(entries: Sequence[Threshold]) -> str:
    """The error rates of every size where its threshold stands."""
    if not entries:
        return hint("No thresholds are saved for this model and adapter, so its error rates are not known here.")
    unit = {True: " (LLR)", False: ""}  # of an LLR, durations say which cosine it is
    rows = [
        f'<tr><th scope="row">{each.dim}</th><td>{_value(each.threshold)}{unit[each.calibration.uses_seconds]}</td>'
        f"<td>{100 * each.false_accepts:.2f} %</td><td>{100 * each.misses:.1f} %</td></tr>"
        for each in entries
    ]
    of = entries[0]
    return _table(
        f"Operating points: error rates on the trials “{of.trials}” ({of.targets:,} of one speaker, {of.impostors:,} "
        "of two) that the thresholds were set on. On your recordings they may be worse",
        ["numbers", "accepted from", "false accepts", "misses"],
        rows,
    )


def _table(caption: str, columns: Sequence[str], rows: Sequence[str]) -> str:
    """rows: of HTML. In a box that the keyboard can scroll where the window is narrow."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    name = f"Table: {escape(caption.split(':')[0])}"
    return (
        f'<p>{escape(caption)}.</p><div class="mrl-scroll" tabindex="0" role="region" aria-label="{name}">'
        f'<table aria-label="{name}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def pictures(takes: Sequence[Take]) -> str:
    """Waveforms and log-mel features, side by side where there is room."""
    return f'<div class="mrl-pictures">{"".join(map(picture, takes))}</div>' if takes else ""


def picture(take: Take) -> str:
    """Waveform and log-mel features of a recording."""
    figure = new_figure(4.4, 3.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.6))
    low, high = take.envelope
    above.fill_between(np.linspace(0, take.seconds, len(low)), low, high, color="#1d4ed8", linewidth=0)
    above.set_ylabel("amplitude")
    above.set_title(plain(take.name[:60]), fontsize=10)
    bins = len(take.mel)
    below.imshow(take.mel, origin="lower", aspect="auto", extent=(0, take.seconds, 0, bins), cmap="magma")
    below.set(xlabel="seconds", ylabel="mel band")
    file = io.BytesIO()
    figure.savefig(file, format="webp", dpi=100)
    data = base64.b64encode(file.getvalue()).decode()
    peak = float(np.abs(take.envelope).max())
    alt = (
        f"{take.name}: the waveform, {take.seconds:.1f} seconds with a peak of {peak:.2f} of full scale, above the "
        f"{bins} mel bands that the network gets."
    )
    return f'<img src="data:image/webp;base64,{data}" alt="{escape(alt)}">'


def facts(takes: Sequence[Take], choice: Choice) -> str:
    """Which adapter was used and why, and what the recordings are."""
    lines = [f"{take.name}: {take.seconds:.1f} s, {_rate(take.sampling_rate)}." for take in takes]
    return f"<p>{escape(choice.reason)}</p><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _rate(sampling_rate: int) -> str:
    return f"{sampling_rate:,} Hz" + ("" if sampling_rate == 16_000 else ", resampled to 16,000 Hz")


def enrolled(speakers: Mapping[str, Sequence[Take]]) -> str:
    """Who is enrolled on the page."""
    if not speakers:
        return hint("Nobody is enrolled yet. Give a name and a recording, then press Enrol.")
    rows = [
        f'<tr><th scope="row">{escape(name)}</th><td>{len(takes)}</td>'
        f"<td>{sum(take.seconds for take in takes):.1f} s</td></tr>"
        for name, takes in speakers.items()
    ]
    return _table("Enrolled speakers", ["name", "recordings", "speech"], rows)


def matches(found: Sequence[Match]) -> str:
    """The enrolled speakers by how alike they are."""
    rows = [
        f'<tr><th scope="row">{escape(each.speaker)}</th><td>{each.decision.score:.3f}</td>'
        f"<td>{_value(each.decision.threshold)}</td><td>{percent(each.probability)}</td></tr>"
        for each in found
    ]
    return _table("All enrolled speakers: the nearest first", ["name", "score", "accepted from", "probability"], rows)


def matrix(names: Sequence[str], similarities: NDArray, thresholds: NDArray | None) -> str:
    """Cosines [N, N] as a table, those from their threshold [N, N] on marked."""
    rows = []
    for number, name in enumerate(names):
        cells = []
        for column, value in enumerate(similarities[number]):
            same = column != number and thresholds is not None and value >= thresholds[number, column]
            opacity = 0.55 * min(1.0, max(0.0, float(value)))
            style = f'style="background:rgba(29,78,216,{opacity:.2f})"'
            cells.append(f"<td {style}>{f'<strong>{value:.2f} ✓</strong>' if same else f'{value:.2f}'}</td>")
        rows.append(f'<tr><th scope="row">{number + 1}. {escape(name)}</th>{"".join(cells)}</tr>')
    marked = "no threshold is saved" if thresholds is None else f"✓ marks one speaker, from {_range(thresholds)} on"
    caption = f"Similarities: cosines of all pairs; {marked}"
    return _table(caption, ["recording", *map(str, range(1, len(names) + 1))], rows)


def _range(thresholds: NDArray) -> str:
    """Of two recordings [N, N]; those of short ones may differ."""
    between = thresholds[~np.eye(len(thresholds), dtype=bool)]
    low, high = f"{between.min():.3f}", f"{between.max():.3f}"
    return low if low == high else f"{low} to {high}, by their durations,"


def plane(names: Sequence[str], similarities: NDArray, thresholds: NDArray | None) -> str:
    """The recordings as points, near ones alike. Lines join those that are taken for one speaker."""
    places, share = flat_map(similarities)
    size, margin = 420, 40
    span = max(float(np.ptp(places, axis=0).max()), 1e-9)
    middle = (places.max(axis=0) + places.min(axis=0)) / 2
    at = size / 2 + (places - middle) / span * (size - 2 * margin) * np.array([1, -1])
    lines = [
        f'<line x1="{at[a, 0]:.1f}" y1="{at[a, 1]:.1f}" x2="{at[b, 0]:.1f}" y2="{at[b, 1]:.1f}" />'
        for a in range(len(names))
        for b in range(a)
        if thresholds is not None and similarities[a, b] >= thresholds[a, b]
    ]
    points = [
        f'<g><title>{number}. {escape(name)}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="11" />'
        f'<text x="{x:.1f}" y="{y + 4:.1f}">{number}</text></g>'
        for number, (name, (x, y)) in enumerate(zip(names, at, strict=True), 1)
    ]
    joined = "" if thresholds is None else " Lines join those that are taken for one speaker."
    told = f"Map of {len(names)} recordings: near ones sound alike. It shows {100 * share:.0f} % of their differences."
    return (
        f'<figure><svg class="mrl-map" viewBox="0 0 {size} {size}" role="img" aria-label="{escape(told)}">'
        f"{''.join(lines)}{''.join(points)}</svg><figcaption>{escape(told + joined)} The table has the same in numbers."
        "</figcaption></figure>"
    )
