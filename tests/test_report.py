"""The report: well-formed, self-contained, escaped, complete, and right about what is best."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from html_pages import Page

from ud2m.evaluation.table import Column, best_cells, format_value, table_columns
from ud2m.reports.figures import MAX_SIDE
from ud2m.reports.page import write_page
from ud2m.reports.samples import MAX_SAMPLES, Entry, Report, Section, samples_page
from ud2m.reports.text_tables import format_table

ROWS = [
    {"method": "A^dagger y", "nfe": 0, "psnr_mean": 4.831, "psnr": 4.831, "lpips": 1.16, "r": None, "residual": 0.0},
    {"method": "LATINO", "nfe": 8, "psnr_mean": 30.314, "psnr": 30.104, "lpips": 0.1002, "r": 0.2, "residual": 1.3},
    {"method": "UD2M (K=3, N=3)", "nfe": 9, "psnr_mean": 31.2, "psnr": 30.1, "lpips": 0.0791, "r": 1.8,
     "residual": 0.9, "seconds_per_image": 0.4712, "size_of_it": 193000},
]  # fmt: skip


def make_entry(name="cat", size=32, samples=3, channels=3, **changes) -> Entry:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(samples, channels, size, size, generator=generator)
    reference = torch.rand(channels, size, size, generator=generator)
    values = {
        "name": name,
        "reference": reference,
        "observation": reference,
        "samples": drawn,
        "mean": drawn.mean(0),
        "std": drawn.std(0, correction=0),
        "numbers": {"psnr": 28.125},
    }
    return Entry(**(values | changes))


def make_report(*entries: Entry, **changes) -> Report:
    values = {
        "title": "Deblurring",
        "summary": "First.\n\nSecond.",
        "table": ROWS,
        "settings": {"physics": {"width": 1.6}},
        "sections": [Section("Crops", "About them.", list(entries) or [make_entry()])],
    }
    return Report(**(values | changes))


def test_the_page_is_balanced_and_loads_nothing():
    text = samples_page(make_report(make_entry("a"), make_entry("b", observation=torch.rand(3, 8, 8))))
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?://|[\"'(]//|url\(|@import", text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "a")
        assert tag != "script" or not attributes
        assert not {"href", "srcset", "onload", "onerror", "background"} & set(attributes)
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    assert any(a.get("name") == "viewport" for tag, a in page.tags if tag == "meta")
    assert "prefers-color-scheme: dark" in text


def test_every_number_and_text_is_there():
    numbers = {"psnr_mean": 31.234, "lpips": 0.0789, "lpips_backend": "alex", "chi2": 1.23456}
    page = Page(samples_page(make_report(make_entry(numbers=numbers, note="A remark."))))
    expected = ["4.83", "30.31", "30.10", "31.20", "1.160", "0.100", "0.079", "0.20", "1.80", "0.471", "193000"]
    expected += [
        "31.23",
        "0.079",
        "1.235",
        "LPIPS (alex)",
        "First.",
        "Second.",
        "About them.",
        "A remark.",
        "Deblurring",
    ]
    expected += ["Settings", '"width": 1.6', "network evaluations for one sample"]
    for part in expected:
        assert part in page.text, part


def test_the_table_has_one_cell_per_row_and_column():
    page = Page(samples_page(make_report()))
    assert page.rows[0] == [
        "Method", "NFE", "PSNR of mean [dB]", "PSNR [dB]", "LPIPS", "r", "Residual", "Time [s]", "size of it",
    ]  # fmt: skip
    assert page.rows[1] == ["A^dagger y", "0", "4.83", "4.83", "1.160", "–", "0", "–", "–"]
    assert page.rows[3] == ["UD2M (K=3, N=3)", "9", "31.20", "30.10", "0.079", "1.80", "0.9", "0.471", "193000"]


def test_best_values_by_hand():
    # highest PSNR (two look equal: both), lowest LPIPS, r = 1.8 nearer to 1 as a ratio than 0.2; residual: no contest
    expected = {
        (2, "psnr_mean"), (1, "psnr"), (2, "psnr"), (2, "lpips"), (2, "r"),
    }  # fmt: skip
    assert best_cells(ROWS, table_columns(ROWS)) == expected
    assert Page(samples_page(make_report())).bold == ["30.10", "31.20", "30.10", "0.079", "1.80"]


def test_best_is_nearest_to_one_as_a_ratio():
    rows = [{"method": "a", "r": 0.45}, {"method": "b", "r": 2.0}, {"method": "c", "r": float("nan")}]
    assert best_cells(rows, table_columns(rows)) == {(1, "r")}


def test_scores_compare_only_on_the_same_problem():
    rows = [
        {"method": "a", "operator": "blur", "psnr": 31.0},
        {"method": "b", "operator": "blur", "psnr": 30.0},
        {"method": "a", "operator": "sr", "psnr": 26.0},
        {"method": "b", "operator": "sr", "psnr": 27.0},
        {"method": "b", "operator": "alone", "psnr": 99.0},
    ]
    assert best_cells(rows, table_columns(rows)) == {(0, "psnr"), (3, "psnr")}


def test_the_lpips_network_is_named():
    same = [{"method": "a", "lpips": 0.1, "lpips_backend": "alex"}, {"method": "b", "lpips": 0.2}]
    assert [c.heading for c in table_columns(same)] == ["Method", "LPIPS (alex)"]
    mixed = [{"lpips": 0.1, "lpips_backend": "alex"}, {"lpips": 0.2, "lpips_backend": "vgg"}]
    assert [c.heading for c in table_columns(mixed)] == ["LPIPS", "LPIPS network"]
    keyed = [{"lpips_vgg": 0.2, "lpips": 0.1, "lpips_mean_vgg": 0.3}, {"lpips_vgg": 0.1, "lpips": 0.2}]
    assert [c.heading for c in table_columns(keyed)] == ["LPIPS of mean (vgg)", "LPIPS (vgg)", "LPIPS"]
    assert best_cells(keyed, table_columns(keyed)) == {(1, "lpips_vgg"), (0, "lpips")}


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (30, "30.00"), (float("inf"), "inf"), ("n/a", "n/a"), (True, "True"),
     (np.float32(1.5), "1.50"), (torch.tensor(2.5), "2.50")],
)  # fmt: skip
def test_cell_texts(value, text):
    assert format_value(Column("psnr", "PSNR", "", ".2f", "max"), value) == text


HOSTILE = '<script>alert("x")</script>" onerror="y'


def test_hostile_texts_are_escaped():
    entry = make_entry(HOSTILE, note=HOSTILE, numbers={HOSTILE: HOSTILE})
    report = make_report(
        entry,
        title=HOSTILE,
        summary=HOSTILE,
        table=[{"method": HOSTILE, HOSTILE: HOSTILE}],
        settings={HOSTILE: "</pre></details>" + HOSTILE},
    )
    text = samples_page(report)
    page = Page(text)
    assert text.count("<script") == 1
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert page.text.count('<script>alert("x")') >= 9
    assert any(HOSTILE in attributes["alt"] for attributes, _ in page.images())


def test_file_names_that_are_no_text_can_be_written(tmp_path):
    write_page(tmp_path / "report.html", samples_page(make_report(make_entry("bad \udcff name"))))
    assert "bad ? name" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_pictures_show_the_tensors_in_order():
    entry = make_entry()
    images = Page(samples_page(make_report(entry))).images()
    alts = [a["alt"] for a, _ in images]
    assert alts[:3] == ["cat: reference", "cat: observation", "cat: mean of the samples"]
    assert "standard deviation" in alts[3]
    assert alts[4].startswith("colours from 0 to")
    assert alts[5:] == ["cat: sample 1", "cat: sample 2", "cat: sample 3"]
    expected = [entry.reference, entry.observation, entry.mean]
    for (_, image), tensor in zip(images, [*expected, None, None, *entry.samples], strict=True):
        if tensor is not None:
            assert np.array_equal(np.array(image), (tensor * 255).round().permute(1, 2, 0).numpy())


def test_at_most_some_samples_are_shown_and_the_rest_is_announced():
    page = Page(samples_page(make_report(make_entry(samples=20))))
    assert sum(": sample" in a["alt"] for a, _ in page.images()) == MAX_SAMPLES
    assert "Mean of 20 samples" in page.text
    assert f"{20 - MAX_SAMPLES} more samples are in the folder samples/" in page.text
    assert "more samples" not in Page(samples_page(make_report(make_entry(samples=MAX_SAMPLES)))).text


def test_single_sample_without_std_and_unknown_reference():
    page = Page(samples_page(make_report(make_entry(samples=1, std=None, reference=None))))
    alts = [a["alt"] for a, _ in page.images()]
    assert alts == ["cat: observation", "cat: mean of the samples", "cat: sample 1"]
    assert "Mean of 1 sample" in page.text


def test_std_maps_of_a_section_share_their_scale():
    faint = make_entry("faint", std=torch.full((3, 32, 32), 0.01))
    strong = make_entry("strong", std=torch.full((3, 32, 32), 0.04))
    page = Page(samples_page(make_report(faint, strong)))
    assert page.text.count("≥\xa00.04") == 2
    assert page.picture("faint: standard deviation")[1].max() < page.picture("strong: standard deviation")[1].max()


def test_small_observation_fills_the_frame_in_crisp_pixels():
    text = samples_page(make_report(make_entry(observation=torch.rand(3, 8, 8))))
    attributes, array = Page(text).picture("observation")
    assert array.shape == (8, 8, 3)
    assert attributes["class"] == "crisp"
    assert "Observation y, 8×8 pixels" in text
    assert set(re.findall(r"width: (\d+)px\"", text)) == {"256"}  # all pictures alike, eight times enlarged


def test_cropped_observation_keeps_the_pixel_scale():
    text = samples_page(make_report(make_entry(observation=torch.rand(3, 24, 24))))
    assert "width: 192px" in text


def test_missing_pixels_are_told_from_black_ones():
    measured = torch.zeros(32, 32, dtype=torch.bool)
    measured[:, :16] = True
    entry = make_entry(observation=torch.zeros(3, 32, 32), measured=measured)
    page = Page(samples_page(make_report(entry)))
    _, array = page.picture("observation")
    assert (array[:, :16] == 0).all()
    assert (array[:, 16:] == 217).all()
    assert "light grey: not measured" in page.text


@pytest.mark.parametrize(
    ("channels", "word"), [(2, "modulus over channels, black 0, white 5"), (1, "black 3, white 4")]
)
def test_observation_that_is_no_image_is_rescaled(channels, word):
    y = torch.zeros(channels, 4, 4) if channels == 2 else torch.full((1, 4, 4), 3.0)
    y[:, 0, 0] = torch.tensor([3.0, 4.0])[-channels:]
    page = Page(samples_page(make_report(make_entry(observation=y))))
    _, array = page.picture("observation")
    assert (array[0, 0], array[1, 1]) == (255, 0)
    assert word in page.text


def test_noise_outside_the_range_is_clamped_not_rescaled():
    y = torch.full((3, 32, 32), 0.5)
    y[:, 0, 0] = 1.1
    _, array = Page(samples_page(make_report(make_entry(observation=y)))).picture("observation")
    assert (array[0, 0, 0], array[1, 1, 0]) == (255, 128)


def test_large_pictures_are_reduced():
    size = 2 * MAX_SIDE
    y = torch.full((1, size, size), 0.5)
    entry = make_entry(size=8, channels=1, samples=1, reference=None, std=None, observation=y)
    page = Page(samples_page(make_report(entry)))
    attributes, array = page.picture("observation")
    assert array.shape == (MAX_SIDE, MAX_SIDE)
    assert attributes["class"] == "smooth"
    assert "reduced to 1/2" in page.text


def test_grey_images():
    _, array = Page(samples_page(make_report(make_entry(channels=1)))).picture("reference")
    assert array.shape == (32, 32)


def test_a_256_pixel_entry_stays_affordable():
    text = samples_page(make_report(make_entry(size=256, samples=8)))  # noise: no PNG can be larger
    assert len(text) < 13 * 256 * 256 * 3 * 1.34 + 30_000


@pytest.mark.parametrize(
    ("field", "shape"),
    [("reference", (3, 8, 8)), ("std", (1, 32, 32)), ("samples", (3, 32, 32)), ("samples", (0, 3, 32, 32)),
     ("measured", (16, 16)), ("mean", (32, 32))],
)  # fmt: skip
def test_shapes_that_do_not_fit(field, shape):
    with pytest.raises(ValueError, match=r"report entry 'cat': .* must have shape .*, got"):
        replace(make_entry(), **{field: torch.zeros(shape)})


def test_empty_parts_are_left_out():
    page = Page(samples_page(Report("T", "", [], {}, [])))
    assert not {"table", "details", "section", "p", "ul"} & {tag for tag, _ in page.tags}


def test_console_table():
    lines = format_table(ROWS).splitlines()
    assert lines[0].split("  ")[0] == "Method"
    assert set(lines[1]) == {"-", " "}
    cells = [re.split(r"  +", line.strip()) for line in lines[:5]]
    assert cells[4] == ["UD2M (K=3, N=3)", "9", "31.20*", "30.10*", "0.079*", "1.80*", "0.9", "0.471", "193000"]
    assert cells[2] == ["A^dagger y", "0", "4.83", "4.83", "1.160", "–", "0", "–", "–"]
    assert lines[2].index("4.83") == lines[4].index("31.20") + 1  # decimal points in line
    assert "* best in its column" in lines
    assert "NFE: network evaluations for one sample" in lines


def test_a_sentence_says_who_is_best_in_what():
    assert format_table(ROWS).splitlines()[-1] == (
        "best: UD2M (K=3, N=3) in PSNR of mean, PSNR, LPIPS, r"  # 30.104 and 30.1 look equal
        "; LATINO in PSNR"
    )
    assert "best: UD2M (K=3, N=3) in PSNR of mean, PSNR, LPIPS, r; LATINO in PSNR" in samples_page(make_report())
    rows = [
        {"method": method, "operator": operator, "psnr": psnr}
        for operator, scores in {"blur": (30.0, 31.0), "mask": (29.0, 28.0), "jpeg": (None, 20.0)}.items()
        for method, psnr in zip(("a\x1b", "b"), scores, strict=True)
    ]
    lines = [line for line in format_table(rows).splitlines() if line.startswith("best")]
    assert lines == ["best (blur): b in PSNR", "best (mask): a  in PSNR"]  # none where one alone was scored


def test_console_table_without_rows_and_with_control_characters():
    assert format_table([]) == "(no results)"
    text = format_table([{"method": "a\x1b[31m\nb", "psnr": 1.0}])
    assert "\x1b" not in text
    assert "a [31m b" in text
    assert "*" not in text  # a single row has no winner
