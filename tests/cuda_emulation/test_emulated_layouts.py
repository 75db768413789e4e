"""Every call, by the bindings of CUDA and emulated kernels, has the same bits wherever its rows lie."""

import pytest
from emulated import BUILD, SANITIZER
from fresh import ROOT, run


@pytest.mark.long
@pytest.mark.skipif(SANITIZER != "", reason="torch's memory is none of the sanitizers'")
def test_rows_apart(tmp_path):
    folder = ROOT / "tests" / "cuda_emulation"
    env = {"PYVTK_GPU_DEVICE": "cpu", "PYVTK_EMULATION_BUILD": str(BUILD)}
    run(str(folder / "emulated_layouts.py"), path=[folder, ROOT / "tests"], cwd=tmp_path, env=env)
