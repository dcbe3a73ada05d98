"""Learned priors: a seed is a picture, one network call, one file, and nothing is taken for another's network."""

from __future__ import annotations

import json
import logging
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tdpm_ext as tdpm
from tdpm_ext.decide import seeded_noise
from tdpm_ext.pictures import Pictures
from tdpm_ext.plan import Plan
from tdpm_ext.priors import GeneratorPrior, RawPrior, SharedPrior, SourcePrior
from tdpm_ext.priors.base import HISTORY_RATIO
from tdpm_ext.priors.io import KEY, PriorFileError
from tdpm_ext.priors.learned import shuffled
from tdpm_ext.priors.networks import Generator
from tdpm_ext.schedule import karras
from tdpm_ext.solver import solve
from tests.tiny_denoiser import CLASSES, SHAPE, tiny_base, tiny_checkpoint, tiny_pictures

KINDS = ("generator", "shared", "lora", "joint", "source", "raw-generator", "raw-shared")
CHECKPOINT, BASE = tiny_checkpoint(), tiny_base()


def stirred(prior):
    """Weights that differ from the untrained ones, where untrained means "does nothing"."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return prior


def make(kind: str, noise: str = "fresh"):
    settings = {"sigma_trunc": 0.3, "sigma_init": 1.0, "base": BASE, "noise": noise}
    if kind.startswith("raw"):
        return RawPrior(make(kind.removeprefix("raw-"), noise))
    if kind == "generator":
        network = Generator(SHAPE, num_classes=CLASSES, width=16, depth=1).requires_grad_(False)
        return stirred(GeneratorPrior(network, SHAPE, **settings))
    if kind == "source":
        return SourcePrior(SHAPE, **settings).bind(CHECKPOINT.model)
    if kind == "joint":
        return SharedPrior.joint(CHECKPOINT.model, SHAPE, **settings)
    return stirred(SharedPrior.create(CHECKPOINT.model, SHAPE, **settings, rank=2 if kind == "lora" else 0))


def noise(count: int = 6) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def labels(count: int = 6) -> torch.Tensor:
    return torch.arange(count) % CLASSES


@pytest.mark.parametrize("way", ["fresh", "kept"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_a_picture_in_any_batch(kind, way):
    prior = make(kind, way)
    together = prior.sample(noise(), class_cond=labels())
    alone = [prior.sample(noise()[i : i + 1], class_cond=labels()[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert together.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_prior_draws_the_same_pictures(kind, tmp_path):
    prior = make(kind)
    prior.card["checkpoint"] = CHECKPOINT.fingerprint
    path = tdpm.save_prior(prior, tmp_path / "prior.safetensors")
    loaded = tdpm.load_prior(path).bind(CHECKPOINT.model, CHECKPOINT.fingerprint)
    assert (loaded.kind, loaded.prior_nfe) == (prior.kind, 1)
    for cond in ({}, {"class_cond": labels()}, {"class_cond": labels(), "cond_scale": 2.0}):
        torch.testing.assert_close(loaded.sample(noise(), **cond), prior.sample(noise(), **cond), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["shared", "lora", "joint", "raw-shared"])
def test_a_shared_prior_knows_its_denoiser_again(kind, tmp_path):
    prior = make(kind)
    prior.card["checkpoint"] = CHECKPOINT.fingerprint
    path, other = tdpm.save_prior(prior, tmp_path / "prior.safetensors"), tiny_checkpoint(1)
    loaded = tdpm.load_prior(path)
    with pytest.raises(ValueError, match=r"call prior.bind\(model\)"):
        loaded.sample(noise())
    with pytest.raises(ValueError, match="size of a weight tensor differs"):
        loaded.bind(other.model)
    with pytest.raises(ValueError, match="trained for checkpoint tiny-0, not for tiny-1"):
        loaded.bind(CHECKPOINT.model, other.fingerprint)
    with pytest.raises(ValueError, match="parameters"):
        loaded.bind(nn.Linear(2, 2))
    half = tiny_checkpoint().model
    with torch.no_grad():
        for parameter in half.parameters():
            parameter.copy_(parameter.half())
    assert loaded.bind(half).ready  # the same weights, held less precisely


def test_the_denoiser_itself_is_left_alone():
    before = {name: value.clone() for name, value in CHECKPOINT.model.state_dict().items()}
    for kind in ("shared", "lora"):
        make(kind).sample(noise(), class_cond=labels())
    after = CHECKPOINT.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert not any(p.requires_grad for p in CHECKPOINT.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [2, 3, 5])
def test_the_priors_own_call_counts(kind, steps):
    prior, calls = make(kind), []
    owner = prior.inner if kind.startswith("raw") else prior
    inner = owner.emit
    owner.emit = lambda start, **cond: (calls.append("prior"), inner(start, **cond))[1]
    handle = CHECKPOINT.model.register_forward_hook(lambda *_: calls.append("denoiser"))
    out = tdpm.sample(CHECKPOINT.model, prior, steps=steps, seed=[1, 2], extra_args={"class_cond": labels(2)})
    handle.remove()
    hooked = kind in ("joint", "source")  # there the prior's call is one of the denoiser's own
    assert (calls.count("prior"), calls.count("denoiser")) == (1, steps - 1 + hooked)
    assert out.shape == (2, *SHAPE)
    with pytest.raises(ValueError, match="the prior itself makes 1 network calls"):
        tdpm.sample(CHECKPOINT.model, prior, steps=1)


def test_a_sampler_runs_as_usual_while_the_prior_has_no_network(tmp_path, caplog):
    prior = tdpm.load_prior(tdpm.save_prior(make("lora"), tmp_path / "prior.safetensors"))
    x, sigmas = noise(2) * 20, torch.tensor([20.0, 3.0, 0.5, 0.0])
    with caplog.at_level(logging.WARNING, "tdpm_ext"):
        out = tdpm.sample_tdpm(CHECKPOINT.model, x, sigmas, disable=True, prior=prior)
    torch.testing.assert_close(out, solve(CHECKPOINT.model, x, sigmas, disable=True))
    assert "has no network yet" in caplog.text


def test_the_host_path_and_sample_agree():
    prior, seeds = make("shared", "kept"), [4, 9]
    cond = {"class_cond": labels(2), "cond_scale": 1.5}
    mine = tdpm.sample(CHECKPOINT.model, prior, steps=3, seed=seeds, extra_args=cond)
    z = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    sigmas = torch.tensor([20.0, 3.0, 0.5, 0.0])
    theirs = tdpm.sample_tdpm(CHECKPOINT.model, z * 20, sigmas, extra_args=cond, disable=True, prior=prior)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_untrained_kept_noise_is_the_closed_forms_own_step():
    prior = SharedPrior.create(CHECKPOINT.model, SHAPE, 0.3, 1.0, base=BASE, noise="kept")
    x, history = BASE.start(noise(), 1.0, (HISTORY_RATIO,), class_cond=labels())
    step = solve(CHECKPOINT.model, x, [1.0, 0.3], {"class_cond": labels()}, disable=True, history=history)
    torch.testing.assert_close(prior.sample(noise(), class_cond=labels()), step, rtol=1e-4, atol=1e-4)


def test_kept_noise_gives_the_solver_its_past_and_fresh_noise_none():
    kept, fresh = make("shared", "kept"), make("shared", "fresh")
    x, seen = kept.start(noise(), 0.3, (0.5, 0.8), class_cond=labels())
    assert [level for level, _ in seen] == [1.0, HISTORY_RATIO]
    torch.testing.assert_close(seen[0][1], kept.emit(kept.begin(noise(), class_cond=labels()), class_cond=labels()))
    torch.testing.assert_close(x, kept.sample(noise(), 0.3, class_cond=labels()))
    assert fresh.start(noise(), 0.3, (0.5, 0.8))[1] == []
    plan = Plan((0.3, 0.1, 0.0), (2, 2), (0.5, 0.8))
    kept.plans = {"fidelity": {2: plan}}
    z = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))])
    x, seen = kept.start(z, 0.3)
    by_hand = solve(CHECKPOINT.model, x, plan.sigmas, disable=True, orders=plan.orders, history=seen)
    torch.testing.assert_close(tdpm.sample(CHECKPOINT.model, kept, steps=3, seed=4), by_hand)


def test_an_untrained_generator_is_the_closed_forms_estimate():
    network = Generator(SHAPE, num_classes=CLASSES, width=16, depth=1)
    prior = GeneratorPrior(network, SHAPE, 0.3, 1.0, base=BASE)
    start = prior.begin(noise(), class_cond=labels())
    torch.testing.assert_close(prior.emit(start, class_cond=labels()), BASE.denoise(start.x, 1.0, class_cond=labels()))


@given(st.sampled_from([0.05, 0.3, 0.9]), st.integers(0, 5))
def test_fresh_noise_is_exactly_what_stands_on_the_clean_picture(sigma, seed):
    prior = make("generator")
    z = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(seed))
    picture = prior.emit(prior.begin(z))
    torch.testing.assert_close(prior.sample(z, sigma), picture + sigma * shuffled(z))


def test_shuffled_noise_is_white_and_the_same_everywhere():
    z = torch.randn(4000, *SHAPE, generator=torch.Generator().manual_seed(0))
    out = shuffled(z).flatten(1)
    assert torch.allclose(torch.corrcoef(out.T), torch.eye(64), atol=0.08)
    assert torch.equal(out.abs().sort(1).values, z.flatten(1).abs().sort(1).values)
    assert shuffled(torch.arange(64.0).reshape(1, *SHAPE)).flatten()[:4].tolist() == [36.0, -18.0, 4.0, 43.0]


def test_guidance_reaches_the_generator():
    prior = make("generator")
    start = prior.begin(noise(), class_cond=labels())
    free, plain = prior.emit(start), prior.emit(start, class_cond=labels())
    guided = prior.emit(start, class_cond=labels(), cond_scale=3.0)
    torch.testing.assert_close(guided, free + 3 * (plain - free))
    assert not torch.allclose(free, plain)


def test_a_condition_may_be_an_embedding():
    network = Generator(SHAPE, cond_width=5, width=16, depth=1)
    prior = stirred(GeneratorPrior(network.requires_grad_(False), SHAPE, 0.3, 1.0, cond_name="cross_cond"))
    words = torch.randn(6, 7, 5, generator=torch.Generator().manual_seed(2))
    by_words, by_mean = prior.sample(noise(), cross_cond=words), prior.sample(noise(), cross_cond=words.mean(1))
    torch.testing.assert_close(by_words, by_mean)
    assert not torch.allclose(by_mean, prior.sample(noise()))


def test_a_kind_that_is_trained_cannot_be_fitted():
    with pytest.raises(ValueError, match="is not fitted: tdpm train"):
        tdpm.fit_prior("generator", torch.zeros(4, *SHAPE))


def test_levels_out_of_reach_are_refused():
    with pytest.raises(ValueError, match="up to its sigma_init 1"):
        make("generator").sample(noise(), 1.5)
    with pytest.raises(ValueError, match="its own sigma_trunc 0.3 alone"):
        make("raw-generator").sample(noise(), 0.2)
    with pytest.raises(ValueError, match="must not fall in this order"):
        SourcePrior(SHAPE, 2.0, 1.0)


def test_a_source_that_gives_something_else_is_named():
    with pytest.raises(ValueError, match=r"the source gave \(6, 3\)"):
        SourcePrior(SHAPE, 0.3, 1.0).bind(lambda x, sigma, **_: torch.zeros(6, 3)).sample(noise())
    with pytest.raises(ValueError, match="give a callable"):
        SourcePrior(SHAPE, 0.3, 1.0).bind(3)


def test_calibration_counts_the_priors_call_and_stays_in_reach():
    for kind in ("shared", "raw-shared"):
        prior = make(kind, "kept")
        settings = {"num_classes": CLASSES, "samples": 4, "progress": False}
        tdpm.calibrate(prior, CHECKPOINT.model, (2, 3), **settings)
        plans = prior.plans["fidelity"]
        assert sorted(plans) == [1, 2] and all(plan.steps == budget for budget, plan in plans.items())
        assert all(prior.starts_at(plan.sigma_trunc) for plan in plans.values())
        out = tdpm.sample(CHECKPOINT.model, prior, steps=3, seed=[0, 1], extra_args={"class_cond": labels(2)})
        assert out.isfinite().all()
        with pytest.raises(ValueError, match="each at least 2"):
            tdpm.calibrate(prior, CHECKPOINT.model, (1,), **settings)


def test_calibration_goes_on_from_what_the_stand_in_ranks_first(monkeypatch):
    prior, settings = make("shared", "kept"), {"num_classes": CLASSES, "samples": 8, "progress": False}
    tdpm.calibrate(prior, CHECKPOINT.model, (3,), **settings)
    found = prior.plans["fidelity"][2].error
    monkeypatch.setattr(sys.modules["tdpm_ext.calibrate"], "_walk", lambda job, trajectories, held, plans: plans[0])
    tdpm.calibrate(prior, CHECKPOINT.model, (3,), **settings)
    assert found < prior.plans["fidelity"][2].error


def test_calibration_cuts_where_training_has_looked():
    prior, (images, classes) = make("shared"), tiny_pictures()
    data = Pictures(images, classes, [str(k) for k in range(CLASSES)])
    assert prior.sigma_trunc in prior.cuts(0.5) and min(prior.cuts(0.5)) < 0.1  # no card, no word of training
    prior.card["training"] = {"adversarial": 1.0, "sigma_low": 0.25, "sigma_high": 0.5}
    assert min(prior.cuts(0.5)) >= 0.25 and prior.sigma_trunc in prior.cuts(0.5)
    tdpm.calibrate(
        prior, CHECKPOINT.model, (2, 3), objective="quality", data=data, samples=24, num_classes=CLASSES, progress=False
    )
    assert all(plan.sigma_trunc >= 0.25 for plan in prior.plans["quality"].values())
    prior.card["training"] = "nonsense of an untrusted file"
    assert min(prior.cuts(0.5)) < 0.1


def test_the_shipped_size_of_generator_costs_less_than_half_of_the_denoiser():
    checkpoint = tdpm.open_checkpoint("assets/fashion-mnist/denoiser.safetensors")
    x, sigma, label = torch.zeros(2, 1, 28, 28), torch.ones(2), torch.zeros(2, dtype=torch.long)
    network = Generator((1, 28, 28), num_classes=10)
    costs = []
    for call in (lambda: network(x, sigma, label), lambda: checkpoint.model(x, sigma, class_cond=label)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        costs.append(counter.get_total_flops())
    assert costs[0] <= 0.5 * costs[1]


def test_the_shipped_learned_prior_belongs_to_the_shipped_checkpoint():
    checkpoint = tdpm.open_checkpoint("assets/fashion-mnist/denoiser.safetensors")
    prior = tdpm.load_prior("assets/fashion-mnist/prior-shared.safetensors", expect_checkpoint=checkpoint.fingerprint)
    assert (prior.kind, prior.card["added_parameters"], sorted(prior.plans["quality"])) == ("shared", 0, [1, 2])
    prior.bind(checkpoint.model, checkpoint.fingerprint)
    extra = {"class_cond": torch.arange(10)}
    x = tdpm.sample(checkpoint.model, prior, steps=2, seed=list(range(10)), extra_args=extra, objective="quality")
    assert x.abs().max() < 1.5 and x.std() > 0.4  # pictures in [-1, 1], neither noise nor grey


def test_the_shipped_regression_prior_is_nearer_to_the_checkpoints_own_pictures_than_the_closed_form():
    checkpoint = tdpm.open_checkpoint("assets/fashion-mnist/denoiser.safetensors")
    files = ("prior-regression", "prior")
    learned, closed = (tdpm.load_prior(f"assets/fashion-mnist/{name}.safetensors") for name in files)
    learned.bind(checkpoint.model, checkpoint.fingerprint)
    assert learned.coupled and learned.card["added_parameters"] == 0
    seeds, extra = list(range(200, 220)), {"class_cond": torch.arange(20) % 10}
    z, levels = seeded_noise(checkpoint.shape, seeds), karras(30, 80.0, 0.02)
    own = solve(checkpoint.model, 80.0 * z, levels, extra, None, True)
    settings = {"seed": seeds, "extra_args": extra, "objective": "fidelity", "disable": True}
    for steps in (2, 3):
        near, far = (tdpm.sample(checkpoint.model, p, steps=steps, **settings) - own for p in (learned, closed))
        assert near.square().mean() < 0.8 * far.square().mean()


@pytest.mark.parametrize(
    ("kind", "path", "value", "complaint"),
    [
        ("generator", ("generator", "width"), 10**9, "width is 1000000000"),
        ("generator", ("generator", "depth"), 2, "do not fit the generator's description"),
        ("generator", ("generator",), None, "lacks the generator's description"),
        ("generator", ("noise",), "pink", "noise is 'pink'"),
        ("generator", ("sigma_init",), math.pi * 100, "must not fall in this order"),
        ("generator", ("base", "kind"), "source", "closed-form kinds alone"),
        ("lora", ("rank",), 3, "are not of rank 3"),
        ("lora", ("about",), {}, "does not say which denoiser"),
        ("shared", ("one",), True, "has changed weights, or is one with its denoiser"),
        ("raw-shared", ("network",), "source", "one of generator, shared"),
        ("source", ("noise",), None, "noise is None"),
    ],
)
def test_a_damaged_header_is_explained(kind, path, value, complaint, tmp_path):
    file = tdpm.save_prior(make(kind), tmp_path / "prior.safetensors")
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()[KEY])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    place = header["config"]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    save_file(tensors, file, {KEY: json.dumps(header)})
    with pytest.raises(PriorFileError, match=complaint):
        tdpm.load_prior(file)
