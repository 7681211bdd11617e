"""The report as a person meets it: opened from a file in a real browser, on a desktop and on a phone, by day
and by night.

The probes are tested first: each finds the damage that it is there to find.
"""

from __future__ import annotations

import pytest

from neuronmlp_plugin.compressor.pipeline import compress
from neuronmlp_plugin.compressor.plan import make_plan
from neuronmlp_plugin.reporting.folder import render_page
from tests.compressor.browser import CHROMIUM, DRIVER, opened
from tests.compressor.test_compress import QUIET, settings_for
from tests.letters import write_text, write_tokenizer
from tests.reporting.reports import IMAGE, SCRIPT, full_report, plain_report
from tests.tiny_models import write_dense

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        None in (CHROMIUM, DRIVER),
        reason="no chromium and chromedriver on PATH (Debian: chromium, chromium-driver)",
    ),
]
DESKTOP, TABLET, PHONE = 1280, 820, 390
VIEWS = [(DESKTOP, "light"), (DESKTOP, "dark"), (TABLET, "light"), (PHONE, "light"), (PHONE, "dark")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    yield from opened(tmp_path_factory.mktemp("profile"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages by name: everything that a report can hold, the first release's keys, and what `compress` really
    writes.
    """
    home = tmp_path_factory.mktemp("pages")
    for name, report in (("full", full_report()), ("old", plain_report())):
        (home / f"{name}.html").write_text(render_page(report), encoding="utf-8")
    write_tokenizer(write_dense(home / "dense", "llama"))
    write_text(home / "text.jsonl", 3000)
    compress(make_plan(settings_for(home, samples=24)), QUIET)
    return {
        "full": home / "full.html",
        "old": home / "old.html",
        "compressed": home / "out" / "neuronmlp_report.html",
    }


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
@pytest.mark.parametrize("name", ["full", "old", "compressed"])
def test_the_page_is_whole_and_readable(browser, pages, name, width, scheme):
    browser.open(pages[name], width, scheme)
    assert browser.ask("innerWidth") == width
    assert browser.ask("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    assert browser.ask("luminance(ground(document.body)) < 0.05") == (scheme == "dark")
    for probe in (
        "sidewaysOverflow",
        "emptySections",
        "badLabels",
        "faintText",
        "faintLines",
        "deafBoxes",
        "silentPlots",
    ):
        assert browser.ask(f"{probe}()") == [], probe
    assert browser.ask("all('main > section').length") >= 6
    assert browser.ask("all('svg').length") == {"full": 8, "old": 4, "compressed": 7}[name]
    assert browser.requests() == [] and browser.complaints() == []
    assert browser.ask("performance.getEntriesByType('resource').length") == 0


@pytest.mark.parametrize(("width", "layout"), [(DESKTOP, "beside"), (PHONE, "stacked")])
def test_samples_stand_beside_each_other_where_there_is_room(browser, pages, width, layout):
    browser.open(pages["compressed"], width, "light")
    assert browser.ask("pairs()") == [layout] * 4
    browser.open(pages["full"], width, "light")
    assert browser.ask("pairs()") == [layout] * 2


def test_strange_text_is_shown_and_not_run(browser, pages):
    browser.open(pages["full"], DESKTOP, "light")
    assert browser.driver.title.startswith(SCRIPT)
    assert browser.ask("all('script, img').length") == 0
    assert browser.ask(f"document.querySelector('#samples').innerText.includes({IMAGE!r})")


def test_the_phone_scrolls_wide_tables_in_their_own_box(browser, pages):
    browser.open(pages["full"], PHONE, "light")
    assert browser.ask("all('#matrices .scroll').every((e) => e.scrollWidth > e.clientWidth)")
    browser.ask("document.querySelector('#matrices .scroll').scrollBy(10000, 0)")
    last = "document.querySelector('#matrices th:last-child').getBoundingClientRect()"
    assert browser.ask(f"{last}.left") > 0 and browser.ask(f"{last}.right") <= PHONE


def test_the_keyboard_reaches_every_link_and_table(browser, pages):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.open(pages["full"], DESKTOP, "light")
    reached = []
    for _ in range(30):
        ActionChains(browser.driver).send_keys(Keys.TAB).perform()
        reached.append(
            browser.ask("document.activeElement.getAttribute('href') || document.activeElement.ariaLabel")
        )
    assert reached[0] == "#main"
    assert set(browser.ask("all('a, .scroll').map((e) => e.getAttribute('href') || e.ariaLabel)")) <= set(
        reached
    )
    assert browser.ask("all('nav a').every((e) => document.getElementById(e.hash.slice(1)))")


def test_paper_is_white_and_shows_whole_tables(browser, pages):
    browser.open(pages["full"], 700, "dark", media="print")  # A4 within its margins
    assert browser.ask("luminance(ground(document.body))") > 0.9 and browser.ask("faintText()") == []
    assert browser.ask(
        "all('.scroll').every((e) => e.scrollHeight <= e.clientHeight && e.scrollWidth <= e.clientWidth)"
    )
    assert browser.ask("sidewaysOverflow()") == [] and browser.ask("badLabels()") == []
    assert not browser.ask("document.querySelector('nav').checkVisibility()")


DAMAGE = {
    "sidewaysOverflow": (
        "</main>",
        "<p style='width: 3000px; max-width: none'>far too wide a line</p></main>",
    ),
    "emptySections": ("</main>", "<section id='hollow'></section></main>"),
    "badLabels": ("</text>", " and far too long a label for its place</text>"),
    "faintText": ("</main>", "<p style='color: #888'>hardly readable</p></main>"),
    "faintLines": ("--gate: #0068a8", "--gate: #d0e8ff"),
    "deafBoxes": ('tabindex="0"', ""),
    "silentPlots": ('role="img"', ""),
}


@pytest.mark.parametrize("probe", DAMAGE)
def test_a_probe_finds_the_damage_that_it_is_for(browser, tmp_path, probe):
    page = render_page(full_report())
    old, new = DAMAGE[probe]
    assert old in page
    (tmp_path / "damaged.html").write_text(page.replace(old, new), encoding="utf-8")
    browser.open(tmp_path / "damaged.html", PHONE, "light")
    assert browser.ask(f"{probe}()") != []


def test_a_request_would_be_stopped_and_noticed(browser, tmp_path):
    damaged = render_page(full_report()).replace(
        "</main>", "<img src='http://127.0.0.1:9/pixel.png' alt=''></main>"
    )
    (tmp_path / "damaged.html").write_text(damaged, encoding="utf-8")
    browser.open(tmp_path / "damaged.html", DESKTOP, "light")
    assert any("Content Security Policy" in line for line in browser.complaints())
    without_policy = damaged.replace("default-src 'none'; img-src data:", "img-src *")
    (tmp_path / "damaged.html").write_text(without_policy, encoding="utf-8")
    browser.open(tmp_path / "damaged.html", DESKTOP, "light")
    assert browser.requests() == ["http://127.0.0.1:9/pixel.png"]
