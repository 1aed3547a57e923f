"""The tables of an evaluation as plain text, as Markdown and as LaTeX."""

import re
from collections.abc import Sequence

from ud2m.evaluation.table import Column, markdown_line, meanings, table_columns
from ud2m.reports.tables import Cell, Rows, Table, caption, difference_table, notes, table_of, verdicts, visible

LATEX = {"σ_y": r"$\sigma_y$", "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
LATEX |= {c: f"\\{c}" for c in "&%$#_{}"} | {"é": r"\'e", "–": "--", "†": r"$\dagger$"}


def format_table(rows: Rows, columns: Sequence[Column] | None = None) -> str:
    """Return the rows as an aligned plain-text table, by default with all columns; ``*`` marks the best of a column."""
    if not rows:
        return "(no results)"
    table = table_of(rows, table_columns(rows) if columns is None else columns)
    lines = [[column.heading for column in table.columns]]
    for cells in table.lines:
        # a blank keeps the decimal points of marked and unmarked values in line
        marks = ["*" if cell.bold else " " if c.best else "" for c, cell in zip(table.columns, cells, strict=True)]
        texts = [_printable(cell.text) for cell in cells]
        lines.append([text + mark for text, mark in zip(texts, marks, strict=True)])
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    sides = ["<" if table.kind(column) == "text" else ">" for column in table.columns]
    lines.insert(1, ["-" * width for width in widths])
    shown = ["  ".join(map("{:{}{}}".format, texts, sides, widths)).rstrip() for texts in lines]
    best = ["* best in its column"] if table.has_bold else []
    return "\n".join([*shown, "", *best, *meanings(table.columns), *map(_printable, verdicts(rows, table.columns))])


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def markdown(rows: Rows) -> str:
    """Return the rows as Markdown: the table, its notes, and the differences from a reference if there are any."""
    parts = [markdown_table(rows), "", *(f"- {note}" for note in notes(rows)), *markdown_differences(rows)]
    return "\n".join(parts) + "\n"


def markdown_table(rows: Rows) -> str:
    """Return the rows as a Markdown table, the best value of a column, operator and data set in bold."""
    return _markdown(table_of(rows, visible(rows)))


def markdown_differences(rows: Rows) -> list[str]:
    """Return the differences from the reference as a Markdown table with its caption; nothing where there are none."""
    table = difference_table(rows)
    return ["", caption(rows), "", _markdown(table)] if table else []


def _markdown(table: Table) -> str:
    lines = [markdown_line(column.heading for column in table.columns)]
    lines.append(markdown_line("---" if table.kind(column) == "text" else "---:" for column in table.columns))
    lines += [markdown_line(f"**{cell}**" if cell.bold else str(cell) for cell in cells) for cells in table.lines]
    return "\n".join(lines)


def latex(rows: Rows) -> str:
    """Return the rows as a LaTeX table (booktabs), intervals in small print, and one of the differences."""
    compared = difference_table(rows)
    lines = [r"% \usepackage{booktabs}", *_latex(table_of(rows, visible(rows)))]
    lines += [f"% {note}" for note in notes(rows)]
    if compared:
        lines += ["", f"% {caption(rows)}", *_latex(compared)]
    return "\n".join(lines) + "\n"


def _latex(table: Table) -> list[str]:
    sides = "".join("l" if table.kind(column) == "text" else "r" for column in table.columns)
    lines = [rf"\begin{{tabular}}{{{sides}}}", r"\toprule"]
    lines += [" & ".join(escape(column.heading) for column in table.columns) + r" \\", r"\midrule"]
    for index, cells in enumerate(table.lines):
        if index and table.settings[index] != table.settings[index - 1]:
            lines.append(r"\midrule")
        lines.append(" & ".join(map(_latex_cell, cells)) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _latex_cell(cell: Cell) -> str:
    text = rf"\textbf{{{escape(cell.text)}}}" if cell.bold else escape(cell.text)
    return f"{text} {{\\scriptsize {cell.interval}}}" if cell.interval else text


def escape(text: str) -> str:
    """Return plain text for LaTeX."""
    return re.sub("|".join(map(re.escape, LATEX)), lambda found: LATEX[found[0]], text)
