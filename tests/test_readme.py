"""The examples of README.md run as printed."""

import re

import pytest
from fresh import ROOT

EXAMPLES = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: re.search(r"pyvtk\.(\w+)", text).group(1))
def test_example(example):
    exec(compile(example, "README.md", "exec"), {"__name__": "example"})
