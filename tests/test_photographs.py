"""The folder of photographs that priors and models are trained and judged on, where it is at hand."""

import hashlib

import pytest

from ud2m.images import read_image


@pytest.mark.slow
def test_no_photograph_of_validation_or_test_is_trained_on(shared):
    def pixels(split):
        paths = sorted((shared / "data" / "photographs" / split).iterdir())
        return {hashlib.sha256(read_image(path, 3).numpy().tobytes()).digest() for path in paths}

    seen, held_out = pixels("train"), pixels("val") | pixels("test")
    assert (len(seen), len(held_out)) == (1250, 200)
    assert not seen & held_out
