"""What vLLM is asked for, and which requests must not read its prefix cache."""

from __future__ import annotations

import numpy as np
import pytest

from vopd_server.engines.vllm_arguments import check_engine_args
from vopd_server.engines.vllm_requests import RecentOpenings, opening_length, scoring_arguments, token_id_columns
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
    assert scoring_arguments(request([1], [7]), has_token_ids=False) == {"prompt_logprobs": 0}


@pytest.mark.parametrize("has_token_ids", [False, True])
def test_the_teachers_top_k_is_asked_for_by_number(has_token_ids: bool) -> None:
    asked = scoring_arguments(request([1], [7], TeacherTopK(5)), has_token_ids=has_token_ids)
    assert asked == {"prompt_logprobs": 5}


def test_a_support_that_the_runner_lacks_is_refused() -> None:
    candidates = Candidates(np.array([1]), np.array([1]))
    with pytest.raises(UnsupportedError, match="candidates"):
        scoring_arguments(request([1], [7], candidates), has_token_ids=False)
    with pytest.raises(UnsupportedError, match="hidden_states"):
        scoring_arguments(request([1], [7], HiddenStates()), has_token_ids=True)


@pytest.mark.parametrize(("context_length", "end"), [(1, 8), (7, 8), (8, 8), (9, 16), (16, 16)])
def test_an_opening_ends_on_the_first_block_boundary_at_or_behind_the_context(context_length: int, end: int) -> None:
    assert opening_length(context_length, 8) == end


class TestRecentOpenings:
    """Blocks of 4 tokens."""

    context = (1, 2, 3, 4, 5, 6)  # two tokens short of a boundary

    def meet(self, openings: RecentOpenings, completion: list[int], **salt: str) -> bool:
        return openings.meet(request(list(self.context), completion), **salt)

    def test_the_second_completion_that_shares_an_opening_does_not_read_the_cache(self) -> None:
        openings = RecentOpenings(block_size=4)
        assert not self.meet(openings, [7, 8, 9])
        assert self.meet(openings, [7, 8, 1, 1])

    def test_completions_that_differ_before_the_boundary_read_it(self) -> None:
        openings = RecentOpenings(block_size=4)
        assert not self.meet(openings, [7, 8, 9])
        assert not self.meet(openings, [7, 9, 9])

    def test_a_completion_that_ends_before_the_boundary_neither_leaves_nor_finds_an_opening(self) -> None:
        openings = RecentOpenings(block_size=4)
        assert not self.meet(openings, [7])
        assert not self.meet(openings, [7])
        assert not self.meet(openings, [7, 8, 9])

    def test_a_completion_that_ends_on_the_boundary_leaves_an_opening_and_finds_none(self) -> None:
        openings = RecentOpenings(block_size=4)
        assert not self.meet(openings, [7, 8])
        assert not self.meet(openings, [7, 8])  # vLLM computes the last token in any case
        assert self.meet(openings, [7, 8, 9])

    def test_a_context_that_ends_on_a_boundary_shares_its_opening_with_all_its_completions(self) -> None:
        openings = RecentOpenings(block_size=6)
        assert not self.meet(openings, [7, 8])
        assert self.meet(openings, [9, 9])

    def test_other_contexts_and_other_salts_share_nothing(self) -> None:
        openings = RecentOpenings(block_size=4)
        assert not self.meet(openings, [7, 8, 9])
        assert not openings.meet(request([2, 2, 3, 4, 5, 6], [7, 8, 9]))
        assert not self.meet(openings, [7, 8, 9], salt="other")
        assert self.meet(openings, [7, 8, 9])

    def test_the_same_tokens_split_elsewhere_share_an_opening(self) -> None:
        openings = RecentOpenings(block_size=4)
        assert not self.meet(openings, [7, 8, 9])
        assert not openings.meet(request([1, 2, 3, 4, 5, 6, 7], [8]))  # ends on the boundary
        assert openings.meet(request([1, 2, 3, 4, 5, 6, 7], [8, 1]))

    def test_the_oldest_opening_is_forgotten_first(self) -> None:
        openings = RecentOpenings(block_size=4, capacity=2)
        self.meet(openings, [1, 1, 9])
        self.meet(openings, [2, 2, 9])
        self.meet(openings, [1, 1, 9])
        self.meet(openings, [3, 3, 9])
        assert self.meet(openings, [1, 1, 9])
        assert not self.meet(openings, [2, 2, 9])


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
