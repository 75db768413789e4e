"""Tiny models with random weights and prompts for them: ``--tiny`` of the examples, which then need no download. What
they say means nothing."""

from __future__ import annotations

import torch
import transformers

IMAGE, PAD = 99, 0
TEXT = dict(
    hidden_size=64, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
    vocab_size=100, pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
)  # fmt: skip


def llava():
    """(LLaVA-1.5 with images of 8 x 8 tokens, a prompt with an image)."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=112, patch_size=14
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=vision, image_token_index=IMAGE
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    return model, {**_prompt([IMAGE] * 64), "pixel_values": torch.randn(1, 3, 112, 112)}


def qwen2_5_vl():
    """(Qwen2.5-VL, a prompt with an image of 8 x 6 tokens)."""
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=14, spatial_merge_size=2,
            temporal_patch_size=2, window_size=112, fullatt_block_indexes=[1], out_hidden_size=64,
        ),
        image_token_id=IMAGE, video_token_id=98, vision_start_token_id=97, vision_end_token_id=96,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    inputs = _prompt([97, *[IMAGE] * 48, 96])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    grid = torch.tensor([[1, 16, 12]])  # of patches, four of which make a token
    return model, {**inputs, "pixel_values": torch.randn(192, 3 * 2 * 14 * 14), "image_grid_thw": grid}


def _prompt(image: list[int]) -> dict:
    ids = torch.tensor([[1, 5, 6, 7, *image, 8, 9, 10, 11]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
