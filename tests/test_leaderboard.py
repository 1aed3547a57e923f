"""Tables and the report of an evaluation; its script is run in headless Chromium where there is one."""

import re
import xml.etree.ElementTree

import pytest
import torch
from browser import probed
from html_pages import Page

from ud2m.evaluation.cells import Result
from ud2m.evaluation.differences import with_differences
from ud2m.evaluation.scores import with_interval
from ud2m.reports.board import Board, board_page
from ud2m.reports.plots import reliability
from ud2m.reports.tables import notes, visible
from ud2m.reports.text_tables import escape, latex, markdown


def row(method, operator="blur", nfe=9, **numbers):
    common = {"data": "photos", "size": "8x8", "operator": operator, "sigma_y": 0.01, "seed": 0, "images": 5}
    return {"method": method, "nfe": nfe} | common | numbers


ROWS = [
    row("A^dagger y", nfe=0, psnr_mean=10.0, psnr_mean_low=9.0, psnr_mean_high=11.0, seconds_per_image=0.001),
    row("UD2M", psnr_mean=31.234, psnr_mean_low=30.1, psnr_mean_high=32.3, lpips=0.05,
        lpips_backend="alex, lpips 0.1.4", coverage_90=0.88, coverage_90_nominal=0.9, seconds_per_image=0.5),
    row("LATINO <b> & co", nfe=100, psnr_mean=30.5, psnr_mean_low=30.0, psnr_mean_high=31.0, lpips=0.04,
        seconds_per_image=5.0, setting="tau_first = 0.1"),
    row("UD2M", operator="holes_2", psnr_mean=25.0, seconds_per_image=0.5),
]  # fmt: skip


OPERATORS = {"blur": "GaussianBlur(width=1.6)", "holes_2": "Inpainting(keep=0.7)"}


def board(rows=ROWS):
    """A board whose second image is the more uncertain one; the first method has no deviations."""

    def result(k):
        generator = torch.Generator().manual_seed(k)
        kinds = {"x0": (3, 8, 8), "y": (3, 4, 4), "sample": (3, 8, 8), "mean": (3, 8, 8)}
        pictures = {n: {kind: torch.rand(s, generator=generator) for kind, s in kinds.items()} for n in (0, 3)}
        for n in pictures if k else ():
            pictures[n]["std"] = torch.full((3, 8, 8), 0.01 * (n + k))
        return Result(rows[k], {"calibration": [[0.9, 0.8], [0.5, 0.4]]}, pictures)

    results = [result(k) for k in range(len(rows))]
    return Board("An evaluation <1>", rows, results, {"seed": 0}, {"photos": {0: "cat", 3: "dog & cat"}}, OPERATORS)


def test_constants_and_bounds_are_no_columns():
    keys = [column.key for column in visible(ROWS)]
    assert keys[:4] == ["operator", "method", "nfe", "psnr_mean"]
    assert not {"seed", "images", "data", "size", "sigma_y", "psnr_mean_low", "lpips_backend"} & set(keys)
    found = "\n".join(notes(ROWS))
    for words in ("data photos", "sigma_y 0.01", "images 5", "seed 0", "lpips: network alex, lpips 0.1.4"):
        assert words in found
    assert "coverage_90: 0.9 is right" in found


def test_markdown_shows_intervals_and_winners():
    lines = markdown(ROWS).splitlines()
    assert lines[0].startswith("| Operator | Method | NFE | PSNR of mean [dB] | LPIPS (alex) |")
    assert "| **31.23 [30.10, 32.30]** |" in lines[3]
    assert "| 30.50 [30.00, 31.00] | **0.040** |" in lines[4]
    assert "| 25.00 |" in lines[5]  # alone in its group: nothing to win
    assert len({line.count(" | ") for line in lines[:6]}) == 1


def compared():
    """Rows of two methods on two operators; the better one wins on every image of the first by about 1 dB."""
    generator = torch.Generator().manual_seed(0)
    rows, results = [], []
    for operator, gain in (("blur", 1.0), ("holes", 0.0)):
        base = 30 + 5 * torch.randn(40, generator=generator)
        for method, values in (("plain", base), ("new", base + gain + 0.1 * torch.randn(40, generator=generator))):
            numbers = with_interval("psnr", values.double())
            rows.append(row(method, operator, seconds_per_image=0.1, **numbers))
            results.append(Result(rows[-1], {"psnr_values": values.tolist()}, {}))
    return with_differences(rows, results, "plain"), results


def test_differences_have_a_table_of_their_own():
    rows, results = compared()
    text = markdown(rows)
    assert "reference" not in text.splitlines()[0]
    caption, _, head, _, first, second = text.splitlines()[-6:]
    assert caption.startswith("Differences from plain, paired by image")
    assert head == "| Operator | Method | NFE | PSNR [dB] |"
    assert re.fullmatch(r"\| blur \| new \| 9 \| \*\*\+(0\.9|1\.0)\d\d \[\+0\.9\d\d, \+1\.\d{3}\]\*\* \|", first)
    assert re.fullmatch(r"\| holes \| new \| 9 \| [+-]0\.0\d\d \[-0\.0\d\d, \+0\.0\d\d\] \|", second)
    assert latex(rows).count(r"\begin{tabular}") == latex(rows).count(r"\end{tabular}") == 2
    page = Page(board_page(Board("x", rows, results, {}, {}, {})))
    assert [line[1] for line in page.rows].count("new") == 4
    assert "Differences from plain" in page.text
    assert "Differences" not in markdown(ROWS)


def test_latex_is_escaped_and_balanced():
    text = latex(ROWS)
    assert r"holes\_2" in text
    assert r"LATINO <b> \& co" in text
    assert r"A\textasciicircum{}dagger y" in text
    assert r"\textbf{31.23} {\scriptsize [30.10, 32.30]}" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    columns = re.search(r"\\begin{tabular}{(\w+)}", text)[1]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {len(columns) - 1}
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert text.count(r"\midrule") == 2  # under the heading, and between the operators
    assert escape("σ_y 5 %") == r"$\sigma_y$ 5 \%"


def test_the_page_is_whole_escaped_and_loads_nothing():
    text = board_page(board())
    assert not re.search(r"https?:|//cdn|@import|url\(", text)
    assert set(re.findall(r"<script([^>]*)>", text)) == {""}
    assert "default-src 'none'" in text
    page = Page(text)
    assert "GaussianBlur(width=1.6)" in page.text
    assert "LATINO <b> & co" in page.text
    assert "dog & cat" in page.text
    assert page.rows[1][1] == "A^dagger y"
    assert "tau_first" not in str(page.rows)
    assert "LATINO <b> & co, blur: tau_first = 0.1" in page.text  # below the table
    # per image: reference, observation, per method a sample and a mean, and where it is known a deviation with its bar
    assert len(page.images()) == 2 * (2 + 2 + 4 + 4) + 2 * (2 + 4)
    names = [attributes["alt"].split(":")[0] for attributes, _ in page.images() if ": reference" in attributes["alt"]]
    assert names == ["dog & cat", "cat", "dog & cat", "cat"]  # the uncertain one first


def test_plots_show_methods_with_a_network_at_their_cost_and_interval():
    text = board_page(board())
    plots = [xml.etree.ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)]
    label = "PSNR of mean [dB] against network evaluations per sample"
    plot = next(plot for plot in plots if plot.get("aria-label") == label)
    points = {float(dot.get("cx")): float(dot.get("cy")) for dot in plot.iter("circle")}
    assert len(points) == 2  # not A^dagger y
    (left, right) = sorted(points)
    assert points[left] < points[right]  # UD2M, cheaper, is better: higher up
    (tick,) = [float(word.get("x")) for word in plot.iter("text") if (word.text, word.get("y")) == ("100", "206")]
    assert tick == pytest.approx(right, abs=0.2)
    bars = {float(bar.get("x1")): bar for bar in plot.iter("line") if bar.get("stroke")}
    assert set(bars) == set(points)
    assert all(float(bars[x].get("y2")) < y < float(bars[x].get("y1")) for x, y in points.items())
    assert "UD2M: 31.23 [30.10, 32.30] at 9" in [title.text for title in plot.iter("title")]
    assert "Coverage of credible intervals" in text


PROBE = """
const order = () => [...document.querySelectorAll('table tbody tr')].map(r => r.cells[3].dataset.value);
const heads = [...document.querySelectorAll('table th button')];
heads[3].click(); found.rising = order();
heads[3].click(); found.falling = order();
found.sort = heads[3].parentElement.getAttribute('aria-sort');
const lpips = () => [...document.querySelectorAll('table tbody tr')].map(r => r.cells[4].dataset.value);
heads[4].click(); found.lpips = lpips();
"""


@pytest.mark.slow
def test_sorting_works_in_a_browser(tmp_path):
    found = probed(board_page(board()), PROBE, tmp_path)
    values = [10.0, 25.0, 30.5, 31.234]
    assert list(map(float, found["rising"])) == values
    assert list(map(float, found["falling"])) == values[::-1]
    assert found["sort"] == "descending"
    assert found["lpips"] == ["0.04", "0.05", "", ""]  # what is missing stays last


def test_errors_that_equal_deviations_lie_on_the_diagonal():
    points = [[0.01, 0.01, 0.5], [0.1, 0.1, 0.3], [0.0, 0.02, 0.2]]  # no logarithm of the last
    plot = reliability([("without", {}), ("right", {"spatial": points}), ("narrow", {"spatial": [[0.01, 0.1, 1.0]]})])
    (start, end), right, narrow = ([points for points, *_ in plot["curves"]][k] for k in (0, 2, 3))
    slope = (end[1] - start[1]) / (end[0] - start[0])
    assert len(right) == 2
    assert all(y - start[1] == pytest.approx(slope * (x - start[0]), abs=0.2) for x, y in right)
    assert narrow[0][1] < right[0][1]  # higher on the page: larger errors than told
    assert reliability([("without", {})]) is None
