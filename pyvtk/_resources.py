"""``python -m pyvtk resources``: what each CUDA kernel takes of a multiprocessor, per architecture.

Read from the machine code inside libpyvtk_cuda.so, so neither a GPU nor CUDA's tools are needed, and what is shown is
what is shipped. Exit status 1 where a kernel uses local memory (spilled registers, a stack frame) or more shared
memory than can be declared.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

MOST_SHARED = 48 << 10
# Of a multiprocessor: warps, blocks, KiB of shared memory (CUDA programming guide, technical specifications). All of
# them have 65536 registers, and take 1 KiB of shared memory for themselves from every block.
LIMITS = {
    80: (64, 32, 164), 86: (48, 16, 100), 89: (48, 24, 100), 90: (64, 32, 228), 100: (64, 32, 228), 120: (48, 24, 100)
}  # fmt: skip
# Numbers of the file format: the fat binary, attributes of .nv.info, and opcodes (the low 12 bits of an instruction).
_WRAPPER = struct.pack("<I", 0xBA55ED50)
_PTX, _MACHINE_CODE, _COMPRESSED, _OF_ONE_ARCHITECTURE = 1, 2, 0xA000, 0x100000
_REGISTERS, _FRAME, _MOST_THREADS, _THREADS = 0x2F, 0x11, 0x05, 0x10
_STORE_LOCAL, _LOAD_LOCAL = 0x387, 0x983


# Spills that were decided: kernel and architecture -> instructions at most that write, or read, local memory. 1024
# threads have 64 registers each, 512 have 128, and no thread has more than 255. On sm_90, where these kernels
# were measured, none spills.
ALLOWED = {
    ("select_short_kernel<16>", 100): 8,
    ("select_short_kernel<16>", 120): 8,
    ("sparse24_few_kernel<bfloat16, signed char, 1>", 100): 8,
    ("sparse24_few_kernel<float16, signed char, 1>", 100): 8,
    ("sparse24_few_kernel<bfloat16, bfloat16, 1>", 120): 2,
    ("sparse24_few_kernel<float16, float16, 1>", 120): 2,
    ("sparse24_few_kernel<float16, signed char, 4>", 120): 4,
}


@dataclass
class Kernel:
    """One kernel on one architecture.

    Attributes:
        threads: of a block at most, by its launch bounds; None without them.
        stores, loads: instructions that write or read local memory: spilled registers, arrays that are no registers.
        shared: bytes that it declares; those of the launch come on top and are not in the file.
        blocks, warps: resident on a multiprocessor at a time, if none is used by the launch.
    """

    name: str
    architecture: str
    registers: int
    frame: int
    stores: int
    loads: int
    shared: int
    threads: int | None
    blocks: int | None
    warps: int | None

    @property
    def fault(self) -> str | None:
        if max(self.stores, self.loads) <= ALLOWED.get((self.name, number_of(self.architecture)), 0) > 0:
            return None
        if self.stores or self.loads:
            return f"uses local memory: {self.stores} stores, {self.loads} loads"
        if self.frame:
            return f"has a stack frame of {self.frame} bytes"
        if self.shared > MOST_SHARED:
            return f"declares {self.shared} bytes of shared memory, more than {MOST_SHARED}"
        return None


def _entries(library: Path) -> Iterator[tuple[int, str, int, bytes]]:
    """(kind, architecture, flags, content) of everything in the fat binaries of ``library``."""
    data, position = library.read_bytes(), 0
    while (position := data.find(_WRAPPER, position)) >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, position)
        entry, end = position + header, position + header + size
        while entry < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, entry)
            (number,) = struct.unpack_from("<I", data, entry + 28)
            (flags,) = struct.unpack_from("<Q", data, entry + 40)
            name = f"{number}{'a' if flags & _OF_ONE_ARCHITECTURE else ''}"
            yield kind, name, flags, data[entry + header : entry + header + size]
            entry += header + size
        position = end


def machine_code(library: Path) -> Iterator[tuple[str, bytes]]:
    """(architecture, ELF file) of all machine code in ``library``.

    Raises:
        ValueError: it is compressed.
    """
    for kind, name, flags, content in _entries(library):
        if kind == _MACHINE_CODE:
            if flags & _COMPRESSED:
                raise ValueError(f"{library} holds compressed code; build it without nvcc's --compress-mode")
            yield f"sm_{name}", content


def ptx(library: Path) -> set[str]:
    """Architectures, as "compute_100", whose PTX is in ``library``, for drivers to compile for later ones."""
    return {f"compute_{name}" for kind, name, _, _ in _entries(library) if kind == _PTX}


def number_of(architecture: str) -> int:
    """90 of "sm_90a"."""
    return int(architecture.strip("sm_af"))


def shared_of_block(architecture: str) -> int:
    """Bytes of shared memory that a block may have where its launch asks for them; of an architecture in LIMITS."""
    return (LIMITS[number_of(architecture)][2] - 1) << 10


def occupancy(architecture: str, threads: int, registers: int, shared: int) -> tuple[int, int]:
    """Blocks and warps that a multiprocessor holds at a time; of an architecture in LIMITS."""
    most_warps, most_blocks, kib = LIMITS[number_of(architecture)]
    warps = -(-threads // 32)
    # A warp takes registers by 256, from the quarter of the multiprocessor that it lives in; shared memory goes by 128.
    by_registers = 4 * (65536 // 4 // (-(-32 * max(registers, 1) // 256) * 256)) // warps
    by_shared = (kib << 10) // (-(-(shared + 1024) // 128) * 128)
    blocks = min(most_warps // warps, by_registers, by_shared, most_blocks)
    return blocks, blocks * warps


def _sections(elf: bytes) -> dict[str, tuple]:
    """Name -> (type, offset, size, link) of each section."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    entry, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * entry) for i in range(count)]
    start = headers[names][4]

    def name(offset: int) -> str:
        return elf[start + offset : elf.index(b"\0", start + offset)].decode()

    return {name(h[0]): (h[1], h[4], h[5], h[6]) for h in headers}


def _attributes(elf: bytes, section: tuple) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(attribute, words) of a section .nv.info; those that fit into two bytes are of no interest here."""
    _, position, size, _ = section
    end = position + size
    while position < end:
        form, attribute, length = struct.unpack_from("<BBH", elf, position)
        position += 4
        if form == 4:
            yield attribute, struct.unpack_from(f"<{length // 4}I", elf, position)
            position += length


def kernels(architecture: str, elf: bytes) -> Iterator[Kernel]:
    sections = _sections(elf)
    _, symbols, _, _ = sections[".symtab"]
    _, names, _, _ = sections[".strtab"]

    def symbol(number: int) -> str:
        (offset,) = struct.unpack_from("<I", elf, symbols + 24 * number)
        return elf[names + offset : elf.index(b"\0", names + offset)].decode()

    found: dict[int, dict[str, int]] = {_REGISTERS: {}, _FRAME: {}}
    for attribute, words in _attributes(elf, sections[".nv.info"]):
        if attribute in found:
            found[attribute][symbol(words[0])] = words[1]
    for section, (_, offset, size, _) in sections.items():
        if not section.startswith(".text."):
            continue
        name = section.removeprefix(".text.")
        opcodes = [struct.unpack_from("<H", elf, offset + i)[0] & 0xFFF for i in range(0, size, 16)]
        shared = sections.get(f".nv.shared.{name}", (0, 0, 0, 0))[2]
        if shared and number_of(architecture) >= 90:
            shared -= 1024  # from here on, what the system takes is written into the section
        threads = None
        for attribute, words in _attributes(elf, sections.get(f".nv.info.{name}", (0, 0, 0, 0))):
            if attribute in (_MOST_THREADS, _THREADS):
                threads = words[0] * words[1] * words[2]
        registers = found[_REGISTERS][name]
        known = threads and number_of(architecture) in LIMITS
        fit = occupancy(architecture, threads, registers, shared) if known else (None, None)
        spills = opcodes.count(_STORE_LOCAL), opcodes.count(_LOAD_LOCAL)
        yield Kernel(name, architecture, registers, found[_FRAME].get(name, 0), *spills, shared, threads, *fit)


def demangled(name: str) -> str:
    """A C++ name as it is written, by the function that c++filt and profilers call; as it is where that is missing."""
    try:
        demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    except (OSError, AttributeError):
        return name
    demangle.argtypes, demangle.restype = (ctypes.c_char_p, *[ctypes.c_void_p] * 3), ctypes.c_void_p
    if (text := demangle(name.encode(), None, None, None)) is None:
        return name
    try:
        return ctypes.string_at(text).decode()
    finally:
        free = ctypes.CDLL(None).free
        free.argtypes = (ctypes.c_void_p,)
        free(text)


def readable(name: str) -> str:
    """The name of a kernel, mangled or not, without what all of ours have in common and without its arguments."""
    text = demangled(name) if name.startswith("_Z") else name
    text = text.removeprefix("void ").replace("pyvtk::cuda::", "").replace("pyvtk::", "")
    depth = 0
    for i, letter in enumerate(text):  # the arguments begin at the first parenthesis outside of <>
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and i > 0:
            return text[:i]
    return text


def read(library: Path) -> list[Kernel]:
    """Every kernel of a library on every architecture, by name."""
    found = [kernel for architecture, elf in machine_code(library) for kernel in kernels(architecture, elf)]
    for kernel in found:
        kernel.name = readable(kernel.name)
    return sorted(found, key=lambda kernel: (kernel.name, number_of(kernel.architecture)))


def table(found: list[Kernel]) -> str:
    heads = ("architecture", "registers", "stack", "spill stores", "loads", "shared", "threads", "blocks", "warps")
    lines, last = ["  ".join(heads)], None
    for k in found:
        if k.name != last:
            lines.append(k.name)
        last = k.name
        warps = None if k.warps is None else f"{k.warps}/{LIMITS[number_of(k.architecture)][0]}"
        cells = (k.architecture, k.registers, k.frame, k.stores, k.loads, k.shared, k.threads, k.blocks, warps)
        row = "  ".join(("-" if cell is None else str(cell)).rjust(len(head)) for cell, head in zip(cells, heads))
        lines.append(row + (f"  FAULT: {k.fault}" if k.fault else ""))
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("library", nargs="?", help="default: the libpyvtk_cuda.so of this installation")
    parser.add_argument("--json", metavar="PATH", help="write the table as JSON too")


def main(args: argparse.Namespace) -> int:
    library = Path(args.library) if args.library else Path(__file__).parent / "libpyvtk_cuda.so"
    if not library.is_file():
        print(f"pyvtk resources: {library.name} was not built into this installation", file=sys.stderr)
        return 2
    found = read(library)
    print(table(found))
    faults = sum(kernel.fault is not None for kernel in found)
    names = len({kernel.name for kernel in found})
    print(f"\n{names} kernels for {len({k.architecture for k in found})} architectures, {faults} faults")
    print(
        "threads of a block: at most, by its launch bounds; blocks and warps of a multiprocessor: if a launch adds no"
    )
    print("shared memory of its own")
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(kernel) for kernel in found], indent=1) + "\n")
    return 1 if faults or not found else 0
