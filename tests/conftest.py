"""Fixtures: poisoned memory, a fixed seed and a living device for every test; the instruction sets of this machine."""

import hypothesis
import pytest
import torch
from device_lives import device_lives  # noqa: F401  a fixture
from support import poison_cuda

from pyvtk import _C

# Every run draws the same cases, so that CI fails for what a change did; `--hypothesis-profile default` draws new ones.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised tensors are full of NaN, in Python and in compiled operators (integers: the maximum, and -1)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    poison_cuda()
    _C.poison_new_memory(True)
    torch.manual_seed(0)
    yield
    _C.poison_new_memory(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request):
    """Runs a test once with every instruction set that this machine has."""
    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(before)
