"""The toy operator of CONTRIBUTING.md works as printed: taken out of the text, built, and tested by its own test."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh import INFO, ONLY_PATH, ROOT, copy_tree, run

pytestmark = pytest.mark.package


def files() -> dict[str, str]:
    """Path -> text of every fenced block that stands under its path."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return dict(re.findall(r"^`([\w./]+)`[^\n]*(?:\n[^\n]+)*\n\n```\w+\n(.*?)^```$", text, re.M | re.S))


def test_every_layer_is_shown():
    assert sorted(files()) == [
        "csrc/cpu/scale.cpp",
        "csrc/cpu/scale.h",
        "pyvtk/__init__.py",
        "pyvtk/ops/scale.py",
        "pyvtk/reference/scale.py",
        "tests/test_scale.py",
    ]


def tool(name: str) -> str | None:
    """A command, from PATH or beside the interpreter."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def tree_with_the_toy(folder: Path) -> Path:
    tree = copy_tree(folder)
    for name, text in files().items():
        if name == "pyvtk/__init__.py":
            before = (tree / name).read_text()
            assert "\nbackends.complete()\n" in before
            text = before.replace("\nbackends.complete()\n", f"\n{text}\nbackends.complete()\n")
        (tree / name).write_text(text)
    return tree


@pytest.mark.long
def test_it_builds_and_its_own_test_passes(tmp_path):
    """One test, so that it is built once, whatever processes the tests are spread over."""
    tree = tree_with_the_toy(tmp_path)
    for other in (tree / "csrc" / "cpu").glob("*.cpp"):
        if other.name != "scale.cpp":
            other.unlink()  # the kernels of the other families take minutes to compile and are not asked for
    commands = [
        [tool("cmake"), "-S", tree, "-B", tree / "build", f"-DPYVTK_TORCH_ROOT={torch.__path__[0]}",
         f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={tree / 'pyvtk'}"],
        [tool("cmake"), "--build", tree / "build", "--target", "install", "-j", "2"],
    ]  # fmt: skip
    for command in commands:
        done = subprocess.run(command, text=True, stdin=subprocess.DEVNULL, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
    pytest_here = ONLY_PATH + "import pytest; sys.exit(pytest.main(['tests/test_scale.py', '-p', 'no:cacheprovider']))"
    said = run("-c", pytest_here, path=[tree], cwd=tree)
    assert re.search(r"\d+ passed", said) and "skipped" not in said
    assert re.search(r"^scale +yes +no \[\d+\] +no \[\d+\] +yes$", run("-c", INFO, path=[tree], cwd=tree), re.M)


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "clang-format --dry-run --Werror"])
def test_it_is_written_in_our_style(tmp_path, command):
    name, *options = command.split()
    if tool(name) is None:
        pytest.skip(f"{name} is not installed")
    tree = tree_with_the_toy(tmp_path)
    python = name == "ruff"
    shown = [path for path in files() if path.endswith(".py") == python and path != "pyvtk/__init__.py"]
    done = subprocess.run([tool(name), *options, *shown], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
