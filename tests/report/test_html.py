"""Pages stand alone and trust nothing that is put into them."""

import base64

import jinja2
import numpy as np
import pytest

from aneurysm.evaluation.intervals import Interval
from aneurysm.report.html import Picture, duration, interval, number, percent, write_page
from aneurysm.report.style import new_figure


def test_numbers_for_reading():
    assert number(0.12345) == "0.123" and number(-1.5, 1) == "−1.5"
    assert number(None) == number(np.nan) == interval(None) == interval(Interval(np.nan, np.nan, 3)) == "–"
    assert interval(Interval(0.1, 0.25, 9), 2) == "0.10 to 0.25"
    assert percent(1.7) == "100.0%" and percent(np.nan) == "0%"
    assert [duration(s) for s in (3.21, 61, 7325)] == ["3.2 s", "1 min 01 s", "2 h 02 min"]


def test_a_picture_is_the_same_bytes_every_time():
    def made() -> Picture:
        figure = new_figure(2, 1)
        figure.subplots().plot([1, 2])
        return Picture("p", figure)

    assert made().png == made().png
    assert base64.b64decode(made().source.removeprefix("data:image/png;base64,")) == made().png
    assert made().width == 192


def test_a_missing_value_is_an_error_not_a_blank(tmp_path):
    with pytest.raises(jinja2.UndefinedError):
        write_page(tmp_path / "x.html", "overview", {"title": "t"})
    assert list(tmp_path.iterdir()) == []
