"""The report is one file that asks for nothing, holds the numbers, says what is missing, and escapes what it quotes."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from countdown.comparison.comparison import Comparison, TaskResult
from countdown.errors import ConfigError
from countdown.report.html import check_installed, render, write_report
from report.sample import HOSTILE, WISH, hostile, nothing_measured, sample

PLOTS = ("speed", "weights", "perplexity", "realised", "activity", "recall", "times")


class _Page(HTMLParser):
    """Reads a page strictly: every tag that opens must close, in order."""

    VOID = frozenset({"meta", "br", "link"})

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def values(self, *names: str) -> list[str]:
        return [value or "" for name, value in self.attributes if name in names]


@pytest.fixture(scope="module")
def html():
    return render(sample())


def test_every_table_can_scroll(html):
    assert html.count("<table>") > 2
    assert html.count('<div class="scroll" tabindex="0"><table>') == html.count("<table>")


def figure(html: str, name: str) -> str:
    return re.search(rf'<figure id="{name}">.*?</figure>', html, re.DOTALL)[0]


def row(html: str, label: str) -> str:
    """Return the row of a configuration in the table of all."""
    return re.search(rf'<th scope="row">{re.escape(label)}</th>.*?</tr>', section(html, "all"), re.DOTALL)[0]


def section(html: str, name: str) -> str:
    return re.search(rf'<section id="{name}">.*?</section>', html, re.DOTALL)[0]


def test_the_recommendation_comes_first_with_wish_interval_and_confirmation(html):
    verdict = html[html.index('class="verdict"') : html.index("Beside dense and quantised")]
    quality = next(cell.quality for cell in sample().cells if cell.label == "d-proxy at 0.5")
    assert WISH in verdict
    assert "Take d-proxy at 0.5" in verdict
    assert f"+{100 * quality.loss:.1f}%" in verdict
    assert "perplexity; on other windows +1.4% to +2.1% (95%)" in verdict
    assert "On text that no decision saw, perplexity changes by +1.9%: inside that range." in verdict


def test_a_loss_that_held_out_text_does_not_confirm_is_a_warning():
    made = sample()
    html = render(replace(made, recommendation=replace(made.recommendation, confirmed_loss=0.09, confirmed=False)))
    assert '<p class="warning">On text that no decision saw, perplexity changes by +9.0%: outside' in html


def test_without_a_recommendation_it_says_so():
    assert "Nothing measured fits what was asked for" in render(replace(sample(), recommendation=None))


def test_dense_may_be_recommended():
    made = sample()
    html = render(replace(made, recommendation=replace(made.recommendation, label="dense")))
    assert "Stay dense" in html


def test_quantised_models_stand_beside_the_recommendation(html):
    rivals = html[html.index("Beside dense and quantised") : html.index("What is gained")]
    for label in ("dense", "d-proxy at 0.5", "int8", "int4", "fp8"):
        assert f'<th scope="row">{label}</th>' in rivals
    assert "cats" not in rivals


def test_every_number_is_in_the_table_of_all(html):
    for cell in sample().cells:
        found = row(html, cell.label)
        if cell.quality and cell.kind != "dense":
            assert f"<td>{cell.quality.perplexity:.2f}</td><td>{100 * cell.quality.loss:+.1f}%</td>" in found
            assert f"<td>{cell.quality.kl:.4f}</td><td>{100 * cell.quality.top1:.1f}%</td>" in found
        if cell.speed:
            beside = f"{cell.speed.tokens_per_s / cell.speed.speedup:.1f}"
            speeds = (f"{cell.speed.tokens_per_s:.1f}", beside, f"{cell.speed.speedup:.2f}×")
            assert "".join(f"<td>{number}</td>" for number in speeds) in found
            assert cell.speed.backend in found


def test_an_unreliable_speed_up_is_called_so_and_not_drawn():
    made = sample()
    impossible = [
        replace(c, speed=replace(c.speed, speedup=14.38, interval=(13.9, 14.6)))
        if c.label == "cats + rms at 0.5"
        else c
        for c in made.cells
    ]
    html = render(replace(made, cells=impossible))
    assert "<td>unreliable</td><td>13.90 to 14.60</td>" in row(html, "cats + rms at 0.5")
    assert "14.38" not in html
    assert "cats + rms at 0.5: " not in figure(html, "speed")
    assert "cats + rms at 0.5: " in figure(html, "weights")


def test_a_rough_comparison_says_so():
    made = sample()
    html = render(replace(made, meta=made.meta | {"rough": True}))
    assert "<h2>Take d-proxy at 0.5, roughly</h2>" in html


def test_parts_of_a_token_that_are_no_times_are_not_drawn(tmp_path):
    made = sample()
    split = {"ffn": 4000.0, "rest": -329537.0}
    cells = [replace(c, speed=replace(c.speed, split_us=split)) if c.label == "dense" else c for c in made.cells]
    html = render(Comparison.load(replace(made, cells=cells).save(tmp_path)))
    assert "−" not in figure(html, "times")
    assert "not split" in figure(html, "times")


def test_what_was_not_measured_is_a_dash(html):
    assert row(html, "m-countdown at 0.3").count("<td>–</td>") == 5  # realised, perplexity, rise, KL, top-1
    assert "<td>–</td><td>–</td>" in row(html, "teal at 0.5")  # tokens/s, speed


def test_failures_are_told_with_their_reason(html):
    for cell in sample().cells:
        if cell.error:
            assert f"<dt>{cell.label}</dt><dd>{cell.error}</dd>" in section(html, "failed")
            assert "failed" in row(html, cell.label)


def test_without_failures_it_says_so():
    cells = [cell for cell in sample().cells if not cell.error]
    assert "No configuration failed." in render(replace(sample(), cells=cells))


def test_caveats_are_shown_and_pointed_to_from_the_recommendation(html):
    assert sample().meta["caveats"][0] in section(html, "caveats")
    assert '<a href="#caveats">1 caveat</a>' in html[: html.index("What is gained")]


def test_tasks_have_a_table_for_each_metric():
    made = sample()
    results = {
        "dense": TaskResult("piqa", "acc", 1838, 0.644, 0.01117, 0.0, (0.0, 0.0)),
        "d-proxy at 0.5": TaskResult("piqa", "acc", 1838, 0.6404, 0.0112, -0.0036, (-0.0139, 0.0068)),
    }
    cells = [replace(c, tasks=[results[c.label]]) if c.label in results else c for c in made.cells]
    tasks = section(render(replace(made, cells=cells)), "tasks")
    assert "<h3>piqa, acc: 1,838 documents</h3>" in tasks
    assert '<th scope="row">dense</th><td>0.6440</td><td>0.0112</td><td></td><td></td>' in tasks
    chosen = '<tr class="chosen"><th scope="row">d-proxy at 0.5</th>'
    assert f"{chosen}<td>0.6404</td><td>0.0112</td><td>-0.0036</td><td>-0.0139 to +0.0068</td></tr>" in tasks
    assert '<th scope="row">int8</th><td>–</td>' in tasks


def test_without_tasks_nothing_is_said_of_them(html):
    assert 'id="tasks"' not in html


def test_it_says_how_it_was_measured(html):
    measured = section(html, "measured")
    meta = sample().meta
    for text in (meta["command"], meta["date"], meta["hardware"]["cpu"], *meta["versions"].values()):
        assert text in measured
    for text in (meta["text"], meta["calibration"][0]):
        assert text["sha256"] in measured
    assert "21.4 GB/s" in measured
    assert "<dd>weights: 00ff00ff</dd>" in measured  # of the identity what is not said elsewhere


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_says_how_it_was_measured_and_carries_its_data(html, name):
    shown = figure(html, name)
    assert "Measured: " in shown
    assert "bfloat16, Made-up CPU 9000, 2 threads." in shown
    assert f'role="img" aria-labelledby="{name}-title {name}-description"' in shown
    assert re.search(rf'<title id="{name}-title">[^<]+</title><desc id="{name}-description">[^<]+</desc>', shown)
    assert "<details><summary>Data of this plot</summary>" in shown
    assert shown.count("<tr>") + shown.count("<tr ") > 3


@pytest.mark.parametrize("name", PLOTS)
def test_plots_wear_the_pages_colours(html, name):
    svg = re.search("<svg.*?</svg>", figure(html, name), re.DOTALL)[0]
    assert "var(--ink)" in svg
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000"}  # matplotlib's black of invisible shapes
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", svg))
    light, dark = html.split("prefers-color-scheme: dark", 1)
    for variable in used:
        assert f"--{variable}:" in light
        assert f"--{variable}:" in dark.partition("</style>")[0]


def test_answers_stand_side_by_side_with_what_differs_marked(html):
    answers = html[html.index("What they write") : html.index("<h2>Time")]
    assert "<h3>dense</h3>" in answers
    assert answers.index("<h3>d-proxy at 0.5</h3>") < answers.index("<h3>int8</h3>")
    assert "<mark> since</mark>" in answers
    assert "The same 16 tokens as dense." in answers  # teal's


@pytest.mark.parametrize("make", [sample, hostile, nothing_measured])
def test_it_is_well_formed_and_asks_for_nothing(make):
    html = render(make())
    page = _Page(html)
    assert not {"script", "img", "iframe", "object", "video", "audio", "base"} & set(page.tags)
    assert all(value.startswith(("#", "data:")) for value in page.values("src", "href", "xlink:href", "srcset"))
    assert not re.search(r"url\((?!#)|@import|https?://", html)
    assert "default-src 'none'" in html


@pytest.mark.parametrize("make", [sample, hostile])
def test_ids_are_unique_and_what_refers_to_them_finds_them(make):
    html = render(make())
    page = _Page(html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    referred = {value[1:] for value in page.values("href", "xlink:href") if value.startswith("#")}
    referred |= set(re.findall(r"url\(#([^)]+)\)", html))
    referred |= {one for value in page.values("aria-labelledby") for one in value.split()}
    assert referred <= set(ids)


def test_what_it_quotes_is_escaped():
    html = render(hostile())
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(") > 50
    assert "&lt;/blockquote&gt;" in html
    assert "$x^2$" in html  # not set as mathematics
    assert "プロキシ" in html


def test_it_stays_small():
    assert len(render(sample()).encode()) < 1_000_000


def test_what_was_not_measured_is_a_sentence_and_no_plot():
    html = render(nothing_measured())
    assert "<svg" not in html
    for name in PLOTS:
        assert re.search(r'<p class="missing">[^<]+\.</p>', figure(html, name))
    assert "There are no answers of the dense model and another to compare." in html


def test_speed_alone_may_be_missing():
    html = render(replace(sample(), cells=[replace(cell, speed=None) for cell in sample().cells]))
    assert "No speed was measured" in figure(html, "times")
    assert "No configuration beside dense has both quality and speed" in figure(html, "speed")
    assert "<svg" in figure(html, "weights")


def test_the_same_comparison_gives_the_same_file():
    assert render(sample()) == render(sample())


def test_it_is_written_whole(tmp_path, html):
    write_report(sample(), tmp_path / "new" / "report.html")
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8") == html
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_what_it_is_made_with_may_be_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jinja2" else SimpleNamespace())
    with pytest.raises(ConfigError, match=r"needs jinja2: pip install 'countdown-llm\[report\]'"):
        check_installed()


def test_the_hostile_text_is_hostile():
    assert "<script>" in HOSTILE
