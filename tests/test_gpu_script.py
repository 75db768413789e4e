"""The logic of .ci/gpu, with a stand-in for Python: what is run, what is remembered, what is cut off."""

import os
import subprocess
import tarfile

import pytest
from fresh import ROOT

from pyvtk import bench

pytestmark = pytest.mark.package
# Notes its arguments; fails or takes long if they hold $FAIL or $SLOW.
PYTHON = """#!/bin/sh
echo "python $*" >> "$NOTES"
case "$*" in *"${FAIL:-nothing}"*) echo broken; exit 3;; *"${SLOW:-nothing}"*) sleep 30;; esac
echo said: "$*"
"""


@pytest.fixture
def gpu(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    notes = tmp_path / "notes"

    def call(*parts, **settings):
        notes.write_text("")
        env = {**os.environ, "PYTHON": str(python), "PYVTK_GPU_DEVICE": "cpu", "NOTES": str(notes), **settings}
        command = [str(ROOT / ".ci" / "gpu"), str(tmp_path / "out"), *parts]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, notes.read_text()

    return call


def test_runs_each_part_once(gpu, tmp_path):
    status, said, notes = gpu("build", "bench-select", PYVTK_GPU_BENCH="--quick --filter x")
    assert status == 0 and "all parts done" in said, said
    assert "pip install" in notes and "-m pyvtk info" in notes
    assert "-m pyvtk bench select --device cpu" in notes and "--resume" in notes and "--quick --filter x" in notes
    assert "said: -m pyvtk info" in (tmp_path / "out" / "build.log").read_text()
    assert (tmp_path / "out" / "environment.log").read_text().startswith("=== environment\n20")
    status, said, notes = gpu("build", "bench-select")
    assert status == 0 and said.count("done before") == 2 and "bench" not in notes


def test_goes_on_after_a_failure(gpu, tmp_path):
    status, said, notes = gpu("build", "bench-score", "bench-merge", FAIL="bench score")
    assert status == 1 and "failed: bench-score (status 3)" in said and "bench merge" in notes
    assert "broken" in (tmp_path / "out" / "bench-score.log").read_text()
    status, said, notes = gpu("build", "bench-score", "bench-merge")
    assert status == 0 and "bench score" in notes and "bench merge" not in notes


def test_time_limits(gpu):
    status, said, _ = gpu("bench-score", "bench-merge", SLOW="bench score", PYVTK_GPU_LIMIT="1")
    assert status == 1 and "failed: bench-score (cut off after 1 s)" in said and "bench-merge (" not in said
    status, said, _ = gpu("bench-score", "build", SLOW="bench score", PYVTK_GPU_TOTAL="2")
    assert status == 1 and "bench-score (cut off after" in said and "build (not begun)" in said


def test_archive_carries_on_elsewhere(gpu, tmp_path):
    archive = tmp_path / "gpu.tar.gz"
    assert gpu("build", PYVTK_GPU_ARCHIVE=str(archive))[0] == 0
    with tarfile.open(archive) as packed:
        assert {"./build.log", "./build.done", "./environment.log"} <= set(packed.getnames())
    (tmp_path / "out").rename(tmp_path / "lost")
    assert "build: done before" in gpu("build", PYVTK_GPU_ARCHIVE=str(archive))[1]


def test_all_tests_of_triton_kernels_are_found(gpu):
    _, _, notes = gpu("test-triton", "test-compiled")
    triton, compiled = (line for line in notes.splitlines() if "pytest.main" in line)
    files = sorted(path.name for path in (ROOT / "tests").glob("test_*_triton.py"))
    assert files and all(f"tests/{name}" in triton and f"--ignore tests/{name}" in compiled for name in files)


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        (["nothing"], {}, "no part nothing; there are build test-cuda"),
        (["build"], {"PYTHON": "no-such-python"}, "no no-such-python; set PYTHON"),
        (["build"], {"PYVTK_PREBUILT": "none"}, "names none, which is no folder"),
    ],
)
def test_refuses(gpu, parts, settings, message):
    status, said, _ = gpu(*parts, **settings)
    assert status == 2 and message in said


def test_every_family_is_measured(gpu):
    known = gpu("nothing")[1].split("there are ")[1].split()
    assert [part for part in known if part.startswith("bench-")] == [f"bench-{f}" for f in bench.load().FAMILIES]


def test_needs_a_gpu(gpu, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    status, said, _ = gpu("build", PYVTK_GPU_DEVICE="cuda", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert status == 2 and "finds no GPU" in said


def test_says_that_the_sanitizer_is_missing(gpu, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in (
        "bash",
        "dirname",
        "env",
        "mkdir",
        "tee",
        "touch",
        "date",
        "uname",
        "timeout",
        "grep",
        "tail",
        "rm",
        "sh",
    ):
        (folder / tool).symlink_to(subprocess.check_output(["which", tool], text=True).strip())
    status, said, notes = gpu("sanitize-memcheck", PATH=str(folder))
    assert status == 0 and "SKIPPED: compute-sanitizer is not installed" in said and "call_kernels" not in notes


def test_runs_under_the_sanitizer(gpu, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING sanitizer $*"\nexit 9\n')
    tool.chmod(0o755)
    status, said, _ = gpu("sanitize-memcheck", "sanitize-racecheck", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert status == 1 and "failed: sanitize-racecheck (status 9)" in said
    assert (
        "1 sanitizer --tool memcheck --report-api-errors no" in said and "1 sanitizer --tool racecheck --target" in said
    )
    assert said.count("python .ci/call_kernels.py") == 2
