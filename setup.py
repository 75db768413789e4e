"""Builds the compiled parts of pyvtk by driving CMakeLists.txt with Ninja, and says what was built.

Objects are kept in build/, one folder per Python, torch and sanitizer, so a second build compiles only what changed.

Environment:
  PYVTK_CUDA=auto|0|1       CUDA library: where nvcc is found (auto, the default), never, or always (else an error)
  PYVTK_SANITIZE            sanitizers for the CPU library, e.g. "address,undefined"
  PYVTK_PREBUILT            folder with compiled parts from elsewhere, taken instead of compiling them:
                            libpyvtk_cuda.so, or libpyvtk_cpu.so and _C of this Python (nothing is compiled), or all
  TORCH_CUDA_ARCH_LIST      e.g. "8.0;8.6;8.9;9.0a"; default: the architectures of DEFAULT_ARCHITECTURES
  MAX_JOBS                  parallel compiler processes
  CUDA_HOME                 where nvcc lives, if it is not on PATH
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)
# Machine code for what there is, and PTX, which drivers compile, for what comes. That of 10.0 and not of the newest: it
# runs on 11.0 as well, and no worse on later ones: the one kernel that asks what it is compiled for is Hopper's
# (csrc/cuda/sparse24_wgmma.cuh), which needs the code for 9.0a.
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0+PTX;12.0"
CPU, CUDA = "libpyvtk_cpu.so", "libpyvtk_cuda.so"


def version() -> str:
    text = (ROOT / "pyvtk" / "_version.py").read_text()
    return re.search(r'__version__ = "(.+)"', text).group(1)


def torch_root() -> Path | None:
    """Folder of the torch that will run pyvtk, without importing it.

    pip builds in an isolated environment that hides site-packages from imports but not from sysconfig; building
    against the installed torch spares the download of a second one.
    """
    candidates = [Path(p) / "torch" for p in [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]]
    for candidate in candidates:
        if (candidate / "version.py").is_file() and (candidate / "include" / "torch" / "csrc" / "stable").is_dir():
            return candidate
    return None


def torch_version(root: Path) -> str:
    return re.search(r"__version__ = '([^']+)'", (root / "version.py").read_text()).group(1)


def find_nvcc() -> str | None:
    if home := os.environ.get("CUDA_HOME"):
        nvcc = Path(home) / "bin" / "nvcc"
        return str(nvcc) if nvcc.is_file() else None
    return shutil.which("nvcc")


def cuda_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX", spaces allowed) in CMake's spelling ("80-real;90a")."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    architectures = []
    for item in re.split(r"[;,\s]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not match:
            raise SystemExit(f"pyvtk: TORCH_CUDA_ARCH_LIST holds {item!r}; expected entries like 8.0, 9.0a, 12.0+PTX")
        major, minor, suffix, ptx = match.groups()
        architectures.append(f"{major}{minor}{suffix}" + ("" if ptx else "-real"))
    return ";".join(architectures)


def build_folder(torch: str) -> Path:
    """Where CMake works: under build/, apart for every Python, every torch and every sanitizer."""
    parts = [sys.implementation.cache_tag, f"torch{torch.partition('+')[0]}"]
    folder = ROOT / "build" / "-".join(["cmake", *parts, *re.findall(r"\w+", os.environ.get("PYVTK_SANITIZE", ""))])
    cache = folder / "CMakeCache.txt"
    if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
        shutil.rmtree(folder)  # copied along with the tree: CMake refuses a folder made for another one
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def jobs() -> str:
    wanted = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not wanted.isdigit() or int(wanted) < 1:
        raise SystemExit(f"pyvtk: MAX_JOBS must be a positive number, got {wanted!r}")
    return wanted


def remove_stale_cuda(destination: Path) -> None:
    """Left by an earlier build with CUDA, it would be packed as if it belonged to this one."""
    (destination / CUDA).unlink(missing_ok=True)


def require(name: str, hint: str) -> str:
    """Path of a build tool: from PATH, or beside the interpreter (a virtual environment that is not activated)."""
    places = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)]
    path = shutil.which(name, path=os.pathsep.join(places))
    if path is None:
        raise SystemExit(f"pyvtk: {name} not found; install it ({hint})")
    return path


class CMakeBuild(build_ext):
    """One CMake run builds every extension that is not given; what was built or taken is printed at the end."""

    def run(self):
        wanted = os.environ.get("PYVTK_CUDA") or "auto"
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"pyvtk: PYVTK_CUDA must be auto, 0 or 1, got {wanted!r}")
        module = Path(self.get_ext_fullpath("pyvtk._C")).resolve()
        given = self.prebuilt(module.name)
        destination = module.parent
        destination.mkdir(parents=True, exist_ok=True)
        if module.name not in given:
            built = self.compile(destination, wanted, given)
        elif wanted == "1" and CUDA not in given:
            raise SystemExit(f"pyvtk: PYVTK_CUDA=1 but PYVTK_PREBUILT holds no {CUDA}; nothing else is compiled here")
        else:
            built = "compiled nothing"
            if CUDA not in given:
                remove_stale_cuda(destination)
        for path in given.values():
            if path != destination / path.name:
                (destination / path.name).unlink(missing_ok=True)  # a process that has it loaded keeps the old one
                shutil.copyfile(path, destination / path.name)
        if given:
            built += f"; took {', '.join(given)} from {next(iter(given.values())).parent}"
        print(f"pyvtk {version()}: {built}", flush=True)

    def prebuilt(self, module: str) -> dict[str, Path]:
        """Name -> path of the compiled parts in PYVTK_PREBUILT. ``module`` and the CPU library come from one build."""
        named = os.environ.get("PYVTK_PREBUILT")
        if not named:
            return {}
        found = {name: Path(named).resolve() / name for name in (module, CPU, CUDA)}
        found = {name: path for name, path in found.items() if path.is_file()}
        if not found or (module in found) != (CPU in found):
            raise SystemExit(f"pyvtk: PYVTK_PREBUILT={named} must hold {CUDA}, or {CPU} and {module}, or all of them")
        return found

    def compile(self, destination: Path, wanted: str, given: dict[str, Path]) -> str:
        """Compiles what is not given, and returns what was built."""
        nvcc = find_nvcc() if wanted != "0" and CUDA not in given else None
        if wanted == "1" and nvcc is None and CUDA not in given:
            raise SystemExit(
                "pyvtk: PYVTK_CUDA=1 but nvcc was not found on PATH or under CUDA_HOME; install the CUDA toolkit "
                "(13.0 or newer, nvcc and cudart), or set PYVTK_CUDA=0 to build for the CPU only"
            )
        architectures = cuda_architectures() if nvcc else None
        processes = jobs()
        root = torch_root()
        if root is None:
            raise SystemExit(
                "pyvtk: no torch found to build against; install it first (pip install 'torch>=2.11'), "
                "then install pyvtk into the same environment"
            )
        found = torch_version(root)
        if tuple(int(x) for x in found.split(".")[:2]) < MINIMUM_TORCH:
            raise SystemExit(f"pyvtk: torch {found} is too old; pyvtk needs torch >= 2.11")
        cmake = require("cmake", "pip install cmake, or your system's package")
        ninja = require("ninja", "pip install ninja, or your system's package")

        build = build_folder(found)
        arguments = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPYVTK_TORCH_ROOT={root}", f"-DPython_EXECUTABLE={sys.executable}", f"-DPYVTK_VERSION={version()}",
            f"-DCMAKE_INSTALL_PREFIX={destination}", f"-DPYVTK_SANITIZE={os.environ.get('PYVTK_SANITIZE', '')}",
            f"-DPYVTK_CUDA={'ON' if nvcc else 'OFF'}",
        ]  # fmt: skip
        if nvcc:
            arguments += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]
        elif CUDA not in given:
            remove_stale_cuda(destination)
        for command in (arguments, [cmake, "--build", str(build), "--target", "install", "-j", processes]):
            if subprocess.run(command).returncode != 0:
                raise SystemExit("pyvtk: the build failed; the compiler's message stands above")

        sets = "portable, AVX2, AVX-512" if platform.machine() == "x86_64" else "portable"
        built = f"built {CPU} ({sets}) against torch {found}"
        if nvcc:
            built += f"; built {CUDA} for {architectures} with {nvcc}"
        elif CUDA not in given:
            reason = "PYVTK_CUDA=0" if wanted == "0" else "nvcc not found on PATH or under CUDA_HOME"
            built += f"; NOT built: {CUDA} ({reason})"
        return built

    def get_outputs(self):
        destination = Path(self.get_ext_fullpath("pyvtk._C")).parent
        return [str(path) for path in destination.glob("*.so")]


setup(
    ext_modules=[Extension("pyvtk._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # Only asked for when there is no torch to build against: the default wheel is several gigabytes.
    setup_requires=[] if torch_root() else ["torch>=2.11"],
)
