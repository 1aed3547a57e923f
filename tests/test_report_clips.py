"""Clips that play on pages."""

import base64
import io
import re

import pytest
import torch
from operators import generator
from PIL import Image

from ud2m.reports.clips import GAP, STD, flicker, playing
from ud2m.reports.page import PAGE_BYTES
from ud2m.reports.plots import BOTTOM, frame_lines
from ud2m.reports.samples import Entry, Report, Section, samples_page


def page_of(frames: int, side: int, rate: float = 5.0) -> tuple[str, dict[str, torch.Tensor]]:
    x0 = torch.rand(1, frames, side, side, generator=generator())
    clips = {"Reference": x0, "Observation y": x0[:, ::2, ::2, ::2], STD: 0.1 * x0}
    entry = Entry(
        "clip",
        x0[:, 0],
        x0[:, 0],
        x0[:, :1].transpose(0, 1),
        x0[:, 0],
        None,
        {},
        clips=clips,
        rate=rate,
        curves={"Change": {"Reference": flicker(x0)}},
    )
    return samples_page(Report("t", "s", [], {}, [Section("a", "b", [entry])])), clips


def test_clips_play_in_step_with_all_their_pixels():
    page, clips = page_of(6, 16)
    headings = re.findall(r"<span>([^<]+)</span>", page.partition('class="headings"')[2].partition("</div>")[0])
    assert headings == list(clips)
    source = re.search(r"data:image/webp;base64,([^\"]+)", page)
    moving = Image.open(io.BytesIO(base64.b64decode(source[1])))
    assert moving.n_frames == 6
    gap = max(1, round(GAP * 16))
    for t in range(6):
        moving.seek(t)
        moving.load()
        assert moving.info["duration"] == 200
        pixels = torch.tensor(list(moving.convert("L").getdata())).view(16, -1) / 255
        torch.testing.assert_close(pixels[:, :16], clips["Reference"][0, t], rtol=0, atol=0.51 / 255)
        y = clips["Observation y"][0, t // 2].repeat_interleave(2, 0).repeat_interleave(2, 1)
        torch.testing.assert_close(pixels[:, 16 + gap : 32 + gap], y, rtol=0, atol=0.51 / 255)


@pytest.mark.slow
def test_a_page_of_large_clips_stays_small():
    page, _ = page_of(40, 256)
    assert len(page.encode()) <= PAGE_BYTES
    assert 'class="playing"' in page


def test_long_clips_are_cut_and_none_is_none():
    clip = torch.zeros(1, 120, 4, 4)
    assert playing({"a": clip}, 8, 1, "")["note"].startswith("The first 100 of 120 frames.")
    assert playing({}, 8, 1, "") is None


def test_lines_begin_at_zero_and_flicker_is_the_change():
    clip = torch.zeros(2, 3, 4, 4)
    clip[:, 1], clip[0, 2] = 0.5, 0.5
    assert flicker(clip) == pytest.approx([0.5, 0.5 / 2**0.5])
    points, _, name = frame_lines("t", {"x": [0.0, 2.0]})["curves"][0]
    assert (name, points[0][1]) == ("x", BOTTOM)
