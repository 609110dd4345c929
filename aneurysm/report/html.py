"""One page, one file: HTML with its style and pictures inside, that asks nothing from any network."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure

from aneurysm.data.files import replacing
from aneurysm.evaluation.intervals import Interval
from aneurysm.report.style import png


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure with the words that go with it."""

    title: str
    figure: Figure
    caption: str = ""
    group: str = ""  # heading under which the page shows it; a page may use it or not

    @cached_property
    def png(self) -> bytes:
        """The rendered figure."""
        return png(self.figure)

    @property
    def width(self) -> int:
        """CSS pixels at which words in all figures have the same size."""
        return round(96 * float(self.figure.get_size_inches()[0]))

    @property
    def source(self) -> str:
        """The rendered figure as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def write_page(path: Path, template: str, content: Mapping[str, object]) -> Path:
    """Fill a template of this package and write it as a self-contained page.

    Args:
        path: of the page; written whole or not at all.
        template: name in `report/templates`, without its ending.
        content: values the template names; every value is escaped.

    Raises:
        jinja2.UndefinedError: the template names a value that was not given.
    """
    text = _templates().get_template(f"{template}.html.j2").render(content)
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("aneurysm.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, interval=interval, percent=percent, duration=duration)
    return environment


def number(value: float | None, digits: int = 3) -> str:
    """A figure for reading; a dash when there is none."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def interval(value: Interval | None, digits: int = 3) -> str:
    """Bounds for reading; a dash when there are none."""
    if value is None or not np.isfinite(value.low):
        return "–"
    return f"{number(value.low, digits)} to {number(value.high, digits)}"


def percent(value: float) -> str:
    """A share of 1 as a CSS width."""
    return f"{100 * min(max(float(value), 0.0), 1.0):.1f}%" if np.isfinite(value) else "0%"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
