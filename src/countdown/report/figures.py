"""Each figure of the report: its plot, how it was measured, and its data. What was not measured is a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from countdown.comparison.comparison import CURVE, Cell, Comparison, Layer, Speed
from countdown.comparison.conditions import measured
from countdown.comparison.formats import (
    MICROSECONDS,
    change,
    count,
    interval,
    listed,
    number,
    share,
    times,
)
from countdown.comparison.series import Series, all_series
from countdown.report import plots
from countdown.report.plots import Bar, Frame, Line, Named
from countdown.report.selection import (
    SHOWN_SPARSITY,
    Shown,
    by_block,
    by_layer,
    finite,
    front,
)

_PARTS = {"ffn": "FFN", "attention_linears": "attention's linears", "head": "head", "rest": "rest"}
_WHOLE = "not split"
# From here on times of a token are given in milliseconds.
_MILLISECONDS = 2000.0


@dataclass(frozen=True)
class Figure:
    """A plot with all that belongs to it.

    Args:
        name: Unique on the page.
        title: What it shows.
        caption: How to read it.
        measured: How it was measured.
        header, rows: Its data.
        svg: The plot; empty where `missing` says why there is none.
        missing: What was not measured, as a sentence.
    """

    name: str
    title: str
    caption: str
    measured: str
    header: list[str]
    rows: list[list[str]]
    svg: str = ""
    missing: str = ""


def all_figures(comparison: Comparison) -> dict[str, Figure]:
    """Return the figures by name."""
    series = all_series(comparison.cells)
    shown = by_layer(series)
    made = (
        speed_front(comparison, series),
        weights_front(comparison, series),
        perplexity(comparison, series),
        realised_sparsity(comparison, shown),
        activity(comparison, shown),
        recall(comparison, shown),
        token_times(comparison),
    )
    return {figure.name: figure for figure in made}


def speed_front(comparison: Comparison, series: Sequence[Series]) -> Figure:
    """Return loss against measured speed."""
    frame = Frame("speed", "Quality against measured speed", "", "decoding speed, × dense", "rise of perplexity")
    how = (
        "Right is faster, down is better; dense is where the dotted lines cross. Along a line sparsity rises. Thin "
        "bars are 95% intervals, by resampling windows. Speed-ups that are unreliable are left out."
    )
    return _front(comparison, series, frame, how, _reliable_speedup, factor=True)


def _reliable_speedup(cell: Cell) -> float | None:
    return cell.speed.speedup if cell.speed and cell.doubt is None else None


def weights_front(comparison: Comparison, series: Sequence[Series]) -> Figure:
    """Return loss against weights read."""
    frame = Frame(
        "weights", "Quality against weights read", "", "weight bytes a token reads, of dense", "rise of perplexity"
    )
    how = (
        "Right reads less, down is better; dense is where the dotted lines cross. Along a line sparsity rises. Bytes "
        "are counted, not timed: FFNs, attention and head, what selects neurons included."
    )
    return _front(comparison, series, frame, how, lambda cell: cell.weights_read, factor=False)


def _front(
    comparison: Comparison,
    series: Sequence[Series],
    frame: Frame,
    how: str,
    gain: Callable[[Cell], float | None],
    *,
    factor: bool,
) -> Figure:
    words = times if factor else share
    cells = [cell for cell in comparison.cells if cell.quality and finite(cell.quality.loss, gain(cell))]
    rows = [[c.label, words(gain(c)), change(_loss(c), 2), interval(_interval(c), 2)] for c in comparison.cells]
    header = ["configuration", frame.x, frame.y, "95% interval"]
    caption = f"{how} {_quantised_note(comparison, cells)}".strip()
    how_measured = measured(comparison, quality=True, speed=factor)
    figure = Figure(frame.name, frame.title, caption, how_measured, header, rows)
    if all(cell.kind == "dense" for cell in cells):
        what = "speed" if factor else "weights read"
        missing = f"No configuration beside dense has both quality and {what}, so there is nothing to plot."
        return replace(figure, missing=missing)
    at = {cell.label: (gain(cell) or 0.0, _loss(cell)) for cell in cells}
    points = list({"": (1.0, 0.0), **at}.values())
    best = [points[i] for i in front([(x if factor else -x, y) for x, y in points])]
    found = comparison.recommendation
    label = found.label if found and found.label in at else None
    frame = replace(frame, description=_front_description(at, words, label))
    svg = plots.front(
        frame,
        [line for one in series if (line := _front_line(one, at, words))],
        origin=Named("dense", 1.0, 0.0, "dense"),
        competitors=[Named(c.label, *at[c.label], _tip(c.label, at, words)) for c in cells if c.kind == "quantised"],
        best=best,
        recommended=Named(label, *at[label]) if label else None,
        factor=factor,
    )
    return replace(figure, svg=svg)


def _front_line(
    series: Series, at: dict[str, tuple[float, float]], words: Callable[[float | None], str]
) -> Line | None:
    cells = [cell for cell in series.cells if cell.label in at]
    if not cells:
        return None
    x, y = zip(*(at[cell.label] for cell in cells), strict=True)
    ends = [_interval(cell) or (_loss(cell), _loss(cell)) for cell in cells]
    low, high = zip(*ends, strict=True)
    return Line(series.name, series.index, x, y, low, high, [_tip(cell.label, at, words) for cell in cells])


def _tip(label: str, at: dict[str, tuple[float, float]], words: Callable[[float | None], str]) -> str:
    x, loss = at[label]
    return f"{label}: {words(x)}, perplexity {change(loss)}"


def _front_description(
    at: dict[str, tuple[float, float]], words: Callable[[float | None], str], label: str | None
) -> str:
    marked = f" Recommended: {_tip(label, at, words)}." if label else ""
    return f"{count(len(at), 'configuration')}.{marked} The data is in the table below the plot."


def _quantised_note(comparison: Comparison, drawn: Sequence[Cell]) -> str:
    quantised = [cell for cell in comparison.cells if cell.kind == "quantised"]
    absent = [cell.label for cell in quantised if cell not in drawn]
    if not quantised:
        return "No quantised dense model was measured."
    return f"Not measured and so not drawn: quantised dense as {listed(absent)}." if absent else ""


def perplexity(comparison: Comparison, series: Sequence[Series]) -> Figure:
    """Return perplexity against sparsity by method, dense and quantised as levels."""
    frame = Frame("perplexity", "Perplexity against sparsity", "", "neurons skipped (target)", "perplexity")
    cells = [cell for cell in comparison.cells if cell.quality and finite(cell.quality.perplexity)]
    lines = [line for one in series if (line := _perplexity_line(one, cells))]
    levels = [Named(c.label, 0.0, c.quality.perplexity) for c in cells if c.kind != "sparse" and c.quality]
    sparsities = sorted({x for line in lines for x in line.x})
    by_name = {line.name: dict(zip(line.x, line.y, strict=True)) for line in lines}
    rows = [[level.name, number(level.y), *[""] * len(sparsities)] for level in levels]
    rows += [[name, "", *(number(values.get(x)) for x in sparsities)] for name, values in by_name.items()]
    header = ["method", "without sparsity", *(share(x) for x in sparsities)]
    caption = "Down is better; lines across are models without sparsity."
    figure = Figure(frame.name, frame.title, caption, measured(comparison, quality=True), header, rows)
    if not lines:
        return replace(figure, missing="No sparse configuration has a perplexity, so there is nothing to plot.")
    frame = replace(frame, description=f"Lines of {listed([line.name for line in lines])}. The data is in the table.")
    return replace(figure, svg=plots.perplexities(frame, lines, levels))


def _perplexity_line(series: Series, cells: Sequence[Cell]) -> Line | None:
    points = [
        (cell.sparsity, cell.quality.perplexity, f"{cell.label}: perplexity {number(cell.quality.perplexity)}")
        for cell in series.cells
        if cell in cells and cell.quality and cell.sparsity is not None
    ]
    if not points:
        return None
    x, y, tips = zip(*points, strict=True)
    return Line(series.name, series.index, x, y, tips=tips)


def realised_sparsity(comparison: Comparison, shown: Sequence[Shown]) -> Figure:
    """Return realised sparsity by layer, beside what was wanted."""
    frame = Frame("realised", "Realised sparsity by layer", "", "layer", "neurons skipped")
    caption = f"How well thresholds from the calibration text hold on the evaluated one. {_shown_note(shown)}"
    lines = [_block_line(one, [layer.realised for layer in _layers(one)]) for one in shown]
    header = ["layer", *(one.cell.label for one in shown)]
    figure = Figure(frame.name, frame.title, caption, measured(comparison, quality=True), header, _block_rows(lines))
    if not lines:
        return replace(figure, missing="No sparse configuration was measured by layer.")
    targets = [_block_line(one, [layer.target for layer in _layers(one)]).y for one in shown]
    lines = [replace(line, target=target) for line, target in zip(lines, targets, strict=True)]
    return replace(figure, svg=plots.curves(_described_lines(frame, lines), lines))


def recall(comparison: Comparison, shown: Sequence[Shown]) -> Figure:
    """Return by layer how much of the exact active sets is found."""
    frame = Frame("recall", "Selector recall by layer", "", "layer", "recall of the exact set")
    judged = [one for one in shown if any(layer.recall is not None for layer in _layers(one))]
    caption = (
        "The exact set of a token: the neurons whose coefficient is largest, as many as the target leaves. Recall is "
        f"the share of it that the method computed. {_shown_note(judged)}"
    )
    header = ["configuration", "module", "target", "realised", "recall", "precision", "lost"]
    rows = [_layer_row(one.cell.label, layer) for one in judged for layer in _layers(one)]
    figure = Figure(frame.name, frame.title, caption, measured(comparison, quality=True), header, rows)
    if not judged:
        return replace(figure, missing="Recall was not measured: no module was judged against its exact active sets.")
    lines = [
        _block_line(one, [layer.recall for layer in layers if layer.recall is not None], layers)
        for one in judged
        if (layers := [layer for layer in _layers(one) if layer.recall is not None])
    ]
    return replace(figure, svg=plots.curves(_described_lines(frame, lines), lines))


def activity(comparison: Comparison, shown: Sequence[Shown]) -> Figure:
    """Return how often neurons are active, the most active first, as the mean of layers."""
    frame = Frame(
        "activity", "How often each neuron is active", "", "neurons, most active first", "tokens it is active for"
    )
    at = [place / (CURVE - 1) for place in range(CURVE)]
    found = [(one, curves) for one in shown if (curves := _curves(one))]
    band = _band_of([one for one, _ in found], comparison)
    lines = [_activity_line(one, curves, at, one is band) for one, curves in found]
    header = ["neurons, most active first", *(line.name for line in lines)]
    rows = [[share(x, 1), *(share(line.y[place], 1) for line in lines)] for place, x in enumerate(at)] if lines else []
    spread = f" The band has every layer of {band.cell.label} in it." if band else ""
    caption = (
        "A flat curve means that tokens need different neurons; a step, that some are needed always and some never. "
        f"Lines are means over layers.{spread} {_shown_note([one for one, _ in found])}"
    )
    figure = Figure(frame.name, frame.title, caption, measured(comparison, quality=True), header, rows)
    if not lines:
        return replace(figure, missing="How often neurons are active was not measured.")
    svg = plots.curves(_described_lines(frame, lines), lines, shares_across=True)
    return replace(figure, svg=svg)


def token_times(comparison: Comparison) -> Figure:
    """Return where a token's time goes in every configuration, against its floor."""
    timed = [(cell, cell.speed) for cell in comparison.cells if cell.speed and finite(cell.speed.tokens_per_s)]
    split = [(cell, speed, _split(speed)) for cell, speed in timed]
    names = list(dict.fromkeys(name for _, _, parts in split for name in parts))
    largest = max((sum(parts.values()) for _, _, parts in split), default=0.0)
    unit, scale = ("ms", 1000.0) if largest >= _MILLISECONDS else ("µs", 1.0)
    digits = 2 if scale > 1 else 0
    header = [
        "configuration",
        *(f"{name}, {unit}" for name in names),
        f"token, {unit}",
        f"floor, {unit}",
        "floor's share",
    ]
    rows = [
        [
            cell.label,
            *(number(parts[name] / scale if name in parts else None, digits) for name in names),
            number(sum(parts.values()) / scale, digits),
            number(speed.floor_us / scale, digits),
            share(speed.floor_us / sum(parts.values())),
        ]
        for cell, speed, parts in split
    ]
    bandwidth = comparison.meta.get("bandwidth")
    moved = f", {bandwidth / 1e9:,.0f} GB/s" if isinstance(bandwidth, (int, float)) else ""
    caption = (
        "Time of one decoded token. The mark is the floor: the time that the weight bytes of a token take at the "
        f"bandwidth measured beside{moved}."
    )
    frame = Frame("times", "Where a token's time goes", "", f"{unit} a token")
    figure = Figure(frame.name, frame.title, caption, measured(comparison, speed=True), header, rows)
    if not split:
        return replace(figure, missing="No speed was measured, so there is nothing to plot.")
    bars = [
        Bar(cell.label, {name: part / scale for name, part in parts.items()}, speed.floor_us / scale)
        for cell, speed, parts in split
    ]
    frame = replace(frame, description=f"Bars of {count(len(bars), 'configuration')}, parts {listed(names)}.")
    return replace(figure, svg=plots.bars(frame, bars, names))


def _split(speed: Speed) -> dict[str, float]:
    if not speed.split_us:
        return {_WHOLE: MICROSECONDS / speed.tokens_per_s}
    return {_PARTS.get(part, part): value for part, value in speed.split_us.items()}


def _activity_line(one: Shown, curves: Sequence[Sequence[float]], at: Sequence[float], band: bool) -> Line:
    columns = list(zip(*curves, strict=True))
    low, high = ([min(c) for c in columns], [max(c) for c in columns]) if band else ((), ())
    return Line(one.cell.label, one.series.index, at, [fmean(c) for c in columns], low, high)


def _curves(one: Shown) -> list[list[float]]:
    return [layer.activity for layer in _layers(one) if len(layer.activity) == CURVE]


def _band_of(found: Sequence[Shown], comparison: Comparison) -> Shown | None:
    """Return which line gets a band: that of the recommended method, or else the first."""
    label = comparison.recommendation.label if comparison.recommendation else None
    recommended = (one for one in found if any(cell.label == label for cell in one.series.cells))
    return next(recommended, found[0] if found else None)


def _layers(one: Shown) -> list[Layer]:
    return one.cell.quality.layers if one.cell.quality else []


def _block_line(one: Shown, values: Sequence[float], layers: Sequence[Layer] | None = None) -> Line:
    blocks = by_block(layers or _layers(one), values)
    return Line(one.cell.label, one.series.index, list(blocks), list(blocks.values()))


def _block_rows(lines: Sequence[Line]) -> list[list[str]]:
    values = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    blocks = sorted({block for line in lines for block in line.x})
    return [[number(block, 0), *(share(of.get(block), 1) for of in values)] for block in blocks]


def _layer_row(label: str, layer: Layer) -> list[str]:
    found: Iterable[float | None] = (layer.target, layer.realised, layer.recall, layer.precision, layer.lost)
    return [label, layer.name, *(share(value, 1) for value in found)]


def _described_lines(frame: Frame, lines: Sequence[Line]) -> Frame:
    ends = [f"{line.name}: {share(min(line.y))} to {share(max(line.y))}" for line in lines]
    return replace(frame, description=f"{'; '.join(ends)}. The data is in the table below the plot.")


def _shown_note(shown: Sequence[Shown]) -> str:
    return f"Shown is of each method the sparsity nearest {share(SHOWN_SPARSITY)}." if shown else ""


def _loss(cell: Cell) -> float:
    return cell.quality.loss if cell.quality else float("nan")


def _interval(cell: Cell) -> tuple[float, float] | None:
    found = cell.quality.loss_interval if cell.quality and cell.kind != "dense" else None
    return found if found and finite(*found) else None
