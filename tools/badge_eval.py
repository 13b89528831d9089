"""How well the badge model answers, with the whole video in one context: exact match of the word.

    python -m tools.badge_eval --frames 64 --seeds 7

A scene is a video of new pictures, half of which show badges. Its frames are embedded once; then
each of some badges is asked for, alone, by greedy ``generate`` over the frames and the question.
In the blind exam the frame that shows the badge is replaced by an idle one: a model that reads its
answers from frames then falls to chance, one in eight.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from offload.video.badge_model import badge_pixels
from offload.video.badge_world import COLOURS, NUM_BADGES, draw_badge, draw_idle, question_text
from offload.video.types import Image
from tools.badge_bank import compress

ASSETS: Final = Path(__file__).parent.parent / "offload" / "assets" / "badge_model"
LENGTHS: Final = (8, 16, 32, 64, 96, 128, 256)
CODEC_LENGTHS: Final = (8, 64)
CRFS: Final = (23, 33)
NUM_SCENES: Final = 64
MAX_QUESTIONS: Final = 8
MAX_SHARE: Final = 0.5


@dataclass(frozen=True, slots=True)
class Exam:
    """What to ask.

    Attributes
    ----------
    num_frames : int
        In one context.
    crf : int or None
        Quality of the H.264 that the video went through, if it did.
    newline : bool
        Whether the video ends with a newline, as ``get_video_features`` has it.
    blind : bool
        Whether the frame that shows the badge is taken away.
    """

    num_frames: int
    crf: int | None = None
    newline: bool = True
    blind: bool = False


STANDARD_EXAMS: Final = (
    *(Exam(length) for length in LENGTHS),
    *(Exam(length, newline=False) for length in CODEC_LENGTHS),
    *(Exam(length, crf=crf) for crf in CRFS for length in CODEC_LENGTHS),
    *(Exam(length, blind=True) for length in CODEC_LENGTHS),
)
