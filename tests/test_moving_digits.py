"""``data=moving_digits``: motions, pixels and captions."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ud2m.data import MovingDigitsData
from ud2m.data.mnist import read_mnist
from ud2m.data.moving_digits import MovingDigits, trimmed


def digits() -> Tensor:
    """Return two "digits": a block of 3 x 5 and one of 20 x 20 pixels."""
    found = torch.zeros(2, 28, 28, dtype=torch.uint8)
    found[0, 10:13, 4:9] = torch.arange(1, 16, dtype=torch.uint8).view(3, 5)
    found[1, 4:24, 4:24] = 255
    return found


def moving(**options) -> MovingDigits:
    return MovingDigits(digits(), **{"side": 32, "split": "train", "frames": 25, "speed": 3} | options)


def test_every_frame_holds_the_digit_and_it_moves_like_a_ball_between_walls():
    seen = set()
    for seed in range(60):
        video = moving(seed=seed, speed=1 if seed % 2 else 3)[0]
        assert video.shape == (1, 25, 32, 32)
        places = []
        for frame in video[0]:
            rows, columns = (frame.sum(axis).nonzero().flatten().tolist() for axis in (1, 0))
            places.append((rows[0], columns[0]))
            ink = frame[rows[0] : rows[0] + 3, columns[0] : columns[0] + 5]
            assert torch.equal(ink, torch.arange(1, 16).view(3, 5).float() / 255)
            assert (frame > 0).sum() == 15
        for axis, room in ((0, 29), (1, 27)):
            # a ball, step by step: one pixel at a time, turning at the walls
            path = [place[axis] for place in places]
            steps = np.diff(path)
            speed = max(abs(steps), default=0)
            matches = []
            for velocity in {speed, -speed}:
                at, direction, simulated = path[0], int(np.sign(velocity)), [path[0]]
                for _ in range(24):
                    for _ in range(speed):
                        direction = -direction if not 0 <= at + direction <= room else direction
                        at += direction
                    simulated.append(at)
                matches.append(simulated == path)
            assert any(matches)
            seen.add(int(speed))
        assert len(set(places)) > 1  # no clip stands still
    assert seen == {0, 1, 2, 3}


def test_a_video_depends_on_seed_split_and_number_alone():
    first = moving()
    assert torch.equal(first[1], moving()[1])
    assert not torch.equal(first[1], moving(seed=1)[1])
    assert not torch.equal(first[1], moving(split="test")[1])
    assert first.places(0, (3, 5)) != first.places(1, (3, 5))


def test_a_digit_as_large_as_the_picture_stands_still_and_an_empty_one_is_black():
    full = MovingDigits(torch.full((1, 28, 28), 255, dtype=torch.uint8), 28, "train", 3, 2)
    assert torch.equal(full[0], torch.ones(1, 3, 28, 28))
    empty = MovingDigits(torch.zeros(1, 28, 28, dtype=torch.uint8), 32, "train", 3, 2)
    assert not empty[0].any()


def test_digits_of_mnist_move_and_are_named_by_their_captions(shared):
    root = shared / "data" / "mnist"
    data = MovingDigitsData(root=root, captions=True, channels=1, crop_size=32, batch_size=4, frames=5)
    video, text = data.train_set()[0]
    assert video.shape == (1, 5, 32, 32)
    assert text.split("\n") == ["a video of the digit five"] * 3 + ["a video of a digit"]
    assert text in data.all_captions()
    ink = trimmed(read_mnist(root, train=True).data[0])
    torch.testing.assert_close(video.sum((0, 2, 3)), (ink.float() / 255).sum().expand(5))
    batch, texts = next(iter(data.train_dataloader()))
    assert batch.shape == (4, 1, 5, 32, 32)
    assert len(texts) == 4
    plain = MovingDigitsData(root=root, channels=1, crop_size=32, batch_size=4)
    assert plain.evaluation_set("val")[0].shape == (1, 9, 32, 32)
    with pytest.raises(ValueError, match=r"data\.captions=true"):
        plain.all_captions()


@pytest.mark.parametrize("settings", [{"frames": 0}, {"speed": 0}, {"channels": 3}, {"crop_size": 27}])
def test_moving_digits_refuse_what_they_cannot_be(tmp_path, settings):
    with pytest.raises(ValueError, match=r"frames >= 1 and speed >= 1|grey|padded"):
        MovingDigitsData(root=tmp_path, **{"channels": 1, "crop_size": 32, "batch_size": 4} | settings)
