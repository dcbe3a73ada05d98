"""The ``tdpm`` command: doctor, fit, calibrate, train, sample, inspect, install, uninstall.

Exit codes: 0 done, 1 a mistake in what was asked or in a file (one line on stderr), 130 interrupted with Ctrl-C.
Nothing heavy is imported before a subcommand needs it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

USER_ERRORS = (ValueError, OSError, ImportError)
MAX_NUMBERS = 100_000


class UsageError(Exception):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one ``tdpm`` command line; returns the exit code and never raises for a user's mistake."""
    try:
        args = build_parser().parse_args(argv)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 1
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    return _guarded(args)


def _guarded(args: argparse.Namespace) -> int:
    log, handler = logging.getLogger("tdpm_ext"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO if args.verbose else logging.WARNING)
    try:
        code = _run(args) or 0
        sys.stdout.flush()  # here, where a reader that has gone is understood
        return code
    except KeyboardInterrupt:
        print(f"tdpm {args.command}: interrupted; files already written are whole", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `tdpm inspect ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug or not (isinstance(error, USER_ERRORS) or _out_of_memory(error)):
            traceback.print_exc()
        hint = ": use a smaller --batch" if _out_of_memory(error) and "batch" in args else ""
        print(f"tdpm {args.command}: {_one_line(error)}{hint}", file=sys.stderr)
        return 1
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _run(args: argparse.Namespace) -> int | None:
    if args.command == "doctor":
        from tdpm_ext import doctor

        return doctor.run(as_json=args.json)
    if args.command in ("install", "uninstall"):
        from tdpm_ext import install_job

        return getattr(install_job, args.command)(args)
    if args.command == "train":
        from tdpm_ext import training_job

        return training_job.run(args)
    from tdpm_ext import commands

    return getattr(commands, args.command)(args)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without the number that Python puts first
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    text = " ".join(text.split())
    return text if isinstance(error, USER_ERRORS) and text else f"{type(error).__name__}: {text}"


def numbers(text: str) -> list[int]:
    """``"0-3,8"`` -> [0, 1, 2, 3, 8]: whole numbers and ranges, in the order given, none twice."""
    found: dict[int, None] = {}
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0-15 or 0,3,7-9")
        first, last = int(low), int(high or low)
        if last < first or last >= 2**63:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} is not a range of numbers from 0 to 2^63 - 1")
        if last - first + len(found) >= MAX_NUMBERS:
            raise argparse.ArgumentTypeError(f"{text!r} names more than {MAX_NUMBERS} numbers")
        found.update(dict.fromkeys(range(first, last + 1)))
    return list(found)


def positive(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def whole(text: str) -> int:
    """A whole number from 0 to 2^63 - 1."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; each subcommand's ``--help`` ends in an example that runs."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("-v", "--verbose", action="store_true", help="say what is decided on the way")
    parser = _Parser(prog="tdpm", description="Few-step sampling of existing diffusion checkpoints.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            parents=[common],
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    _doctor_options(command("doctor", "say what is installed, what works and what to mend", "tdpm doctor"))
    example = "tdpm fit denoiser.safetensors --data fit.zip --kind mixture -o prior.safetensors"
    _fit_options(command("fit", "fit a prior from pictures or from a checkpoint itself", example))
    example = "tdpm calibrate prior.safetensors --checkpoint denoiser.safetensors --budgets 2-6,8"
    _calibrate_options(command("calibrate", "choose noise levels and orders for each number of evaluations", example))
    example = "tdpm sample denoiser.safetensors --prior prior.safetensors --steps 4 --seeds 0-15 --out out/"
    _sample_options(command("sample", "make pictures with a checkpoint", example))
    example = "tdpm train denoiser.safetensors --data fit.zip --out out/shared --minutes 30"
    _train_options(command("train", "train a learned prior for a checkpoint, or both together", example))
    _inspect_options(command("inspect", "show what a prior file holds", "tdpm inspect prior.safetensors"))
    for verb, summary in (("install", "add the extension to a program"), ("uninstall", "take it out again")):
        _program_options(command(verb, summary, f"tdpm {verb} comfyui --path /path/to/ComfyUI"))
    return parser


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("tdpm-ext")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prior", type=Path, metavar="PRIOR", help="prior .safetensors file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _train_options(parser: argparse.ArgumentParser) -> None:
    from tdpm_ext.training_job import add_options

    add_options(parser, positive, positive_float)
    _accelerate_option(parser)


def _program_options(parser: argparse.ArgumentParser) -> None:
    from tdpm_ext.install_job import PROGRAMS

    parser.add_argument("program", choices=sorted(PROGRAMS), metavar="PROGRAM", help=", ".join(sorted(PROGRAMS)))
    parser.add_argument("--path", type=Path, required=True, metavar="DIR", help="the folder that program starts from")


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="k-diffusion config JSON, if the checkpoint has none or another")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    parser.add_argument("--cond-scale", type=float, default=1.0, help="guidance scale, 1 = none (default 1)")


def _accelerate_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accelerate",
        choices=("off", "exact", "half", "compile"),
        default="exact",
        help="exact (default): the same pictures to rounding, faster; half, compile: change them a little, and are "
        "taken only where a measurement at the first call finds them faster (compiling takes seconds to minutes)",
    )


def _prompts_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line, for checkpoints of text")
    parser.add_argument(
        "--vae", type=Path, help="auto-encoder of a latent checkpoint (default: vae.safetensors beside it)"
    )


def _sigma_max_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sigma-max", type=positive_float, help="noise std at the start (default: the checkpoint's)")


def _data_options(parser: argparse.ArgumentParser, purpose: str) -> None:
    parser.add_argument("--data", type=Path, help=f"folder, .zip or idx files of pictures {purpose}")
    parser.add_argument("--size", type=positive, help="resize pictures to SIZE x SIZE")
    parser.add_argument("--limit", type=positive, help="read at most this many pictures, spread evenly")


def _fit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, metavar="CHECKPOINT", help="k-diffusion .safetensors or .pth"
    )
    _data_options(parser, "to fit; without it the prior is fitted from the checkpoint itself")
    parser.add_argument("--no-data", action="store_true", help="say so: fit from the checkpoint itself, no pictures")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PRIOR", help="prior .safetensors to write")
    parser.add_argument(
        "--kind",
        default="mixture",
        help="kind of prior: gaussian, lowrank, mixture (default); with --prompts also text_lowrank, text_mixture",
    )
    parser.add_argument(
        "--components", type=positive, help="mixture components (default: chosen by held-out likelihood)"
    )
    parser.add_argument("--rank", type=positive, help="rank of each covariance (default: chosen)")
    parser.add_argument("--unlabelled", action="store_true", help="ignore class folders and the checkpoint's labels")
    parser.add_argument("--seed", type=int, default=0, help="everything random follows from it (default 0)")
    _prompts_option(parser)
    _model_options(parser)
    _sigma_max_option(parser)


def _calibrate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prior", type=Path, metavar="PRIOR", help="prior .safetensors file; rewritten unless -o is given"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="k-diffusion .safetensors or .pth")
    parser.add_argument(
        "--objective",
        choices=("fidelity", "quality"),
        default="fidelity",
        help="fidelity: the picture the full run gives for the same seed; quality: near to --data (default fidelity)",
    )
    parser.add_argument(
        "--budgets", type=numbers, default=[2, 3, 4, 5, 6, 8], help="evaluations to plan for (default 2-6,8)"
    )
    _data_options(parser, "to compare with, for --objective quality; never the ones the prior was fitted on")
    parser.add_argument(
        "--unlabelled", action="store_true", help="plan for sampling without labels (default: all labels)"
    )
    parser.add_argument("--samples", type=positive, help="pictures per trial (default: calibrate's own)")
    parser.add_argument("--seed", type=int, default=0, help="everything random follows from it (default 0)")
    parser.add_argument("-o", "--output", type=Path, metavar="PRIOR", help="write here instead of over PRIOR")
    _prompts_option(parser)
    _model_options(parser)
    _accelerate_option(parser)


def _sample_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="k-diffusion .safetensors or .pth")
    parser.add_argument("--prior", type=Path, help="prior .safetensors file; needed by --sampler tdpm")
    parser.add_argument(
        "--sampler",
        default="tdpm",
        help="tdpm (default) or one of k-diffusion's: euler, heun, dpm_2, lms, dpmpp_2m ...",
    )
    parser.add_argument("--steps", type=positive, default=4, help="steps; for tdpm, network evaluations (default 4)")
    parser.add_argument(
        "--objective", choices=("fidelity", "quality"), help="which calibrated plans (default: fidelity if calibrated)"
    )
    parser.add_argument("--seeds", type=numbers, help="one picture a seed, as 0-15 or 3,7 (default 0-15)")
    parser.add_argument("--seed", type=whole, help="the first of -n seeds, instead of --seeds")
    parser.add_argument("-n", "--count", type=positive, help="pictures (of each prompt or class; default 16)")
    parser.add_argument(
        "--class", dest="classes", type=numbers, metavar="CLASS", help="labels, as 3 or 0-9: every seed for each label"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        help="folder for one PNG a picture and grid.png, or a .png file for the grid alone (default out)",
    )
    parser.add_argument(
        "--batch", type=positive, default=16, help="pictures at a time; does not change them (default 16)"
    )
    _accelerate_option(parser)
    parser.add_argument("--prompt", action="append", help="what to draw; may be given several times")
    _prompts_option(parser)
    parser.add_argument("--negative-prompt", metavar="PROMPT", help="what to guide away from; needs --cond-scale")
    parser.add_argument("--sigma-min", type=positive_float, help="last noise std (default: the checkpoint's)")
    _sigma_max_option(parser)
    parser.add_argument("--rho", type=positive_float, default=7.0, help="shape of the Karras schedule (default 7)")
    _model_options(parser)


if __name__ == "__main__":
    sys.exit(main())
