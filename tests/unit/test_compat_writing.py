"""The JSON of other protocols' answers, put together from pieces: every number and text reads back as what it was."""

from __future__ import annotations

import base64
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vopd_server.compat.numbers import json_object, number
from vopd_server.compat.scoring import TokenTexts
from vopd_server.compat.vllm_generate import npy_base64
from vopd_server.compat.vllm_logprobs import prompt_logprobs_json
from vopd_server.types import ScoreRequest, Scores, TeacherTopK


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_number_reads_back_as_the_same_float32_and_as_a_float(value: float) -> None:
    read = json.loads(number(value))
    assert isinstance(read, float)
    assert np.float32(read) == np.float32(value)


def test_minus_infinity_is_written_as_vllm_does() -> None:
    assert number(-math.inf) == "-9999.0"


@pytest.mark.parametrize(
    ("token", "text"),
    [(0, "a"), (1, '"\\'), (2, "\u0120the"), (3, "\ufffd"), (4, None), (5, None), (10**6, None)],
)
def test_a_token_s_text_is_its_entry_of_the_table_and_null_where_there_is_none(token: int, text: str | None) -> None:
    texts = TokenTexts([b"a", b'"\\', "\u0120the".encode(), b"\xff", b""])
    assert [json.loads(texts.json_of(token)) for _ in range(2)] == [text, text]


def test_an_object_holds_its_fields_and_what_is_written_already() -> None:
    assert json.loads(json_object({"a": 1, "b": None}, c="[1, 2]")) == {"a": 1, "b": None, "c": [1, 2]}
    assert json.loads(json_object({}, c="null")) == {"c": None}


def test_a_row_has_the_realised_token_first_and_its_own_log_probability() -> None:
    """Row 0: among the two best. Row 1: not."""
    request = ScoreRequest("r", np.array([7]), np.array([1, 0]), TeacherTopK(2))
    scores = Scores(
        np.array([-0.5, -3.0], np.float32),
        np.array([[-0.25, -0.5], [-0.125, -2.0]], np.float32),
        np.array([[2, 1], [3, 2]]),
    )
    first, *rows = json.loads(prompt_logprobs_json(request, scores, TokenTexts([b"a", b"b", b"c"])))
    assert first is None
    assert [list(row.items()) for row in rows] == [
        [
            ("1", {"logprob": -0.5, "rank": 2, "decoded_token": "b"}),
            ("2", {"logprob": -0.25, "rank": 1, "decoded_token": "c"}),
        ],
        [
            ("0", {"logprob": -3.0, "rank": 3, "decoded_token": "a"}),
            ("3", {"logprob": -0.125, "rank": 1, "decoded_token": None}),
            ("2", {"logprob": -2.0, "rank": 2, "decoded_token": "c"}),
        ],
    ]


def test_an_array_is_a_numpy_file() -> None:
    values_TK = np.array([[-0.5, -np.inf]], np.float32)
    read = np.load(io.BytesIO(base64.b64decode(npy_base64(values_TK), validate=True)), allow_pickle=False)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values_TK)
