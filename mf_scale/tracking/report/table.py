"""Tables of the report pages as compact HTML: read without script, searched and sorted with it, cards on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDE = 2
"""Columns up to which a table stays a table on a phone; the rows of wider ones become cards."""


@dataclass(frozen=True)
class Column:
    """One column; numbers stand to the right."""

    name: str
    text: bool = False
    wide: bool = False
    """A text that gets a line of its own on a phone, and breaks wherever it must."""
    about: str = ""
    """What a pointer over its head shows."""


@dataclass(frozen=True)
class Cell:
    """A cell that is more than its text."""

    text: str
    small: str = ""
    """Stands below, quieter."""
    bar: float | None = None
    """0 to 1: a bar behind the text."""
    color: str = ""
    """#rrggbb: a dot before the text."""


@dataclass(frozen=True)
class Table:
    """Rows of texts under heads; the first cell of a row names it."""

    id: str
    """A plain word, one of its own in the page."""
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str]]
    tools: bool = False
    """Searched and sorted, by the page's script."""

    def __html__(self) -> str:
        """What a template puts into the page."""
        return table_html(self)


def table_html(table: Table) -> Markup:
    """The <table> with a style of its own that names the cells of its cards on a phone.

    Closing tags that HTML does not need are left out: of 10,000 rows they would be a third.
    """
    cards, places = len(table.columns) > WIDE, list(enumerate(table.columns, 1))[1:]
    texts = _rule(table, [i for i, column in places if column.text], "text-align:left")
    wide = [i for i, column in places if column.wide]
    names = "".join(
        f"#{table.id} td:nth-child({i})::before{{content:{_css_string(column.name)}}}" for i, column in places
    )
    heads = "".join(f"#{table.id} td:nth-child({i})::before{{white-space:nowrap}}" for i in wide)
    phone = f"{names}{heads}{_rule(table, wide, 'grid-column:1/-1')}" if cards else texts
    desk = f"{texts}{_rule(table, wide, 'min-width:10rem')}"
    style = (
        f"<style>{_rule(table, wide, 'overflow-wrap:anywhere')}"
        f"@media(min-width:761px){{{desk}}}@media(max-width:760px){{{phone}}}</style>"
    )
    head = "".join(f'<th scope="col"{_about(column)}>{escape(column.name)}' for column in table.columns)
    classes = " ".join(name for name, wanted in (("cards-rows", cards), ("tools", table.tools)) if wanted)
    body = "\n".join(_row(row) for row in table.rows)
    return Markup(
        f'{style}<table id="{table.id}" class="{classes}"><caption>{escape(table.caption)}</caption>\n'
        f"<thead><tr>{head}</thead>\n<tbody>\n{body}\n</tbody></table>"
    )


def number(value: float | None, digits: int = 1) -> str:
    """A number for a cell; "-" where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent, without the sign."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def count(value: float | None) -> str:
    """A whole number with narrow spaces between its thousands, at which no line breaks."""
    return "-" if value is None else f"{value:,}".replace(",", "\u202f")


def _row(row: Sequence[Cell | str]) -> str:
    first, *rest = row
    end = "</tr>" if rest and rest[-1] in ("", Cell("")) else ""  # with a line break in it the last cell is not empty
    return "<tr>" + _cell('<th scope="row"', first) + "".join(_cell("<td", cell) for cell in rest) + end


def _cell(tag: str, cell: Cell | str) -> str:
    if isinstance(cell, str):
        return f"{tag}>{escape(cell)}"
    bar = f' class="bar" style="--v:{100 * min(max(cell.bar, 0.0), 1.0):.1f}%"' if cell.bar is not None else ""
    dot = f'<i class="dot" style="background:{escape(cell.color)}"></i>' if cell.color else ""
    small = f" <small>{escape(cell.small)}</small>" if cell.small else ""
    said = f"<span>{escape(cell.text)}{small}</span>" if cell.text or small else ""  # none: a phone leaves it out
    return f"{tag}{bar}>{dot}{said}"


def _rule(table: Table, columns: Sequence[int], rule: str) -> str:
    chosen = ",".join(f"#{table.id} :is(td,th):nth-child({i})" for i in columns)
    return f"{chosen}{{{rule}}}" if columns else ""


def _about(column: Column) -> str:
    return f' title="{escape(column.about)}"' if column.about else ""


def _css_string(text: str) -> str:
    """A string of CSS that nothing in `text` can end."""
    return '"' + "".join(c if c.isascii() and c.isalnum() else f"\\{ord(c):06x}" for c in text) + '"'
