"""Time to the first token of a saved session, against the prefill that it saves.

The shipped recall model reads a document once, the cache is saved and closed, and then loaded
again; a second cache reuses the document as a known prefix. Records are read past the page cache
where the file system allows it. Each question is asked of the original cache, of the loaded and of
the reused one, and the answers must be the same, token by token.

    python -m benchmarks.session_resume [--tokens 32768] [--questions 6] [--directory DIR]
        [--json FILE]
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from offload import OffloadedCache, SessionStore
from offload.config import format_size
from offload.demo import Reader, choose_facts, kv_bytes, small_capacity
from offload.prefill import prefill
from offload.recall_data import RecallDocument, build_document, is_correct
from offload.recall_model import load_recall_model

_PIECE_TOKENS = 512


@dataclass(frozen=True)
class Result:
    """One run; times in seconds, medians where they were taken more than once."""

    num_tokens: int
    kv_bytes: int
    prefill_s: float
    first_token_after_prefill_s: float
    save_s: float
    written_gb_s: float
    load_s: float
    first_token_after_load_s: float
    reuse_s: float
    first_token_after_reuse_s: float
    resume_over_prefill: float
    reuse_over_prefill: float
    num_questions: int
    num_same: int
    num_correct: int


class Bench:
    """One document, one model, one store."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.options = options
        self.model, tokenizer = load_recall_model()
        self.document: RecallDocument = build_document(
            options.tokens, 2 * options.questions, options.seed
        )
        self.reader = Reader(self.model, tokenizer, self.document, _PIECE_TOKENS)
        self.facts = choose_facts(self.document, options.questions, options.seed)
        self.ids = torch.tensor([self.document.token_ids])
        self.cache_bytes = kv_bytes(self.model, self.ids.shape[1])
        self.capacity = {**small_capacity(self.cache_bytes), "disk": "16GiB"}
        self.scratch = directory / "scratch"
        self.store = SessionStore(directory / "root", quota="16GiB", min_free=0)

    def new_cache(self) -> OffloadedCache:
        return OffloadedCache(
            ["gpu", "cpu", "disk"], capacity=self.capacity, disk_path=self.scratch
        )

    def first_token(self, cache: OffloadedCache) -> float:
        """Return how long one question takes to its first token."""
        question = self.document.question(self.facts[0])
        prompt = torch.tensor([[*self.document.token_ids, *question]])
        fork = cache.fork()
        started = time.perf_counter()
        generate: Any = self.model.generate
        generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=fork,
            max_new_tokens=1,
            do_sample=False,
        )
        elapsed = time.perf_counter() - started
        fork.close()
        return elapsed

    def answers(self, cache: OffloadedCache) -> list[list[int]]:
        found = []
        for fact in self.facts:
            fork = cache.fork()
            found.append(self.reader.ask(fork, fact))
            fork.close()
        return found

    def run(self) -> Result:
        cache = self.new_cache()
        started = time.perf_counter()
        with tqdm(total=self.ids.shape[1], unit="token", desc="prefill") as bar:
            prefill(self.model, cache, self.ids, _PIECE_TOKENS, bar.update)
        prefill_s = time.perf_counter() - started
        first_s = self.first_token(cache)
        expected = self.answers(cache)
        started = time.perf_counter()
        cache.save("document", store=self.store, model=self.model, token_ids=self.ids)
        save_s = time.perf_counter() - started
        cache.close()

        loads, firsts, reuses, reuse_firsts = [], [], [], []
        for _ in tqdm(range(self.options.repeats), desc="resume"):
            started = time.perf_counter()
            loaded = OffloadedCache.load(
                "document",
                self.model,
                store=self.store,
                capacity=self.capacity,
                disk_path=self.scratch,
            )
            loads.append(time.perf_counter() - started)
            firsts.append(self.first_token(loaded))
            loaded.close()
            reused = self.new_cache()
            started = time.perf_counter()
            reused.reuse(self.ids, self.model, store=self.store)
            reuses.append(time.perf_counter() - started)
            reuse_firsts.append(self.first_token(reused))
            reused.close()
        loaded = OffloadedCache.load(
            "document", self.model, store=self.store, disk_path=self.scratch
        )
        reused = self.new_cache()
        reused.reuse(self.ids, self.model, store=self.store)
        prefill(self.model, reused, self.ids[:, reused.get_seq_length() :], 512, lambda n: None)
        found, again = self.answers(loaded), self.answers(reused)
        loaded.close()
        reused.close()
        self.store.close()
        return self.result(
            prefill_s, first_s, save_s, loads, firsts, reuses, reuse_firsts, expected, found, again
        )

    def result(
        self,
        prefill_s: float,
        first_s: float,
        save_s: float,
        loads: list[float],
        firsts: list[float],
        reuses: list[float],
        reuse_firsts: list[float],
        expected: list[list[int]],
        found: list[list[int]],
        again: list[list[int]],
    ) -> Result:
        resume = statistics.median(a + b for a, b in zip(loads, firsts, strict=True))
        reuse = statistics.median(a + b for a, b in zip(reuses, reuse_firsts, strict=True))
        same = sum(a == b == c for a, b, c in zip(expected, found, again, strict=True))
        correct = sum(is_correct(fact, ids) for fact, ids in zip(self.facts, found, strict=True))
        return Result(
            num_tokens=self.ids.shape[1],
            kv_bytes=self.cache_bytes,
            prefill_s=prefill_s,
            first_token_after_prefill_s=first_s,
            save_s=save_s,
            written_gb_s=self.cache_bytes / save_s / 1e9,
            load_s=statistics.median(loads),
            first_token_after_load_s=statistics.median(firsts),
            reuse_s=statistics.median(reuses),
            first_token_after_reuse_s=statistics.median(reuse_firsts),
            resume_over_prefill=resume / (prefill_s + first_s),
            reuse_over_prefill=reuse / (prefill_s + first_s),
            num_questions=len(expected),
            num_same=same,
            num_correct=correct,
        )


def show(result: Result) -> None:
    print(f"{result.num_tokens} tokens, {format_size(result.kv_bytes)} of keys and values")
    print(f"  prefill {result.prefill_s:.2f} s, then {result.first_token_after_prefill_s:.3f} s")
    print(f"  save    {result.save_s:.2f} s ({result.written_gb_s:.2f} GB/s)")
    print(f"  load    {result.load_s:.3f} s, then {result.first_token_after_load_s:.3f} s")
    print(f"  reuse   {result.reuse_s:.3f} s, then {result.first_token_after_reuse_s:.3f} s")
    print(
        f"  first token of the session: 1/{1 / result.resume_over_prefill:.0f} of prefill; "
        f"of the known prefix: 1/{1 / result.reuse_over_prefill:.0f}"
    )
    print(
        f"  {result.num_same} of {result.num_questions} answers the same in all three caches, "
        f"{result.num_correct} right"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args(sys.argv[1:])
    random.seed(options.seed)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        result = Bench(options, Path(directory)).run()
    show(result)
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")


if __name__ == "__main__":
    main()
