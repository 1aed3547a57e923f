"""Differences of methods, paired by image."""

import pytest
import torch

from ud2m.evaluation.cells import Result
from ud2m.evaluation.differences import difference_rows, excludes_zero, with_differences

COUNT = 400


def row(method, operator="blur", **numbers):
    return {"method": method, "nfe": 9, "data": "photos", "size": "8x8", "operator": operator, "sigma_y": 0.1} | numbers


def values(seed, spread):
    return spread * torch.randn(COUNT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_is_that_of_the_differences_and_not_of_the_images():
    images, noise = values(0, 5.0), values(1, 0.2)
    found = [30 + images, 30.1 + images + noise, 30.0 + images + 10 * noise]
    rows = [row(name, psnr=float(v.mean())) for name, v in zip("abc", found, strict=True)]
    results = [Result(r, {"psnr_values": v.tolist(), "ranks": [1]}, {}) for r, v in zip(rows, found, strict=True)]
    first, second, third = with_differences(rows, results, "a")
    assert first == rows[0] | {"reference": "a"}
    expected, deviation = 0.1 + noise.mean(), noise.std() / COUNT**0.5
    assert second["psnr_difference"] == pytest.approx(expected.item())
    for end, sign in (("low", -1), ("high", 1)):
        assert second[f"psnr_difference_{end}"] == pytest.approx((expected + sign * 1.96 * deviation).item(), abs=3e-3)
    plain = difference_rows([first, second, third])
    assert [r["method"] for r in plain] == ["b", "c"]
    assert plain[0]["psnr"] == second["psnr_difference"]
    assert [excludes_zero(r, "psnr") for r in plain] == [True, False]
    assert not excludes_zero(plain[0], "ssim")


def test_each_operator_has_its_own_reference_and_what_is_infinite_none():
    rows = [row("a"), row("b"), row("b", "holes"), row("a", "holes")]
    lists = [[1.0, 2.0], [3.0, 5.0], [0.0, 1.0], [1.0, 4.0]]
    results = [
        Result(r, {"lpips_values": v, "psnr_values": [float("inf"), 1.0]}, {}) for r, v in zip(rows, lists, strict=True)
    ]
    found = [r.get("lpips_difference") for r in with_differences(rows, results, "a")]
    assert found == [None, 2.5, -2.0, None]
    assert not any("psnr_difference" in r for r in with_differences(rows, results, "a"))
    with pytest.raises(ValueError, match="no method 'a' on holes and photos"):
        with_differences(rows[:3], results[:3], "a")
