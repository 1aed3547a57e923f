import pytest
import torch
from tiny_training import distillation

from ud2m.training.random_streams import row_streams, stream


def test_random_streams_depend_on_the_key_alone():
    def draw(generator):
        return torch.rand(3, generator=generator)

    assert torch.equal(draw(stream("cpu", 1, "a", 2)), draw(stream("cpu", 1, "a", 2)))
    values = torch.stack(
        [draw(g) for g in row_streams("cpu", [0, 1, 2, 12], 1, "a")] + [draw(stream("cpu", 11, "a", 2))]
    )
    assert len(values.unique(dim=0)) == 5


@pytest.mark.parametrize("world", [1, 2, 4])
def test_streams_follow_the_dealing_of_rows_to_ranks(world, prior):
    # The data module deals position q of the stream to rank q mod world; rank 0's first row of batch 1 comes after
    # a whole batch of all ranks.
    from ud2m.data.sampler import StreamSampler

    module = distillation(prior, optimizer={"accumulate": 2})
    module.ema.num_updates += 3  # batches 6 and 7 are next
    local = 8 // world
    for rank in range(world):
        module._trainer = type("T", (), {"world_size": world, "global_rank": rank})()
        sampler = StreamSampler(8 * 10, 8, rank=rank, world_size=world)
        dealt = list(sampler)[7 * local : 8 * local]
        expected = [g.initial_seed() for g in row_streams("cpu", dealt, module.seed, "distillation")]
        assert [g.initial_seed() for g in module.streams(local, batch_idx=5)] == expected
    module._trainer = None
