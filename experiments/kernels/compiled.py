"""What did the compiler make of our kernels for the H200? A line for each kernel of a `compiled` row; no GPU needed."""

import contextlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from experiments.kernels import sweep
from experiments.kernels.case import Case
from experiments.kernels.runner import OURS, in_a_line
from moejax.accounting.kernels import KernelReport, kernel_reports

COLUMNS = ("kernel", "registers", "spills", "shared memory", "HGMMA", "TMA", "temporaries")
KNOWN = "the same kernels as in an earlier row"


@dataclass(frozen=True)
class Line:
    """One kernel of a row, or the reason why there is none."""

    row: str
    way: str
    report: KernelReport | None = None
    """of the kernel, under its name without a number"""
    temporaries: int = 0
    """bytes that XLA keeps beside inputs and outputs, for the whole row"""
    breaches: tuple[str, ...] = ()
    """rules that it breaks"""
    note: str = ""


def compile_row(family: str, name: str, way: str) -> list[Line]:
    """Compile one way of a row, all by their names: what a process can be asked that has compiled nothing yet."""
    (case,) = (case for case in sweep.cases_of(family, dry=False) if case.name == name)
    return list(compile_case(case, (way,)))


def compile_case(case: Case, ways: Sequence[str] = OURS) -> Iterator[Line]:
    """Compile a row's own ways; yield a line for each kernel, or one that says why a way could not be compiled."""
    inputs = jax.eval_shape(case.make, jax.random.key(0))
    title = f"{case.family}: {case.name}"
    for way in (name for name in ways if name in case.ways):
        try:
            found = list(_compile(case, way, title, inputs))
        except NotImplementedError as reason:  # Declined
            found = [Line(title, way, note=in_a_line(reason))]
        except Exception as error:
            found = [Line(title, way, breaches=("does not compile",), note=in_a_line(error))]
        yield from found or [Line(title, way, note=KNOWN)]


def _compile(case: Case, way: str, title: str, inputs: Sequence[Any]) -> Iterator[Line]:
    with tempfile.TemporaryDirectory() as folder, triton_dumps(folder):
        reports, temporaries = kernel_reports(case.ways[way], *inputs)
        must_multiply = multipliers(reports) if case.matmul else set()
        for report in sorted(reports, key=number_and_name):
            breaches = tuple(report.breaches(report.name in must_multiply))
            yield Line(title, way, replace(report, name=number_and_name(report)[1]), temporaries, breaches)
        for ptx in sorted(Path(folder).rglob("*.ptx")):
            yield triton_line(title, way, ptx, temporaries)


def number_and_name(report: KernelReport) -> tuple[int, str]:
    """Take the number off a kernel's name: Mosaic numbers all that a process compiles, in the order of the program."""
    name, _, number = report.name.rpartition("_")
    return (int(number), name) if name and number.isdigit() else (0, report.name)


def multipliers(reports: Sequence[KernelReport]) -> set[str]:
    """Name the kernels of a multiplying way that must hold wgmma: those that copy tiles in (TMA), else all of them.

    A merge of partial results beside the kernel that multiplies copies no tiles and owes none.
    """
    return {report.name for report in reports if report.tma} or {report.name for report in reports}


@contextlib.contextmanager
def triton_dumps(folder: str) -> Iterator[None]:
    """Let jax-triton write the PTX of what it compiles into a folder; nothing where there is no jax-triton."""
    try:
        from jax_triton import triton_lib
    except ImportError:
        yield
        return
    library: Any = triton_lib  # JAX_TRITON_DUMP_DIR is read once, when it is imported: too early
    before, library._JAX_TRITON_DUMP_DIR = library._JAX_TRITON_DUMP_DIR, folder
    try:
        yield
    finally:
        library._JAX_TRITON_DUMP_DIR = before


def triton_line(title: str, way: str, ptx: Path, temporaries: int) -> Line:
    """Assemble a Triton kernel's PTX with triton's own ptxas and read its registers and spills."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    text = ptx.read_text()
    target = re.search(r"^\.target (\w+)", text, re.MULTILINE)
    command = [tool, "-v", f"--gpu-name={target[1] if target else 'sm_90a'}", ptx, "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    info = ptx.with_suffix(".compile_info")
    shared = re.findall(r"shared_mem_bytes: (\d+)", info.read_text()) if info.exists() else []
    report = KernelReport(
        name=ptx.stem,
        registers=max((int(x) for x in re.findall(r"Used (\d+) registers", said)), default=0),
        spills=sum(int(x) for x in re.findall(r"(\d+) bytes spill", said)),
        shared_memory=int(shared[0]) if shared else 0,
        wgmma=text.count("wgmma.mma_async"),
        tma=text.count("cp.async.bulk.tensor"),
        sass=False,
        ignored_setmaxnreg=False,
    )
    return Line(title, way, report, temporaries, tuple(report.breaches(matmul=False)))


def show(line: Line) -> str:
    """Say a line in text."""
    report = line.report
    if report is None:
        return f"{line.row} [{line.way}]: {line.note}" + (f" !! {', '.join(line.breaches)}" if line.breaches else "")
    numbers = f"{report.registers} registers, {report.spills} bytes spilled, {report.shared_memory:,} bytes shared, "
    numbers += f"{report.wgmma} HGMMA, {report.tma} TMA, {line.temporaries / 2**20:,.1f} MiB temporaries"
    return f"{line.row} [{line.way}] {report.name}: {numbers}" + "".join(f" !! {rule}" for rule in line.breaches)


def write(lines: Sequence[Line], out: Path) -> None:
    """Write kernels.json and kernels.md."""
    versions = {"jax": jax.__version__, "chip": "NVIDIA H200, compiled for on a machine without one; nothing was run"}
    text = json.dumps({**versions, "kernels": [_flat(line) for line in lines]}, indent=1)
    (out / "kernels.json").write_text(text + "\n")
    (out / "kernels.md").write_text("\n".join([*_markdown(lines, versions), ""]))


def _flat(line: Line) -> dict[str, Any]:
    fields = asdict(line)
    report = fields.pop("report") or {}
    return {"row": fields.pop("row"), "way": fields.pop("way"), **report, **fields}


def _markdown(lines: Sequence[Line], versions: dict[str, str]) -> Iterator[str]:
    yield f"# Our kernels as machine code: {versions['chip']} (jax {versions['jax']})"
    yield ""
    yield "Made by `python -m experiments.bench_kernels --compile`. Bytes; HGMMA and TMA are instructions in the code."
    row = None
    for line in lines:
        if line.row != row:
            row = line.row
            yield from ("", f"## {row}", "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|")
        report = line.report
        if report is None:
            yield f"| ({line.way}) {line.note.replace('|', '/')} |" + " |" * (len(COLUMNS) - 1)
            continue
        values = (report.registers, report.spills, report.shared_memory, report.wgmma, report.tma, line.temporaries)
        broken = f" **{', '.join(line.breaches)}**" if line.breaches else ""
        yield f"| {report.name} ({line.way}){broken} | " + " | ".join(f"{x:,}" for x in values) + " |"
