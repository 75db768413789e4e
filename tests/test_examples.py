"""examples/: each runs with a tiny random model, and with a folder as the hub's models come in one."""

import os
import re
import subprocess
import sys

import pytest
import torch
from fresh import ROOT

pytest.importorskip("transformers")

EXAMPLES = ROOT / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "tiny")
QUESTION, ANSWER = "what is it", "a cup"


def said(name, *arguments) -> str:
    """What an example prints; it reaches no network."""
    command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)]
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline})
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"loss ([\d.]+)", text)]


def test_every_example_is_here():
    assert NAMES == ["prune_llava", "prune_qwen2_5_vl", "train_pyramiddrop", "write_a_method"]
    readme = (ROOT / "README.md").read_text()
    assert [name for name in NAMES if f"examples/{name}.py" not in readme] == []


# Tokens by layer, of prompts with 64 visual tokens of 72 (LLaVA) and 48 of 58 (Qwen2.5-VL)
TOKENS = {
    "prune_llava": "0-1: 72, 2-7: 40",
    "prune_qwen2_5_vl": "0-1: 58, 2-3: 34, 4-5: 22, 6-7: 16",
    "train_pyramiddrop": "0-1: 72, 2-3: 40, 4-5: 24, 6-7: 16",
    "write_a_method": "0: 72, 1-7: 24",
}


@pytest.mark.parametrize("name", NAMES)
def test_tiny(name):
    text = said(name, "--tiny")
    assert f"tokens by layer: {TOKENS[name]}\n" in text
    if name.startswith("train"):
        steps = losses(text)
        assert len(steps) == 10 and steps[-1] < steps[0]


def test_the_method_of_ones_own_keeps_the_largest(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import tiny
    import write_a_method

    from pyvtk.integrations import transformers as vtk

    model, inputs = tiny.llava()
    seen = []
    model.model.language_model.layers[0].register_forward_hook(lambda layer, args, output: seen.append(output))
    with torch.no_grad(), vtk.accelerate(model, write_a_method.LargestFeatures(layer=1, keep=0.25)) as handle:
        model(**inputs)
    norms = torch.where(inputs["input_ids"] == tiny.IMAGE, seen[0].norm(dim=-1), torch.inf)
    assert torch.equal(handle.selection.indices, norms.topk(8 + 16).indices.sort().values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA with processor and picture, saved as models of the hub are."""
    transformers = pytest.importorskip("transformers")
    Image = pytest.importorskip("PIL.Image")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("model")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import tiny
    finally:
        sys.path.remove(str(EXAMPLES))
    tiny.llava()[0].save_pretrained(folder)
    words = ["USER:", "ASSISTANT:", *QUESTION.split(), *ANSWER.split()]
    names = [f"w{i}" for i in range(99 - len(words))]
    vocabulary = {word: i for i, word in enumerate([*names, *words, "<image>"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w3"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="w3", pad_token="w0", bos_token="w1", additional_special_tokens=["<image>"]
    )
    template = (
        "{% for m in messages %}{{ m['role'].upper() }}:{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %} <image> {% else %} {{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT: {% endif %}"
    )
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112})
    transformers.LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    Image.new("RGB", (130, 120), (200, 30, 60)).save(folder / "picture.png")
    return folder


@pytest.mark.parametrize("name", ["prune_llava", "write_a_method"])
def test_with_a_picture_and_a_question(folder, name):
    text = said(name, folder, folder / "picture.png", QUESTION)
    # USER: and what is it, 64 tokens of the picture, ASSISTANT:
    whole, rest = (69, 37) if name == "prune_llava" else (69, 21)
    assert re.search(rf"tokens by layer: \S+ {whole}, \S+ {rest}\n", text), text


def test_training_with_a_picture_and_an_answer(folder):
    text = said("train_pyramiddrop", folder, folder / "picture.png", QUESTION, ANSWER, "--steps", "3")
    steps = losses(text)
    assert len(steps) == 3 and steps[-1] < steps[0]
    assert "tokens by layer: 0-1: 71, 2-3: 39, 4-5: 23, 6-7: 15\n" in text


@pytest.mark.parametrize("name", NAMES)
def test_without_a_picture_it_says_what_is_needed(name):
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "needed" in done.stderr and "--tiny" in done.stderr
