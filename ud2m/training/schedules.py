"""Learning-rate schedule shared by all trainings."""

import math


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Return the factor on the peak rate at step n = 0, 1, ...: min(1, (n + 1) / warmup) (1 + cos(pi n / total)) / 2.

    A linear rise over ``warmup`` steps times half a cosine that is 0 at step ``total``. A function of the step alone,
    so that a resumed run needs no state of a scheduler.
    """
    return min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))
