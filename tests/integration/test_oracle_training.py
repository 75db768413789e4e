"""Loss and gradients of the oracle, against the unmodified model, differences and maps."""

import math

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20", reason="transformers 5.20 or newer is not installed")

import oracle
import tiny_models
from oracle import YOPO, FastV, PyramidDrop
from oracle_checks import EXACT, HEADS, error, model_of, prompts
from tiny_models import MROPE, NAMES

pytestmark = pytest.mark.package  # no kernel runs here


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_gradients_without_a_method_are_the_model_s(name, padding):
    model = oracle.exact(tiny_models.make(name)).requires_grad_()
    inputs, _ = prompts(name, padding=padding)
    labels = tiny_models.answers(name, inputs)
    positions = {} if name in MROPE else {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    logits = model(**inputs, **positions, use_cache=False).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    loss, grads, _ = oracle.gradients(name, model_of(name, torch.float32), inputs, labels)
    assert error(loss, expected.detach()) < EXACT
    wanted = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == set(wanted)
    largest = max(grad.abs().max() for grad in wanted.values())
    # towers of Qwen's models rotate in float32, whose rounding depends on the shape of the batch
    tolerance = 1e-6 if name in MROPE else EXACT
    assert max(error(grads[key], wanted[key]) for key in wanted) < tolerance * largest


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen3_vl"])
@pytest.mark.parametrize("method", [PyramidDrop(), YOPO(1), YOPO(2, 3, HEADS, 2)], ids=["drop", "window", "cut"])
def test_gradients_are_those_of_the_loss(name, method):
    """By differences in a random direction; dropped sets do not change on the way."""
    model = tiny_models.make(name)
    inputs, _ = prompts(name)
    labels = tiny_models.answers(name, inputs)
    loss, grads, traces = oracle.gradients(name, model, inputs, labels, method)
    if isinstance(method, PyramidDrop):
        assert min(found.margin for found in traces) > 1e-5
    random = torch.Generator().manual_seed(3)
    direction = {key: torch.randn(grad.shape, generator=random, dtype=torch.float64) for key, grad in grads.items()}
    # the blocks of Qwen's towers rotate in float32, which hides small steps
    direction = {key: grad for key, grad in direction.items() if "merger" in key or "visual" not in key}
    slope = sum((grads[key] * direction[key]).sum() for key in direction)
    step, moved = 1e-7, []
    for sign in (1, -1):
        other = oracle.exact(model)
        with torch.no_grad():
            for key, p in other.named_parameters():
                if key in direction:
                    p += sign * step * direction[key]
        moved.append(oracle.gradients(name, other, inputs, labels, method)[0])
    assert math.isclose((moved[0] - moved[1]) / (2 * step), slope, rel_tol=1e-4)
    plain, _, _ = oracle.gradients(name, model, inputs, labels)
    assert abs(plain - loss) > 1e-3


def test_questions_in_training():
    """Each answer is asked for by the token before it; scores of several are averaged; no answer, no dropping."""
    name = "llava"
    model = model_of(name)
    inputs, alone = prompts(name)
    labels = tiny_models.answers(name, inputs)
    labels[1] = -100
    _, _, traces = oracle.gradients(name, model, inputs, labels, PyramidDrop((1,), (0.25,)))
    assert traces[1].kept == {}
    eager = tiny_models.make(name, attention="eager").double()
    for sample in (0, 2, 3):
        with torch.no_grad():
            attended = eager(**alone[sample], output_attentions=True, use_cache=False).attentions[1][0].mean(0)
        label = labels[sample][inputs["attention_mask"][sample].bool()]
        asked = [i for i in range(len(label) - 1) if label[i] == -100 and label[i + 1] != -100]
        assert len(asked) == (2 if sample == 2 else 1)
        visual = (alone[sample]["input_ids"][0] == tiny_models.IMAGE).nonzero()[:, 0]
        best = visual[attended[asked][:, visual].mean(0).topk(len(visual) // 4).indices].tolist()
        assert [row for row in traces[sample].kept[1] if row in visual] == sorted(best)


def test_an_answer_right_behind_an_image_loses_its_first_token_with_the_image():
    name = "llava"
    inputs, _ = prompts(name)
    labels = tiny_models.answers(name, inputs, behind_image=True)
    alone = inputs["attention_mask"][0].bool()
    last = (inputs["input_ids"][0][alone] == tiny_models.IMAGE).nonzero()[-1, 0].item()
    assert labels[0][alone][last] == -100 and labels[0][alone][last + 1] != -100
    first = {key: value[:1] for key, value in inputs.items()}
    loss, _, (found,) = oracle.gradients(name, model_of(name), first, labels[:1], YOPO(1, 3))
    assert last not in found.rows and last + 1 in found.rows
    label = labels[0][alone]
    rows = [row for row, place in enumerate(found.rows) if place > last and place + 1 < len(label)]
    wanted = torch.nn.functional.cross_entropy(found.logits[rows], label[last + 2 :])
    assert error(loss, wanted.detach()) < EXACT
    with pytest.raises(ValueError, match="gradients: method must be PyramidDrop or YOPO, got FastV"):
        oracle.gradients(name, model_of(name), first, labels[:1], FastV())
