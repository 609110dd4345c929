"""The page of a scan: right numbers, right places, nothing hidden when something is missing."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest

from aneurysm.data.labels import LABEL_COLUMNS, LOCATIONS
from aneurysm.data.scan import Grid
from aneurysm.report.scan_page import ScanLine, ScanReport, write_overview_page, write_scan_page


@pytest.fixture
def report(volume, grid, chain, candidate_table) -> ScanReport:
    places = np.stack([grid.centre_mm, chain.position[3], chain.position[20]])
    probabilities = np.linspace(0.01, 0.14, 14)
    probabilities[5], probabilities[13] = 0.66, 0.81
    source = Grid((50, 40, 24), grid.affine[:, [2, 1, 0, 3]])  # stored with the axes the other way round
    return ScanReport(
        "1.2.3",
        "patient-1",
        "MRA",
        volume,
        grid,
        source,
        probabilities,
        candidate_table("1.2.3", places, np.array([0.2, 0.9, 0.4])),
        volume > 10,
        chain,
        np.linspace(0, 1, 24),
        62.0,
        "F",
        ("dropped <2> slices",),
        "bundle 7",
        {"vessel": 2.0},
    )


def test_numbers_and_places(report, tmp_path, chain):
    page = write_scan_page(tmp_path / "scan.html", report).read_text()
    for name in LABEL_COLUMNS:
        assert name in page
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "Probability of an aneurysm 0.81" in text
    assert f"Most likely location {LOCATIONS[5]} p = 0.66" in text
    x, y, z = chain.position[3]
    position = ", ".join(f"{value:.1f}".replace("-", "−") for value in (x, y, z))
    assert f"1 0.90 {LOCATIONS[5]} {position} 25, 20, 3 65 0.80 −1.50 – – – 0.50" in text
    assert "dropped &lt;2&gt; slices" in page and "62 years" in page and "bundle 7" in page
    assert page.count("<img") == 3


def test_the_page_stands_alone(report, tmp_path):
    page = write_scan_page(tmp_path / "scan.html", report).read_text()
    assert set(re.findall(r'(?:src|href)="([^"]{0,20})', page)) == {"data:image/png;base6"}
    assert "http:" not in page and "https:" not in page and "<script" not in page
    assert "Not a medical device" in page
    assert [path.name for path in tmp_path.iterdir()] == ["scan.html"]


def test_folds_of_a_candidate_are_averaged(report, tmp_path):
    again = report.candidates.assign(fold=1, p=report.candidates["p"] / 2)
    both = dataclasses.replace(report, candidates=pd.concat([report.candidates, again]))
    assert both.ranked["p"].tolist() == pytest.approx([0.675, 0.3, 0.15])


def test_no_candidate_no_graph_no_vessels(report, tmp_path):
    bare = dataclasses.replace(
        report, candidates=report.candidates.iloc[:0], graph=None, node_score=None, vessel=None, age=None
    )
    page = write_scan_page(tmp_path / "scan.html", bare).read_text()
    assert "No candidate was found" in page and page.count("<img") == 1 and "unknown" in page


def test_incomplete_input_is_refused_with_the_series(report):
    with pytest.raises(ValueError, match=r"1\.2\.3: the page needs 14"):
        dataclasses.replace(report, probabilities=np.zeros(13))
    with pytest.raises(ValueError, match="come together"):
        dataclasses.replace(report, node_score=None)
    with pytest.raises(ValueError, match="on a grid"):
        dataclasses.replace(report, vessel=np.zeros((2, 2, 2)))


def test_overview_ranks_scans_and_names_failures(tmp_path):
    low, high = np.full(14, 0.1), np.full(14, 0.2)
    high[13] = 0.9
    lines = [
        ScanLine("low", "p", "CTA", low, 2, 0.1, "low.html"),
        ScanLine("bad", error="no slice has a position"),
        ScanLine("high", "p", "MRA", high, 3, 0.8, "high.html"),
    ]
    page = write_overview_page(tmp_path / "index.html", lines).read_text()
    assert page.index("high.html") < page.index("low.html")
    assert "no slice has a position" in page and "2 scans read, 1 could not be read" in page
