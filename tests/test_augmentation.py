"""Random changes of crops: what each leaves alone, how often it happens, and the choice of the detailed place."""

from collections import Counter

import numpy as np
import pytest
import torch

from ud2m.data.augmentation import Augmentation
from ud2m.data.crops import RandomCrops
from ud2m.data.image_store import MemoryImages

CROP = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2


def draws(augmentation: Augmentation, count: int = 800) -> list[torch.Tensor]:
    rng = np.random.default_rng(1)
    return [augmentation(CROP, rng) for _ in range(count)]


def test_nothing_changes_by_default():
    assert all(torch.equal(crop, CROP) for crop in draws(Augmentation(), 20))


def test_turns_are_the_symmetries_of_the_square_and_equally_likely():
    square = CROP.numpy()
    symmetries = [np.rot90(s, k, (1, 2)).tobytes() for s in (square, square[:, :, ::-1]) for k in range(4)]
    seen = Counter(crop.numpy().tobytes() for crop in draws(Augmentation(turns=1.0)))
    assert set(seen) == set(symmetries)
    assert max(abs(count - 100) for count in seen.values()) < 4 * (800 * 1 / 8 * 7 / 8) ** 0.5


def test_permutations_keep_the_channels_and_happen_as_often_as_asked():
    seen = Counter(
        tuple(int((crop[c] == CROP).all((1, 2)).nonzero()) for c in range(3))
        for crop in draws(Augmentation(permutation=0.5))
    )
    assert len(seen) == 6
    changed = 1 - seen[(0, 1, 2)] / 800
    assert abs(changed - 0.5 * 5 / 6) < 4 * (0.5 / 800) ** 0.5


def test_saturation_scales_colours_about_their_mean():
    factors = []
    for crop in draws(Augmentation(saturation=0.3)):
        torch.testing.assert_close(crop.mean(0), CROP.mean(0))
        factors.append(((crop - crop.mean(0)) / (CROP - CROP.mean(0))).median().item())
    assert 0.7 <= min(factors) < 0.72
    assert 1.28 < max(factors) <= 1.3


def test_gamma_is_one_power_of_all_intensities():
    exponents = []
    for crop in draws(Augmentation(gamma=0.2)):
        powers = crop.log() / CROP.log()
        torch.testing.assert_close(powers, powers[:1, :1, :1].expand_as(powers))
        exponents.append(powers.mean().log().item())
    assert -0.2 <= min(exponents) < -0.19
    assert 0.19 < max(exponents) <= 0.2


def test_results_stay_in_range_for_saturated_colours():
    rng = np.random.default_rng(0)
    extreme = torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1).expand(3, 4, 4)
    for _ in range(50):
        crop = Augmentation(saturation=1.0, gamma=1.0, turns=1.0, permutation=1.0)(extreme, rng)
        assert 0 <= crop.min() <= crop.max() <= 1


@pytest.mark.parametrize("name", ["turns", "permutation", "saturation", "gamma"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"augment\.{name} must lie in \[0, 1\]"):
        Augmentation(**{name: value})


def test_augmented_crops_depend_on_seed_and_number_alone():
    images = MemoryImages({"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)})
    options = Augmentation(turns=1.0, permutation=0.5, saturation=0.4, gamma=0.3)
    one, same = (RandomCrops(images, 8, augmentation=options, candidates=3) for _ in range(2))
    forward = [one[i] for i in range(30)]
    assert all(torch.equal(forward[i], same[i]) for i in reversed(range(30)))


@pytest.mark.parametrize("candidates", [1, 3])
def test_the_most_detailed_of_the_candidate_places_is_taken(candidates):
    image = torch.zeros(1, 8, 15, dtype=torch.uint8)  # 8 places; only the last one holds the dot
    image[0, 4, 14] = 255
    crops = RandomCrops(MemoryImages({"image": image}), 8, candidates=candidates)
    share = np.mean([crops[i].max().item() for i in range(1500)])
    expected = 1 - (7 / 8) ** candidates
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 1500) ** 0.5


def test_a_crop_needs_a_candidate():
    with pytest.raises(ValueError, match=r"candidates.*at least 1, got 0"):
        RandomCrops(MemoryImages({"image": torch.zeros(3, 32, 40, dtype=torch.uint8)}), 8, candidates=0)
