"""score_and_select over heads that lie on several ranks: each keeps what one process keeps that holds all heads."""

import pytest
import torch
import torch.distributed as dist
from tensor_parallel import RANKS, run

import pyvtk


@pytest.mark.long
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_every_rank_keeps_what_one_process_keeps(tmp_path):
    """Four ranks, and two pairs of them."""
    torch.multiprocessing.spawn(run, (str(tmp_path / "store"),), nprocs=RANKS)


def test_what_is_no_group():
    with pytest.raises(TypeError, match="score_and_select: group must be a torch"):
        pyvtk.score_and_select(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 3, 8), 1, group="all")
