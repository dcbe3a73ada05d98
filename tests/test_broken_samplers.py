"""A sampler that is broken on purpose is caught by the metrics: one way each, on the shipped checkpoint."""

from dataclasses import dataclass

import pytest
import torch

import tdpm_ext as tdpm
from benchmarks import judging, metrics, rivals
from tdpm_ext.pictures import to_unit

pytest.importorskip("k_diffusion", exc_type=ImportError)

COUNT, STEPS = 240, 5
WORSE = {"fd": 1, "kd": 1, "precision": -1, "recall": -1, "density": -1, "coverage": -1}


@dataclass
class Bench:
    """A sampler that works, its pictures, and what the judge says of them."""

    judge: judging.Judge
    model: object
    labels: torch.Tensor
    z: torch.Tensor
    sigmas: torch.Tensor
    x: torch.Tensor
    rows: dict

    def run(self, z=None, labels=None, sigmas=None) -> torch.Tensor:
        z, labels = self.z if z is None else z, self.labels if labels is None else labels
        sigmas = self.sigmas if sigmas is None else sigmas
        return rivals.run_sampler(self.model, "dpmpp_2m", sigmas, z, {"class_cond": labels}, batch=120).x

    def caught_by(self, x: torch.Tensor) -> set[str]:
        """The measures in which ``x`` is worse than the working sampler by more than the noise between seeds."""
        rows = self.judge.over_blocks(self.judge.features(x))
        return {n for n, sign in WORSE.items() if metrics.compare(rows[n], self.rows[n]) == sign}


@pytest.fixture(scope="module")
def bench():
    judge = judging.Judge.for_set("fashion-mnist", cache=None)
    judge.real = judge.real.take(judging.spread(len(judge.real), 1500))
    checkpoint = tdpm.open_checkpoint(judging.ROOT / "assets/fashion-mnist/denoiser.safetensors")
    z = rivals.noise_for(range(COUNT), checkpoint.shape)
    sigmas = rivals.karras_sigmas(STEPS, 40.0, 0.05, 5.0).float()
    out = Bench(judge, checkpoint.model, torch.arange(COUNT) % 10, z, sigmas, z, {})
    out.x = out.run()
    out.rows = judge.over_blocks(judge.features(out.x))
    return out


def test_the_working_sampler_passes_on_other_seeds_too(bench):
    other = bench.run(z=bench.z.flip(0))  # the same noise in another order: each seed gets another class
    assert not bench.caught_by(other)
    assert bench.judge.memorisation(bench.x).ratio > 0.8


def test_wrong_sigma_order_is_caught(bench):
    swapped = bench.sigmas[torch.tensor([0, 1, 3, 2, 4, 5])]
    assert {"fd", "kd"} <= bench.caught_by(bench.run(sigmas=swapped))


def test_a_dropped_mode_is_caught(bench):
    x, lost = bench.x.clone(), bench.labels == 1
    x[lost] = bench.run(z=bench.z[lost], labels=torch.full((int(lost.sum()),), 3))  # no trousers, twice as many dresses
    assert "fd" in bench.caught_by(x)


def test_duplicated_samples_are_caught(bench):
    once = torch.arange(COUNT) // 80 * 80 + torch.arange(COUNT) % 10  # in each block the same ten pictures
    caught = bench.caught_by(bench.x[once])
    assert {"coverage", "recall"} <= caught


def test_copied_training_pictures_are_caught(bench):
    chosen = judging.spread(len(bench.judge.fit), COUNT)
    copies = to_unit(bench.judge.fit.images[chosen][torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))])
    copies += 0.01 * torch.randn(copies.shape, generator=torch.Generator().manual_seed(1))
    assert not {"fd", "kd", "coverage", "recall"} & bench.caught_by(copies)  # real pictures look good to all of these
    found = bench.judge.memorisation(copies)
    assert found.ratio < 0.2 and found.copies > 0.95


def test_wrong_data_scaling_is_caught(bench):
    assert {"fd", "kd"} <= bench.caught_by((bench.x + 1) / 2)  # values in [0, 1] passed on as if in [-1, 1]
    assert "fd" in bench.caught_by(bench.x * 0.7)
