"""The plots, as SVG in the page's own colours. They draw what they are given and know no comparison.

Every plot is as wide as a phone, so that its text is legible there; a wide page has two in a row.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from countdown.comparison.formats import change, number

POINTS_PER_INCH = 72
WIDTH = 380 / POINTS_PER_INCH
HEIGHT = 250 / POINTS_PER_INCH
LEGEND_ROW = 15 / POINTS_PER_INCH
BAR = 17 / POINTS_PER_INCH
FONT_SIZE = 10.5
# Longer names are cut in plots, and are whole in the tables.
NAME_LENGTH, ONE_COLUMN = 38, 24
# Up to this loss the axis is linear, above it logarithmic: small losses are what people choose between.
LINEAR_LOSS = 0.01
# Perplexities further apart than this factor get a logarithmic axis.
LINEAR_PERPLEXITY = 3.0
# Shares by layer: an axis shorter than this would make much of little.
LEAST_SPAN = 0.1
# More sparsities than this do not fit under an axis.
MOST_TICKS = 8
# Of the points of a smooth curve every so many is marked.
SPARSE_MARKERS = 8

# Colours of the drawing stand for variables of the page, which has them for light and for dark.
_SERIES = [f"#0000{index:02x}" for index in range(1, 8)]
_PARTS = [f"#0000{index:02x}" for index in range(16, 21)]
_INK, _SOFT, _PAPER, _FRONT = "#000020", "#000021", "#000022", "#000023"
_VARIABLES = {
    **{colour: f"series-{index}" for index, colour in enumerate(_SERIES)},
    **{colour: f"part-{index}" for index, colour in enumerate(_PARTS)},
    _INK: "ink",
    _SOFT: "soft",
    _PAPER: "paper",
    _FRONT: "front",
}
_MARKERS = "os^DvPX"
_BEST: dict[str, Any] = {"color": _FRONT, "linewidth": 6, "marker": "o", "markersize": 14, "markeredgewidth": 0}
_LINES = ("-", "--", ":")
# Where a point's name may stand: offsets in points and alignment, the first one preferred.
_PLACES = [
    (dx, dy, horizontal, vertical)
    for dy, vertical in ((5, "bottom"), (-6, "top"), (16, "bottom"), (-17, "top"))
    for dx, horizontal in ((5, "left"), (-5, "right"), (0, "center"))
]
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "countdown",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": FONT_SIZE,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.2,
    "legend.borderpad": 0,
    "lines.markersize": 5.5,
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Frame:
    """What a plot is called, and its axes.

    Args:
        name: Unique on the page.
        title, description: Read out in place of the picture.
        x, y: Labels of the axes, with units.
    """

    name: str
    title: str
    description: str
    x: str
    y: str = ""


@dataclass(frozen=True)
class Line:
    """Points in one colour, joined in their order.

    Args:
        name: In the legend.
        index: Decides colour and marker.
        x, y: The points.
        low, high: Ends of a band around it, or of intervals at its points; empty for none.
        tips: What each point is, shown under a resting pointer; empty for none.
        target: Values that were wanted, drawn as a thin dotted line; empty for none.
    """

    name: str
    index: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = field(default=())
    high: Sequence[float] = field(default=())
    tips: Sequence[str] = field(default=())
    target: Sequence[float] = field(default=())


@dataclass(frozen=True)
class Named:
    """A point, or a level, with its name."""

    name: str
    x: float
    y: float
    tip: str = ""


@dataclass(frozen=True)
class Bar:
    """A stacked bar.

    Args:
        name: Beside it.
        parts: Lengths, by the names of the parts.
        floor: Where its floor is marked.
    """

    name: str
    parts: dict[str, float]
    floor: float


def front(
    frame: Frame,
    lines: Sequence[Line],
    *,
    origin: Named,
    competitors: Sequence[Named],
    best: Sequence[tuple[float, float]],
    recommended: Named | None,
    factor: bool,
) -> str:
    """Return losses against a gain that grows to the right.

    Args:
        frame: Its names.
        lines: Configurations, joined where they differ in one setting.
        origin: Where both gain and loss begin.
        competitors: Configurations outside every line, each named.
        best: Points that no other beats.
        recommended: What is to be marked.
        factor: The gain is a factor; otherwise the share that is left, which falls to the right.
    """
    from matplotlib.ticker import MaxNLocator

    handles = [_handle(line) for line in lines] + _front_handles(bool(competitors), recommended is not None)
    with _canvas(frame, handles) as (figure, axes, parts):
        axes.axhline(origin.y, color=_SOFT, linewidth=0.8, linestyle=":")
        axes.axvline(origin.x, color=_SOFT, linewidth=0.8, linestyle=":")
        # Steps: no configuration lies between two of them.
        axes.plot(*zip(*best, strict=True), **_BEST, drawstyle="steps-pre", zorder=1)
        for line in lines:
            _draw(axes, line)
            if line.low:
                axes.vlines(line.x, line.low, line.high, color=_colour(line.index), linewidth=1, alpha=0.5, zorder=2)
        for one in (origin, *competitors):
            _mark(axes, one, "D" if one is not origin else "o")
        if recommended:
            axes.plot(recommended.x, recommended.y, "o", markersize=14, color=_INK, fillstyle="none", zorder=5)
        _loss_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter((lambda v, _: f"{v:g}×") if factor else _percent)
        if not factor:
            axes.invert_xaxis()
        axes.margins(x=0.09)
        named = [origin, *competitors, *([recommended] if recommended else [])]
        covered = [point for line in lines for point in _along(line)]
        _name_points(figure, axes, {(one.x, one.y): one.name for one in named}, covered)
    return parts[0]


def perplexities(frame: Frame, lines: Sequence[Line], levels: Sequence[Named]) -> str:
    """Return perplexity against sparsity; `levels` are configurations without a sparsity, drawn across."""
    from matplotlib.lines import Line2D

    styles: list[Any] = ["-", "--", ":", "-."]
    handles = [_handle(line) for line in lines]
    handles += [
        Line2D([], [], color=_INK, linestyle=styles[index % len(styles)], label=_short(level.name))
        for index, level in enumerate(levels)
    ]
    with _canvas(frame, handles) as (_, axes, parts):
        for index, level in enumerate(levels):
            axes.axhline(level.y, color=_INK, linewidth=1.1, linestyle=styles[index % len(styles)], zorder=1)
        for line in lines:
            _draw(axes, line)
        axes.margins(y=0.08)
        values = [y for line in lines for y in line.y] + [level.y for level in levels]
        if max(values) > LINEAR_PERPLEXITY * min(values):
            _log_axis(axes, min(values), max(values))
        if len(at := {x for line in lines for x in line.x}) <= MOST_TICKS:
            axes.set_xticks(sorted(at))
        axes.xaxis.set_major_formatter(_percent)
    return parts[0]


def curves(frame: Frame, lines: Sequence[Line], *, shares_across: bool = False) -> str:
    """Return shares by block of the model, or over another share if `shares_across`."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    handles = [_handle(line) for line in lines]
    if any(line.target for line in lines):
        handles.append(Line2D([], [], color=_SOFT, linestyle=":", linewidth=1.2, label="target"))
    with _canvas(frame, handles) as (_, axes, parts):
        for line in lines:
            if line.low:
                axes.fill_between(line.x, line.low, line.high, color=_colour(line.index), alpha=0.18, linewidth=0)
            if line.target:
                axes.plot(line.x, line.target, color=_SOFT, linestyle=":", linewidth=1.2, zorder=1)
            _draw(axes, line, SPARSE_MARKERS if shares_across else 1)
        axes.yaxis.set_major_formatter(_percent)
        if shares_across:
            axes.xaxis.set_major_formatter(_percent)
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1.02)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            low, high = axes.get_ylim()
            spare = max(0.0, LEAST_SPAN - (high - low)) / 2
            axes.set_ylim(low - spare, high + spare)
    return parts[0]


def bars(frame: Frame, rows: Sequence[Bar], names: Sequence[str]) -> str:
    """Return stacked bars, one below another, each with its floor; `names` are the parts, in their order."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours = [_PARTS[index % len(_PARTS)] for index in range(len(names))]
    handles: list[Any] = [Patch(color=colour, label=name) for colour, name in zip(colours, names, strict=True)]
    handles.append(Line2D([], [], color=_INK, marker="|", linestyle="", markersize=11, mew=2, label="floor"))
    places = range(len(rows))
    with _canvas(frame, handles, height=BAR * (len(rows) + 3)) as (_, axes, parts):
        left = [0.0] * len(rows)
        for colour, name in zip(colours, names, strict=True):
            lengths = [row.parts.get(name, 0.0) for row in rows]
            axes.barh(places, lengths, left=left, height=0.72, color=colour, edgecolor=_PAPER, linewidth=0.6)
            left = [start + length for start, length in zip(left, lengths, strict=True)]
        for place, row in zip(places, rows, strict=True):
            axes.vlines(row.floor, place - 0.48, place + 0.48, color=_INK, linewidth=2)
        axes.set_yticks(places, labels=[_short(row.name, ONE_COLUMN + 2) for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.xaxis.set_major_formatter(lambda v, _: number(v, 0 if axes.get_xlim()[1] > 10 else 1))
        axes.spines["left"].set_visible(False)
    return parts[0]


@contextmanager
def _canvas(frame: Frame, handles: Sequence[Any], height: float = HEIGHT) -> Iterator[tuple[Any, Any, list[str]]]:
    """Yield figure, axes, and a list that holds the SVG afterwards."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    parts: list[str] = []
    columns = 1 if any(len(handle.get_label()) > ONE_COLUMN for handle in handles) else 2
    height += LEGEND_ROW * math.ceil(len(handles) / columns)
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # Letters that matplotlib's font lacks are the browser's to draw.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(h_pad=6 / POINTS_PER_INCH))
        axes = figure.add_subplot()
        axes.set_xlabel(frame.x)
        axes.set_ylabel(frame.y)
        figure.legend(handles=list(handles), loc="outside lower left", ncols=columns)
        yield figure, axes, parts
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    parts.append(_embedded(buffer.getvalue(), frame))


def _embedded(svg: str, frame: Frame) -> str:
    """Return an SVG document as a part of the page: in its colours, with ids of its own, named for screen readers."""
    svg = svg[svg.index("<svg") :]
    head, _, body = svg.partition(">")
    (view,) = re.findall(r'viewBox="[^"]*"', head)
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'style="[^"]*"', lambda match: _in_page_colours(match[0]), body)
    body = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", body)
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{frame.name}-", body)
    title, description = html.escape(frame.title), html.escape(frame.description)
    name = frame.name
    return (
        f'<svg {view} role="img" aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{title}</title><desc id="{name}-description">{description}</desc>{body}'
    )


def _in_page_colours(style: str) -> str:
    return re.sub(r"#0000[0-9a-f]{2}", lambda match: f"var(--{_VARIABLES.get(match[0], 'ink')})", style)


def _colour(index: int) -> str:
    return _SERIES[index % len(_SERIES)]


def _style(index: int) -> dict[str, Any]:
    # Where colours begin anew, markers and strokes do not.
    turn = index // len(_SERIES)
    return {
        "color": _colour(index),
        "marker": _MARKERS[(index + 3 * turn) % len(_MARKERS)],
        "linestyle": _LINES[turn % len(_LINES)],
        "markeredgecolor": _PAPER,
        "markeredgewidth": 0.7,
    }


def _handle(line: Line) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=_short(line.name), **_style(line.index))


def _front_handles(competitors: bool, recommended: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    kinds: list[dict[str, Any]] = [_BEST | {"label": "not beaten by any other"}]
    if competitors:
        kinds.append({"color": _INK, "marker": "D", "linestyle": "", "label": "quantised dense"})
    if recommended:
        ring = {"color": _INK, "marker": "o", "markersize": 11, "fillstyle": "none", "linestyle": ""}
        kinds.append(ring | {"label": "recommended"})
    return [Line2D([], [], **kind) for kind in kinds]


def _draw(axes: Any, line: Line, every: int = 1) -> None:
    """Draw a line and its points, each an artist of its own if it has something to say; else mark some only."""
    style = _style(line.index)
    if not line.tips:
        axes.plot(line.x, line.y, **style, markevery=(line.index % every, every), zorder=3)
        return
    axes.plot(line.x, line.y, color=style["color"], linestyle=style["linestyle"], zorder=3)
    for x, y, tip in zip(line.x, line.y, line.tips, strict=True):
        axes.plot(x, y, **style, zorder=4, gid=f"tip:{tip}")


def _mark(axes: Any, one: Named, marker: str) -> None:
    tip = {"gid": f"tip:{one.tip}"} if one.tip else {}
    axes.plot(one.x, one.y, marker, color=_INK, markeredgecolor=_PAPER, markersize=7, zorder=4, **tip)


def _name_points(
    figure: Any, axes: Any, named: dict[tuple[float, float], str], covered: Sequence[tuple[float, float]]
) -> None:
    """Write names beside points where they hide nothing, or else where they hide least."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # fixes the layout, so that places are known
    frame = axes.get_window_extent()
    centres = axes.transData.transform([*covered, *named])
    taken = [Bbox([[x - 3, y - 3], [x + 3, y + 3]]) for x, y in centres]
    for point, name in named.items():
        text = axes.annotate(_short(name, ONE_COLUMN), point, xytext=(0, 0), textcoords="offset points", zorder=6)
        text.set_in_layout(False)
        tried: list[tuple[int, int, Any]] = []
        for place in _PLACES:
            _put(text, place)
            box = text.get_window_extent()
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            tried.append((len(taken) * outside + box.count_overlaps(taken), len(tried), place))
        _put(text, min(tried)[2])
        taken.append(text.get_window_extent())


def _along(line: Line) -> Iterator[tuple[float, float]]:
    """Yield the points of a line and some between them."""
    points = list(zip(line.x, line.y, strict=True))
    yield from points
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        for part in (0.2, 0.4, 0.6, 0.8):
            yield x + part * (next_x - x), y + part * (next_y - y)


def _put(text: Any, place: tuple[float, float, str, str]) -> None:
    dx, dy, horizontal, vertical = place
    text.set(position=(dx, dy), horizontalalignment=horizontal, verticalalignment=vertical)


def _loss_axis(axes: Any) -> None:
    """Make the losses' axis linear about 0 and logarithmic beyond `LINEAR_LOSS`."""
    low, high = axes.dataLim.y0, axes.dataLim.y1
    axes.set_yscale("symlog", linthresh=LINEAR_LOSS, linscale=0.6)
    decades = [10.0**power for power in range(-2, math.ceil(math.log10(max(high, LINEAR_LOSS))) + 1)]
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [0.0, *(step * decade for decade in decades for step in steps)]
    ticks += [-tick for tick in ticks if 0 < tick <= -1.5 * low]
    axes.set_ylim(min(low * 1.3, -0.006), max(high * 1.3, 0.02))
    axes.set_yticks([tick for tick in ticks if tick <= axes.get_ylim()[1]])
    axes.yaxis.set_major_formatter(lambda v, _: "0%" if v == 0 else change(v, 0))
    axes.minorticks_off()


def _log_axis(axes: Any, low: float, high: float) -> None:
    axes.set_yscale("log")
    steps = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 300 * low else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    bottom, top = axes.get_ylim()
    axes.set_yticks([tick for power in powers for step in steps if bottom <= (tick := step * 10.0**power) <= top])
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:,g}")
    axes.minorticks_off()


def _percent(value: float, _: int) -> str:
    return f"{100 * value:.4g}%"


def _short(name: str, length: int = NAME_LENGTH) -> str:
    """Return a name that fits; a leading underscore would hide it from matplotlib's legend."""
    name = f" {name}" if name.startswith("_") else name
    return name if len(name) <= length else f"{name[: length - 1]}…"
