"""The page of all records in a real headless browser: its headings sort, its filter filters, its records open."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver

from leaderboard import rank, verify_duel
from leaderboard.page import render
from leaderboard.records import find_records, load_record

QUIET = (
    "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync disable-dev-shm-usage"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    """Chromium without a window. Skipped where there is none, unless REQUIRE_BROWSER is set."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        assert not os.environ.get("REQUIRE_BROWSER"), "no chromium or chromedriver on the PATH"
        pytest.skip("needs chromium and chromedriver; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in [*QUIET.split(), f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the committed records."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render([load_record(record) for record in find_records()], duels()), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: WebDriver, page: Path) -> WebDriver:
    browser.set_window_size(1200, 900)
    browser.get("about:blank")
    browser.get(page.as_uri())
    return browser


def duels() -> list[dict[str, Any]]:
    return [verify_duel.load_duel(path) for path in verify_duel.find_duels()]


def names(browser: WebDriver) -> list[str]:
    """Of the records in sight in the first table, from the top."""
    rows = browser.find_element(By.CLASS_NAME, "board").find_elements(By.CSS_SELECTOR, "tbody tr")
    return [row.find_elements(By.TAG_NAME, "td")[1].text for row in rows if row.is_displayed()]


def first_table() -> list[dict[str, Any]]:
    """The rows that it has, whatever records there are."""
    (_, group), *_ = rank.classes(rank.rows([load_record(path) for path in find_records()], duels()))
    return [dict(row) for row in group]


def click(browser: WebDriver, heading: str) -> None:
    buttons = browser.find_elements(By.CSS_SELECTOR, "th button")
    next(button for button in buttons if button.text == heading).click()


def test_a_click_on_a_heading_sorts_by_its_numbers(opened: WebDriver) -> None:
    """Steps as numbers: as text 1,200 would come before 460."""
    by_rank = [row["name"] for row in first_table()]
    by_steps = [row["name"] for row in sorted(first_table(), key=lambda row: row["steps"])]
    assert by_steps != [row["name"] for row in sorted(first_table(), key=lambda row: f"{row['steps']:,}")]
    assert names(opened) == by_rank
    click(opened, "steps")
    assert names(opened) == by_steps
    click(opened, "steps")
    steps = {row["name"]: row["steps"] for row in first_table()}
    assert names(opened) == sorted(by_steps, key=lambda name: -steps[name])  # equal ones stay in their order
    click(opened, "record")
    assert names(opened) == sorted(by_rank)
    sorted_by = opened.find_elements(By.CSS_SELECTOR, "th[aria-sort]")
    assert [heading.text.split()[0] for heading in sorted_by] == ["record"]


def test_the_filter_leaves_what_has_all_its_words(opened: WebDriver) -> None:
    everything, field = names(opened), opened.find_element(By.ID, "filter")
    rows = {row["name"]: " ".join(rank.cells(row).values()).lower() for row in first_table()}
    expected = [name for name, text in rows.items() if "muon" in text and "hidden" in text]
    field.send_keys("MUON hidden")
    assert names(opened) == expected and 0 < len(expected) < len(everything)
    assert not opened.find_element(By.CSS_SELECTOR, "p.none").is_displayed()
    field.send_keys(" nonsense")
    assert names(opened) == []
    assert opened.find_element(By.CSS_SELECTOR, "p.none").is_displayed()
    field.clear()
    field.send_keys(first_table()[0]["track"])  # of the heading
    assert names(opened) == everything


def test_a_records_name_opens_its_changes_and_logs(opened: WebDriver) -> None:
    link = opened.find_element(By.CSS_SELECTOR, ".board tbody td a")
    link.click()
    records = opened.find_elements(By.CSS_SELECTOR, "details.record[open]")
    assert len(records) == 1 and link.text in records[0].text
    assert records[0].get_attribute("id") == f"{first_table()[0]['track']}/{link.text}"
    against = records[0].find_element(By.CSS_SELECTOR, "h4 a")
    assert against.text == first_table()[1]["name"] and against.get_attribute("href").endswith(f"/{against.text}")
    logs = records[0].find_elements(By.TAG_NAME, "details")
    seeds = [log for log in logs if log.text.startswith("Log of seed")]
    assert not seeds[0].find_element(By.TAG_NAME, "pre").is_displayed()
    seeds[0].find_element(By.TAG_NAME, "summary").click()
    record = next(path for path in find_records() if path.name == link.text)
    last = load_record(record).runs[0].last
    assert f"val_loss:{last.loss:.5f} train_time:{last.time_s:.3f}s" in seeds[0].find_element(By.TAG_NAME, "pre").text


def test_the_page_fits_a_phone_and_asks_for_nothing_else(opened: WebDriver, page: Path) -> None:
    opened.set_window_size(390, 844)
    width, of_page = (opened.execute_script(f"return {what}") for what in
                      ("innerWidth", "document.documentElement.scrollWidth"))  # fmt: skip
    assert of_page <= width <= 500
    assert len(opened.find_elements(By.CSS_SELECTOR, "figure svg")) >= 2
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert opened.get_log("browser") == []
    for asks in ('src="', "@import", "url(http", "fetch("):
        assert asks not in page.read_text(encoding="utf-8")
