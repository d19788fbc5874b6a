"""Random inputs for the models of the zoo, by what their forward takes.

Text-only for nearly all of them, multimodal or not. Images are fed only where experts would stay idle without.
"""

# B batch, L length, P patches of all images together

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .shrink import NUM_TEXT_TOKENS

IMAGE_GRID = (1, 4, 4)
NUM_IMAGE_TOKENS = 4
"""A 4 x 4 grid of patches, merged two by two, takes the place of four text tokens."""


def text(model: PreTrainedModel, generator: torch.Generator, batch: int, length: int) -> dict[str, Tensor]:
    """input_ids (B, L)."""
    return {"input_ids": _token_ids(generator, batch, length)}


def text_to_text(model: PreTrainedModel, generator: torch.Generator, batch: int, length: int) -> dict[str, Tensor]:
    """input_ids and decoder_input_ids, (B, L) each."""
    return {
        "input_ids": _token_ids(generator, batch, length),
        "decoder_input_ids": _token_ids(generator, batch, length),
    }


def prompt_and_canvas(model: PreTrainedModel, generator: torch.Generator, batch: int, length: int) -> dict[str, Tensor]:
    """input_ids (B, L) and the canvas of a diffusion model, which it would otherwise draw from the global generator."""
    return {
        "input_ids": _token_ids(generator, batch, length),
        "decoder_input_ids": _token_ids(generator, batch, model.config.canvas_length),
    }


def embeddings(model: PreTrainedModel, generator: torch.Generator, batch: int, length: int) -> dict[str, Tensor]:
    """inputs_embeds (B, L, H): the talker speaks from the thinker's hidden states and has no text of its own."""
    hidden = model.config.get_text_config().hidden_size
    return {
        "inputs_embeds": torch.randn(batch, length, hidden, generator=generator).to(model.dtype),
        "talker_input_ids": _token_ids(generator, batch, length),
    }


def text_and_images(model: PreTrainedModel, generator: torch.Generator, batch: int, length: int) -> dict[str, Tensor]:
    """One image per row after its first token: input_ids (B, L), pixel_values (P, C * patch * patch)."""
    vision = model.config.vision_config
    num_channels = getattr(vision, "num_channels", None) or vision.in_channels
    num_patches = batch * IMAGE_GRID[0] * IMAGE_GRID[1] * IMAGE_GRID[2]
    input_ids = _token_ids(generator, batch, length)
    input_ids[:, 1 : 1 + NUM_IMAGE_TOKENS] = model.config.image_token_id
    return {
        "input_ids": input_ids,
        "pixel_values": torch.randn(num_patches, num_channels * vision.patch_size**2, generator=generator),
        "image_grid_thw": torch.tensor([IMAGE_GRID] * batch),
    }


def text_and_typed_images(
    model: PreTrainedModel, generator: torch.Generator, batch: int, length: int
) -> dict[str, Tensor]:
    """As `text_and_images`, with the tokens of the image marked: the marks choose between text and vision experts."""
    given = text_and_images(model, generator, batch, length)
    is_image = (given["input_ids"] == model.config.image_token_id).int()
    return given | {"mm_token_type_ids": is_image, "moe_mm_token_type_ids": is_image}


def _token_ids(generator: torch.Generator, batch: int, length: int) -> Tensor:
    return torch.randint(NUM_TEXT_TOKENS, (batch, length), generator=generator)
