"""Decoders of GLM-OCR, GLM-4.1V and GLM-4.6V-Flash from their golden directories, without the families'
vision encoders."""

import torch
from golden_cases import golden

from models.checkpoint import Checkpoint
from models.families.vl_text import picture_layout, text_decoder, text_fields, text_rows
from models.family import Prompt

FAMILIES = ("glm_ocr", "glm41v", "glm46v")


def prompt_of(name: str, case: str) -> Prompt:
    told = golden(name)
    grids = [told.of(picture, "grid_thw")[0, 1:] // 2 for picture in told.pictures(case)]
    pixels = [told.of(picture, "pixel_values") for picture in told.pictures(case)]
    ids = told.ids(case)
    return Prompt(ids, pixels, picture_layout(ids, told.config["image_token_id"], grids))


def float_weights(name: str, operators) -> dict[str, torch.Tensor]:
    """The decoder's, in float32; its table has all tensors but those of the tower."""
    told = golden(name)
    config = text_decoder(text_fields(told.config))
    checkpoint = Checkpoint(told.directory)
    rows = list(text_rows(config, checkpoint.shapes, qkv_bias=name != "glm_ocr"))
    others = set(checkpoint.names) - {row.source for row in rows}
    assert all(other.startswith("model.visual.") for other in others)
    weights = {}
    for target, tensor in checkpoint.assemble(rows):
        tensor = tensor.float()
        packs = tensor.dim() == 2 and target != "embed.weight"
        weights[target] = operators.pack(tensor) if packs else tensor
    return weights
