"""The pages in a real browser, opened from files: filters, sorting, keyboard, links, no network."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlparse

import browser
import pytest
import synthetic

from analysis.site import pages

pytestmark = pytest.mark.slow

ROWS = "[...document.querySelectorAll('section.track tbody tr')].filter(r => !r.hidden)"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with synthetic.store(methods=6, seeds=3) as store:
        default = {"lr": 1e-3, "tau": 0.005}
        pages.write(store, folder, defaults={f"method_{i}": default for i in range(3)})
    return folder


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    program = browser.find()
    if program is None:
        pytest.skip(f"no browser; looked for {', '.join(browser.NAMES)}")
    pytest.importorskip("websocket", reason="websocket-client drives the browser")
    found = browser.Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def page(chromium, site):
    """The browser; afterwards nothing may have left the folder, and nothing been complained of."""
    chromium.requests.clear()
    chromium.complaints.clear()
    chromium.show(1400, 900)
    yield chromium
    assert chromium.complaints == []
    kinds = {url.partition(":")[0] for url in chromium.requests}
    assert kinds <= {"file", "data", "about"}, chromium.requests
    assert "file" in kinds
    for url in chromium.requests:
        if url.startswith("file:"):
            assert Path(unquote(urlparse(url).path)).is_relative_to(site.resolve()), url


def choose(page, name: str, value: str) -> None:
    page.run(
        f"(() => {{ const f = document.querySelector('form.filters').elements['{name}'];"
        f"f.value = {value!r}; f.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
    )


def test_filters_hide_rows_and_their_tables_and_are_kept_in_the_address(page, site):
    page.open(site / "index.html")
    everything = page.run(f"{ROWS}.length")
    assert everything == 6 * 4 * 2  # methods, suites, simulators
    choose(page, "suite", "pointmaze")
    assert page.run(f"{ROWS}.length") == 6 * 2
    assert page.run("document.querySelectorAll('section.track:not([hidden])').length") == 2
    choose(page, "family", "method_1")
    assert page.run(f"{ROWS}.length") == 2 * 2
    choose(page, "environment", "v5, mujoco 3.2.3")
    assert page.run(f"{ROWS}.length") == 2
    address = page.run("location.hash")
    page.open(site / "index.html", address)
    assert page.run(f"{ROWS}.length") == 2
    choose(page, "seeds", "4")
    assert page.run(f"{ROWS}.length") == 0
    assert page.run("document.querySelector('.none').hidden") is False
    page.run("document.querySelector('button[type=reset]').click()")
    page.run("new Promise(done => setTimeout(done, 50))")
    assert page.run(f"{ROWS}.length") == everything


def test_seeds_filter_counts_the_fewest_seeds_of_a_row(page, site):
    page.open(site / "index.html")
    choose(page, "seeds", "3")
    labels = page.run(f"{ROWS}.map(r => r.querySelector('th').innerText.trim())")
    # One seed of the first method diverged, on a task of one suite, in both simulators.
    assert len(labels) == 6 * 4 * 2 - 2


@pytest.mark.parametrize("column", ["Mean", "IQM", "Rank"])
def test_sorting_orders_numbers_and_keeps_missing_last(page, site, column):
    page.open(site / "index.html")
    values = []
    for _ in range(2):
        page.run(
            "[...document.querySelector('section.track').querySelectorAll('button[data-sort]')]"
            f".find(b => b.innerText === {column!r}).click()"
        )
        values.append(
            page.run(
                "(() => { const t = document.querySelector('section.track table');"
                "const i = [...t.tHead.rows[0].children].findIndex(h => h.ariaSort);"
                "return [...t.tBodies[0].rows].map(r => r.children[i].dataset.v); })()"
            )
        )
    for found in values:
        assert "" not in found[:-1]
    known = [[float(v) for v in found if v] for found in values]
    assert known[0] != known[1]
    assert sorted(known[0]) in (known[0], known[1])
    assert known[0] == known[1][::-1]


def test_a_keyboard_reaches_the_filters_and_sorts_a_table(page, site):
    page.open(site / "index.html")
    page.press("Tab")
    assert page.run("document.activeElement.className") == "skip"
    for _ in range(60):
        page.press("Tab")
        if page.run("document.activeElement.dataset.sort") == "text":
            break
    page.press("Enter")
    assert page.run("document.activeElement.closest('th').ariaSort") == "ascending"


def test_every_link_of_every_page_leads_to_a_file(page, site):
    files = sorted(site.rglob("*.html"))
    assert len(files) > 100
    for file in [site / "index.html", *files[:: max(len(files) // 25, 1)]]:
        page.open(file)
        for link in page.run("[...document.links].map(a => a.href)"):
            parsed = urlparse(link)
            target = Path(unquote(parsed.path))
            assert parsed.scheme == "file", link
            assert target.is_file(), (file.name, link)
            if parsed.fragment and target.suffix == ".html":
                assert f'id="{parsed.fragment}"' in target.read_text(), link


def test_a_cell_opens_its_runs(page, site):
    page.open(site / "index.html")
    href = page.run("document.querySelector('section.track td a[href^=cells]').href")
    page.open(Path(unquote(urlparse(href).path)))
    text = page.run("document.body.innerText")
    for part in ("Differs from the default", "digest", "Simulator", "Trained together", "torch"):
        assert part in text
    assert page.run("document.querySelectorAll('svg.curves polyline').length") >= 3


def test_two_methods_are_compared_on_their_common_tasks(page, site):
    page.open(site / "compare.html")
    page.run("new Promise(done => setTimeout(done, 200))")
    assert "P(method_" in page.run("document.querySelector('#comparison').innerText")
    assert page.run("document.querySelectorAll('#comparison tbody tr').length") > 1
    first = page.run("document.querySelector('#comparison .lead').innerText")
    page.run(
        "(() => { const f = document.querySelector('form').elements;"
        "[f.a.value, f.b.value] = [f.b.value, f.a.value];"
        "f.a.dispatchEvent(new Event('change')); })()"
    )
    turned = page.run("document.querySelector('#comparison .lead').innerText")
    value = [float(text.split("= ")[1].split()[0]) for text in (first, turned)]
    assert value[0] + value[1] == pytest.approx(1, abs=0.011)


def test_pages_fit_a_narrow_window_in_both_colour_schemes(page, site, tmp_path):
    folder = Path(os.environ.get("HARNESS_TEST_PICTURES", tmp_path))  # to look at them
    cell = next(iter(sorted((site / "cells").glob("*.html"))))
    dataset = next(iter(sorted((site / "datasets").glob("*.html"))))
    shown = [site / name for name in ("index.html", "compare.html", "download.html")]
    for file in (*shown, cell, dataset):
        for width in (390, 1400):
            for scheme in ("light", "dark"):
                page.open(file)
                page.show(width, 900, scheme)
                page.run("new Promise(done => setTimeout(done, 100))")
                wide = page.run("document.documentElement.scrollWidth")
                assert wide <= width, (file.name, width, wide)
                page.picture(folder / f"{file.stem[:12]}-{width}-{scheme}.png")
                colour = page.run("getComputedStyle(document.documentElement).backgroundColor")
                assert (colour == "rgb(255, 255, 255)") == (scheme == "light")


def test_paper_gets_the_tables_without_the_controls(page, site, tmp_path):
    folder = Path(os.environ.get("HARNESS_TEST_PICTURES", tmp_path))
    page.open(site / "index.html")
    page.show(1060, 750, "dark")
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.run("getComputedStyle(document.querySelector('.filters')).display") == "none"
    assert page.run("getComputedStyle(document.documentElement).backgroundColor") in (
        "rgb(255, 255, 255)",
        "rgba(0, 0, 0, 0)",
    )
    page.picture(folder / "index-print.png")
    page.call("Emulation.setEmulatedMedia", media="")
