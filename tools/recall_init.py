"""The weights that the recall model starts from: a retrieval circuit, written into stock Qwen3.

The hidden state is read as ten slots of ``CODE_DIM`` numbers. Slot 0 holds a code of the token
itself. The eight heads of the lower two layers are previous-token heads: through their biases and
RoPE, head ``h`` of layer ``l`` looks ``1 + 4l + h`` tokens back and copies the code it finds into
slot ``1 + 4l + h``. The heads of the upper two layers compare the last eight tokens (slots 0–7 of
the query) with the eight tokens before a key (slots 1–8) and copy that key's token into slot 9,
which the output layer reads. Training starts from this and small noise, not from nothing: from
random weights a model of this size did not learn to retrieve within minutes.
"""

import math
from typing import Final

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from offload.recall_data import BOS_TOKEN_ID

EOS_TOKEN_ID: Final = BOS_TOKEN_ID + 1
PAD_TOKEN_ID: Final = BOS_TOKEN_ID + 2
VOCAB_SIZE: Final = 260

CODE_DIM: Final = 12
OUTPUT_SLOT: Final = 9
NUM_OFFSETS: Final = 8
NUM_COPY_LAYERS: Final = 2

NOISE_STD: Final = 0.01
"""Breaks the symmetry between heads; ten times as much would drown the codes."""
OFFSET_SHARPNESS: Final = 3.0
"""Norm weight of the previous-token heads. The neighbours of the wanted token score about
``1.07 * 3.0**2 = 9.6`` lower, so that they get e^-9.6 of its weight."""
MATCH_SHARPNESS: Final = 2.2
"""Norm weight of the matching heads: a full match scores ``8 * 2.2**2 = 39``, which outweighs a
million chance matches."""
OUTPUT_GAIN: Final = 0.6
"""Share of the output code that each of the eight matching heads writes."""


def recall_config() -> Qwen3Config:
    """Return the shape of the model: four layers, all of them full attention.

    Only 16 of the 64 dimensions of a head are rotated. The upper layers match content in the
    others, which know no position, and so work at lengths never seen in training.
    """
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2 * NUM_COPY_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        attention_bias=True,
        tie_word_embeddings=False,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000.0,
        },
        bos_token_id=BOS_TOKEN_ID,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=PAD_TOKEN_ID,
    )


@torch.no_grad()
def structured_model(seed: int) -> Qwen3ForCausalLM:
    """Return a float32 model with the circuit in it."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(recall_config())
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=NOISE_STD)
    codes = token_codes()
    model.model.embed_tokens.weight[:, slots(0)] += codes
    model.lm_head.weight[:, slots(OUTPUT_SLOT)] += codes
    for index, layer in enumerate(model.model.layers):
        if index < NUM_COPY_LAYERS:
            _write_offset_heads(layer.self_attn, index)
        else:
            _write_matching_heads(layer.self_attn)
    return model


def slots(first: int, count: int = 1) -> slice:
    """Return the dimensions of the hidden state that some slots occupy."""
    return slice(first * CODE_DIM, (first + count) * CODE_DIM)


def token_codes() -> Tensor:
    """Return a unit vector per token, shape (VOCAB_SIZE, CODE_DIM), no two of them close."""
    codes = torch.empty(0, CODE_DIM)
    for _ in range(VOCAB_SIZE):
        candidates = nn.functional.normalize(torch.randn(256, CODE_DIM), dim=-1)
        # The nearest neighbour decides; before there is one, any candidate does.
        closeness = (candidates @ codes.T).amax(-1) if len(codes) else torch.zeros(256)
        codes = torch.cat([codes, candidates[closeness.argmin()][None]])
    return codes


def _write_offset_heads(attention: nn.Module, layer: int) -> None:
    config = attention.config
    half = config.head_dim // 2
    rope = config.rope_parameters
    pairs = torch.arange(int(rope["partial_rotary_factor"] * half))
    frequencies = rope["rope_theta"] ** (-pairs / half)
    # The norm brings queries and keys to length sqrt(head_dim); start there.
    amplitude = math.sqrt(config.head_dim / len(pairs))
    # The hidden state holds 1 + 4 * layer codes of unit length, which the norm scales up alike.
    norm_gain = math.sqrt(config.hidden_size / (1 + config.num_attention_heads * layer))
    _set_sharpness(attention, OFFSET_SHARPNESS)
    for head in range(config.num_key_value_heads):
        start = head * config.head_dim
        attention.k_proj.bias[start + pairs] = amplitude
        attention.v_proj.weight[start : start + CODE_DIM, slots(0)] += torch.eye(CODE_DIM)
    for head in range(config.num_attention_heads):
        start = head * config.head_dim
        offset = 1 + config.num_attention_heads * layer + head
        attention.q_proj.bias[start + pairs] = amplitude * torch.cos(frequencies * offset)
        attention.q_proj.bias[start + half + pairs] = -amplitude * torch.sin(frequencies * offset)
        columns = slice(start, start + CODE_DIM)
        attention.o_proj.weight[slots(offset), columns] += torch.eye(CODE_DIM) / norm_gain


def _write_matching_heads(attention: nn.Module) -> None:
    config = attention.config
    half = config.head_dim // 2
    num_rotated = int(config.rope_parameters["partial_rotary_factor"] * half)
    still = torch.cat([torch.arange(num_rotated, half), half + torch.arange(num_rotated, half)])
    heads_per_key = config.num_attention_heads // config.num_key_value_heads
    norm_gain = math.sqrt(config.hidden_size / (1 + NUM_OFFSETS))
    _set_sharpness(attention, MATCH_SHARPNESS)
    for head in range(config.num_key_value_heads):
        start = head * config.head_dim
        # Eight codes do not fit into the still dimensions; an orthogonal map keeps most of them.
        projection = nn.init.orthogonal_(torch.empty(len(still), NUM_OFFSETS * CODE_DIM))
        attention.k_proj.weight[start + still, slots(1, NUM_OFFSETS)] += projection
        attention.v_proj.weight[start : start + CODE_DIM, slots(0)] += torch.eye(CODE_DIM)
        for query_head in range(head * heads_per_key, (head + 1) * heads_per_key):
            rows = query_head * config.head_dim + still
            attention.q_proj.weight[rows, slots(0, NUM_OFFSETS)] += projection
    for head in range(config.num_attention_heads):
        columns = slice(head * config.head_dim, head * config.head_dim + CODE_DIM)
        gain = OUTPUT_GAIN / norm_gain
        attention.o_proj.weight[slots(OUTPUT_SLOT), columns] += torch.eye(CODE_DIM) * gain


def _set_sharpness(attention: nn.Module, sharpness: float) -> None:
    attention.q_norm.weight.fill_(sharpness)
    attention.k_norm.weight.fill_(sharpness)
