"""The manager of CUDA graphs, on recorded graphs that really run again (tests/recorded_graphs.py)."""

import contextlib
import copy
import gc
import inspect
import threading
from collections import namedtuple

import pytest
import torch
from torch import nn

from tdpm_ext.kernels import KernelError, facts, graphed, report, use_backend
from tdpm_ext.kernels.graph_keys import Refused, Watched, take_apart
from tdpm_ext.kernels.graphs import MAX_GRAPHS, Baked, GraphedForward, GraphedTrajectory
from tests.recorded_graphs import RecordingRuntime


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def runtime():
    return RecordingRuntime()


class Denoiser(nn.Module):
    """A small network with k-diffusion's arguments."""

    def __init__(self, channels=2):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(1, channels)

    def forward(self, x, sigma, cond=None):
        h = self.norm(torch.tanh(self.conv(x)))
        h = h + sigma.reshape(-1, 1, 1, 1)
        return h if cond is None else h * cond


def pictures(count=2, size=4, seed=0):
    return torch.randn(count, 2, size, size, generator=torch.Generator().manual_seed(seed))


def wrap(fn, runtime, **options):
    return GraphedForward(fn, runtime=runtime, **options)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Denoiser()


@pytest.fixture
def fast(model, runtime):
    return wrap(model, runtime)


def same(fast, model, *args, **kwargs):
    """Assert that the graph gives the eager bits, and return how it was done: "replay" or "eager"."""
    replays, eager = fast.stats.replays, fast.stats.eager
    assert torch.equal(fast(*args, **kwargs), model(*args, **kwargs))
    assert fast.stats.replays - replays + fast.stats.eager - eager == 1
    return "replay" if fast.stats.replays > replays else "eager"


# Replaying


def test_replays_give_the_eager_bits_for_every_new_input(fast, model, runtime):
    for seed in range(4):
        assert (
            same(fast, model, pictures(seed=seed), torch.full((2,), 1.0 + seed), cond=torch.tensor(0.5 * seed))
            == "replay"
        )
    assert runtime.log == ["warm-up"] * 3 + ["capture"] + ["replay"] * 4
    assert (fast.stats.captures, fast.stats.replays, fast.stats.eager) == (1, 4, 0)


def test_a_capture_computes_nothing_so_the_stand_in_would_catch_a_missing_replay(runtime, model):
    x, sigma = pictures(), torch.ones(2)
    graph, output = runtime.capture(runtime.pool(torch.device("cpu")), lambda: model(x, sigma), ())
    assert output.isnan().all()
    graph.replay()
    assert torch.equal(output, model(x, sigma))


def test_warm_up_makes_the_choices_of_the_capture(runtime):
    """Else "auto" would take a Triton kernel at capture for the first time, and compile it there."""
    seen = []

    def fn(x):
        seen.append(facts.is_capturing())
        return x * 2

    wrap(fn, runtime, watch=())(X)
    assert seen == [True] * 4 and not facts.is_capturing()


def test_outputs_are_copies_unless_borrowed(model, runtime):
    x, y, sigma = pictures(seed=1), pictures(seed=2), torch.ones(2)
    safe, lent = wrap(model, runtime), wrap(model, runtime, copy_outputs=False)
    first = safe(x, sigma)
    kept = first.clone()
    safe(y, sigma)
    assert torch.equal(first, kept)
    first = lent(x, sigma)
    assert torch.equal(first, kept)
    assert lent(y, sigma).data_ptr() == first.data_ptr() and torch.equal(first, model(y, sigma))


def test_nested_arguments_and_results_keep_their_shape(runtime):
    Result = namedtuple("Result", ["sample", "extra"])

    def fn(x, conditioning, *, flags):
        total = x + conditioning["text"][0] * conditioning["text"][1]
        return Result(total if flags["add"] else -total, {"both": [x * 2, None]})

    fast = wrap(fn, runtime, watch=())
    for seed in (1, 2):
        x, text = pictures(seed=seed), (pictures(seed=3 + seed), pictures(seed=5 + seed))
        for add in (True, False):
            found = fast(x, {"text": text}, flags={"add": add})
            expected = fn(x, {"text": text}, flags={"add": add})
            assert type(found) is Result and torch.equal(found.sample, expected.sample)
            assert torch.equal(found.extra["both"][0], 2 * x) and found.extra["both"][1] is None
    assert (fast.stats.captures, fast.stats.replays) == (2, 4)


def test_expanded_inputs_keep_their_strides_and_are_copied_once(runtime):
    strides = []

    def fn(x, sigma):
        strides.append(sigma.stride())
        return x * sigma.reshape(-1, 1, 1, 1)

    fast = wrap(fn, runtime, watch=())
    for value in (2.0, 3.0):
        x, sigma = pictures(count=3), torch.tensor(value).expand(3)
        assert torch.equal(fast(x, sigma), x * value)
    assert set(strides) == {(0,)} and fast.stats.replays == 2


def test_random_draws_are_those_of_eager_calls(runtime):
    def fn(x):
        return x + torch.randn_like(x)

    fast, x = wrap(fn, runtime, watch=()), pictures()
    torch.manual_seed(3)
    expected = [fn(x) for _ in range(3)]
    torch.manual_seed(3)
    assert all(torch.equal(fast(x), e) for e in expected)
    assert fast.stats.replays == 3


def test_a_generator_must_be_registered_and_then_draws_as_in_eager_calls(runtime):
    generator = torch.Generator().manual_seed(1)

    def fn(x):
        return x + torch.randn(x.shape, generator=generator)

    x = pictures()
    expected = [fn(x) for _ in range(3)]
    generator.manual_seed(1)
    registered = wrap(fn, runtime, watch=(), generators=(generator,))
    assert all(torch.equal(registered(x), e) for e in expected) and registered.stats.replays == 3
    forgotten = wrap(fn, runtime, watch=())
    forgotten(x)
    assert forgotten.stats.eager == 1 and any("not registered" in reason for reason in forgotten.reasons)


def test_a_replay_on_another_stream_waits_for_the_last_one(fast, model, runtime):
    x, sigma = pictures(), torch.ones(2)
    fast(x, sigma)
    runtime.streams.append("second")
    fast(x, sigma)
    fast(x, sigma)
    assert runtime.log[-4:] == ["replay", "second waits for main", "replay", "replay"]


def test_threads_get_their_own_results(model, runtime):
    class Slow(RecordingRuntime):
        def replay(self, pool, graph):
            threading.Event().wait(0.001)  # lets another thread come between copying in and replaying
            super().replay(pool, graph)

    fast, sigma, wrong = wrap(model, Slow()), torch.ones(2), []
    fast(pictures(), sigma)

    def work(seed):
        x = pictures(seed=seed)
        with torch.no_grad():
            expected = model(x, sigma)
            wrong.extend(seed for _ in range(10) if not torch.equal(fast(x, sigma), expected))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and fast.stats.captures == 1


# The key


X, S = pictures(), torch.ones(2)
KINDS = {
    "shape": lambda: ((pictures(count=3), torch.ones(3)), {}),
    "strides": lambda: ((X.to(memory_format=torch.channels_last), S), {}),
    "dtype": lambda: ((X, S.double()), {}),
    "another argument": lambda: ((X, S), {"cond": S[0]}),
    "integer": lambda: ((X, S), {"cond": 2}),
    "boolean, which equals an integer": lambda: ((X, S), {"cond": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_call_is_another_graph(kind, model, runtime):
    if "bool" in kind:
        model = Denoiser()
        model.forward = lambda x, sigma, cond: x * sigma[0] * (2 if cond is True else 3)
    fast = wrap(model, runtime)
    same(fast, model, X, S, **({"cond": 1} if "bool" in kind else {}))
    args, kwargs = KINDS[kind]()
    same(fast, model, *args, **kwargs)
    assert fast.stats.captures == 2


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@contextlib.contextmanager
def tf32():
    matmul = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    yield
    setattr(matmul, name, before)


STATES = {
    "autocast": autocast,
    "inference mode": torch.inference_mode,
    "matmul precision": tf32,
    "kernel backend": lambda: use_backend("reference", "group_norm"),
    "determinism": lambda: torch.backends.cudnn.flags(deterministic=True),
}


@pytest.mark.parametrize("state", STATES)
def test_a_setting_of_torch_or_ours_is_part_of_the_key(state, fast, model):
    same(fast, model, X, S)
    with STATES[state]():
        assert same(fast, model, X, S) == "replay"
    assert fast.stats.captures == 2
    assert same(fast, model, X, S) == "replay" and fast.stats.captures == 2


def test_torchs_attention_switches_are_part_of_the_key(fast, model):
    same(fast, model, X, S)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        same(fast, model, X, S)
    assert fast.stats.captures == 2


def test_autocast_keeps_no_weights_for_the_graph_to_lose(runtime):
    """Weights that autocast casts once and keeps are freed when the caller leaves it; the graph would read on."""
    linear, cached = nn.Linear(4, 4), []

    def fn(x):
        cached.append(torch.is_autocast_cache_enabled())
        return linear(x)

    fast = wrap(fn, runtime, watch=(linear,))
    for seed in range(3):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
        with autocast():
            assert torch.equal(fast(x), linear(x))
    assert cached == [False] * 4 and fast.stats.replays == 3


def test_the_number_of_graphs_is_capped_and_what_is_captured_stays(fast, model):
    sizes = [(pictures(count=n), torch.ones(n)) for n in range(1, MAX_GRAPHS + 3)]
    done = [same(fast, model, *arguments) for arguments in sizes]
    assert done == ["replay"] * MAX_GRAPHS + ["eager"] * 2
    assert [same(fast, model, *arguments) for arguments in sizes] == done
    assert fast.stats.captures == MAX_GRAPHS and any("other kinds" in reason for reason in fast.reasons)


# What is refused


def doubled(x, value=None):
    return x * 2 if value is None else x * value


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((X, 2.5), "a Python float would be baked in"),
        ((torch.empty(2, device="meta"),), "a tensor on meta among the arguments"),
        ((X, object()), "type object has no place in a key"),
        ((X, {1, 2}), "type set"),
        ((torch.arange(9.0).as_strided((3, 3), (1, 1)),), "elements share memory"),
        ((X.to_sparse(),), "layout torch.sparse_coo"),
        ((3,), "no tensor among the arguments"),
    ],
)
def test_arguments_that_a_graph_would_forget_are_refused_with_a_reason(args, words):
    with pytest.raises(Refused, match=words):
        take_apart(args, {}, "cpu", floats=False)


def test_a_refused_call_runs_eagerly_and_says_why_once(runtime, monkeypatch, caplog):
    from tdpm_ext.kernels import registry

    monkeypatch.setattr(registry, "_decisions", {})
    fast = wrap(doubled, runtime, watch=())
    with caplog.at_level("INFO", "tdpm_ext.kernels"):
        assert all(torch.equal(fast(X, value), X * value) for value in (1.5, 2.5, 3.5))
    assert len(caplog.messages) == 1 and "a Python float would be baked in" in caplog.messages[0]
    assert runtime.log == [] and fast.stats.eager == 3
    assert any(op == "graph" and "float" in why for op, _, why in report()["decisions"])


def test_a_float_may_be_baked_in_on_purpose(runtime):
    fast = wrap(doubled, runtime, watch=())
    for value in (1.5, 2.5, 1.5):
        assert torch.equal(fast(X, Baked(value)), X * value)
    assert (fast.stats.captures, fast.stats.replays) == (2, 3)
    assert torch.equal(fast(X.to_sparse(), Baked(2.0)).to_dense(), X * 2)  # eager calls see the value itself


def test_cpu_tensors_are_refused_by_the_real_runtime():
    fast = graphed(doubled, watch=())
    assert torch.equal(fast(X), X * 2)
    assert list(fast.reasons) == ["a tensor on cpu among the arguments: its value would be baked in"]


@pytest.mark.parametrize("kind", ["inner hook", "inner pre-hook", "own hook", "global hook", "offload"])
def test_hooks_are_refused_as_long_as_they_are_there(kind, fast, model, runtime):
    same(fast, model, X, S)
    calls = []
    if kind == "offload":
        model.conv._hf_hook = object()
        assert same(fast, model, X, S) == "eager"
        return
    hook = {
        "inner hook": model.conv.register_forward_hook,
        "inner pre-hook": model.conv.register_forward_pre_hook,
        "own hook": model.register_forward_hook,
        "global hook": nn.modules.module.register_module_forward_hook,
    }[kind](lambda *_: calls.append(1))
    try:
        fast(X, S)
        assert calls and any("hook" in reason for reason in fast.reasons) and fast.stats.eager == 1
    finally:
        hook.remove()
    assert same(fast, model, X, S) == "replay" and fast.stats.captures == 1


def test_in_the_place_of_forward_the_modules_own_hooks_run_outside(model, runtime):
    model.forward = fast = wrap(model.forward, runtime)
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(1) or output + 1)
    expected = type(model).forward(model, X, S) + 1
    assert torch.equal(model(X, S), expected) and torch.equal(model(X, S), expected)
    assert len(calls) == 2 and fast.stats.replays == 2
    assert list(inspect.signature(fast).parameters) == ["x", "sigma", "cond"]


@pytest.mark.parametrize("what", ["input", "weight"])
def test_gradients_make_it_eager(what, fast, model):
    x = X.clone().requires_grad_(what == "input")
    for p in model.parameters():
        p.requires_grad_(what == "weight")
    with torch.enable_grad():
        y = fast(x, S)
    assert y.requires_grad and list(fast.reasons) == ["gradients are needed"]
    assert same(fast, model, X, S) == "replay"  # without gradients


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda x: x.shape[0], "returns a int"),
        (lambda x: (x * 2, "text"), "returns a str"),
        (lambda x: x.add_(1), "writes into its arguments"),
    ],
)
def test_functions_that_are_more_than_their_tensors_run_eagerly(result, words, runtime):
    fast = wrap(result, runtime, watch=())
    for _ in range(2):
        x, y = X.clone(), X.clone()
        assert str(fast(x)) == str(result(y)) and torch.equal(x, y)
    assert fast.stats.eager == 2 and any(words in reason for reason in fast.reasons)
    assert runtime.log.count("capture") == 1 and runtime.living() == []


def test_a_module_that_changes_its_own_state_runs_eagerly(runtime):
    fast = wrap(nn.BatchNorm2d(2).train(), runtime)
    fast(X)
    fast(X)
    assert fast.stats.eager == 2 and any("its own weights or buffers" in reason for reason in fast.reasons)


def test_what_a_function_reads_must_be_said():
    with pytest.raises(KernelError, match="which modules and tensors doubled reads"):
        graphed(doubled)


# Failing


def waits(x):
    return x * 2 if x.sum().item() > 0 else x


def test_a_failed_capture_is_freed_and_never_tried_again(runtime):
    fast = wrap(waits, runtime, watch=())
    for seed in range(3):
        x = pictures(seed=seed)
        assert torch.equal(fast(x), waits(x))
    assert runtime.log == ["warm-up"] * 3 + ["capture", "release memory"]
    assert fast.stats.eager == 3 and fast.stats.captures == 0
    assert any("capture failed (CaptureError: operation not permitted" in reason for reason in fast.reasons)
    gc.collect()
    assert runtime.living() == [] and len(runtime._pools) == 0


def test_failures_count_towards_the_cap(runtime):
    fast = wrap(waits, runtime, watch=())
    for size in range(1, MAX_GRAPHS + 4):
        fast(torch.ones(size))
    assert runtime.log.count("capture") == MAX_GRAPHS


def test_a_failed_capture_leaves_other_graphs_and_random_numbers_alone(runtime):
    def fn(x, wait=False):
        x = x + torch.randn_like(x)
        return x * x.sum().item() if wait else x

    fast = wrap(fn, runtime, watch=())
    torch.manual_seed(0)
    expected = [fn(X), fn(X, True), fn(X)]
    torch.manual_seed(0)
    found = [fast(X), fast(X, True), fast(X)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (fast.stats.captures, fast.stats.replays, fast.stats.eager) == (1, 2, 1)


def test_an_error_of_the_function_is_raised_as_in_an_eager_call(fast, model):
    with pytest.raises(RuntimeError, match="channels"):
        fast(torch.ones(2, 5, 4, 4), S)
    assert same(fast, model, X, S) == "replay"


def test_strict_makes_a_failed_capture_an_error(runtime, monkeypatch):
    monkeypatch.setenv("TDPM_KERNELS_STRICT", "1")
    facts.switches.cache_clear()
    try:
        with pytest.raises(KernelError, match="capture failed .* TDPM_KERNELS_STRICT=1 forbids"):
            wrap(waits, runtime, watch=())(X)
        assert torch.equal(wrap(doubled, runtime, watch=())(X, 2.0), X * 2)  # a refusal is no failure
    finally:
        facts.switches.cache_clear()


def test_the_environment_turns_graphs_off(fast, model, runtime, monkeypatch):
    monkeypatch.setenv("TDPM_GRAPHS", "0")
    facts.switches.cache_clear()
    try:
        assert same(fast, model, X, S) == "eager" and runtime.log == []
    finally:
        facts.switches.cache_clear()


def test_inside_of_another_graph_it_stands_aside(fast, model, runtime):
    outer = wrap(lambda x: fast(x, S) + 1, runtime, watch=(model,))
    for seed in (1, 2):
        assert torch.equal(outer(pictures(seed=seed)), model(pictures(seed=seed), S) + 1)
    assert (outer.stats.captures, outer.stats.replays, fast.stats.captures) == (1, 2, 0)


# Weights


def edit_in_place(model):
    model.conv.weight.mul_(1.5)


def replace_parameter(model):
    model.conv.weight = nn.Parameter(model.conv.weight * 1.5)


def move(model):
    model.conv.weight.data = model.conv.weight.data.clone() * 1.5


def convert(model):
    model.double().float()
    edit_in_place(model)


def wrap_in_lora(model):
    class LoRA(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.scaling = base, {"default": 0.5}
            self.up = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.base(x) + self.scaling["default"] * self.up(x)

    model.conv = LoRA(model.conv)


def load_weights(model):
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


@pytest.mark.parametrize("change", [edit_in_place, replace_parameter, move, convert, wrap_in_lora, load_weights])
def test_any_change_of_weights_changes_the_output(change, fast, model):
    before = fast(X, S)
    assert same(fast, model, X, S) == "replay"
    change(model)
    assert same(fast, model, X, S) == "replay"
    assert not torch.equal(fast(X, S), before)
    assert (fast.stats.captures, fast.stats.resets) == (2, 1)


def test_the_strength_of_an_adapter_counts_as_a_weight(fast, model):
    wrap_in_lora(model)
    same(fast, model, X, S)
    for strength in (0.25, 2.0):
        model.conv.scaling["default"] = strength
        assert same(fast, model, X, S) == "replay"
    assert fast.stats.captures == 3


def test_switching_to_training_counts_as_a_change(runtime):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    fast, x = wrap(model, runtime), torch.ones(2, 4)
    same(fast, model, x)
    model[1].train()
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(fast(x), expected) and fast.stats.captures == 2


def test_a_tensor_that_is_watched_counts_as_a_weight(runtime):
    mean = torch.ones(4)
    fast = wrap(lambda x: x - mean, runtime, watch=(mean,))
    assert torch.equal(fast(X), X - 1)
    mean.fill_(3.0)
    assert torch.equal(fast(X), X - 3) and fast.stats.captures == 2


def test_weights_that_change_with_every_call_end_the_attempts_until_a_reset(fast, model):
    done = []
    for _ in range(6):
        edit_in_place(model)
        done.append(same(fast, model, X, S))
    assert done == ["replay"] * 3 + ["eager"] * 3
    assert any("change between calls" in reason for reason in fast.reasons)
    fast.reset()
    assert same(fast, model, X, S) == "replay"


def test_weights_on_another_device_are_refused(runtime):
    model = nn.Linear(4, 4, device="meta")
    with pytest.raises(Refused, match="a weight is on meta, the arguments are on cpu"):
        Watched((model,)).check_for_capture(torch.device("cpu"))


# Lifetime


def test_graphs_share_a_pool_and_it_dies_with_the_last_one(model, runtime):
    first, second = wrap(model, runtime), wrap(model, runtime)
    first(X, S)
    second(X, S)
    first(pictures(3), torch.ones(3))
    assert runtime.handles == 1 and len(runtime.living()) == 3
    first.reset()
    assert len(runtime.living()) == 1
    second(pictures(3), torch.ones(3))
    assert runtime.handles == 1  # kept alive by the second one's graph
    second.reset()
    del second
    gc.collect()
    assert len(runtime._pools) == 0 and runtime.living() == []
    assert same(first, model, X, S) == "replay" and runtime.handles == 2


def test_an_object_that_goes_away_takes_its_graphs_along(model, runtime):
    fast = wrap(model, runtime)
    fast(X, S)
    assert len(runtime.living()) == 1
    del fast
    gc.collect()
    assert runtime.living() == [] and len(runtime._pools) == 0


def test_a_change_of_weights_frees_all_graphs_at_once(fast, model, runtime):
    fast(X, S)
    fast(pictures(3), torch.ones(3))
    edit_in_place(model)
    fast(X, S)
    assert "free 2" in runtime.log and len(runtime.living()) == 1


def test_preparing_captures_ahead(fast, model, runtime):
    assert fast.prepare(X, S) and fast.stats.captures == 1
    assert same(fast, model, pictures(seed=5), S) == "replay" and fast.stats.captures == 1
    assert not fast.prepare(X, S, cond=2.5)


def test_a_copy_of_a_model_has_graphs_of_its_own(model, runtime):
    model.forward = wrap(model.forward, runtime)
    expected = model(X, S)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.conv.weight.zero_()
    assert twin.forward.__wrapped__.__self__ is twin
    assert not torch.equal(twin(X, S), expected) and torch.equal(model(X, S), expected)
    assert (model.forward.stats.captures, twin.forward.stats.captures) == (1, 1)


def test_compiled_callers_see_the_function_itself(fast, model, runtime):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, s: fast(x, s) * 2, backend="eager")
    assert torch.equal(compiled(X, S), model(X, S) * 2)
    assert runtime.log.count("capture") <= 1
    torch._dynamo.reset()


# A whole trajectory


def make_run(model):
    """A prior's transport and two Euler steps with guidance; everything but the tensors is baked in."""

    def run(z, cond, cond_scale, sigmas, noise=None):
        x = z * sigmas[0] + 0.1
        for here, there in zip(sigmas, sigmas[1:], strict=False):
            level = torch.full((len(x),), here)
            uncond, guided = model(x, level), model(x, level, cond=cond)
            denoised = uncond + cond_scale * (guided - uncond)
            x = denoised + (there / here) * (x - denoised)
            if noise is not None:
                x = x + there * noise
        return x

    return run


def test_a_trajectory_is_one_graph_with_guidance_noise_and_conditioning_as_inputs(model, runtime):
    run = make_run(model)
    fast, sigmas = GraphedTrajectory(run, watch=(model,), runtime=runtime), (2.0, 0.5, 0.0)
    for seed, scale in enumerate((1.5, 7.5, 3.0)):
        z, cond, noise = pictures(seed=seed), torch.tensor(0.3 * seed), pictures(seed=9 + seed)
        expected = run(z, cond, torch.tensor(scale), sigmas, noise)
        assert torch.equal(fast(z, cond, scale, Baked(sigmas), noise=noise), expected)
    assert runtime.log == ["warm-up"] * 3 + ["capture"] + ["replay"] * 3


def test_another_schedule_is_another_graph(model, runtime):
    run, cond = make_run(model), torch.tensor(0.8)
    fast = GraphedTrajectory(run, watch=(model,), runtime=runtime)
    for sigmas in ((2.0, 0.5, 0.0), (2.0, 1.0, 0.5, 0.0), (2.0, 0.5, 0.0)):
        assert torch.equal(fast(X, cond, 2.0, Baked(sigmas)), run(X, cond, torch.tensor(2.0), sigmas))
    assert (fast.stats.captures, fast.stats.replays) == (2, 3)


def test_an_eager_trajectory_gets_tensors_for_floats_too(model, runtime, monkeypatch):
    seen = []

    def run(z, scale, sigmas):
        seen.append((type(scale), type(sigmas)))
        return z * scale

    fast = GraphedTrajectory(run, watch=(), runtime=runtime)
    fast(X, 2.0, Baked((1.0, 0.0)))
    monkeypatch.setenv("TDPM_GRAPHS", "0")
    facts.switches.cache_clear()
    try:
        assert torch.equal(fast(X, 2.0, Baked((1.0, 0.0))), X * 2)
    finally:
        facts.switches.cache_clear()
    assert set(seen) == {(torch.Tensor, tuple)}


def test_a_trajectory_follows_the_weights(model, runtime):
    run, cond = make_run(model), torch.tensor(0.8)
    fast = GraphedTrajectory(run, watch=(model,), runtime=runtime)
    before = fast(X, cond, 2.0, Baked((2.0, 0.0)))
    edit_in_place(model)
    after = fast(X, cond, 2.0, Baked((2.0, 0.0)))
    assert not torch.equal(before, after)
    assert torch.equal(after, run(X, cond, torch.tensor(2.0), (2.0, 0.0)))
