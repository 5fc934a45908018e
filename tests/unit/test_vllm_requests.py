"""What vLLM is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from vopd_server.engines.vllm_arguments import check_engine_args
from vopd_server.engines.vllm_requests import CONTEXT_TOKENS, scoring_arguments, token_id_columns
from vopd_server.errors import ConfigError, UnsupportedError
from vopd_server.types import Candidates, HiddenStates, NoSupport, ScoreRequest, Support, TeacherTopK


def request(context: list[int], completion: list[int], support: Support | None = None) -> ScoreRequest:
    return ScoreRequest("r", np.array(context), np.array(completion), support or NoSupport())


def test_candidates_stand_behind_the_sampled_token_and_are_padded() -> None:
    support = Candidates(np.array([5, 6, 5, 9]), np.array([3, 0, 1]))
    columns = token_id_columns(request([1, 2], [7, 8, 9], support))
    assert columns.tolist() == [[7, 5, 6, 5], [8, -1, -1, -1], [9, 9, -1, -1]]


def test_positions_without_any_candidate_leave_the_sampled_column_alone() -> None:
    support = Candidates(np.empty(0, np.int64), np.zeros(2, np.int64))
    assert token_id_columns(request([1], [7, 8], support)).tolist() == [[7], [8]]


def test_given_ids_are_scored_from_the_last_context_row() -> None:
    arguments = scoring_arguments(request([1, 2, 3], [7, 8]), has_token_ids=True)
    assert arguments["prompt_logprob_start"] == 2
    assert arguments["prompt_logprob_token_ids"].tolist() == [[7], [8]]


def test_a_one_token_context_is_scored_from_row_0() -> None:
    assert scoring_arguments(request([4], [7]), has_token_ids=True)["prompt_logprob_start"] == 0


def test_a_runner_without_given_ids_is_asked_for_the_actual_tokens() -> None:
    assert scoring_arguments(request([1], [7]), has_token_ids=False)["prompt_logprobs"] == 0


@pytest.mark.parametrize("has_token_ids", [False, True])
def test_the_teachers_top_k_is_asked_for_by_number(has_token_ids: bool) -> None:
    asked = scoring_arguments(request([1], [7], TeacherTopK(5)), has_token_ids=has_token_ids)
    assert asked == {"prompt_logprobs": 5, "extra_args": {CONTEXT_TOKENS: 1}}


@pytest.mark.parametrize("has_token_ids", [False, True])
def test_every_request_says_how_far_the_prefix_cache_may_be_read(has_token_ids: bool) -> None:
    for support in (NoSupport(), TeacherTopK(5)):
        asked = scoring_arguments(request([1, 2, 3], [7], support), has_token_ids=has_token_ids)
        assert asked["extra_args"] == {CONTEXT_TOKENS: 3}


def test_a_support_that_the_runner_lacks_is_refused() -> None:
    candidates = Candidates(np.array([1]), np.array([1]))
    with pytest.raises(UnsupportedError, match="candidates"):
        scoring_arguments(request([1], [7], candidates), has_token_ids=False)
    with pytest.raises(UnsupportedError, match="hidden_states"):
        scoring_arguments(request([1], [7], HiddenStates()), has_token_ids=True)


class TestEngineArgs:
    known = ("tensor_parallel_size", "gpu_memory_utilization", "max_model_len")

    def test_known_arguments_pass(self) -> None:
        check_engine_args({"tensor_parallel_size": 2}, self.known)

    def test_an_unknown_argument_is_refused_with_the_nearest_name(self) -> None:
        with pytest.raises(ConfigError, match=r"tensor-paralel-size .* did you mean tensor_parallel_size\?"):
            check_engine_args({"tensor-paralel-size": 2}, self.known)

    def test_an_argument_like_no_other_is_refused_without_a_guess(self) -> None:
        with pytest.raises(ConfigError, match=r"xyz is not an argument of vLLM's AsyncEngineArgs$"):
            check_engine_args({"xyz": 2}, self.known)

    def test_an_argument_that_is_a_setting_here_names_the_setting(self) -> None:
        with pytest.raises(ConfigError, match="max_model_len cannot be set: use the setting max_context_length"):
            check_engine_args({"max_model_len": 5}, self.known)
