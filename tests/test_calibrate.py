"""Calibration on denoisers whose answer is exact: what it finds, that it can be repeated, and what it refuses."""

import math

import pytest
import torch

from tdpm_ext.calibrate import _quality, calibrate
from tdpm_ext.distance import LOOK, FeatureDistance, spread
from tdpm_ext.fit import fit_prior
from tdpm_ext.ideal import IdealDenoiser
from tdpm_ext.pictures import Pictures
from tdpm_ext.plan import Plan
from tdpm_ext.priors.base import default_plan
from tdpm_ext.priors.io import load_prior, save_prior
from tdpm_ext.schedule import karras
from tdpm_ext.solver import solve

SHAPE = (1, 8, 8)
BUDGETS = (2, 3, 5)


def pictures(count=400, classes=3, seed=0):
    """Smooth 8x8 pictures of three kinds, std about 0.6. (pictures, labels)."""
    generator = torch.Generator().manual_seed(99)
    basis = torch.nn.functional.avg_pool2d(torch.randn(10, *SHAPE, generator=generator), 3, 1, 1)
    centres = torch.randn(classes, 10, generator=generator)
    generator.manual_seed(seed)
    labels = torch.arange(count) % classes
    weights = centres[labels] + torch.randn(count, 10, generator=generator) * torch.linspace(1, 0.2, 10)
    x = torch.einsum("nk,kchw->nchw", weights, basis).tanh()
    return x + 0.05 * torch.randn(x.shape, generator=generator), labels


class Exact:
    """The exact denoiser of a mixture with classes: smooth, unlike that of a finite data set."""

    def __init__(self, prior):
        self.prior, self.calls = prior, []

    def __call__(self, x, sigma, class_cond=None, cond_scale=1.0):
        self.calls.append((len(x), float(sigma[0]), class_cond))
        return self.prior.denoise(x, sigma, class_cond=class_cond)


@pytest.fixture(scope="module")
def data():
    return pictures()


@pytest.fixture(scope="module")
def model(data):
    return Exact(fit_prior("mixture", data[0], labels=data[1], components=1, progress=False))


@pytest.fixture
def prior(data):
    return fit_prior("gaussian", data[0], progress=False)


def run(prior, model, plan, z, **cond):
    x, history = prior.start(z, plan.sigma_trunc, plan.history, **cond)
    ways = {"orders": plan.orders, "history": history, "weights": plan.weights}
    return solve(model, x, plan.sigmas, cond, disable=True, **ways)


def rmse(a, b):
    return float((a - b).double().square().mean().sqrt())


def fresh(count, seed):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def quick(prior, model, budgets=BUDGETS, **options):
    if options.get("objective") == "quality":
        options = {"samples": 128, "data": pictures(seed=5)[0], **options}
    return calibrate(prior, model, budgets, **{"samples": 16, "progress": False, **options})


@pytest.fixture(scope="module")
def calibrated(data, model):
    """Both tables of one prior."""
    prior = fit_prior("gaussian", data[0], progress=False)
    assert quick(prior, model) is prior
    return quick(prior, model, objective="quality")


# -- what it finds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["fidelity", "quality"])
def test_every_budget_gets_a_plan_of_its_own_with_an_expected_error(calibrated, objective):
    table = calibrated.plans[objective]
    assert sorted(table) == list(BUDGETS)
    for budget, plan in table.items():
        assert isinstance(plan, Plan) and plan.steps == budget
        assert math.isfinite(plan.error) and plan.error > 0
        assert plan.sigma_trunc < calibrated.sigma_max
    assert all(calibrated.plan_for(budget, objective).steps == budget for budget in range(1, 21))


def test_the_error_of_fidelity_falls_as_the_budget_grows(calibrated):
    errors = [calibrated.plans["fidelity"][budget].error for budget in BUDGETS]
    assert all(more < 1.1 * fewer for fewer, more in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.6 * errors[0]


def test_fewer_evaluations_are_cut_lower(calibrated):
    cuts = [calibrated.plans["fidelity"][budget].sigma_trunc for budget in BUDGETS]
    assert cuts[0] < cuts[-1]


def test_fidelity_beats_the_default_plan_on_fresh_seeds(calibrated, model):
    z = fresh(64, 1234)
    target = solve(model, z * 80.0, karras(120, 80.0, 0.01), disable=True)
    ours, plain = [], []
    for budget in BUDGETS:
        ours.append(rmse(run(calibrated, model, calibrated.plan_for(budget), z), target))
        plain.append(rmse(run(calibrated, model, default_plan(calibrated.sigma_trunc, budget), z), target))
        assert ours[-1] < 1.02 * plain[-1]
        assert 0.4 < ours[-1] / calibrated.plan_for(budget).error < 4  # what sixteen seeds expect, they were fitted to
    assert sum(ours) < 0.85 * sum(plain)


def test_quality_beats_the_default_plan_on_fresh_seeds_and_other_pictures(calibrated, model):
    distance, z = FeatureDistance(pictures(600, seed=6)[0], seed=7), fresh(400, 1235)
    for budget in (2, 3):
        ours = distance(run(calibrated, model, calibrated.plan_for(budget, "quality"), z))
        plain = distance(run(calibrated, model, default_plan(calibrated.sigma_trunc, budget), z))
        assert ours < plain


def test_quality_leaves_the_valley_of_the_budget_before_when_another_is_lower(prior):
    class Job:
        """Gives plans back instead of pictures, for a distance with two valleys in the cut."""

        sigma_min, progress, z = 0.02, False, range(8)

        def __init__(self):
            self.prior = prior

        def run(self, plan):
            return plan

        def part(self, count):
            return self

    class Distance:
        std = 0.5

        def __call__(self, plan):
            cut = math.log(plan.sigma_trunc)
            low, high = (1.0, 2.0) if plan.steps == 1 else (2.0, 1.0)
            return min(low + (cut - math.log(0.45)) ** 2, high + (cut - math.log(4.5)) ** 2)

    plans = _quality(Job(), [1, 2, 3], Distance())
    assert [plans[n].sigma_trunc for n in (1, 2, 3)] == pytest.approx([0.45, 4.5, 4.5], rel=0.2)


class Seeing(torch.nn.Module):
    """The exact denoiser, with a block whose activations can be seen."""

    def __init__(self, exact):
        super().__init__()
        self.blocks, self.exact = torch.nn.ModuleList([torch.nn.Conv2d(1, 4, 3)]), exact
        self.given = []

    def forward(self, x, sigma, **extra):
        self.blocks[0](x)
        self.given.append((float(sigma[0]), extra))
        return self.exact(x, sigma, class_cond=extra.get("class_cond"))


def test_quality_looks_at_pictures_through_the_models_own_blocks_without_guidance(prior, model):
    seeing = Seeing(model)
    quick(prior, seeing, [2], objective="quality", samples=32, extra_args={"cond_scale": 2.0}, num_classes=3)
    level = LOOK * spread(pictures(seed=5)[0])
    looks = [extra for sigma, extra in seeing.given if sigma == pytest.approx(level, rel=1e-5)]
    runs = [extra for sigma, extra in seeing.given if sigma != pytest.approx(level, rel=1e-5)]
    assert looks and all(extra == {} for extra in looks)
    assert runs and all(extra["cond_scale"] == 2.0 for extra in runs)


def test_quality_draws_the_classes_in_the_proportions_of_the_pictures(prior, model):
    images, _ = pictures(200, seed=5)
    data, before = Pictures(images, torch.tensor([0] * 100 + [2] * 50 + [1] * 50), list("abc")), len(model.calls)
    quick(prior, model, [1], objective="quality", samples=32, data=data, num_classes=3)
    drawn = max(model.calls[before:], key=lambda call: call[0])[2]
    assert torch.bincount(drawn).tolist() == [16, 8, 8]


def test_it_works_with_the_ideal_denoiser_of_a_data_set(data):
    images, labels = data
    prior, model = fit_prior("mixture", images, labels=labels, progress=False), IdealDenoiser(images, labels)
    quick(prior, model, (3,))
    z = fresh(48, 7)
    target = solve(model, z * 80.0, karras(60, 80.0, 0.02), disable=True)
    assert rmse(run(prior, model, prior.plan_for(3), z), target) < rmse(
        run(prior, model, default_plan(prior.sigma_trunc, 3), z), target
    )


@pytest.mark.parametrize("kind, options", [("lowrank", {"rank": 6}), ("mixture", {"components": 2})])
def test_every_kind_can_be_calibrated(kind, options, data, model):
    prior = fit_prior(kind, data[0], progress=False, **options)
    quick(prior, model, (1, 3), samples=8)
    errors = [prior.plans["fidelity"][budget].error for budget in (1, 3)]
    assert errors[1] < errors[0]


# -- that it can be repeated -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["fidelity", "quality"])
def test_the_same_seed_gives_the_same_plans(data, model, objective):
    tables = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(tables))
        prior = fit_prior("gaussian", data[0], progress=False)
        tables.append(quick(prior, model, (3,), objective=objective, seed=seed).plans[objective])
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


def test_the_global_generator_is_left_alone(prior, model):
    before = torch.random.get_rng_state()
    quick(prior, model, (2,))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_how_seeds_are_cut_into_batches_hardly_matters(data, model):
    errors = []
    for batch in (5, 64):
        prior = fit_prior("gaussian", data[0], progress=False)
        errors.append(quick(prior, model, (2,), batch=batch).plans["fidelity"][2].error)
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_tables_are_added_to_not_replaced(prior, model):
    kept = Plan((1.0, 0.3, 0.1, 0.0), (2, 2, 2))
    prior.plans = {"quality": {3: kept}, "fidelity": {2: Plan((1.0, 0.3, 0.0), (2, 2)), 9: default_plan(2.0, 9)}}
    replaced = prior.plans["fidelity"][2]
    quick(prior, model, (2, 1))
    assert sorted(prior.plans["fidelity"]) == [1, 2, 9]
    assert prior.plans["fidelity"][2] != replaced
    assert prior.plans["quality"] == {3: kept}


def test_plans_survive_saving(calibrated, tmp_path):
    save_prior(calibrated, tmp_path / "prior.safetensors")
    again = load_prior(tmp_path / "prior.safetensors")
    assert again.plans == calibrated.plans and again.card == calibrated.card


# -- conditions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["fidelity", "quality"])
def test_classes_reach_model_and_prior_row_by_row(data, model, objective):
    """A prior that is the model's own, class for class, needs no more than a plan that samples it."""
    images, labels = data
    prior = fit_prior("mixture", images, labels=labels, components=1, progress=False)
    seen = []

    def watched(x, sigma, class_cond):
        assert class_cond.shape == (len(x),)
        seen.append(class_cond)
        return model(x, sigma, class_cond=class_cond)

    quick(prior, watched, (2,), objective=objective, num_classes=3, batch=10)
    assert torch.cat(seen).unique().tolist() == [0, 1, 2]
    z, cond = fresh(30, 5), torch.arange(30) % 3
    target = solve(model, z * 80.0, karras(60, 80.0, 0.02), {"class_cond": cond}, disable=True)
    out = run(prior, model, prior.plan_for(2, objective), z, class_cond=cond)
    assert rmse(out, target) < 0.3 * float(images.std())


def test_guidance_is_passed_on_and_recorded(prior, model):
    scales = []

    def watched(x, sigma, cond_scale):
        scales.append(cond_scale)
        return model(x, sigma)

    quick(prior, watched, (2,), extra_args={"cond_scale": 3.0})
    assert set(scales) == {3.0} and prior.card["calibrated_cond_scale"] == 3.0


# -- refusals and interruptions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, says",
    [
        ({"objective": "speed"}, "objective 'speed': choose one of fidelity, quality"),
        ({"budgets": ()}, r"budgets \[\]"),
        ({"budgets": (0, 3)}, r"budgets \[0, 3\].*at least 1"),
        ({"objective": "quality", "data": None}, "give data="),
        ({"objective": "quality", "data": pictures(40)[0]}, "40 pictures are too few"),
        ({"objective": "quality", "data": pictures()[0] / 0}, "picture 0 of the data holds NaN"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_the_model_runs(prior, options, says):
    def model(x, sigma):
        raise AssertionError("the model ran")

    with pytest.raises(ValueError, match=says):
        quick(prior, model, **{"budgets": (2,), **options})
    assert prior.plans == {}


@pytest.mark.parametrize("objective", ["fidelity", "quality"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_denoiser_that_gives_no_numbers_is_named(prior, objective, bad):
    with pytest.raises(ValueError, match="NaN or infinity: check the checkpoint"):
        quick(prior, lambda x, sigma: torch.full_like(x, bad), (2,), objective=objective)
    assert prior.plans == {}


@pytest.mark.parametrize("objective, after", [("fidelity", 1), ("fidelity", 70), ("quality", 1), ("quality", 20)])
def test_interrupting_leaves_the_plans_as_they_were(prior, model, objective, after):
    quick(prior, model, (2,))
    plans, card, left = {name: dict(table) for name, table in prior.plans.items()}, dict(prior.card), [after]

    def interrupted(x, sigma):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return model(x, sigma)

    with pytest.raises(KeyboardInterrupt):
        quick(prior, interrupted, (2, 3, 4), objective=objective)
    assert prior.plans == plans and prior.card == card
