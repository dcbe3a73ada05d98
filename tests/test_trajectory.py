"""Whole trajectories: the pictures of `sample`, eagerly on a CPU, and from recorded graphs that really run again."""

import pytest
import torch
from torch import nn

import tdpm_ext as tdpm
from tdpm_ext.trajectory import Trajectory
from tests.recorded_graphs import RecordingRuntime

SHAPE = (1, 4, 4)


class Denoiser(nn.Module):
    """Pulls x towards a weight, more for higher labels and stronger guidance."""

    def __init__(self):
        super().__init__()
        self.centre = nn.Parameter(torch.linspace(-0.5, 0.5, 16).reshape(SHAPE))

    def forward(self, x, sigma, class_cond=None, cond_scale=1.0):
        s2 = sigma.reshape(-1, 1, 1, 1) ** 2
        labels = 0.0 if class_cond is None else 0.1 * class_cond.reshape(-1, 1, 1, 1)
        pulled = (0.25 * x + s2 * self.centre) / (0.25 + s2) + labels
        return pulled if cond_scale == 1.0 else pulled * cond_scale


@pytest.fixture
def model():
    return Denoiser().eval()


def pictures(count=120):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    return torch.randn(count, *SHAPE, generator=generator) * 0.3 + labels.reshape(-1, 1, 1, 1) * 0.2, labels


@pytest.fixture(scope="module")
def labelled():
    return tdpm.fit_prior("mixture", list(zip(*[t.split(40) for t in pictures()], strict=True)), components=1)


@pytest.fixture(scope="module")
def several():
    """Three components, none of a class of its own."""
    return tdpm.fit_prior("mixture", pictures()[0], components=3)


@pytest.fixture
def runtime():
    return RecordingRuntime()


def same(trajectory, model, prior, seeds, extra_args=None, steps=4):
    torch.testing.assert_close(trajectory(seeds, extra_args), tdpm.sample(model, prior, None, steps, seeds, extra_args))


def test_on_a_cpu_the_pictures_are_those_of_sample(model, labelled):
    draw = Trajectory(model, labelled, steps=3)
    expected = tdpm.sample(model, labelled, shape=(5, *SHAPE), steps=3, seed=7)
    assert torch.equal(draw(7, shape=(5, *SHAPE)), expected) and draw.stats is None


@pytest.mark.parametrize("fixture", ["labelled", "several"])
def test_a_replay_gives_the_pictures_of_other_seeds(fixture, model, runtime, request):
    prior = request.getfixturevalue(fixture)
    draw = Trajectory(model, prior, runtime=runtime)
    for seeds in ([0, 1], [5, 9], [2, 0]):
        same(draw, model, prior, seeds)
    assert (draw.stats.captures, draw.stats.replays, draw.reasons) == (1, 3, ())


def test_labels_are_inputs_of_the_graph(model, labelled, runtime):
    draw = Trajectory(model, labelled, runtime=runtime)
    for labels in ([0, 1], [2, 2], [1, 0]):
        same(draw, model, labelled, [3, 4], {"class_cond": torch.tensor(labels)})
    assert (draw.stats.captures, draw.reasons) == (1, ())


def test_labels_that_the_prior_does_not_know_take_a_graph_of_their_own(model, labelled, runtime):
    draw = Trajectory(model, labelled, runtime=runtime)
    for labels in ([0, 1], [7, 8], [1, 1], [8, 8]):
        same(draw, model, labelled, [3, 4], {"class_cond": torch.tensor(labels)})
    assert (draw.stats.captures, draw.reasons) == (2, ())


def test_known_and_unknown_labels_together_run_eagerly_and_it_is_said(model, labelled, runtime):
    draw = Trajectory(model, labelled, runtime=runtime)
    same(draw, model, labelled, [3, 4], {"class_cond": torch.tensor([0, 9])})
    assert runtime.log == [] and "class that the prior knows" in draw.reasons[0]


def test_a_number_that_the_model_may_branch_on_is_baked_in(model, labelled, runtime):
    draw = Trajectory(model, labelled, runtime=runtime)
    for scale in (1.0, 2.5, 1.0):
        same(draw, model, labelled, [3], {"cond_scale": scale})
    assert (draw.stats.captures, draw.stats.replays, draw.reasons) == (2, 3, ())


def test_edited_weights_are_seen(model, labelled, runtime):
    draw = Trajectory(model, labelled, runtime=runtime)
    same(draw, model, labelled, [3])
    with torch.no_grad():
        model.centre.mul_(2)
    same(draw, model, labelled, [3])
    assert draw.stats.captures == 2


def test_a_prior_without_a_closed_form_is_called_before_the_graph(model, runtime):
    class Drawn(tdpm.ImplicitPrior):
        kind, prior_nfe = "drawn", 1

        def sample(self, z, sigma=None, **cond):
            return z * (self.sigma_trunc if sigma is None else sigma) * (1 if z.sum().item() else 0)

    prior = Drawn(SHAPE, sigma_trunc=1.0)
    draw = Trajectory(model, prior, steps=3, runtime=runtime)
    for seeds in ([0, 1], [5, 9]):
        same(draw, model, prior, seeds, steps=3)
    assert (draw.stats.captures, draw.stats.replays, draw.reasons) == (1, 2, ())


def test_what_such_a_prior_knows_of_higher_levels_goes_into_the_graph(model, runtime):
    class Shrunk(tdpm.ImplicitPrior):
        kind = "shrunk"

        def denoise(self, x, sigma, **cond):
            return x * 0.2 / (0.2 + sigma**2)

        def transport(self, x, sigma_from, sigma_to, **cond):
            return x * sigma_to / sigma_from

    prior = Shrunk(SHAPE, sigma_trunc=1.0)
    draw = Trajectory(model, prior, steps=3, runtime=runtime)
    for seeds in ([0, 1], [5, 9]):
        same(draw, model, prior, seeds, steps=3)
    without = Trajectory(
        model, type("Blind", (Shrunk,), {"start": lambda self, z, s, h=(), **c: (z * s, [])})(SHAPE, 1.0), 3
    )
    assert (draw.stats.captures, draw.stats.replays, draw.reasons) == (1, 2, ())
    assert not torch.allclose(draw([0, 1]), without([0, 1]), atol=1e-4)


def test_a_plain_function_is_refused(labelled):
    with pytest.raises(TypeError, match="model is a function: give a torch.nn.Module"):
        Trajectory(lambda x, sigma: x, labelled)


def test_options_are_those_of_sample(model, labelled):
    with pytest.raises(ValueError, match="objective is 'speed'"):
        Trajectory(model, labelled, objective="speed")
    with pytest.raises(ValueError, match="this prior was fitted for"):
        Trajectory(model, labelled).from_noise(torch.zeros(1, 2, 2, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_gpu_one_graph_gives_the_pictures_of_sample(dtype):
    folder = "assets/fashion-mnist"
    checkpoint = tdpm.open_checkpoint(f"{folder}/denoiser.safetensors", device="cuda", dtype=dtype)
    prior = tdpm.load_prior(f"{folder}/prior.safetensors")
    handle = tdpm.kernels.accelerate(checkpoint.model, graphs="off")
    draw = Trajectory(checkpoint.model, prior, objective="quality")
    for first in (0, 8):
        args = {"class_cond": torch.arange(first, first + 4, device="cuda") % 10}
        expected = tdpm.sample(checkpoint.model, prior, None, 4, range(first, first + 4), args, objective="quality")
        found = draw(range(first, first + 4), args)
        torch.testing.assert_close(found, expected, atol=1e-3 if dtype == torch.float32 else 3e-2, rtol=0)
    handle.undo()
    assert (draw.stats.captures, draw.stats.replays) == (1, 2), draw.reasons
