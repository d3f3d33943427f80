"""The report in a browser: silent, alone, and as wide as a phone.

Needs Chromium and playwright (`make test-all` installs playwright; Chromium is the system's, or
`.venv/bin/playwright install chromium`). Without them these tests fail and say so.
"""

from __future__ import annotations

import shutil

import pytest

from countdown.report.html import write_report
from report.sample import hostile, nothing_measured, sample

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        pytest.fail("playwright is missing: pip install 'countdown-llm[browser]'")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        try:
            # In a container the user is root, where Chromium's own sandbox does not start.
            opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            pytest.fail(f"Chromium is missing: apt install chromium, or playwright install chromium ({error})")
        yield opened
        opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("make", [sample, hostile, nothing_measured])
def test_it_loads_without_a_word_or_a_request(browser, tmp_path, make, width, scheme):
    path = tmp_path / "report.html"
    write_report(make(), path)
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    for details in page.locator("details").all():
        details.evaluate("element => element.open = true")
    page.wait_for_load_state("networkidle")
    assert said == []
    assert asked == [path.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    plots = page.locator("figure > svg")
    assert plots.count() == (0 if make is nothing_measured else 7)
    assert all(plot.bounding_box()["width"] <= width for plot in plots.all())
    page.close()


@pytest.mark.slow
def test_a_table_that_does_not_fit_shows_that_it_scrolls(browser, tmp_path):
    """By a shadow at its right edge, under a cover that is there only at the end of the table."""
    path = tmp_path / "report.html"
    write_report(sample(), path)
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto(path.as_uri())
    table = page.locator("#all .scroll")
    assert table.evaluate("element => element.scrollWidth > element.clientWidth")
    style = table.evaluate("element => { const s = getComputedStyle(element); return s.backgroundAttachment }")
    assert style == "local, scroll"
    box = table.bounding_box()
    edge = {"x": box["x"] + box["width"] - 12, "y": box["y"], "width": 12, "height": box["height"] - 1}
    more = page.screenshot(clip=edge, full_page=True)
    table.evaluate("element => element.style.background = 'none'")
    assert page.screenshot(clip=edge, full_page=True) != more
    page.close()


@pytest.mark.slow
def test_it_is_light_or_dark_as_the_reader_is(browser, tmp_path):
    path = tmp_path / "report.html"
    write_report(sample(), path)
    ink = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(path.as_uri())
        colour = "element => getComputedStyle(element)"
        ink[scheme] = (
            page.locator("body").evaluate(f"({colour})(document.body).backgroundColor"),
            page.locator("#speed svg text").first.evaluate(f"element => ({colour})(element).fill"),
        )
        page.close()
    assert ink["light"] == ("rgb(255, 255, 255)", "rgb(29, 31, 35)")
    assert ink["dark"] == ("rgb(20, 22, 26)", "rgb(231, 233, 236)")
