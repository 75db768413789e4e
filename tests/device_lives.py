"""A fixture for every test: what a fault of a GPU costs is the test that made it, and no other.

After a bad access nothing works on the device any more in that process, and a kernel that does not end is waited for
without end. Either ends the process; pytest-xdist says which test it ran and begins another one.
"""

from __future__ import annotations

import faulthandler
import functools
import os

import pytest
import torch


def why_lost() -> str | None:
    """Why this process can use its GPU no more; None if it can, or has used none yet."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
        torch.rand(1, device="cuda").item()  # a capture that failed can leave the generator unusable
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


@functools.cache
def _uncaptured_stderr(capture) -> int:
    with capture.global_and_fixture_disabled():
        return os.dup(2)


@pytest.fixture(autouse=True)
def device_lives(request):
    """PYVTK_TEST_SECONDS: how long a test may take; no limit without."""
    stderr = _uncaptured_stderr(request.config.pluginmanager.getplugin("capturemanager"))
    seconds = float(os.environ.get("PYVTK_TEST_SECONDS") or 0)

    def watch() -> None:
        if seconds > 0:
            faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)  # needs neither Python nor the device

    watch()
    yield
    watch()  # anew: pytest stops the other one where a test fails
    reason = why_lost()
    if seconds > 0:
        faulthandler.cancel_dump_traceback_later()
    if reason is None:
        return
    said = f"{request.node.nodeid}: the device is lost: {reason}"
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.write(stderr, f"{said}\n".encode())
        os._exit(70)
    pytest.exit(said, returncode=70)
