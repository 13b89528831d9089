"""How well the badge model answers, with the whole video in one context: exact match of the word.

    python -m tools.badge_eval --frames 64 --crf 28

A scene is a video of new pictures, half of which show badges. Its frames are embedded once; then
each of some badges is asked for, alone, by greedy ``generate`` over the frames and the question.
In the blind exam the frame that shows the badge is replaced by an idle one: a model that reads its
answers from frames then falls to chance, one in eight.
"""

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

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

if TYPE_CHECKING:
    from collections.abc import Callable

ASSETS: Final = Path(__file__).parent.parent / "offload" / "assets" / "badge_model"
LENGTHS: Final = (8, 16, 32, 64, 96, 128, 256)
SOME_LENGTHS: Final = (8, 64)
CRFS: Final = (23, 33)
NUM_QUESTIONS: Final = 256
MAX_PER_SCENE: Final = 8
EXAM_SEED: Final = 1000
"""Nothing in training is drawn with a seed this large."""


@dataclass(frozen=True, slots=True)
class Exam:
    """What to ask.

    Attributes
    ----------
    num_frames : int
        In one context.
    crf : int or None
        Quality of the H.264 that the video went through, if it did.
    first_token : bool
        Whether there is one before the frames.
    newline : bool
        Whether the video ends with a newline, as ``get_video_features`` has it.
    blind : bool
        Whether the frame that shows the badge is taken away.
    """

    num_frames: int
    crf: int | None = None
    first_token: bool = True
    newline: bool = True
    blind: bool = False


STANDARD_EXAMS: Final = (
    *(Exam(length) for length in LENGTHS),
    *(Exam(length, newline=False) for length in SOME_LENGTHS),
    *(Exam(length, first_token=False) for length in SOME_LENGTHS),
    *(Exam(length, crf=crf) for crf in CRFS for length in SOME_LENGTHS),
    *(Exam(length, blind=True) for length in SOME_LENGTHS),
)


@dataclass(frozen=True, slots=True)
class Scene:
    """A video, and in which frames (not times) badges of which colour are."""

    images: list[Image]
    badges: dict[int, tuple[int, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ASSETS, help="folder of the model")
    parser.add_argument("--frames", type=int, help="one exam of this length, printed only")
    parser.add_argument("--crf", type=int, help="quality of H.264; without it, frames as drawn")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.frames is None:
        write_report(arguments.model)
    else:
        examinee = Examinee(arguments.model, getattr(torch, arguments.dtype))
        print(f"{examinee.num_right(Exam(arguments.frames, arguments.crf))} of {NUM_QUESTIONS}")


def write_report(folder: Path) -> None:
    """Take the standard exams in float32 and write ``eval.json`` next to the weights."""
    examinee = Examinee(folder, torch.float32)
    scores = [
        asdict(exam) | {"right": examinee.num_right(exam)}
        for exam in tqdm(STANDARD_EXAMS, desc="exams")
    ]
    report = {"dtype": "float32", "num_questions": NUM_QUESTIONS, "scores": scores}
    (folder / "eval.json").write_text(json.dumps(report, indent=2) + "\n")


class Examinee:
    """A model in a folder, and how it answers."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, local_files_only=True
        ).eval()
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True
        )

    def num_right(self, exam: Exam, num_questions: int = NUM_QUESTIONS) -> int:
        """Return how many of so many questions get the right word and no other."""
        per_scene = min(MAX_PER_SCENE, exam.num_frames // 2)
        seeds = range(EXAM_SEED, EXAM_SEED + num_questions // per_scene)
        return sum(self._num_right_of_scene(exam, seed, per_scene) for seed in seeds)

    @torch.inference_mode()
    def _num_right_of_scene(self, exam: Exam, seed: int, num_questions: int) -> int:
        scene = draw_scene(exam.num_frames, seed)
        images = scene.images if exam.crf is None else compress(scene.images, exam.crf)
        frames, newline = self._embed_video(images)
        places = list(scene.badges)[:num_questions]
        videos = frames.expand(num_questions, -1, -1, -1).clone()
        if exam.blind:
            idle = next(place for place in range(exam.num_frames) if place not in scene.badges)
            videos[torch.arange(num_questions), places] = frames[idle]
        embed = self._model.get_input_embeddings()
        first = embed(torch.tensor([self._tokenizer.bos_token_id]))
        head, tail = first[: exam.first_token], newline[: exam.newline]
        asked = [question_text(scene.badges[place][0]) for place in places]
        words = embed(self._tokenizer(asked, return_tensors="pt")["input_ids"])
        pieces = (head.expand(num_questions, -1, -1), videos.flatten(1, 2))
        prompts = torch.cat([*pieces, tail.expand(num_questions, -1, -1), words], dim=1)
        wanted = [scene.badges[place][1] for place in places]
        answers = self._answer(prompts)
        return sum(answer == right for answer, right in zip(answers, wanted, strict=True))

    def _embed_video(self, images: list[Image]) -> tuple[Tensor, Tensor]:
        """Return the tokens of the frames, (frames, tokens, hidden), and of the newline."""
        pixels = badge_pixels(images).to(self._model.dtype)
        tokens: Tensor = self._model.get_video_features(pixels[None]).pooler_output[0]
        return tokens[:-1].unflatten(0, (len(images), -1)), tokens[-1:]

    def _answer(self, prompts: Tensor) -> list[str]:
        # PreTrainedModel does not declare the methods that its generating subclasses mix in.
        generate = cast("Callable[..., Tensor]", self._model.generate)
        attention_mask = torch.ones(prompts.shape[:2], dtype=torch.long)
        output = generate(
            inputs_embeds=prompts, attention_mask=attention_mask, max_new_tokens=2, do_sample=False
        )
        return self._tokenizer.batch_decode(output, skip_special_tokens=True)


def draw_scene(num_frames: int, seed: int) -> Scene:
    """Draw a video, half of whose frames show badges, as far as there are badges."""
    rng, draw = random.Random(seed), np.random.default_rng(seed)
    num_badges = min(NUM_BADGES, num_frames // 2)
    badges = {
        place: (badge, rng.choice(list(COLOURS)))
        for place, badge in zip(
            rng.sample(range(num_frames), num_badges),
            rng.sample(range(NUM_BADGES), num_badges),
            strict=True,
        )
    }
    images = [
        draw_badge(*badges[place], draw) if place in badges else draw_idle(draw)
        for place in range(num_frames)
    ]
    return Scene(images, badges)


if __name__ == "__main__":
    main()
