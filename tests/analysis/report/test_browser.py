"""The report in a real browser: headless Chromium driven through chromedriver, offline, from file://."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from analysis.report.page import write_report
from analysis.report.server import LiveReport, make_server
from analysis.results.load import load
from analysis.results.parquet import records

PdfReader = pytest.importorskip("pypdf", reason="pypdf is not installed: pip install -e '.[dev]'").PdfReader
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[dev]'")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER = next((b for n in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(n))), None)
DRIVER = shutil.which("chromedriver") or shutil.which("chromium.chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.skipif(DRIVER is None, reason="no chromedriver: apt-get install chromium-driver"),
]

PATIENCE = 120
"""Seconds to wait for something that happens in far less on an idle machine."""
READY = """
return Array.from(document.querySelectorAll(".plot")).every(function (p) {
  var r = p.getBoundingClientRect();
  return p.closest("[hidden], details:not([open])") || r.bottom < 0 || r.top > innerHeight || p.querySelector("svg.main-svg");
});
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Selenium's own manager looks for drivers on the network; the path of one keeps it from that.
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(PATIENCE)
    driver.set_page_load_timeout(PATIENCE)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def made(tmp_path_factory, build_study):
    """A study of 36 trials and its report."""
    folder = build_study(tmp_path_factory.mktemp("study") / "synthetic", 36, "synthetic", 0)
    results = load(folder)
    return results, write_report(results, folder.parent / "report.html")


def show(driver: Any, address: str, width: int = 1400, height: int = 900, scheme: str = "light") -> None:
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.get("about:blank")  # an address that differs in its hash alone would not load again
    for log in ("browser", "performance"):
        driver.get_log(log)
    driver.get(address)
    driver.execute_script("document.documentElement.style.scrollBehavior = 'auto'")
    until(driver, READY)


def until(driver: Any, script: str, *values: Any) -> Any:
    return WebDriverWait(driver, PATIENCE, 0.1).until(lambda d: d.execute_script(script, *values), script)


def see(driver: Any, selector: str) -> Any:
    """Scroll an element to the middle of the window, and wait for what is drawn there."""
    element = driver.find_element("css selector", selector)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    until(driver, READY)
    return element


def drawn(count: Callable[[], int], expected: int) -> int:
    """How many there are once there are as many as expected: a filter redraws what is near the window, one by one."""
    end = time.monotonic() + PATIENCE
    while (found := count()) != expected and time.monotonic() < end:
        time.sleep(0.1)
    return found


def errors(driver: Any) -> list[str]:
    return [e["message"] for e in driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]


def choose(driver: Any, field: str, value: str) -> None:
    driver.execute_script("document.getElementById('filters').open = true")
    script = (
        "return Array.from(document.querySelectorAll('#filters input[name=\"' + arguments[0] + '\"]'))"
        ".find(b => b.parentElement.textContent === arguments[1])"
    )
    box = driver.execute_script(script, field, value)
    box.send_keys(Keys.SPACE)


def shown_rows(driver: Any) -> list[str]:
    script = (
        "return Array.from(document.querySelectorAll('table.sortable tr[data-trial]'))"
        ".filter(r => !r.hidden).map(r => r.dataset.trial)"
    )
    return driver.execute_script(script)


FIRST = ".pair .plot .canvas"
"""Quality against time, with which a report opens."""
TRAINING = "#study-0-curves > figure.plot:last-of-type .canvas"


def unfold(driver: Any, selector: str = ".theme-fold") -> None:
    driver.execute_script(f"document.querySelectorAll('{selector}').forEach(function (d) {{ d.open = true; }})")
    until(driver, READY)


def points(driver: Any, selector: str) -> list[list[float]]:
    """Centres in the window of the markers a figure has drawn."""
    script = (
        "return Array.from(document.querySelector(arguments[0]).querySelectorAll('.scatterlayer .points path'))"
        ".map(e => e.getBoundingClientRect()).filter(r => r.width > 3).map(r => [r.left + r.width / 2, r.top + r.height / 2])"
    )
    return driver.execute_script(script, selector)


def boxes_of(driver: Any, selector: str) -> list[dict[str, float]]:
    """Where elements stand on the page, in pixels from its top left."""
    script = (
        "return Array.from(document.querySelectorAll(arguments[0])).filter(e => e.offsetParent).map(e => { "
        "var r = e.getBoundingClientRect(); return {top: r.top + scrollY, bottom: r.bottom + scrollY, left: r.left, "
        "right: r.right}; })"
    )
    return driver.execute_script(script, selector)


def test_the_first_screen_answers_with_one_sentence_and_the_pair(browser, made):
    results, path = made
    show(browser, path.as_uri())
    (answer,) = browser.find_elements("css selector", ".answer")
    assert answer.text.endswith(".") and answer.text.count(". ") == 0, "one sentence"
    assert answer.text.startswith(
        "11 of 36 trials diverged or collapsed, and no field stands out; the best survivor is "
    )
    (said,) = boxes_of(browser, ".answer")
    left, right = boxes_of(browser, ".pair .canvas")
    assert said["bottom"] <= left["top"] and max(left["bottom"], right["bottom"]) <= 900, "all on the first screen"
    assert left["right"] <= right["left"], "side by side"
    bad = results.trials["outcome"].isin(["diverged", "collapsed"]).sum()
    count = "return document.querySelectorAll('.pair .plot:not([hidden]) .subplot.xy2 .points path').length"
    assert drawn(lambda: browser.execute_script(count), bad) == bad, "every divergence is in the figure"
    legend = browser.execute_script(
        "return Array.from(document.querySelectorAll('.pair .plot .legendtext')).map(t => t.textContent)"
    )
    assert {"p0 gaussian", "p0 uniform", "Pareto front"} <= set(legend)
    assert len(browser.find_elements("css selector", ".card")) == 3
    titles = [e.text for e in browser.find_elements("css selector", ".grids figcaption b") if e.text]
    assert [t.split(",")[0] for t in titles] == ["Replay buffer", "Fresh chains from p0"]
    assert len(browser.find_elements("css selector", ".commands code")) == 2, "without a study.yaml"
    assert errors(browser) == []


def test_what_is_opened_is_short_and_says_no_ids(browser, made):
    results, path = made
    show(browser, path.as_uri())
    height = "return document.documentElement.scrollHeight"
    assert browser.execute_script(height) <= 5000
    assert not browser.find_elements("css selector", ".theme-fold[open]")
    words = browser.execute_script("return document.body.innerText")
    for id_ in (*results.trials["setting_id"], "small-buffer-v1", "small-fresh-v1"):
        assert id_ not in words, "hashes and protocols are in tooltips and provenance"
    assert words.count("—") == 0, "no column of dashes"
    show(browser, path.as_uri(), 400, 800)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    left, right = boxes_of(browser, ".pair .canvas")
    assert left["top"] < 800 and right["top"] >= left["bottom"], "the figures one below the other"


def test_a_command_can_be_copied(browser, made):
    show(browser, made[1].as_uri())
    button = browser.find_element("css selector", ".copy")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    until(browser, "return arguments[0].textContent !== 'copy'", button)
    line = browser.find_element("css selector", ".commands code").text
    assert line.startswith("mebm ")
    if button.text == "selected":
        assert browser.execute_script("return window.getSelection().toString()").strip() == line
    assert errors(browser) == []


def test_a_thousand_trials_are_usable(browser, build_study, tmp_path):
    results = load(build_study(tmp_path / "many", 1000, "many", 0))
    path = write_report(results, tmp_path / "report.html")
    assert path.stat().st_size < 16e6
    show(browser, path.as_uri())
    counts = results.trials["outcome"].value_counts()
    with_value = int(results.trials["fd_buffer_best"].notna().sum())
    assert drawn(lambda: len(points(browser, FIRST)), with_value) == with_value
    choose(browser, "outcome", "collapsed")
    assert len(shown_rows(browser)) == counts["collapsed"]
    assert drawn(lambda: len(points(browser, FIRST)), counts["collapsed"]) == counts["collapsed"]
    assert errors(browser) == []


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (1400, "dark"), (400, "light"), (400, "dark")])
def test_every_figure_is_drawn_in_its_box_without_an_error(browser, made, width, scheme):
    show(browser, made[1].as_uri(), width, 800, scheme)
    unfold(browser)
    boxes = browser.find_elements("css selector", ".plot:not([hidden]) .canvas")
    assert len(boxes) >= 10
    for box in boxes:
        # Again and again: figures that are drawn meanwhile may move it out of the window before its turn comes.
        look = "arguments[0].scrollIntoView({block: 'center'}); "
        until(browser, f"{look}return arguments[0].querySelector('svg.main-svg') !== null", box)
    state = browser.execute_script(
        "return {boxes: Array.from(document.querySelectorAll('.plot:not([hidden]) .canvas')).map(c => ["
        "c.querySelector('svg.main-svg').getBoundingClientRect().width - "
        "(c.classList.contains('wide') ? c.scrollWidth : c.clientWidth), c.querySelectorAll("
        "'.cartesianlayer .trace, .cartesianlayer .barlayer .point, .cartesianlayer .heatmaplayer image').length]), "
        "over: document.documentElement.scrollWidth - document.documentElement.clientWidth, "
        "page: getComputedStyle(document.body).backgroundColor, "
        "ink: getComputedStyle(document.querySelector('.plot .xtick text')).fill}"
    )
    assert max(wider for wider, _ in state["boxes"]) <= 1
    assert min(count for _, count in state["boxes"]) > 0
    assert state["over"] <= 0
    bright = [sum(map(int, re.findall(r"\d+", state[k])[:3])) for k in ("page", "ink")]
    assert (bright[0] > 600 > 200 > bright[1]) if scheme == "light" else (bright[0] < 200 < 600 < bright[1])
    assert errors(browser) == []


def test_figures_in_folds_wait_until_they_are_opened(browser, made):
    show(browser, made[1].as_uri())
    drawn = "return document.querySelector(arguments[0]).querySelector('svg.main-svg') !== null"
    assert browser.execute_script(drawn, FIRST)
    assert not browser.execute_script(drawn, TRAINING)
    summary = browser.find_element("css selector", "#study-0-curves > summary")
    browser.execute_script("arguments[0].focus()", summary)
    summary.send_keys(Keys.ENTER)
    until(browser, "return document.querySelector('#study-0-curves').open")
    see(browser, TRAINING)
    until(browser, drawn, TRAINING)
    assert errors(browser) == []


def test_a_figure_follows_the_width_of_the_window(browser, made):
    show(browser, made[1].as_uri(), 1400)
    see(browser, FIRST)
    width = "return document.querySelector(arguments[0]).querySelector('svg.main-svg').getBoundingClientRect().width"
    wide = browser.execute_script(width, FIRST)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 700, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    until(
        browser,
        f"return ({width.removeprefix('return ')}) <= document.querySelector(arguments[0]).clientWidth + 1",
        FIRST,
    )
    assert browser.execute_script(width, FIRST) < wide - 50


def test_asks_for_nothing_but_itself(browser, made):
    show(browser, made[1].as_uri())
    unfold(browser)
    for box in browser.find_elements("css selector", ".plot:not([hidden])"):
        browser.execute_script("arguments[0].scrollIntoView()", box)
        until(browser, READY)
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert made[1].as_uri() in asked
    assert {url.partition(":")[0] for url in asked} <= {"file", "data", "blob"}
    assert [url for url in asked if url.startswith("file:")] == [made[1].as_uri()]


def test_a_filter_hides_rows_points_and_lines_and_is_kept_in_the_address(browser, made):
    results, path = made
    trials = records(results.trials)
    diverged = [t["trial_id"] for t in trials if t["outcome"] == "diverged"]
    both = [t["trial_id"] for t in trials if t["outcome"] == "diverged" and t["sampling_steps"] == 1]
    assert 0 < len(both) < len(diverged) < len(trials)
    show(browser, path.as_uri())
    see(browser, FIRST)

    def outcomes() -> int:
        return len(points(browser, FIRST))

    assert len(shown_rows(browser)) == drawn(outcomes, len(trials)) == len(trials)
    choose(browser, "outcome", "diverged")
    assert shown_rows(browser) == diverged
    choose(browser, "sampling_steps", "1")
    assert shown_rows(browser) == both
    assert f"{len(both)} of {len(trials)} shown" in browser.find_element("id", "filtered").text
    see(browser, FIRST)
    assert drawn(outcomes, len(both)) == len(both)
    unfold(browser, "#study-0-curves")
    see(browser, TRAINING)
    lines = (
        "return document.querySelector(arguments[0]).querySelectorAll('.subplot.xy .scatterlayer .lines path').length"
    )
    assert drawn(lambda: browser.execute_script(lines, TRAINING), len(both)) == len(both)
    # The address alone makes the same page, and opens the fold it names.
    address = browser.current_url
    assert address.endswith("#outcome=diverged&sampling_steps=1")
    show(browser, address.replace("#", "#study-0-curves&"))
    assert shown_rows(browser) == both
    assert browser.execute_script("return document.querySelector('#study-0-curves').open")
    browser.execute_script("document.querySelector('#filters button').click()")
    until(browser, "return location.hash === '#study-0-curves'")
    assert len(shown_rows(browser)) == len(trials)
    see(browser, FIRST)
    assert drawn(outcomes, len(trials)) == len(trials)
    assert errors(browser) == []


def test_hover_shows_the_whole_setting_and_the_samples(browser, made):
    results, path = made
    show(browser, path.as_uri())
    see(browser, FIRST)
    x, y = points(browser, FIRST)[0]
    pointer = ActionChains(browser)
    pointer.w3c_actions.pointer_action.move_to_location(int(x) - 30, int(y))
    pointer.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    pointer.perform()
    until(
        browser,
        "var i = document.querySelector('#card:not([hidden]) img'); return i && i.complete && i.naturalWidth > 0",
    )
    words = browser.find_element("id", "card").text
    trial = next(t for t in records(results.trials) if words.startswith(t["trial_id"] + " " + t["outcome"]))
    for shown in (f"K\n{trial['sampling_steps']}", f"p0\n{trial['initial']}", f"α\n{trial['step_size']:g}"):
        assert shown in words
    for shown in (
        f"{trial['seed']}, setting {trial['setting_id']}",
        "network conv-16",
        "|B| 2000",
        "ρ 0.05",
        "σ 0.001",
    ):
        assert shown in words
    box = browser.execute_script(
        "var r = document.getElementById('card').getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]"
    )
    assert 0 <= box[0] < box[2] <= 1400 and 0 <= box[1] < box[3] <= 900
    browser.execute_script("window.scrollBy(0, 300)")
    until(browser, "return document.getElementById('card').hidden")
    assert errors(browser) == []


def test_keyboard_reaches_filters_figures_and_their_points(browser, made):
    show(browser, made[1].as_uri())
    reached: list[str] = []
    where = (
        "var e = document.activeElement; return e.classList.contains('canvas') ? 'figure' : "
        "e.closest('#filters') ? 'filter ' + (e.name || e.tagName) : e.tagName"
    )
    browser.execute_script("document.getElementById('filters').open = true")
    for _ in range(120):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.append(browser.execute_script(where))
        if reached[-1] == "figure":
            break
    assert reached[-1] == "figure"
    for name in ("SUMMARY", "outcome", "initial", "sampling_steps", "BUTTON"):
        assert f"filter {name}" in reached
    assert "SELECT" in reached  # the theme
    until(browser, "return document.activeElement.querySelector('svg.main-svg') !== null")
    seen = []
    shown = "return !document.getElementById('card').hidden && document.querySelector('#card b').textContent"
    end = time.monotonic() + PATIENCE
    while len(set(seen)) < 3 and time.monotonic() < end:
        # What is drawn above meanwhile moves the page, which hides the card: a reader presses the key again.
        ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
        time.sleep(0.1)
        if text := browser.execute_script(shown):
            seen.append(text)
    assert len(set(seen)) == 3
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    until(browser, "return document.getElementById('card').hidden")
    assert errors(browser) == []


def test_the_theme_is_the_systems_until_it_is_chosen(browser, made):
    show(browser, made[1].as_uri(), scheme="dark")
    see(browser, FIRST)
    ink = "return getComputedStyle(document.querySelector(arguments[0]).querySelector('.xtick text')).fill"
    dark = browser.execute_script(ink, FIRST)
    browser.find_element("css selector", "#theme option[value=light]").click()
    until(browser, ink + " !== arguments[1]", FIRST, dark)
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.find_element("css selector", "#theme option[value='']").click()
    until(browser, ink + " === arguments[1]", FIRST, dark)
    assert errors(browser) == []


def test_another_pair_of_fields_is_drawn_when_it_is_chosen(browser, made):
    show(browser, made[1].as_uri())
    unfold(browser, "#study-0-phase")
    see(browser, "#study-0-phase .choice")
    browser.execute_script(
        "var s = document.querySelector('#study-0-phase .choice select'); s.value = 'α and p0'; s.dispatchEvent(new Event('change'))"
    )
    title = until(
        browser,
        "var t = document.querySelector('#study-0-phase .choice .plot:not([hidden]) .ytitle'); return t && t.textContent",
    )
    assert title == "p0"
    assert len(browser.find_elements("css selector", "#study-0-phase .choice .plot:not([hidden])")) == 1
    assert errors(browser) == []


def test_columns_of_the_trial_table_sort(browser, made):
    results, path = made
    show(browser, path.as_uri())
    unfold(browser, "#study-0-trials")
    best = {t["trial_id"]: t["fd_buffer_best"] for t in records(results.trials)}
    button = browser.find_element("xpath", "//table[@class='sortable']//button[text()='best FD (buffer)']")
    browser.execute_script("arguments[0].click()", button)
    assert [best[i] for i in shown_rows(browser)] == sorted(best.values())
    browser.execute_script("arguments[0].click()", button)
    assert [best[i] for i in shown_rows(browser)] == sorted(best.values(), reverse=True)


def test_prints_to_pages_with_figures(browser, made):
    show(browser, made[1].as_uri(), scheme="dark")
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert pdf.startswith(b"%PDF")
    pages = PdfReader(io.BytesIO(pdf)).pages
    assert len(pages) >= 8
    words = "".join("".join(page.extract_text().split()) for page in pages)
    # Now on the screen too every figure's axes are known: paper must have had them.
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    script = "return Array.from(document.querySelectorAll('.plot:not([hidden]) .xtitle')).map(t => t.textContent)"
    titles = ["".join(t.split()) for t in browser.execute_script(script)]
    browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert len(titles) >= 10
    for title in set(titles):
        assert words.count(title) >= titles.count(title)
    # Markers and bands are curves and lines by the thousand; the tables' borders are not.
    assert sum(len(re.findall(rb"\n[^\n]* [lc]\n", page.get_contents().get_data())) for page in pages) > 2500
    # What the screen shows is as before.
    until(browser, "return getComputedStyle(document.body).backgroundColor === 'rgb(15, 20, 26)'")
    assert errors(browser) == []


def test_every_figure_is_drawn_for_paper_within_its_width(browser, made):
    show(browser, made[1].as_uri())
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    widths = browser.execute_script(
        "return Array.from(document.querySelectorAll('.plot:not([hidden]) svg.main-svg')).map(s => Number(s.getAttribute('width')))"
    )
    count = len(browser.find_elements("css selector", ".plot:not([hidden])"))
    browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert len(widths) >= count
    assert max(widths) <= 688  # A4 between margins of 14 mm, in CSS pixels
    until(browser, READY)
    see(browser, FIRST)
    until(
        browser,
        "return document.querySelector(arguments[0]).querySelector('svg.main-svg').getBoundingClientRect().width > 690",
        FIRST,
    )


def test_the_live_page_keeps_filters_when_the_study_moves_on(browser, made):
    results, _ = made
    folder = results.folders["synthetic"]
    server = make_server(LiveReport(folder, every_seconds=0.2), 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        show(browser, f"http://127.0.0.1:{server.server_address[1]}/")
        choose(browser, "outcome", "diverged")
        shown = shown_rows(browser)
        assert 0 < len(shown) < 36
        browser.execute_script("window.before = true")
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text() + " ")
        WebDriverWait(browser, PATIENCE, 0.2).until(
            lambda d: d.execute_script("return !window.before && document.readyState === 'complete'")
        )
        assert shown_rows(browser) == shown
        assert errors(browser) == []
    finally:
        server.shutdown()
        server.server_close()
