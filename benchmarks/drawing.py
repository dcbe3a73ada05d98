"""Which pictures a benchmark draws, as one value that can be kept in a file, and how they are drawn.

A picture is a function of its seed, the checkpoint and the ``Request``: never of the batch it was drawn in or of the
process that drew it. Its noise comes from a CPU generator of its own, its class from its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import torch

import tdpm_ext as tdpm
from benchmarks import diffusers_rivals
from benchmarks.rivals import CountCalls, RivalRun, noise_for
from benchmarks.samplers import SAMPLERS, sigmas_for
from tdpm_ext.pictures import class_sequence

PERIOD = 10_000  # seeds after which the sequence of classes begins again
TDPM = "tdpm"


@dataclass(frozen=True)
class Request:
    """One sampler with all its settings.

    Attributes:
        sampler: "tdpm", a name in ``samplers.SAMPLERS``, or one of ``diffusers_rivals.STRAW_MEN``.
        budget: most evaluations per picture.
        objective: of the plan (tdpm only). prior: its fingerprint or file (tdpm only; says which, draws nothing).
        sigmas: noise levels (rivals only), decreasing to 0. options: of the rival's own.
        grid, sigma_max, sigma_min: how ``sigmas`` came about; kept for the record.
        cond_scale: guidance. label: one class for all pictures, instead of the data's proportions.
    """

    sampler: str
    budget: int
    objective: str | None = None
    prior: str | None = None
    sigmas: tuple[float, ...] = ()
    options: dict = field(default_factory=dict)
    grid: str | None = None
    sigma_max: float | None = None
    sigma_min: float | None = None
    cond_scale: float = 1.0
    label: int | None = None

    @classmethod
    def rival(cls, sampler: str, budget: int, grid: str = "karras-7", sigma_max: float = 80.0, sigma_min: float = 0.02,
              options: dict | None = None, **more) -> Request:  # fmt: skip
        """A rival on a named grid, with as many steps as the budget allows.

        Raises ValueError: unknown sampler, or a budget below its cheapest run.
        """
        if sampler in diffusers_rivals.STRAW_MEN:
            return cls(sampler, diffusers_rivals.STRAW_MEN[sampler][1], **more)
        if sampler not in SAMPLERS:
            known = ", ".join([TDPM, *SAMPLERS, *diffusers_rivals.STRAW_MEN])
            raise ValueError(f"unknown sampler {sampler!r}: choose from {known}")
        steps = SAMPLERS[sampler].steps_within(budget)
        if steps < 1:
            raise ValueError(f"{sampler} cannot run within {budget} evaluations: give more")
        sigmas = tuple(sigmas_for(grid, steps, sigma_max, sigma_min).tolist())
        return cls(sampler, budget, None, None, sigmas, options or {}, grid, sigma_max, sigma_min, **more)

    def to_json(self) -> dict:
        return {**asdict(self), "sigmas": list(self.sigmas)}

    @classmethod
    def from_json(cls, value: dict) -> Request:
        return cls(**{**value, "sigmas": tuple(value.get("sigmas", ()))})


@dataclass
class Drawer:
    """A denoiser ready to draw requests.

    Attributes:
        model: ``model(x, sigma, **extra_args)``. shape: [C, H, W] of one picture.
        num_classes: 0 for an unconditional model. labels: classes of the real pictures, whose proportions are kept.
        prior: for "tdpm".
    """

    model: Callable
    shape: tuple[int, ...]
    num_classes: int = 0
    labels: torch.Tensor | None = None
    prior: object | None = None
    device: torch.device = torch.device("cpu")

    def __post_init__(self):
        self._classes = class_sequence(self.labels, self.num_classes, PERIOD) if self.num_classes else None
        self._noise: tuple = ([], None)

    def classes(self, seeds: Iterable[int]) -> torch.Tensor | None:
        """The class of each seed [N], or None."""
        return None if self._classes is None else self._classes[[int(s) % PERIOD for s in seeds]]

    def arguments(self, request: Request, seeds: list[int]) -> dict:
        args = {}
        if self.num_classes:
            own = self.classes(seeds) if request.label is None else torch.full((len(seeds),), request.label)
            args["class_cond"] = own.to(self.device)
        return args | ({"cond_scale": request.cond_scale} if request.cond_scale != 1 else {})

    def noise(self, seeds: list[int]) -> torch.Tensor:
        """Unit noise of the seeds on the device; the last is kept, because a search asks for it again and again."""
        if self._noise[0] != seeds:
            self._noise = seeds, noise_for(seeds, self.shape).to(self.device)
        return self._noise[1]

    @torch.no_grad()
    def draw(self, request: Request, seeds: Iterable[int], batch: int | None = None) -> RivalRun:
        """Finished pictures [N, C, H, W] on the CPU, and the evaluations counted; ``batch`` at a time (default all).

        Raises RuntimeError if more evaluations were made than the request's budget.
        """
        seeds = [int(s) for s in seeds]
        counted, args, batch = CountCalls(self.model), self.arguments(request, seeds), batch or len(seeds)
        z = self.noise(seeds)
        if request.sampler == TDPM:
            if self.prior is None:
                raise ValueError("the sampler tdpm needs a prior: give one")
            x = tdpm.sample(
                counted, self.prior, (len(seeds), *self.shape), request.budget, seeds, args, batch=batch, disable=True,
                objective=request.objective or "fidelity", device=self.device,
            )  # fmt: skip
            nfe = counted.calls // -(-len(seeds) // batch) + self.prior.prior_nfe
        elif request.sampler in diffusers_rivals.STRAW_MEN:
            x, nfe = diffusers_rivals.run_straw_man(self.model, request.sampler, z, args, batch, seeds)
        else:
            x, nfe = SAMPLERS[request.sampler].run(self.model, request.sigmas, z, args, batch, request.options, seeds)
        if nfe > request.budget:
            raise RuntimeError(f"{request.sampler} made {nfe} evaluations with a budget of {request.budget}")
        return RivalRun(x.float().cpu(), nfe)
