"""The HTML report: one file with everything inside, no script, no link to anywhere."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncmethods._core import InputError, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Heading:
    """A heading between the sections."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; an empty line starts the next."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; numbers stand to the right, floats with four digits, None as a dash."""

    columns: Sequence[str]
    rows: Iterable[Sequence[Any]]
    caption: str = ""


@dataclass(frozen=True)
class Image:
    """A figure; the caption also describes it to those who cannot see it."""

    figure: Figure
    caption: str


@dataclass(frozen=True)
class Details:
    """Folded text, or a folded table of (nested) settings."""

    title: str
    content: str | Mapping[str, Any]


Section = Heading | Text | Table | Image | Details

CSS = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --soft: #666; --line: #ddd;
  --band: #f6f6f6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --soft: #a5a5a5; --line: #3a3d42; --band: #202328; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
p { max-width: 42rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { padding: .3rem .7rem; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { background: var(--band); } .n { text-align: right; }
figure { display: inline-block; vertical-align: top; max-width: 100%; width: 450px;
  margin: 0 1rem 1.5rem 0; }
img { max-width: 100%; height: auto; display: block; background: #fff; padding: 4px;
  border-radius: 4px; }
figcaption { color: var(--soft); font-size: .9rem; }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; padding: .7rem; background: var(--band); font-size: .85rem; }
"""


def html_report(path: str | os.PathLike[str], *, title: str, sections: Iterable[Section]) -> Path:
    """Write one self-contained HTML page: figures, tables and settings of a run, readable anywhere.

    The same sections give the same bytes: the page holds no clock of its own.

    Args:
        path: of the file; replaced as a whole.
        title: of the page.
        sections: in reading order.

    Raises:
        InputError: a section of an unknown kind, or the file cannot be written.
    """
    body = "\n".join(_html(section) for section in sections)
    return write_text(
        path,
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n",
    )


def _html(section: Section) -> str:
    match section:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Text(text):
            return "\n".join(f"<p>{escape(part.strip())}</p>" for part in text.split("\n\n"))
        case Table(columns, rows, caption):
            return _table(columns, rows, caption)
        case Image(figure, caption):
            return _image(figure, caption)
        case Details(title, content):
            inside = (
                f"<pre>{escape(content)}</pre>"
                if isinstance(content, str)
                else _table(["setting", "value"], _flat(content), "")
            )
            return f"<details><summary>{escape(title)}</summary>\n{inside}</details>"
    raise InputError(
        f"A section is a Heading, Text, Table, Image or Details, got {type(section).__name__}."
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str) -> str:
    data = [list(row) for row in rows]
    if any(len(row) != len(columns) for row in data):
        raise InputError(f"Every row of the table must have {len(columns)} cells: {columns}.")
    right = [bool(data) and all(_numeric(row[i]) for row in data) for i in range(len(columns))]
    align = [' class="n"' if r else "" for r in right]
    head = "".join(f"<th{a}>{escape(c)}</th>" for a, c in zip(align, columns, strict=True))
    lines = (
        "<tr>"
        + "".join(f"<td{a}>{_cell(v)}</td>" for a, v in zip(align, row, strict=True))
        + "</tr>"
        for row in data
    )
    return (
        '<div class="scroll"><table>\n'
        + (f"<caption>{escape(caption)}</caption>\n" if caption else "")
        + f"<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _numeric(value: Any) -> bool:
    """Whether a cell is a number, or text that starts as one ("71.2 ± 0.4"), or empty."""
    if value is None or isinstance(value, int | float):
        return not isinstance(value, bool)
    return str(value)[:1].isdigit() or str(value)[:2].strip("+-−–.")[:1].isdigit() or value == "–"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def _image(figure: Figure, caption: str) -> str:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=200)
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    data = base64.b64encode(png.getvalue()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}" '
        f'width="{width}" height="{height}">\n'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value)."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows
