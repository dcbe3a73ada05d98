"""Prior files: what is kept, how they are written, and that no file can do worse than raise PriorFileError."""

import errno
import json
import os
import resource
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from tdpm_ext.fit import fit_prior
from tdpm_ext.plan import Plan
from tdpm_ext.priors import io
from tdpm_ext.priors.base import ImplicitPrior
from tdpm_ext.priors.registry import register_prior, unregister_prior

SHAPE = (1, 3, 2)
KIND = "test_diagonal"
fuzz = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Diagonal(ImplicitPrior):
    """Independent Gaussian pixels: the smallest prior that works."""

    def __init__(self, mean, std, sigma_trunc=5.0, sigma_max=80.0):
        super().__init__(mean.shape, sigma_trunc, sigma_max)
        self.mean, self.std = mean, std

    def transport(self, x, sigma_from, sigma_to, **cond):
        variance = self.std**2
        return self.mean + ((variance + sigma_to**2) / (variance + sigma_from**2)).sqrt() * (x - self.mean)

    def state(self):
        return {"mean": self.mean, "std": self.std}, {"sigma_max": self.sigma_max}

    @classmethod
    def from_state(cls, tensors, config):
        mean, std = tensors["mean"], tensors["std"]
        if mean.shape != std.shape or std.dtype != torch.float32:
            raise ValueError(f"std is {std.dtype} {list(std.shape)}; must be float32 {list(mean.shape)}")
        return cls(mean, std, config["sigma_trunc"], config["sigma_max"])


@pytest.fixture(autouse=True, scope="module")
def kind():
    register_prior(KIND)(Diagonal)
    yield
    unregister_prior(KIND)


@pytest.fixture
def prior():
    generator = torch.Generator().manual_seed(0)
    made = Diagonal(torch.randn(SHAPE, generator=generator), torch.rand(SHAPE, generator=generator), 2.5)
    made.card = {"source": "pictures", "pictures": 10, "checkpoint": "abc", "data_std": 0.5}
    made.plans = {"fidelity": {2: Plan((2.5, 1.0, 0.0), (1, 2), (4.0,), error=0.1), 3: Plan((2.5, 0.0), (1,))}}
    return made


@pytest.fixture
def file(prior, tmp_path):
    return io.save_prior(prior, tmp_path / "prior.safetensors")


@pytest.fixture(scope="module")
def mixture_file(tmp_path_factory):
    pictures = torch.randn(40, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    fitted = fit_prior("mixture", pictures, labels=torch.arange(40) % 2, components=1, progress=False)
    return io.save_prior(fitted, tmp_path_factory.mktemp("mixture") / "mixture.safetensors")


def header_of(path):
    with safe_open(path, framework="pt") as opened:
        return json.loads(opened.metadata()[io.KEY])


def rewrite(path, tensors=None, metadata=None, **changes):
    """Write the file again with another header, or other tensors."""
    with safe_open(path, framework="pt") as opened:
        kept = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header = json.loads(opened.metadata()[io.KEY])
    header.update(changes)
    metadata = {io.KEY: json.dumps(header)} if metadata is None else metadata
    save_file(kept if tensors is None else tensors, path, metadata)


def refused(path, reason, **options):
    with pytest.raises(io.PriorFileError, match=reason) as caught:
        io.load_prior(path, **options)
    assert str(path) in str(caught.value)


def test_a_saved_prior_comes_back_whole(prior, file):
    again = io.load_prior(file)
    assert type(again) is Diagonal
    assert (again.shape, again.sigma_trunc, again.card) == (prior.shape, prior.sigma_trunc, prior.card)
    assert again.plans["fidelity"][2] == prior.plans["fidelity"][2]
    assert again.plans["fidelity"][3].to_json() == prior.plans["fidelity"][3].to_json()
    z = torch.ones(1, *SHAPE)
    assert torch.equal(again.sample(z), prior.sample(z))


@pytest.mark.parametrize("name", ["gaussian", "lowrank", "mixture"])
def test_every_closed_form_kind_comes_back_whole(name, tmp_path):
    pictures = torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    fitted = fit_prior(name, pictures, labels=torch.arange(60) % 2, sigma_max=14.6, progress=False, checkpoint="abc")
    fitted.sigma_trunc = 3.5
    fitted.plans = {"quality": {3: fitted.plan_for(3)}}
    again = io.load_prior(io.save_prior(fitted, tmp_path / "p.safetensors"), expect_shape=(1, 4, 4))
    assert (again.kind, again.sigma_trunc, again.sigma_max) == (name, 3.5, 14.6)
    assert again.card == json.loads(json.dumps(fitted.card))
    assert again.plan_for(3, "quality").to_json() == fitted.plan_for(3, "quality").to_json()
    cond = {"class_cond": torch.tensor([0, 1, 2])}
    assert torch.equal(again.sample(pictures[:3], **cond), fitted.sample(pictures[:3], **cond))


def test_loading_does_not_keep_a_window_on_the_file(prior, file):
    again = io.load_prior(file)
    file.write_bytes(b"")
    assert torch.equal(again.mean, prior.mean)


def test_saving_again_replaces_the_file_and_leaves_nothing_else(prior, file):
    prior.sigma_trunc = 7.0
    io.save_prior(prior, file)
    assert io.load_prior(file).sigma_trunc == 7.0
    assert os.listdir(file.parent) == [file.name]


def test_saving_through_a_link_keeps_the_link(prior, tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "real" / "prior.safetensors")
    io.save_prior(prior, link)
    assert link.is_symlink()
    assert io.load_prior(tmp_path / "real" / "prior.safetensors").shape == SHAPE


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(prior, tmp_path, umask):
    before = os.umask(umask)
    try:
        path = io.save_prior(prior, tmp_path / "p.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


DISK_FULL = """
import resource, sys
import torch
from tdpm_ext.fit import fit_prior
from tdpm_ext.priors.io import save_prior
prior = fit_prior("gaussian", torch.randn(40, 1, 8, 8), progress=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_prior(prior, sys.argv[1])
except OSError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a file size limit")
def test_a_full_disk_leaves_the_old_file_and_no_litter(file):
    before = file.read_bytes()
    command = [sys.executable, "-c", DISK_FULL, str(file)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.startswith("refused:")
    assert str(file) in run.stdout
    assert "nothing there was changed" in run.stdout
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_the_last_moment_leaves_the_old_file_and_no_litter(prior, file, monkeypatch, failure):
    before = file.read_bytes()

    def replace(source, target):
        raise failure

    monkeypatch.setattr(io.os, "replace", replace)
    with pytest.raises(type(failure)):
        io.save_prior(prior, file)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_missing_folder_is_named(prior, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        io.save_prior(prior, tmp_path / "nowhere" / "prior.safetensors")


def test_what_could_not_be_loaded_again_is_not_saved(prior, tmp_path):
    path = tmp_path / "prior.safetensors"

    def fails(reason):
        with pytest.raises(ValueError, match=reason):
            io.save_prior(prior, path)
        assert not path.exists()

    card = prior.card
    for bad in ({"loss": float("nan")}, {"a": {1, 2}}):
        prior.card = bad
        fails("plain JSON")
    prior.card = {"text": "x" * io.MAX_HEADER}
    fails("shorten its card")
    prior.card, prior.sigma_trunc = card, -1.0
    fails("sigma_trunc is -1.0")
    prior.sigma_trunc, prior.std = 2.5, torch.full(SHAPE, float("inf"))
    fails("'std' holds NaN or infinite")
    prior.std = torch.ones(SHAPE, dtype=torch.int32)
    fails("'std' has dtype torch.int32")
    prior.std, prior.kind = torch.ones(SHAPE), "nothing"
    fails("no prior kind 'nothing'")


def test_an_expected_shape_or_checkpoint_is_compared_and_both_sides_are_said(prior, file):
    assert io.load_prior(file, expect_shape=SHAPE, expect_checkpoint="abc").shape == SHAPE
    refused(file, r"\(1, 3, 2\).*\(4, 64, 64\)", expect_shape=(4, 64, 64))
    refused(file, "'abc'.*'xyz'", expect_checkpoint="xyz")
    prior.card["checkpoint"] = None
    assert io.load_prior(io.save_prior(prior, file), expect_checkpoint="xyz").shape == SHAPE


def test_a_file_that_is_not_there_or_not_a_file_is_refused(tmp_path):
    refused(tmp_path / "absent.safetensors", "cannot be read")
    refused(tmp_path, "cannot be read")


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\0" * 8, b"PK\x03\x04" + b"\0" * 60, b"\x80\x02}q\x00."])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "prior.safetensors"
    path.write_bytes(content)
    refused(path, "not a readable|header claims")


def test_an_ordinary_safetensors_file_is_no_prior(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    refused(path, "no 'tdpm_prior' in its metadata")
    save_file({"weight": torch.zeros(2)}, path, {"config": "{}"})
    refused(path, "no 'tdpm_prior' in its metadata")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"version": NaN}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
        ("[]", "list, not an object"),
        ("{}", "version is None"),
        ('{"version": 1}', "lacks kind"),
        ('{"version": 2}', "update tdpm_ext"),
        ('{"version": 0}', "reads 1"),
        ('{"version": true}', "version is True"),
        ('{"version": "1"}', "version is '1'"),
    ],
)
def test_a_bad_header_is_refused(file, text, reason):
    rewrite(file, metadata={io.KEY: text})
    refused(file, reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "unheard_of"}, f"no prior kind 'unheard_of': known are .*{KIND}"),
        ({"kind": 3}, "kind is 3"),
        ({"kind": "x" * 1000}, "kind is 'xxx"),
        ({"shape": [1, 3]}, "says shape"),
        ({"shape": "1x3x2"}, "shape is '1x3x2'"),
        ({"shape": []}, r"shape is \[\]"),
        ({"shape": [1, -3, 2]}, "shape is"),
        ({"shape": [1, 2**31, 2]}, "shape is"),
        ({"shape": [1, 3.0, 2]}, "shape is"),
        ({"sigma_trunc": 0}, "sigma_trunc is 0"),
        ({"sigma_trunc": 10**400}, "sigma_trunc is 1000"),
        ({"sigma_trunc": "5"}, "sigma_trunc is '5'"),
        ({"coupled": 1}, "coupled is 1"),
        ({"coupled": False}, "says coupled"),
        ({"prior_nfe": 1}, "says prior_nfe"),
        ({"prior_nfe": -1}, "prior_nfe is -1"),
        ({"config": []}, "config is"),
        ({"config": {}}, "does not make a 'test_diagonal' prior .KeyError"),
        ({"config": {"sigma_max": -80}}, "does not make a 'test_diagonal' prior .ValueError"),
        ({"card": None}, "card is None"),
        ({"plans": []}, "plans is"),
        ({"plans": {"speed": {}}}, "objectives are fidelity, quality"),
        ({"plans": {"quality": []}}, "objectives are fidelity, quality"),
        ({"plans": {"quality": {"two": {}}}}, "budget 'two'"),
        ({"plans": {"quality": {"0": {}}}}, "budget '0'"),
        ({"plans": {"quality": {"²": {}}}}, "budget '²'"),
        ({"plans": {"quality": {"2": {"sigmas": [1, 2], "orders": [1]}}}}, "plan for 2 evaluations: .*end in 0"),
        ({"plans": {"quality": {"1": {"sigmas": [2, 1, 0], "orders": [1, 1]}}}}, "plan for 1 evaluations spends 2"),
    ],
)
def test_a_bad_field_is_named(file, changes, reason):
    rewrite(file, **changes)
    refused(file, reason)


def test_bad_tensors_are_named(prior, file):
    mean, std = prior.mean, prior.std
    rewrite(file, {"mean": mean})
    refused(file, "KeyError: 'std'")
    rewrite(file, {"mean": mean, "std": std[0]})
    refused(file, r"std is torch.float32 \[3, 2\]")
    rewrite(file, {"mean": mean, "std": std.double()})
    refused(file, "std is torch.float64")
    rewrite(file, {"mean": mean, "std": std.int()})
    refused(file, "'std' has dtype I32; allowed are")
    rewrite(file, {"mean": mean, "std": std * float("nan")})
    refused(file, "'std' holds NaN")
    rewrite(file, {"mean": mean, "std": std / 0})
    refused(file, "'std' holds NaN or infinite")
    rewrite(file, {"mean": mean, "std": std, "extra": torch.zeros(())})
    refused(file, r"does not have: \['extra'\]")


def split(content):
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(head, data):
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("claim", [2**27, 2**40, 2**64 - 1])
def test_a_header_longer_than_any_prior_needs_is_not_read(file, claim):
    file.write_bytes(struct.pack("<Q", claim) + file.read_bytes()[8:])
    refused(file, "header claims")


def test_tensors_that_claim_more_than_the_file_holds_are_refused(file):
    head, data = split(file.read_bytes())
    for entry in ("mean", "std"):
        head[entry]["shape"] = [1, 2**20, 2**20]
        head[entry]["data_offsets"][1] = head[entry]["data_offsets"][0] + 2**42
    file.write_bytes(join(head, data))
    refused(file, "not a readable")


def test_an_empty_tensor_and_a_scalar_do_not_confuse_the_reader(prior, file):
    rewrite(file, {"mean": torch.zeros(0), "std": torch.tensor(1.0)})
    refused(file, r"std is torch.float32 \[\]; must be float32 \[0\]")


def load_or_refuse(path):
    """Load; the only exception that may come out is PriorFileError with the file's name."""
    try:
        prior = io.load_prior(path)
    except io.PriorFileError as error:
        assert str(path) in str(error)
        return
    assert prior.sample(torch.zeros(1, *prior.shape)).shape == (1, *prior.shape)


@fuzz
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=6))
def test_flipped_bytes_never_raise_anything_else(file, flips):
    original = bytearray(file.read_bytes())
    content = bytearray(original)
    for position, flip in flips:
        content[position % len(content)] ^= flip
    damaged = file.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    load_or_refuse(damaged)


@fuzz
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_of_a_mixture_never_raise_anything_else(mixture_file, flips):
    content = bytearray(mixture_file.read_bytes())
    for position, flip in flips:
        content[position % len(content)] ^= flip
    damaged = mixture_file.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    load_or_refuse(damaged)


@fuzz
@given(length=st.integers(0, 10_000), tail=st.binary(max_size=8))
def test_truncated_and_lengthened_files_never_raise_anything_else(file, length, tail):
    content = file.read_bytes()
    damaged = file.with_name("damaged.safetensors")
    damaged.write_bytes(content[: length % (len(content) + 1)] + tail)
    load_or_refuse(damaged)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@fuzz
@given(
    changes=st.dictionaries(st.sampled_from(io.FIELDS) | st.text(max_size=5), json_values, max_size=3),
    dropped=st.sets(st.sampled_from(io.FIELDS), max_size=1),
)
def test_random_headers_never_raise_anything_else(file, changes, dropped):
    header = {**header_of(file), **changes}
    for name in dropped:
        header.pop(name, None)
    tensors = {"mean": torch.zeros(SHAPE), "std": torch.ones(SHAPE)}
    damaged = Path(file.with_name("damaged.safetensors"))
    damaged.write_bytes(save(tensors, {io.KEY: json.dumps(header)}))
    load_or_refuse(damaged)
