"""The committed table of attention backends, and the question whether xformers can be used."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdpm_ext.kernels import attention_table, reference

ROW = {
    "cc": 90,
    "head_dim": 40,
    "queries": "long",
    "keys": "short",
    "masked": False,
    "backend": "triton",
    "measured": {
        "gpu": "a name",
        "driver": "1",
        "cuda": "13.0",
        "torch": "2.14.1",
        "triton": "3.8.0",
        "cudnn": "9.24",
        "date": "2026-01-01",
        "command": "python benchmarks/kernels.py",
        "shape": [2, 8, 4096, 77, 40],
        "dtype": "float16",
        "sdpa_us": {"p50": 100.0, "p90": 110.0, "n": 200},
        "backend_us": {"p50": 90.0, "p90": 95.0, "n": 200},
    },
}


def changed(path: str, value):
    """``ROW`` with one entry, named with dots, changed; deleted for ``...``."""
    row = json.loads(json.dumps(ROW))
    *way, last = path.split(".")
    inner = row
    for name in way:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return row


@pytest.fixture
def load(tmp_path):
    def write_and_load(*rows, **content):
        path = tmp_path / "table.json"
        path.write_text(json.dumps({"schema": 1, "rows": list(rows), **content}), encoding="utf-8")
        return attention_table.load(path)

    return write_and_load


# The table


@given(
    cc=st.integers(50, 130),
    head_dim=st.sampled_from([32, 40, 64, 80, 96, 128, 160]),
    q_len=st.integers(1, 1 << 16),
    kv_len=st.integers(1, 1 << 16),
    masked=st.booleans(),
)
def test_sdpa_is_first_wherever_no_measurement_says_otherwise(cc, head_dim, q_len, kv_len, masked):
    committed = attention_table.load(attention_table.PATH)
    key = (cc, head_dim, attention_table.length_class(q_len), attention_table.length_class(kv_len), masked)
    assert attention_table.preferred(cc, head_dim, q_len, kv_len, masked) == committed.get(key, "sdpa")


def test_a_promoted_row_counts_for_its_calls_only(load, monkeypatch):
    table = load(ROW)
    monkeypatch.setattr(attention_table, "_committed", lambda: table)
    assert attention_table.preferred(90, 40, 4096, 77, False) == "triton"
    for other in ((80, 40, 4096, 77, False), (90, 64, 4096, 77, False), (90, 40, 1024, 77, False)):
        assert attention_table.preferred(*other) == "sdpa"
    assert attention_table.preferred(90, 40, 4096, 129, False) == "sdpa"
    assert attention_table.preferred(90, 40, 4096, 77, True) == "sdpa"


@pytest.mark.parametrize(
    ("length", "name"), [(1, "short"), (77, "short"), (128, "short"), (129, "medium"), (1024, "medium"), (1025, "long")]
)
def test_length_classes(length, name):
    assert attention_table.length_class(length) == name


@pytest.mark.parametrize(
    ("entry", "value", "complaint"),
    [
        ("cc", 75, "cc is 75"),
        ("cc", "90", "cc is '90'"),
        ("cc", ..., "cc is None"),
        ("queries", "huge", "queries is 'huge'"),
        ("masked", 1, "masked is 1"),
        ("backend", "sdpa", "backend is 'sdpa'"),
        ("backend", ["triton"], "backend is ['triton']"),
        ("measured", ..., "measured is None"),
        ("colour", "red", "unknown entry 'colour'"),
        ("measured.gpu", ..., "measured.gpu is missing"),
        ("measured.command", "", "measured.command is missing"),
        ("measured.dtype", "float32", "measured.dtype is 'float32'"),
        ("measured.shape", [2, 8, 4096, 77], "not [B, H, Lq, Lk, D]"),
        ("measured.shape", [2, 8, 512, 77, 40], "not among the calls"),
        ("measured.shape", [2, 8, 4096, 77, 64], "not among the calls"),
        ("measured.sdpa_us", {"p50": 100.0}, "must have p50 <= p90"),
        ("measured.backend_us.n", 5, "n of at least 50"),
        ("measured.backend_us.p90", 80.0, "p50 <= p90"),
        ("measured.backend_us.p50", 98.0, "p50 <= p90"),
        ("measured.sdpa_us.p50", 91.0, "no gain, no promotion"),
    ],
)
def test_a_row_that_proves_nothing_is_refused(load, entry, value, complaint):
    load(ROW)
    with pytest.raises(ValueError, match="row 1: ") as raised:
        load(changed("head_dim", 64) | {"measured": changed("measured.shape", [2, 8, 4096, 77, 64])["measured"]},
             changed(entry, value))  # fmt: skip
    assert complaint in str(raised.value)


def test_two_rows_for_the_same_calls_are_refused(load):
    with pytest.raises(ValueError, match="row 1: another row is for the same calls"):
        load(ROW, changed("backend", "xformers"))


@pytest.mark.parametrize("content", [{"schema": 2}, {"rows": {}}])
def test_another_format_is_refused(load, content):
    with pytest.raises(ValueError, match='must be {"schema": 1'):
        load(**content)


# xformers


BROKEN = {  # files of a package that imports badly or not at all, and what is said of it
    "absent": ({}, "ModuleNotFoundError: No module named 'xformers"),
    "fails to load": (
        {"xformers": "raise OSError('libcudart.so.12: cannot open shared object file')"},
        "OSError: libcudart.so.12: cannot open shared object file",
    ),
    "of another version": (
        {"xformers/ops/fmha": ""},
        "AttributeError: module 'xformers.ops.fmha' has no attribute 'ALL_FW_OPS'",
    ),
    "without its extension": (  # built for another torch: imports with a warning, its operators cannot be called
        {
            "xformers": "import warnings; warnings.warn('cannot load C++/CUDA extensions')",
            "xformers/ops/fmha": """
            class FwOp:
                NAME = "fa2F"
                def is_available(): return False
            ALL_FW_OPS = [FwOp, FwOp]
            """,
        },
        "none of its attention operators was built for this torch",
    ),
}
UNUSABLE = """
class FwOp:
    NAME = "fa2F"
    def is_available(): return True
ALL_FW_OPS = [FwOp]
def memory_efficient_attention_forward(*args): raise RuntimeError("no kernel image is available")
"""
ASK = """
import json, sys
from tdpm_ext.kernels.xformers_probe import why_not
said = []
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    if folder.endswith("absent"):
        sys.modules["xformers"] = None
    said.append(why_not())
    sys.path.remove(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        del sys.modules[name]
print(json.dumps(said))
"""


def ask(folder: Path, packages: dict[str, dict[str, str]]) -> dict[str, str]:
    """What `why_not` says of each package, asked in one fresh interpreter with that package first on the path."""
    folders = []
    for name, files in packages.items():
        folders.append(folder / name)
        for module, text in files.items():
            path = folders[-1] / module / "__init__.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text), encoding="utf-8")
            for parent in path.relative_to(folders[-1]).parents[1:-1]:
                (folders[-1] / parent / "__init__.py").touch()
    done = subprocess.run([sys.executable, "-c", ASK, *folders], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip(packages, json.loads(done.stdout), strict=True))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return ask(tmp_path_factory.mktemp("packages"), {name: files for name, (files, _) in BROKEN.items()})


@pytest.mark.parametrize("name", BROKEN)
def test_xformers_that_cannot_be_used_is_found_out(answers, name):
    assert BROKEN[name][1] in answers[name]


@pytest.mark.gpu
def test_xformers_that_cannot_be_called_is_found_out(tmp_path):
    said = ask(tmp_path, {"called": {"xformers/ops/fmha": UNUSABLE}})
    assert said == {"called": "RuntimeError: no kernel image is available"}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_xformers_agrees_with_the_definition(kind):
    from tdpm_ext.kernels import xformers_probe

    if reason := xformers_probe.why_not():
        pytest.skip(f"xformers cannot be used here: {reason}")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 40, generator=generator, device="cuda", dtype=torch.float16) for n in (33, 77, 77))
    mask = torch.rand(2, 1, 33, 77, generator=generator, device="cuda") > 0.4
    mask[:, :, 5] = False
    masks = {"none": None, "bool": mask, "added": torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)}
    out = xformers_probe.attention(q, k, v, mask=masks[kind])
    expected = reference.attention(q, k, v, mask=masks[kind])
    torch.testing.assert_close(out, expected, atol=4e-3, rtol=4e-3)
