"""What launches of the Triton kernels compile: one variant for all sizes, and wide loads. Needs no GPU.

Launchers run on tensors without memory, and Triton's own code says what it would compile (.ci/check_triton.py).
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from fresh import ROOT
from interpreter import why_broken

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("Triton interprets its kernels here, and compiles none", allow_module_level=True)

from pyvtk.triton_kernels import _tiles


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_triton", ROOT / ".ci" / "check_triton.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variants(check, family: str, sizes: tuple, options: dict, constants: bool) -> list[tuple]:
    """(kernel, variant of each parameter, constants among them or not) of all launches, in order."""
    found = []
    for kernel, arguments in check.launches(family, 90, torch.bfloat16, 72, 7, {**options, "sizes": sizes}):
        variant, *_ = check.specialised(kernel, arguments, 90)
        names = [p.name for p in kernel.params if constants or not p.is_constexpr]
        found.append((kernel.__name__, {p.name: x for p, x in zip(kernel.params, variant) if p.name in names}))
    return found


@pytest.mark.parametrize(
    ("family", "option"),
    [
        *(("attention", option) for option in ("", "heads, bias", "routes")),
        *(("score", option) for option in ("", "positions, masks, bias", "lse, maxima", "pairs")),
        ("compact", ""),
    ],
)
def test_other_sizes_compile_no_new_variant(check, family, option):
    options = check.OPTIONS[option]
    first, *others = [
        # samples, K/V heads, tokens: ones, multiples of 16, and neither
        variants(check, family, sizes, options, constants=False)
        for sizes in ((2, 8, 256), (1, 1, 1), (1, 4, 17), (3, 16, 250), (16, 1, 33), (1, 2, 4096))
    ]
    assert len(first) > 1 and all(other == first for other in others)
    # tiles depend on few tokens only
    first, *others = [
        variants(check, family, sizes, options, constants=True) for sizes in ((2, 8, 256), (1, 1, 4097), (3, 5, 250))
    ]
    assert all(other == first for other in others)


def test_offsets_beyond_int32_are_another_variant(check):
    ((kernel, arguments), *_) = check.launches("attention", 90, torch.bfloat16, 72, 1, {})
    for stride, kind in ((72, "i32"), (1 << 40, "i64")):
        variant, *_ = check.specialised(kernel, {**arguments, "k_head": stride}, 90)
        assert variant[[p.name for p in kernel.params].index("k_head")] == (kind, None)


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False), ("3.6.1", "2.10.1", False), ("3.9.0", "2.4.6", True)],
)
def test_interpreter_that_cannot_run_is_known(triton, numpy, works):
    assert (why_broken(triton, numpy) is None) == works


def rows(width: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(2, 3, 5, width, dtype=dtype)[..., :8]


@pytest.mark.parametrize(
    ("tensors", "unit"),
    [
        ((rows(8), rows(72)), 8),
        ((rows(8), rows(72).transpose(1, 2)), 8),
        ((rows(8), rows(12)), 4),
        ((rows(8), rows(10)), 2),
        ((rows(65), rows(8)), 1),
        ((rows(72, torch.float32),), 4),
        ((rows(8), rows(12, torch.float32)), 4),
        ((rows(8)[:1, :1, :1].expand(2, 3, 5, 8),), 8),
    ],
)
def test_unit_divides_every_stride(tensors, unit):
    found = _tiles.strides(**{f"x{i}": x for i, x in enumerate(tensors)})
    assert found.pop("UNIT") == unit
    assert found["x0_row"] == tensors[0].stride(2) and all(stride % unit == 0 for stride in found.values())


def test_spills_in_loops_are_seen(check, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, arguments = check.launches("attention", 80, torch.bfloat16, 24, 1, {})[0]
    crowded = check.compiled(kernel, {**arguments, "num_warps": 1}, 80)
    assert check.resources(crowded)[1] > 0 and check.spilled_in_loops(crowded) > 0


def test_rows_are_loaded_by_16_bytes_where_they_may_be(check, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wide, odd = (
        check.launches("attention", 80, torch.bfloat16, 24, 1, {"gap": gap})[0] for gap in (0, 1)
    )  # the forward
    assert (wide[1]["UNIT"], odd[1]["UNIT"]) == (8, 1)
    assert check.narrow(check.compiled(*wide, 80).asm["ptx"]) == []
    assert "ld.global.b16" in check.narrow(check.compiled(*odd, 80).asm["ptx"])
    # strides may be what they want where the first row begins 8 bytes off: Triton asks for that itself
    off = torch.empty(2, 256, 2, 32, dtype=torch.bfloat16)[..., 4:28].transpose(1, 2)
    variant, *_ = check.specialised(wide[0], {**wide[1], "k": off}, 80)
    names = [p.name for p in wide[0].params]
    assert (variant[names.index("k")], variant[names.index("v")]) == (("*bf16", ""), ("*bf16", "D"))
