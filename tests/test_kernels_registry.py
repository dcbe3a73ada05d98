"""Which backend is chosen, and what is said about it: a pure function of facts, so no GPU is needed to pin it down."""

import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdpm_ext.kernels import KernelError, facts, registry, report, use_backend
from tdpm_ext.kernels.facts import Facts

HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
CODES = {HALF: "f16", BF16: "bf16", FLOAT: "f32", DOUBLE: "f64"}
MIB = 1 << 20


def python(code, **environment):
    """Run a line in a fresh interpreter; the last line of what it prints."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


# The table of choices


def attention_rows():
    """One line for each card, head dimension, dtype and mask: what "auto" takes, and who else could."""
    for cc, dim, dtype, mask in itertools.product((0, 75, 80, 120), (40, 160, 72), (HALF, FLOAT, DOUBLE), ("", "bool")):
        call = Facts("attention", cc=cc, head_dim=dim, dtype=dtype, mask=mask, q_len=1024, kv_len=77)
        able = [b for b in registry.BACKENDS_OF["attention"] if not registry.violations("attention", b, call)]
        yield f"{cc} d{dim} {CODES[dtype]} {mask or '-'}", registry.select("attention", call).backend, " ".join(able)


def test_who_can_do_an_attention_is_pinned():
    for name, auto, able in attention_rows():
        cc, dim, dtype, _ = name.split()
        expected = ["triton"] * (int(cc) >= 80 and dim != "d72" and dtype != "f64")
        expected += ["xformers"] * (dtype != "f64")
        assert (name, auto, able) == (name, "sdpa", " ".join([*expected, "sdpa", "reference"]))


NORMS = {  # case: what "auto" takes
    "cpu": (Facts("group_norm", device="cpu"), "native"),
    "apple": (Facts("group_norm", device="mps", nbytes=9 * MIB), "native"),
    "small": (Facts("group_norm", cc=90, nbytes=MIB - 1), "native"),
    "large": (Facts("group_norm", cc=90, nbytes=MIB), "triton"),
    "large, bf16": (Facts("group_norm", cc=90, nbytes=MIB, dtype=BF16), "triton"),
    "large, double": (Facts("group_norm", cc=90, nbytes=MIB, dtype=DOUBLE), "native"),
    "large, Turing": (Facts("group_norm", cc=75, nbytes=MIB), "native"),
    "large, no driver": (Facts("group_norm", cc=0, nbytes=MIB), "native"),
    "large, no Triton": (Facts("group_norm", cc=90, nbytes=MIB, unavailable=(("triton", "gone"),)), "native"),
    "small, in a graph": (Facts("group_norm", cc=90, nbytes=9, capturing=True), "triton"),
    "in a graph, no Triton": (Facts("group_norm", cc=90, capturing=True, unavailable=(("triton", "gone"),)), "native"),
    "small, channels_last": (Facts("group_norm", cc=90, nbytes=9, layout="channels_last"), "triton"),
    "small, channels_last kept by torch": (
        Facts("group_norm", cc=90, nbytes=9, layout="channels_last", native_nhwc=True),
        "native",
    ),
    "large, channels_last kept by torch": (
        Facts("group_norm", cc=90, nbytes=MIB, layout="channels_last", native_nhwc=True),
        "triton",
    ),
    "gradients": (Facts("group_norm", cc=90, nbytes=9 * MIB, needs_grad=True), "reference"),
    "gradients on the CPU": (Facts("group_norm", device="cpu", needs_grad=True), "reference"),
    "compiling": (Facts("group_norm", cc=90, nbytes=9 * MIB, compiling=True), "reference"),
    "small, parameters of another dtype": (Facts("group_norm", cc=90, dtype=HALF, mixed=True), "reference"),
    "large, parameters of another dtype": (Facts("group_norm", cc=90, dtype=HALF, mixed=True, nbytes=MIB), "triton"),
}


@pytest.mark.parametrize("case", NORMS)
def test_automatic_group_norm_is_pinned(case):
    call, expected = NORMS[case]
    assert registry.select("group_norm", call).backend == expected


STEPS = {
    "cpu": (Facts("sampler_step", device="cpu"), "native"),
    "cpu, half": (Facts("sampler_step", device="cpu", dtype=HALF), "reference"),
    "cpu, mixed": (Facts("sampler_step", device="cpu", mixed=True), "reference"),
    "cpu, gradients": (Facts("sampler_step", device="cpu", needs_grad=True), "reference"),
    "gpu": (Facts("sampler_step", cc=80), "triton"),
    "gpu, mixed": (Facts("sampler_step", cc=80, dtype=HALF, mixed=True), "triton"),
    "gpu, double": (Facts("sampler_step", cc=80, dtype=DOUBLE), "native"),
    "gpu, gradients": (Facts("sampler_step", cc=80, needs_grad=True), "reference"),
    "gpu, compiling": (Facts("sampler_step", cc=80, compiling=True), "reference"),
}


@pytest.mark.parametrize("case", STEPS)
def test_automatic_sampler_step_is_pinned(case):
    call, expected = STEPS[case]
    assert registry.select("sampler_step", call).backend == expected


@pytest.mark.parametrize("blocked", [{"needs_grad": True}, {"compiling": True}, {"unavailable": (("triton", "gone"),)}])
def test_a_measured_backend_is_taken_unless_it_cannot_do_the_call(blocked):
    call = {"cc": 90, "dtype": HALF, "head_dim": 40, "table": "triton"}
    assert registry.select("attention", Facts("attention", **call)).backend == "triton"
    assert registry.select("attention", Facts("attention", **call, **blocked)).backend == "sdpa"


any_facts = st.builds(
    Facts,
    op=st.sampled_from(registry.OPS),
    device=st.sampled_from(["cpu", "cuda", "mps"]),
    cc=st.sampled_from([0, 75, 80, 89, 90, 120]),
    dtype=st.sampled_from(list(CODES)),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    nbytes=st.sampled_from([0, 1000, 10 * MIB]),
    head_dim=st.sampled_from([40, 64, 72, 512]),
    mask=st.sampled_from(["", "bool", "added"]),
    mixed=st.booleans(),
    needs_grad=st.booleans(),
    compiling=st.booleans(),
    capturing=st.booleans(),
    unavailable=st.sampled_from([(), (("triton", "gone"),), (("triton", "gone"), ("xformers", "gone too"))]),
    native_nhwc=st.booleans(),
    table=st.sampled_from(["", "triton", "xformers", "sdpa"]),
)


@given(any_facts)
def test_auto_never_raises_and_takes_only_what_can_do_the_call(call):
    backend, reasons = registry.select(call.op, call)
    assert registry.violations(call.op, backend, call) == ()
    assert set(reasons) == set(registry.BACKENDS_OF[call.op]) and all(reasons.values())


@given(any_facts, st.sampled_from(registry.BACKENDS[1:]))
def test_a_request_is_met_exactly_or_refused_with_every_reason(call, request_):
    asked = replace(call, request=request_)
    if request_ not in registry.BACKENDS_OF[call.op]:
        with pytest.raises(KernelError, match="has no backend"):
            registry.select(call.op, asked)
    elif not registry.violations(call.op, request_, call):
        assert registry.select(call.op, asked).backend == request_
    else:
        with pytest.raises(KernelError) as caught:
            registry.select(call.op, asked)
        for backend in registry.BACKENDS_OF[call.op]:
            for reason in registry.violations(call.op, backend, call):
                assert reason in str(caught.value)


def test_a_refusal_says_what_was_given_and_what_is_possible():
    call = Facts("attention", cc=75, dtype=DOUBLE, head_dim=72, needs_grad=True, request="triton",
                 unavailable=(("xformers", "xformers is not installed"),))  # fmt: skip
    with pytest.raises(KernelError) as caught:
        registry.select("attention", call)
    message = str(caught.value)
    for words in (
        "attention on cuda, float64, head dimension 72: 'triton' was asked for",
        "needs compute capability 8.0, this GPU has 7.5",
        "takes float32, float16 and bfloat16, not float64",
        "gradients are needed",
        f"has head dimensions {', '.join(map(str, registry.HEAD_DIMS))}, not 72",
        "xformers: xformers is not installed",
        "possible here: auto, sdpa, reference",
    ):
        assert words in message


# Asking


def test_the_innermost_request_counts_and_each_is_undone():
    before = registry.requests()
    with use_backend("reference"):
        assert registry.requests() == ("reference",) * 3
        with use_backend("sdpa"):
            assert registry.requests() == ("reference", "sdpa", "reference")  # where an operation has it
        with pytest.raises(ZeroDivisionError), use_backend("auto", "group_norm"):
            assert registry.requests() == ("auto", "reference", "reference")
            _ = 1 / 0
        assert registry.requests() == ("reference",) * 3
    assert registry.requests() == before


def test_a_request_stays_in_its_thread():
    seen = []
    with use_backend("reference"):
        worker = threading.Thread(target=lambda: seen.append(registry.requested("group_norm")))
        worker.start()
        worker.join()
    assert seen == ["auto"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("flash",), "no backend 'flash'; give one of auto, reference, native, triton, sdpa, xformers"),
        (("sdpa", "group_norm"), "no backend 'sdpa' of group_norm; give one of auto, triton, native, reference"),
        (("triton", "conv"), "no operation 'conv'; there are group_norm, attention, sampler_step"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(arguments, words):
    with pytest.raises(KernelError, match=words), use_backend(*arguments):
        pytest.fail("entered")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TDPM_KERNELS": "auto"}, "auto auto auto"),
        ({"TDPM_KERNELS": "off"}, "native sdpa reference"),
        ({"TDPM_KERNELS": "reference"}, "reference reference reference"),
        ({"TDPM_KERNELS": "Triton "}, "triton auto triton"),
        ({"TDPM_KERNELS": "off", "TDPM_ATTENTION": "triton"}, "native triton reference"),
    ],
)
def test_the_environment_asks_for_backends(environment, expected, monkeypatch):
    for name in facts.SWITCHES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    facts.switches.cache_clear()
    try:
        assert " ".join(registry.requests()) == expected
        with use_backend("auto"):
            assert registry.requests() == ("auto",) * 3
        assert report()["environment"].items() >= {k: v.strip().lower() for k, v in environment.items()}.items()
    finally:
        facts.switches.cache_clear()


def test_a_misspelt_switch_is_an_error_with_the_allowed_values(monkeypatch):
    monkeypatch.setenv("TDPM_ATTENTION", "flash")
    facts.switches.cache_clear()
    try:
        with pytest.raises(KernelError, match="TDPM_ATTENTION='flash' .* auto, sdpa, triton, xformers"):
            registry.requested("group_norm")
    finally:
        facts.switches.cache_clear()


# The installation


def test_importing_brings_in_neither_triton_nor_xformers():
    code = "import sys, tdpm_ext.kernels; print([m for m in ('triton', 'xformers') if m in sys.modules])"
    assert python(code) == "[]"


def test_a_triton_that_does_not_work_is_a_reason_and_not_a_crash_unless_strict(tmp_path):
    (tmp_path / "triton.py").write_text("raise OSError('libcuda.so.1: cannot open shared object')")
    code = (
        f"import os, sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from tdpm_ext.kernels import KernelError, facts, registry\n"
        "call = facts.Facts('group_norm', cc=90, nbytes=1 << 30, unavailable=facts.unavailable())\n"
        "answer = registry.select('group_norm', call).backend + ' ' + dict(facts.unavailable())['triton']\n"
        "os.environ['TDPM_KERNELS_STRICT'] = '1'; facts.switches.cache_clear(); facts.unavailable.cache_clear()\n"
        "try: facts.unavailable()\n"
        "except KernelError as error: print(answer, '|', error)"
    )
    answer, refusal = python(code, TDPM_KERNELS_STRICT="0").split(" | ")
    assert answer.startswith("native triton is installed but broken (OSError: libcuda.so.1: cannot open")
    assert "TDPM_KERNELS_STRICT=1 forbids" in refusal


def test_a_triton_that_is_too_old_is_a_reason(tmp_path):
    (tmp_path / "triton.py").write_text("")
    (tmp_path / "triton-2.1.0.dist-info").mkdir()
    (tmp_path / "triton-2.1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: triton\nVersion: 2.1.0\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from tdpm_ext.kernels import facts; print(dict(facts.unavailable())['triton'])"
    )
    assert python(code) == "triton 2.1.0 is older than 3.3"


def test_the_public_names_are_pinned():
    import tdpm_ext.kernels as kernels

    names = "KernelError accelerate attention graphed group_norm report sampler_step use_backend"
    assert " ".join(sorted(kernels.__all__)) == names
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fast'"):
        _ = kernels.fast


def test_versions_are_compared_as_numbers():
    assert facts.version_tuple("3.10.0+git1234") == (3, 10) > facts.version_tuple("3.9.1")


def test_torch_says_whether_its_group_norm_keeps_channels_last():
    """A newer torch may answer True; then "auto" stops replacing small channels_last norms."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    answer = facts.native_nhwc_group_norm()
    with FakeTensorMode():
        x = torch.empty(2, 64, 8, 8, device="cuda").to(memory_format=torch.channels_last)
        assert (torch.group_norm(x, 32).stride() == x.stride()) is answer


# Saying


def test_a_decision_is_logged_once_and_reported(caplog, monkeypatch):
    monkeypatch.setattr(registry, "_decisions", {})
    with caplog.at_level(logging.INFO, "tdpm_ext.kernels"):
        for nbytes in (5, 6, 7):
            registry.decide("group_norm", Facts("group_norm", cc=90, nbytes=nbytes, request="triton"))
    assert caplog.messages == ["group_norm: triton (asked for)"]
    assert ["group_norm", "triton", "asked for"] in report()["decisions"]


def test_the_report_is_plain_data_and_reads_well():
    found = report()
    assert json.loads(json.dumps(found)) == found
    assert found["backends"].keys() == {"group_norm", "attention", "sampler_step"}
    if not torch.cuda.is_available():
        assert "needs CUDA tensors" in found["backends"]["group_norm"]["triton"]
    assert found["backends"]["attention"]["sdpa"] == "can be used here"
    text = str(found)
    for words in ("GPU ", "attention ", "TDPM_KERNELS=", "sdpa "):
        assert words in text
