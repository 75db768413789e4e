"""The tree keeps its shape: one name in every layer, kernels without torch, imports along the arrows of DESIGN.md."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fresh import ROOT

pytestmark = pytest.mark.package

# Pages of operators that are no family: a self-test of the CUDA build.
NOT_A_FAMILY = {"__init__", "probe"}
COMPOSED = {"score_and_select"}  # operators without kernels of their own
# families whose cases stand beside those that they serve
MEASURED_WITH = {"layout": "attention", "text_attention": "attention"}
FAMILIES = sorted(
    path.stem for path in (ROOT / "pyvtk" / "ops").glob("*.py") if path.stem not in NOT_A_FAMILY and path.stem[0] != "_"
)
CSRC = ROOT / "csrc"
TORCH_INCLUDE = re.compile(r'#include\s*[<"](torch/|ATen/|c10/|binding\.h)')


def relative(paths) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def python_files(*folders: str) -> list[str]:
    return relative(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


# One name in every layer


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_its_file_in_every_layer(family):
    if family in COMPOSED:
        # It runs the kernels of other families, and is measured where the first of them is.
        files = [f"csrc/cpu/{family}.cpp", f"tests/test_{family}.py"]
        assert [name for name in files if not (ROOT / name).is_file()] == []
        return
    files = [
        f"pyvtk/reference/{family}.py",
        f"csrc/cpu/{family}.h",
        f"csrc/cpu/{family}.cpp",
        f"tests/test_{family}.py",
        f"benchmarks/bench_{MEASURED_WITH.get(family, family)}.py",
    ]
    assert [name for name in files if not (ROOT / name).is_file()] == []


def implementations() -> list[str]:
    """Files that belong to one family each; headers may also be helpers of several."""
    patterns = {"csrc/cpu": "*.cpp", "csrc/cuda": "*.cu", "triton_kernels": "*.py", "pyvtk/reference": "*.py"}
    return relative(path for folder, pattern in patterns.items() for path in (ROOT / folder).glob(pattern))


@pytest.mark.parametrize("name", implementations())
def test_implementation_belongs_to_a_family(name):
    stem = Path(name).stem
    owners = [family for family in FAMILIES if stem == family or stem.startswith(f"{family}_")]
    assert owners or stem.startswith("_") or stem in NOT_A_FAMILY | {"noop"}, f"{name}: no page of this name"


@pytest.mark.parametrize("name", relative((CSRC / "cuda").glob("*.cu")))
def test_cuda_binding_has_its_kernels_beside_it(name):
    assert (ROOT / name).with_suffix(".cuh").is_file()


# Kernels without torch


def torch_free() -> list[str]:
    kernels = [*(CSRC / "cpu").glob("*.h"), *(CSRC / "cuda").glob("*.cuh"), *(CSRC / "common").glob("*")]
    return relative(path for path in kernels if not path.stem.endswith("_binding"))


@pytest.mark.parametrize("name", torch_free())
def test_kernel_header_includes_no_torch(name):
    assert TORCH_INCLUDE.findall((ROOT / name).read_text()) == []


def kernel_programs() -> dict[str, str]:
    """A program for every kernel header: alone if it stands alone, else as its binding includes it."""
    programs = {}
    for path in (CSRC / "cpu").glob("*.cpp"):
        for header in re.findall(r'#define PYVTK_KERNEL_HEADER "(.+)"', path.read_text()):
            programs[header] = f'#define PYVTK_KERNEL_HEADER "{header}"\n#include "cpu/each_isa.h"\n'
    for name in torch_free():
        header = name.removeprefix("csrc/")
        if name.endswith(".h") and "#pragma once" in (ROOT / name).read_text():
            programs[header] = f'#include "{header}"\n'
    return programs


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("header", sorted(kernel_programs()))
def test_kernel_header_compiles_without_torch(header):
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wno-psabi", f"-I{CSRC}", "-x", "c++", "-"]
    done = subprocess.run(command, input=kernel_programs()[header], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", relative(path for path in (CSRC / "cuda").glob("*.cuh") if path.stem != "ptx"))
def test_cuda_kernel_runs_in_the_emulation(name):
    """tests/cuda_emulation/README.md: shared memory, launches and PTX by name only, so that g++ compiles it too."""
    text = re.sub("//.*", "", (ROOT / name).read_text())
    assert re.findall(r"<<<|__shared__|\basm\b|cuda_runtime", text) == []
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DPYVTK_CUDA_EMULATION"]
    include = [f"-I{ROOT / 'tests' / 'cuda_emulation'}", f"-I{CSRC}", "-x", "c++", "-"]
    program = f'#include "{name.removeprefix("csrc/")}"\n'
    done = subprocess.run([*command, *include], input=program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Imports along the arrows


def imports(name: str) -> set[str]:
    """Modules that a file imports, relative ones in full: ``from .a import b`` in triton_kernels is ours too."""
    package = name.rpartition("/")[0].replace("/", ".").replace("triton_kernels", "pyvtk.triton_kernels")
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            # `from pyvtk import checks` imports pyvtk.checks
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def check_arrows(name: str, forbidden: tuple[str, ...]) -> None:
    wrong = [module for module in imports(name) if any(f"{module}.".startswith(f"{f}.") for f in forbidden)]
    assert wrong == [], f"{name} may not import {wrong}"


UPPER = ("pyvtk.ops", "pyvtk.backends", "pyvtk.methods", "pyvtk.integrations", "pyvtk._C")


@pytest.mark.parametrize("name", python_files("pyvtk/reference"))
def test_reference_imports_nothing_above_it(name):
    check_arrows(name, (*UPPER, "pyvtk.triton_kernels", "triton"))


@pytest.mark.parametrize("name", python_files("triton_kernels"))
def test_triton_kernels_import_nothing_of_the_package(name):
    check_arrows(name, (*UPPER, "pyvtk.reference", "pyvtk.checks", "triton_kernels"))


@pytest.mark.parametrize("name", python_files("pyvtk/ops"))
def test_page_imports_nothing_above_it(name):
    check_arrows(name, ("pyvtk.methods", "pyvtk.integrations", "triton_kernels"))


@pytest.mark.parametrize("name", python_files("pyvtk/methods", "pyvtk/integrations"))
def test_method_touches_no_kernel(name):
    check_arrows(name, ("pyvtk.reference", "pyvtk.triton_kernels", "pyvtk._C", "triton", "triton_kernels"))
    assert "torch.ops.pyvtk" not in (ROOT / name).read_text()


# Habits


@pytest.mark.parametrize("name", python_files("pyvtk", "triton_kernels"))
def test_library_does_not_autotune(name):
    assert "autotune" not in (ROOT / name).read_text(), "tile sizes come from one readable function"


@pytest.mark.parametrize("name", ["conftest.py", "tests/__init__.py"])
def test_root_stays_off_the_path(name):
    """With either of these, pytest puts the root on sys.path, where triton_kernels would shadow the public one."""
    assert not (ROOT / name).exists()
