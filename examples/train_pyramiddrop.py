"""Train LLaVA's projector while visual tokens leave in three stages (PyramidDrop): a step costs what their rest costs.

Labels stay as they are: tokens are chosen by the rows that answers follow, and hidden states come back at full length.

python examples/train_pyramiddrop.py llava-hf/llava-1.5-7b-hf photo.jpg "What is on the table?" "A cup of coffee."
python examples/train_pyramiddrop.py --tiny
"""

import argparse

import torch

from pyvtk.integrations import transformers as vtk


def load(name: str, picture: str, question: str, answer: str):
    """(model, a batch of one sample with labels)."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    asked = [{"type": "image", "url": picture}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": asked}]
    whole = [*turns, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    options = dict(tokenize=True, return_dict=True, return_tensors="pt")
    batch = processor.apply_chat_template(whole, **options)
    before = processor.apply_chat_template(turns, add_generation_prompt=True, **options)["input_ids"].shape[1]
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :before] = -100
    return model, batch.to(model.device, model.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="llava-hf/llava-1.5-7b-hf", help="name on the hub, or a folder")
    parser.add_argument("picture", nargs="?", help="file or address")
    parser.add_argument("question", nargs="?", default="What is in the picture?")
    parser.add_argument("answer", nargs="?")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="a random model instead")
    arguments = parser.parse_args()
    if not arguments.tiny and arguments.answer is None:
        parser.error("a picture, a question and an answer are needed")
    if arguments.tiny:
        import tiny

        model, batch = tiny.llava()
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :-2] = -100  # the last two tokens are the answer
    else:
        model, batch = load(arguments.model, arguments.picture, arguments.question, arguments.answer)

    layers = len(model.model.language_model.layers)
    stages = tuple(layers * quarter // 4 for quarter in (1, 2, 3))
    model.train().requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-2 if arguments.tiny else 1e-4)
    with vtk.accelerate(model, vtk.PyramidDrop(layers=stages, keep=(0.5, 0.25, 0.125))) as handle:
        for step in range(arguments.steps):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step}: loss {loss.item():.4f}")
        print(handle)


if __name__ == "__main__":
    main()
