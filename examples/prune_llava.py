"""Ask LLaVA-1.5 about a picture while half of its tokens leave before the third layer (FastV).

python examples/prune_llava.py llava-hf/llava-1.5-7b-hf photo.jpg "What is on the table?"
python examples/prune_llava.py --tiny
"""

import argparse

import torch

from pyvtk.integrations import transformers as vtk


def load(name: str, picture: str, question: str):
    """(model, inputs, what makes text of ids)."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    asked = [{"type": "image", "url": picture}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": asked}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    return model, inputs.to(model.device, model.dtype), processor.decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="llava-hf/llava-1.5-7b-hf", help="name on the hub, or a folder")
    parser.add_argument("picture", nargs="?", help="file or address")
    parser.add_argument("question", nargs="?", default="What is in the picture?")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the visual tokens that stays")
    parser.add_argument("--tiny", action="store_true", help="a random model instead")
    arguments = parser.parse_args()
    if not arguments.tiny and arguments.picture is None:
        parser.error("a picture is needed")
    if arguments.tiny:
        import tiny

        (model, inputs), text_of = tiny.llava(), str
    else:
        model, inputs, text_of = load(arguments.model, arguments.picture, arguments.question)

    with vtk.accelerate(model, vtk.FastV(layer=2, keep=arguments.keep)) as handle:
        ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        print(text_of(ids[0, inputs["input_ids"].shape[1] :]))
        print(handle)  # tokens of each layer, operations and cache that were left
        print("tokens of the prompt that stayed:", handle.selection.indices[0].tolist())


if __name__ == "__main__":
    main()
