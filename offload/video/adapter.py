"""What one kind of video model has to say, so that all of them stream alike."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offload.errors import ConfigError
from offload.video.choices import letter_of
from offload.video.types import Frame


@dataclass(frozen=True, slots=True)
class Unit:
    """What is stored, retrieved and attended together: a frame or two, with its timestamp text.

    Attributes
    ----------
    embeds : Tensor, shape (num_tokens, hidden_size)
    positions : Tensor, int64 [num_axes, num_tokens]
        From the beginning of the unit: 0 is where it starts, whatever came before.
    advance : int
        How much further text starts that follows it, on every axis.
    time_s : float
        Of its (first) frame.
    num_frames : int
    step : tuple of float, optional
        How much further the next unit starts, by axis; by ``advance`` on each if not given. The
        last axis, from which ``advance`` counts, moves by whole numbers. The others need not:
        positions are rounded down when they are added up.
    added : Tensor, optional, shape (num_levels, num_tokens, hidden_size)
        What is added to the states behind each of the first layers (DeepStack); zero for text.
    last_s : float, optional
        Of its last frame, if it has several: before that, nobody can have seen the unit.
    """

    embeds: Tensor
    positions: Tensor
    advance: int
    time_s: float
    num_frames: int
    step: tuple[float, ...] | None = None
    added: Tensor | None = None
    last_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the unit."""
        return len(self.embeds)


class VideoAdapter(ABC):
    """One kind of video model.

    Attributes
    ----------
    name : str
    model : Module
        The whole model, in evaluation mode.
    frames_per_unit : int
    option_names : frozenset of str
        Arguments besides model and tokenizer.
    """

    name: str
    frames_per_unit: int = 1
    option_names: ClassVar[frozenset[str]] = frozenset({"templates", "mean", "std"})

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    @property
    @abstractmethod
    def text_model(self) -> Any:
        """The language model without its head: takes ``inputs_embeds`` and ``position_ids``."""

    @property
    def config(self) -> Any:
        """Of the language model."""
        return self.text_model.config

    @property
    def head(self) -> nn.Module:
        """Turns hidden states into logits."""
        head: nn.Module = self.model.get_output_embeddings()
        return head

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.text_model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of its states."""
        dtype: torch.dtype = next(self.text_model.parameters()).dtype
        return dtype

    @property
    def num_axes(self) -> int:
        """Numbers that a position consists of: one, or three where models know time and place."""
        return 1

    @property
    def unit_tokens(self) -> int | None:
        """Tokens of a unit, if all have as many."""
        return None

    @abstractmethod
    def encode(self, frames: Sequence[Frame]) -> list[Unit]:
        """Turn frames into units; as many as make whole ones, ``frames_per_unit`` each.

        Raises
        ------
        ConfigError
            A frame is of a shape that the model cannot take.
        """

    @abstractmethod
    def opening(self) -> list[int]:
        """Return the tokens that come before the first frame."""

    @abstractmethod
    def asking(self, question: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a question, and those that follow it up to the answer."""

    def choosing(self, choices: Sequence[str]) -> str:
        """Return what follows a question that has choices, in the words of LLaVA's own prompt."""
        listed = "\n".join(f"{letter_of(k)}. {choice}" for k, choice in enumerate(choices))
        return f"\n{listed}\nAnswer with the option's letter from the given choices directly."

    def text(self, ids: Sequence[int]) -> Unit:
        """Return text as a unit, its positions one after the other on every axis."""
        tokens = torch.tensor(list(ids), dtype=torch.long, device=self.device)
        embeds = self.text_model.get_input_embeddings()(tokens)
        steps = torch.arange(len(ids), device=self.device)
        return Unit(embeds, steps.expand(self.num_axes, -1), len(ids), 0.0, 0)

    def closing(self) -> Unit | None:
        """Return what comes between the last frame and a question, if anything does."""
        return None

    def rotation(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines for positions.

        Parameters
        ----------
        like : Tensor
            Of which dtype and device are taken.
        positions : Tensor, int64 [num_axes, num_tokens]

        Returns
        -------
        tuple of Tensor, shape (num_tokens, key_dim)
        """
        ids = positions if self.num_axes == 1 else positions[:, None]
        cos, sin = self.text_model.rotary_emb(like, ids)
        return cos[0], sin[0]

    def added_inputs(self, added: Tensor) -> dict[str, Any]:
        """Return the arguments by which the text model takes what units add (``Unit.added``)."""
        raise ConfigError(f"{self.name}: its layers take nothing but embeddings")

    def token_ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without any that the tokenizer puts around it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids

    def is_end(self, token: int) -> bool:
        """Whether an answer ends with a token."""
        ends = self.model.generation_config.eos_token_id
        return token in (ends if isinstance(ends, list) else [ends])
