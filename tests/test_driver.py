"""The CUDA library where the driver is too old, where there is none, and on devices that it has no code for.

None of them is at hand, so libraries stand in: one for the driver; and, where our CUDA library was not built or torch
cannot load it, one for that, which registers no operator.
"""

import os
import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fresh import ONLY_PATH, PACKAGE, copy_package, run

from pyvtk import _cuda, backends

pytestmark = [
    pytest.mark.package,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

OLD = (
    r"libpyvtk_cuda.so was built with CUDA 13\.\d and needs an NVIDIA driver for CUDA 13 \(580 or newer\); "
    r"the one of this machine is for CUDA 12.8"
)
OURS = torch.version.cuda is not None and (PACKAGE / "libpyvtk_cuda.so").is_file()
# before pyvtk is imported: torch's build may be one without CUDA
WITH_CUDA = ONLY_PATH + "import torch; torch.version.cuda = '13.0'\n"
ASK = """
from types import SimpleNamespace
import pyvtk
from pyvtk import backends
print("imported", flush=True)
on_cuda = SimpleNamespace(is_cpu=False, device=torch.device("cuda", 0))
print("taken:", backends.pick("select", None, on_cuda), backends.pick("compact", None, on_cuda))
try:
    print("named:", backends.pick("select", "compiled", on_cuda))
except RuntimeError as error:
    print(error)
from pyvtk._info import report
print(report())
"""


def compile_library(path: Path, source: str) -> None:
    arguments = ["g++", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
    subprocess.run(arguments, input=source, check=True, text=True)


def stand_in_driver(folder: Path, version: int | None) -> dict[str, str]:
    """Environment in which libcuda.so.1 is of this version; None: it is none."""
    folder.mkdir()
    if version is None:
        (folder / "libcuda.so.1").write_bytes(b"")
    else:
        compile_library(
            folder / "libcuda.so.1",
            "#include <unistd.h>\n"
            f"int cuDriverGetVersion(int* version) {{ *version = {version}; return 0; }}\n"
            'int cuInit(unsigned flags) { return write(2, "CUDA begins\\n", 12), 100; }\n',
        )
    return {"LD_LIBRARY_PATH": os.pathsep.join([str(folder), os.environ.get("LD_LIBRARY_PATH", "")])}


@pytest.fixture
def package(tmp_path):
    """Folder of a copy of the package that has a CUDA library: ours, or a stand-in."""
    library = copy_package(tmp_path) / "libpyvtk_cuda.so"
    if not OURS:
        library.unlink(missing_ok=True)
        compile_library(library, "int pyvtk_cuda_runtime(void) { return 13000; }")
    return tmp_path


def test_an_old_driver(package):
    env = stand_in_driver(package / "driver", 12080)
    said = run("-c", WITH_CUDA + ASK, path=[package], cwd=package, env=env)
    assert re.search(rf"select: backend 'compiled' cannot run: {OLD}", said)
    assert f"taken: reference {'reference' if backends._no_triton() else 'triton'}\n" in said
    assert re.search(rf"^libpyvtk_cuda.so +{OLD}$", said, re.M)
    assert re.search(r"^CUDA code +.*(built elsewhere|nvcc 13)", said, re.M)
    row = re.search(r"^select +\S+(?: \[\d+\])? +no \[(\d+)\]", said, re.M)
    assert re.search(rf"^\[{row.group(1)}\] {OLD}$", said, re.M)


@pytest.mark.parametrize(("version", "line"), [(13020, "for CUDA 13.2"), (None, "none: CUDA kernels cannot run here")])
def test_drivers_that_are_no_obstacle(package, version, line):
    """Among them none at all: what is registered is seen, and can be traced."""
    env = stand_in_driver(package / "driver", version)
    said = run("-c", WITH_CUDA + ASK, path=[package], cwd=package, env=env)
    assert "CUDA begins" not in said.partition("imported")[0], "a process that has begun CUDA cannot fork"
    assert re.search(r"^libpyvtk_cuda.so +loaded$", said, re.M)
    assert re.search(rf"^CUDA driver +{re.escape(line)}$", said, re.M)
    if OURS:
        assert "taken: compiled compiled\nnamed: compiled\n" in said
        assert re.search(r"^select( +(yes|no \[\d+\])) +yes ", said, re.M)
    else:
        assert "backend 'compiled' cannot run: pyvtk::select has no CUDA kernel yet" in said


def test_only_the_major_version_counts(tmp_path, monkeypatch):
    """CUDA promises that."""
    compile_library(tmp_path / "x.so", "int pyvtk_cuda_runtime(void) { return 13040; }")
    for name in ("_library", "_driver"):
        monkeypatch.setattr(_cuda, name, getattr(_cuda, name))
    for driver, fits in ((13000, True), (13050, True), (14000, True), (12090, False)):
        monkeypatch.setattr(_cuda, "_version_of_driver", lambda driver=driver: driver)
        assert (_cuda.attach(tmp_path / "x.so") is None) == fits


def test_a_library_of_another_version(tmp_path):
    library = copy_package(tmp_path) / "libpyvtk_cuda.so"
    library.unlink(missing_ok=True)
    compile_library(library, "int nothing;")
    said = run("-c", WITH_CUDA + ASK, path=[tmp_path], cwd=tmp_path)
    assert "backend 'compiled' cannot run: libpyvtk_cuda.so is of another version of pyvtk" in said
    assert "taken: reference" in said


@pytest.fixture
def device(monkeypatch):
    """A CUDA device; returns what sets CUDA's answer to the question for code."""
    library = SimpleNamespace(pyvtk_cuda_code=None)
    monkeypatch.setattr(_cuda, "_library", library)
    monkeypatch.setattr(_cuda, "_device_errors", {})
    monkeypatch.setitem(backends._compiled_errors, ("select", "cuda"), None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    return lambda answer: setattr(library, "pyvtk_cuda_code", answer)


def on_cuda(index: int):
    return SimpleNamespace(is_cpu=False, device=torch.device("cuda", index))


@pytest.mark.parametrize("status", [209, 98])
def test_a_device_without_code(device, status):
    device(lambda: status)
    assert backends.pick("select", None, on_cuda(1)) == "reference"
    with pytest.raises(RuntimeError, match=r"cannot run: .* without code for Tesla T4, compute capability 7.5 \(TORCH"):
        backends.pick("select", "compiled", on_cuda(1))
    assert backends.why_not("select", "compiled", "cuda") is None, "of no device in particular"


@pytest.mark.parametrize("status", [0, 700])
def test_a_device_with_code_is_asked_once(device, status):
    """Also one that has failed in another way: that is for the kernel to say."""
    asked = []
    device(lambda: asked.append(None) or status)
    assert [backends.pick("select", None, on_cuda(i)) for i in (0, 0, 2, 2)] == ["compiled"] * 4
    assert len(asked) == 2


def test_nobody_asks_before_cuda_has_begun(device, monkeypatch):
    device(lambda: 209)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert backends.pick("select", None, on_cuda(0)) == "compiled"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert backends.pick("select", None, on_cuda(0)) == "reference"


@pytest.mark.compile
def test_the_answer_is_a_constant_to_torch_compile(device):
    device(lambda: 209)

    def taken(x):
        return x + (1 if _cuda.no_code(0) is None else 2)

    assert torch.compile(taken, fullgraph=True, backend="eager")(torch.zeros(1)).item() == 2
