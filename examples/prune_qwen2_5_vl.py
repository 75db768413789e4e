"""Ask Qwen2.5-VL about a picture while its tokens leave in three stages (PyramidDrop).

python examples/prune_qwen2_5_vl.py Qwen/Qwen2.5-VL-7B-Instruct photo.jpg "What is on the table?"
python examples/prune_qwen2_5_vl.py --tiny
"""

import argparse

from prune_llava import load

from pyvtk.integrations import transformers as vtk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="Qwen/Qwen2.5-VL-7B-Instruct", help="name on the hub, or a folder")
    parser.add_argument("picture", nargs="?", help="file or address")
    parser.add_argument("question", nargs="?", default="What is in the picture?")
    parser.add_argument("--tiny", action="store_true", help="a random model instead")
    arguments = parser.parse_args()
    if not arguments.tiny and arguments.picture is None:
        parser.error("a picture is needed")
    if arguments.tiny:
        import tiny

        (model, inputs), text_of = tiny.qwen2_5_vl(), str
    else:
        model, inputs, text_of = load(arguments.model, arguments.picture, arguments.question)

    layers = len(model.model.language_model.layers)
    stages = tuple(layers * quarter // 4 for quarter in (1, 2, 3))
    handle = vtk.accelerate(model, vtk.PyramidDrop(layers=stages, keep=(0.5, 0.25, 0.125)))
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False, cache_implementation="static")
    print(text_of(ids[0, inputs["input_ids"].shape[1] :]))
    print(handle)
    for layer, selection in handle.stages:
        print(f"from layer {layer} on: {selection.counts.tolist()} tokens")
    handle.remove()


if __name__ == "__main__":
    main()
