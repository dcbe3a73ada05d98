"""Installing into k-diffusion: the sampler is there, everything else is as it was, and undo leaves no trace."""

import importlib
import inspect
import logging

import pytest
import torch

from tdpm_ext import hosts
from tdpm_ext.sampler import sample_tdpm

K = pytest.importorskip("k_diffusion")

PLAIN = {  # samplers that run on given noise levels, and what the random ones need to be repeatable
    "euler": {},
    "euler_ancestral": {},
    "heun": {},
    "dpm_2": {},
    "dpm_2_ancestral": {},
    "lms": {},
    "dpmpp_2s_ancestral": {},
    "dpmpp_sde": {"noise_sampler": lambda sigma, sigma_next: torch.ones(2, 1, 4, 4)},
    "dpmpp_2m": {},
    "dpmpp_2m_sde": {"noise_sampler": lambda sigma, sigma_next: torch.ones(2, 1, 4, 4)},
    "dpmpp_3m_sde": {"noise_sampler": lambda sigma, sigma_next: torch.ones(2, 1, 4, 4)},
}


def shrink(x, sigma):
    """The exact denoiser of pictures drawn from a unit normal."""
    return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)


def sample_all():
    """What every sampler of k-diffusion makes of the same noise."""
    sigmas = K.sampling.get_sigmas_karras(5, 0.02, 10.0)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * sigmas[0]
    made = {}
    for name, options in PLAIN.items():
        torch.manual_seed(1)
        made[name] = getattr(K.sampling, f"sample_{name}")(shrink, x, sigmas, disable=True, **options)
    torch.manual_seed(1)
    made["dpm_fast"] = K.sampling.sample_dpm_fast(shrink, x, 0.02, 10.0, 6, disable=True)
    made["dpm_adaptive"] = K.sampling.sample_dpm_adaptive(shrink, x, 0.02, 10.0, disable=True)
    return made


@pytest.fixture(autouse=True)
def clean():
    """Every test starts from, and must leave, a module without our name."""
    assert "sample_tdpm" not in vars(K.sampling)
    yield
    assert "sample_tdpm" not in vars(K.sampling)


def test_undo_restores_the_module_exactly():
    before = dict(vars(K.sampling))
    handle = hosts.install("k_diffusion")
    assert K.sampling.sample_tdpm is sample_tdpm and handle.active
    handle.undo()
    assert list(before) == list(vars(K.sampling))
    assert all(vars(K.sampling)[name] is value for name, value in before.items())
    handle.undo()  # once more is harmless
    assert not handle.active


def test_context_manager_undoes_also_after_an_error():
    with pytest.raises(RuntimeError, match="ours"), hosts.install("k_diffusion"):
        assert hasattr(K.sampling, "sample_tdpm")
        raise RuntimeError("ours")
    assert not hasattr(K.sampling, "sample_tdpm")


def test_second_install_is_harmless():
    with hosts.install("k_diffusion"):
        with hosts.install("k_diffusion") as second:
            assert not second.active
        assert K.sampling.sample_tdpm is sample_tdpm


def test_something_else_of_that_name_comes_back():
    def other(model, x, sigmas):
        return x

    K.sampling.sample_tdpm = other
    try:
        with hosts.install("k_diffusion"):
            assert K.sampling.sample_tdpm is sample_tdpm
        assert K.sampling.sample_tdpm is other
    finally:
        del K.sampling.sample_tdpm


def test_what_came_after_us_is_left_alone(caplog):
    def later(model, x, sigmas):
        return x

    handle = hosts.install("k_diffusion")
    K.sampling.sample_tdpm = later
    try:
        with caplog.at_level(logging.WARNING, logger="tdpm_ext"):
            handle.undo()
        assert K.sampling.sample_tdpm is later
        assert "replaced after install" in caplog.text
    finally:
        del K.sampling.sample_tdpm


def test_the_other_samplers_give_the_same_bits():
    before = sample_all()
    with hosts.install("k_diffusion"):
        during = sample_all()
    after = sample_all()
    for name, picture in before.items():
        assert torch.equal(picture, during[name]) and torch.equal(picture, after[name]), name


def test_hosts_can_read_the_signature():
    with hosts.install("k_diffusion"):
        ours = list(inspect.signature(K.sampling.sample_tdpm).parameters.values())
    theirs = list(inspect.signature(K.sampling.sample_euler).parameters.values())
    assert [(p.name, p.default, p.kind) for p in theirs[:6]] == [(p.name, p.default, p.kind) for p in ours[:6]]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[6:])
    assert not {"sigma_min", "sigma_max", "n", "eta"} & {p.name for p in ours}, "hosts fill these in by name"


def test_it_survives_a_reload_of_k_diffusion():
    with hosts.install("k_diffusion"):
        importlib.reload(K.sampling)
        assert K.sampling.sample_tdpm is sample_tdpm
        assert not hosts.install("k_diffusion").active
    assert not hasattr(K.sampling, "sample_tdpm")


def test_it_survives_a_reload_of_our_own_host_module():
    handle = hosts.install("k_diffusion")
    importlib.reload(importlib.import_module("tdpm_ext.hosts.k_diffusion"))
    assert not hosts.install("k_diffusion").active
    handle.undo()
    assert not hasattr(K.sampling, "sample_tdpm")


def test_the_installed_sampler_samples():
    sigmas = K.sampling.get_sigmas_karras(6, 0.02, 10.0)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * sigmas[0]
    with hosts.install("k_diffusion"):
        ours = K.sampling.sample_tdpm(shrink, x, sigmas, disable=True)  # no prior: the ordinary solver
    torch.testing.assert_close(ours, K.sampling.sample_dpmpp_2m(shrink, x, sigmas, disable=True), atol=1e-5, rtol=1e-5)


def test_unknown_hosts_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown host 'comfy': known hosts are .*k_diffusion"):
        hosts.install("comfy")
    assert {"comfyui", "k_diffusion"} <= set(hosts.list_hosts())


def test_the_package_offers_install():
    import tdpm_ext

    with tdpm_ext.install("k_diffusion") as handle:
        assert K.sampling.sample_tdpm is sample_tdpm and repr(handle) == "Handle('k_diffusion', active=True)"
