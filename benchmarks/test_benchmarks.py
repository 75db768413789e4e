"""The same cases under pytest-benchmark: ``pytest benchmarks --benchmark-only``, e.g. with ``-k "select and SnapKV"``.

Provider after provider rather than interleaved: good for watching one of them over time. For claims about ratios use
``python -m pyvtk bench``.
"""

import pytest
import torch

from pyvtk.bench import load

harness = load()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc):
    if "prepared" in metafunc.fixturenames:
        pairs = [pytest.param(c, name, id=f"{c.id}, {name}") for c in harness.cases() for name in c.providers]
        metafunc.parametrize(("prepared", "provider"), pairs, indirect=["prepared"], scope="module")


@pytest.fixture(scope="module")
def prepared(request):
    """A case whose results have been checked, and its inputs; made once for all its providers."""
    case = request.param
    pool = harness.Pool(case)
    return harness.settled(case, pool.entries[0])[0], pool


def test_provider(prepared, provider, benchmark):
    case, pool = prepared
    if provider in case.absent:
        pytest.skip(case.absent[provider])
    turn = iter(range(1 << 30))
    benchmark.group = case.id
    benchmark.pedantic(
        case.providers[provider],
        setup=lambda: (pool(next(turn), 0), {}),
        rounds=min(30, pool.count + 3),
        warmup_rounds=1,
    )
