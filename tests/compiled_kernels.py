"""Every kernel compiled ahead of time for sm_90, without a GPU: prints registers and spilled bytes as JSON.

Run as a program of its own, because Triton decides at import between interpreter and compiler.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from probes.kernels.fused_lens import lens_kernel, tiles_for
from probes.kernels.fused_means import BLOCK, ROWS, means_kernel
from probes.kernels.fused_rows import block_of, rows_kernel
from probes.kernels.int8_codes import LEVELS

TARGET = GPUTarget("cuda", 90, 32)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ROW_OUTPUTS = {
    "packed": {"packed"},
    "int8": {"packed", "scale", "error"},
    "norm": {"norm"},
    "moments": {"moments"},
    "change": {"change", "previous"},
    "project": {"coordinates", "basis"},
    "everything": {"packed", "norm", "moments", "change", "previous", "coordinates", "basis", "offset"},
}

OPTIONAL = ("packed", "scale", "error", "norm", "moments", "change", "previous", "coordinates", "basis", "offset")

Variant = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]
"""Name, kernel, signature, constants, options."""


def row_variants() -> Iterator[Variant]:
    """The row kernel for every output, type and way of reading."""
    for name in ROW_OUTPUTS:
        yield row_variant(name, torch.bfloat16, torch.bfloat16, 4096, True)
    for dtype in NAMES:
        for storage in NAMES:
            if dtype != storage:
                yield row_variant("packed", dtype, storage, 4096, True)
    for width, flat in ((577, True), (16384, True), (4096, False)):
        yield row_variant("everything", torch.bfloat16, torch.bfloat16, width, flat)
        yield row_variant("int8", torch.float32, torch.float32, width, flat)
    yield single_variant()


def single_variant() -> Variant:
    """The row kernel as at a launch on rows of one value, where every number is a constant 1."""
    label, kernel, signature, constants, options = row_variant("everything", torch.float32, torch.float32, 1, False)
    ones = [name for name, kind in signature.items() if kind == "i32"]
    signature = {name: "constexpr" if name in ones else kind for name, kind in signature.items()}
    return label, kernel, signature, constants | dict.fromkeys(ones, 1), options


def row_variant(name: str, dtype: torch.dtype, storage: torch.dtype, width: int, flat: bool) -> Variant:
    """The row kernel for one set of outputs."""
    given, (block, warps) = ROW_OUTPUTS[name], block_of(width)
    types = {"offset": "*i64", "previous": "*bf16", "packed": "*i8" if name == "int8" else f"*{NAMES[storage]}"}
    signature = {"x": f"*{NAMES[dtype]}", "index": "*i64"}
    signature |= {p: types.get(p, "*fp32") if p in given else "constexpr" for p in OPTIONAL}
    size = "size" if width % 16 == 0 else "i32"
    signature |= dict.fromkeys(("row_stride", "outer_stride", "inner_stride", "inner", "width"), size)
    signature |= {"n_basis": "i32", "capacity": "i32"}
    constants = {p: None for p in OPTIONAL if p not in given} | {"FLAT": flat, "LEVELS": LEVELS, "BLOCK": block}
    label = f"rows {name} {NAMES[dtype]} as {types['packed'][1:]}, {width} {'flat' if flat else 'strided'}"
    return label, rows_kernel, signature, constants, {"num_warps": warps}


def lens_variants() -> Iterator[Variant]:
    """The lens kernel for every tile, with and without ranking."""
    sizes = ("width", "share", "hidden_stride", "weight_stride")
    floats = ("high_out", "mass_out", "above_out", "chosen_out", "top_out")
    for dtype in (torch.bfloat16, torch.float32):
        for n in (8, 64, 8192):
            for top in (0, 1, 32) if n == 64 else (0, 10):
                tiles, pointer = tiles_for(n, top, dtype), f"*{NAMES[dtype]}"
                plain = top in (0, 1)
                signature = {"hidden": pointer, "weight": pointer}
                signature |= {"bias": "constexpr", "ids": "*i64"} if plain else {"bias": pointer, "ids": "constexpr"}
                signature |= dict.fromkeys(floats, "*fp32") | {"top_ids_out": "*i32"}
                signature |= dict.fromkeys(sizes, "size") | dict.fromkeys(("n", "vocab", "n_ids"), "i32")
                signature |= {"softcap": "fp32"}
                constants = {"bias": None} if plain else {"ids": None}
                constants |= {"CAPPED": not plain, "TOP": top, "TOP_PADDED": triton.next_power_of_2(max(1, top))}
                constants |= {"EXACT": dtype == torch.float32}
                constants |= {"ROWS": tiles.rows, "TOKENS": tiles.tokens, "DEPTH": tiles.depth}
                options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
                yield f"lens {NAMES[dtype]} n={n} top={top}", lens_kernel, signature, constants, options


def means_variants() -> Iterator[Variant]:
    """The kernel of means for every type."""
    for short in NAMES.values():
        signature = {"x": f"*{short}", "index": "*i64", "starts": "*i64", "out": "*fp32"}
        signature |= {"row_stride": "size", "width": "size"}
        yield f"means {short}", means_kernel, signature, {"ROWS": ROWS, "BLOCK": BLOCK}, {"num_warps": 4}


def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, int]) -> Any:
    """The kernel compiled as at a launch whose pointers and numbers of type `size` are divisible by 16."""
    order = [name for name in kernel.arg_names if name in signature or name in constants]
    types = {name: signature.get(name, "constexpr") for name in order}
    divisible = [i for i, name in enumerate(order) if types[name] == "size" or types[name].startswith("*")]
    attrs = {(i,): [["tt.divisibility", 16]] for i in divisible}
    types = {name: "i32" if kind == "size" else kind for name, kind in types.items()}
    named = {(order.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, types, named, attrs), target=TARGET, options=options)


def usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and the bytes of stack and local memory into which it spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, local = (int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", said))
    return {"registers": int(re.findall(r"REG:(\d+)", said)[0]), "spilled": stack + local}


def main() -> None:
    """Compiles every variant."""
    usages = {}
    for name, kernel, signature, constants, options in (*row_variants(), *lens_variants(), *means_variants()):
        built = compiled(kernel, signature, constants, options)
        usages[name] = usage(built.asm["cubin"]) | {"shared": int(built.metadata.shared)}
    json.dump(usages, sys.stdout)


if __name__ == "__main__":
    main()
