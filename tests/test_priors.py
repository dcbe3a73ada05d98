"""Closed-form priors: their denoiser, their flow, their samples, and the edges where arithmetic breaks."""

import math

import pytest
import torch

from tdpm_ext.fit import fit_prior
from tdpm_ext.priors import closed_form
from tdpm_ext.priors.base import ImplicitPrior
from tdpm_ext.priors.closed_form import ClosedFormPrior
from tdpm_ext.priors.io import load_prior, save_prior
from tdpm_ext.solver import solve

KINDS = ("gaussian", "lowrank", "mixture")
SHAPE = (2, 3, 2)
D = math.prod(SHAPE)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(count=600, shape=SHAPE, classes=3, seed=0):
    """Classes with means and covariances of their own; std about 0.5. (pictures [N, *shape], labels)."""
    d, labels = math.prod(shape), torch.arange(count) % classes
    mix = draw(classes, d, d, seed=seed + 1) * torch.linspace(0.5, 0.05, d) / d**0.5
    centres = 0.5 * draw(classes, d, seed=seed + 2)
    flat = torch.bmm(draw(count, 1, d, seed=seed), mix[labels])[:, 0] + centres[labels]
    return flat.reshape(count, *shape), labels


def fit(kind, data, labels=None, **options):
    options = {"rank": 5, **options} if kind == "lowrank" else options
    return fit_prior(kind, data, labels=labels, progress=False, **options)


def own_mixture(prior):
    """The prior's model of the data as (log weights, means [K, d], covariances [K, d, d]) in float64."""
    t = {k: v.double() for k, v in prior.tensors.items()}
    basis, d = t["basis"], len(t["mean"])
    beyond = torch.eye(d, dtype=torch.float64) - basis @ basis.T
    if not prior.components:
        covariance = basis * t["variances"] @ basis.T + prior.residual * beyond
        return torch.zeros(1, dtype=torch.float64), t["mean"][None], covariance[None]
    q, means, covariances = t["means"].shape[1], [], []
    for mean, turn, spread in zip(t["means"], t["rotations"], t["spreads"], strict=True):
        inner = torch.diag(t["variances"])
        inner[:q, :q] = turn * spread @ turn.T
        means.append(t["mean"] + basis[:, :q] @ mean)
        covariances.append(basis @ inner @ basis.T + prior.residual * beyond)
    return t["log_weights"], torch.stack(means), torch.stack(covariances)


def brute_denoise(prior, x, sigma, allowed=None):
    """E[x_0 | x] by Bayes' rule over full d-dimensional covariances, float64."""
    log_weights, means, covariances = own_mixture(prior)
    y, noise = x.flatten(1).double(), sigma**2 * torch.eye(means.shape[1], dtype=torch.float64)
    logits, parts = [], []
    for log_weight, mean, covariance in zip(log_weights, means, covariances, strict=True):
        total = torch.distributions.MultivariateNormal(mean, covariance + noise)
        logits.append(log_weight + total.log_prob(y))
        parts.append(mean + (covariance @ torch.linalg.solve(covariance + noise, (y - mean).T)).T)
    logits = torch.stack(logits, 1)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    return torch.einsum("bk,kbd->bd", logits.softmax(1), torch.stack(parts)).reshape(x.shape)


def heun(prior, x, start, end, steps=400, **cond):
    """The probability-flow ODE dx/dsigma = (x - D) / sigma, finely, with the prior's own denoiser."""
    levels = torch.linspace(math.log(start), math.log(end), steps + 1, dtype=torch.float64).exp().tolist()
    x = x.double()
    for a, b in zip(levels, levels[1:], strict=False):
        first = (x - prior.denoise(x, a, **cond)) / a
        guess = x + (b - a) * first
        x = x + 0.5 * (b - a) * (first + (guess - prior.denoise(guess, b, **cond)) / b)
    return x


@pytest.fixture(scope="module")
def data():
    return pictures()


@pytest.fixture(scope="module")
def priors(data):
    images, labels = data
    return {
        "gaussian": fit("gaussian", images),
        "lowrank": fit("lowrank", images),
        "mixture": fit("mixture", images, labels, components=1),
        "mixture, two a class": fit("mixture", images, labels, components=2),
        "mixture, no labels": fit("mixture", images, components=4),
        "mixture, low rank": fit("mixture", images, labels, components=1, rank=6),
    }


NAMES = ["gaussian", "lowrank", "mixture", "mixture, two a class", "mixture, no labels", "mixture, low rank"]
every_prior = pytest.mark.parametrize("name", NAMES)


# -- the denoiser ------------------------------------------------------------------------------------------------------


@every_prior
@pytest.mark.parametrize("sigma", [1e-3, 0.05, 0.7, 5.0, 80.0, 1e4])
def test_denoise_is_the_posterior_mean_of_the_model(priors, name, data, sigma):
    prior = priors[name]
    x = data[0][:40] + sigma * draw(40, *SHAPE, seed=4)
    actual = prior.denoise(x, sigma).double()
    torch.testing.assert_close(actual, brute_denoise(prior, x, sigma), atol=2e-4, rtol=1e-4)


def test_gaussian_holds_the_moments_of_the_data(priors, data):
    flat = data[0].flatten(1).double()
    _, (mean,), (covariance,) = own_mixture(priors["gaussian"])
    torch.testing.assert_close(mean, flat.mean(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(covariance, torch.cov(flat.T, correction=0), atol=1e-6, rtol=1e-5)


def test_mixture_by_labels_holds_each_class(priors, data):
    """Weights and means are the classes'; covariances are theirs, pulled a little towards the pooled one."""
    images, labels = data
    prior = priors["mixture"]
    log_weights, means, covariances = own_mixture(prior)
    assert prior.tensors["classes"].tolist() == [0, 1, 2] and prior.num_classes == 3
    torch.testing.assert_close(log_weights.exp(), torch.full([3], 1 / 3, dtype=torch.float64), atol=1e-6, rtol=0)
    for k in range(3):
        flat = images[labels == k].flatten(1).double()
        own = torch.cov(flat.T, correction=0)
        torch.testing.assert_close(means[k], flat.mean(0), atol=1e-5, rtol=1e-5)
        assert float((covariances[k] - own).norm() / own.norm()) < 0.1


@every_prior
@pytest.mark.parametrize("sigma", [0.3, 4.0])
def test_denoise_takes_sigma_as_samplers_pass_it(priors, name, sigma):
    x = draw(3, *SHAPE)
    expected = priors[name].denoise(x, sigma)
    torch.testing.assert_close(priors[name].denoise(x, torch.full([3], sigma)), expected)
    torch.testing.assert_close(priors[name].denoise(x, torch.tensor(sigma)), expected)


# -- the flow ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian", "lowrank"])
@pytest.mark.parametrize("start, end", [(20.0, 0.5), (0.5, 20.0), (3.0, 0.05)])
def test_gaussian_transport_is_the_ode_of_its_denoiser(priors, name, start, end):
    x = start * draw(8, *SHAPE)
    expected = heun(priors[name], x, start, end)
    torch.testing.assert_close(priors[name].transport(x, start, end).double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["mixture", "mixture, low rank"])
def test_one_component_per_class_is_transported_exactly(priors, name):
    x, cond = 20.0 * draw(9, *SHAPE), torch.arange(9) % 3
    expected = heun(priors[name], x, 20.0, 0.3, class_cond=cond)
    actual = priors[name].transport(x, 20.0, 0.3, class_cond=cond)
    torch.testing.assert_close(actual.double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["mixture", "mixture, two a class", "mixture, no labels", "mixture, low rank"])
@pytest.mark.parametrize("end", [3.0, 1.0, 0.3, 0.05])
@pytest.mark.parametrize("conditional", [False, True])
def test_mixture_flow_errs_little_against_the_std_of_the_data(priors, name, end, conditional, monkeypatch, data):
    prior, x = priors[name], 80.0 * draw(48, *SHAPE, seed=7)
    cond = {"class_cond": torch.arange(48) % 3} if conditional else {}
    coarse = prior.transport(x, 80.0, end, **cond)
    monkeypatch.setattr(closed_form, "FLOW_STEP", closed_form.FLOW_STEP / 40)
    error = (coarse - prior.transport(x, 80.0, end, **cond)).square().mean().sqrt()
    assert float(error) < 0.05 * float(data[0].std())


@every_prior
@pytest.mark.parametrize("a, b", [(80.0, 2.0), (1e4, 1.0), (5.0, 0.3), (0.05, 40.0)])
def test_there_and_back(priors, name, a, b, data):
    prior, x = priors[name], data[0][:16] + a * draw(16, *SHAPE, seed=5)
    back = prior.transport(prior.transport(x, a, b), b, a)
    exact = prior.components == 0
    torch.testing.assert_close(back, x, atol=(2e-5 if exact else 0.05) * (1 + a), rtol=0)


@every_prior
@pytest.mark.parametrize("a, b, c", [(80.0, 10.0, 2.0), (80.0, 1.0, 0.2), (2.0, 50.0, 0.5)])
@pytest.mark.parametrize("conditional", [False, True])
def test_two_stages_are_one(priors, name, a, b, c, conditional, data):
    prior, x = priors[name], data[0][:16] + a * draw(16, *SHAPE, seed=6)
    cond = {"class_cond": torch.arange(16) % 3} if conditional else {}
    direct = prior.transport(x, a, c, **cond)
    staged = prior.transport(prior.transport(x, a, b, **cond), b, c, **cond)
    exact = prior.components == 0 or (conditional and name in ("mixture", "mixture, low rank"))
    if exact:
        torch.testing.assert_close(staged, direct, atol=1e-4, rtol=1e-4)
    else:
        assert float((staged - direct).square().mean().sqrt()) < 0.05


@every_prior
def test_no_distance_is_no_change(priors, name):
    x = 3.0 * draw(4, *SHAPE)
    torch.testing.assert_close(priors[name].transport(x, 3.0, 3.0), x, atol=1e-5, rtol=1e-5)


# -- samples -----------------------------------------------------------------------------------------------------------


@every_prior
@pytest.mark.parametrize("sigma", [0.5, 3.0])
def test_samples_have_the_moments_of_the_noised_model(priors, name, sigma):
    prior = priors[name]
    x = prior.sample(draw(20_000, *SHAPE, seed=8), sigma).flatten(1).double()
    log_weights, means, covariances = own_mixture(prior)
    weights = log_weights.softmax(0)
    mean = weights @ means
    spread = means - mean
    covariance = torch.einsum("k,kij->ij", weights, covariances) + torch.einsum("k,ki,kj->ij", weights, spread, spread)
    covariance = covariance + sigma**2 * torch.eye(D, dtype=torch.float64)
    scale = float(covariance.diagonal().mean().sqrt())
    # sampling error of 20,000 is 1 %; sigma_max is finite, and the mixture's flow is worth a few per cent
    assert float((x.mean(0) - mean).abs().max()) < 0.05 * scale
    assert float((torch.cov(x.T) - covariance).norm() / covariance.norm()) < 0.06


def test_conditional_samples_are_those_of_the_class(priors, data):
    images, labels = data
    for name in ("mixture", "mixture, two a class"):
        for k in range(3):
            x = priors[name].sample(draw(5000, *SHAPE, seed=9), 0.2, class_cond=torch.full([5000], k))
            flat = images[labels == k].flatten(1)
            scale = float(flat.var(0).mean().sqrt())
            assert float((x.flatten(1).mean(0) - flat.mean(0)).abs().max()) < 0.25 * scale
            assert abs(float(x.flatten(1).var(0).mean() - 0.04) / scale**2 - 1) < 0.12


@every_prior
def test_a_picture_is_the_same_alone_and_in_a_batch(priors, name):
    prior, z = priors[name], draw(12, *SHAPE, seed=10)
    cond = torch.tensor([0, 1, 2, 3] * 3)  # 3: unconditional, beside conditional rows
    for extra in ({}, {"class_cond": cond}):
        for sigma in (0.3, 2.0):
            together = prior.sample(z, sigma, **extra)
            x, seen = prior.start(z, sigma, (2 * sigma, 3 * sigma), **extra)
            for i in range(12):
                own = {k: v[i : i + 1] for k, v in extra.items()}
                torch.testing.assert_close(
                    prior.sample(z[i : i + 1], sigma, **own), together[i : i + 1], atol=1e-5, rtol=0
                )
                alone, past = prior.start(z[i : i + 1], sigma, (2 * sigma, 3 * sigma), **own)
                torch.testing.assert_close(alone, x[i : i + 1], atol=1e-5, rtol=0)
                torch.testing.assert_close(past[1][1], seen[1][1][i : i + 1], atol=1e-5, rtol=0)


@every_prior
def test_start_gives_the_sample_and_its_own_denoised_path(priors, name):
    prior, z = priors[name], draw(4, *SHAPE, seed=11)
    x, seen = prior.start(z, 1.0, (2.0, 5.0))
    assert [level for level, _ in seen] == [2.0, 5.0]
    torch.testing.assert_close(seen[1][1], prior.denoise(prior.sample(z, 5.0), 5.0))
    torch.testing.assert_close(x, prior.sample(z, 1.0), atol=0.1, rtol=0)
    assert prior.start(z, 1.0)[1] == []
    for extra in ({}, {"class_cond": torch.tensor([0, 1, 2, 3])}):
        expected, past = ImplicitPrior.start(prior, z, 1.0, (2.0, 5.0), **extra)
        x, seen = prior.start(z, 1.0, (2.0, 5.0), **extra)
        torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(seen[0][1], past[0][1], atol=1e-4, rtol=1e-4)


@every_prior
def test_draws_start_at_sigma_trunc_unless_told(priors, name):
    prior, z = priors[name], draw(2, *SHAPE)
    assert torch.equal(prior.sample(z), prior.sample(z, prior.sigma_trunc))
    with pytest.raises(ValueError, match="sigma 0"):
        prior.sample(z, 0.0)


def test_the_solver_on_a_priors_own_denoiser_agrees_with_its_transport(priors):
    prior, x = priors["gaussian"], 10.0 * draw(4, *SHAPE)
    levels = torch.linspace(math.log(10.0), math.log(0.5), 65).exp()
    out = solve(lambda x, sigma: prior.denoise(x, sigma), x, levels, disable=True, orders=3)
    torch.testing.assert_close(out, prior.transport(x, 10.0, 0.5), atol=2e-3, rtol=1e-3)


# -- conditions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixture", "mixture, two a class", "mixture, low rank"])
def test_class_cond_uses_that_class_only(priors, name, data):
    prior = priors[name]
    x, cond = data[0][:30] + 0.8 * draw(30, *SHAPE, seed=12), torch.arange(30) % 4
    allowed = (prior.tensors["classes"][None] == cond[:, None]) | (cond == 3)[:, None]
    expected = brute_denoise(prior, x, 0.8, allowed)
    torch.testing.assert_close(prior.denoise(x, 0.8, class_cond=cond).double(), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("unknown", [3, 99, -1])
@pytest.mark.parametrize("name", ["mixture", "mixture, two a class"])
def test_an_unknown_class_means_all_of_them(priors, name, unknown):
    prior, x = priors[name], 2.0 * draw(5, *SHAPE)
    cond = torch.full([5], unknown)
    torch.testing.assert_close(prior.denoise(x, 2.0, class_cond=cond), prior.denoise(x, 2.0))
    torch.testing.assert_close(prior.transport(x, 2.0, 0.5, class_cond=cond), prior.transport(x, 2.0, 0.5))


@pytest.mark.parametrize("name", ["gaussian", "lowrank", "mixture, no labels"])
def test_priors_without_classes_take_any_condition(priors, name):
    prior, z, cond = priors[name], draw(4, *SHAPE), torch.arange(4)
    assert prior.num_classes == 0
    assert torch.equal(prior.sample(z, 1.0, class_cond=cond, text="ignored"), prior.sample(z, 1.0))


def test_one_label_for_the_whole_batch_and_wrong_counts(priors):
    prior, x = priors["mixture"], draw(4, *SHAPE)
    expected = prior.denoise(x, 1.0, class_cond=torch.full([4], 2))
    torch.testing.assert_close(prior.denoise(x, 1.0, class_cond=torch.tensor(2)), expected)
    with pytest.raises(ValueError, match="3 labels .* 4 pictures"):
        prior.denoise(x, 1.0, class_cond=torch.tensor([0, 1, 2]))


# -- numbers -----------------------------------------------------------------------------------------------------------


def awkward():
    """name -> (pictures, labels): data on which careless arithmetic divides by zero."""
    images, labels = pictures(90)
    constant = images.clone()
    constant[:, 0, 0] = 0.25
    line = torch.linspace(-1, 1, 60)[:, None] * draw(1, D, seed=20)
    return {
        "constant pixels": (constant, labels),
        "all on a line": (line.reshape(-1, *SHAPE), torch.arange(60) % 2),
        "one picture per class": (images[:5], torch.arange(5)),
        "one picture": (images[:1], torch.zeros(1, dtype=torch.long)),
        "one picture many times": (images[:1].expand(40, *SHAPE), torch.arange(40) % 2),
        "two pictures": (images[:2], torch.tensor([0, 1])),
        "a class of one": (images[:50], torch.tensor([1] + [0] * 49)),
        "classes with gaps": (images[:60], 3 * (torch.arange(60) % 2) + 2),
        "far from zero": (images + 1000.0, labels),
        "tiny": (images * 1e-4, labels),
        "huge": (images * 1e4, labels),
    }


@pytest.mark.parametrize("which", awkward())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labelled", [False, True])
def test_awkward_data_give_finite_answers_at_every_level(kind, which, labelled):
    images, labels = awkward()[which]
    prior = fit(kind, images, labels if labelled else None)
    for cond in ({}, {"class_cond": labels[:1]} if labelled else {}):
        for sigma in (1e-3, 0.1, 1.0, 80.0, 1e4):
            x = images[:1] + sigma * draw(1, *SHAPE)
            assert bool(prior.denoise(x, sigma, **cond).isfinite().all())
            for end in (1e-3, 1.0, 1e4):
                assert bool(prior.transport(x, sigma, end, **cond).isfinite().all())
        assert bool(prior.sample(draw(2, *SHAPE), **{k: v.expand(2) for k, v in cond.items()}).isfinite().all())
        plan = prior.plan_for(4)
        x, history = prior.start(draw(1, *SHAPE), plan.sigma_trunc, plan.history, **cond)
        out = solve(lambda x, s: prior.denoise(x, s), x, plan.sigmas, disable=True, orders=plan.orders, history=history)
        assert bool(out.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [1e-3, 0.5, 80.0, 1e4])
def test_one_picture_is_what_its_prior_denoises_to(kind, sigma):
    image = pictures(1)[0]
    prior = fit(kind, image)
    x = image + sigma * draw(3, *SHAPE)
    torch.testing.assert_close(prior.denoise(x, sigma), image.expand(3, *SHAPE), atol=1e-4, rtol=0)
    torch.testing.assert_close(prior.transport(x, sigma, 0.1) - image, (x - image) * (0.1 / sigma), atol=1e-4, rtol=0)


def test_one_picture_per_class_is_what_its_class_denoises_to():
    images, _ = pictures(5)
    prior = fit("mixture", images, torch.arange(5))
    x = images + 2.0 * draw(5, *SHAPE)
    actual = prior.denoise(x, 2.0, class_cond=torch.arange(5))
    torch.testing.assert_close(actual, images, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_pixels_stay_constant(kind):
    images, labels = awkward()["constant pixels"]
    prior = fit(kind, images, labels if kind == "mixture" else None)
    out = prior.denoise(images + 0.7 * draw(90, *SHAPE), 0.7)
    if kind == "lowrank":  # its residual is shared by every direction, this one too
        assert float((out[:, 0, 0] - 0.25).abs().max()) < 0.7
    else:
        torch.testing.assert_close(out[:, 0, 0], torch.full([90, 2], 0.25), atol=1e-3, rtol=0)


@every_prior
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2), (torch.float64, 1e-5)])
def test_dtype_of_x_is_kept_and_arithmetic_is_not_done_in_it(priors, name, dtype, tolerance):
    prior, x = priors[name], (5.0 * draw(4, *SHAPE)).to(dtype)
    for out, expected in (
        (prior.denoise(x, 5.0), prior.denoise(x.float(), 5.0)),
        (prior.transport(x, 5.0, 1.0), prior.transport(x.float(), 5.0, 1.0)),
        (prior.sample(x / 5), prior.sample(x.float() / 5)),
    ):
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, atol=8 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7,), (6, 4), (3, 2, 2), (2, 3, 2, 2)])  # x of 2, 3, 4 and 5 dimensions
def test_pictures_of_any_number_of_dimensions(kind, shape):
    images, labels = pictures(80, shape)
    prior = fit(kind, images, labels)
    assert prior.shape == shape
    z = draw(3, *shape)
    x = prior.sample(z, 0.7)
    flat = fit(kind, images.flatten(1), labels)
    torch.testing.assert_close(x.flatten(1), flat.sample(z.flatten(1), 0.7), atol=1e-4, rtol=1e-4)
    assert prior.denoise(x, 0.7).shape == x.shape == (3, *shape)


@every_prior
def test_x_is_left_as_it_was_in_any_memory_layout(priors, name):
    x = 2 * draw(4, *SHAPE).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    before = x.clone()
    torch.testing.assert_close(priors[name].denoise(x, 2.0), priors[name].denoise(x.contiguous(), 2.0))
    torch.testing.assert_close(priors[name].transport(x, 2.0, 0.5), priors[name].transport(x.contiguous(), 2.0, 0.5))
    assert torch.equal(x, before)


# -- bad input and files -----------------------------------------------------------------------------------------------


@every_prior
def test_wrong_shapes_and_levels_are_named(priors, name):
    prior, x = priors[name], draw(2, *SHAPE)
    for call in (lambda y: prior.denoise(y, 1.0), lambda y: prior.transport(y, 2.0, 1.0), prior.sample, prior.check):
        with pytest.raises(ValueError, match=r"\(2, 2, 3\) given.*\(2, 3, 2\)"):
            call(draw(2, 2, 2, 3))
    for sigma in (0.0, -1.0, math.nan, math.inf, torch.zeros(2)):
        with pytest.raises(ValueError, match="positive and finite"):
            prior.denoise(x, sigma)
        with pytest.raises(ValueError, match="positive and finite"):
            prior.transport(x, 1.0, sigma)
    with pytest.raises(ValueError, match="one sigma for the whole batch"):
        prior.denoise(x, torch.tensor([1.0, 2.0]))


@every_prior
def test_saved_and_loaded_priors_sample_the_same_bits(priors, name, tmp_path):
    prior, z = priors[name], draw(5, *SHAPE, seed=13)
    save_prior(prior, tmp_path / "prior.safetensors")
    again = load_prior(tmp_path / "prior.safetensors")
    assert type(again) is type(prior) and again.shape == prior.shape and again.card == prior.card
    for extra in ({}, {"class_cond": torch.arange(5) % 4}):
        assert torch.equal(again.sample(z, **extra), prior.sample(z, **extra))
        assert torch.equal(again.sample(z, 0.4, **extra), prior.sample(z, 0.4, **extra))
        assert torch.equal(again.denoise(z, 0.4, **extra), prior.denoise(z, 0.4, **extra))


def test_tensors_that_do_not_fit_are_named(priors):
    tensors, config = priors["mixture"].state()

    def build(**changed):
        return type(priors["mixture"]).from_state({**tensors, **changed}, config)

    assert isinstance(build(), ClosedFormPrior)
    for name, value, says in (
        ("mean", torch.zeros(D + 1), "mean has shape"),
        ("mean", torch.zeros(D, dtype=torch.int64), "1-d floats"),
        ("basis", torch.zeros(D), "basis has shape"),
        ("variances", -tensors["variances"] - 1, "negative"),
        ("means", tensors["means"] * math.nan, "NaN"),
        ("classes", tensors["classes"][:1], "classes"),
        ("spreads", tensors["spreads"][:1], "spreads has shape"),
    ):
        with pytest.raises(ValueError, match=says):
            build(**{name: value})
    with pytest.raises(ValueError, match="tensors are"):
        type(priors["mixture"]).from_state({k: v for k, v in tensors.items() if k != "means"}, config)
    with pytest.raises(ValueError, match="lacks sigma_max"):
        type(priors["mixture"]).from_state(tensors, {k: v for k, v in config.items() if k != "sigma_max"})
    with pytest.raises(ValueError, match="residual"):
        type(priors["mixture"]).from_state(tensors, {**config, "residual": -1.0})
    with pytest.raises(ValueError, match="sigma_trunc"):
        type(priors["mixture"]).from_state(tensors, {**config, "sigma_trunc": 0.0})
