"""Fitting: from pictures and from the denoiser itself, reproducibly, with every refusal in words."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdpm_ext.fit import draw_from_denoiser, fit_prior
from tdpm_ext.ideal import IdealDenoiser
from tdpm_ext.pictures import Pictures
from tdpm_ext.priors.gaussian import unshrink
from tdpm_ext.priors.registry import list_priors

SHAPE = (1, 3, 4)
D = math.prod(SHAPE)
KINDS = ("gaussian", "lowrank", "mixture")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class GaussianModel:
    """The exact denoiser of Gaussian data per class; guidance and its other arguments are written down."""

    def __init__(self, classes=1, spread=1.0):
        self.turn = torch.linalg.qr(draw(D, D, seed=1).double()).Q
        self.variances = 0.4 * spread * torch.logspace(0, -2, D, dtype=torch.float64)
        self.means = 0.8 * draw(classes, D, seed=2).double()
        self.classes, self.seen = classes, []

    @property
    def covariance(self):
        return self.turn * self.variances @ self.turn.T

    def __call__(self, x, sigma, class_cond=None, cond_scale=1.0, **extra):
        self.seen.append({"class_cond": class_cond, "cond_scale": cond_scale, **extra})
        mean = self.means[torch.zeros(len(x), dtype=torch.long) if class_cond is None else class_cond]
        share = self.variances / (self.variances + sigma.double().reshape(-1, 1) ** 2)
        y = x.flatten(1).double() - cond_scale * mean
        return (cond_scale * mean + (y @ self.turn * share) @ self.turn.T).reshape(x.shape).float()


def covariance_of(prior):
    t = prior.tensors
    beyond = torch.eye(D) - t["basis"] @ t["basis"].T
    return (t["basis"] * t["variances"] @ t["basis"].T + prior.residual * beyond).double()


def fit(kind, data=None, **options):
    return fit_prior(kind, data, progress=False, **options)


# -- from pictures -----------------------------------------------------------------------------------------------------


def test_the_kinds_are_registered():
    assert set(KINDS) <= set(list_priors())


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_says_what_the_prior_was_fitted_for(kind):
    data, labels = draw(60, *SHAPE), torch.arange(60) % 3
    prior = fit(kind, data, labels=labels, checkpoint="0123456789abcdef", seed=4)
    card = prior.card
    assert prior.kind == kind and prior.shape == SHAPE
    assert (card["source"], card["pictures"], card["seed"]) == ("pictures", 60, 4)
    assert card["checkpoint"] == "0123456789abcdef"
    assert len(card["data_sha256"]) == 64 and card["cond_scale"] == 1.0
    assert card["num_classes"] == (3 if kind == "mixture" else 0)
    assert card["data_std"] == pytest.approx(float(data.double().var(0, correction=0).mean().sqrt()), rel=1e-6)
    assert card["data_mean"] == pytest.approx(float(data.mean()), abs=1e-6)
    assert prior.sigma_trunc == pytest.approx(5 * card["data_std"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_pictures_and_seed_give_the_same_prior(kind):
    data = draw(200, *SHAPE)
    first, again = (fit(kind, data, seed=3) for _ in range(2))
    assert all(torch.equal(first.tensors[k], again.tensors[k]) for k in first.tensors)
    assert first.card == again.card


@pytest.mark.parametrize("kind", KINDS)
def test_the_global_generator_is_neither_used_nor_moved(kind):
    data, model = draw(80, *SHAPE), GaussianModel()
    torch.manual_seed(1)
    expected = torch.random.get_rng_state()
    first = fit(kind, data), fit(kind, denoiser=model, shape=SHAPE, draws=32)
    assert torch.equal(torch.random.get_rng_state(), expected)
    torch.manual_seed(2)
    again = fit(kind, data), fit(kind, denoiser=model, shape=SHAPE, draws=32)
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_bytes_and_unit_floats_give_the_same_prior():
    raw = torch.randint(0, 256, (50, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 2
    from_bytes = fit("mixture", Pictures(raw, labels, ["a", "b"]), components=1)
    from_floats = fit("mixture", raw.float() / 127.5 - 1, labels=labels, components=1)
    for name in from_bytes.tensors:
        one, two = from_bytes.tensors[name].abs(), from_floats.tensors[name].abs()
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)
    assert from_bytes.num_classes == from_floats.num_classes == 2


def test_a_stream_is_enough_for_one_gaussian_but_not_for_a_mixture():
    data = draw(64, *SHAPE)
    for kind in ("gaussian", "lowrank"):
        assert fit(kind, iter(data.split(10))).card["data_sha256"] == fit(kind, data).card["data_sha256"]
    with pytest.raises(ValueError, match="twice"):
        fit("mixture", iter(data.split(10)))


# -- from the denoiser -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, options", [("gaussian", {}), ("lowrank", {"rank": 6}), ("mixture", {"components": 1})])
def test_moments_come_back_from_the_denoiser_alone(kind, options):
    model = GaussianModel()
    prior = fit(kind, denoiser=model, shape=SHAPE, draws=2048, **options)
    assert prior.card["source"] == "denoiser" and prior.card["denoised_at"] > 0
    # 2,048 draws have standard errors of 3 %; seven evaluations a draw lose up to a quarter of a variance
    scale = float(model.variances.sum().sqrt())
    assert float((prior.tensors["mean"].double() - model.means[0]).norm()) < 0.06 * scale
    found = (model.turn.T @ covariance_of(prior) @ model.turn).diagonal() / model.variances
    strong = model.variances > prior.card["denoised_at"] ** 2
    strong[prior.tensors["basis"].shape[1] :] = False  # beyond the rank kept, one variance stands for all
    assert float(found[strong].min()) > 0.7 and float(found[strong].max()) < 1.15
    error = covariance_of(prior) - model.covariance
    assert float(error.norm() / model.covariance.norm()) < 0.12


def test_more_evaluations_a_draw_recover_the_moments_closely():
    model = GaussianModel()
    estimates, _, stop = draw_from_denoiser(model, SHAPE, count=3000, steps=30, progress=False)
    found = unshrink((estimates.flatten(1).double() @ model.turn).var(0), stop)
    torch.testing.assert_close(found, model.variances, atol=0, rtol=0.1)


def test_without_undoing_the_shrinkage_the_fine_directions_would_be_lost():
    """Denoised estimates know little of directions weaker than the noise they were read at."""
    model = GaussianModel()
    prior = fit("gaussian", denoiser=model, shape=SHAPE, draws=2048)
    estimates, _, stop = draw_from_denoiser(model, SHAPE, count=2048, progress=False)
    weakest, truth = model.turn[:, -1], float(model.variances[-1])
    assert truth < stop**2
    assert float((estimates.flatten(1).double() @ weakest).var()) < 0.5 * truth
    assert float(weakest @ covariance_of(prior) @ weakest) == pytest.approx(truth, rel=0.25)


@given(variance=st.floats(1e-8, 1e4), sigma=st.floats(1e-3, 1e2))
def test_unshrink_undoes_the_shrinkage_of_a_posterior_mean(variance, sigma):
    shrunk = torch.tensor([variance**2 / (variance + sigma**2)], dtype=torch.float64)
    assert float(unshrink(shrunk, sigma)) == pytest.approx(variance, rel=1e-6)


def test_unshrink_leaves_clean_pictures_and_nothing_alone():
    values = torch.tensor([0.0, 1e-12, 0.5, 80.0], dtype=torch.float64)
    torch.testing.assert_close(unshrink(values, 0.0), values)
    assert float(unshrink(torch.zeros(1), 3.0)) == 0.0


def test_classes_are_drawn_alike_and_become_components():
    model = GaussianModel(classes=3, spread=0.1)
    prior = fit("mixture", denoiser=model, shape=SHAPE, draws=600, num_classes=3, components=1)
    labels = torch.cat([call["class_cond"] for call in model.seen])
    assert labels.unique().tolist() == [0, 1, 2]
    assert prior.tensors["classes"].tolist() == [0, 1, 2] and prior.card["num_classes"] == 3
    q = prior.tensors["means"].shape[1]
    means = prior.tensors["mean"] + prior.tensors["means"] @ prior.tensors["basis"][:, :q].T
    torch.testing.assert_close(means.double(), model.means, atol=0.08, rtol=0)


@pytest.mark.parametrize("num_classes", [3, 20])  # 20: more than the pictures of the probe
def test_every_call_has_one_label_per_picture(num_classes):
    model = GaussianModel(classes=num_classes)
    labels = []
    model_in = model.__call__

    def checked(x, sigma, class_cond=None):
        assert class_cond.shape == (len(x),) and sigma.shape == (len(x),)
        labels.append(class_cond)
        return model_in(x, sigma, class_cond)

    _, drawn, _ = draw_from_denoiser(checked, SHAPE, count=100, num_classes=num_classes, batch=32, progress=False)
    assert torch.equal(drawn, torch.arange(100) % num_classes)


def test_guidance_and_other_arguments_reach_the_denoiser():
    model = GaussianModel()
    prior = fit("gaussian", denoiser=model, shape=SHAPE, cond_scale=2.5, extra_args={"text": "a"}, draws=1024)
    assert {call["cond_scale"] for call in model.seen} == {2.5}
    assert {call["text"] for call in model.seen} == {"a"}
    assert prior.card["cond_scale"] == 2.5
    torch.testing.assert_close(prior.tensors["mean"].double(), 2.5 * model.means[0], atol=0.12, rtol=0)
    plain = GaussianModel()
    fit("gaussian", denoiser=plain, shape=SHAPE, draws=16)
    assert {call["cond_scale"] for call in plain.seen} == {1.0}


def test_draws_follow_the_seed():
    model = GaussianModel()
    first, again, other = (draw_from_denoiser(model, SHAPE, count=40, seed=s, progress=False)[0] for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    fits = [fit("mixture", denoiser=model, shape=SHAPE, draws=64, seed=5) for _ in range(2)]
    assert all(torch.equal(fits[0].tensors[k], fits[1].tensors[k]) for k in fits[0].tensors)


def test_draws_come_from_the_untruncated_chain_at_sigma_max():
    sigmas = []
    model = GaussianModel()

    def watched(x, sigma):
        sigmas.append(float(sigma[0]))
        return model(x, sigma)

    _, _, stop = draw_from_denoiser(watched, SHAPE, sigma_max=14.6, count=8, progress=False)
    assert max(sigmas) == pytest.approx(14.6) and sigmas[-1] == pytest.approx(stop)
    assert fit("gaussian", denoiser=model, shape=SHAPE, sigma_max=14.6, draws=16).sigma_max == 14.6


def test_a_data_set_is_fitted_through_its_ideal_denoiser():
    data = 0.3 * draw(150, *SHAPE, seed=6) + draw(1, *SHAPE, seed=7)
    prior = fit("gaussian", denoiser=IdealDenoiser(data), shape=SHAPE, draws=512)
    assert float((prior.tensors["mean"] - data.mean(0).flatten()).abs().max()) < 0.06
    assert prior.card["data_std"] == pytest.approx(0.3, rel=0.15)


@pytest.mark.gpu
def test_a_denoiser_on_the_gpu_is_called_there():
    data = 0.3 * draw(150, *SHAPE, seed=6)
    prior = fit("gaussian", denoiser=IdealDenoiser(data).cuda(), shape=SHAPE, draws=64)
    assert prior.tensors["mean"].device.type == "cpu"


# -- refusals ----------------------------------------------------------------------------------------------------------

PICTURES = draw(30, *SHAPE)


def broken(value):
    return lambda x, sigma, **_: torch.full_like(x, value)


@pytest.mark.parametrize(
    "kind, options, says",
    [
        ("gaussian", {}, "either data .* or denoiser"),
        ("gaussian", {"data": PICTURES, "denoiser": GaussianModel()}, "either data .* or denoiser"),
        ("gausian", {"data": PICTURES}, "no prior kind 'gausian': known are .*gaussian"),
        ("gaussian", {"data": PICTURES, "rank": 3}, "rank=3 has no meaning for kind 'gaussian'"),
        ("gaussian", {"data": PICTURES, "components": 3}, "components=3 has no meaning"),
        ("lowrank", {"data": PICTURES, "components": 3}, "components=3 has no meaning for kind 'lowrank'.*rank"),
        ("lowrank", {"data": PICTURES, "rank": 0}, "rank 0: give 1 or more"),
        ("mixture", {"data": PICTURES, "rank": -2}, "rank -2: give 1 or more"),
        ("mixture", {"data": PICTURES, "components": 0}, "components 0: give 1 or more"),
        ("gaussian", {"denoiser": GaussianModel()}, "needs shape="),
        ("gaussian", {"data": PICTURES, "shape": (1, 4, 4)}, r"\(1, 3, 4\), but shape=\(1, 4, 4\)"),
        ("gaussian", {"data": PICTURES[:0]}, "at least one picture"),
        ("gaussian", {"data": []}, "no pictures"),
        ("gaussian", {"data": 3}, "data is int"),
        ("gaussian", {"data": PICTURES / 0}, "picture 0 of the data holds NaN or infinity"),
        ("mixture", {"data": PICTURES, "labels": torch.zeros(7)}, "7 labels for 30 pictures"),
        ("gaussian", {"data": torch.zeros(2, 1, 65, 65)}, "4225 entries.*'lowrank'"),
        ("gaussian", {"data": PICTURES, "sigma_max": -1.0}, "sigma_max -1.0"),
        ("gaussian", {"data": PICTURES, "sigma_max": math.nan}, "sigma_max nan"),
        ("gaussian", {"denoiser": GaussianModel(), "shape": SHAPE, "sigma_max": 0.0}, "sigma_max"),
        ("gaussian", {"denoiser": broken(math.nan), "shape": SHAPE}, "std nan: check the checkpoint"),
        ("gaussian", {"denoiser": broken(math.inf), "shape": SHAPE}, "check the checkpoint"),
        ("gaussian", {"denoiser": broken(0.3), "shape": SHAPE}, "std 0.0: check the checkpoint"),
        ("gaussian", {"denoiser": GaussianModel(), "shape": SHAPE, "draws": 0}, "draws 0.*give 2 draws or more"),
        ("gaussian", {"denoiser": GaussianModel(), "shape": SHAPE, "num_classes": -1}, "num_classes -1: give"),
        ("mixture", {"denoiser": GaussianModel(), "shape": SHAPE, "labels": torch.zeros(4)}, "labels.*num_classes"),
        ("gaussian", {"data": PICTURES, "num_classes": 3}, "num_classes.*denoiser"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_words(kind, options, says):
    with pytest.raises(ValueError, match=says):
        fit(kind, **options)


def test_a_denoiser_that_breaks_late_is_named():
    calls = []

    def model(x, sigma):
        calls.append(1)
        return torch.full_like(x, math.nan) if len(calls) > 8 else x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    with pytest.raises(ValueError, match="denoiser gave NaN or infinity"):
        fit("gaussian", denoiser=model, shape=SHAPE, draws=16)


def test_interrupting_a_fit_leaves_the_interrupt_alone():
    def model(x, sigma):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit("gaussian", denoiser=model, shape=SHAPE)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        fit("gaussian", tmp_path / "nowhere")


def test_an_array_of_pictures_is_told_to_become_a_tensor():
    with pytest.raises(ValueError, match="tensor"):
        fit("gaussian", np.zeros((4, *SHAPE), dtype=np.float32))
