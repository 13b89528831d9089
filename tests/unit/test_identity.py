"""Who may read whose keys and values."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from offload import identity
from offload.errors import ConfigError
from offload.identity import ModelIdentity, find_model, identify, text_config
from tests.support.models import make_model

ROOT = Path(__file__).resolve().parents[2]

_GOLDEN_WEIGHTS = "3fedc8aea7703e82b3b6e8005a627509"
"""Of ``constant_model``. If it changes, no session of an earlier release can be read any more."""

Edit = Callable[[Any], object]


def llama() -> PreTrainedModel:
    """Return a small model of its own, to be changed; always the same one."""
    return copy.deepcopy(make_model("llama"))


def small_config(**fields: Any) -> LlamaConfig:
    """Return the config of a model with a few thousand parameters."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 16}
    return LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes, **fields)


@torch.no_grad()
def constant_model() -> PreTrainedModel:
    """Return a model whose weights no random generator has made."""
    model = LlamaForCausalLM(small_config())
    for parameter in model.parameters():
        parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) % 7)
    return model


def differing(one: ModelIdentity, other: ModelIdentity) -> set[str]:
    """Name the fields in which two identities differ."""
    a, b = asdict(one), asdict(other)
    return {name for name in a if a[name] != b[name]}


def _models_in(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


def weight_of(model: Any) -> Tensor:
    weight: Tensor = model.model.layers[1].mlp.up_proj.weight
    return weight


class Lora(nn.Module):
    """A projection with adapters, with the attributes that those of PEFT have."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ParameterDict({"a": torch.ones(rank, base_layer.in_features)})
        self.lora_B = nn.ParameterDict({"a": torch.ones(base_layer.out_features, rank)})
        self.scaling = {"a": 0.5}
        self.merged_adapters: list[str] = []
        self._active_adapter = ["a"]
        self._disable_adapters = False

    def merge(self) -> None:
        """Add the adapter to the weight the way PEFT does, past autograd's version counter."""
        delta = self.lora_B["a"] @ self.lora_A["a"] * self.scaling["a"]
        self.base_layer.weight.data += delta.detach()


def add_lora(model: Any) -> Lora:
    """Put adapters on one projection of a model."""
    layer = Lora(model.model.layers[1].self_attn.v_proj)
    model.model.layers[1].self_attn.v_proj = layer
    return layer


def test_identity_of_a_model_rebuilt_from_its_seed_is_the_same() -> None:
    assert identify(make_model.__wrapped__("llama")) == identify(make_model("llama"))


def test_identity_of_a_model_of_another_seed_differs_in_its_weights() -> None:
    other = identify(make_model("llama", seed=1))
    assert differing(other, identify(make_model("llama"))) == {"weights"}


def test_identity_under_another_attention_implementation_is_the_same() -> None:
    assert identify(make_model("llama", "eager")) == identify(make_model("llama", "sdpa"))


def test_identity_in_another_dtype_differs_in_dtype_and_weights() -> None:
    found = identify(llama().bfloat16())
    assert found.dtype == "bfloat16"
    assert differing(found, identify(make_model("llama"))) == {"dtype", "weights"}


@pytest.mark.parametrize("name", ["llama", "gemma4", "deepseek_v3", "gpt2", "gpt_oss"])
def test_identity_of_a_model_saved_and_loaded_again_is_the_same(name: str, tmp_path: Path) -> None:
    model = make_model(name, "eager")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.config._name_or_path != model.config._name_or_path
    assert identify(loaded) == identify(model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_name_or_path", "elsewhere"),
        ("use_cache", False),
        ("pad_token_id", 5),
        ("output_hidden_states", True),
        ("architectures", ["LlamaModel"]),
        ("id2label", {0: "no", 1: "yes"}),
        ("transformers_version", "5.99"),
        ("a_field_of_a_later_release", None),
    ],
)
def test_identity_after_a_change_of_what_depends_on_the_load_is_the_same(
    name: str, value: Any
) -> None:
    model = llama()
    setattr(model.config, name, value)
    assert identify(model) == identify(make_model("llama"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("rms_norm_eps", 1e-5), ("hidden_act", "gelu"), ("num_attention_heads", 2), ("is_new", 1)],
)
def test_identity_after_a_change_of_the_architecture_differs_in_its_config(
    name: str, value: Any
) -> None:
    model = llama()
    setattr(model.config, name, value)
    assert differing(identify(model), identify(make_model("llama"))) == {"config"}


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"rope_theta": 5e5, "rope_type": "default"}, '"rope_theta":500000'),
        ({"rope_theta": 1e4, "rope_type": "linear", "factor": 2.5}, '"factor":2.5'),
    ],
)
def test_identity_with_other_rotary_parameters_shows_them(
    fields: dict[str, Any], shown: str
) -> None:
    found = identify(LlamaForCausalLM(small_config(rope_parameters=fields)), "same")
    assert differing(found, identify(LlamaForCausalLM(small_config()), "same")) == {"rotary"}
    assert shown in found.rotary


def test_identity_for_another_longest_text_differs_in_its_rotary_parameters() -> None:
    model = llama()
    model.config.max_position_embeddings *= 2
    assert differing(identify(model), identify(make_model("llama"))) == {"rotary"}


@pytest.mark.parametrize("theta", [10000, 10000.0])
def test_rotary_parameters_that_are_integral_do_not_depend_on_the_type(theta: float) -> None:
    fields = {"rope_theta": theta, "rope_type": "default"}
    model = LlamaForCausalLM(small_config(rope_parameters=fields))
    assert '"rope_theta":10000,' in identify(model, "same").rotary


def flip_one_bit(model: Any) -> None:
    weight_of(model).view(torch.int32)[3, 5] ^= 1


def exchange_rows(model: Any) -> None:
    weight_of(model)[[0, 1]] = weight_of(model)[[1, 0]]


def replace_weight(model: Any) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().neg())


def scale_past_the_version_counter(model: Any) -> None:
    weight_of(model).data *= 1.01


def add_buffer(model: Any) -> None:
    model.model.register_buffer("steering", torch.zeros(3))


def reshape_past_the_version_counter(model: Any) -> None:
    weight_of(model).data = weight_of(model).data.view(64, 96)


def widen_one_weight(model: Any) -> None:
    model.model.norm.double()


@pytest.mark.parametrize(
    "edit",
    [
        flip_one_bit,
        exchange_rows,
        replace_weight,
        scale_past_the_version_counter,
        reshape_past_the_version_counter,
        add_buffer,
        widen_one_weight,
        add_lora,
        lambda model: add_lora(model).merge(),
    ],
)
def test_identity_of_a_known_model_whose_tensors_change_differs_in_its_weights(edit: Edit) -> None:
    model = llama()
    before = identify(model)
    edit(model)
    assert differing(identify(model), before) == {"weights"}


def set_scale(layer: Lora) -> None:
    layer.scaling["a"] = 1.0


def disable(layer: Lora) -> None:
    layer._disable_adapters = True


def activate_none(layer: Lora) -> None:
    layer._active_adapter = []


@pytest.mark.parametrize("edit", [set_scale, disable, activate_none, Lora.merge])
def test_identity_of_a_model_whose_adapters_change_differs_in_its_weights(edit: Edit) -> None:
    model = llama()
    layer = add_lora(model)
    before = identify(model)
    edit(layer)
    assert differing(identify(model), before) == {"weights"}


def test_identity_after_an_edit_is_undone_is_that_of_before() -> None:
    model = llama()
    before = identify(model)
    flip_one_bit(model)
    identify(model)
    flip_one_bit(model)
    assert identify(model) == before


def test_identity_of_a_model_with_weights_stored_by_columns_is_the_same() -> None:
    model = llama()
    parameter = weight_of(model)
    parameter.data = parameter.data.t().contiguous().t()
    assert not parameter.is_contiguous()
    assert identify(model) == identify(make_model("llama"))


def test_identity_of_a_model_that_holds_a_tensor_and_its_transpose_tells_them_apart() -> None:
    square = torch.arange(9.0).view(3, 3)
    found = []
    for second in (square, square.t()):
        model = llama()
        model.register_buffer("first", square)
        model.register_buffer("second", second)
        found.append(identify(model))
    assert differing(*found) == {"weights"}


def test_identity_does_not_depend_on_buffers_that_no_checkpoint_holds() -> None:
    model = llama()
    model.register_buffer("scratch", torch.ones(3), persistent=False)
    assert identify(model) == identify(make_model("llama"))


def test_identity_of_a_model_made_in_inference_mode_notices_a_change() -> None:
    with torch.inference_mode():
        model = constant_model()
        before = identify(model)
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
        after = identify(model)
    assert before == identify(constant_model())
    assert differing(after, before) == {"weights"}


def test_identify_for_the_second_time_reads_samples_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = llama(), []
    original = identity._hash

    def counted(tensor: Tensor) -> str:
        read.append(tensor.numel())
        return original(tensor)

    identify(model)
    monkeypatch.setattr(identity, "_hash", counted)
    identify(model)
    assert len(read) == len(model.state_dict())
    assert max(read) <= 2 * identity._NUM_SAMPLES


def test_weights_id_stands_for_the_weights() -> None:
    one, other = make_model("llama"), make_model("llama", seed=1)
    assert identify(one, "main") == identify(other, "main")
    assert differing(identify(one, "main"), identify(one, "v2")) == {"weights"}
    assert differing(identify(one, "main"), identify(one)) == {"weights"}


def test_identify_without_bytes_to_read_asks_for_an_id() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(small_config())
    with pytest.raises(ConfigError, match=r"embed_tokens.weight .* on meta.* weights_id="):
        identify(model)
    assert identify(model, "main") == identify(constant_model(), "main")


def test_identify_with_a_config_that_json_cannot_say_is_refused() -> None:
    model = llama()
    model.config.secret = object()
    with pytest.raises(ConfigError, match="JSON cannot say"):
        identify(model)


def test_identity_in_another_process_with_another_hash_seed_is_the_same() -> None:
    code = (
        "import json; from dataclasses import asdict; from offload.identity import identify;"
        "from tests.unit.test_identity import constant_model as model;"
        "print(json.dumps(asdict(identify(model()))))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=True,
    )
    found = ModelIdentity(**json.loads(run.stdout.splitlines()[-1]))
    assert found == identify(constant_model())
    assert found.weights == _GOLDEN_WEIGHTS


def test_model_of_a_config_is_the_outermost_that_has_it() -> None:
    model = constant_model()
    assert any(part is not model and part.config is model.config for part in _models_in(model))
    assert find_model(model.config) is model


def test_model_of_the_config_of_its_decoder_is_the_whole_model() -> None:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = LlavaConfig(text_config=small_config(), vision_config=vision, image_token_index=3)
    model = LlavaForConditionalGeneration(config)
    decoder: Any = model.model.language_model
    decoder.config = copy.copy(decoder.config)  # some classes build their parts from copies
    assert find_model(decoder.config) is model
    assert find_model(text_config(model)) is model


def test_model_of_a_config_that_none_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0 live models have the LlamaConfig .* model="):
        find_model(small_config())


def test_model_of_a_config_that_two_have_is_refused() -> None:
    config = small_config()
    models = [LlamaForCausalLM(config), LlamaForCausalLM(config)]
    with pytest.raises(ConfigError, match=r"2 live models have the LlamaConfig .* model="):
        find_model(models[0].config)
