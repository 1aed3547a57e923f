import torch

from ud2m.training.pictures import contact_sheet


def test_contact_sheet_shows_every_kind_of_observation(generator):
    x0 = torch.rand(2, 3, 8, 8, generator=generator)
    samples = torch.rand(2, 5, 3, 8, 8, generator=generator)
    sheet = contact_sheet(x0, torch.rand(2, 3, 2, 2), samples)
    assert sheet.shape == (3, 2 * 9 + 1, 8 * 9 + 1)
    assert torch.equal(sheet[:, 1:9, 1:9], x0[0])
    torch.testing.assert_close(sheet[:, 10:18, 19:27], samples[1].mean(0))
    torch.testing.assert_close(sheet[:, 10:18, 28:36], (5 * samples[1].std(0)).clamp(0, 1))
    assert contact_sheet(x0, torch.rand(2, 7), samples[:, :1]).isfinite().all()
    assert contact_sheet(x0, x0[:, :1], samples[:, :1]).shape == (3, 19, 46)
