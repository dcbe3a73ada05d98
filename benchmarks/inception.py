"""Real FID: Inception features through clean-fid's own code, in its own modes. Nothing else here may be called FID.

    extractor = load_inception("clean")  # downloads as clean-fid does, where there is a network
    extractor = load_inception("clean", "inception-2015-12-05.pt")  # offline: weights that you have
    fid = frechet_distance(extractor.folder("out/samples"), extractor.folder("eval.zip"))

The modes are clean-fid's: ``clean`` (antialiased bicubic resize), ``legacy_tensorflow`` and ``legacy_pytorch``; their
numbers must not be mixed. This code path is tested with a stand-in network; it has not been run with the real weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

MODES = ("clean", "legacy_tensorflow", "legacy_pytorch")
TORCHSCRIPT, STATE_DICT = "inception-2015-12-05.pt", "pt_inception-2015-12-05-6726825d.pth"
# k-diffusion's evaluation module states the first; of the second, torch's own convention: the name ends in its start
TORCHSCRIPT_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
STATE_DICT_START = "6726825d"


class InceptionMissing(RuntimeError):
    """The weights are neither given nor to be had; the message says in one line what is missing and what to do."""


@dataclass(frozen=True)
class Inception:
    """``extract``: float pictures [B, 3, H, W] in [0, 255], resized as ``mode`` wants them -> features [B, D]."""

    mode: str
    extract: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device
    name: str  # "FID-clean", or "FD-.." where the weights are not the published ones
    weights: str  # SHA-256

    def folder(self, path: str | Path, batch: int = 32) -> np.ndarray:
        """Features float64 [N, D] of every picture of a folder or zip, read and resized by clean-fid."""
        from cleanfid import fid

        with warnings.catch_warnings():  # one of its modes silences every warning from then on
            features = fid.get_folder_features(
                str(path), self.extract, num_workers=0, batch_size=batch, device=self.device, mode=self.mode,
                verbose=False,
            )  # fmt: skip
        return np.asarray(features, dtype=np.float64)


def load_inception(mode: str = "clean", weights: str | Path | None = None, device: str | torch.device = "cpu",
                   any_weights: bool = False) -> Inception:  # fmt: skip
    """The Inception network of one of clean-fid's modes.

    Args:
        mode: one of ``MODES``.
        weights: the TorchScript file ``inception-2015-12-05.pt`` (modes ``clean``, ``legacy_tensorflow``) or the state
            dict ``pt_inception-2015-12-05-6726825d.pth`` (``legacy_pytorch``); None: clean-fid downloads them.
        any_weights: accept other weights than the published ones; results are then named "FD-..", never "FID".

    Raises:
        ValueError: unknown mode, or weights that are not the published ones. InceptionMissing: no weights.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: clean-fid has {', '.join(MODES)}")
    if weights is not None and not Path(weights).is_file():
        raise InceptionMissing(f"no Inception weights at {weights}: give the file {_wanted(mode)}")
    try:
        import cleanfid  # noqa: F401
    except ImportError as error:
        raise InceptionMissing(f"the Inception features need clean-fid ({error}): pip install clean-fid") from error
    device = torch.device(device)
    try:
        digest, network = (_scripted if mode != "legacy_pytorch" else _state_dict)(mode, weights)
    except (OSError, EOFError) as error:  # URLError is an OSError
        if weights is not None:
            raise
        raise InceptionMissing(
            f"no Inception weights and no network to fetch them ({error}): pass the path of {_wanted(mode)}"
        ) from error
    published = digest == TORCHSCRIPT_SHA256 if mode != "legacy_pytorch" else digest.startswith(STATE_DICT_START)
    if not (published or any_weights):
        raise ValueError(f"{weights} has SHA-256 {digest}, which is not that of the published {_wanted(mode)}")
    network = network.to(device).eval()
    name = f"FID-{mode}" if published else f"FD-{digest[:8]}-{mode}"
    if mode == "legacy_pytorch":  # this network takes [0, 1] and returns a list of maps; as in clean-fid
        return Inception(mode, lambda x: network(x / 255)[0].flatten(1), device, name, digest)
    return Inception(mode, network, device, name, digest)


def _wanted(mode: str) -> str:
    return STATE_DICT if mode == "legacy_pytorch" else TORCHSCRIPT


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _scripted(mode: str, weights: str | Path | None) -> tuple[str, torch.nn.Module]:
    """clean-fid's wrapper of the TorchScript network; it takes a folder that holds the file under its own name."""
    from cleanfid.inception_torchscript import InceptionV3W

    inside = mode == "legacy_tensorflow"
    if weights is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "clean-fid"
        folder.mkdir(parents=True, exist_ok=True)
        with _no_half_file(folder / TORCHSCRIPT):
            network = InceptionV3W(str(folder), download=True, resize_inside=inside)
        return _sha256(folder / TORCHSCRIPT), network
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(weights, Path(folder) / TORCHSCRIPT)
        return _sha256(Path(weights)), InceptionV3W(folder, download=False, resize_inside=inside)


def _state_dict(mode: str, weights: str | Path | None) -> tuple[str, torch.nn.Module]:
    """clean-fid's own port of the network; its loader of weights is replaced where a file is given."""
    from cleanfid import inception_pytorch

    own = inception_pytorch.load_state_dict_from_url
    if weights is not None:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        inception_pytorch.load_state_dict_from_url = lambda *_args, **_kwargs: state
    try:
        network = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False)
    finally:
        inception_pytorch.load_state_dict_from_url = own
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / STATE_DICT
    return _sha256(Path(path)), network


@contextlib.contextmanager
def _no_half_file(path: Path):
    """clean-fid opens the file before the download is complete: an interrupted one must not be taken for it."""
    existed = path.exists()
    try:
        yield
    except BaseException:
        if not existed:
            path.unlink(missing_ok=True)
        raise
