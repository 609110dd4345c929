"""The page in a real browser: it draws, sorts, filters, brushes and asks nothing from any network."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from synthetic_runs import EFFECT, EXPERT, changed, sweep, write_run

from aneurysm.compare.__main__ import main

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
CHROMIUM = next(
    (p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None
)
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine (apt-get install chromium)", allow_module_level=True)
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The page of forty runs, one failed, one half done, one with a hostile setting, one damaged."""
    folder = tmp_path_factory.mktemp("outputs") / "dims"
    sweep(folder, EFFECT)
    failed = write_run(folder, "expert", changed(EXPERT, oscillator__oscillator_dim=32), 0)
    (failed / "failed.json").write_text(json.dumps({"error": "ValueError: <b>no</b> candidates </script>"}))
    write_run(
        folder, "expert", changed(EXPERT, fusion={"_target_": "x.</script><img src=x onerror=alert(1)>"}), 0
    )
    (write_run(folder, "expert", EXPERT, 1, seed=7) / "run.json").write_text('{"key"')
    assert main([str(folder)]) == 0
    return folder / "compare" / "compare.html"


@pytest.fixture
def page(browser, written):
    """A fresh page; afterwards nothing may have been asked for or complained about."""
    requests, complaints = [], []
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(written.as_uri())
    yield page
    page.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("blob:")] == [written.as_uri()]


def column(page, name: str) -> list[str]:
    """Texts of a column, top to bottom."""
    heads = page.locator("#variants thead tr:first-child th").evaluate_all(
        "ths => ths.map(th => th.dataset.column)"
    )
    cells = page.locator(f"#variants tbody td:nth-child({heads.index(name) + 1})")
    return [text.removeprefix("★ ") for text in cells.all_inner_texts()]


DIM = "key:oscillator.oscillator_dim"


def test_rows_are_sorted_best_first_and_by_any_head(page):
    means = [float(text) for text in column(page, "mean") if text != "–"]
    assert means == sorted(means, reverse=True)
    assert len(means) == 5
    assert column(page, "mean")[5:] == ["–", "–"]  # unfinished ones last
    head = page.locator(f'th[data-column="{DIM}"]')
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    # Numbers by value: 16 comes after 8; without one last.
    assert [int(text) for text in column(page, DIM)] == [2, 4, 4, 6, 8, 16, 32]
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert [int(text) for text in column(page, DIM)] == [32, 16, 8, 6, 4, 4, 2]


def test_verdicts_are_those_of_the_table_on_disk(page, written):
    with (written.parent / "variants.csv").open(encoding="utf-8", newline="") as file:
        stated = {f"{float(r['mean']):.3f}": r["verdict"] for r in csv.DictReader(file) if r["mean"]}
    shown = dict(zip(column(page, "mean"), column(page, "verdict"), strict=True))
    assert {mean: verdict.lstrip("▲▼≈… ") for mean, verdict in shown.items() if mean != "–"} == stated
    assert "reference" in stated.values()
    assert "worse" in stated.values()


@pytest.mark.parametrize(
    ("name", "text", "dims"),
    [
        (DIM, ">6", {8, 16, 32}),
        (DIM, "<=4", {2, 4}),
        (DIM, "4..8", {4, 6, 8}),
        (DIM, "!4", {2, 6, 8, 16, 32}),
        (DIM, "2, 16", {2, 16}),
        (DIM, "6", {6}),
        ("mean", ">0.88", {8, 16}),
        ("verdict", "worse", {2, 4, 6}),
        ("key:fusion", "script", {4}),
    ],
)
def test_filters(page, name, text, dims):
    place = (
        page.locator("#variants thead tr:first-child th")
        .evaluate_all("ths => ths.map(th => th.dataset.column)")
        .index(name)
    )
    page.locator("#variants .filters input").nth(place).fill(text)
    assert {int(dim) for dim in column(page, DIM)} == dims
    shown = page.locator("#variants tbody tr").count()
    assert page.locator("#shown").inner_text() == f"{shown} of 7 variants shown"
    assert page.locator("#parallel [data-line]:not(.off)").count() == shown
    page.get_by_role("button", name="Clear filters").click()
    assert page.locator("#variants tbody tr").count() == 7
    assert page.locator("#variants .filters input").nth(place).input_value() == ""


def test_a_filter_that_cannot_be_read_is_marked_and_hides_nothing(page):
    field = page.get_by_label("Filter candidate_auc")
    field.fill("> much")
    assert field.get_attribute("aria-invalid") == "true"
    assert page.locator("#variants tbody tr").count() == 7
    field.fill("=0.9..")
    field.fill("> 5")
    assert field.get_attribute("aria-invalid") == "false"
    assert page.get_by_text("No variant passes the filters.").is_visible()


def test_hover_shows_all_settings_and_lights_every_view(page):
    page.locator("#variants tbody tr").first.hover()
    tip = page.locator("#tip")
    assert tip.is_visible()
    words = tip.inner_text()
    best = column(page, DIM)[0]
    for expected in (
        "oscillator_dim",
        best,
        "candidate_auc",
        column(page, "mean")[0],
        "8 of 8 finished",
        "peak memory",
    ):
        assert expected in words
    index = page.locator("#variants tbody tr").first.get_attribute("data-index")
    assert "hot" in page.locator(f'[data-line="{index}"] .line').get_attribute("class")
    assert "hot" in page.locator(f'#scatter .dot[data-index="{index}"]').get_attribute("class")
    page.mouse.move(5, 5)
    assert not tip.is_visible()
    assert page.locator(".hot").count() == 0
    dot = page.locator("#scatter .dot").first
    dot.hover()
    assert tip.is_visible()
    row = page.locator(f'#variants tr[data-index="{dot.get_attribute("data-index")}"]')
    assert "hot" in row.get_attribute("class")


def test_brushing_an_axis_filters_every_view(page):
    area = page.locator('[data-brush="figure:candidate_auc"]')
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    x = box["x"] + box["width"] / 2
    page.mouse.move(x, box["y"] + 2)  # the best quarter of the axis
    page.mouse.down()
    page.mouse.move(x, box["y"] + box["height"] * 0.15, steps=4)
    page.mouse.move(x, box["y"] + box["height"] * 0.25, steps=4)
    page.mouse.up()
    assert {int(dim) for dim in column(page, DIM)} == {8, 16}
    assert page.locator("#parallel [data-line]:not(.off)").count() == 2
    assert page.locator("#scatter .dot").count() == 2
    page.mouse.click(x, box["y"] + box["height"] * 0.8)  # a click lets go
    assert page.locator("#variants tbody tr").count() == 7


def test_marks_keyboard_and_columns(page):
    first = page.locator("#variants tbody tr").first
    first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    marked = page.locator('#variants tr[aria-selected="true"]')
    assert marked.count() == 1
    index = marked.get_attribute("data-index")
    assert page.locator("#parallel .line.mark").count() == 1
    assert "mark" in page.locator(f'[data-line="{index}"] .line').get_attribute("class")
    page.keyboard.press("Escape")
    assert page.locator(".mark").count() == 0
    page.get_by_text("Columns", exact=True).click()
    page.get_by_label("± sd", exact=True).uncheck()
    assert page.locator('th[data-column="sd"]').count() == 0
    page.get_by_label("p corrected", exact=True).check()
    assert page.locator('th[data-column="p"]').count() == 1


def test_another_figure_axes_and_theme(page):
    page.get_by_label("Figure").select_option("seconds")
    times = [float(text) for text in column(page, "mean") if text != "–"]
    assert times == sorted(times)  # lower is better
    assert page.locator("#cards .pair-chip").first.inner_text().startswith("oscillator_dim 2")
    page.get_by_label("Figure").select_option("candidate_auc")
    before = page.locator("#scatter .dot").first.get_attribute("cx")
    page.get_by_label("across").select_option("cost:seconds_mean")
    assert page.locator("#scatter .dot").first.get_attribute("cx") != before
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.get_by_role("button", name="Light or dark page").click()
    assert page.evaluate(paper) != light


def test_bars_show_the_difference_to_the_best(page):
    rows = page.locator("#bars .bar-row")
    assert rows.count() == 4  # of one change each
    texts = rows.nth(0).locator("text").all_text_contents()
    assert "oscillator_dim" in texts[0]
    assert "→" in texts[0]
    worst = rows.nth(3).locator("text").all_text_contents()
    assert worst[0].endswith("→ 2")
    assert float(worst[1].replace("−", "-")) == pytest.approx(-0.14, abs=0.02)


def test_failed_unfinished_and_damaged_runs_are_listed(page):
    page.get_by_text("All 43 runs").click()
    listed = page.locator("#runs tbody tr")
    api.expect(listed).to_have_count(43)  # built when the section opens, an event that comes after the click
    assert listed.first.get_attribute("data-state") == "failed"
    assert "ValueError: <b>no</b> candidates </script>" in listed.first.inner_text()  # as text
    assert page.locator('#runs tr[data-state="damaged"]').count() == 1
    assert page.locator('#runs tr[data-state="running"]').count() == 1
    assert page.locator("#runs b").count() == 0
    assert page.locator("img").count() == 0


def test_csv_of_what_is_shown(page, tmp_path):
    page.get_by_label("Filter oscillator_dim").fill(">6")
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV of what is shown").click()
    download.value.save_as(tmp_path / "shown.csv")
    with (tmp_path / "shown.csv").open(encoding="utf-8-sig", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["oscillator_dim"] for row in table] == column(page, DIM)
    assert {row["verdict"] for row in table} <= {"reference", "inside the noise", "too few repeats"}


def test_a_thousand_runs_on_one_page(browser, tmp_path):
    for lr in range(25):
        sweep(
            tmp_path,
            {2: 0.0, 4: 0.01, 8: 0.02, 16: 0.03, 32: 0.04},
            base=changed(EXPERT, expert__lr=0.001 * (lr + 1)),
        )
    assert main([str(tmp_path), "--out", str(tmp_path / "page")]) == 0
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    page.goto((tmp_path / "page" / "compare.html").as_uri())
    api.expect(page.locator("#variants tbody tr")).to_have_count(125)
    page.get_by_label("Filter oscillator_dim").fill(">4")
    api.expect(page.locator("#variants tbody tr")).to_have_count(75)
    page.close()
