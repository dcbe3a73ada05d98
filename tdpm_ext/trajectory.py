"""`Trajectory`: what `sample` does, ready to be drawn again and again; on a GPU as one CUDA graph.

At a few evaluations and small batches a GPU waits for launches. Here the prior's transport, all denoiser calls and all
updates between them are captured once per batch size and replayed by a single launch; noise and conditions are copied
in. Whatever no graph may hold (hooks, weights on the CPU, gradients...) runs as usual, and ``reasons`` says why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tdpm_ext import route
from tdpm_ext.decide import seeded_noise
from tdpm_ext.sampler import check_budget, conditions_of, seeds_of, start_from
from tdpm_ext.solver import device_of, solve

MIXED = "mixed"  # of `ClosedFormPrior.branch`


class Trajectory:
    """``draw = Trajectory(model, prior, steps=4); x = draw(seed=[0, 1, 2, 3])``: the pictures of `sample`.

    Attributes:
        reasons: why calls so far ran without a graph, in words; empty if none did.
        stats: graphs captured, replays, eager calls.

    Args:
        model: ``model(x, sigma, **extra_args) -> denoised``, a ``torch.nn.Module``. For the fastest network
            accelerate it first, ``tdpm_ext.kernels.accelerate(model, graphs="off")``.
        prior: an ``ImplicitPrior``. One with a method ``branch`` (the mixtures and Gaussians) is part of the graph;
            another is called before it.
        steps: network evaluations per picture, the prior's own included.
        objective: which calibration table to use, "fidelity" or "quality".
        sigma_trunc: where to cut, instead of what the prior's table says.
        runtime: how graphs are captured, on whatever device; by default CUDA's, and none on a CPU.

    Raises:
        TypeError: a model that is no module: what it reads could not be known.
        ValueError: an unknown option, or a budget below the prior's own.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prior,
        steps: int = 4,
        *,
        objective: str = "fidelity",
        sigma_trunc: float | None = None,
        runtime=None,
    ):
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model is a {type(model).__name__}: give a torch.nn.Module, whose weights can be watched")
        check_budget(prior, steps, objective, sigma_trunc)
        self.model, self.prior = model, prior
        self._route = route.follow(route.plan_for(prior, steps, objective, sigma_trunc))
        self._refused: dict[str, None] = {}
        self._runtime, self._graphs = runtime, None

    def __call__(
        self, seed: int | Sequence[int] = 0, extra_args: dict | None = None, *, shape: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Draw pictures, all in one batch.

        Args:
            seed: of the first picture, counting up; or one seed per picture.
            extra_args: for the model: tensors on its device, and plain values. A graph is kept for each combination
                of plain values, such as ``cond_scale``, up to four.
            shape: [B, *prior.shape]; by default one picture per seed.

        Returns:
            float32 [B, *prior.shape] on the model's device.
        """
        z = seeded_noise(self.prior.shape, seeds_of(self.prior, shape, seed)).to(device_of(self.model))
        return self.from_noise(z, extra_args)

    @torch.no_grad()
    def from_noise(self, z: torch.Tensor, extra_args: dict | None = None) -> torch.Tensor:
        """The same from unit noise z [B, *prior.shape]."""
        extra_args = {} if extra_args is None else extra_args
        self.prior.check(z)
        if not z.is_cuda and self._runtime is None:
            return self._run(z, extra_args)
        return self._graphed(z, extra_args)

    @property
    def reasons(self) -> tuple[str, ...]:
        known = () if self._graphs is None else self._graphs.reasons
        return (*self._refused, *known)

    @property
    def stats(self):
        return None if self._graphs is None else self._graphs.stats

    def reset(self) -> None:
        """Drop the graphs and their memory."""
        if self._graphs is not None:
            self._graphs.reset()

    def _run(self, z: torch.Tensor, extra_args: dict, branch: str | None = None) -> torch.Tensor:
        x, history = start_from(self.prior, z, self._route, extra_args, branch=branch)
        return self._steps(x, [d for _, d in history], tuple(level for level, _ in history), extra_args)

    def _steps(self, x: torch.Tensor, past: list[torch.Tensor], levels: tuple, extra_args: dict) -> torch.Tensor:
        way = self._route
        history = list(zip(levels, past, strict=True))
        options = {"orders": way.orders, "history": history, "weights": way.weights}
        return solve(self.model, x, way.sigmas, extra_args, None, True, **options)

    def _graphed(self, z: torch.Tensor, extra_args: dict) -> torch.Tensor:
        from tdpm_ext.kernels.graphs import Baked

        if self._graphs is None:
            self._graphs = self._manager(z.device)
        # a model may branch on a number, so each value gets a graph of its own
        given = {name: Baked(value) if type(value) is float else value for name, value in extra_args.items()}
        if not self._inside:
            x, history = start_from(self.prior, z, self._route, extra_args)
            levels = Baked(tuple(float(level) for level, _ in history))
            return self._graphs(x, [d for _, d in history], levels, given)
        branch = self.prior.branch(len(z), **conditions_of(self.prior, extra_args))
        if branch == MIXED:
            self._refused["some pictures have a class that the prior knows and some have not"] = None
            return self._run(z, extra_args)
        return self._graphs(z, given, branch)

    @property
    def _inside(self) -> bool:
        """Whether the prior's draw can be part of the graph: it can say beforehand how its rows will move."""
        return hasattr(self.prior, "branch")

    def _manager(self, device: torch.device):
        from tdpm_ext.kernels.graphs import GraphedTrajectory

        if not self._inside:
            return GraphedTrajectory(self._steps, watch=(self.model,), runtime=self._runtime)
        tensors = self.prior.on(device).values()
        return GraphedTrajectory(self._run, watch=(self.model, *tensors), runtime=self._runtime)
