"""Draw many pictures from one sampler and judge them: any checkpoint, sampler, prior, seeds and data; resumable.

    python benchmarks/fid.py --steps 4 --seeds 0-5999                              # tdpm on the shipped checkpoint
    python benchmarks/fid.py --sampler diffusers:unipc --steps 6 --sigma-max 40 --options '{"solver_order": 3}'
    accelerate launch --num_processes 8 benchmarks/fid.py CHECKPOINT --prior PRIOR --steps 4 --seeds 0-49999 \\
        --data FOLDER --features inception --inception inception-2015-12-05.pt --batch 250
    accelerate launch --multi_gpu --num_processes 2 benchmarks/fid.py --device cpu  # several processes without GPUs
    python benchmarks/fid.py --quick                                                # under two minutes on two cores

A picture is a function of checkpoint, sampler and seed. Its noise is the same to the bit whatever the batch size and
the number of processes; at the same batch size so is the picture, at others it agrees to rounding. Work is divided
into batches of consecutive seeds; each finished batch is a file in OUT/chunks, so that the same command goes on after
an interruption. FD and KD are named after their features; "FID" is only what Inception features give.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# not this script's own folder, whose modules would hide installed packages of their names
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE] + [str(ROOT)]

import tdpm_ext as tdpm  # noqa: E402
from benchmarks import judging, metrics, records  # noqa: E402
from benchmarks.chunks import Store, Team, chunks_of, gather  # noqa: E402
from benchmarks.drawing import TDPM, Drawer, Request  # noqa: E402
from tdpm_ext.pictures import load_pictures, to_uint8  # noqa: E402

SCHEMA = "tdpm-samples/1"
ASSETS = ROOT / "assets" / "fashion-mnist"
QUICK = 96


def draw_share(drawer: Drawer, request: Request, nets: dict, store: Store, parts: list[range], team: Team) -> None:
    """This process's share of the batches: every ``team.size``-th, those that are not there yet."""
    mine = parts[team.rank :: team.size]
    for part in tqdm(mine, desc=request.sampler, disable=team.rank > 0, unit="batch", mininterval=2):
        if store.read(part) is not None:
            continue
        x, nfe = drawer.draw(request, part)
        features = {f"features.{name}": torch.from_numpy(judging.raw_features(net, x)) for name, net in nets.items()}
        store.write(part, {"x": x, "nfe": torch.tensor(nfe), **features})


def judged(judge: judging.Judge, raw: np.ndarray, blocks: int) -> dict:
    """What one judge says: over all pictures, over disjoint blocks of seeds, and the floor at a block's count."""
    features, per_block = judge.standardised(raw), len(raw) // blocks
    out = {"name": judge.name, "blocks": blocks, "per_block": per_block, "whole": judge.measure(features)}
    out["floor"] = records.estimate(judge.floor(per_block)) if judge.fit is not None else None
    if blocks > 1:
        out["measures"] = {k: records.estimate(v) for k, v in judge.over_blocks(features, blocks).items()}
    return out


def inception_row(args: argparse.Namespace, folder: Path, x: torch.Tensor) -> dict:
    """FID and its kernel distance against --data through clean-fid, on pictures written as PNG files."""
    from benchmarks.inception import load_inception
    from tdpm_ext.grid import save_png, to_image

    net = load_inception(args.mode, args.inception, args.device or "cpu", args.any_weights)
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for i, picture in enumerate(to_uint8(x)):
        path = pictures / f"{i:06d}.png"
        if not path.exists():
            save_png(to_image(picture), path)
    real = Path(args.data) / "eval.zip" if (Path(args.data) / "eval.zip").exists() else args.data
    ours, theirs = net.folder(pictures), net.folder(real)
    kernel, shape = (
        metrics.kernel_distance(ours, theirs, 100),
        metrics.manifold(theirs[judging.spread(len(theirs), len(ours))], ours),
    )
    fd = metrics.frechet_distance(ours, theirs)
    whole = {"fd": fd, "kd": kernel.value, "kd_error": kernel.error, **shape._asdict()}
    return {"name": net.name, "blocks": 1, "per_block": len(x), "whole": whole, "floor": None, "weights": net.weights}


def request_of(args: argparse.Namespace, prior) -> Request:
    """What the options ask for."""
    if args.setting:
        return Request.from_json(json.loads(args.setting.read_text()))
    common = {"cond_scale": args.cond_scale, "label": args.label}
    if args.sampler == TDPM:
        return Request(TDPM, args.steps, args.objective, prior.kind, **common)
    options = json.loads(args.options)
    return Request.rival(args.sampler, args.steps, args.grid, args.sigma_max, args.sigma_min, options, **common)


def load_data(args: argparse.Namespace):
    """(evaluation half, fit half or None) of --data."""
    data = Path(args.data)
    if (data / "eval.zip").exists():
        return load_pictures(data / "eval.zip"), load_pictures(args.fit or data / "fit.zip")
    return load_pictures(data), load_pictures(args.fit) if args.fit else None


def report(args: argparse.Namespace, request: Request, fingerprint: str, store: Store, reference: Store | None,
           parts: list[range], nets: dict, data: tuple, team: Team, start: float) -> dict:  # fmt: skip
    """The record: read everything back, judge it."""
    x, nfe = gather(store, parts, "x"), max(int(store.read(part)["nfe"]) for part in parts)
    judges = [judging.Judge(net, name, *data, args.cache) for name, net in nets.items()]
    rows = [judged(j, gather(store, parts, f"features.{j.name}").numpy(), args.blocks) for j in judges]
    if "inception" in args.features:
        rows.append(inception_row(args, args.out, x))
    paired = judges[0].paired(x, gather(reference, parts, "x"))._asdict() if reference and judges else None
    copies = judges[0].memorisation(x[:2000])._asdict() if judges and data[1] is not None else None
    return {
        "schema": SCHEMA, "name": args.name, "checkpoint": fingerprint, "request": request.to_json(),
        "seeds": [args.seeds[0], args.seeds[-1]], "samples": len(x), "nfe": nfe, "batch": args.batch,
        "processes": team.size, "pictures_sha256": hashlib.sha256(to_uint8(x).numpy().tobytes()).hexdigest(),
        "judges": rows, "paired": paired, "memorisation": copies, "command": records.command("fid.py", args.given),
        "environment": records.environment(team.device), "seconds": round(time.time() - start, 1),
    }  # fmt: skip


def run(args: argparse.Namespace, team: Team) -> dict | None:
    """Draw, wait for the others, judge (the first process only)."""
    start = time.time()
    opened = tdpm.open_checkpoint(args.checkpoint, team.device, config=args.config)
    prior = None
    if args.sampler == TDPM and not args.setting or args.prior:
        prior = tdpm.load_prior(args.prior, team.device, expect_shape=opened.shape)
    request, data = request_of(args, prior), load_data(args)
    nets = {}
    for name in (f for f in args.features if f != "inception"):
        net, called = judging.load_net(name)
        nets[called] = net.to(team.device)
    drawer = Drawer(opened.model, opened.shape, opened.num_classes, data[0].labels, prior, team.device)
    parts = chunks_of(args.seeds, args.batch)
    digest = hashlib.sha256(Path(args.prior).read_bytes()).hexdigest() if prior is not None else None
    same = {"checkpoint": opened.fingerprint, "features": sorted(nets), "classes": opened.num_classes}
    store = Store(args.out, {**same, "request": request.to_json(), "prior": digest})
    draw_share(drawer, request, nets, store, parts, team)
    reference = None
    if args.paired:
        long = Request.rival("dpmpp_2m", 60, cond_scale=args.cond_scale, label=args.label)
        reference = Store(args.out / "reference", {**same, "request": long.to_json()})
        draw_share(drawer, long, {}, reference, parts, team)
    team.wait()
    if team.rank:
        return None
    return report(args, request, opened.fingerprint, store, reference, parts, nets, data, team, start)


def show(record: dict) -> str:
    """The record as text."""
    request = record["request"]
    lines = [f"{record['name']}: {request['sampler']} at {record['nfe']} evaluations, {record['samples']} pictures"]
    for row in record["judges"]:
        whole, floor = row["whole"], row["floor"]
        text = f"{row['name']} {whole['fd']:.3f} (all {record['samples']})"
        if "measures" in row:
            fd = row["measures"]["fd"]
            text += f", {fd['mean']:.3f} +- {fd['sd']:.3f} over {row['blocks']} blocks of {row['per_block']}"
        if floor:
            text += f"; floor at {row['per_block']}: {floor['mean']:.3f}"
        text += f"; KD {whole['kd']:.4f} +- {whole['kd_error']:.4f}; coverage {whole['coverage']:.3f}, "
        lines.append(f"{text}recall {whole['recall']:.3f}, precision {whole['precision']:.3f}")
    if record["paired"]:
        lines.append("to the 60-evaluation run: rmse {rmse:.4f}, PSNR {psnr:.1f} dB, features {features:.3f}".format(
            **record["paired"]))  # fmt: skip
    if record["memorisation"]:
        lines.append(f"nearest fitted picture, samples over held-out pictures: {record['memorisation']['ratio']:.3f}")
    return "\n".join(lines)


def seeds_of(text: str) -> range:
    """ "A-B" -> the seeds A .. B."""
    first, _, last = text.partition("-")
    try:
        found = range(int(first), int(last or first) + 1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of seeds like 0-4999") from error
    if not found or found[0] < 0:
        raise argparse.ArgumentTypeError(f"{text!r} holds no seeds: give FIRST-LAST with 0 <= FIRST <= LAST")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("checkpoint", nargs="?", type=Path, default=ASSETS / "denoiser.safetensors", help="default: the shipped one")
    add("--config", type=Path, help="k-diffusion config, if the checkpoint carries none")
    add("--sampler", default=TDPM, help="tdpm (default), a k-diffusion sampler, diffusers:NAME, or a straw man")
    add("--steps", type=int, default=4, help="evaluations per picture (default 4)")
    add("--prior", type=Path, help="for tdpm (default: the one beside the checkpoint)")
    add("--objective", choices=("quality", "fidelity"), default="quality", help="which of the prior's plans")
    add("--grid", default="karras-7", help="of a rival: karras-RHO, exponential or ays (default karras-7)")
    add("--sigma-max", type=float, default=80.0)
    add("--sigma-min", type=float, default=0.02)
    add("--options", default="{}", help='of a rival, as JSON: {"solver_order": 3}')
    add("--setting", type=Path, help="a request as JSON (as in a record), instead of the options above")
    add("--cond-scale", type=float, default=1.0)
    add("--label", type=int, help="one class for all pictures (default: the data's proportions)")
    add("--seeds", type=seeds_of, help="FIRST-LAST (default 0-5999)")
    add("--batch", type=int, default=64, help="pictures per call (default 64)")
    add("--data", type=Path, default=ASSETS, help="folder with eval.zip and fit.zip, or real pictures to judge against")
    add("--fit", type=Path, help="other real pictures: give the floor, and what must not be copied")
    add("--features", nargs="+", help="feature files, efflite, inception (default: the one in DATA, else efflite)")
    add("--inception", type=Path, help="weights for it; without them clean-fid downloads its own")
    add("--any-weights", action="store_true", help="accept others than the published ones; never called FID then")
    add("--mode", default="clean", help="of clean-fid: clean, legacy_tensorflow, legacy_pytorch")
    add("--blocks", type=int, default=3, help="disjoint blocks of seeds for mean and deviation (default 3)")
    add("--paired", action="store_true", help="also draw the checkpoint's 60-evaluation pictures, and compare")
    add("--device", help="default: cuda where there is one")
    add("--out", type=Path, help="folder for the pictures (default out/fid/NAME)")
    add("--json", type=Path, help="the record (default OUT/record.json)")
    add("--cache", type=Path, default=judging.CACHE, help="kept features of real pictures (default out/features)")
    add("--quick", action="store_true", help=f"{QUICK} pictures: to see that it runs")
    args = p.parse_args(argv)
    args.given = argv
    if args.steps < 1 or args.batch < 1 or args.blocks < 1:
        p.error("--steps, --batch and --blocks are at least 1")
    args.prior = args.prior or args.checkpoint.parent / "prior.safetensors"
    args.seeds = args.seeds or range(QUICK if args.quick else 6000)
    own = Path(args.data) / "features.safetensors"
    args.features = args.features or [str(own) if own.exists() else "efflite"]
    sampler = f"{args.sampler}-{args.objective}" if args.sampler == TDPM else args.sampler.replace(":", "-")
    args.name = f"{args.checkpoint.parent.name}-{sampler}-{args.steps}"
    args.out = args.out or ROOT / "out" / "fid" / args.name
    args.json = args.json or args.out / "record.json"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    team = Team.join(args.device)
    try:
        record = run(args, team)
        if record is not None:
            records.write(record, args.json)
            print(show(record))
            print(f"wrote {args.json}")
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"fid: {error}", file=sys.stderr)
        return 2
    finally:
        team.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
