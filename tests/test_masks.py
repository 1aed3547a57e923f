"""Boxes and strokes: their shares, their shapes, their randomness."""

import math

import pytest
import torch
from operators import generator
from scipy.ndimage import label

from ud2m.physics import MissingBoxes, MissingStrokes

FAMILIES = [MissingBoxes(0.4), MissingBoxes(0.3, count=3), MissingStrokes(), MissingStrokes((0.5, 0.6))]


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_follow_the_generator_of_their_row(family):
    shape = (3, 24, 20)
    assert family.random
    masks = family.draw(6, shape, generator(7)).mask
    assert masks.shape == (6, 1, 24, 20)
    assert torch.equal(masks, family.draw(6, shape, generator(7)).mask)
    assert not torch.equal(masks, family.draw(6, shape, generator(8)).mask)
    assert len({mask.numpy().tobytes() for mask in masks}) == 6
    rows = family.draw(3, shape, [generator(seed) for seed in (1, 2, 3)]).mask
    assert torch.equal(rows[1:2], family.draw(1, shape, [generator(2)]).mask)


def test_a_box_is_a_rectangle_anywhere():
    masks = MissingBoxes(0.25).draw(600, (1, 16, 24), generator(0)).mask[:, 0]
    corners = set()
    for missing in 1 - masks:
        rows, columns = missing.sum(1), missing.sum(0)
        assert set(rows.tolist()) == {0, 6}
        assert set(columns.tolist()) == {0, 4}
        assert torch.equal(missing, torch.outer((rows > 0).float(), (columns > 0).float()))
        corners.add((int(rows.argmax()), int(columns.argmax())))
    places = 13 * 19  # with 600 draws all but a few are met
    assert len(corners) > 0.8 * places
    assert {(0, 0)[0], 12} <= {row for row, _ in corners}
    assert {0, 18} <= {column for _, column in corners}


def test_several_boxes_and_the_smallest_images():
    share = 1 - MissingBoxes(0.25, count=2).draw(2000, (1, 16, 16), generator(1)).mask.mean((1, 2, 3))
    assert share.max() == pytest.approx(2 / 16)  # two that do not meet
    assert share.min() >= 1 / 16
    tiny = MissingBoxes(0.9, count=9).draw(200, (1, 2, 2), generator(0)).mask
    assert (tiny.sum((1, 2, 3)) >= 1).all()
    assert (tiny.sum((1, 2, 3)) < 4).all()


@pytest.mark.parametrize("share", [(0.1, 0.1), (0.2, 0.3), (0.6, 0.9)])
def test_strokes_cover_the_stated_share(share):
    masks = MissingStrokes(share).draw(60, (1, 64, 64), generator(0)).mask
    missing = 1 - masks.mean((1, 2, 3))
    assert missing.min() >= share[0]
    assert missing.max() <= share[1] + 0.1  # the last stroke passes the aim
    assert (masks.sum((1, 2, 3)) > 0).all()


def test_strokes_are_few_connected_lines():
    masks = MissingStrokes((0.1, 0.1)).draw(30, (1, 96, 96), generator(0)).mask[:, 0]
    pieces = [label(1 - mask.numpy(), structure=torch.ones(3, 3).numpy())[1] for mask in masks]
    assert max(pieces) <= 12
    thickness = [1 - torch.nn.functional.max_pool2d(mask[None], 15, stride=1)[0] for mask in masks]
    assert sum(t.sum() for t in thickness) < 0.02 * 30 * 96**2  # nowhere 15 pixels thick, but at crossings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MissingBoxes(0.0), r"inside \(0, 1\).*0"),
        (lambda: MissingBoxes(1.0), r"inside \(0, 1\)"),
        (lambda: MissingBoxes(0.5, 0), "count at least 1.*0"),
        (lambda: MissingBoxes(math.nan), "nan"),
        (lambda: MissingStrokes((0.0, 0.2)), "rise inside"),
        (lambda: MissingStrokes((0.3, 0.2)), "rise inside"),
        (lambda: MissingStrokes((0.3, 0.95)), "rise inside"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()
