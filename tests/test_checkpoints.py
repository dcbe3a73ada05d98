"""Opening k-diffusion checkpoints: the same numbers as k-diffusion's own model, and words when a file is wrong."""

import json
import os

os.environ.setdefault("K_DIFFUSION_USE_COMPILE", "0")  # k-diffusion's transformer compiles parts of itself otherwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tdpm_ext.checkpoints import fingerprint_tensors, open_checkpoint
from tdpm_ext.optional import k_diffusion_advice

K = pytest.importorskip("k_diffusion")

UNET = {
    "type": "image_v1",
    "input_channels": 1,
    "input_size": [8, 8],
    "patch_size": 1,
    "mapping_out": 16,
    "depths": [1, 1],
    "channels": [16, 32],
    "self_attn_depths": [False, True],
    "augment_wrapper": False,
    "sigma_data": 0.6,
    "sigma_min": 0.01,
    "sigma_max": 80,
}
TRANSFORMER = {
    "type": "image_transformer_v1",
    "input_channels": 1,
    "input_size": [8, 8],
    "patch_size": [2, 4],
    "depth": 1,
    "width": 64,
    "sigma_data": 0.6,
    "sigma_min": 0.01,
    "sigma_max": 80,
}


def build(model, num_classes=0, seed=0):
    """A k-diffusion denoiser with every zero-initialised weight drawn at random, and its config."""
    config = K.config.load_config({"model": dict(model), "dataset": {"num_classes": num_classes}})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inner = K.config.make_model(config)
        for p in inner.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.2)
    return K.config.make_denoiser_wrapper(config)(inner).eval().requires_grad_(False), config


def save(path, denoiser, config, dtype=torch.float32, **metadata):
    weights = {k: v.to(dtype).contiguous() for k, v in denoiser.inner_model.state_dict().items()}
    save_file(weights, path, metadata={"config": json.dumps(config), **metadata})
    return path


def batch(n=3, channels=1, side=8, seed=1):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, side, side, generator=gen) * 2, torch.tensor([0.1, 2.0, 30.0])[:n]


def one_hot(labels, classes):
    return torch.nn.functional.one_hot(labels, classes + 1)[:, :classes].float()


@pytest.mark.parametrize("augmented", [False, True])
def test_class_conditional_unet_takes_labels_as_k_diffusion_takes_one_hot(tmp_path, augmented):
    denoiser, config = build({**UNET, "mapping_cond_dim": 5, "augment_wrapper": augmented}, 5)
    ck = open_checkpoint(save(tmp_path / "c.safetensors", denoiser, config))
    x, sigma = batch()
    labels = torch.tensor([0, 4, 5])  # 5 = dropped
    wanted = denoiser(x, sigma, mapping_cond=one_hot(labels, 5))
    assert torch.equal(wanted, ck.model(x, sigma, class_cond=labels))
    assert torch.equal(ck.model(x, sigma, class_cond=torch.full((3,), 5)), ck.model(x, sigma))
    assert (ck.model(x, sigma) - wanted).abs().amax((1, 2, 3))[:2].min() > 1e-4  # the label matters
    assert (ck.shape, ck.num_classes, ck.sigma_min, ck.sigma_max) == ((1, 8, 8), 5, 0.01, 80.0)


def test_transformer_takes_labels_and_none_means_its_last_row(tmp_path):
    denoiser, config = build(TRANSFORMER, 3)
    ck = open_checkpoint(save(tmp_path / "c.safetensors", denoiser, config))
    x, sigma = batch()
    labels = torch.tensor([0, 2, 3])
    assert torch.equal(denoiser(x, sigma, class_cond=labels), ck.model(x, sigma, class_cond=labels))
    assert torch.equal(denoiser(x, sigma, class_cond=torch.full((3,), 3)), ck.model(x, sigma))


@pytest.mark.parametrize("model", [UNET, {**UNET, "augment_wrapper": True}, TRANSFORMER])
def test_unconditional_models_open(tmp_path, model):
    denoiser, config = build(model)
    ck = open_checkpoint(save(tmp_path / "c.safetensors", denoiser, config))
    x, sigma = batch()
    assert torch.equal(denoiser(x, sigma), ck.model(x, sigma))
    assert ck.num_classes == 0
    with pytest.raises(ValueError, match="takes no class labels"):
        ck.model(x, sigma, class_cond=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="takes no class labels"):
        ck.model(x, sigma, cond_scale=2.0)


@pytest.mark.parametrize("model", [{**UNET, "mapping_cond_dim": 4, "augment_wrapper": True}, TRANSFORMER])
def test_guidance_is_the_usual_extrapolation_in_one_call(tmp_path, model):
    denoiser, config = build(model, 4)
    ck = open_checkpoint(save(tmp_path / "c.safetensors", denoiser, config))
    x, sigma = batch()
    labels = torch.tensor([1, 3, 4])
    cond, uncond = ck.model(x, sigma, class_cond=labels), ck.model(x, sigma)
    calls = []
    ck.model.inner_model.register_forward_hook(lambda *_: calls.append(1))
    aug_cond = torch.zeros(3, 9)  # batch-sized extras are doubled too
    guided = ck.model(x, sigma, class_cond=labels, cond_scale=3.0, aug_cond=aug_cond)
    assert len(calls) == 1
    torch.testing.assert_close(guided, uncond + 3.0 * (cond - uncond), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ck.model(x, sigma, class_cond=labels, cond_scale=0.0), uncond, atol=2e-6, rtol=1e-5)
    assert torch.equal(ck.model(x, sigma, cond_scale=3.0), uncond)


def test_half_precision_files_are_opened_in_float32(tmp_path):
    denoiser, config = build(UNET)
    ck = open_checkpoint(save(tmp_path / "c.safetensors", denoiser, config, torch.float16))
    assert {p.dtype for p in ck.model.parameters()} == {torch.float32}
    x, sigma = batch()
    torch.testing.assert_close(ck.model(x, sigma), denoiser(x, sigma), atol=5e-3, rtol=5e-3)


def test_other_dtypes_keep_the_preconditioning_in_float32_and_the_dtype_of_x(tmp_path):
    denoiser, config = build({**UNET, "mapping_cond_dim": 4}, 4)
    path = save(tmp_path / "c.safetensors", denoiser, config)
    x, sigma = batch()
    labels = torch.tensor([0, 1, 4])
    wanted = open_checkpoint(path).model(x, sigma, class_cond=labels, cond_scale=1.5)
    low = open_checkpoint(path, dtype=torch.bfloat16).model
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    got = low(x, sigma, class_cond=labels, cond_scale=1.5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, atol=0.15, rtol=0.05)
    tiny = torch.full((3,), 0.01)  # here c_skip carries x, which bfloat16 alone would round to 1 part in 256
    assert (low(x, tiny) - x).abs().max() < 0.05
    exact = open_checkpoint(path, dtype=torch.float64).model(x.double(), sigma, class_cond=labels, cond_scale=1.5)
    torch.testing.assert_close(exact.float(), wanted, atol=1e-4, rtol=1e-4)
    assert open_checkpoint(path).model(x.half(), sigma).dtype == torch.float16


def test_training_checkpoint_gives_its_ema_weights(tmp_path):
    denoiser, config = build(UNET, seed=0)
    other, _ = build(UNET, seed=1)
    weights = denoiser.inner_model.state_dict()
    content = {"config": config, "model": other.inner_model.state_dict(), "model_ema": weights, "step": 7, "opt": {}}
    torch.save(content, tmp_path / "run_00000007.pth")
    ck = open_checkpoint(tmp_path / "run_00000007.pth")
    x, sigma = batch()
    assert torch.equal(denoiser(x, sigma), ck.model(x, sigma))
    same = open_checkpoint(save(tmp_path / "same.safetensors", denoiser, config))
    assert same.fingerprint == ck.fingerprint


def trained(path, denoiser, config, step=7):
    """A training checkpoint with everything that k-diffusion's train.py puts into one, and its NAME_state.json."""
    inner = denoiser.inner_model
    opt = torch.optim.AdamW(inner.parameters(), lr=1e-3)
    for p in inner.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    content = {
        "config": config,
        "model": {name: tensor + 1 for name, tensor in inner.state_dict().items()},
        "model_ema": inner.state_dict(),
        "opt": opt.state_dict(),
        "sched": torch.optim.lr_scheduler.ConstantLR(opt).state_dict(),
        "ema_sched": K.utils.EMAWarmup(power=0.6667, max_value=0.9999).state_dict(),
        "epoch": 1,
        "step": step,
        "gns_stats": K.gns.GradientNoiseScale().state_dict(),
        "ema_stats": {"loss": 0.5},
        "demo_gen": torch.Generator().manual_seed(0).get_state(),
        "elapsed": 1.5,
    }
    torch.save(content, path / f"run_{step:08}.pth")
    (path / "run_state.json").write_text(json.dumps({"latest_checkpoint": f"run_{step:08}.pth"}))
    return path / f"run_{step:08}.pth"


def test_what_train_py_writes_opens_through_its_state_file_and_survives_conversion(tmp_path):
    denoiser, config = build(TRANSFORMER, 3)
    weights = trained(tmp_path, denoiser, config)
    x, sigma = batch()
    labels = torch.tensor([0, 2, 3])
    wanted = denoiser(x, sigma, class_cond=labels)
    for path in (weights, tmp_path / "run_state.json"):
        assert torch.equal(open_checkpoint(path).model(x, sigma, class_cond=labels), wanted)
    # convert_for_inference.py: the EMA weights in half precision, the config as indented JSON
    content = torch.load(weights, weights_only=True)
    halved = {name: tensor.to(torch.float16) for name, tensor in content["model_ema"].items()}
    slim = weights.with_suffix(".safetensors")
    save_file(halved, slim, metadata={"config": json.dumps(content["config"], indent=4)})
    ck = open_checkpoint(slim)
    assert ck.num_classes == 3 and ck.config["model"]["depth"] == 1
    torch.testing.assert_close(ck.model(x, sigma, class_cond=labels), wanted, atol=0.05, rtol=5e-3)


def test_a_state_file_that_points_nowhere_and_other_json_are_refused(tmp_path):
    (tmp_path / "run_state.json").write_text(json.dumps({"latest_checkpoint": "elsewhere/run_00000001.pth"}))
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {tmp_path}/run_00000001.pth"):
        open_checkpoint(tmp_path / "run_state.json")
    for content, says in ((build(UNET)[1], "a config, not a checkpoint"), ([], "without latest_checkpoint")):
        (tmp_path / "other.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"other.json is .*{says}"):
            open_checkpoint(tmp_path / "other.json")


HOURGLASS = {
    "type": "image_transformer_v2",
    "input_channels": 1,
    "input_size": [8, 8],
    "patch_size": [1, 1],
    "depths": [1, 1],
    "widths": [32, 64],
    "self_attns": [{"type": "shifted-window", "d_head": 16, "window_size": 4}, {"type": "global", "d_head": 16}],
    "mapping_depth": 1,
    "mapping_width": 32,
    "sigma_data": 0.6,
    "sigma_min": 0.01,
    "sigma_max": 80,
}
HAS_HOURGLASS = hasattr(K.models, "ImageTransformerDenoiserModelV2")


@pytest.mark.skipif(not HAS_HOURGLASS, reason="image_transformer_v2 is not in a release of k-diffusion yet")
@pytest.mark.parametrize("classes", [0, 3])
def test_the_hourglass_transformer_opens_where_k_diffusion_has_it(tmp_path, classes):
    denoiser, config = build(HOURGLASS, classes)
    ck = open_checkpoint(save(tmp_path / "c.safetensors", denoiser, config))
    x, sigma = batch()
    labels = {"class_cond": torch.tensor([0, 2, 3])} if classes else {}
    assert torch.equal(denoiser(x, sigma, **labels), ck.model(x, sigma, **labels))
    assert ck.num_classes == classes
    if classes:
        uncond = ck.model(x, sigma)
        assert torch.equal(uncond, denoiser(x, sigma, class_cond=torch.full((3,), 3)))
        guided = ck.model(x, sigma, **labels, cond_scale=2.0)
        torch.testing.assert_close(guided, 2 * ck.model(x, sigma, **labels) - uncond, atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="multiples of 4 and 4"):
        ck.model(torch.zeros(1, 1, 6, 8), 1.0)


@pytest.mark.skipif(HAS_HOURGLASS, reason="this k-diffusion has image_transformer_v2")
def test_an_hourglass_transformer_says_where_to_get_it(tmp_path):
    denoiser, config = build(UNET)
    config["model"] = HOURGLASS
    with pytest.raises(ImportError, match="image_transformer_v2.*does not have.*from its repository"):
        open_checkpoint(save(tmp_path / "c.safetensors", denoiser, config))


def test_dropout_is_off_although_the_config_has_it(tmp_path):
    denoiser, config = build({**UNET, "dropout_rate": 0.5})
    ck = open_checkpoint(save(tmp_path / "c.safetensors", denoiser, config))
    x, sigma = batch()
    assert not torch.equal(denoiser(x, sigma), denoiser(x, sigma)), "k-diffusion's own model is not deterministic"
    assert torch.equal(ck.model(x, sigma), ck.model(x, sigma))
    assert not ck.model.training and not any(p.requires_grad for p in ck.model.parameters())


def test_opening_draws_no_random_numbers(tmp_path):
    path = save(tmp_path / "c.safetensors", *build(UNET))
    before = torch.get_rng_state()
    open_checkpoint(path)
    assert torch.equal(before, torch.get_rng_state())


def test_fingerprint_names_the_tensors_and_nothing_else(tmp_path):
    denoiser, config = build(UNET)
    first = open_checkpoint(save(tmp_path / "a.safetensors", denoiser, config)).fingerprint
    again = open_checkpoint(save(tmp_path / "b.safetensors", denoiser, config, step="9")).fingerprint
    assert first == again and len(first) == 16 and int(first, 16) >= 0
    t = {"a": torch.arange(6.0), "b": torch.tensor(1)}
    base = fingerprint_tensors(t)
    assert base == fingerprint_tensors(dict(reversed(t.items())))
    variants = [
        {"a": t["a"].clone().index_fill_(0, torch.tensor(3), 0.5), "b": t["b"]},
        {"a": t["a"].reshape(2, 3), "b": t["b"]},
        {"a": t["a"].view(torch.int32), "b": t["b"]},
        {"c": t["a"], "b": t["b"]},
        {"a": t["a"]},
    ]
    assert len({base, *map(fingerprint_tensors, variants)}) == 6


def test_fingerprint_is_the_same_in_every_release():
    t = {"w": torch.tensor([[1.0, -2.0]], dtype=torch.float16), "b": torch.tensor([3], dtype=torch.int64)}
    assert fingerprint_tensors(t) == "183e84c56ac38d7ac1a437c3e31d7a14db8e7ac1cf4caf26d94ebe727fd8a3ab"


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (torch.tensor([0, 1, 5]), "class_cond holds 5; labels go from 0 to 3"),
        (torch.tensor([0, -1, 2]), "class_cond holds -1"),
        (torch.tensor([0, 1]), "int64 tensor \\[3\\]"),
        (torch.zeros(3), "torch.float32"),
        (3, "class_cond is 3"),
    ],
)
def test_wrong_labels_are_refused(tmp_path, labels, says):
    ck = open_checkpoint(save(tmp_path / "c.safetensors", *build({**UNET, "mapping_cond_dim": 4}, 4)))
    x, sigma = batch()
    with pytest.raises(ValueError, match=says):
        ck.model(x, sigma, class_cond=labels)


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (1, 8, 8), (1, 1, 9, 8)])
def test_wrong_picture_shapes_are_refused(tmp_path, shape):
    ck = open_checkpoint(save(tmp_path / "c.safetensors", *build(UNET)))
    with pytest.raises(ValueError, match="takes \\[B, 1, H, W\\]|multiples of 2 and 2"):
        ck.model(torch.zeros(shape), 1.0)


def test_config_can_come_from_outside(tmp_path):
    denoiser, config = build(UNET)
    save_file(denoiser.inner_model.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="(?s)no 'config'.*convert_for_inference.*--config"):
        open_checkpoint(tmp_path / "bare.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    x, sigma = batch()
    for source in (tmp_path / "config.json", str(tmp_path / "config.json"), config):
        ck = open_checkpoint(tmp_path / "bare.safetensors", config=source)
        assert torch.equal(denoiser(x, sigma), ck.model(x, sigma))
    with pytest.raises(FileNotFoundError, match="no config at"):
        open_checkpoint(tmp_path / "bare.safetensors", config=tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"type": "image_v9"}, "'image_v9' is unknown; supported are image_v1, image_transformer_v1, image"),
        ({"type": ["image_v1"]}, "is unknown"),
        ({"channels": [16, 64]}, "do not fit the config; .*other shapes: .* and \\d+ more"),
        ({"depths": [2, 1]}, "missing from the file: u_net"),
        ({"augment_wrapper": True}, "missing from the file: inner_model.*not in the model"),
        ({"depths": [10**9, 1]}, "blocks, and the file holds"),
        ({"channels": [10**9, 10**9]}, "do not fit the config|cannot build"),
        ({"mapping_out": "wide"}, "cannot build a model"),
        ({"mapping_out": 15}, "cannot build a model"),
        ({"depths": None}, "cannot build a model"),
        ({"input_size": [8]}, "input_size"),
        ({"input_size": [8, -8]}, "input_size"),
        ({"input_channels": 10**15}, "do not fit the config|cannot build"),
        ({"sigma_max": 0.001}, "sigma_min < sigma_max"),
        ({"sigma_min": None}, "sigma_min < sigma_max"),
        ({"sigma_data": 0}, "0 < sigma_data"),
        ({"loss_config": "odd"}, "Unknown loss config type"),
    ],
)
def test_configs_that_do_not_fit_say_what_is_wrong(tmp_path, change, says):
    denoiser, config = build(UNET)
    config["model"].update(change)
    path = save(tmp_path / "c.safetensors", denoiser, config)
    with pytest.raises(ValueError, match=f"(?s)c.safetensors.*({says})"):
        open_checkpoint(path)


@pytest.mark.parametrize("key", ["input_size", "sigma_max"])
def test_missing_config_entries_are_named(tmp_path, key):
    denoiser, config = build(UNET)
    del config["model"][key]
    with pytest.raises(ValueError, match=f"lacks {key}"):
        open_checkpoint(save(tmp_path / "c.safetensors", denoiser, config))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", "/etc/passwd", '{"model": 3}', '{"model": {"type": "image_v1"}, "dataset": []}']
)
def test_configs_that_are_no_config_are_refused(tmp_path, text):
    save_file(build(UNET)[0].inner_model.state_dict(), tmp_path / "c.safetensors", metadata={"config": text})
    with pytest.raises(ValueError, match="config"):
        open_checkpoint(tmp_path / "c.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, bad):
    denoiser, config = build(UNET)
    denoiser.inner_model.proj_in.weight.data[0] = bad
    with pytest.raises(ValueError, match="weights in proj_in.weight are NaN or infinite"):
        open_checkpoint(save(tmp_path / "c.safetensors", denoiser, config))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_files_are_refused_wherever_they_end(tmp_path, suffix):
    denoiser, config = build(UNET)
    path = tmp_path / f"whole{suffix}"
    if suffix == ".pth":
        torch.save({"config": config, "model_ema": denoiser.inner_model.state_dict()}, path)
    else:
        save(path, denoiser, config)
    whole = path.read_bytes()
    for length in (0, 1, 3, 7, 8, 60, 2000, len(whole) // 2, len(whole) - 1):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut"):
            open_checkpoint(cut)


@settings(max_examples=60, deadline=None)
@given(where=st.floats(0, 1), to=st.integers(0, 255), header=st.booleans())
def test_a_changed_byte_opens_or_is_refused_in_words(damaged, where, to, header):
    whole, path = damaged
    start = int.from_bytes(whole[:8], "little") + 8
    content = bytearray(whole)
    content[int(where * ((start if header else len(whole)) - 1))] = to
    path.write_bytes(content)
    try:
        open_checkpoint(path)
    except ValueError as error:
        assert str(path) in str(error)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    path = save(tmp_path_factory.mktemp("damaged") / "c.safetensors", *build(UNET))
    return path.read_bytes(), path


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 4096)
    (tmp_path / "b.safetensors").write_text("<html>404</html>")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "c.pth")
    torch.save(torch.zeros(2), tmp_path / "d.pth")
    torch.save({"model_ema": {}, "config": {}}, tmp_path / "e.pth")
    for name in ("a.safetensors", "b.safetensors", "c.pth", "d.pth", "e.pth"):
        with pytest.raises(ValueError, match=f"{name}.*(not a|no tensors)"):
            open_checkpoint(tmp_path / name)


class Payload:
    def __reduce__(self):
        return (os.mkdir, (os.environ["PAYLOAD_DIR"],))


def test_python_objects_in_a_pth_are_never_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("PAYLOAD_DIR", str(tmp_path / "ran"))
    torch.save({"model_ema": {}, "config": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="Python objects, which are never loaded"):
        open_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_folders_and_missing_files_say_what_is_supported(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="diffusers folder; supported checkpoints are k-diffusion"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nothing.safetensors"):
        open_checkpoint(tmp_path / "nothing.safetensors")


def test_advice_for_broken_k_diffusion_names_the_cure():
    missing = k_diffusion_advice(ModuleNotFoundError("No module named 'k_diffusion'", name="k_diffusion"))
    assert "tdpm-ext[kdiffusion]" in missing
    for error in (
        ModuleNotFoundError("No module named 'pkg_resources'", name="pkg_resources"),
        ImportError("cannot import name 'packaging' from 'pkg_resources'", name="pkg_resources"),
    ):
        assert "setuptools>=77.0.3,<82" in k_diffusion_advice(error)
    assert "No module named 'clip'" in k_diffusion_advice(ModuleNotFoundError("No module named 'clip'", name="clip"))


def test_the_written_file_is_left_alone(tmp_path):
    path = save(tmp_path / "c.safetensors", *build(UNET))
    before = path.read_bytes()
    open_checkpoint(path)
    assert path.read_bytes() == before and load_file(path)
