"""The unfolded network: K LATINO modules around one shared denoiser, behind a warm start."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ud2m.numbers import is_whole
from ud2m.physics import Observation
from ud2m.random import Generators, randn_like
from ud2m.unfolded.conditioning import FEATURES, feature_values
from ud2m.unfolded.denoisers import Denoiser
from ud2m.unfolded.prox import joint_prox
from ud2m.unfolded.rules import RULES, Rule
from ud2m.unfolded.warm_start import WARM_STARTS, Start

REPLAY: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
"""How modules are checkpointed; no global random numbers are drawn in them."""


class LearnedProx(nn.Module):
    """Prox of the data terms with learned (delta, lam) [UD2M, section 3].

    Both are learned as log-factors on the initial rule, so they stay positive, start at the rule exactly and follow the
    noise levels that a call brings: delta = rule exp(log_delta + slope_delta . features). The slopes, 0 at first, are
    there when the network is conditioned on features of the problem (``ud2m.unfolded.conditioning``).
    """

    learned: tuple[str, ...] = ("delta", "lam")

    def __init__(self, num_features: int = 0) -> None:
        super().__init__()
        for name in self.learned:
            self.register_parameter(f"log_{name}", nn.Parameter(torch.zeros(())))
            if num_features:
                self.register_parameter(f"slope_{name}", nn.Parameter(torch.zeros(num_features)))

    def factor(self, name: str, features: Tensor) -> Tensor:
        """Return the factor [B] on the rule's delta, lam or tau, for features [B, F]."""
        log = self.get_parameter(f"log_{name}").expand(len(features))
        if features.shape[1]:
            log = log + features @ self.get_parameter(f"slope_{name}")
        return log.exp()

    def prox(
        self,
        x: Tensor,
        x_sigma: Tensor,
        sigma: Tensor,
        observation: Observation,
        initial_delta: Tensor,
        features: Tensor,
    ) -> Tensor:
        """Return u [B, C, H, W] near x; ``initial_delta`` is the rule's, [B]."""
        delta = initial_delta * self.factor("delta", features)
        return joint_prox(observation, x_sigma, sigma, delta, self.factor("lam", features))(x)


class LatinoModule(LearnedProx):
    """One step of LATINO [LATINO, algorithm 1; UD2M, section 3] with learned (delta_k, tau_k, lam_k).

    u = prox of the data terms at x; z = u + tau_k eps; x' = denoiser(z, tau_k).
    """

    learned = ("delta", "lam", "tau")

    def forward(
        self,
        x: Tensor,
        x_sigma: Tensor,
        sigma: Tensor,
        observation: Observation,
        initial: tuple[Tensor, Tensor],
        features: Tensor,
        denoiser: Denoiser,
        eps: Tensor,
    ) -> Tensor:
        """Return x^(k) [B, C, H, W] from x = x^(k-1); ``initial`` is the rule's (delta_k, tau_k), each [B]."""
        u = self.prox(x, x_sigma, sigma, observation, initial[0], features)
        tau = initial[1] * self.factor("tau", features)
        return denoiser(u + tau.view(-1, 1, 1, 1) * eps, tau)


class UnfoldedNetwork(nn.Module):
    """L(x_sigma, y): K LATINO modules that share one denoiser, unrolled from a warm start [UD2M, section 3].

    Differs from [UD2M, section 3], where the last network's output is the result: with a rule that has a closing step a
    prox follows, as LATINO ends with one too.

    Args:
        denoiser: ``denoiser(x_sigma, sigma [B]) -> x0_hat``, usually a ``Prior`` with its adapter.
        num_blocks: K >= 1.
        rule: initial (delta_k, tau_k).
        warm_start: module that makes x^(0); the same one at training and at sampling.
        conditioning: names of the features that psi depends on, from ``ud2m.unfolded.conditioning.FEATURES``. Differs
            from [UD2M], where psi is one number each: that suits one operator and one noise level.
        kept_modules: so many modules, the last ones, keep their activations for the backward pass; the others keep
            their inputs and are evaluated again in it: memory hardly grows with K, and the gradients are the same.
            None: all keep them.
        spec: plain description of this network, for exports (``build_network``).

    Raises:
        ValueError: for unknown features, and numbers below 1.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        num_blocks: int,
        rule: Rule,
        warm_start: Start,
        conditioning: Sequence[str] = (),
        kept_modules: int | None = None,
        spec: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        unknown = [name for name in conditioning if name not in FEATURES]
        if unknown:
            raise ValueError(f"psi cannot be conditioned on {unknown}; choose from {', '.join(FEATURES)}")
        if num_blocks < 1:
            raise ValueError(f"num_blocks (K) must be at least 1, got {num_blocks}")
        if kept_modules is not None and kept_modules < 1:
            raise ValueError(f"kept_modules must be at least 1, got {kept_modules}")
        self.spec, self.kept_modules = dict(spec or {}), kept_modules
        self.denoiser = denoiser
        self.conditioning = tuple(conditioning)
        self.blocks = nn.ModuleList(LatinoModule(len(conditioning)) for _ in range(num_blocks))
        self.closing = LearnedProx(len(conditioning)) if rule.closes else None
        self.rule = rule
        self.warm_start = warm_start

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.blocks)

    @property
    def evaluations(self) -> int:
        """Network evaluations of one call: K, and one more where a network makes the warm start."""
        return self.num_blocks + self.warm_start.evaluations

    def forward(
        self,
        x_sigma: Tensor,
        sigma: Tensor,
        observation: Observation,
        generator: Generators = None,
        start: Tensor | None = None,
        denoiser: Denoiser | None = None,
        step_scale: float = 1.0,
    ) -> Tensor:
        """Return one draw of x0_hat [B, C, H, W] for x_sigma = x0 + sigma eps and y = A x0 + sigma_y w.

        Args:
            x_sigma: [B, C, H, W].
            sigma: its noise levels [B], image units.
            observation: y with its operator and noise level.
            generator: source of the inner noise.
            start: x^(0), for callers that share one among several draws.
            denoiser: in place of the network's own, as one that sees tiles or random orientations of images
                (``ud2m.unfolded.denoisers``). Its modules are never evaluated again, as it may draw random numbers.
            step_scale: factor on the modules' delta_k (not on that of the closing prox): above 1 each keeps less of the
                last network's output and the draws differ more.
        """
        features = feature_values(self.conditioning, x_sigma, sigma, observation)
        x = self.warm_start(x_sigma, sigma, observation) if start is None else start
        for k, block in enumerate(self.blocks):
            delta, tau = self.rule(k, self.num_blocks, sigma, observation.sigma_y)
            eps = randn_like(x_sigma, generator)  # here: a module that is evaluated a second time must meet it again
            initial = (step_scale * delta, tau)
            inputs = (x, x_sigma, sigma, observation, initial, features, denoiser or self.denoiser, eps)
            replayed = denoiser is None and self._is_replayed(k)
            x = checkpoint(block, *inputs, **REPLAY) if replayed else block(*inputs)
        if self.closing is None:
            return x
        closing = self.rule.closing(sigma, observation.sigma_y)
        return self.closing.prox(x, x_sigma, sigma, observation, closing, features)

    def _is_replayed(self, k: int) -> bool:
        """Return whether module k is evaluated again in the backward pass."""
        if self.kept_modules is None or not torch.is_grad_enabled():
            return False
        return k < self.num_blocks - self.kept_modules

    def own_state(self) -> dict[str, Tensor]:
        """Return the parameters that are not the denoiser's: psi, and those of a learned warm start."""
        foreign = ("denoiser.", "warm_start.") if self.warm_start.frozen else ("denoiser.",)
        return {k: v for k, v in self.state_dict().items() if not k.startswith(foreign)}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what ``own_state`` returned; raises ValueError when names or shapes differ."""
        own = self.own_state()
        if state.keys() != own.keys() or any(state[k].shape != own[k].shape for k in own):
            odd = sorted(state.keys() ^ own.keys())
            raise ValueError(f"the trained parameters do not fit this network; unmatched: {odd[:6]}")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])

    def fitted(self, state: Mapping[str, Tensor], conditioning: Sequence[str]) -> dict[str, Tensor]:
        """Return another network's ``own_state`` as one of this network, with which psi is the same function.

        The warm start is this network's where the other's has other weights.

        Args:
            state: of the other network.
            conditioning: its features, each of which this network has too; the slopes of further ones are 0.
        """
        mine, theirs = _of_start(self.own_state()), _of_start(state)
        fits = {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
        psi = {k: v for k, v in state.items() if k not in theirs and "slope_" not in k}
        for name, slope in self.own_state().items():
            if "slope_" in name:
                known = dict(zip(conditioning, state.get(name, ()), strict=True))
                psi[name] = torch.stack([known.get(feature, slope.new_zeros(())) for feature in self.conditioning])
        return psi | (theirs if fits else mine)

    def psi(self) -> dict[str, float]:
        """Return the learned factors on the rule where all features are 0, for logs: e.g. ``{"delta_1": 0.8, ...}``."""
        parts = {str(k): cast(LearnedProx, block) for k, block in enumerate(self.blocks, start=1)}
        if self.closing is not None:
            parts["closing"] = self.closing
        return {
            f"{name}_{part}": module.get_parameter(f"log_{name}").exp().item()
            for part, module in parts.items()
            for name in module.learned
        }


def _of_start(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k.startswith("warm_start.")}


def build_network(denoiser: nn.Module, spec: Mapping[str, Any], kept_modules: int | None = None) -> UnfoldedNetwork:
    """Build a network from plain values, which an export stores: names instead of code.

    Args:
        denoiser: see ``UnfoldedNetwork``.
        spec: ``{"num_blocks": K, "rule": {"name": ..., **options}, "warm_start": {"name": ..., **options}}`` with names
            from ``RULES`` and ``WARM_STARTS``, and ``"conditioning": [...]`` where psi depends on features.
        kept_modules: see ``UnfoldedNetwork``.

    Raises:
        ValueError: for an unknown name or option.
    """
    if not isinstance(spec, Mapping) or spec.keys() - {"conditioning"} != {"num_blocks", "rule", "warm_start"}:
        raise ValueError(f"a network is described by num_blocks, rule and warm_start, got {spec!r}")
    if not is_whole(spec["num_blocks"]):
        raise ValueError(f"num_blocks (K) must be an integer, got {spec['num_blocks']!r}")
    rule, warm_start = _build("rule", RULES, spec["rule"]), _build("warm_start", WARM_STARTS, spec["warm_start"])
    conditioning = list(spec.get("conditioning") or [])
    start = {"name": spec["warm_start"]["name"]} | warm_start.stored_options(dict(spec["warm_start"]))
    stored = {"num_blocks": spec["num_blocks"], "rule": dict(spec["rule"]), "warm_start": start}
    stored |= {"conditioning": conditioning} if conditioning else {}
    return UnfoldedNetwork(denoiser, spec["num_blocks"], rule, warm_start, conditioning, kept_modules, stored)


def _build(kind: str, registry: Mapping[str, Callable[..., Any]], options: Mapping[str, Any]) -> Any:
    name = options.get("name") if isinstance(options, Mapping) else None
    if not isinstance(name, str) or name not in registry:
        raise ValueError(f"unknown {kind} {options!r}; give {{name: ...}} with one of the names {', '.join(registry)}")
    options = {key: value for key, value in options.items() if key != "name"}
    try:
        return registry[name](**options)
    except TypeError as error:
        raise ValueError(f"{kind} {name!r} does not take these options: {options} ({error})") from error
