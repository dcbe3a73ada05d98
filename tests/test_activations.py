"""A denoiser's own activations as features of pictures."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tdpm_ext.activations import GRID, WIDEST, Activations, activations_of, outer_blocks
from tdpm_ext.checkpoints import open_checkpoint
from tdpm_ext.kernels import accelerate


class Blocks(nn.Module):
    """Two blocks and a head; takes a condition, and guidance by a doubled batch; may run a batch in parts."""

    def __init__(self, width=6, part=None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, stride=2)])
        self.head, self.part, self.calls = nn.ConvTranspose2d(width, 1, 4, stride=2), part, []

    def forward(self, x, sigma, cond=None, cond_scale=1.0):
        self.calls.append((len(x), float(sigma[0])))
        x = torch.cat([x, x]) if cond_scale != 1.0 else x
        out = torch.cat([self._run(p) for p in x.split(self.part or len(x))])
        out = out if cond is None else out + cond[: len(out), None, None, None]
        return out.chunk(2)[0] if cond_scale != 1.0 else out

    def _run(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


def pictures(count=10, side=9):
    return torch.randn(count, 1, side, side, generator=torch.Generator().manual_seed(1))


def test_blocks_are_the_entries_of_the_outermost_lists():
    inner = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ModuleList([nn.Identity(), nn.Identity()]))
    model = nn.ModuleDict({"down": nn.ModuleList([inner, nn.Identity()]), "up": nn.Sequential(nn.Identity())})
    assert outer_blocks(model) == [inner, model["down"][1]]


def test_features_are_means_of_each_blocks_output_at_the_given_noise_level():
    model, x = Blocks(), pictures()
    found = Activations(model, 0.15, batch=4)(x)
    first = model.blocks[0](x).detach()
    assert found.shape == (10, 2 * 6 * GRID**2)
    assert torch.allclose(found[:, :24], nn.functional.adaptive_avg_pool2d(first, GRID).flatten(1), atol=1e-6)
    assert model.calls == [(4, pytest.approx(0.15)), (4, pytest.approx(0.15)), (2, pytest.approx(0.15))]


def test_neither_batches_nor_a_model_that_runs_in_parts_change_them():
    x = pictures()
    whole = Activations(Blocks(), 0.2, batch=64)(x)
    assert torch.allclose(Activations(Blocks(), 0.2, batch=3)(x), whole, atol=1e-6)
    assert torch.allclose(Activations(Blocks(part=4), 0.2)(x), whole, atol=1e-6)


def test_no_hook_stays_behind_even_when_the_model_fails():
    model = Blocks()
    Activations(model, 0.2)(pictures())
    with pytest.raises(RuntimeError):
        Activations(model, 0.2)(torch.zeros(2, 3, 9, 9))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_condition_of_one_row_serves_every_picture():
    features = Activations(Blocks(), 0.2, {"cond": torch.ones(1)}, batch=4)(pictures())
    assert bool(features.isfinite().all())


def test_wide_networks_are_mixed_down_the_same_way_every_time():
    model, x = Blocks(width=WIDEST // 8 + 40), pictures(3)
    one, other = Activations(model, 0.2)(x), Activations(model, 0.2)(x)
    assert one.shape == (3, WIDEST) and torch.equal(one, other)
    assert not torch.equal(Activations(model, 0.2, seed=1)(x), one)


@pytest.mark.parametrize(
    "model, shape",
    [
        (lambda x, sigma: x, (1, 9, 9)),  # no module
        (nn.Identity(), (1, 9, 9)),  # no blocks
        (Blocks(), (9,)),  # no pictures
    ],
)
def test_models_that_show_none_are_told_apart(model, shape):
    assert activations_of(model, 0.2, shape, {}) is None


def test_of_a_batch_that_guidance_doubles_the_last_half_is_taken():
    x = pictures()
    guided = Activations(Blocks(), 0.2, {"cond_scale": 2.0})(x)
    assert torch.allclose(guided, Activations(Blocks(), 0.2)(x), atol=1e-6)


def test_a_first_call_that_tries_parts_of_the_batch_several_times_is_made_again():
    model, x = Blocks(part=4), pictures()
    tried = set()

    def race(module, given):
        if len(given[0]) not in tried:
            tried.add(len(given[0]))
            module(given[0] * 0.5)

    model.blocks[0].register_forward_pre_hook(race)
    assert torch.allclose(Activations(model, 0.2)(x), Activations(Blocks(), 0.2)(x), atol=1e-6)


def test_the_compiled_tier_shows_the_same_activations_at_every_batch():
    path = Path(__file__).parents[1] / "assets" / "fashion-mnist" / "denoiser.safetensors"
    plain, fast = (open_checkpoint(path).model for _ in range(2))
    x = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    accelerate(fast, precision="compile")
    expected = Activations(plain, 0.12)(x)
    for batch in (19, 20, 7):  # a last part of another size than the one before
        assert torch.allclose(Activations(fast, 0.12, batch=batch)(x), expected, atol=1e-4)
