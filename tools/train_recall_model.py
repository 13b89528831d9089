"""Make the recall model: start from the written-in circuit, train on the shipped corpus, evaluate.

    python -m tools.train_recall_model

A few minutes on one CPU core, no network, nothing read but ``offload/assets/corpus/train``. Writes
weights, configuration, tokenizer and ``training_log.jsonl`` into the output folder, then, unless
``--no-eval`` is given, ``eval.json``. Steps, not seconds, decide the schedule, so that a run does
not depend on the speed of the machine.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from tools.recall_batches import Batch, BatchMaker
from tools.recall_eval import ASSETS, write_report
from tools.recall_init import PAD_TOKEN_ID, VOCAB_SIZE, structured_model

STEP_TOKENS: Final = 2048
SHORTER_SHARE: Final = 0.3
WARM_UP_STEPS: Final = 30
DECAY_SHARE: Final = 0.4


class Phase(NamedTuple):
    """A part of the curriculum: so many steps at one sequence length."""

    num_tokens: int
    num_steps: int


CURRICULUM: Final = (
    Phase(96, 50),
    Phase(192, 60),
    Phase(384, 60),
    Phase(768, 80),
    Phase(1024, 120),
    Phase(2048, 180),
)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of the training log. ``seconds`` is CPU time since the start."""

    step: int
    length: int
    loss: float
    accuracy: float
    seconds: float


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    model = structured_model(arguments.seed)
    save_tokenizer(arguments.out)
    with (arguments.out / "training_log.jsonl").open("w", buffering=1) as log:
        for record in train(model, arguments.seed, arguments.learning_rate):
            log.write(json.dumps(asdict(record)) + "\n")
    model.save_pretrained(arguments.out)
    if not arguments.no_eval:
        write_report(arguments.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--threads", type=int, default=1, help="more than one is rarely faster")
    parser.add_argument("--no-eval", action="store_true", help="stop after training")
    return parser.parse_args()


def train(model: Qwen3ForCausalLM, seed: int, learning_rate: float) -> Iterator[StepRecord]:
    """Train in place, one record per step."""
    lengths = list(schedule(seed))
    batches = BatchMaker(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, len(lengths))
    )
    model.train()
    start_s = time.process_time()
    progress = tqdm(lengths, unit="step")
    for step, length in enumerate(progress):
        loss, accuracy = train_step(model, optimizer, batches.batch(STEP_TOKENS // length, length))
        scheduler.step()
        progress.set_postfix(length=length, loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}")
        seconds = round(time.process_time() - start_s, 2)
        yield StepRecord(step, length, round(loss, 5), round(accuracy, 5), seconds)
    model.eval()


def schedule(seed: int) -> Iterator[int]:
    """Yield the sequence length of each step: the curriculum, some steps shorter."""
    rng = random.Random(seed)
    for index, phase in enumerate(CURRICULUM):
        for _ in range(phase.num_steps):
            if rng.random() < SHORTER_SHARE:
                yield rng.choice(CURRICULUM[: index + 1]).num_tokens
            else:
                yield phase.num_tokens


def rate_factor(step: int, num_steps: int) -> float:
    """Return what to multiply the learning rate with: up, flat, then down to zero."""
    warm_up = (step + 1) / WARM_UP_STEPS
    decay = (num_steps - step) / (DECAY_SHARE * num_steps)
    return min(1.0, warm_up, decay)


def train_step(
    model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch
) -> tuple[float, float]:
    """Take one step; return loss and accuracy over the tokens of the answers."""
    hidden = model.model(batch.token_ids, use_cache=False).last_hidden_state
    is_target = batch.is_answer[:, 1:]
    targets = batch.token_ids[:, 1:][is_target]
    logits = model.lm_head(hidden[:, :-1][is_target])
    loss = cross_entropy(logits, targets)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    accuracy = (logits.argmax(-1) == targets).float().mean()
    return loss.item(), accuracy.item()


def save_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer in which the id of a byte is its value."""
    specials = {VOCAB_SIZE - 4: "<s>", VOCAB_SIZE - 3: "</s>", PAD_TOKEN_ID: "<pad>"}
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([specials[token_id] for token_id in sorted(specials)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def byte_alphabet() -> list[str]:
    """Return the printable character that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 bytes stand for themselves, the others take the characters from U+0100 on.
    """
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(substitutes)) for byte in range(256)]


if __name__ == "__main__":
    main()
