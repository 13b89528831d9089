"""Make the model of BadgeWorld from random weights: read frames first, then answer, then exams.

    python -m tools.train_badge_model

Minutes on one CPU core, no network, nothing read: the pictures are drawn. Writes weights,
configuration, tokenizer and ``training_log.jsonl`` into the output folder, then, unless
``--no-eval`` is given, ``eval.json``. Steps, not seconds, decide the schedule, so that a run does
not depend on the speed of the machine.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaOnevisionForConditionalGeneration

from tools.badge_bank import draw_bank
from tools.badge_config import new_model, save_model
from tools.badge_eval import ASSETS, write_report
from tools.badge_language import LanguagePhase
from tools.badge_vision import VisionPhase

WARM_UP_STEPS: Final = 50
DECAY_SHARE: Final = 0.4
LOG_EVERY_STEPS: Final = 10


class Phase(Protocol):
    """A part of the training: what changes, how fast, for how long, and what is right."""

    name: str
    num_steps: int
    learning_rate: float

    def parameters(self) -> list[nn.Parameter]: ...

    def loss_and_accuracy(self, step: int) -> tuple[Tensor, float]: ...


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of the training log. ``seconds`` is CPU time since the start of the process."""

    phase: str
    step: int
    loss: float
    accuracy: float
    seconds: float


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = new_model(arguments.seed)
    with (arguments.out / "training_log.jsonl").open("w", buffering=1) as log:
        for record in chain.from_iterable(map(train, phases(model, arguments.seed))):
            if record.step % LOG_EVERY_STEPS == 0:
                log.write(json.dumps(asdict(record)) + "\n")
    save_model(model, arguments.out)
    if not arguments.no_eval:
        write_report(arguments.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more than one is rarely faster")
    parser.add_argument("--no-eval", action="store_true", help="stop after training")
    return parser.parse_args()


def phases(model: LlavaOnevisionForConditionalGeneration, seed: int) -> Iterator[Phase]:
    """Yield the phases; each begins with what the one before has left."""
    yield VisionPhase(model, draw_bank(250, 2000, 2 * seed), seed)
    # New pictures: how the vision tower reads what it has not learned by heart.
    yield LanguagePhase(model, draw_bank(60, 1500, 2 * seed + 1), seed)


def train(phase: Phase) -> Iterator[StepRecord]:
    """Train in place, one record per step."""
    parameters = phase.parameters()
    optimizer = torch.optim.AdamW(
        parameters, lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, phase.num_steps)
    )
    progress = tqdm(range(phase.num_steps), desc=phase.name, unit="step", mininterval=1)
    for step in progress:
        loss, accuracy = phase.loss_and_accuracy(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.3f}", refresh=False)
        seconds = round(time.process_time(), 1)
        yield StepRecord(phase.name, step, round(loss.item(), 4), round(accuracy, 4), seconds)


def rate_factor(step: int, num_steps: int) -> float:
    """Return what to multiply the learning rate with: up, flat, then down to zero."""
    warm_up = (step + 1) / WARM_UP_STEPS
    decay = (num_steps - step) / (DECAY_SHARE * num_steps)
    return min(1.0, warm_up, decay)


if __name__ == "__main__":
    main()
