"""Pictures as models want them, against transformers' own processors."""

import numpy as np
import pytest
import torch
from transformers.image_transforms import get_resize_output_image_size
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)
from transformers.models.qwen3_vl.video_processing_qwen3_vl import (
    smart_resize as smart_resize_of_video,
)

from offload.errors import ConfigError
from offload.video.patches import fitting_size, patches
from offload.video.pixels import normalised
from tests.support.tiny_video_models import make_frames, tiny_adapter, tiny_video_model


@pytest.mark.parametrize("width", [17, 90, 640, 1280, 3000])
@pytest.mark.parametrize("height", [16, 100, 480, 721, 2160])
@pytest.mark.parametrize("factor", [28, 32])
def test_size_of_pictures_is_that_of_transformers(height: int, width: int, factor: int) -> None:
    least, most = 128 * factor**2, 768 * factor**2
    size = fitting_size(height, width, factor, least, most)
    assert size == smart_resize(height, width, factor, least, most)
    if min(height, width) >= factor:
        # A video of two frames, to which twice as many pixels are allowed.
        assert size == smart_resize_of_video(2, height, width, 2, factor, 2 * least, 2 * most)


def test_picture_of_a_single_line_is_refused() -> None:
    with pytest.raises(ConfigError, match="4000 x 8 pixels"):
        fitting_size(8, 4000, 28, 1, 10**6)


def test_patches_lie_token_by_token() -> None:
    frames, channels, rows, columns, merge, size = 2, 3, 2, 3, 2, 4
    edge = merge * size
    pixels = torch.randn(frames, channels, rows * edge, columns * edge)
    expected = [
        torch.stack(
            [
                pixels[frame, channel, top + y, left + x]
                for channel in range(channels)
                for frame in range(frames)
                for y in range(size)
                for x in range(size)
            ]
        )
        for token_top in range(0, rows * edge, edge)
        for token_left in range(0, columns * edge, edge)
        for top in range(token_top, token_top + edge, size)
        for left in range(token_left, token_left + edge, size)
    ]
    assert torch.equal(patches(pixels, size, merge), torch.stack(expected))


def test_resized_pictures_are_those_of_transformers_but_for_rounding() -> None:
    rows, columns, colours = np.meshgrid(np.arange(75), np.arange(130), [0, 1, 2], indexing="ij")
    image = (128 + 100 * np.sin(rows / 9 + colours) * np.cos(columns / 13)).astype(np.uint8)
    limits = (4 * 16**2, 12 * 16**2)
    theirs = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=limits[0], max_pixels=limits[1])
    found = theirs(image, return_tensors="pt")
    size = fitting_size(75, 130, 16, *limits)
    ours = patches(normalised([image, image], size), 8, 2)
    assert found["image_grid_thw"].tolist() == [[1, size[0] // 8, size[1] // 8]]
    # One of 255 steps of a colour, whose deviation is 0.26.
    torch.testing.assert_close(ours, found["pixel_values"], rtol=0, atol=1.01 / 255 / 0.26)


@pytest.mark.parametrize("size", [(40, 71), (71, 40), (24, 24)])
def test_llava_next_video_cuts_off_what_hangs_over_its_square(size: tuple[int, int]) -> None:
    name = "llava_next_video"
    (frame,) = make_frames(1, 1.0, size)
    height, width = get_resize_output_image_size(frame.image, 32, default_to_square=False)
    top, left = int((height - 32) / 2), int((width - 32) / 2)
    pixels = normalised([frame.image], (height, width))[:, :, top : top + 32, left : left + 32]
    model = tiny_video_model(name)
    expected = model.model.get_video_features(
        pixels[None], vision_feature_layer=-2, vision_feature_select_strategy="default"
    ).pooler_output[0]
    (unit,) = tiny_adapter(name).encode([frame])
    torch.testing.assert_close(unit.embeds, expected, rtol=0, atol=0)
