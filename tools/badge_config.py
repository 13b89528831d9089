"""The shape of the badge model, and the files next to its weights."""

from pathlib import Path
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
QUESTION_WORDS: Final = ("colour", "of", "badge", "what", "was", "the")
WORDS: Final = (*SPECIALS, *QUESTION_WORDS, *COLOURS, *(f"{b:02d}" for b in range(NUM_BADGES)))
TOKEN_IDS: Final = {word: token_id for token_id, word in enumerate(WORDS)}

PATCH_SIZE: Final = 8
HIDDEN_SIZE: Final = 128
TOKENS_PER_FRAME: Final = (FRAME_SIZE // PATCH_SIZE // 2) ** 2
"""Pooling halves the grid of patches in both directions."""

# No role markers: whatever stands between the number and the answer is one more hop to learn.
CHAT_TEMPLATE: Final = """\
{{ bos_token }}\
{% for message in messages %}\
{% if message.content is string %}{{ message.content }}\
{% else %}{% for part in message.content %}\
{% if part.type == 'video' %}<video>{% elif part.type == 'text' %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}\
{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\
{% endfor %}"""


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
    """Return a float32 model with random weights."""
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(badge_config())
    model.generation_config.bos_token_id = BOS_TOKEN_ID
    model.generation_config.eos_token_id = EOS_TOKEN_ID
    model.generation_config.pad_token_id = PAD_TOKEN_ID
    return model


def save_model(model: LlavaOnevisionForConditionalGeneration, folder: Path) -> None:
    """Write weights, configuration, tokenizer and what to do with pixels."""
    model.save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": FRAME_SIZE, "width": FRAME_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        image_grid_pinpoints=[[FRAME_SIZE, FRAME_SIZE]],
    )
    processor.save_pretrained(folder)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, blind to capitals and to ``?.,!``."""
    backend = Tokenizer(models.WordLevel(vocab=TOKEN_IDS, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[?.,!]"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        chat_template=CHAT_TEMPLATE,
    )
