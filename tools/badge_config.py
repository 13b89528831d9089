"""The shape of the badge model, and the files next to its weights."""

from pathlib import Path
from string import punctuation
from typing import Final

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from offload.video.badge_world import COLOURS, FRAME_SIZE, NUM_BADGES

SPECIALS: Final = ("<|im_start|>", "<|im_end|>", "<pad>", "<unk>", "<image>", "<video>")
BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID, UNK_TOKEN_ID, IMAGE_TOKEN_ID, VIDEO_TOKEN_ID = range(6)
QUESTION_WORDS: Final = ("colour", "of", "badge", "what", "was", "is", "the", "which", "had")
WORDS: Final = (*SPECIALS, *QUESTION_WORDS, *COLOURS, *(f"{b:02d}" for b in range(NUM_BADGES)))
TOKEN_IDS: Final = {word: token_id for token_id, word in enumerate(WORDS)}

PATCH_SIZE: Final = 8
HIDDEN_SIZE: Final = 128
TOKENS_PER_FRAME: Final = (FRAME_SIZE // PATCH_SIZE // 2) ** 2


def badge_config() -> LlavaOnevisionConfig:
    """Return the shape of the model: what LLaVA-OneVision is made of, made small."""
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=FRAME_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=BOS_TOKEN_ID,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=PAD_TOKEN_ID,
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN_ID,
        video_token_index=VIDEO_TOKEN_ID,
        image_grid_pinpoints=[[FRAME_SIZE, FRAME_SIZE]],
    )


def new_model(seed: int) -> LlavaOnevisionForConditionalGeneration:
    torch.manual_seed(seed)
    return LlavaOnevisionForConditionalGeneration(badge_config())
