"""Options of a preset: what they change, what they leave, and which are refused, and how."""

from typing import Any

import pytest

from offload.errors import ConfigError
from offload.presets import PRESETS, Preset, customised
from offload.sparse.plan import SparsePlan


def plan_of(preset: Preset) -> SparsePlan:
    assert preset.sparse is not None
    return preset.sparse


@pytest.mark.parametrize("policy", PRESETS)
def test_preset_without_changes_is_the_preset(policy: str) -> None:
    assert customised(policy) is PRESETS[policy]


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_abstracts_lie_where_they_are_told_to(where: str) -> None:
    changed = customised("leoam", abstracts=where)  # type: ignore[arg-type]
    assert plan_of(changed).abstracts == where
    assert plan_of(PRESETS["leoam"]).abstracts == "ram"
    assert plan_of(changed).index == plan_of(PRESETS["leoam"]).index


@pytest.mark.parametrize("budget", [0.25, 1.0, 300])
def test_early_budget_is_that_of_the_early_layers_alone(budget: float | int) -> None:
    before, after = plan_of(PRESETS["leoam"]), plan_of(customised("leoam", early_budget=budget))
    assert before.early is not None
    assert after.early is not None
    assert (after.early.budget, type(after.early.budget)) == (budget, type(budget))
    assert (after.budget, after.index) == (before.budget, before.index)
    assert (after.early.num_layers, after.early.index) == (2, before.early.index)


@pytest.mark.parametrize("share", [0, 0.5, 1.0])
def test_least_disk_share_is_one_of_reading_rows(share: float) -> None:
    changed = customised("leoam", least_disk_share=share)
    assert changed.rows.least_disk_share == share
    assert changed.rows.line_share == PRESETS["leoam"].rows.line_share
    assert changed.sparse == PRESETS["leoam"].sparse
    assert PRESETS["leoam"].rows.least_disk_share is None


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("leoam", {"leaf_tokens": 4, "bits": None, "lean": 0.75, "scope": "layer"}),
        ("leoam", {"num_levels": 3, "patience": 4, "lost_mass": 0.02, "over": 1}),
        ("adaptive", {"num_bits": 1, "tokens_per_cluster": 16}),
        ("quest", {"chunk_tokens": 8}),
        ("infllm", {"representatives": 2}),
        ("retrieval_attention", {"beam": 32}),
    ],
)
def test_options_of_the_index_change_what_they_name_and_nothing_else(
    policy: str, options: dict[str, Any]
) -> None:
    before, after = plan_of(PRESETS[policy]), plan_of(customised(policy, **options))
    assert before.index is not None
    assert after.index is not None
    assert after.index.kind is before.index.kind
    assert after.index.options == {**before.index.options, **options}
    assert after.early == before.early


def test_options_of_all_kinds_go_together() -> None:
    changed = customised(
        "leoam",
        budget=0.2,
        abstracts="disk",
        early_budget=0.4,
        least_disk_share=0.5,
        sink_tokens=0,
        leaf_tokens=32,
    )
    plan = plan_of(changed)
    assert (plan.budget, plan.abstracts, plan.sink_tokens) == (0.2, "disk", 0)
    assert plan.early is not None
    assert (plan.early.budget, changed.rows.least_disk_share) == (0.4, 0.5)
    assert plan.index is not None
    assert plan.index.options["leaf_tokens"] == 32


def test_changed_preset_can_be_changed_again() -> None:
    changed = customised(customised("leoam", leaf_tokens=4, early_budget=0.4), bits=None)
    plan = plan_of(changed)
    assert plan.index is not None
    assert (plan.index.options["leaf_tokens"], plan.index.options["bits"]) == (4, None)
    assert plan.early is not None
    assert plan.early.budget == 0.4


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("leoam", {"abstracts": "gpu"}, "abstracts='gpu' is neither 'ram' nor 'disk'"),
        ("streaming", {"abstracts": "disk"}, "'streaming' has no index; it takes no abstracts"),
        ("leoam", {"early_budget": 0}, "budget=0 is neither a share"),
        ("leoam", {"early_budget": 1.5}, "budget=1.5 is neither a share"),
        ("leoam", {"early_budget": True}, "budget=True is neither a share"),
        ("leoam", {"early_budget": "half"}, "budget='half' is neither a share"),
        ("quest", {"early_budget": 0.5}, "'quest' treats no layers otherwise"),
        ("leoam", {"least_disk_share": 1.1}, "least_disk_share=1.1 is no number from 0 to 1"),
        ("leoam", {"least_disk_share": -0.1}, "least_disk_share=-0.1"),
        ("leoam", {"least_disk_share": float("nan")}, "least_disk_share=nan"),
        ("leoam", {"least_disk_share": True}, "least_disk_share=True"),
        ("leoam", {"dense_below": "never"}, "dense_below='never' is neither 'auto' nor tokens"),
        ("leoam", {"dense_below": -1}, "dense_below=-1"),
        ("leoam", {"dense_below": 0.5}, "dense_below=0.5"),
        ("exact", {"abstracts": "disk"}, "reads everything; it takes no abstracts"),
        ("exact", {"early_budget": 0.5}, "reads everything; it takes no early_budget"),
        ("exact", {"least_disk_share": 0.5}, "reads everything; it takes no least_disk_share"),
        ("exact", {"leaf_tokens": 8}, "reads everything; it takes no leaf_tokens"),
    ],
)
def test_choice_that_is_none_is_refused_with_what_would_do(
    policy: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        customised(policy, **options)


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("leoam", {"colour": 1}, r"'leoam' with \{'colour': 1\}.*unexpected keyword.*colour"),
        ("adaptive", {"leaf_tokens": 8}, "'adaptive' with .*leaf_tokens"),
        ("streaming", {"leaf_tokens": 8}, "'streaming' has no index; it takes no leaf_tokens"),
        ("leoam", {"leaf_tokens": 0}, "no tree has leaves of 0 tokens"),
        ("leoam", {"leaf_tokens": "8"}, "'leoam' with .*leaf_tokens"),
        ("leoam", {"bits": 4}, "bits=4 is neither 8 nor None"),
        ("leoam", {"lean": 0.4}, "lean=0.4 is not from 0.5 to 1"),
        ("leoam", {"over": 0.5}, "over=0.5"),
        ("leoam", {"scope": "head"}, "scope='head' is neither"),
        ("leoam", {"lost_mass": 1}, "lost_mass=1 is no share"),
        ("leoam", {"leaf_tokens": 1 << 15}, "nodes of .* tokens; at most"),
        ("adaptive", {"num_bits": 3}, r"'adaptive' with \{'num_bits': 3\}"),
        ("adaptive", {"tokens_per_cluster": 0}, "'adaptive' with .*tokens_per_cluster"),
        ("quest", {"chunk_tokens": 0}, "'quest' with .*chunk_tokens"),
        ("infllm", {"representatives": -3}, "'infllm' with .*representatives"),
        ("retrieval_attention", {"beam": 0}, "beam=0; it is at least one"),
    ],
)
def test_option_that_the_index_cannot_be_built_with_is_refused(
    policy: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        customised(policy, **options)
