"""Makes every call of tests/calls once, for compute-sanitizer: what a kernel does, not what comes out."""

import os
import sys
from pathlib import Path

os.environ["PYVTK_GPU_DEVICE"] = device = os.environ.get("PYVTK_GPU_DEVICE") or "cuda"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from calls import CALLS
from calls.call import make, ways


def main() -> int:
    called = 0
    for name, call in CALLS.items():
        for backend in ways(call):
            print(name, backend or "", flush=True)
            call.run(backend, *make(call))
            if device == "cuda":
                torch.cuda.synchronize()
            called += 1
    print(f"{called} calls")
    return 0 if called else 1


if __name__ == "__main__":
    sys.exit(main())
