"""What every test shares: repeatable hypothesis runs, and an honest account of the tests that need a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# At the end, so that the folder `kernels` hides no installed package: the tests import `benchmarks` from here.
sys.path.append(str(Path(__file__).resolve().parents[1]))

NO_GPU = "needs a CUDA GPU, and there is none here"

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly how many GPU tests did not run; a green run without them proves nothing about the GPU."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if _says_no_gpu(r)]
    if skipped:
        terminalreporter.section("GPU TESTS NOT RUN", sep="!", red=True, bold=True)
        message = f"{len(skipped)} skipped: no CUDA GPU here. This run says nothing about the GPU."
        terminalreporter.write_line(message, red=True)
        for report in skipped:
            terminalreporter.write_line(f"  {report.nodeid}")


def _says_no_gpu(report: pytest.TestReport) -> bool:
    return isinstance(report.longrepr, tuple) and NO_GPU in report.longrepr[2]
