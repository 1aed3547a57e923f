"""The data sets of the experiments at 256x256."""

import ud2m.cli  # noqa: F401  # its resolvers

DATA_SETS = ("imagenet256", "lsun_bedroom256", "ffhq256")
