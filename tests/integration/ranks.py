"""A model sharded by heads, in processes of its own: what test_tensor_parallel.py compares with one process.

A module of its own, since processes that are spawned import it by name.
"""

import os

import torch
from adapter_cases import HEADS, inputs_of
from tiny_models import generate_logits

from pyvtk.integrations import transformers as vtk

NAME = "llava"
METHODS = [
    vtk.FastV(2, 0.25),
    vtk.PyramidDrop((1, 2, 4), (0.5, 0.25, 0.125)),
    vtk.Feather((2, 4), 0.3),
    vtk.YOPO(1, 4, HEADS),
    vtk.SnapKV(8, 0.25),
]


def results(model) -> list:
    """(logits [batch, steps, vocabulary], indices of the tokens that were there at the end) for each method."""
    found = []
    for method in METHODS:
        with vtk.accelerate(model, method) as handle:
            logits, _ = generate_logits(model, inputs_of(NAME), 4)
            found.append((logits, None if handle.selection is None else handle.selection.indices))
    return found


def rank(number: int, size: int, port: int, folder: str, kind: type) -> None:
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=number, world_size=size)
    model = kind.from_pretrained(folder, tp_plan="auto", attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == 64 // size
    torch.save(results(model), f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()
