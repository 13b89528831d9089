"""The weights that the recall model starts from: a retrieval circuit, written into stock Qwen3.

The hidden state is read as ten slots of ``CODE_DIM`` numbers. Slot 0 holds a code of the token
itself. The eight heads of the lower two layers are previous-token heads: through their biases and
RoPE, head ``h`` of layer ``l`` looks ``1 + 4l + h`` tokens back and copies the code it finds into
slot ``1 + 4l + h``. The heads of the upper two layers compare the last eight tokens (slots 0–7 of
the query) with the eight tokens before a key (slots 1–8) and copy that key's token into slot 9,
which the output layer reads. Untrained, this answers no question (``docs/recall-model.md``), but
training from it takes minutes.
"""

import math
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from offload.recall_data import BOS_TOKEN_ID

EOS_TOKEN_ID: Final = BOS_TOKEN_ID + 1
PAD_TOKEN_ID: Final = BOS_TOKEN_ID + 2
VOCAB_SIZE: Final = 260

HIDDEN_SIZE: Final = 128
NUM_HEADS: Final = 4
NUM_KV_HEADS: Final = 2
HEAD_DIM: Final = 64
HALF: Final = HEAD_DIM // 2
"""RoPE turns dimension ``i`` together with dimension ``i + HALF``."""
ROTATED_SHARE: Final = 0.25
NUM_ROTATED: Final = int(HALF * ROTATED_SHARE)
"""Pairs of dimensions that RoPE turns; the others never learn where a token is."""
ROPE_THETA: Final = 10000.0

CODE_DIM: Final = 12
OUTPUT_SLOT: Final = 9
NUM_OFFSETS: Final = 8
NUM_COPY_LAYERS: Final = 2

NOISE_STD: Final = 0.01
"""Breaks the symmetry between heads. Ten times as much would be longer than a code, which has unit
length: ``0.1 * sqrt(HIDDEN_SIZE) > 1``."""
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
        hidden_size=HIDDEN_SIZE,
        intermediate_size=192,
        num_hidden_layers=2 * NUM_COPY_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        attention_bias=True,
        tie_word_embeddings=False,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "proportional",
            "partial_rotary_factor": ROTATED_SHARE,
            "rope_theta": ROPE_THETA,
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
        candidates = normalize(torch.randn(256, CODE_DIM), dim=-1)
        # The nearest neighbour decides; before there is one, any candidate does.
        closeness = (candidates @ codes.T).amax(-1) if len(codes) else torch.zeros(256)
        codes = torch.cat([codes, candidates[closeness.argmin()][None]])
    return codes


def _write_offset_heads(attention: Qwen3Attention, layer: int) -> None:
    pairs = torch.arange(NUM_ROTATED)
    frequencies = ROPE_THETA ** (-pairs / HALF)
    # The norm brings queries and keys to length sqrt(HEAD_DIM); start there.
    amplitude = math.sqrt(HEAD_DIM / NUM_ROTATED)
    # The hidden state holds this many codes of unit length, which the norm scales up alike.
    norm_gain = math.sqrt(HIDDEN_SIZE / (1 + NUM_HEADS * layer))
    q_bias, k_bias = attention.q_proj.bias, attention.k_proj.bias
    _set_sharpness(attention, OFFSET_SHARPNESS)
    for start in range(0, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM):
        k_bias[start + pairs] = amplitude
        attention.v_proj.weight[start : start + CODE_DIM, slots(0)] += torch.eye(CODE_DIM)
    for head in range(NUM_HEADS):
        start = head * HEAD_DIM
        offset = 1 + NUM_HEADS * layer + head
        q_bias[start + pairs] = amplitude * torch.cos(frequencies * offset)
        q_bias[start + HALF + pairs] = -amplitude * torch.sin(frequencies * offset)
        _write_output(attention, head, offset, 1 / norm_gain)


def _write_matching_heads(attention: Qwen3Attention) -> None:
    still = torch.arange(HEAD_DIM).view(2, HALF)[:, NUM_ROTATED:].flatten()
    norm_gain = math.sqrt(HIDDEN_SIZE / (1 + NUM_OFFSETS))
    _set_sharpness(attention, MATCH_SHARPNESS)
    for kv_head in range(NUM_KV_HEADS):
        start = kv_head * HEAD_DIM
        # Eight codes do not fit into the still dimensions; an orthogonal map keeps most of them.
        projection = torch.nn.init.orthogonal_(torch.empty(len(still), NUM_OFFSETS * CODE_DIM))
        attention.k_proj.weight[start + still, slots(1, NUM_OFFSETS)] += projection
        attention.v_proj.weight[start : start + CODE_DIM, slots(0)] += torch.eye(CODE_DIM)
        for head in range(NUM_HEADS):
            if head * NUM_KV_HEADS // NUM_HEADS == kv_head:
                rows = head * HEAD_DIM + still
                attention.q_proj.weight[rows, slots(0, NUM_OFFSETS)] += projection
    for head in range(NUM_HEADS):
        _write_output(attention, head, OUTPUT_SLOT, OUTPUT_GAIN / norm_gain)


def _write_output(attention: Qwen3Attention, head: int, slot: int, gain: float) -> None:
    columns = slice(head * HEAD_DIM, head * HEAD_DIM + CODE_DIM)
    attention.o_proj.weight[slots(slot), columns] += gain * torch.eye(CODE_DIM)


def _set_sharpness(attention: Qwen3Attention, sharpness: float) -> None:
    attention.q_norm.weight.fill_(sharpness)
    attention.k_norm.weight.fill_(sharpness)
