"""The pictures of a report: their size on the page, their order, and what its script does with them in a browser."""

import re
from functools import cache

import pytest
import torch
from browser import probed
from html_pages import Page
from test_report import make_entry, make_report
from torch.nn.functional import avg_pool2d

from ud2m.reports.page import PAGE_BYTES
from ud2m.reports.samples import Entry, Report, Section, samples_page

LEAVES = 600


@cache
def dead_leaves(height: int, width: int, seed: int) -> torch.Tensor:
    """Return discs of all sizes that cover one another, each with a texture: edges and spectrum of photographs.

    Radii have the density r^-3, which makes it scale invariant [Lee, Mumford, Huang, IJCV 2001].
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.full((3, height, width), 0.5)
    for place, size, colour in zip(
        torch.rand(LEAVES, 2, generator=generator),
        torch.rand(LEAVES, generator=generator),
        torch.rand(LEAVES, 3, generator=generator),
        strict=True,
    ):
        radius = 4 / (1 - size * (1 - (4 / height) ** 2)) ** 0.5
        disc = (rows - place[0] * height) ** 2 + (columns - place[1] * width) ** 2 < radius**2
        image[:, disc] = colour[:, None]
    grain = torch.randn(3, height, width, generator=generator)
    return (image + 0.012 * grain + 0.2 * avg_pool2d(grain, 5, 1, 2)).clamp(0, 1)


def photograph(name: str, height: int, width: int, seed: int = 0, **changes):
    """Return an entry with a blurred, noisy observation, and samples that differ in their details."""
    generator = torch.Generator().manual_seed(seed)
    x0 = dead_leaves(height, width, seed)
    blurred = avg_pool2d(x0, 5, 1, 2)
    y = blurred + 0.01 * torch.randn(x0.shape, generator=generator)
    samples = (x0 + 0.02 * torch.randn(8, *x0.shape, generator=generator)).clamp(0, 1)
    parts = {"reference": x0, "observation": y, "samples": samples, "mean": samples.mean(0), "std": samples.std(0)}
    return Entry(**({"name": name, "numbers": {"psnr": 30.0}, "rivals": {"LATINO": blurred}} | parts | changes))


@pytest.mark.slow
def test_a_report_of_ten_photographs_stays_below_five_megabytes():
    entries = [photograph(f"photograph {k}", 512, 768, k % 2) for k in range(10)]
    text = samples_page(make_report(*entries))
    assert len(text.encode()) <= PAGE_BYTES == 5_000_000
    (quality,) = re.findall(r"WebP of quality (\d+), to be looked at", text)
    assert int(quality) >= 30
    page = Page(text)
    assert len(page.images()) == 10 * (4 + 1 + 4 + 1)  # with the bar of colours
    for kind, exact in (("reference", entries[0].reference), ("sample 4", entries[0].samples[3])):
        attributes, array = page.picture(f"photograph 0: {kind}")
        assert attributes["src"].startswith("data:image/webp;base64,")
        assert array.shape == (512, 768, 3)
        error = (torch.from_numpy(array / 255.0).permute(2, 0, 1) - exact).square().mean().sqrt()
        assert error < exact.std() / 3  # grain is lost, edges are not


def test_what_is_small_stays_lossless():
    text = samples_page(make_report(*(photograph(str(k), 48, 64) for k in range(10))))
    assert "data:image/png;base64," in text
    assert "image/webp" not in text
    assert "WebP" not in text


def test_the_least_certain_picture_comes_first():
    stds = {"sure": 0.01, "none": None, "least": 0.2, "fair": 0.1}
    entries = [
        make_entry(name, samples=1 if std is None else 3, std=None if std is None else torch.full((3, 32, 32), std))
        for name, std in stds.items()
    ]
    headings = re.findall(r"<h3>(\w+)</h3>", samples_page(make_report(*entries)))
    assert headings == ["least", "fair", "sure", "none"]


def test_rivals_stand_beside_the_samples():
    entry = photograph("cat", 16, 24)
    alts = [attributes["alt"] for attributes, _ in Page(samples_page(make_report(entry))).images()]
    assert alts[-1] == "cat: LATINO"
    with pytest.raises(ValueError, match=r"report entry 'cat': LATINO must have shape \(3, 16, 24\), got \(1, 4, 4\)"):
        photograph("cat", 16, 24, rivals={"LATINO": torch.zeros(1, 4, 4)})


def test_what_shows_another_place_is_not_enlarged_with_the_others():
    fitting = {"same": (3, 32, 32), "decimated": (3, 8, 8), "cropped": (3, 28, 28), "sinogram": (2, 32, 32)}
    for name, shape in fitting.items():
        text = samples_page(make_report(make_entry(observation=torch.rand(shape))))
        (observation,) = [a for tag, a in Page(text).tags if tag == "img" and a["alt"] == "cat: observation"]
        assert ("data-kind" in observation) == (name in ("same", "decimated")), name


def test_settings_are_below_the_table():
    row = {"method": "LATINO", "psnr": 30.0, "setting": "tau_first = 0.1"}
    page = Page(samples_page(make_report(table=[row])))
    assert page.rows == [["Method", "PSNR [dB]"], ["LATINO", "30.00"]]
    assert "LATINO: tau_first = 0.1" in page.text


PROBE = """
const entry = document.querySelector('article'), frames = [...entry.querySelectorAll('.frame')];
const images = [...entry.querySelectorAll('figure img')];
found.kinds = images.map(i => i.dataset.kind);
const shown = () => images.map(i => i.style.transform && [i.style.transform, i.style.transformOrigin]);
const row = frames[0].closest('.pictures');
document.querySelector('[data-zoom="8"]').click();
pointer(frames[0], 'pointermove', 0.25, 0.5); found.moved = shown();
// the corner of the window: which pixel of each picture is seen there
found.corners = images.filter(i => i.dataset.kind).map(i => {
  const box = i.getBoundingClientRect(), frame = i.parentElement.getBoundingClientRect();
  return [(frame.left - box.left) / box.width, (frame.top - box.top) / box.height].map(v => v.toFixed(3));
});
pointer(frames[5], 'pointermove', 0.5, 0.75); found.followed = shown();
pointer(row, 'pointerleave'); found.left = shown();
pointer(frames[0], 'click', 0.25, 0.5); pointer(row, 'pointerleave'); found.held = shown();
pointer(frames[0], 'click', 0.25, 0.5); found.released = shown();
const stage = entry.querySelector('.stage'), slider = stage.querySelector('input');
const [under, over] = stage.querySelectorAll('img'), [left, right] = entry.querySelectorAll('select');
found.visible = entry.querySelector('.compare').offsetHeight > 0;
found.over = [over.src === images[1].src, over.alt]; found.under = under.alt;
found.half = getComputedStyle(over).clipPath;
slider.value = 20; slider.dispatchEvent(new Event('input')); found.cut = getComputedStyle(over).clipPath;
found.line = parseFloat(getComputedStyle(stage, '::after').left) / stage.clientWidth;
found.labelled = slider.getAttribute('aria-label'); slider.focus();
found.focus = document.activeElement === slider;
right.value = '0'; right.dispatchEvent(new Event('change')); found.chosen = under.alt;
const play = entry.querySelector('.choose button');
play.click(); found.pressed = play.getAttribute('aria-pressed');
const seen = new Set();
for (let k = 0; k < 20; k++) { await wait(300); seen.add(under.alt); }
play.click(); await wait(600); const last = under.alt; await wait(2000);
found.stopped = last === under.alt; found.seen = [...seen].sort();
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_zoom_slider_and_samples_in_a_browser(tmp_path, width):
    entry = photograph("cat", 64, 96, samples=torch.rand(3, 3, 64, 96))
    wide = {"method": "LATINO, best PSNR", **{f"number_{k}": 1.0 for k in range(9)}, "setting": "tau = 0.1, " * 20}
    found = probed(samples_page(make_report(entry, table=[wide])), PROBE, tmp_path, width)
    zoomed = [kind is not None for kind in found["kinds"]]
    assert zoomed == 4 * [True] + [False] + 4 * [True]  # the bar of colours is no picture
    for moment, place in (("moved", [25, 50]), ("followed", [50, 75]), ("held", [25, 50])):
        states = [state for state, is_zoomed in zip(found[moment], zoomed, strict=True) if is_zoomed]
        ((scale, origin),) = set(map(tuple, states))  # the same for all
        assert scale == "scale(8)"
        assert [float(part.rstrip("%")) for part in origin.split()[:2]] == pytest.approx(place, abs=1), moment
    corners = {tuple(corner) for corner in found["corners"]}
    assert corners == {("0.219", "0.438")}  # 7/8 of the place: what is pointed at stays where it is
    assert set(found["left"]) == set(found["released"]) == {""}
    assert found["visible"]
    assert (found["over"], found["under"]) == ([True, "cat: observation"], "cat: sample 1")
    assert (found["half"], found["cut"]) == ("inset(0px 50% 0px 0px)", "inset(0px 80% 0px 0px)")
    assert found["line"] == pytest.approx(0.2, abs=0.01)
    assert (found["labelled"], found["focus"]) == ("cat: share of the left picture", True)
    assert found["chosen"] == "cat: reference"
    assert (found["pressed"], found["stopped"]) == ("true", True)
    assert found["seen"] == ["cat: sample 1", "cat: sample 2", "cat: sample 3"]


def test_what_needs_the_script_is_hidden_without_it():
    page = Page(samples_page(Report("T", "", [], {}, [Section("S", "", [make_entry()])])))
    for name in ("compare", "zoom"):
        (attributes,) = [a for _, a in page.tags if a.get("class") == name]
        assert "hidden" in attributes
    outside = [a for tag, a in page.tags if tag in ("button", "input", "select")]
    assert len(outside) == 3 + 1 + 1 + 2  # zoom, play, slider, sides: all of them within those two
