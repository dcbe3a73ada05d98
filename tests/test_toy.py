"""The toy study: its sets and distances obey their laws, its chains are the named ones, a run resumes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import records, toy, toy_sampling
from benchmarks.toy_data import DRAWN, STD, SlicedDistance, ToySet
from benchmarks.toy_nets import ToyDenoiser, ToyGenerator, denoising_loss
from benchmarks.toy_training import SIGMA_INIT, Training, generate, train_denoiser, train_prior
from tdpm_ext import IdealDenoiser

FEW = 6000


@pytest.fixture(scope="module")
def ring():
    return ToySet.make("ring", FEW)


@pytest.mark.parametrize("name", DRAWN)
def test_a_set_is_the_same_every_time_in_equal_parts_of_one_scale(name):
    one, two = ToySet.make(name, FEW), ToySet.make(name, FEW)
    assert torch.equal(one.train, two.train) and torch.equal(one.real, two.real)
    assert len(one.train) == 2 * len(one.real) == 4000
    both = torch.cat([one.train, one.real])
    assert torch.allclose(both.mean(0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(both.std(0), torch.full((2,), STD), rtol=1e-3)
    shares = np.bincount(torch.cat([one.train_parts, one.parts]).numpy()) / len(both)
    assert len(shares) == one.count and np.allclose(shares, 1 / one.count, atol=0.02)


@settings(max_examples=25, deadline=None)
@given(x=st.floats(-3, 3), y=st.floats(-3, 3), stretch=st.floats(0.2, 4))
def test_a_sliced_distance_measures_shifts_and_scales(ring, x, y, stretch):
    distance = SlicedDistance(ring.real)
    assert distance(ring.real) < 1e-6
    assert distance(ring.real + torch.tensor([x, y])) == pytest.approx(math.hypot(x, y) / math.sqrt(2), abs=1e-5)
    rms = float(ring.real.double().square().mean().sqrt())
    assert distance(stretch * ring.real) == pytest.approx(abs(stretch - 1) * rms, abs=1e-4)


def test_a_smaller_sample_is_compared_by_its_quantiles(ring):
    distance = SlicedDistance(ring.real)
    order = torch.randperm(len(ring.real), generator=torch.Generator().manual_seed(0))
    assert distance(ring.real[order[:1000]]) < 0.1 * STD
    with pytest.raises(ValueError, match="no more"):
        distance(torch.zeros(len(ring.real) + 1, 2))


def test_a_score_sees_a_lost_part_strays_and_what_is_not_finite(ring):
    good = ring.score(ring.train[:2000])
    assert good.coverage == 1 and good.stray < 0.005 and good.rarest > 0.8
    less = ring.score(ring.train[ring.train_parts != 3][:2000])
    assert less.coverage == 7 / 8 and less.rarest == 0 and less.sw > 1.5 * good.sw
    half = torch.cat([ring.train[:1000], torch.zeros(1000, 2)])
    assert ring.score(half).stray == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="1 of 3 samples"):
        ring.score(torch.tensor([[0.0, 0.0], [math.nan, 0.0], [1.0, 1.0]]))
    with pytest.raises(ValueError, match="no toy set"):
        ToySet.make("spiral")


class Gaussian(torch.nn.Module):
    """The exact denoiser of points of variance ``v`` around 0."""

    v = 0.25

    def forward(self, x, sigma):
        return x * (self.v / (self.v + sigma[:, None] ** 2))


def test_the_chain_of_ddpm_has_the_variance_of_its_posterior_draws():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40_000, 2, generator=generator)
    two = toy_sampling.ddpm(Gaussian(), 2, z, generator)
    high, low = toy_sampling.TABLE[[999, 499]].tolist()
    assert two.evaluations == 2
    # by hand: x at the middle level is posterior mean + posterior noise, then the last denoised estimate is taken
    shrink, v = Gaussian.v / (Gaussian.v + high**2), Gaussian.v
    middle = (shrink * (1 - low**2 / high**2) + low**2 / high**2) ** 2 * high**2 + low**2 * (1 - low**2 / high**2)
    assert two.x.var().item() == pytest.approx(middle * (v / (v + low**2)) ** 2, rel=0.02)
    assert toy_sampling.ddpm(Gaussian(), 250, z[:10_000], generator).x.var().item() == pytest.approx(v, rel=0.1)
    ode = toy_sampling.ddpm(Gaussian(), 7, z, None)
    assert ode.evaluations == 7 and torch.equal(ode.x, toy_sampling.ddpm(Gaussian(), 7, z, None).x)


def test_a_part_the_prior_never_draws_comes_back_at_high_noise_only(ring):
    points, parts, back = ring.train[:1500], ring.train_parts[:1500], []
    model = IdealDenoiser(points)
    for sigma in (0.1 * STD, 20 * STD):
        whole, less = toy_sampling.after_a_lost_part(model, points, parts, sigma, 12, 400, 0)
        back.append(ring.shares(less)[0][0] / ring.shares(whole)[0][0])
    assert back[0] < 0.02 and back[1] > 0.6


def test_training_is_a_function_of_its_seed_and_improves(ring):
    how = Training(denoiser_steps=150, denoiser_batch=128, prior_steps=3, prior_batch=16)
    noise = torch.randn(ring.real.shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.linspace(0.05, 2, len(noise))
    fresh, model = ToyDenoiser(), train_denoiser(ring.train, how, 1)
    assert denoising_loss(model, ring.real, sigma, noise) < 0.9 * denoising_loss(fresh, ring.real, sigma, noise)
    for kind in ("gan", "shared"):
        one, two = (train_prior(ring.train, kind, how, 2).state_dict() for _ in range(2))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_prior_is_one_network_call():
    z, calls = torch.randn(5, 2), []
    net = ToyDenoiser()
    net.register_forward_pre_hook(lambda _, given: calls.append(given))
    x = generate(net, z)
    assert x.shape == z.shape and len(calls) == 1
    assert torch.equal(calls[0][0], SIGMA_INIT * z) and bool((calls[0][1] == SIGMA_INIT).all())
    assert generate(ToyGenerator(), z).shape == z.shape


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    work = tmp_path_factory.mktemp("toy")
    words = ["--quick", "--sets", "ring", "--seeds", "2", "--work", str(work)]
    assert toy.main(words) == 0
    return work, words


def test_a_small_study_counts_every_evaluation_and_draws_its_figures(small):
    work, _ = small
    record = records.read(work / "quick.json")
    (ring,) = record["sets"]
    arms = {(a["arm"], a["budget"]): a for a in ring["arms"]}
    assert {arm for arm, _ in arms} == set(toy_sampling.TITLES)
    assert all(a["evaluations"] == budget for (_, budget), a in arms.items())
    assert all(len(a["at"]) == 2 and a["sw"]["sd"] is not None for a in arms.values())
    assert ring["floor"]["sw"]["mean"] < min(a["sw"]["mean"] for a in arms.values())
    for name in ("samples", "evaluations", "truncation"):
        assert (work / f"quick-{name}.png").stat().st_size > 10_000
        assert (work / f"quick-{name}.svg").read_text().startswith("<?xml")


def test_the_same_command_again_trains_and_draws_nothing(small, monkeypatch):
    work, words = small
    before = records.read(work / "quick.json")
    for name in ("train_denoiser", "train_prior"):
        monkeypatch.setattr(toy, name, None)
    assert toy.main(words) == 0
    assert records.read(work / "quick.json")["sets"] == before["sets"]
    (kept,) = {path.parent for path in work.rglob("ring-1.json")}
    (kept / "ring-1.json").unlink()  # as if interrupted: the networks are there, the measurements are made again
    assert toy.main(words) == 0
    assert records.read(work / "quick.json")["sets"] == before["sets"]


def test_a_study_of_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        toy.main(["--seeds", "0"])
    assert "give 1 or more" in capsys.readouterr().err
