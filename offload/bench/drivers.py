"""What is timed: a step of attention layers, or a step of a whole model."""

from abc import ABC, abstractmethod
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, LlamaConfig, Qwen3Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from offload import OffloadedCache
from offload.bench.contexts import Context
from offload.bench.dense import DenseCache
from offload.bench.settings import BenchSettings, Cell

_PIECE_TOKENS: Final = 4096
_PREFILL_TOKENS: Final = 1024
_VOCABULARY: Final = 1024


class Driver(ABC):
    """Fills caches with a context, and makes steps on them: the same for all contenders.

    Parameters
    ----------
    settings : BenchSettings
    cell : Cell
    context : Context
    """

    def __init__(self, settings: BenchSettings, cell: Cell, context: Context) -> None:
        self.settings = settings
        self.cell = cell
        self.context = context
        self.device = settings.torch_device
        self.config = make_config(settings)
        # What steps are given is on the device beforehand: it is no part of what they cost.
        both = (context.keys, context.values)
        self._new = [part[:, cell.num_tokens :].to(self.device) for part in both]
        self._queries = context.queries.unsqueeze(-2).to(self.device)

    weight_bytes = 0
    """Of the weights that a step reads."""

    def fill(self, cache: Cache | DenseCache) -> None:
        """Put the context straight into a cache: into ours in pieces, as prompts come.

        Stock caches get it whole, because they copy all they hold with every piece.
        """
        piece = _PIECE_TOKENS if isinstance(cache, OffloadedCache) else self.cell.num_tokens
        both = (self.context.keys, self.context.values)
        for start in range(0, self.cell.num_tokens, piece):
            stop = min(start + piece, self.cell.num_tokens)
            keys, values = (self._rows(part[:, start:stop].to(self.device)) for part in both)
            for layer in range(self.settings.num_layers):
                cache.update(keys, values, layer)

    def _rows(self, states: Tensor) -> Tensor:
        """Give keys or values to every row, ``[batch, num_kv_heads, num_tokens, head_dim]``."""
        return states.expand(self.cell.batch, -1, -1, -1)

    @abstractmethod
    def step(self, cache: Cache | DenseCache, number: int) -> Tensor:
        """Make a step, counted from 0; return what it computed, heads in the last but one axis."""

    @abstractmethod
    def expected(self, number: int) -> Tensor | None:
        """Return what a step has to compute; None if only the first contender knows."""


class AttentionDriver(Driver):
    """Layers of attention without a model: ``update`` with one token, then attention.

    Attention is reached as a model would: through the function that transformers looks up.
    """

    def __init__(self, settings: BenchSettings, cell: Cell, context: Context) -> None:
        super().__init__(settings, cell, context)
        self._modules = [_AttentionModule(self.config, i) for i in range(settings.num_layers)]
        self._scale = settings.shape.head_dim**-0.5

    def step(self, cache: Cache | DenseCache, number: int) -> Tensor:
        """Return the outputs, ``[num_layers, batch, num_heads, head_dim]``."""
        new_keys, new_values = (self._rows(part[:, number : number + 1]) for part in self._new)
        outputs = []
        for layer, query in enumerate(self._queries[number]):
            keys, values = cache.update(new_keys, new_values, layer)
            outputs.append(self._attend(cache, layer, query, keys, values)[:, 0])
        return torch.stack(outputs)

    def query(self, number: int, layer: int) -> Tensor:
        """Return what a layer asks at a step, ``[batch, num_heads, 1, head_dim]``."""
        return self._queries[number, layer]

    def expected(self, number: int) -> Tensor:
        """Return attention in float32 over all tokens so far, shaped as by ``step``."""
        total = self.cell.num_tokens + number + 1
        layers, batch, heads, dim = self.context.queries[number].shape
        kv_heads = self.settings.shape.num_kv_heads
        # Rows and layers see the same keys, so all their queries can be asked together.
        asked = self.context.queries[number].reshape(-1, kv_heads, heads // kv_heads, dim)
        out = torch.empty(asked.shape)
        for head in range(kv_heads):
            keys, values = (
                part[head, :total].to(self.device).float()
                for part in (self.context.keys, self.context.values)
            )
            logits = asked[:, head].to(self.device).float() @ keys.T * self._scale
            out[:, head] = (logits.softmax(-1) @ values).cpu()
        return out.view(layers, batch, heads, dim)

    def _attend(
        self, cache: Cache | DenseCache, layer: int, query: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        if isinstance(cache, DenseCache):
            return cache.attend(query, keys, values)
        attention = AttentionInterface().get_interface("sdpa", sdpa_attention_forward)
        module = self._modules[layer]
        out: Tensor = attention(module, query, keys, values, None, scaling=self._scale)[0]
        return out


class ModelDriver(Driver):
    """A transformers model with random weights: real forward passes over one token."""

    def __init__(
        self, settings: BenchSettings, cell: Cell, context: Context, model: nn.Module
    ) -> None:
        super().__init__(settings, cell, context)
        self.model = model
        embedding = _VOCABULARY * settings.shape.hidden_size  # of which a step reads one row
        self.weight_bytes = settings.torch_dtype.itemsize * (
            sum(weight.numel() for weight in model.parameters()) - embedding
        )
        generator = torch.Generator().manual_seed(settings.seed)
        size = (cell.batch, cell.num_tokens + settings.num_steps)
        self._ids = torch.randint(0, _VOCABULARY, size, generator=generator).to(self.device)

    def fill(self, cache: Cache | DenseCache) -> None:
        """Put the context into a cache, or let the model read a prompt of its length."""
        if not self.settings.has_prefill:
            super().fill(cache)
            return
        for piece in self._ids[:, : self.cell.num_tokens].split(_PREFILL_TOKENS, 1):
            self.model(piece, past_key_values=cache, logits_to_keep=1)

    def step(self, cache: Cache | DenseCache, number: int) -> Tensor:
        """Return the logits, ``[batch, 1, vocabulary]``; the tokens are given, not generated."""
        token = self.cell.num_tokens + number
        ids = self._ids[:, token : token + 1]
        logits: Tensor = self.model(ids, past_key_values=cache, logits_to_keep=1).logits
        return logits

    def expected(self, number: int) -> None:
        """Return None: what a model computes is known from the first contender."""


class _AttentionModule(nn.Module):
    """What an attention function asks the layer of a model for."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer
        self.is_causal = True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.eval()


def make_config(settings: BenchSettings) -> Any:
    """Return the config of a model of this shape, with few layers and a small vocabulary."""
    shape = settings.shape
    kind = {"llama": LlamaConfig, "qwen3": Qwen3Config}[shape.family]
    return kind(
        vocab_size=_VOCABULARY,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=1 << 21,
        attn_implementation="sdpa",
    )


def make_model(settings: BenchSettings) -> nn.Module:
    """Return a model with random weights on the device of the settings."""
    torch.manual_seed(settings.seed)
    model: nn.Module = AutoModelForCausalLM.from_config(
        make_config(settings), dtype=settings.torch_dtype
    )
    return model.eval().requires_grad_(requires_grad=False).to(settings.torch_device)
