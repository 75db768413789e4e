"""Checks the CUDA library inside a wheel: what it needs from outside, its size, and for each architecture what its
kernels take of a multiprocessor (the table of ``python -m pyvtk resources``)."""

import re
import sys
import tempfile
import zipfile
from pathlib import Path

from pyvtk import _resources

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from binaries import undefined_symbols

WANTED = {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_100"}
MOST_BYTES = 30 * 1000**2


def main(wheel: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            library = Path(archive.extract("pyvtk/libpyvtk_cuda.so", folder))
        foreign = [name for name in undefined_symbols(library) if re.search(r"\b(at|c10|torch)::|cuda[A-Z]", name)]
        size = library.stat().st_size
        kernels = _resources.read(library)
        found = {kernel.architecture for kernel in kernels} | _resources.ptx(library)
    print(_resources.table(kernels))
    print(f"libpyvtk_cuda.so: {size / 1000**2:.1f} MB, with code for {', '.join(sorted(found))}")
    errors = []
    if foreign:
        errors.append("it needs symbols that torch does not keep stable, or one CUDA runtime version:")
        errors += [f"  {name}" for name in foreign]
    if missing := sorted(WANTED - found):
        errors.append(f"missing: {', '.join(missing)}")
    if size > MOST_BYTES:
        errors.append(f"larger than {MOST_BYTES / 1000**2:.0f} MB")
    errors += [f"{kernel.name} on {kernel.architecture} {kernel.fault}" for kernel in kernels if kernel.fault]
    print(*errors, sep="\n")
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
