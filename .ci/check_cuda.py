"""Checks the CUDA library inside a wheel: what it needs from outside, and the architectures that it holds code for."""

import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from binaries import undefined_symbols

WANTED = ["sm_80", "sm_86", "sm_89", "sm_90a"]
WRAPPER = struct.pack("<I", 0xBA55ED50)


def architectures(library: Path) -> set[str]:
    """Read off cuobjdump where it is installed, else off the fat binary's own headers."""
    if shutil.which("cuobjdump"):
        listed = subprocess.run(["cuobjdump", "--list-elf", library], check=True, capture_output=True, text=True).stdout
        return set(re.findall(r"sm_\d+[af]?", listed))
    data, found, position = library.read_bytes(), set(), 0
    while (position := data.find(WRAPPER, position)) >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, position)
        entry, end = position + header, position + header + size
        while entry < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, entry)
            (number,) = struct.unpack_from("<I", data, entry + 28)
            (flags,) = struct.unpack_from("<Q", data, entry + 40)
            if kind == 2:  # machine code; 1 is PTX
                found.add(f"sm_{number}{'a' if flags & 0x100000 else ''}")
            entry += header + size
        position = end
    return found


def main(wheel: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            library = Path(archive.extract("pyvtk/libpyvtk_cuda.so", folder))
        foreign = [name for name in undefined_symbols(library) if re.search(r"\b(at|c10|torch)::|cuda[A-Z]", name)]
        found = architectures(library)
    print(f"libpyvtk_cuda.so holds code for {', '.join(sorted(found))}")
    if foreign:
        print("it needs symbols that torch does not keep stable, or one CUDA runtime version:", *foreign, sep="\n  ")
    if missing := sorted(set(WANTED) - found):
        print(f"missing: {', '.join(missing)}")
    return bool(foreign or missing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
