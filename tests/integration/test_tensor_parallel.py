"""A model that transformers has sharded by heads keeps the same tokens as in one process."""

import socket

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20", reason="transformers 5.20 or newer is not installed")

from adapter_cases import budget, model_of
from ranks import NAME, rank, results


@pytest.mark.long
@pytest.mark.package
def test_sharded_by_heads(tmp_path):
    model_of(NAME).save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank, (2, port, str(tmp_path), type(model_of(NAME))), 2)
    ranks = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    limit = 2 * budget(NAME)  # both sides have rounded
    for want, *found in zip(results(model_of(NAME)), *ranks):
        for logits, indices in found:
            assert (logits - want[0]).abs().max() <= limit
            assert indices is None if want[1] is None else torch.equal(indices, want[1])
