"""What did the compiler make of a GPU kernel? Registers, spills, shared memory, machine code; no GPU needed."""

import contextlib
import importlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.accounting.chips import named_chip
from moejax.accounting.target import h200_devices, nothing_kept
from pallas_kernels.mosaic import SMEM_LIMIT


@dataclass(frozen=True)
class KernelReport:
    """One kernel as ptxas and the disassembler saw it."""

    name: str
    registers: int
    """a thread's at most; 0 where ptxas did not say"""
    spills: int
    """bytes that a thread stores to and loads from local memory because registers ran out"""
    shared_memory: int
    """bytes a block asks for"""
    wgmma: int
    """tensor-core instructions: HGMMA in machine code, else wgmma in PTX"""
    tma: int
    """tensor copies by the copy engine, loads and stores"""
    sass: bool
    """whether the counts are of machine code"""
    ignored_setmaxnreg: bool
    """ptxas' C7504: registers were not handed from the copying warps to the computing ones"""

    def breaches(self, matmul: bool = True) -> list[str]:
        """Name what a kernel must not have: spills, too much shared memory, no tensor cores where it multiplies."""
        found = []
        if self.spills:
            found.append(f"{self.name} spills {self.spills} bytes")
        if self.shared_memory > SMEM_LIMIT:
            found.append(f"{self.name} asks for {self.shared_memory} bytes of shared memory (limit {SMEM_LIMIT})")
        if matmul and not self.wgmma:
            found.append(f"{self.name} has no wgmma")
        if self.ignored_setmaxnreg:
            found.append(f"{self.name}: setmaxnreg ignored (C7504)")
        return found


def h200_mesh(number: int = 1) -> Mesh:
    """Make a mesh of H200s that are not here, one axis `device`."""
    return Mesh(np.array(h200_devices(number, named_chip("H200"))), ("device",))


def compile_for(mesh: Mesh, f: Callable, *args: jax.ShapeDtypeStruct, **options: Any) -> Any:
    """Compile f for the mesh's chips, every argument whole on each of them."""
    placed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or NamedSharding(mesh, PartitionSpec()))
        for x in args
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(f).trace(*placed).lower(lowering_platforms=("cuda",))
    with nothing_kept():
        return lowered.compile(compiler_options=options or None)


def kernel_reports(f: Callable, *args: jax.ShapeDtypeStruct) -> tuple[list[KernelReport], int]:
    """Compile f for one H200; give a report for each Mosaic kernel in it, and the bytes of XLA's temporaries.

    A kernel that this process has compiled before is not dumped again: compile each once.
    """
    with tempfile.TemporaryDirectory() as folder, _dumping(folder):
        compiled = compile_for(h200_mesh(), f, *args)
        reports = [_report(path) for path in sorted(Path(folder).glob("*.ptxas"))]
    return reports, compiled.memory_analysis().temp_size_in_bytes


@contextlib.contextmanager
def _dumping(folder: str) -> Iterator[None]:
    """Let Mosaic write what it makes into `folder`; machine code only where a disassembler is (triton brings one)."""
    importlib.import_module("jax.experimental.mosaic.gpu")  # sets CUDA_ROOT itself, over ours, if it comes later
    wanted = {"MOSAIC_GPU_DUMP_TO": folder}
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        tools = Path(triton.origin).parent / "backends/nvidia"
        if (tools / "bin/nvdisasm").exists():
            wanted["MOSAIC_GPU_CUDA_ROOT"] = str(tools)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _report(path: Path) -> KernelReport:
    said = path.read_text(errors="replace")
    texts = {kind: _read(path.with_suffix(kind)) for kind in (".ptx", ".sass_ctrl", ".resources.txt")}
    ptx, sass = texts[".ptx"], texts[".sass_ctrl"]
    if sass:
        wgmma, tma = len(re.findall(r"\bHGMMA\b", sass)), len(re.findall(r"\bUTMA(?:LDG|STG|REDG)\b", sass))
    else:
        wgmma, tma = ptx.count("wgmma.mma_async"), ptx.count("cp.async.bulk.tensor")
    return KernelReport(
        name=path.stem,
        registers=max(_numbers(r"Used (\d+) registers", said), default=0),
        spills=sum(_numbers(r"(\d+) bytes spill", said)),
        shared_memory=max(_numbers(r"smem_scratch_bytes=(\d+)", texts[".resources.txt"]), default=0),
        wgmma=wgmma,
        tma=tma,
        sass=bool(sass),
        ignored_setmaxnreg="C7504" in said,
    )


def _numbers(pattern: str, text: str) -> list[int]:
    return [int(x) for x in re.findall(pattern, text)]


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
