"""The package as its users meet it: cold starts, what is missing and why, wheel and sdist, errors of the build."""

import os
import platform
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from binaries import undefined_symbols
from fresh import INFO, ONLY_PATH, PACKAGE, ROOT, copy_package, copy_tree, run

import pyvtk
from pyvtk import backends

pytestmark = pytest.mark.package


# Public names


def test_public_names():
    for name in pyvtk.__all__:
        assert getattr(pyvtk, name) is not None
    module = type(pyvtk)
    others = {n for n, value in vars(pyvtk).items() if not n.startswith("_") and not isinstance(value, module)}
    assert others <= set(pyvtk.__all__)


def test_import_is_lean(tmp_path):
    """What only the demo and the benchmarks use is not imported with the package."""
    heavy = ["matplotlib", "transformers", "PIL", "onnx", "rich", "pytest"]
    assert run("-c", f"import sys, pyvtk; print(*(set({heavy}) & set(sys.modules)))", cwd=tmp_path).strip() == ""


# Parts that are missing

HIDE_TRITON = """
import importlib.machinery as machinery
find = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] == "triton" else find(name, *rest)
"""

ASK = """
import torch, pyvtk
from pyvtk import backends
x = torch.zeros(2)
for name in sorted(pyvtk.info()["operators"]):
    assert backends.pick(name, None, x) in ("compiled", "reference")
    try:
        backends.pick(name, {backend!r}, x)
        print(name, "runs")
    except RuntimeError as error:
        print(error)
"""


def test_without_triton(tmp_path):
    said = run("-c", HIDE_TRITON + ASK.format(backend="triton"), cwd=tmp_path)
    assert "backend 'triton' cannot run: triton is not installed" in said
    assert " runs" not in said


@pytest.mark.parametrize("missing", ["everything compiled", "libpyvtk_cpu.so", "_C"])
def test_without_compiled_parts(tmp_path, missing):
    copy = copy_package(tmp_path)
    for library in copy.glob("*.so"):
        if missing == "everything compiled" or library.name.startswith(missing):
            library.unlink()
    said = run("-c", INFO, path=[tmp_path], cwd=tmp_path)
    assert re.search(r"compiled part +not available: ", said)
    asked = run("-c", ONLY_PATH + ASK.format(backend="compiled"), path=[tmp_path], cwd=tmp_path)
    if missing != "_C":
        reason = "libpyvtk_cpu.so was not built into this installation"
        assert re.search(rf"libpyvtk_cpu.so +{reason}", said)
        assert f"backend 'compiled' cannot run: {reason}" in asked
        assert " runs" not in asked


def test_with_a_broken_library(tmp_path):
    library = copy_package(tmp_path) / "libpyvtk_cpu.so"
    library.write_bytes(b"not a library")
    said = run("-c", INFO, path=[tmp_path], cwd=tmp_path)
    assert re.search(r"libpyvtk_cpu.so +libpyvtk_cpu.so did not load: .*libpyvtk_cpu.so", said)


# Neighbours with the same names


def test_public_triton_kernels_stays_itself(tmp_path):
    public = tmp_path / "triton_kernels"
    public.mkdir()
    (public / "__init__.py").write_text("owner = 'somebody else'\n")
    code = "import pyvtk, pyvtk.triton_kernels as ours, triton_kernels as public; print(public.owner, ours.__name__)"
    assert run("-c", code, path=[tmp_path], cwd=ROOT.parent).strip() == "somebody else pyvtk.triton_kernels"


def test_no_triton_kernels_of_ours_at_top_level(tmp_path):
    code = "import importlib.util, pyvtk; print(importlib.util.find_spec('triton_kernels'))"
    assert run("-c", code, cwd=tmp_path).strip() == "None"


def test_vtk_tool_in_our_folder(tmp_path):
    (copy_package(tmp_path) / "VtkData.py").touch()
    said = run("-c", ONLY_PATH + "import pyvtk", path=[tmp_path], cwd=tmp_path, ok=False)
    assert "ImportError: pyvtk: the package 'PyVTK' (a tool for VTK files)" in said
    assert "pip uninstall PyVTK visual-token-kernels" in said


def test_vtk_tool_among_the_distributions(tmp_path):
    metadata = tmp_path / "PyVTK-0.5.18.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: PyVTK\nVersion: 0.5.18\n")
    said = run("-c", "import pyvtk", path=[tmp_path], cwd=tmp_path, ok=False)
    assert "ImportError: pyvtk: the package 'PyVTK' (a tool for VTK files)" in said


# The info command


def test_info(tmp_path):
    said = run("-m", "pyvtk", "info", cwd=tmp_path)
    assert re.search(rf"pyvtk +{re.escape(pyvtk.__version__)}\n", said)
    assert re.search(rf"torch +{re.escape(torch.__version__)}\n", said)
    assert re.search(r"instruction set +(portable|avx2|avx512) \(this machine runs portable", said)
    assert re.search(r"libpyvtk_cpu.so +loaded\n", said)
    if torch.version.cuda is None:
        assert re.search(r"libpyvtk_cuda.so +torch .* is a build without CUDA", said)
    assert "probe_" not in said
    for name in set(pyvtk.info()["operators"]) - {"probe_"}:
        assert re.search(rf"^{name}( +(yes|no \[\d+\])){{4}}$", said, re.M)


def test_info_explains_every_no():
    from pyvtk._info import report

    said = report()
    for number in set(re.findall(r"no \[(\d+)\]", said)):
        assert re.search(rf"^\[{number}\] \w.+$", said, re.M)


def test_unknown_command(tmp_path):
    assert "invalid choice: 'nonsense'" in run("-m", "pyvtk", "nonsense", cwd=tmp_path, ok=False)


def test_commands_load_only_when_they_run(tmp_path):
    code = (
        "import sys, importlib; from pyvtk.__main__ import COMMANDS, main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {module for module, _ in COMMANDS.values()} & set(sys.modules)\n"
        "for module, _ in COMMANDS.values():\n"
        "    loaded = importlib.import_module(module); loaded.main, loaded.add_arguments"
    )
    run("-c", code, cwd=tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_probe_runs_where_the_library_is_loaded():
    from pyvtk.ops.probe import probe

    device = torch.device("cuda", 0)
    assert probe(device) == backends.why_not("probe_", "compiled", device)


# The libraries


@pytest.mark.parametrize("library", sorted(path.name for path in PACKAGE.glob("libpyvtk_*.so")))
def test_libraries_need_only_what_torch_keeps_stable(library):
    """No C++ symbol of torch: those change from one release to the next; aoti_torch_* and torch_* do not."""
    foreign = [name for name in undefined_symbols(PACKAGE / library) if re.search(r"\b(at|c10|torch)::", name)]
    assert foreign == []


@pytest.mark.parametrize("library", sorted(path.name for path in PACKAGE.glob("libpyvtk_*.so")))
def test_libraries_know_no_python(library):
    needed = subprocess.run(
        ["readelf", "--dynamic", PACKAGE / library], check=True, capture_output=True, text=True
    ).stdout
    assert "libpython" not in needed
    assert not [name for name in undefined_symbols(PACKAGE / library) if name.startswith(("Py", "_Py"))]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_libraries_register_what_their_sources_name(device):
    """Of the CUDA library this needs a CUDA build of torch, and no GPU."""
    if device == "cuda" and (torch.version.cuda is None or not (PACKAGE / "libpyvtk_cuda.so").is_file()):
        pytest.skip("needs the CUDA library, and a torch that can load it")
    sources = "".join(path.read_text() for path in sorted((ROOT / "csrc" / device).glob("*.c[pu]*")))
    names = re.findall(r'm\.impl\("(\w+)", TORCH_BOX', sources)
    assert len(names) > 10
    missing = [
        name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pyvtk::{name}", device.upper())
    ]
    assert missing == []


# Wheel and sdist


def build_sdist(folder: Path) -> Path:
    code = "import sys; from setuptools import build_meta; print('made', build_meta.build_sdist(sys.argv[1]))"
    said = run("-c", code, str(folder), cwd=copy_tree(folder))
    return folder / re.search(r"^made (.+)$", said, re.M).group(1)


def build_wheel(sdist: Path, folder: Path) -> Path:
    """From the unpacked sdist, so that it also proves the sdist complete. Not optimised, which takes minutes."""
    folder.mkdir()
    subprocess.run(["tar", "-xf", sdist, "-C", folder], check=True)
    (source,) = folder.iterdir()
    arguments = ["-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(folder), str(source)]
    said = run(*arguments, cwd=folder, env={"PYVTK_CUDA": "0", "CMAKE_BUILD_TYPE": "None"})
    assert re.search(r"pyvtk \S+: built libpyvtk_cpu.so .*; NOT built: libpyvtk_cuda.so \(PYVTK_CUDA=0\)", said)
    (made,) = folder.glob("*.whl")
    return made


def check_sdist_holds_the_sources_and_no_more(sdist: Path) -> None:
    names = subprocess.run(["tar", "-tf", sdist], check=True, capture_output=True, text=True).stdout.splitlines()
    names = {name.partition("/")[2] for name in names}
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "CHANGELOG.md"} <= names
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources <= names
    assert not {name.split("/")[0] for name in names} & {"tests", "benchmarks", "examples", "build"}
    assert not [name for name in names if name.endswith(".so")]


def check_wheel_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"pyvtk", f"visual_token_kernels-{pyvtk.__version__}.dist-info"}
    libraries = sorted(name for name in names if name.endswith(".so"))
    assert [re.sub(r"\.cpython-[^.]+", "", name) for name in libraries] == ["pyvtk/_C.so", "pyvtk/libpyvtk_cpu.so"]
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pyvtk").rglob("*.py")}
    expected |= {f"pyvtk/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "triton_kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected


def check_wheel_says_where_it_runs(wheel: Path) -> None:
    python, abi, where = wheel.stem.split("-")[-3:]
    assert (python, abi) == (f"cp{sys.version_info[0]}{sys.version_info[1]}",) * 2
    assert where.startswith("linux") and where.endswith(platform.machine())


def check_wheel_runs(wheel: Path, folder: Path) -> None:
    zipfile.ZipFile(wheel).extractall(folder)
    code = "import pyvtk; from pyvtk import _C, triton_kernels as t; print(pyvtk.__file__, _C.__file__, t.__file__)"
    for line in run("-c", ONLY_PATH + code, path=[folder], cwd=folder).split():
        assert line.startswith(str(folder))
    assert re.search(r"libpyvtk_cpu.so +loaded\n", run("-c", INFO, path=[folder], cwd=folder))


@pytest.mark.long
def test_sdist_and_wheel(tmp_path):
    """One test, so that they are built once, whatever processes the tests are spread over."""
    sdist = build_sdist(tmp_path)
    check_sdist_holds_the_sources_and_no_more(sdist)
    wheel = build_wheel(sdist, tmp_path / "wheel")
    check_wheel_contents(wheel)
    check_wheel_says_where_it_runs(wheel)
    check_wheel_runs(wheel, tmp_path / "installed")


# Errors of the build

MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")


def build_ext(tmp_path: Path, ok: bool = False, **env: str) -> str:
    env = {"PATH": "/nonexistent", "CUDA_HOME": "", "TORCH_CUDA_ARCH_LIST": "", "PYVTK_CUDA": "", **env}
    arguments = ["setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    return run(*arguments, cwd=ROOT, env=env, ok=ok)


def test_cuda_wanted_without_nvcc(tmp_path):
    said = build_ext(tmp_path, PYVTK_CUDA="1")
    assert "PYVTK_CUDA=1 but nvcc was not found on PATH or under CUDA_HOME; install the CUDA toolkit" in said
    assert "Traceback" not in said


def test_cuda_home_without_nvcc(tmp_path):
    said = build_ext(tmp_path, PYVTK_CUDA="1", CUDA_HOME=str(tmp_path), PATH=os.environ["PATH"])
    assert "nvcc was not found" in said


@pytest.mark.parametrize("value", ["yes", "2", "AUTO "])
def test_bad_pyvtk_cuda(tmp_path, value):
    assert f"pyvtk: PYVTK_CUDA must be auto, 0 or 1, got {value!r}" in build_ext(tmp_path, PYVTK_CUDA=value)


@pytest.mark.parametrize("value", ["sm_90", "9", "8.0;hopper", "9.0b"])
def test_bad_architectures(tmp_path, value):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch()
    said = build_ext(tmp_path, PYVTK_CUDA="1", CUDA_HOME=str(tmp_path), TORCH_CUDA_ARCH_LIST=value)
    assert f"pyvtk: TORCH_CUDA_ARCH_LIST holds {value.split(';')[-1]!r}; expected entries like 8.0" in said


@pytest.mark.parametrize("value", ["0", "many", "-1"])
def test_bad_max_jobs(tmp_path, value):
    said = build_ext(tmp_path, PYVTK_CUDA="0", MAX_JOBS=value)
    assert f"pyvtk: MAX_JOBS must be a positive number, got {value!r}" in said


@pytest.mark.parametrize("parts", [[], ["libpyvtk_cpu.so"], ["_C"], ["libpyvtk_cpu.so", "libpyvtk_cuda.so"]])
def test_bad_prebuilt_parts(tmp_path, parts):
    (tmp_path / "given").mkdir()
    for name in parts:
        (tmp_path / "given" / (MODULE if name == "_C" else name)).touch()
    said = build_ext(tmp_path, PYVTK_PREBUILT=str(tmp_path / "given"))
    assert re.search(r"must hold libpyvtk_cuda.so, or libpyvtk_cpu.so and _C\.\S+\.so, or all of them", said)


def test_prebuilt_parts_are_taken_and_nothing_is_compiled(tmp_path):
    names = ("libpyvtk_cpu.so", MODULE)
    for folder, extra in (("whole", ["libpyvtk_cuda.so"]), ("cpu", [])):
        given, made = tmp_path / folder, tmp_path / f"from_{folder}"
        given.mkdir()
        for name in (*names, *extra):
            (given / name).write_text(name)
        (made / "pyvtk").mkdir(parents=True)
        (made / "pyvtk" / "libpyvtk_cuda.so").write_text("of another build")
        said = build_ext(made, PYVTK_PREBUILT=str(given), ok=True)
        assert re.search(rf"pyvtk \S+: compiled nothing; took .* from {re.escape(str(given))}\n", said)
        left = {path.name: path.read_text() for path in (made / "pyvtk").iterdir()}
        assert left == {name: name for name in (*names, *extra)}
    said = build_ext(tmp_path, PYVTK_PREBUILT=str(tmp_path / "cpu"), PYVTK_CUDA="1")
    assert "PYVTK_CUDA=1 but PYVTK_PREBUILT holds no libpyvtk_cuda.so" in said
