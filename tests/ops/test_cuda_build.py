"""What the compiler makes of csrc/ for sm_90a: no spills, tensor-core instructions (docs/low_rank_polar.md)."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cuda_host
import pytest

ROOT = Path(__file__).parents[2]
SHARED_OF_SM, SHARED_OF_BLOCK, RESERVED, REGISTERS_OF_SM, THREADS_OF_SM = 233_472, 232_448, 1024, 65_536, 2048
STRICT = ("-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-Werror", "-Xcompiler", "-Wall,-Wextra,-Werror")


@dataclass(frozen=True)
class Report:
    """What ptxas says of a kernel, and its matrix instructions in the machine code (None without a disassembler)."""

    registers: int
    stack: int
    instructions: frozenset[str] | None


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if found is None:
        pytest.skip("nvcc is not installed")
    return found


def disassembler() -> str | None:
    """cuobjdump on the PATH, or the one that Triton carries."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (shutil.which("cuobjdump", path=str(folder)) if folder else None)


def compile_for(architecture: str, output: Path, *options: str) -> str:
    """The compiler's messages."""
    command = [
        *(nvcc(), "-O3", "-std=c++17", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", *options),
        *('-DGAKERNELS_ARCHITECTURES=""', "-c", str(ROOT / "csrc" / "launch.cu"), "-o", str(output)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """By the mangled name of the kernel."""
    made = tmp_path_factory.mktemp("cuda") / "launch.o"
    text = compile_for("90a", made, *STRICT)
    pattern = r"entry function '(\w+)' for 'sm_90a'.*?(\d+) bytes stack frame.*?Used (\d+) registers"
    found = re.findall(pattern, text, re.DOTALL)
    instructions = matrix_instructions(made)
    return {
        name: Report(int(registers), int(stack), None if instructions is None else instructions[name])
        for name, stack, registers in found
    }


def matrix_instructions(compiled: Path) -> dict[str, frozenset[str]] | None:
    tool = disassembler()
    if tool is None:
        return None
    text = subprocess.run([tool, "-sass", str(compiled)], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"Function : (\w+)", text)[1:]
    bodies = zip(functions[::2], functions[1::2], strict=True)
    return {name: frozenset(re.findall(r"\b(?:[DH]MMA|HGMMA|LDL|STL)[\w.]*", body)) for name, body in bodies}


@functools.cache
def table() -> dict[str, tuple[int, int, int, int, str]]:
    """Rows of docs/low_rank_polar.md: threads, registers, shared memory, blocks of a multiprocessor, instruction."""
    rows = {}
    for line in (ROOT / "docs" / "low_rank_polar.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 7 and re.fullmatch(r"`\w+`", cells[0]):
            rows[cells[0].strip("`")] = (*(int(cell.replace(",", "")) for cell in cells[2:6]), cells[6])
    return rows


def test_the_table_lists_every_kernel_with_its_launch() -> None:
    launches = {symbol: (threads, shared) for symbol, threads, _, shared in cuda_host.kernels().kernels()}
    assert {symbol: (row[0], row[2]) for symbol, row in table().items()} == launches


def test_the_table_is_consistent_with_a_multiprocessor() -> None:
    limits = {symbol: blocks for symbol, _, blocks, _ in cuda_host.kernels().kernels()}
    for symbol, (threads, registers, shared, blocks, _) in table().items():
        assert shared <= SHARED_OF_BLOCK
        fit = (
            REGISTERS_OF_SM // (threads * -(-registers // 8) * 8),
            SHARED_OF_SM // (shared + RESERVED),
            THREADS_OF_SM // threads,
        )
        assert blocks == min(fit)
        assert blocks >= limits[symbol]


def test_no_kernel_spills_or_uses_a_stack(reports: dict[str, Report]) -> None:
    assert len(reports) == len(table())
    for name, report in reports.items():
        assert report.stack == 0, name
        assert report.instructions is None or not {"LDL", "STL"} & {i.split(".")[0] for i in report.instructions}


def test_registers_are_those_of_the_table(reports: dict[str, Report]) -> None:
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    stated = re.search(r"nvcc (\d+\.\d+)\.\d+", (ROOT / "docs" / "low_rank_polar.md").read_text(encoding="utf-8"))
    assert stated is not None
    if f"release {stated[1]}," not in version:
        pytest.skip(f"the table was made with nvcc {stated[1]}")
    registers = {symbol: row[1] for symbol, row in table().items()}
    assert {of_table(name): report.registers for name, report in reports.items()} == registers


def test_the_tensor_cores_are_used(reports: dict[str, Report]) -> None:
    for name, report in reports.items():
        if report.instructions is None:
            pytest.skip("there is no cuobjdump, neither on the PATH nor in Triton")
        wanted = table()[of_table(name)][4].strip("`")
        assert report.instructions == (frozenset() if wanted == "-" else {wanted}), name


def of_table(name: str) -> str:
    """The row of a mangled kernel."""
    (symbol,) = (symbol for symbol in table() if f"INS_{symbol}EE" in name)
    return symbol


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "100"])
def test_it_compiles_for_other_architectures(architecture: str, tmp_path: Path) -> None:
    compile_for(architecture, tmp_path / "launch.o", "-Xcompiler", "-Wall,-Wextra")


# --- setup.py ---------------------------------------------------------------------------------------------------------


def run_setup(**environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py --name`, which decides what is built without building it."""
    pytest.importorskip("setuptools")
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")} | environment,
        capture_output=True,
        text=True,
    )


def test_the_build_can_be_forbidden() -> None:
    done = run_setup(GAKERNELS_CUDA_BUILD="skip")
    assert done.returncode == 0
    assert "the CUDA extension is not built: GAKERNELS_CUDA_BUILD=skip" in done.stderr


def test_a_wrong_setting_is_an_error() -> None:
    done = run_setup(GAKERNELS_CUDA_BUILD="maybe")
    assert done.returncode != 0
    assert "must be auto, force or skip, but it is 'maybe'" in done.stderr


def test_without_nvcc_there_is_a_line_or_an_error(tmp_path: Path) -> None:
    done = run_setup(CUDA_HOME=str(tmp_path))
    assert done.returncode == 0
    assert done.stderr.count("the CUDA extension is not built: nvcc was not found") == 1
    assert run_setup(CUDA_HOME=str(tmp_path), GAKERNELS_CUDA_BUILD="force").returncode != 0
