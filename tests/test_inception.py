"""The Inception path runs clean-fid's own code in each of its modes, here with stand-in weights of the right shape."""

import urllib.error
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("cleanfid", exc_type=ImportError)
# of torch, on TorchScript, which is what the published weights are; of torchvision, on clean-fid's way to call it
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchvision"),
]

from benchmarks import inception  # noqa: E402
from benchmarks.metrics import frechet_distance  # noqa: E402


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(48, 2048)

    def forward(self, x):
        return self.out(torch.nn.functional.adaptive_avg_pool2d(x, (4, 4)).flatten(1))


class StandIn(torch.nn.Module):
    """The calling convention of the TorchScript Inception, without its knowledge."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x, return_features: bool = True):
        return self.layers((x.float() - 128) / 128)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mine.pt"
    torch.jit.script(StandIn()).save(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten RGB and two grey pictures as a folder and as a zip."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(12):
        values = rng.integers(0, 256, (16, 16) if i >= 10 else (16, 16, 3)).astype(np.uint8)
        Image.fromarray(values).save(folder / f"{i:02d}.png")
    archive = folder.parent / "pictures.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted(folder.iterdir()):
            out.write(path, path.name)
    return folder, archive


@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_a_folder_and_a_zip_of_the_same_pictures_are_at_distance_zero(mode, scripted, pictures):
    net = inception.load_inception(mode, scripted, any_weights=True)
    folder, archive = (net.folder(path) for path in pictures)
    assert folder.shape == (12, 2048) and folder.dtype == np.float64
    some = slice(0, 40)  # all 2,048 would spend the test's time on two large eigen-decompositions
    assert frechet_distance(folder[:, some], archive[:, some]) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(folder[:, some], folder[:, some] + 1) == pytest.approx(40, rel=1e-6)


def test_clean_mode_resizes_before_the_network_and_legacy_inside_it(scripted, pictures):
    sizes = {}
    for mode in ("clean", "legacy_tensorflow"):
        net = inception.load_inception(mode, scripted, any_weights=True)
        seen = set()

        def watched(x, seen=seen, extract=net.extract):
            seen.add(tuple(x.shape[2:]))
            return extract(x)

        replace(net, extract=watched).folder(pictures[0])
        sizes[mode] = seen
    assert sizes == {"clean": {(299, 299)}, "legacy_tensorflow": {(16, 16)}}


def test_the_pytorch_network_takes_a_state_dict_of_its_shape(tmp_path, pictures):
    from cleanfid import inception_pytorch

    loader = inception_pytorch.load_state_dict_from_url
    network = inception_pytorch._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    path = tmp_path / "mine.pth"
    torch.save({k: v.half() * 0 + (0.01 if v.ndim else 1) for k, v in network.state_dict().items()}, path)
    net = inception.load_inception("legacy_pytorch", path, any_weights=True)
    assert inception_pytorch.load_state_dict_from_url is loader
    features = net.extract(torch.full((1, 3, 299, 299), 128.0))
    assert features.shape == (1, 2048) and bool(torch.isfinite(features).all())
    assert net.name.startswith("FD-") and net.name.endswith("legacy_pytorch")


def test_only_published_weights_may_be_called_fid(scripted):
    with pytest.raises(ValueError, match="not that of the published inception-2015-12-05.pt"):
        inception.load_inception("clean", scripted)
    assert inception.load_inception("clean", scripted, any_weights=True).name.startswith("FD-")


def test_missing_weights_are_said_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(inception.InceptionMissing, match="give the file inception-2015-12-05.pt") as error:
        inception.load_inception("clean", tmp_path / "absent.pt")
    assert "\n" not in str(error.value)

    def unreachable(*_args, **_kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(inception.InceptionMissing, match="no network to fetch them") as error:
        inception.load_inception("clean")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.pt"))  # nothing half written that the next run would take for the weights
    with pytest.raises(ValueError, match="clean, legacy_tensorflow, legacy_pytorch"):
        inception.load_inception("tf")
