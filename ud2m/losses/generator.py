"""The weighted sum of terms that trains the generator."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ud2m.losses.adversarial import Adversarial
from ud2m.losses.terms import Features, LossTerm, Prediction, _check_weight, _finite

Parts = Mapping[str, Callable[[], Any]]
TINY = 1e-20
LARGEST = 1e4
"""Largest factor on a term whose gradient has vanished: what is left of it may be rounding alone."""


class GeneratorLoss(nn.Module):
    """Weighted sum of named terms.

    With ``relative`` a weight is a share of the gradient: every term is divided by the root mean square r_i of its
    gradient at the outputs and multiplied by r_1, that of the first term, so ``adversarial: 0.3`` beside ``l2: 1``
    pulls 0.3 times as strongly as L2 does, at any crop size, penalty and stage of the training. (The adaptive weight of
    VQGAN, Esser et al., 2021, measured at the images and for all terms.) The factors r_1 / r_i are constants of the
    gradient.

    Args:
        terms: name -> (weight, term). A term may be given as a function without arguments that makes it; it
            is called only for a positive weight, and terms of weight 0 are dropped: they cost nothing.
        relative: weigh gradients in place of values.

    Raises:
        ValueError: when a weight is negative or not finite, or no weight is positive.
    """

    def __init__(self, terms: Mapping[str, tuple[float, LossTerm | Callable[[], nn.Module]]], relative: bool = False):
        super().__init__()
        for name, (weight, _) in terms.items():
            _check_weight(name, weight)
        self.weights = {name: float(weight) for name, (weight, _) in terms.items() if weight > 0}
        if not self.weights:
            raise ValueError(f"no loss term has a positive weight; set one of {', '.join(terms) or '(no terms given)'}")
        active = {name: terms[name][1] for name in self.weights}
        self.terms = nn.ModuleDict({n: t if isinstance(t, nn.Module) else t() for n, t in active.items()})
        self.relative = relative

    @property
    def num_outputs(self) -> int:
        """Number of outputs M per sample that the active terms need."""
        return max(term.num_outputs for term in self._active())

    @property
    def discriminator(self) -> nn.Module | None:
        """The discriminator that an active term is judged by, or None."""
        return next((term.discriminator for term in self._active() if isinstance(term, Adversarial)), None)

    def forward(
        self, prediction: Prediction, judged: bool = True, measured: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum, and the unweighted values of the terms (detached) by name.

        Args:
            prediction: the network's.
            judged: False: the adversarial term is in the values and not in the sum, while D learns.
            measured: add ``gradient/NAME``, the root mean square of each weighted term's gradient at the outputs. It
                says what a weight is worth: a term whose gradient is far below the others' changes nothing.

        Raises:
            ValueError: when the prediction holds fewer outputs than ``num_outputs``.
            NonFiniteLossError: naming the first term that is not finite.
        """
        if prediction.outputs.shape[1] < self.num_outputs:
            raise ValueError(f"the loss needs {self.num_outputs} outputs per sample, got {prediction.outputs.shape[1]}")
        values = {name: _finite(name, term(prediction)) for name, term in self.terms.items()}
        weights: dict[str, float | Tensor] = dict(self.weights)
        outputs, gradients = prediction.outputs, dict[str, Tensor]()
        if (self.relative or measured) and outputs.requires_grad:
            gradients = {name: _gradient(value, outputs) for name, value in values.items()}
        sizes = {name: gradient.square().mean().sqrt() for name, gradient in gradients.items()}
        if self.relative and sizes:
            first = next(iter(sizes.values()))
            factors = {n: (first / size.clamp_min(TINY)).clamp_max(LARGEST) for n, size in sizes.items()}
            weights = {name: weight * factors[name] for name, weight in self.weights.items()}
        counted = [name for name in values if judged or not self._is_adversarial(name)]
        total = _sum([weights[name] * values[name] for name in counted], outputs)
        if gradients:
            # the terms are not differentiated again: D and feature networks are what a step spends most on
            total = _with_gradient(total, outputs, _sum([weights[name] * gradients[name] for name in counted], outputs))
        values |= {f"gradient/{name}": weights[name] * size for name, size in sizes.items() if measured}
        return total, {name: value.detach() for name, value in values.items()}

    def _is_adversarial(self, name: str) -> bool:
        return isinstance(self.terms[name], Adversarial)

    def _active(self) -> Iterator[LossTerm]:
        return iter(self.terms.values())  # type: ignore[arg-type]  # typed as plain modules


def _gradient(value: Tensor, outputs: Tensor) -> Tensor:
    """Return d value / d outputs."""
    (gradient,) = torch.autograd.grad(value, outputs, retain_graph=True)
    return gradient


def _sum(parts: list[Tensor], outputs: Tensor) -> Tensor:
    """Return the sum of tensors of one shape; of none, a 0 that depends on the outputs."""
    return torch.stack(parts or [0 * outputs.sum()]).sum(0)


def _with_gradient(value: Tensor, outputs: Tensor, gradient: Tensor) -> Tensor:
    """Return a value whose gradient in the outputs is given."""
    linear = (outputs * gradient).sum()
    return value.detach() + linear - linear.detach()


def build_generator_loss(
    terms: Mapping[str, Mapping[str, Any]],
    features: Features,
    discriminator: Callable[..., nn.Module],
    relative: bool = False,
) -> GeneratorLoss:
    """Return the loss of a configuration (conf/loss): only terms of positive weight are made.

    Args:
        terms: name -> {``weight``: number, ``term``: partial of a ``LossTerm``}. A partial gets ``features``
            and ``discriminator`` if it has an argument of that name, and so do partials among its arguments.
        features: images -> list of feature maps.
        discriminator: makes the discriminator, from ``features`` if it has an argument of that name; called at most
            once, when the first active term asks for it.
        relative: weigh gradients in place of values.

    Raises:
        ValueError: as ``GeneratorLoss``.
    """
    own: dict[str, Callable[[], Any]] = {"features": lambda: features}
    parts: Parts = own | {"discriminator": cache(partial(_make, discriminator, own))}
    return GeneratorLoss({n: (e["weight"], partial(_make, e["term"], parts)) for n, e in terms.items()}, relative)


def _make(factory: Callable[..., nn.Module], parts: Parts) -> nn.Module:
    """Call a factory with the parts that its signature names; partials among its arguments come first."""
    bound = getattr(factory, "keywords", {})
    nested = {name: _make(value, parts) for name, value in bound.items() if isinstance(value, partial)}
    names = inspect.signature(factory).parameters
    given = {name: part() for name, part in parts.items() if name in names and name not in bound}
    return factory(**nested, **given)
