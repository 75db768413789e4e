"""A method of your own: keep the visual tokens whose features are largest, before a layer of the decoder.

A method says where tokens leave, how many stay, and which. Sizes, masks, caches, positions and training are the
adapter's.

python examples/write_a_method.py llava-hf/llava-1.5-7b-hf photo.jpg "What is on the table?"
python examples/write_a_method.py --tiny
"""

import argparse
from dataclasses import dataclass

from prune_llava import load

import pyvtk
from pyvtk.integrations import transformers as vtk


@dataclass(frozen=True)
class LargestFeatures(vtk.Method):
    """Keep a share of the visual tokens, those of largest norm."""

    layer: int = 1
    keep: float = 0.25

    def stages(self, num_layers: int) -> list[vtk.Stage]:
        return [vtk.Stage(self.layer)]

    def num_keep(self, stage: vtk.Stage, there: int, prompt: int) -> int:
        return round(self.keep * prompt)

    def select(self, stage: vtk.Stage, context: vtk.Context) -> pyvtk.Selection:
        return pyvtk.select(
            context.hidden.float().norm(dim=-1), context.num_keep, candidates=context.visual, others="keep",
            drop=None if context.valid is None else ~context.valid, capacity=context.capacity, align="right",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="llava-hf/llava-1.5-7b-hf", help="name on the hub, or a folder")
    parser.add_argument("picture", nargs="?", help="file or address")
    parser.add_argument("question", nargs="?", default="What is in the picture?")
    parser.add_argument("--tiny", action="store_true", help="a random model instead")
    arguments = parser.parse_args()
    if not arguments.tiny and arguments.picture is None:
        parser.error("a picture is needed")
    if arguments.tiny:
        import tiny

        (model, inputs), text_of = tiny.llava(), str
    else:
        model, inputs, text_of = load(arguments.model, arguments.picture, arguments.question)

    with vtk.accelerate(model, LargestFeatures(layer=1, keep=0.25)) as handle:
        ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        print(text_of(ids[0, inputs["input_ids"].shape[1] :]))
        print(handle)


if __name__ == "__main__":
    main()
