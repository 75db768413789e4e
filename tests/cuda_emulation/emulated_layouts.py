"""Makes the calls of emulated_calls with other numbers than .ci/first_light.py, and tells which are wrong; then with
rows that lie apart, and tells which results have other bits."""

from __future__ import annotations

import sys

from calls.call import apart, assert_right, difference, make, same
from emulated_calls import FAMILIES

LAYOUTS = (3, 0), (0, 1), (8, 0)  # elements between rows, and before the first one


def differing() -> list[str]:
    found = []
    for family, calls in FAMILIES.items():
        for name, call in calls.items():
            inputs = make(call, seed=1, device="cpu")
            wanted = call.run(None, *inputs)
            try:
                assert_right(call, wanted, inputs)
            except AssertionError as error:
                found.append(f"{family}: {name}: {error}")
            for gap, before in LAYOUTS:
                result = call.run(None, *apart(inputs, gap, before))
                if call.reorders:
                    assert_right(call, result, inputs)
                elif not same(result, wanted):
                    found.append(f"{family}: {name}, {gap} between, {before} before: {difference(result, wanted)}")
    return found


if __name__ == "__main__":
    wrong = differing()
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))
