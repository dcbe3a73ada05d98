"""The registry of prior kinds."""

import pytest

from tdpm_ext.priors import registry


@pytest.fixture
def scratch():
    registered = registry.register_prior("scratch_kind")(type("Scratch", (), {}))
    yield registered
    if "scratch_kind" in registry.list_priors():
        registry.unregister_prior("scratch_kind")


def test_a_registered_kind_is_found_listed_and_knows_its_name(scratch):
    assert registry.get_prior("scratch_kind") is scratch
    assert "scratch_kind" in registry.list_priors()
    assert scratch.kind == "scratch_kind"


def test_names_are_listed_in_order(scratch):
    assert registry.list_priors() == sorted(registry.list_priors())


def test_a_taken_name_is_refused_and_keeps_its_owner(scratch):
    with pytest.raises(ValueError, match=r"'scratch_kind' is taken by Scratch"):
        registry.register_prior("scratch_kind")(type("Other", (), {}))
    assert registry.get_prior("scratch_kind") is scratch


@pytest.mark.parametrize("name", ["nothing", "", None, 3, ["gaussian"]])
def test_an_unknown_name_lists_the_known_ones(scratch, name):
    with pytest.raises(ValueError, match="known are .*scratch_kind"):
        registry.get_prior(name)


@pytest.mark.parametrize("name", ["", "Upper", "1st", "a b", "a/b", "x" * 65, None, "name\n"])
def test_a_malformed_name_is_refused(name):
    with pytest.raises(ValueError, match="lower-case letters"):
        registry.register_prior(name)


def test_only_classes_are_registered():
    with pytest.raises(TypeError, match="decorates a class"):
        registry.register_prior("scratch_function")(lambda: None)
    assert "scratch_function" not in registry.list_priors()


def test_an_unregistered_kind_is_gone(scratch):
    assert registry.unregister_prior("scratch_kind") is scratch
    with pytest.raises(ValueError, match="no prior kind"):
        registry.unregister_prior("scratch_kind")
