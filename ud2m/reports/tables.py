"""The tables of reports, as plain data: which columns are shown, their cells, and what belongs beside the numbers."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ud2m.evaluation.differences import DIFFERENCE, REFERENCE, difference_rows, excludes_zero
from ud2m.evaluation.table import (
    BOUNDS,
    MISSING,
    SETTING,
    Column,
    best_cells,
    by_setting,
    format_value,
    meanings,
    setting_of,
    table_columns,
)

HIDDEN = (*BOUNDS, "_nominal", "_backend", DIFFERENCE)
"""Ends of the names of numbers that have no column of their own."""
CONSTANT = (*SETTING, "images", "samples", "seed")
"""Keys that are told below a table where all its rows agree on them."""

FOUND = "setting"
"""Key of the words for the best setting of a method."""

_LPIPS = "lpips_backend"

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One value of a table.

    Attributes:
        text: as shown.
        interval: of the value, e.g. ``[30.90, 31.52]``; empty where there is none.
        bold: whether the value is marked.
        value: to sort by; empty where it is missing.
    """

    text: str
    interval: str = ""
    bold: bool = False
    value: Any = ""

    def __str__(self) -> str:
        return f"{self.text} {self.interval}".rstrip()


@dataclass(frozen=True)
class Table:
    """What a table shows.

    Attributes:
        columns: from left to right.
        texts: keys of the columns that hold words.
        lines: cells of each row.
        settings: what each row was measured on.
    """

    columns: Sequence[Column]
    texts: Collection[str]
    lines: Sequence[Sequence[Cell]]
    settings: Sequence[tuple[Any, ...]]

    @property
    def has_bold(self) -> bool:
        """Whether a cell is marked."""
        return any(cell.bold for line in self.lines for cell in line)

    def kind(self, column: Column) -> str:
        """Return ``text`` or ``number``."""
        return "text" if column.key in self.texts else "number"


def table_of(rows: Rows, columns: Sequence[Column], bold: Collection[tuple[int, str]] | None = None) -> Table:
    """Return rows of ``metrics.json`` as a table.

    Args:
        rows: mappings from names to values.
        columns: the shown ones.
        bold: index of the row and key of the column of marked cells; by default the best of each column.
    """
    bold = best_cells(rows, columns) if bold is None else bold
    return Table(
        columns,
        {column.key for column in columns if any(isinstance(row.get(column.key), str) for row in rows)},
        [[cell_of(column, row, (index, column.key) in bold) for column in columns] for index, row in enumerate(rows)],
        [setting_of(row) for row in rows],
    )


def cell_of(column: Column, row: Mapping[str, Any], bold: bool = False) -> Cell:
    """Return the cell of a column in a row."""
    value = row.get(column.key)
    text = format_value(column, value)
    bounds = [row.get(column.key + end) for end in BOUNDS]
    interval = "" if None in bounds else f"[{', '.join(format_value(column, bound) for bound in bounds)}]"
    return Cell(text, interval, bold, "" if text == MISSING else value)


def difference_table(rows: Rows) -> Table | None:
    """Return the table of differences from the reference if there is one; bold: the interval does not contain 0.

    Numbers have their sign, and one decimal more than in the table of the rows themselves.
    """
    found = difference_rows(rows)
    if not found:
        return None
    columns = [
        column if column.key in ("method", "nfe", *SETTING) else replace(column, format=_finer(column.format))
        for column in visible(found)
    ]
    sure = {(i, column.key) for i, row in enumerate(found) for column in columns if excludes_zero(row, column.key)}
    return table_of(found, columns, sure)


def _finer(text: str) -> str:
    """Return ``.2f`` as ``+.3f``; other formats get a sign alone."""
    return "+" + re.sub(r"[.](\d)f", lambda found: f".{int(found[1]) + 1}f", text)


def caption(rows: Rows) -> str:
    """Return what a table of differences shows."""
    return (
        f"Differences from {rows[0][REFERENCE]}, paired by image; in brackets: 95 % bootstrap interval over images; "
        "bold: it does not contain 0."
    )


def visible(rows: Rows) -> list[Column]:
    """Return the columns of a table: not the bounds of intervals, nor what is the same number everywhere."""
    left_out = {key for row in rows for key in row if key.endswith(HIDDEN) or key == REFERENCE}.union(_constants(rows))
    named = [{k: v for k, v in row.items() if k not in left_out} | _lpips_network(row) for row in rows]
    columns = [column for column in table_columns(named) if column.key != _LPIPS]
    leading = {key: k for k, key in enumerate((*SETTING, "method"))}
    return sorted(columns, key=lambda column: leading.get(column.key, len(leading)))


def page_columns(columns: Sequence[Column]) -> list[Column]:
    """Return the columns that pages show: not the settings, which would push the numbers out of a small screen."""
    return [column for column in columns if column.key != FOUND]


def found_settings(rows: Rows) -> list[str]:
    """Return what belongs below the table of a page: the settings that were found for its methods."""
    of_all = [key for key in SETTING if len({row.get(key) for row in rows}) > 1]
    return [
        f"{', '.join(str(row[key]) for key in ('method', *of_all) if row.get(key) is not None)}: {row[FOUND]}"
        for row in rows
        if row.get(FOUND)
    ]


def verdicts(rows: Rows, columns: Sequence[Column]) -> list[str]:
    """Return who is best in what, a sentence for each data set and operator that several methods were scored on.

    The one that wins most comes first; those that look equal win together.
    """
    best = best_cells(rows, columns)
    differing = [key for key in SETTING if len({row.get(key) for row in rows}) > 1]
    found = []
    for indices in by_setting(rows).values():
        won = {i: [c.heading.split(" [")[0].split(" (")[0] for c in columns if (i, c.key) in best] for i in indices}
        parts = [
            f"{rows[i].get('method', '')} in {', '.join(names)}"
            for i, names in sorted(won.items(), key=lambda item: -len(item[1]))
            if names
        ]
        place = ", ".join(
            f"σ_y {rows[indices[0]][key]:g}" if key == "sigma_y" else str(rows[indices[0]].get(key))
            for key in differing
        )
        if parts:
            found.append(f"best{place and f' ({place})'}: {'; '.join(parts)}")
    return found


def _lpips_network(row: Mapping[str, Any]) -> dict[str, str]:
    """Return ``alex`` of ``alex, lpips 0.1.4``: the network that headings of LPIPS name where all rows agree on it."""
    return {_LPIPS: row[_LPIPS].partition(",")[0]} if _LPIPS in row else {}


def notes(rows: Rows) -> list[str]:
    """Return what belongs beside the numbers: who is best, meanings, and what ``circumstances`` returns."""
    columns = visible(rows)
    return [*verdicts(rows, columns), *meanings(columns), *circumstances(rows)]


def circumstances(rows: Rows) -> list[str]:
    """Return the networks of the metrics, the right values of what has one, and the size of the evaluation."""
    found = [f"{name}: network {value}" for name, value in _said(rows, "_backend")]
    found += [f"{name}: {value:.3g} is right" for name, value in _said(rows, "_nominal")]
    sizes = ", ".join(f"{key} {value}" for key, value in _constants(rows).items() if value is not None)
    return [*found, *([sizes] if sizes else []), "in brackets: 95 % bootstrap interval over images"]


def _said(rows: Rows, end: str) -> list[tuple[str, Any]]:
    """Return the values of all keys with this end, under the rest of the key."""
    return sorted({(key.removesuffix(end), v) for row in rows for key, v in row.items() if key.endswith(end)})


def _constants(rows: Rows) -> dict[str, Any]:
    """Return what all rows agree on, of ``CONSTANT``."""
    return {key: rows[0].get(key) for key in CONSTANT if len({row.get(key) for row in rows}) == 1}
