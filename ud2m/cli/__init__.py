"""The roof: the only readers of Hydra configurations."""

from omegaconf import OmegaConf

OmegaConf.register_new_resolver("mul", lambda *factors: _product(factors), replace=True)
OmegaConf.register_new_resolver("floordiv", lambda a, b: int(a) // int(b), replace=True)


def _product(factors: tuple) -> int:
    product = 1
    for factor in factors:
        product *= int(factor)
    return product
