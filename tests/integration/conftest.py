"""What tests with models of transformers share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Models are so tiny that several threads only wait for each other: for seconds, where others want them too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
