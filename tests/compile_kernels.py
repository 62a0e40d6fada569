"""Compile the kernels for GPUs that are not here, and read what the compiler made of them.

    python tests/compile_kernels.py             # the table for every architecture, two minutes

Registers and spills are ptxas' own words; the instructions of the inner loops are counted in the
machine code. Without the hint that addresses and strides are multiples of 16, as they are at run
time, the figures would mean nothing.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import kernels  # noqa: E402

SHARED = {80: 166912, 86: 101376, 90: 232448, 100: 232448}          # bytes that a program may have
TENSOR_CORES = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")       # of sm_90, sm_100, the others
DTYPES = ("bf16", "fp16", "fp32")
CASES = [*itertools.product(("_forward", "_dq", "_dkdv"), (64, 128), DTYPES, SHARED),
         *itertools.product(("_log_probabilities",), (0,), DTYPES, SHARED)]
TYPES = {"START": "*i32", "END": "*i32", "LSE": "*fp32", "DELTA": "*fp32", "scale": "fp32",
         "T": "i32", "TP": "i32", "H": "i32", "G": "i32"}
LOSS_TYPES = {"TARGETS": "*i64", "SCALE": "*fp32", "OUT": "*fp32", "COLUMNS": "i32"}


def tool(name, *args):
    """What one of the programs that come with triton prints."""
    import triton
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    done = subprocess.run([folder / name, *map(str, args)], capture_output=True, text=True)
    return done.stdout + done.stderr


def build(kernel, d, dtype, arch):
    """One kernel as compiled for one architecture, with the tiles of the table."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(kernels, kernel)
    if kernel == "_log_probabilities":
        constants, special = dict(GRADIENT=True, BLOCK=kernels.BLOCK), LOSS_TYPES
        warps, stages = 8, 3
    else:
        queries, keys, warps, stages = kernels.FP32_TILES[kernel] if dtype == "fp32" else \
            kernels.TILES[kernel, d][kernels.ARCHITECTURES.index(arch)]
        constants, special = dict(d=d, BQ=queries, BK=keys), TYPES
    types = {name: "constexpr" if name in constants else
             special.get(name, f"*{dtype}" if name.isupper() else "i32")
             for name in function.arg_names}
    even = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(types.items())
            if kind[0] == "*" or name in ("TP", "COLUMNS") or name.endswith("_stride")}
    source = ASTSource(function, types, {(function.arg_names.index(name),): value
                                         for name, value in constants.items()}, even)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32),
                          options=dict(num_warps=warps, num_stages=stages))


def inner_loops(machine_code):
    """Instruction names of each innermost loop that computes powers."""
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);"
    code = [(int(at, 16), name, rest) for at, name, rest in re.findall(pattern, machine_code)]
    place = {at: i for i, (at, _, _) in enumerate(code)}
    spans = []
    for i, (at, name, rest) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < at and int(target[1], 16) in place:
            spans.append((place[int(target[1], 16)], i + 1))
    inner = [(a, b) for a, b in spans
             if not any(a <= c and e <= b and (a, b) != (c, e) for c, e in spans)]
    loops = [[name for _, name, _ in code[a:b]] for a, b in inner]
    return [names for names in loops if any(name.startswith("MUFU.EX2") for name in names)]


def examine(kernel, d, dtype, arch):
    """What a case became, as a row of the table."""
    from triton.backends.nvidia.compiler import get_ptxas

    compiled = build(kernel, d, dtype, arch)
    with tempfile.TemporaryDirectory() as folder:
        text, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        text.write_text(compiled.asm["ptx"])
        binary.write_bytes(compiled.asm["cubin"])
        name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        said = subprocess.run([get_ptxas(arch).path, "-v", f"--gpu-name={name}", text,
                               "-o", Path(folder, "out")], capture_output=True, text=True).stderr
        loops = inner_loops(tool("cuobjdump", "-sass", binary))
    def count(names, *starts):
        return sum(name.startswith(starts) for name in names)

    plain = min(loops, key=lambda names: count(names, "FSEL"))      # the loop without a mask
    found = [(name, compiled.asm["ptx"].count(name)) for name in TENSOR_CORES]
    waits = re.findall(r"async_wait[^\n]*num = (\d+)", compiled.asm["ttgir"])
    instruction, products = next((pair for pair in found if pair[1]), ("none", 0))
    return dict(kernel=kernel, d=d, dtype=dtype, arch=arch,
                registers=int(re.search(r"Used (\d+) registers", said)[1]),
                spilled=int(re.search(r"(\d+) bytes spill stores", said)[1]),
                spills_in_loop=count(plain, "LDL", "STL"), shared=compiled.metadata.shared,
                in_flight=max(map(int, waits), default=0), instruction=instruction,
                products=products, selects=count(plain, "FSEL"),
                most_selects=max(count(names, "FSEL") for names in loops))


def main():
    import triton
    print(f"triton {triton.__version__}. Spilled: bytes, and instructions in the loop without a "
          "mask; in flight: copies to shared memory\nthat a loop need not wait for; selects: in "
          "that loop, and in the one with a mask")
    line = "{:18} {:>3} {:5} {:>6} {:>9} {:>7} {:>7} {:>9} {:>9}  {:20} {:>7}"
    print(line.format("kernel", "d", "dtype", "for", "registers", "spilled", "in loop", "shared KB",
                      "in flight", "tensor cores", "selects"))
    for case in CASES:
        row = examine(*case)
        print(line.format(*case[:3], f"sm_{row['arch']}", row["registers"], row["spilled"],
                          row["spills_in_loop"], row["shared"] // 1024, row["in_flight"],
                          f"{row['products']} {row['instruction']}",
                          f"{row['selects']}/{row['most_selects']}"), flush=True)


if __name__ == "__main__":
    main()
