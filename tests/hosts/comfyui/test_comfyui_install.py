"""``tdpm`` in ComfyUI's lists: everywhere, once, and gone without a trace after undo."""

import importlib
import logging

import pytest
import torch

from tdpm_ext import hosts

NAME = "tdpm"


def state_of(comfy):
    """What installing may touch."""
    names, folders = comfy.samplers.SAMPLER_NAMES, comfy.folder_paths.folder_names_and_paths
    known = {key: (list(paths), set(kinds)) for key, (paths, kinds) in folders.items()}
    return list(names), id(names), dict(vars(comfy.sampling)), known


@pytest.fixture
def absent(comfy):
    """ComfyUI as it is without us; afterwards we are there again."""
    comfy.handle.undo()
    yield
    comfy.handle = hosts.install("comfyui")


def test_every_list_of_samplers_has_the_name(comfy):
    from comfy_extras.nodes_custom_sampler import KSamplerSelect

    assert comfy.samplers.SAMPLER_NAMES.count(NAME) == 1
    for node in (comfy.nodes.KSampler, comfy.nodes.KSamplerAdvanced):
        assert NAME in node.INPUT_TYPES()["required"]["sampler_name"][0]
    assert NAME in KSamplerSelect.INPUT_TYPES()["required"]["sampler_name"][1]["options"]
    assert KSamplerSelect.execute(NAME).args[0].sampler_function is comfy.sampling.sample_tdpm


def test_the_name_is_not_silently_another_sampler(comfy, tiny):
    made = comfy.samplers.KSampler(tiny.bare, 4, torch.device("cpu"), sampler=NAME, scheduler="normal")
    assert made.sampler == NAME  # an unknown one becomes euler there


def test_undo_restores_every_name(comfy, absent):
    before = state_of(comfy)
    assert NAME not in before[0] and "sample_tdpm" not in before[2] and NAME not in before[3]
    with hosts.install("comfyui") as handle:
        assert handle.active and state_of(comfy) != before
    assert state_of(comfy) == before
    handle.undo()  # once more is harmless
    assert state_of(comfy) == before


def test_installing_twice_changes_nothing(comfy):
    before = state_of(comfy)
    second = hosts.install("comfyui")
    assert not second.active and state_of(comfy) == before
    second.undo()
    assert state_of(comfy) == before


def test_a_reload_of_the_module_of_samplers_is_survived(comfy, tiny):
    importlib.reload(comfy.sampling)
    assert not hosts.install("comfyui").active
    assert comfy.ksampler(tiny.model).used_prior


def test_a_reload_of_our_own_module_is_survived(comfy, tiny, absent):
    before = state_of(comfy)
    first = hosts.install("comfyui")
    importlib.reload(importlib.import_module("tdpm_ext.hosts.comfyui"))
    second = hosts.install("comfyui")
    assert comfy.samplers.SAMPLER_NAMES.count(NAME) == 1 and comfy.ksampler(tiny.model).used_prior
    second.undo()
    first.undo()
    assert state_of(comfy) == before


def test_a_folder_that_the_user_configured_stays_and_comes_first(comfy, absent, tmp_path):
    comfy.folder_paths.add_model_folder_path(NAME, str(tmp_path))
    before = state_of(comfy)
    try:
        with hosts.install("comfyui"):
            paths = comfy.folder_paths.get_folder_paths(NAME)
            assert paths[0] == str(tmp_path) and len(paths) == 2
        assert state_of(comfy) == before
    finally:
        del comfy.folder_paths.folder_names_and_paths[NAME]


def test_something_else_of_that_name_comes_back(comfy, absent):
    comfy.sampling.sample_tdpm = other = lambda model, x, sigmas: x
    try:
        with hosts.install("comfyui"):
            assert comfy.sampling.sample_tdpm is not other
        assert comfy.sampling.sample_tdpm is other
    finally:
        del comfy.sampling.sample_tdpm


def test_what_came_after_us_is_left_alone(comfy, absent, caplog):
    handle = hosts.install("comfyui")
    comfy.sampling.sample_tdpm = later = lambda model, x, sigmas: x
    try:
        with caplog.at_level(logging.WARNING, logger="tdpm_ext"):
            handle.undo()
        assert comfy.sampling.sample_tdpm is later and "replaced after install" in caplog.text
    finally:
        del comfy.sampling.sample_tdpm


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "ddim"])
def test_other_samplers_give_the_same_bits(comfy, tiny, name):
    with_us = comfy.ksampler(tiny.model, sampler=name, cfg=3.0)
    comfy.handle.undo()
    try:
        without = comfy.ksampler(tiny.bare, sampler=name, cfg=3.0)
    finally:
        comfy.handle = hosts.install("comfyui")
    assert torch.equal(with_us.samples, without.samples) and with_us.log == []
