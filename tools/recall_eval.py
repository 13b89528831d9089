"""How well the recall model retrieves: exact match of whole answers, at several lengths.

    python -m tools.recall_eval --length 16384 --seeds 0 1 2

A document is prefilled once, in pieces, into a ``DynamicCache``; records are then asked for one at
a time by greedy ``generate``, and all tokens of an answer have to be right. The lesion cuts the
attention of the question and answer tokens (never of the prefill) to the first ``LESION_SINKS`` and
the last ``LESION_WINDOW`` tokens: a model that really reads its records from far away then falls to
chance. Records in the last ``LESION_WINDOW`` tokens are not asked for.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

from offload.recall_data import (
    MAX_ANSWER_TOKENS,
    Fact,
    RecallDocument,
    build_document,
    encode,
    is_correct,
)

ASSETS: Final = Path(__file__).parent.parent / "offload" / "assets" / "recall_model"
PREFILL_TOKENS: Final = 1024
LESION_SINKS: Final = 4
LESION_WINDOW: Final = 256
TOKENS_PER_FACT: Final = 100


class Exam(NamedTuple):
    """What to ask: so many questions about each of several documents of one length."""

    num_tokens: int
    seeds: tuple[int, ...]
    questions_per_document: int


STANDARD_EXAMS: Final = (
    Exam(4096, (100, 101, 102), 25),
    Exam(16384, (100, 101, 102), 25),
    Exam(32768, (100, 101), 30),
)


@dataclass(frozen=True, slots=True)
class Score:
    """How many of ``num_questions``, over all documents of an exam, were answered right.

    ``prefill_s`` is the mean wall time of reading one document.
    """

    num_tokens: int
    seeds: tuple[int, ...]
    num_questions: int
    right: int
    right_with_lesion: int
    prefill_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ASSETS, help="folder of the model")
    parser.add_argument("--length", type=int, help="one exam of this length, printed only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100])
    parser.add_argument("--questions", type=int, default=40, help="per document")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.length is None:
        write_report(arguments.model)
    else:
        model = load(arguments.model, getattr(torch, arguments.dtype))
        exam = Exam(arguments.length, tuple(arguments.seeds), arguments.questions)
        print(score(model, exam))


def write_report(folder: Path) -> None:
    """Take the standard exams in float32 and write ``eval.json`` next to the weights."""
    model = load(folder, torch.float32)
    report = {
        "dtype": "float32",
        "tokens_per_fact": TOKENS_PER_FACT,
        "lesion": {"sinks": LESION_SINKS, "window": LESION_WINDOW},
        "scores": [asdict(score(model, exam)) for exam in STANDARD_EXAMS],
    }
    (folder / "eval.json").write_text(json.dumps(report, indent=2) + "\n")


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model from a folder, for evaluation."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True
    )
    model.eval()
    return model


def score(model: PreTrainedModel, exam: Exam) -> Score:
    """Take one exam."""
    right = right_with_lesion = num_questions = 0
    prefill_s = 0.0
    for seed in tqdm(exam.seeds, desc=f"{exam.num_tokens} tokens", unit="document"):
        document = build_document(exam.num_tokens, exam.num_tokens // TOKENS_PER_FACT, seed)
        facts = far_facts(document, exam.questions_per_document, seed)
        start_s = time.perf_counter()
        cache = prefill(model, document.token_ids)
        prefill_s += time.perf_counter() - start_s
        num_questions += len(facts)
        right += sum(answers(model, cache, document, fact) for fact in facts)
        right_with_lesion += sum(answers_with_lesion(model, cache, fact) for fact in facts)
    return Score(
        num_tokens=exam.num_tokens,
        seeds=exam.seeds,
        num_questions=num_questions,
        right=right,
        right_with_lesion=right_with_lesion,
        prefill_s=round(prefill_s / len(exam.seeds), 1),
    )


def far_facts(document: RecallDocument, num_facts: int, seed: int) -> list[Fact]:
    """Choose facts to ask for, none of them inside the window of the lesion."""
    end = len(document.token_ids) - LESION_WINDOW
    far = [fact for fact in document.facts if fact.position + len(fact.record) <= end]
    return random.Random(seed).sample(far, min(num_facts, len(far)))


@torch.inference_mode()
def prefill(model: PreTrainedModel, token_ids: Sequence[int]) -> DynamicCache:
    """Run a document through the model in pieces; return its keys and values."""
    cache = DynamicCache(config=model.config)
    for piece in torch.tensor([token_ids]).split(PREFILL_TOKENS, dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    return cache


@torch.inference_mode()
def answers(model: PreTrainedModel, cache: Cache, document: RecallDocument, fact: Fact) -> bool:
    """Whether greedy ``generate`` answers, given the document in ``cache``.

    The cache is left as it was: with the document in it, and nothing else.
    """
    token_ids = torch.tensor([[*document.token_ids, *document.question(fact)]])
    # PreTrainedModel does not declare the methods that its generating subclasses mix in.
    generate = cast("Callable[..., Tensor]", model.generate)
    output = generate(
        token_ids,
        attention_mask=torch.ones_like(token_ids),
        past_key_values=cache,
        max_new_tokens=MAX_ANSWER_TOKENS,
        do_sample=False,
    )
    cache.crop(len(document.token_ids) - cache.get_seq_length())
    return is_correct(fact, output[0, token_ids.shape[1] :].tolist())


@torch.inference_mode()
def answers_with_lesion(model: PreTrainedModel, cache: DynamicCache, fact: Fact) -> bool:
    """Whether the model answers when the question can read only sinks and window.

    Every token of the answer has to be the argmax given the right ones before it, which is what
    greedy decoding amounts to. The cache is left as it was.
    """
    past = cache.get_seq_length()
    token_ids = torch.tensor([encode(fact.record)])
    num_new = token_ids.shape[1]
    output = model(
        token_ids,
        past_key_values=cache,
        attention_mask=lesion_mask(past, num_new),
        position_ids=past + torch.arange(num_new)[None],
    )
    cache.crop(-num_new)
    first = len(fact.prompt) - 1
    predicted: list[int] = output.logits[0, first:-1].argmax(-1).tolist()
    return is_correct(fact, predicted)


def lesion_mask(num_past: int, num_new: int) -> Tensor:
    """Return which keys each new token may read, bool, (1, 1, num_new, num_past + num_new)."""
    keys = torch.arange(num_past + num_new)
    queries = keys[num_past:, None]
    is_near = (keys <= queries) & (keys > queries - LESION_WINDOW)
    return (is_near | (keys < LESION_SINKS))[None, None]


if __name__ == "__main__":
    main()
