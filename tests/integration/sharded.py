"""Accelerated models under FSDP2, checked in the processes of a group: this module is what they import."""

from __future__ import annotations

import contextlib
import functools
import tempfile

import oracle
import tiny_models
import torch
import torch.distributed as dist
from adapter_cases import METHODS, TIMES, exact_of, model_of
from support import max_error
from torch.distributed.fsdp import fully_shard

from pyvtk.integrations import transformers as vtk

KEYS = ["FastV", "PyramidDrop", "YOPO, cut", "SnapKV"]
ORDERS = ["accelerate, then shard", "shard, then accelerate"]
NAME = "llava"


@contextlib.contextmanager
def group(rank: int, ranks: int, file: str | None = None):
    store = dist.HashStore() if file is None else dist.FileStore(file, ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@functools.cache
def inputs_of(rank: int) -> tuple[dict, torch.Tensor]:
    """Each process has samples of its own, of other lengths and numbers of images."""
    images = ((1, 2), (2, 1))[rank]
    inputs = tiny_models.batch(NAME, model_of(NAME), samples=2, seed=5 + rank, padding="right", images=images)
    return inputs, tiny_models.answers(NAME, inputs)


def check(key: str, order: str) -> None:
    """Logits and gradients of a sharded model equal the oracle's; gradients are means over processes."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    model, inputs, labels = tiny_models.make(NAME), *inputs_of(rank)
    handle = None
    if order == ORDERS[0]:
        handle = vtk.accelerate(model, METHODS[key])
    for layer in model.model.language_model.layers:
        fully_shard(layer)
    fully_shard(model)
    handle = handle or vtk.accelerate(model, METHODS[key])
    trains = key not in ("FastV", "SnapKV")  # the oracle trains with the others
    output = model(**inputs, labels=labels if trains else None, use_cache=key == "SnapKV")
    limit = wrong = 0.0
    for sample in range(2):
        valid = inputs["attention_mask"][sample].bool()
        dense = oracle_of(None, rank)[sample]
        known = trained_by_oracle(key, rank)[1][sample] if trains else oracle_of(key, rank)[sample]
        limit = max(limit, max_error(plain_logits(rank)[sample][valid], dense.logits))
        wrong = max(wrong, max_error(output.logits[sample][valid][known.rows], known.logits))
    assert wrong <= TIMES * limit, f"{key}, {order}: error {wrong:.2e} exceeds the budget {TIMES * limit:.2e}"
    if trains:
        output.loss.backward()
        want, dense = (mean([trained_by_oracle(what, other)[0] for other in range(ranks)]) for what in (key, None))
        plain = mean([plain_gradients(other) for other in range(ranks)])
        found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
        limit = TIMES * max(max_error(plain[name], dense[name]) for name in dense)
        wrong = max(max_error(found[name], want[name]) for name in want)
        assert wrong <= limit, f"{key}, {order}: error {wrong:.2e} of gradients exceeds the budget {limit:.2e}"
    handle.remove()


def mean(each: list[dict]) -> dict:
    return {name: sum(gradients[name] for gradients in each) / len(each) for name in each[0]}


@functools.cache
def oracle_of(key: str | None, rank: int) -> list[oracle.Trace]:
    inputs, method = inputs_of(rank)[0], None if key is None else METHODS[key]
    return [oracle.trace(NAME, exact_of(NAME), tiny_models.one(NAME, inputs, i), method) for i in range(2)]


@functools.cache
def trained_by_oracle(key: str | None, rank: int) -> tuple[dict, list[oracle.Trace]]:
    method = None if key is None else METHODS[key]
    return oracle.gradients(NAME, exact_of(NAME), *inputs_of(rank), method)[1:]


@functools.cache
def plain_logits(rank: int) -> torch.Tensor:
    return model_of(NAME)(**inputs_of(rank)[0]).logits


@functools.cache
def plain_gradients(rank: int) -> dict:
    model, (inputs, labels) = tiny_models.make(NAME), inputs_of(rank)
    model(**inputs, labels=labels).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _run(rank: int, ranks: int, file: str) -> None:
    torch.set_num_threads(1)
    with group(rank, ranks, file):
        for key in KEYS:
            for order in ORDERS:
                check(key, order)


def spawn(ranks: int) -> None:
    """Runs all cases in so many processes; what fails in one of them is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run, (ranks, f"{folder}/store"), nprocs=ranks)
