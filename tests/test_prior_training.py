import copy
import math

import pytest
import torch
from tiny_training import TinyData, fit, images, prior_module, streams

from ud2m.priors.prior import Prior


@pytest.mark.slow
def test_training_a_prior_lowers_the_loss_and_raises_the_psnr(tmp_path):
    module = prior_module(lr=1e-2, levels=[0.1, 0.5])
    data = TinyData(16)
    data.samples_per_epoch = 16 * 60
    first = module.losses(images(64), streams(module, 64))[0].item()
    before = module.evaluate(data)[0]
    fit(module, tmp_path, data, max_epochs=1)
    after = module.evaluate(data)[0]
    assert module.losses(images(64), streams(module, 64))[0].item() < 0.5 * first
    assert after["score"] > before["score"] + 3
    assert after["psnr@0.5"] > 10 * math.log10(1 / 0.5**2) + 3  # 3 dB less noise than there was
    assert (after["method"], after["nfe"], after["step"]) == ("prior", 1, 60)
    assert after["score"] == pytest.approx((after["psnr@0.1"] + after["psnr@0.5"]) / 2)


def test_an_exported_prior_is_the_averaged_network(tmp_path):
    module = prior_module()
    fit(module, tmp_path)
    module.export(tmp_path / "export")
    loaded = Prior.from_pretrained(tmp_path / "export")
    x, sigma = images(2), torch.tensor([0.1, 1.0])
    raw = Prior(copy.deepcopy(module.unet), module.schedule)(x, sigma)
    with module.ema.applied():
        averaged = Prior(copy.deepcopy(module.unet), module.schedule)(x, sigma)
    exported = loaded(x, sigma)
    assert (exported - averaged).abs().max() < 5e-3  # fp16 on disk
    assert (exported - averaged).abs().max() < 0.1 * (exported - raw).abs().max()


def test_levels_of_prior_training(generator):
    module = prior_module(focus=0.75, focus_max=1.0)
    sigma = module.draw_sigma(torch.rand(100_000, 2, generator=generator))
    low, high = module.schedule.sigma_min, module.schedule.sigma_max
    assert low <= sigma.min() < 1.01 * low
    assert 0.99 * high < sigma.max() <= 1.001 * high
    uniform_time = (module.schedule.sigma(torch.linspace(0, 999, 10_001)) > 1.0).double().mean().item()
    assert (sigma > 1.0).double().mean().item() == pytest.approx(0.25 * uniform_time, abs=0.01)


def test_validation_of_a_prior_weighs_images_not_batches(tmp_path):
    module = prior_module(levels=[0.3])
    fit(module, tmp_path)  # five images in batches of four and one
    with module.ema.applied():
        scores = [module.denoising_psnr(x0, i)["psnr@0.3"] for i, x0 in enumerate(TinyData().val_dataloader())]
    assert module.scores["score"] == pytest.approx(torch.cat(scores).mean().item(), rel=1e-6)
    assert [len(s) for s in scores] == [4, 1]


def test_a_prior_is_trained_on_from_its_weights(tmp_path):
    first = prior_module()
    fit(first, tmp_path)
    first.export(tmp_path / "export")
    second = prior_module(start_from=str(tmp_path / "export"))
    assert second.steps_done == 0
    x, sigma = images(2), torch.tensor([0.1, 1.0])
    begun = Prior(copy.deepcopy(second.unet), second.schedule)(x, sigma)
    torch.testing.assert_close(begun, Prior.from_pretrained(tmp_path / "export")(x, sigma))
    with second.ema.applied():  # the average begins there too
        torch.testing.assert_close(Prior(copy.deepcopy(second.unet), second.schedule)(x, sigma), begun)
    with pytest.raises(ValueError, match=r"cannot begin with photos_prior: its architecture is another one"):
        prior_module(start_from="photos_prior")
    with pytest.raises(FileNotFoundError, match="unknown prior 'photo_prior'"):
        prior_module(start_from="photo_prior")
