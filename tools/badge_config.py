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
