"""The logic of .ci/gpu, with a stand-in for Python: what is run, what is remembered, what is cut off."""

import os
import subprocess
import tarfile

import pytest
from fresh import ROOT, run

from pyvtk import bench

pytestmark = pytest.mark.package
# Notes its arguments; fails, takes long or loses the device (the first time) if they hold $FAIL, $SLOW or $LOSES. The
# package is installed where $BUILT is.
PYTHON = """#!/bin/sh
echo "python $*" >> "$NOTES"
case "$*" in *"${FAIL:-nothing}"*) echo broken; exit 3;; *"${SLOW:-nothing}"*) sleep 30;; esac
case "$*" in
  *"pip install"*) [ -z "${PYVTK_PREBUILT:-}" ] || echo "prebuilt $PYVTK_PREBUILT" >> "$NOTES"; touch "$BUILT";;
  *pyvtk._C*) [ -e "$BUILT" ] || exit 1; [ -z "${PYVTK_PREBUILT:-}" ] || [ -e "$PYVTK_PREBUILT/good" ] || exit 1;;
  *"${LOSES:-nothing}"*)
    while [ "$1" != --json ]; do shift; done
    echo case >> "$2"
    [ "$(wc -l < "$2")" -gt "${TIMES:-1}" ] || exit "${STATUS:-86}";;
esac
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
        env = {
            **os.environ, "PYTHON": str(python), "PYVTK_GPU_DEVICE": "cpu", "PYVTK_GPU_BUNDLE": str(tmp_path / ".gpu"),
            "NOTES": str(notes), "BUILT": str(tmp_path / "built"), **settings,
        }  # fmt: skip
        command = [str(ROOT / ".ci" / "gpu"), str(tmp_path / "out"), *parts]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, notes.read_text()

    return call


def tool(folder, name: str, text: str) -> str:
    """A PATH in which ``name`` is a program that does this."""
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_runs_each_part_once(gpu, tmp_path):
    status, said, notes = gpu("bench-select", PYVTK_GPU_BENCH="--quick --filter x")
    assert status == 0 and "all parts done" in said, said
    assert "pip install" in notes and "-m pyvtk info" in notes  # what runs needs the package
    assert "-m pyvtk bench select --plots" in notes and "--device cpu" in notes
    assert "--resume" in notes and "--quick --filter x" in notes
    assert "said: -m pyvtk info" in (tmp_path / "out" / "build.log").read_text()
    assert (tmp_path / "out" / "environment.log").read_text().startswith("=== environment\n20")
    status, said, notes = gpu("bench-select")
    assert status == 0 and said.count("done before, on cpu, 20") == 2 and "bench" not in notes


def test_goes_on_after_a_failure(gpu, tmp_path):
    status, said, notes = gpu("bench-score", "bench-merge", FAIL="bench score")
    assert status == 1 and "failed: bench-score (status 3)" in said and "bench merge" in notes
    assert "broken" in (tmp_path / "out" / "bench-score.log").read_text()
    status, said, notes = gpu("bench-score", "bench-merge")
    assert status == 0 and "bench score" in notes and "bench merge" not in notes


def test_nothing_runs_without_the_package(gpu):
    status, said, notes = gpu("bench-score", FAIL="pyvtk._C")
    assert status == 1 and "nothing else can run" in said and "bench score" not in notes


def test_time_limits(gpu):
    status, said, _ = gpu("bench-score", "bench-merge", SLOW="bench score", PYVTK_GPU_LIMIT="1")
    assert status == 1 and "failed: bench-score (cut off after 1 s)" in said and "bench-merge (" not in said
    status, said, _ = gpu("bench-score", "bench-select", SLOW="bench score", PYVTK_GPU_TOTAL="2")
    assert status == 1 and "bench-score (cut off after" in said and "bench-select (not begun)" in said


@pytest.mark.parametrize("kept", ["archive", "bundle"])
def test_goes_on_on_another_machine(gpu, tmp_path, kept):
    """A run was cut off; the next machine has its archive, and nothing installed."""
    archive = tmp_path / "gpu.tar.gz"
    status, _, _ = gpu("bench-score", "bench-merge", SLOW="bench merge", PYVTK_GPU_LIMIT="1",
                       PYVTK_GPU_ARCHIVE=str(archive))  # fmt: skip
    assert status == 1
    with tarfile.open(archive) as packed:
        assert {"build.done", "bench-score.done", "bench-merge.log"} <= set(packed.getnames())
        assert all(member.isfile() for member in packed)
    (tmp_path / "out").rename(tmp_path / "lost")
    (tmp_path / "built").unlink()
    settings = {"PYVTK_GPU_ARCHIVE": str(archive)}
    if kept == "bundle":
        (tmp_path / ".gpu").mkdir()
        archive.rename(tmp_path / ".gpu" / "results.tar.gz")
        settings = {}
    status, said, notes = gpu("bench-score", "bench-merge", **settings)
    assert status == 0 and "bench-score: done before" in said
    assert "pip install" in notes and "bench merge" in notes and "bench score" not in notes


def test_an_archive_does_not_undo_what_is_newer(gpu, tmp_path):
    archive = tmp_path / "gpu.tar.gz"
    gpu("bench-score", PYVTK_GPU_ARCHIVE=str(archive))
    (tmp_path / "out" / "bench-score.log").write_text("newer")
    gpu("bench-score", PYVTK_GPU_ARCHIVE=str(archive))
    assert (tmp_path / "out" / "bench-score.log").read_text() == "newer"


# GNU tar as on a file system that tells other things of a folder than those with which it was made
TAR = """case "$*" in
  *-xzf*) if /bin/tar --verbose "$@" | grep '/$'; then echo Unexpected inconsistency; exit 2; fi;;
  *) exec /bin/tar "$@";;
esac"""


@pytest.mark.skipif(not os.path.exists("/bin/tar"), reason="tar is elsewhere")
@pytest.mark.parametrize("exists", [False, True])
def test_an_archive_with_folders_is_unpacked(gpu, tmp_path, exists):
    """As .ci/gpu wrote it once, or somebody packs it by hand; into a folder that is there, and empty, as well."""
    bundle, before, out = tmp_path / ".gpu", tmp_path / "before", tmp_path / "out"
    (before / "deep").mkdir(parents=True)
    bundle.mkdir()
    for name in ("bench-score.done", "-odd name", "deep/picture.png"):
        (before / name).write_text("on cpu, before")
    with tarfile.open(bundle / "results.tar.gz", "w:gz") as packed:
        packed.add(before, ".")
    if exists:
        out.mkdir()
    status, said, notes = gpu("bench-score", PATH=tool(tmp_path, "tar", TAR))
    assert status == 0 and "bench-score: done before" in said and "bench score" not in notes
    assert (out / "deep" / "picture.png").exists() and (out / "-odd name").exists()


@pytest.mark.parametrize("kept", ["archive", "bundle"])
def test_goes_on_without_an_archive_that_cannot_be_unpacked(gpu, tmp_path, kept):
    """The machine is there for a quarter of an hour: what can be measured is."""
    bad = tmp_path / ("gpu.tar.gz" if kept == "archive" else ".gpu/results.tar.gz")
    bad.parent.mkdir(exist_ok=True)
    bad.write_bytes(b"cut off")
    settings = {"PYVTK_GPU_ARCHIVE": str(bad)} if kept == "archive" else {}
    status, said, notes = gpu("bench-score", **settings)
    assert status == 0 and f"{bad} cannot be unpacked: goes on without it" in said and "bench score" in notes
    assert bad.with_name(f"{bad.name}.bad").read_bytes() == b"cut off"
    assert bad.exists() == (kept == "archive")


# What ends a benchmark costs a case


@pytest.mark.parametrize("status", ["86", "139"])  # the harness says that the device is lost; the process dies
def test_a_benchmark_goes_on_behind_a_lost_device(gpu, status):
    done, said, notes = gpu("bench-key", LOSES="bench --key", TIMES="2", STATUS=status)
    assert done == 0 and said.count(f"status {status}: goes on") == 2
    assert notes.count("bench --key --quick") == 3


def test_a_benchmark_that_gets_nowhere_ends(gpu, tmp_path):
    path = tool(tmp_path, "cksum", "echo same")
    done, said, notes = gpu("bench-key", LOSES="bench --key", TIMES="9", PATH=path)
    assert done == 1 and "bench-key (status 86)" in said and notes.count("bench --key") == 1


# What the bundle brings


@pytest.fixture
def bundle(tmp_path):
    """What was built, said to be from this tree, and its commit."""
    folder = tmp_path / ".gpu"
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / "good").touch()
    (folder / "commit").write_text("0123abcd\n")
    sums = subprocess.run(["sha256sum", "README.md", "csrc/module.cpp"], cwd=ROOT, capture_output=True, text=True)
    (folder / "tree.sha256").write_text(sums.stdout)
    return folder


def test_takes_what_was_built_elsewhere(gpu, bundle):
    status, said, notes = gpu("build")
    assert status == 0 and f"prebuilt {bundle / 'lib'}" in notes and "commit 0123abcd\n" in said


BUNDLING = """#!/bin/sh
case "$*" in
  *"pip wheel"*) while [ "$1" != -w ]; do shift; done; touch "$2/pyvtk.whl";;
  *"zipfile -e"*) mkdir -p "$5/pyvtk" && touch "$5/pyvtk/libpyvtk_cuda.so";;
  *"pip download"*) exit 1;;
  *--version*) echo Python 3.12;;
esac
"""


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a bundle is that of a commit")
def test_a_bundle_is_taken(gpu, tmp_path):
    python, bundle = tmp_path / "bundling", tmp_path / ".gpu"
    python.write_text(BUNDLING)
    python.chmod(0o755)
    env = {**os.environ, "PYVTK_GPU_BUNDLE": str(bundle)}
    made = subprocess.run([ROOT / ".ci" / "gpu-bundle", python], env=env, capture_output=True, text=True)
    assert made.returncode == 0 and "for Python 3.12:" in made.stdout, made.stderr
    assert "lib/libpyvtk_cuda.so" in made.stdout and "peers could not be downloaded" in made.stdout
    (bundle / "lib" / "good").touch()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    status, said, notes = gpu("build")
    assert status == 0 and f"commit {commit}" in said and f"prebuilt {bundle / 'lib'}" in notes


def test_builds_what_does_not_load(gpu, bundle):
    (bundle / "lib" / "good").unlink()
    status, said, notes = gpu("build")
    assert status == 0 and "does not work here: all is built here" in said
    assert notes.count("pip install") == 2 and notes.count("prebuilt") == 1


def test_changed_sources_are_built_and_the_commit_says_so(gpu, bundle):
    sums = bundle / "tree.sha256"
    sums.write_text(sums.read_text().replace("0", "1"))
    status, said, notes = gpu("build")
    assert status == 0 and "sources were changed" in said and "commit 0123abcd+\n" in said and "prebuilt" not in notes


def test_wheels_that_cannot_be_installed_stop_nothing(gpu, bundle):
    (bundle / "wheels").mkdir()
    (bundle / "wheels" / "peer.whl").touch()
    status, said, _ = gpu("build", FAIL="--upgrade --target")
    assert status == 0 and "peers will be missing" in said


# Parts


def test_all_tests_of_triton_kernels_are_found(gpu):
    _, _, notes = gpu("test-triton", "test-cpu")
    triton, cpu = (line for line in notes.splitlines() if "pytest.main" in line)
    files = sorted(path.name for path in (ROOT / "tests").glob("test_*_triton.py"))
    assert files and all(f"tests/{name}" in triton and f"--ignore tests/{name}" in cpu for name in files)


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        (["nothing"], {}, "no part nothing; there are build first-light test-cuda bench-key"),
        (["build"], {"PYTHON": "no-such-python"}, "no no-such-python; set PYTHON"),
        (["build"], {"PYVTK_PREBUILT": "none"}, "names none, which is no folder"),
    ],
)
def test_refuses(gpu, parts, settings, message):
    status, said, _ = gpu(*parts, **settings)
    assert status == 2 and message in said


def test_every_family_is_measured(gpu):
    known = gpu("nothing")[1].split("there are ")[1].split()
    assert [part for part in known if part.startswith("bench-")] == [
        f"bench-{name}" for name in ("key", *bench.load().FAMILIES, "threads")
    ]


def test_needs_a_gpu(gpu, tmp_path):
    status, said, _ = gpu("build", PYVTK_GPU_DEVICE="cuda", PATH=tool(tmp_path, "nvidia-smi", "exit 9"))
    assert status == 2 and "finds no GPU" in said


def test_results_name_the_gpu(gpu, tmp_path):
    answer = 'case "$*" in *compute_cap*) echo 9.0;; *=name*) echo NVIDIA H100 80GB HBM3;; esac'
    status, _, notes = gpu("bench-merge", PYVTK_GPU_DEVICE="cuda", PATH=tool(tmp_path, "nvidia-smi", answer))
    assert status == 0 and "/bench-merge-nvidia-h100-80gb-hbm3.json" in notes
    assert "on NVIDIA H100 80GB HBM3, 20" in (tmp_path / "out" / "bench-merge.done").read_text()


@pytest.mark.parametrize(("part", "program"), [("profile", "ncu"), ("sanitize-memcheck", "compute-sanitizer")])
def test_skips_what_cannot_work(gpu, tmp_path, part, program):
    """It is not done either: the next machine may be another one."""
    tool(tmp_path, program, "echo watched")
    tool(tmp_path, "uname", "echo 4.4.0")
    status, said, _ = gpu(part, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert status == 0 and f"SKIPPED: the system is gVisor's (kernel 4.4.0), under which {program}" in said
    assert "watched" not in said and not (tmp_path / "out" / f"{part}.done").exists()


def test_says_that_a_profiler_is_missing(gpu):
    status, said, _ = gpu("profile", PATH="/usr/bin:/bin")
    assert status == 0 and "SKIPPED: ncu is not installed" in said


def test_profiles(gpu, tmp_path):
    path = tool(tmp_path, "ncu", 'echo "ncu $*"')
    status, said, _ = gpu("profile", PATH=path)
    assert status == 0 and "--clock-control none --profile-from-start off --section SpeedOfLight" in said
    assert ".ci/profile_kernels.py" in said and "--import" in said


def test_what_is_profiled_is_measured():
    """Nsight Compute sees cases of the benchmarks, by their names."""
    said = run(str(ROOT / ".ci" / "profile_kernels.py"), "--list", cwd=ROOT)
    assert len(said.splitlines()) == 6


def test_runs_under_the_sanitizer(gpu, tmp_path):
    path = tool(tmp_path, "compute-sanitizer", 'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING sanitizer $*"; exit 9')
    status, said, _ = gpu("sanitize-memcheck", "sanitize-racecheck", PATH=path)
    assert status == 1 and "failed: sanitize-racecheck (status 9)" in said
    assert "1 sanitizer --tool memcheck --kernel-name-exclude kernel_substring=native --report-api-errors no" in said
    assert "1 sanitizer --tool racecheck --kernel-name kernel_substring=pyvtk --target" in said
    assert said.count("python .ci/call_kernels.py") == 2
