"""A user's own file of plans: found by an exact key, followed only where it fits, part of the program's
digest.
"""

import dataclasses
import json

import pytest

from nki_kernels import source_digest
from nki_kernels.layout import Projection, int8_layout, mlp_layout
from nki_kernels.plan_file import VARIABLE, plan_key
from nki_kernels.planner import Choice, Plan, Request, build_plan, plan_launch
from tests.nki_kernels.cost.programs import BF16

UV = Projection.whole("uv", 320)
REQUEST = Request(mlp_layout(576, 1536, UV, UV, UV), 700, BF16)
FIELDS = {"block_tokens": 256, "ring_slots": 5, "ring_cols": 512, "out_cols": 512, "token_group": 4}


@pytest.fixture
def plans(tmp_path, monkeypatch):
    """Writes a file of plans and points the planner at it."""

    def write(content, name="plans.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv(VARIABLE, str(path))
        return path

    return write


def test_a_key_tells_apart_everything_that_a_plan_depends_on():
    layout = REQUEST.layout
    compact = mlp_layout(576, 1536, Projection.whole("compact", 320), UV, UV)
    grouped = mlp_layout(576, 1536, *[Projection.whole("uv", 160, groups=2)] * 3)
    flags = ({"norm_eps": 1e-5}, {"residual": True}, {"transposed_input": True}, {"silu": True})
    requests = [Request(each, 1, BF16) for each in (layout, compact, grouped, int8_layout(layout))]
    requests += [Request(layout, 2, BF16), Request(int8_layout(compact), 1, BF16)]
    requests += [Request(layout, 1, BF16, **flag) for flag in flags]
    assert len({plan_key(request) for request in requests}) == len(requests)


def test_the_planner_takes_the_users_choice_and_only_where_it_fits(plans):
    rule = plan_launch(REQUEST)
    plans({"choices": {plan_key(REQUEST): FIELDS}})
    own = build_plan(REQUEST, Choice(**FIELDS))
    assert plan_launch(REQUEST) == own != rule
    plans(
        {"choices": {plan_key(REQUEST): FIELDS | {"block_tokens": 10**6, "ring_slots": 10**6}}}, "stale.json"
    )
    assert plan_launch(REQUEST) == rule  # a stale entry is not followed over the edge


def test_the_plan_of_one_kind_of_weights_is_not_taken_for_the_other(plans):
    whole = dataclasses.replace(REQUEST, layout=int8_layout(REQUEST.layout))
    rules = plan_launch(REQUEST), plan_launch(whole)
    plans({"choices": {plan_key(REQUEST): FIELDS}}, "bf16.json")
    assert plan_launch(REQUEST) != rules[0] and plan_launch(whole) == rules[1]
    plans({"choices": {plan_key(whole): FIELDS}}, "int8.json")
    assert plan_launch(REQUEST) == rules[0] and plan_launch(whole) != rules[1]


def test_another_file_is_another_program(plans):
    assert isinstance(plan_launch(REQUEST), Plan)
    before = source_digest()
    plans({"choices": {}})
    assert source_digest() != before


@pytest.mark.parametrize("content", ["not json", "[]", '{"plans": {}}'])
def test_a_file_that_is_no_table_is_named_with_what_to_do(plans, content):
    path = plans(content, f"{len(content)}.json")
    with pytest.raises(ValueError, match="write it anew or unset the variable") as stop:
        plan_launch(REQUEST)
    assert str(path) in str(stop.value)
