"""Write queries, keys and values that a model really has, for `offload eval fidelity --dump`.

Runs a text through the model and keeps, for every layer of full attention, the keys and values of
its first tokens, the queries of the tokens right after them, and some of the queries before, which
indexes that learn from queries may have. All are as attention sees them: after the rotary
embedding. docs/eval.md describes the file.

    python -m tools.dump_qkv qkv.safetensors --model FOLDER --text FILE --tokens 16384
        [--queries 32] [--train-queries 1024] [--layers 0 15 31]

Without --model it is the recall model, without --text a document of records and questions about it.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.masking_utils import AttentionMaskInterface

from offload.cli_options import positive_int
from offload.errors import ConfigError, OffloadError
from offload.evals.heads import write_dump
from offload.evals.records import multi_needle
from offload.local_model import RECALL, load_local_model
from offload.prefill import prefill
from offload.recall_data import BOS_TOKEN_ID

_NAME = "dump_qkv"
_PREFILL_TOKENS = 512
_QUESTION_TOKENS = 11
"""At least, with its answer, in a document of records."""


@dataclass(eq=False)
class Recorder:
    """An attention function that does what `sdpa` does, and keeps what it is given.

    Attributes
    ----------
    num_keys : int
        Tokens whose keys and values are kept; the queries after them are asked.
    wanted : Tensor, int64 [num_train_queries]
        Positions before them whose queries are kept too, in order.
    layers : sequence of int or None
        None: all.
    """

    num_keys: int
    wanted: Tensor
    layers: Sequence[int] | None = None
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    scales: dict[int, float] = field(default_factory=dict)
    _train: dict[int, list[Tensor]] = field(default_factory=dict)

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        layer = int(module.layer_idx)
        is_full = kwargs.get("sliding_window") is None and kwargs.get("softcap") is None
        if is_full and (self.layers is None or layer in self.layers):
            self._keep(layer, query[0], key[0], value[0])
            scale = kwargs.get("scaling")
            self.scales[layer] = query.shape[-1] ** -0.5 if scale is None else float(scale)
        attend = AttentionInterface()["sdpa"]
        result: tuple[Tensor, Tensor | None] = attend(
            module, query, key, value, attention_mask, **kwargs
        )
        return result

    def check(self) -> None:
        """Raise ConfigError if a layer that was wanted has no full attention."""
        missing = set(self.layers or ()) - set(self.kept)
        if missing or not self.kept:
            where = f"layers {sorted(missing)}" if missing else "any layer"
            raise ConfigError(f"no full attention in {where}; it is in {sorted(self.kept)}")

    def _keep(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        first = key.shape[1] - query.shape[1]
        train = self._train.setdefault(layer, [])
        if first < self.num_keys:
            here = self.wanted[(self.wanted >= first) & (self.wanted < key.shape[1])] - first
            train.append(query[:, here.to(query.device)].cpu())
            return
        self.kept[layer] = {
            "keys": key[:, : self.num_keys].cpu(),
            "values": value[:, : self.num_keys].cpu(),
            "queries": query.cpu(),
            "train_queries": torch.cat(train, 1),
        }


def dump(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    num_queries: int,
    num_train_queries: int,
    layers: Sequence[int] | None = None,
) -> Recorder:
    """Run tokens through a model; return what its layers of full attention saw.

    Parameters
    ----------
    model : PreTrainedModel
    token_ids : sequence of int
    num_queries : int
        The last tokens, which are asked; the others are the keys.
    num_train_queries : int
    layers : sequence of int, optional

    Raises
    ------
    ConfigError
        There are too few tokens, or no such layer of full attention.
    """
    num_keys = len(token_ids) - num_queries
    if num_keys < num_train_queries:
        raise ConfigError(
            f"{len(token_ids)} tokens are too few for {num_queries} and {num_train_queries} queries"
        )
    wanted = torch.linspace(0, num_keys - 1, num_train_queries).long()
    recorder = Recorder(num_keys, wanted, layers)
    ids = torch.tensor([token_ids], device=model.device)
    cache = DynamicCache(config=model.config)
    with _attending_by(model, recorder), tqdm(total=len(token_ids), unit="token") as bar:
        prefill(model, cache, ids[:, :num_keys], _PREFILL_TOKENS, bar.update)
        prefill(model, cache, ids[:, num_keys:], num_queries, bar.update)
    recorder.check()
    return recorder


@contextmanager
def _attending_by(model: PreTrainedModel, recorder: Recorder) -> Iterator[None]:
    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, recorder)
    AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def read_tokens(
    tokenizer: PreTrainedTokenizerBase, text: Path | None, num_keys: int, num_queries: int
) -> list[int]:
    """Return the tokens of a file, or of records and questions about them.

    Raises
    ------
    ConfigError
        The file is too short, or cannot be read.
    """
    if text is None:
        case = multi_needle(num_keys, 1 + num_queries // _QUESTION_TOKENS, random.Random(0))
        turns = [turn for conversation in case.conversations for turn in conversation]
        asked = "".join(turn.text + turn.expected[0] for turn in turns)
        ids = [BOS_TOKEN_ID, *_encode(tokenizer, case.document + asked)]
    else:
        try:
            ids = _encode(tokenizer, text.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{text} cannot be read: {error}") from error
    if len(ids) < num_keys + num_queries:
        raise ConfigError(f"{num_keys + num_queries} tokens are wanted, the text has {len(ids)}")
    return ids[: num_keys + num_queries]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default=RECALL)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=positive_int, default=16384)
    parser.add_argument("--queries", type=positive_int, default=32)
    parser.add_argument("--train-queries", type=positive_int, default=1024)
    parser.add_argument("--layers", type=int, nargs="+")
    args = parser.parse_args(arguments)
    try:
        if args.text is None and args.model != RECALL:
            raise ConfigError(f"model {args.model!r} needs a --text; only {RECALL} has its own")
        if not args.file.absolute().parent.is_dir():
            raise ConfigError(f"{args.file} cannot be written: its folder does not exist")
        model, tokenizer = load_local_model(args.model, args.dtype, args.device)
        ids = read_tokens(tokenizer, args.text, args.tokens, args.queries)
        found = dump(model, ids, args.queries, args.train_queries, args.layers)
        write_dump(args.file, found.kept, found.scales, f"{args.model}, {args.text or 'records'}")
    except OffloadError as error:
        print(f"dump_qkv: {error}", file=sys.stderr)
        return 2
    print(f"{args.file}: layers {sorted(found.kept)}, {args.tokens} keys, {args.queries} queries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
