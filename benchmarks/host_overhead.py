"""What the sampler ``tdpm`` costs in a host beside the network: whole jobs against the host's own dpmpp_2m.

    python benchmarks/host_overhead.py --json benchmarks/results/host_overhead.json
    python benchmarks/host_overhead.py --host diffusers --json benchmarks/results/host_overhead-diffusers.json

ComfyUI is the one that `make test-hosts` fetches, or the folder named with --comfyui; diffusers the installed one, with
a tiny Stable Diffusion pipeline (its job includes the text encoder and the VAE, the same for both).

Both samplers make the same number of calls of the same tiny UNet (two levels, 4x8x8 latents, about 1M weights: the
worst case, since the network costs nearly nothing) through ComfyUI's own sampling code; they take turns in one
process. A job is everything from noise to latents: finding the prior, drawing from it, and all steps. Counted is the
process's own CPU time on one thread, which a busy machine changes little: of a whole step, and of what lies outside of
the network. The overhead is the difference of the latter, as a part of the host's whole step; medians over many jobs.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
OVERLAY = ROOT / ".venv" / "overlays" / "comfyui"
RIVAL, OURS = "dpmpp_2m", "tdpm"


class CpuClock:
    """Times a job by the CPU time that this process spends in it, whole and outside of the network."""

    def __init__(self):
        self.network = 0.0

    def watch(self, apply_model, call):
        """ComfyUI calls this in the network's place."""
        begin = time.process_time()
        try:
            return apply_model(call["input"], call["timestep"], **call["c"])
        finally:
            self.network += time.process_time() - begin

    def time(self, job) -> tuple[float, float]:
        """Milliseconds (whole, outside of the network)."""
        self.network, begin = 0.0, time.process_time()
        job()
        whole = time.process_time() - begin
        return whole * 1e3, (whole - self.network) * 1e3


def open_comfyui(core: Path, site: Path | None):
    """ComfyUI's sampling, on the CPU, and the tiny model of its tests."""
    if not (core / "comfy" / "samplers.py").is_file():
        raise SystemExit(f"{core} holds no ComfyUI: `make test-hosts` fetches one, or name yours with --comfyui")
    if site is not None and site.is_dir():
        sys.path.insert(0, str(site))
    sys.path.append(str(core))
    from comfy.cli_args import args

    args.cpu = True
    import comfy.sample

    spec = importlib.util.spec_from_file_location("tiny_model", ROOT / "tests/hosts/comfyui/tiny_model.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    return comfy.sample, tiny


def jobs(sample, tiny, steps: tuple[int, ...], clock: CpuClock) -> dict:
    """Name and number of steps -> a call that runs the whole job."""
    from tdpm_ext.fit import fit_prior
    from tdpm_ext.hosts import install
    from tdpm_ext.hosts.comfyui_model import facts_of
    from tdpm_ext.hosts.comfyui_nodes import with_prior
    from tdpm_ext.hosts.comfyui_priors import Pick

    install("comfyui")
    model = tiny.tiny_model()
    data = torch.randn(600, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * tiny.DATA_STD
    prior = fit_prior("gaussian", data, sigma_max=14.6146, progress=False)
    prior.card["checkpoint"] = facts_of(model).checkpoint
    prior.card["comfyui"] = {"prompt": "0" * 16}  # so that prompts are compared, too
    model = with_prior(model, Pick("tiny.safetensors", prior))
    model.set_model_unet_function_wrapper(clock.watch)
    conds, latent = (tiny.conditioning(1), tiny.conditioning(2)), torch.zeros(1, 4, 8, 8)
    noise = sample.prepare_noise(latent, 5)

    def job(sampler, n):
        def run():
            with torch.inference_mode():
                options = {"seed": 5, "disable_pbar": True}
                return sample.sample(model, noise, n, 4.0, sampler, "normal", *conds, latent, **options)

        return run

    return {(sampler, n): job(sampler, n) for n in steps for sampler in (RIVAL, OURS)}


def diffusers_jobs(folder: Path, steps: tuple[int, ...], clock: CpuClock) -> dict:
    """The same for a diffusers pipeline: its own DPM-Solver++ (2M) scheduler, and ours."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    from tdpm_ext.hosts import diffusers as host

    spec = importlib.util.spec_from_file_location("tiny_diffusers", ROOT / "tests/hosts/tiny_diffusers.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    unet = tiny.unet()
    forward = unet.forward

    def watched(*args, **kwargs):
        begin = time.process_time()
        try:
            return forward(*args, **kwargs)
        finally:
            clock.network += time.process_time() - begin

    unet.forward = watched
    pipes = {name: tiny.sd(StableDiffusionPipeline, folder, unet=unet) for name in (RIVAL, OURS)}
    pipes[RIVAL].scheduler = DPMSolverMultistepScheduler.from_config(pipes[RIVAL].scheduler.config)
    host.attach(pipes[OURS], tiny.prior(), any_model=True)

    def job(name, n):
        def run():
            noise = torch.Generator().manual_seed(5)
            return pipes[name](
                "a",
                num_inference_steps=n,
                guidance_scale=4.0,
                generator=noise,
                height=16,
                width=16,
                output_type="latent",
            )

        return run

    return {(name, n): job(name, n) for n in steps for name in (RIVAL, OURS)}


def measure(calls: dict, clock: CpuClock, steps: tuple[int, ...], rounds: int) -> list[dict]:
    """One row per number of steps: medians over rounds, in milliseconds per step."""
    times: dict = {key: [] for key in calls}
    for turn in range(-2, rounds):  # two to warm up
        for key in sorted(calls, reverse=bool(turn % 2)):
            spent = clock.time(calls[key])
            if turn >= 0:
                times[key].append(spent)
    rows = []
    for n in steps:
        row = {"steps": n, "rounds": rounds}
        for name in (RIVAL, OURS):
            for k, part in enumerate(("step", "outside_network")):
                row[f"{name}_{part}_ms"] = statistics.median(spent[k] for spent in times[name, n]) / n
        extra = row[f"{OURS}_outside_network_ms"] - row[f"{RIVAL}_outside_network_ms"]
        rows.append(row | {"overhead_percent_of_step": 100 * extra / row[f"{RIVAL}_step_ms"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=("comfyui", "diffusers"), default="comfyui", help="default: comfyui")
    parser.add_argument("--comfyui", type=Path, default=OVERLAY / "core", help="ComfyUI's folder (default: the tests')")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 20], help="numbers of steps (default 4 8 20)")
    parser.add_argument("--rounds", type=int, default=60, help="jobs of each kind (default 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    args = parser.parse_args()
    steps = tuple(args.steps)
    if min(steps) < 1 or args.rounds < 1:
        parser.error("--steps and --rounds are at least 1")
    torch.set_num_threads(1)
    clock = CpuClock()
    logging.disable(logging.INFO)  # a line per job would be most of what is measured on a terminal
    with tempfile.TemporaryDirectory() as folder:
        if args.host == "diffusers":
            calls = diffusers_jobs(Path(folder), steps, clock)
        else:
            site = OVERLAY / "site" if args.comfyui == OVERLAY / "core" else None
            calls = jobs(*open_comfyui(args.comfyui, site), steps, clock)
        rows = measure(calls, clock, steps, args.rounds)
    for row in rows:
        outside = [row[f"{name}_outside_network_ms"] for name in (RIVAL, OURS)]
        text = f"outside the network {RIVAL} {outside[0]:.3f} ms per step, tdpm {outside[1]:.3f}"
        percent = f"{row['overhead_percent_of_step']:+.2f} % of a step of {row[f'{RIVAL}_step_ms']:.1f} ms"
        print(f"{row['steps']:3} steps: {text}: {percent} (CPU time)")
    if args.json:
        from benchmarks import records, timing

        report = {"schema": "tdpm-host-overhead/1", "environment": timing.environment(torch.device("cpu"))}
        records.write({**report, "host": {"comfyui": "ComfyUI"}.get(args.host, args.host), "rows": rows}, args.json)


if __name__ == "__main__":
    main()
