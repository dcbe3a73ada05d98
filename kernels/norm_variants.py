"""What the group norm kernels are compiled for ahead of time.

Real layers of real networks, at the ends of what `norm_plan` chooses: the widest and the largest tile, both kinds of
loop, the split form; with every parameter there is, which is the most work. What is launched for them is asked of
`norm_launch`, so this cannot drift away from what runs.
"""

from __future__ import annotations

import torch

from .norm_launch import OPTIONS, Call, Launch, launches
from .norm_plan import Strides
from .variant import Variant

PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}  # of a large card of each generation
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
NAMES = {FP16: "fp16", BF16: "bf16", FP32: "fp32"}
ALL = (FP16, BF16, FP32)
EMBEDDING, ADAPTIVE = ("weight", "bias", "pre_add"), ("pre_add", "scale", "shift")
EVERYTHING = ("weight", "bias", *ADAPTIVE)

# (what for, samples, channels, groups, pixels, channels_last, act, parameters, dtypes)
LAYERS = (
    ("wide", 2, 2560, 32, 64, False, "silu", EVERYTHING, (FP16, FP32)),  # SD1.5's deepest: 80 channels a group
    ("wide", 2, 2560, 32, 64, True, "silu", EVERYTHING, (FP16, FP32)),
    ("large", 2, 320, 32, 1024, False, "gelu", EVERYTHING, ALL),  # 10 channels a group, the largest tile
    ("large", 2, 640, 32, 256, True, "gelu", EVERYTHING, ALL),  # the same with several groups in it
    ("loop", 2, 320, 32, 4096, False, "gelu", EVERYTHING, ALL),  # SD1.5's first; in float32 it is split
    ("loop", 64, 320, 32, 4096, True, "gelu", EVERYTHING, ALL),  # many pictures: loops over several groups
    ("adaptive", 1, 128, 4, 1024, False, "gelu", ADAPTIVE, (FP32,)),  # k-diffusion's U-Net for CIFAR-10
    ("split", 1, 512, 32, 65536, False, "silu", EVERYTHING, ALL),  # a VAE's decoder
    ("split", 1, 512, 32, 65536, True, "silu", EVERYTHING, ALL),
    ("odd", 3, 36, 6, 63, False, None, (), (FP16,)),  # nothing is divisible by anything
    ("odd", 3, 36, 6, 63, True, None, (), (FP16,)),
)


def aot_variants(cc: int) -> list[Variant]:
    """Every kernel in every dtype and memory format that a GPU of compute capability ``cc`` (90 = 9.0) can meet."""
    found: dict[str, Variant] = {}
    for what, samples, channels, groups, pixels, channels_last, act, parameters, dtypes in LAYERS:
        for dtype in dtypes:
            view = Strides(channels * pixels, 1, channels) if channels_last else Strides(channels * pixels, pixels, 1)
            steps = {name: channels for name in ("pre_add", "scale", "shift") if name in parameters}
            shape = (samples, channels, pixels)
            call = Call(shape, view, view, dtype, groups, **steps, act=act, processors=PROCESSORS.get(cc, 108))
            for launch in launches(call):
                kernel = launch.kernel.__name__.removesuffix("_kernel")
                layout = "nhwc" if channels_last else "nchw"
                name = f"group_norm_{kernel}/{layout}/{NAMES[dtype]}/{what}"
                found[name] = variant_of(name, launch, dtype, parameters)
    return list(found.values())


def variant_of(name: str, launch: Launch, dtype: torch.dtype, parameters: tuple[str, ...]) -> Variant:
    """One launch as Triton specialises it: absent tensors and ones are constants, multiples of 16 are remembered."""
    signature = {argument: "constexpr" for argument in launch.constants}
    constants = dict(launch.constants)
    aligned = []
    for argument in launch.tensors:
        if argument in ("x", "y", "parts", "affine", *parameters):
            kept = argument in ("parts", "affine")
            signature[argument] = "*fp32" if kept else f"*{NAMES[dtype]}"
            aligned.append(argument)
        else:
            signature[argument], constants[argument] = "constexpr", None
    unspecialised = launch.kernel.do_not_specialize
    for argument, value in launch.numbers.items():
        if isinstance(value, float):
            signature[argument] = "fp32"
        elif value == 1 and argument not in unspecialised:
            signature[argument], constants[argument] = "constexpr", 1
        else:
            signature[argument] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and argument not in unspecialised:
                aligned.append(argument)
    ordered = {argument: signature[argument] for argument in launch.kernel.arg_names}
    return Variant(
        name,
        launch.kernel,
        ordered,
        constants,
        tuple(aligned),
        num_warps=launch.warps,
        num_stages=OPTIONS["num_stages"],
        vector_loads=_wide_loads(launch, dtype),
        streaming="merge" not in name,
    )


def _wide_loads(launch: Launch, dtype: torch.dtype) -> int:
    """16-byte loads of x that each thread makes for one tile, where rows of the tile are that long and aligned."""
    constants, numbers = launch.constants, launch.numbers
    if "BLOCK_S" not in constants:
        return 0
    lanes = 16 // dtype.itemsize
    channels_last = numbers["x_channel"] == 1
    other = numbers["x_pixel" if channels_last else "x_channel"]
    used = constants.get("PER_GROUP", 0) * constants.get("BLOCK_G", 0) or constants["BLOCK_C"]
    length = used if channels_last else numbers["pixels"]
    if other % 16 or length % lanes or not (constants["EVEN"] or numbers["channels"] % 16 == 0):
        return 0
    return max(1, used * constants["BLOCK_S"] // (32 * launch.warps * lanes))  # the compiler drops what is padding
