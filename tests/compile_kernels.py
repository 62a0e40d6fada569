"""Compile the kernels for GPU architectures without having one, and report the compiler's results.

    python tests/compile_kernels.py             # the table for every architecture, two minutes

Registers and spills are reported by ptxas; the instructions of the inner loops are counted in the
machine code. As at run time, the compiler is told that addresses and strides are multiples of 16;
without that the figures would mean nothing.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import kernels  # noqa: E402

SHARED = {80: 166912, 86: 101376, 90: 232448, 100: 232448}          # bytes of shared memory
TENSOR_CORES = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")       # of sm_90, sm_100, the others
DTYPES = ("bf16", "fp16", "fp32")
CASES = [*itertools.product(("_forward", "_dq", "_dkdv"), (64, 128), DTYPES, SHARED),
         *itertools.product(("_log_probabilities",), (0,), DTYPES, SHARED)]
TYPES = {"START": "*i32", "END": "*i32", "LSE": "*fp32", "DELTA": "*fp32", "scale": "fp32",
         "T": "i32", "TP": "i32", "H": "i32", "G": "i32"}
LOSS_TYPES = {"TARGETS": "*i64", "SCALE": "*fp32", "OUT": "*fp32", "COLUMNS": "i32"}
COLUMNS = ("kernel", "d", "dtype", "arch", "registers", "spilled", "spills_in_loop", "shared",
           "in_flight", "instruction", "products", "selects", "most_selects")


def build(kernel, d, dtype, arch):
    """Compile a kernel for an architecture, with the tiles of the table."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(kernels, kernel)
    if kernel == "_log_probabilities":
        constants, types = dict(GRADIENT=True, BLOCK=kernels.BLOCK), LOSS_TYPES
        warps, stages = 8, 3
    else:
        if dtype == "fp32":
            tiles = kernels.FP32_TILES[kernel]
        else:
            tiles = kernels.TILES[kernel, d][kernels.ARCHITECTURES.index(arch)]
        queries, keys, warps, stages = tiles
        constants, types = dict(d=d, BQ=queries, BK=keys), TYPES
    signature = {name: "constexpr" if name in constants else
                 types.get(name, f"*{dtype}" if name.isupper() else "i32")
                 for name in function.arg_names}
    attributes = {}
    for i, (name, kind) in enumerate(signature.items()):
        if kind[0] == "*" or name in ("TP", "COLUMNS") or name.endswith("_stride"):
            attributes[i,] = [["tt.divisibility", 16]]
    values = {(function.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(function, signature, values, attributes),
                          target=GPUTarget("cuda", arch, 32),
                          options=dict(num_warps=warps, num_stages=stages))


def inner_loops(machine_code):
    """The instruction names of each innermost loop that computes powers of 2."""
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);"
    code = [(int(address, 16), name, operands)
            for address, name, operands in re.findall(pattern, machine_code)]
    index_of = {address: i for i, (address, _, _) in enumerate(code)}
    loops = []                                      # a loop ends with a branch backwards
    for i, (address, name, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target and int(target[1], 16) < address and int(target[1], 16) in index_of:
            loops.append((index_of[int(target[1], 16)], i + 1))
    innermost = [(start, stop) for start, stop in loops
                 if not any(start <= a and b <= stop and (a, b) != (start, stop) for a, b in loops)]
    bodies = [[name for _, name, _ in code[start:stop]] for start, stop in innermost]
    return [names for names in bodies if any(name.startswith("MUFU.EX2") for name in names)]


def examine(kernel, d, dtype, arch):
    """Compile a case -> its row of the table, a dict of COLUMNS."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    compiled = build(kernel, d, dtype, arch)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        binary.write_bytes(compiled.asm["cubin"])
        gpu_name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        report = subprocess.run([get_ptxas(arch).path, "-v", f"--gpu-name={gpu_name}", ptx, "-o",
                                 Path(folder, "out")], capture_output=True, text=True).stderr
        code = subprocess.run([tools / "cuobjdump", "-sass", binary], capture_output=True,
                              text=True).stdout

    def count(names, *starts):
        return sum(name.startswith(starts) for name in names)

    loops = inner_loops(code)
    plain = min(loops, key=lambda names: count(names, "FSEL"))      # the loop without a mask
    products = {name: compiled.asm["ptx"].count(name) for name in TENSOR_CORES}
    instruction = next((name for name in TENSOR_CORES if products[name]), "none")
    waits = re.findall(r"async_wait[^\n]*num = (\d+)", compiled.asm["ttgir"])
    return dict(zip(COLUMNS, (
        kernel, d, dtype, arch, int(re.search(r"Used (\d+) registers", report)[1]),
        int(re.search(r"(\d+) bytes spill stores", report)[1]), count(plain, "LDL", "STL"),
        compiled.metadata.shared, max(map(int, waits), default=0), instruction,
        products.get(instruction, 0), count(plain, "FSEL"),
        max(count(names, "FSEL") for names in loops))))


def main():
    import triton
    print(f"triton {triton.__version__}. spilled: bytes, and instructions in the loop without a "
          "mask; in_flight: copies to shared\nmemory that a loop need not wait for; selects: in "
          "that loop, and in the one with a mask")
    print("  ".join(f"{name:>9}" for name in COLUMNS))
    for case in CASES:
        print("  ".join(f"{value!s:>9}" for value in examine(*case).values()), flush=True)


if __name__ == "__main__":
    main()
