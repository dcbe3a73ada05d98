"""The compile gate finds what is wrong with a kernel's machine code, and passes the kernels that ship."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdpm_ext.kernels import aot, aot_report, aot_rules
from tdpm_ext.kernels.aot_compile import count_instructions
from tdpm_ext.kernels.variant import Variant

GENERATIONS = list(aot_rules.CARDS)
CLEAN = {
    "registers": 32, "stack": 0, "local": 0, "spills": 0, "shared": 0, "static_shared": 0, "instructions": 200,
    "loads": 4, "wide_loads": 4, "mma": 0, "fp64": 0, "occupancy": 1.0,
    "num_warps": 4, "num_stages": 2, "uses_mma": False, "vector_loads": 4, "streaming": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """The report on tests/faulty_kernels.py for two generations, and the one of a second run."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("aot")
    runs = [aot.run([86, 90], jobs=1, cache=folder, modules=["tests.faulty_kernels"]) for _ in range(2)]
    return runs


def test_right_kernels_pass_and_each_wrong_one_is_named_with_its_fault(faulty):
    found = aot_report.failures(faulty[0], None)
    expected = {
        "sm_86 pipelined": "shared memory per block; sm_86 has 101376",  # and enough on sm_90
        "sm_86 narrow": "loads 16 bytes at once in 0 of",
        "sm_86 double": "computes in double precision",
        "sm_86 odd block": "does not compile: .*arange",
        "sm_86 scalar": "no tensor-core instruction",
        "sm_86 spilling": "spills registers",
    }
    for who, said in expected.items():
        assert any(re.match(rf"{who}: .*{said}", line) for line in found), f"{who} passed: {found}"
    assert {line.split(": ")[0] for line in found} == set(expected)


def test_machine_code_is_read(faulty):
    results = faulty[0]["results"]
    right = results["sm_90"]["scale"]
    assert right["wide_loads"] == right["loads"] > 0 and right["fp64"] == right["mma"] == right["spills"] == 0
    assert right["instructions"] > 10 and 8 <= right["registers"] <= 64
    assert results["sm_86"]["narrow"]["loads"] > right["loads"], "eight 2-byte loads for one of 16 bytes"
    assert results["sm_86"]["pipelined"]["mma"] > results["sm_90"]["pipelined"]["mma"] > 0, "wgmma does more at once"
    assert results["sm_86"]["spilling"]["stack"] > 0 and results["sm_86"]["spilling"]["spills"] > 0


def test_identical_variants_are_compiled_once(faulty):
    assert "scale" in faulty[0]["results"]["sm_90"] and "scale again" not in faulty[0]["results"]["sm_90"]


def test_a_second_run_compiles_only_what_failed(faulty):
    first, second = faulty
    assert (first["compiled"], second["compiled"]) == (9, 1), "an error is not kept: its cause may be outside"
    assert second["results"] == first["results"]


def test_a_name_stands_for_one_variant():
    kernels = pytest.importorskip("tests.faulty_kernels")
    with pytest.raises(ValueError, match="two different variants .* 'same'"):
        aot.collect(80, modules=[_module(lambda cc: [kernels.scale("same"), kernels.scale("same", block=512)])])


def _module(aot_variants) -> str:
    sys.modules["tests.made_up"] = type(sys)("tests.made_up")
    sys.modules["tests.made_up"].aot_variants = aot_variants
    return "tests.made_up"


def test_the_rotation_reaches_every_generation_with_every_kernel_and_dtype():
    pytest.importorskip("triton")
    found = {cc: aot.collect(cc) for cc in GENERATIONS}
    chosen = aot.rotation(found)
    reached, times = set(), Counter()
    for cc, keys in chosen.items():
        for key in keys:
            variant = found[cc][key][1]
            times[variant.name] += 1
            reached.add((cc, variant.kernel.__name__, _dtypes(variant)))
    everything = [(cc, v) for cc, variants in found.items() for _, v in variants.values()]
    assert reached == {(cc, v.kernel.__name__, _dtypes(v)) for cc, v in everything}
    assert {v.name for _, v in everything} == set(times)
    assert sum(times.values()) < len(everything) / 3, "the point of it is to compile less"


def _dtypes(variant: Variant) -> frozenset[str]:
    return frozenset(kind for kind in variant.signature.values() if kind.startswith("*"))


def test_clean_code_breaks_no_rule_on_any_card():
    assert [line for cc in GENERATIONS for line in aot_rules.broken_rules(cc, CLEAN)] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stack": 8}, "spills"),
        ({"local": 8}, "spills"),
        ({"spills": 1}, "spills"),
        ({"shared": 200_000}, "shared memory"),
        ({"fp64": 1}, "double precision"),
        ({"uses_mma": True}, "tensor-core"),
        ({"wide_loads": 3}, "16 bytes"),
        ({"registers": 129}, "the cap is 128"),
        ({"registers": 256, "streaming": False}, "the cap is 255"),
        ({"occupancy": 0.0}, "cannot be launched"),
        ({"occupancy": 0.2}, "fills 20%"),
    ],
)
def test_each_rule_stands_alone(change, said):
    (line,) = aot_rules.broken_rules(80, CLEAN | change)
    assert said in line


@pytest.mark.parametrize(
    ("cc", "registers", "shared", "warps", "expected"),
    [
        (80, 32, 0, 8, 1.0),  # 64 warps of 1024 registers are the whole file
        (80, 33, 0, 8, 48 / 64),  # 33 is handed out as 40: six blocks of 8 warps
        (80, 128, 0, 4, 16 / 64),
        (86, 32, 0, 4, 1.0),  # 12 blocks of 4 of its 48 warps
        (86, 16, 0, 1, 16 / 48),  # 16 blocks at most
        (89, 64, 98 * 1024, 8, 8 / 48),  # one block: shared memory
        (90, 255, 200 * 1024, 8, 8 / 64),
        (90, 255, 0, 16, 0.0),  # 16 warps of 8192 registers do not fit once
    ],
)
def test_occupancy_of_known_cases(cc, registers, shared, warps, expected):
    assert aot_rules.occupancy(cc, registers, shared, warps) == pytest.approx(expected)


@given(
    cc=st.sampled_from(GENERATIONS),
    registers=st.integers(1, 254),
    shared=st.integers(0, 99 * 1024 - 1),
    warps=st.sampled_from([1, 2, 4, 8, 16]),
)
def test_more_of_anything_never_raises_occupancy(cc, registers, shared, warps):
    now = aot_rules.occupancy(cc, registers, shared, warps)
    assert 0 <= now <= 1
    assert aot_rules.occupancy(cc, registers + 1, shared, warps) <= now
    assert aot_rules.occupancy(cc, registers, shared + 1, warps) <= now


def test_instructions_are_sorted_into_kinds():
    loads = ["LDG.E.128", "LDG.E.U16", "LDG.E.EF.64", "LDGSTS.E.BYPASS.128", "UTMALDG.2D", "LDG.E.ENL2.256"]
    others = ["LDS.128", "LDL.64", "STL", "STG.E.128", "FFMA", "FADD", "NOP", "NOP"]
    kinds = ["HMMA.16816.F32", "HGMMA.64x64x16.F32", "UTCHMMA", "DFMA", "F2F.F64.F32", "MUFU.RCP64H"]
    sass = loads + others + kinds
    assert count_instructions(sass) == {
        "instructions": 18, "loads": 6, "wide_loads": 4, "spills": 2, "mma": 3, "fp64": 3,
    }  # fmt: skip


def test_the_same_measurement_is_no_regression_and_each_worse_one_is_said():
    assert list(aot_rules.regressions(CLEAN, CLEAN)) == []
    tolerated = CLEAN | {"registers": 40, "instructions": 220}
    assert list(aot_rules.regressions(CLEAN, tolerated)) == []
    worse = {"registers": 41, "instructions": 221, "shared": 1, "occupancy": 0.9, "wide_loads": 3}
    for name, value in worse.items():
        (line,) = aot_rules.regressions(CLEAN, CLEAN | {name: value})
        assert name.replace("_", " ") in line and str(value) in line


def _report(**variants) -> dict:
    names = {"sm_80": list(variants)}
    return {"triton": "9.9.9", "seconds": 1.0, "compiled": 0, "variants": names, "results": {"sm_80": variants}}


def test_the_baseline_keeps_what_it_is_compared_by(tmp_path):
    path = tmp_path / "baseline.json"
    assert aot_report.read_baseline(path) is None
    aot_report.write_baseline(_report(a=CLEAN, b=CLEAN), path)
    kept = aot_report.read_baseline(path)
    assert aot_report.failures(_report(a=CLEAN, b=CLEAN), kept) == []
    assert aot_report.failures(_report(a=CLEAN | {"registers": 60}, b=CLEAN), kept) == [
        "sm_80 a: registers rose from 32 to 60"
    ]
    assert aot_report.failures(_report(a=CLEAN), kept) == ["sm_80 b: in the baseline, but no longer a variant"]
    assert aot_report.failures(_report(a=CLEAN, b=CLEAN, c=CLEAN), kept) == ["sm_80 c: not in the baseline"]
    other = _report(a=CLEAN | {"registers": 60}) | {"triton": "10.0.0"}
    assert aot_report.failures(other, kept) == [], "another compiler may choose other code"


def test_a_baseline_of_one_generation_leaves_the_others(tmp_path):
    path = tmp_path / "baseline.json"
    aot_report.write_baseline(_report(a=CLEAN), path)
    aot_report.write_baseline(_report() | {"results": {"sm_120": {"b": CLEAN}}}, path)
    assert list(aot_report.read_baseline(path)["results"]) == ["sm_80", "sm_120"]
    assert path.read_text().count("\n") < 20, "one line per variant, for readable diffs"


def test_the_table_has_a_line_per_variant_and_a_column_per_generation():
    results = {"sm_80": {"a": CLEAN, "b": {"error": "no", "num_warps": 4}}, "sm_90": {"a": CLEAN}}
    report = {"results": results, "variants": {"sm_80": ["a", "b", "c"], "sm_90": ["a", "b", "c"]}}
    head, _, first, second = aot_report.table(report)
    assert "sm_80" in head and "sm_90" in head
    assert first.count("32   0.0K 100%") == 2 and "4 of 4" in first
    assert "ERROR" in second and second.rstrip().endswith("-")


def test_the_command_says_what_is_missing(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('blocked')")
    line = [sys.executable, "-m", "tdpm_ext.kernels.aot"]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "Triton is not installed, so there is nothing to compile: pip install triton"


def test_the_command_refuses_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([]) == 2
    assert "unset it" in capsys.readouterr().err


def test_the_command_names_the_generations_it_knows(capsys):
    with pytest.raises(SystemExit) as stopped:
        aot.main(["--arch", "sm_75"])
    assert stopped.value.code == 2
    assert "'sm_75' is none of sm_80, sm_86" in capsys.readouterr().err


def test_a_variant_names_its_kernels_arguments_exactly():
    kernel = type("Kernel", (), {"arg_names": ["x", "n", "BLOCK"]})
    right = {
        "name": "v", "kernel": kernel, "signature": {"x": "*fp16", "n": "i32", "BLOCK": "constexpr"},
        "constexprs": {"BLOCK": 4}, "aligned": ("x",), "num_warps": 4, "num_stages": 1,
    }  # fmt: skip
    assert Variant(**right).streaming is False
    for change, said in (
        ({"signature": {"x": "*fp16", "BLOCK": "constexpr"}}, "signature must name .*: n"),
        ({"constexprs": {}}, "constexprs must be .*: BLOCK"),
        ({"aligned": ("BLOCK",)}, "aligned must name .*: BLOCK"),
    ):
        with pytest.raises(ValueError, match=said):
            Variant(**right | change)


@pytest.mark.slow
def test_the_kernels_that_ship_pass_and_are_no_worse_than_the_baseline():
    pytest.importorskip("triton")
    report = aot.run(GENERATIONS, full=False)
    baseline = aot_report.read_baseline()
    assert aot_report.failures(report, baseline) == []
    every = {(arch, name) for arch, names in report["variants"].items() for name in names}
    assert {(arch, name) for arch, facts in baseline["results"].items() for name in facts} == every
    assert len(every) > 400 and sum(map(len, report["results"].values())) > 100
    again = aot.run(GENERATIONS, full=False)
    assert again["compiled"] == 0


def test_the_baseline_itself_keeps_the_hard_promises():
    for arch, variants in aot_report.read_baseline()["results"].items():
        for name, facts in variants.items():
            assert facts["shared"] <= aot_rules.CARDS[int(arch[3:])].shared_block, (arch, name)
            assert facts["occupancy"] > 0, (arch, name)
            assert facts["mma"] > 0 or not re.match(r"attention/\d+/(fp16|bf16)", name), (arch, name)
