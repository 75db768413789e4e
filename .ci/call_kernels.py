"""Calls every CUDA kernel on small inputs, once, for compute-sanitizer: the calls of tests/test_cuda.py."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import test_cuda

from pyvtk import backends


def main() -> int:
    device = os.environ.get("PYVTK_GPU_DEVICE") or "cuda"
    called = 0
    for name, call in test_cuda.CALLS.items():
        if backends.why_not(call.operator, "compiled", device) is not None:
            continue
        call.run(None, *test_cuda.make(call))
        if device == "cuda":
            torch.cuda.synchronize()
        called += 1
        print(name, flush=True)
    print(f"{called} calls")
    return 0 if called else 1


if __name__ == "__main__":
    sys.exit(main())
