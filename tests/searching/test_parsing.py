"""Answers of every kind: what is in them is found, what is wrong is said, and no text makes the reader fail."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flap_export.searching.language.parsing import MAX_RAW, candidates_from, parents_from


def rates(text: str) -> list[list[float] | str]:
    """Of three layers: rates or the problem."""
    return [[rate for (rate,) in one.value] if one.value else one.problem for one in candidates_from(text, 3, 1)]


@pytest.mark.parametrize(
    "text",
    [
        "<candidates>[[0.1, 0.2, 0.6]]</candidates>",
        "<candidates>[0.1, 0.2, 0.6]</candidates>",
        "<candidates>\n```json\n[[0.1, 0.2, 0.6,],]\n```\n</candidates> as you asked",
        "<candidates>[[10, 20, 60]]</candidates>",
        "<candidates>[[10%, 20 %, 60%]]</candidates>",
        '<candidates>[["0.1", "0.2", "0.6"]]</candidates>',
        '<candidates>{"candidates": [{"layer 1": 0.1, "layer 2": 0.2, "layer 3": 0.6}]}</candidates>',
        "<candidates>[[0.1, 0.2, 0.6]]",
        "<candidates>[[0.1, 0.2, 0.6], [0.3, 0.3",
        "A draft: <candidates>[[0.9, 0.9, 0.9]]</candidates> But better: <candidates>[[.1, .2, .6]]</candidates>",
        "It goes between <candidates> and </candidates>: <candidates>[[.1, .2, .6]]</candidates>",
        "<candidates>[[.1, .2, .6]]</candidates> (the <candidates> tag holds it)",
        "<think><candidates>[[0.9, 0.9, 0.9]]</candidates> no</think>[[0.1, 0.2, 0.6]]",
        "Layers [0] and [1, 2] matter [see 3]. So:\n\n[[0.1, 0.2, 0.6]]",
        "```json\n[\n  [1e-1, +0.2, 0.6]\n]\n```",
    ],
)
def test_one_candidate_is_found_however_it_is_written(text: str) -> None:
    (found,) = candidates_from(text, 3, 1)
    assert found.problem == ""
    assert found.value is not None
    assert [rate for (rate,) in found.value] == pytest.approx([0.1, 0.2, 0.6])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[0.1, 0.2]]", "2 rates for 3 layers"),
        ("<candidates>[[0.1, 0.2, 0.3, 0.4]]</candidates>", "4 rates for 3 layers"),
        ("[[0.1, NaN, 0.2]]", "'NaN' is not a number"),
        ("[[0.1, -Infinity, 0.2]]", "'-Infinity' is not a number"),
        ("[[0.1, 1e999, 0.2]]", "'1e999' is not a number"),
        ("[[0.1, null, 0.2]]", "'null' is not a number"),
        ("[[rate, ..., rate]]", "'rate' is not a number"),
        ("[[0.1 0.2 0.3]]", "1 rate for 3 layers"),
        ("[[0.1, [0.2], 0.3]]", "a rate is one number, not a list"),
        ("[[0.1, 0.2, 1e300]]", "1e+300 is no share of a layer"),
        ("[[300, 200, 100]]", "300 is no share of a layer"),
    ],
)
def test_what_is_wrong_with_a_candidate_is_said(text: str, problem: str) -> None:
    assert rates(text) == [problem]


def test_each_candidate_has_a_fate_of_its_own() -> None:
    found = candidates_from("<candidates>[[0.1, 0.2, 0.6], [1], [0.3, oops, 0.3], [0, 0, 0.9]]</candidates>", 3, 1)
    assert [one.problem for one in found] == ["", "1 rate for 3 layers", "'oops' is not a number", ""]
    assert [one.raw for one in found] == ["[0.1, 0.2, 0.6]", "[1]", "[0.3, oops, 0.3]", "[0, 0, 0.9]"]


def test_rates_beyond_the_whole_are_clipped_and_percent_are_told_from_them() -> None:
    assert rates("[0.3, 1.2, -0.4]") == [[0.3, 1.0, 0.0]]
    assert rates("[30, 120, 0]") == ["120 is no share of a layer"]
    assert rates("[30, 0, 0.5]") == [[1.0, 0.0, 0.5]]
    assert rates("[30, 0, 60]") == [[0.3, 0.0, 0.6]]


@pytest.mark.parametrize(
    "text", ["", "I am sorry.", "<candidates></candidates>", "[]", "[[], []]", "]]]]", "{}", "<html>"]
)
def test_an_answer_without_lists_proposes_nothing(text: str) -> None:
    assert candidates_from(text, 3, 1) == []
    assert candidates_from(text, 3, 2) == []
    assert parents_from(text, 3) == []


def test_pairs_of_attention_and_ffn() -> None:
    text = """<candidates>[[[0.1, 0.2], [0, 0.5], [50%, 0.3]], [[0.1, 0.2]], [0.1, 0.2, 0.3],
        [[0.1, 0.2, 0.3], [0, 1], [0, 1]], [{"attention": 0.1, "ffn": 0.2}, {"attention": 0, "ffn": 1}, [1, 0]]]
    </candidates>"""
    one, short, flat, triple, keyed = candidates_from(text, 3, 2)
    assert one.value == ((0.1, 0.2), (0.0, 0.5), (0.5, 0.3))
    assert short.problem == "1 pair for 3 layers"
    assert flat.problem == triple.problem == "every layer takes a pair [rate of attention, rate of FFN]"
    assert keyed.value == ((0.1, 0.2), (0.0, 1.0), (1.0, 0.0))
    (cut,) = candidates_from("[[[0.1, 0.2], [0, 0.5], [0.3, 0.", 3, 2)
    assert cut.problem == "2 pairs for 3 layers"


def test_parents_are_counted_from_one() -> None:
    found = parents_from("<parents>[[1, 4], [#2, 3.0], [0, 1], [5, 1], [2, 2], [1.5, 2], [1], [1, two]]</parents>", 4)
    assert [one.value for one in found] == [(0, 3), (1, 2), None, None, None, None, None, None]
    assert [one.problem for one in found[2:]] == [
        "there is no candidate 0; they are numbered 1 to 4",
        "there is no candidate 5; they are numbered 1 to 4",
        "candidate 2 cannot cross with itself",
        "there is no candidate 1.5; they are numbered 1 to 4",
        "two parents make a pair, not 1",
        "'two' is not a number",
    ]
    assert parents_from("the only one: [1, 1]", 1)[0].value == (0, 0)


SNIPPETS = ["[", "]", "{", "}", ",", "0.3", "70", "-1", "1e400", "%", "NaN", '"a":', "<candidates>", "</candidates>"]
SNIPPETS += ["<parents>", "</parents>", "<think>", "</think>", "```", " ", "\n", "#", "word", "\ud800", "\x00", "٣"]


@given(st.text() | st.lists(st.sampled_from(SNIPPETS), max_size=60).map("".join), st.integers(1, 4), st.integers(1, 2))
def test_any_text_is_survived(text: str, layers: int, width: int) -> None:
    for one in candidates_from(text, layers, width):
        assert (one.value is None) == bool(one.problem)
        assert one.raw in text
        if one.value is not None:
            assert len(one.value) == layers
            assert all(len(layer) == width and 0 <= min(layer) <= max(layer) <= 1 for layer in one.value)
    for pair in parents_from(text, layers):
        assert (pair.value is None) == bool(pair.problem)
        assert pair.value is None or all(0 <= place < layers for place in pair.value)


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=5))
def test_json_is_read_as_json(values: list[list[float]]) -> None:
    text = f"<candidates>{json.dumps(values)}</candidates>"
    assert [[rate for (rate,) in one.value or ()] for one in candidates_from(text, 3, 1)] == values


def test_nesting_without_end_and_answers_without_measure_are_survived() -> None:
    assert candidates_from("[" * 50_000 + "0.1" + "]" * 50_000, 3, 1)[0].problem == "1 rate for 3 layers"
    assert candidates_from("[" * 50_000, 3, 2) == []
    assert candidates_from("<candidates>" * 20_000 + "<think>" * 20_000, 3, 1) == []
    (long,) = candidates_from(f"[{'9' * 5000}, {'x' * 5000}]", 3, 1)
    assert len(long.raw) == MAX_RAW
    (digits,) = candidates_from(f"[{'9' * 5000}]", 1, 1)
    assert len(digits.problem) < 100
    assert all(math.isfinite(rate) for (rate,) in candidates_from("[1e-320]", 1, 1)[0].value or ())
