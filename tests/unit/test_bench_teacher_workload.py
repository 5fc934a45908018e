"""The workload of `make bench-teacher`: its file, and the sequences that are made of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from small_workload import MASSES, C, G, K, P, make_workload
from teacher import ROLLOUTS
from teacher_plan import NUM_TRIAL_PASSES, play_of, rows_of, trial_play
from teacher_servers import CONTESTANTS
from teacher_workload import (
    FIRST_BLOCK,
    Play,
    Workload,
    WorkloadError,
    check_first_blocks,
    load_workload,
    save_workload,
    sequences_of,
)
from vopd_client.types import Candidates, TeacherTopK


@pytest.fixture(scope="module")
def workload() -> Workload:
    return make_workload()


# ---------------------------------------------------------------- the workload file


def test_a_workload_comes_back_as_it_was_saved_and_is_the_same_bytes_twice(workload: Workload, tmp_path: Path) -> None:
    one, other = tmp_path / "one.npz", tmp_path / "other.npz"
    save_workload(one, workload)
    save_workload(other, workload)
    found = load_workload(one)
    assert found.settings == workload.settings
    for name in ("contexts_PC", "completions_NT", "support_ids_NTK", "counts_MNT"):
        np.testing.assert_array_equal(getattr(found, name), getattr(workload, name))
    assert one.read_bytes() == other.read_bytes()


def test_the_recorded_workload_is_what_the_bars_are_about() -> None:
    recorded = load_workload(ROLLOUTS)
    settings = recorded.settings
    assert (settings.group_size, settings.context_tokens, settings.completion_tokens, settings.k) == (8, 256, 64, 100)
    assert settings.temperature == 1.0
    assert settings.masses == (0.9999, 0.99, 0.9)
    assert recorded.num_contexts >= 4
    assert ROLLOUTS.stat().st_size < 1_000_000
    assert len({completion.tobytes() for completion in recorded.completions_NT}) == len(recorded.completions_NT)
    sizes = [recorded.mean_support_size(mass, recorded.num_contexts) for mass in (None, *settings.masses)]
    assert sizes == sorted(sizes, reverse=True)
    for sharing in ("shared", "alone"):
        assert len(sequences_of(recorded, Play(sharing, "dense", recorded.num_contexts, 0))) >= 32


WRONG = {
    "one rollout too few": (
        lambda w: {"completions_NT": w.completions_NT[1:]},
        r"completions_NT is uint16 \(11, 6\); .* \(12, 6\)",
    ),
    "other ids": (lambda w: {"contexts_PC": w.contexts_PC.astype(np.int64)}, "contexts_PC is int64"),
    "an empty support": (lambda w: {"counts_MNT": w.counts_MNT * 0}, "a support of 0 to 0 ids, not 1 to 5"),
    "more than k ids": (lambda w: {"counts_MNT": w.counts_MNT + 1}, "to 6 ids, not 1 to 5"),
    "an id twice": (lambda w: {"support_ids_NTK": w.support_ids_NTK * 0}, "an id is twice"),
    "masses swapped": (lambda w: {"counts_MNT": w.counts_MNT[::-1].copy()}, "a larger mass has a smaller support"),
    "a group of nobody": (
        lambda w: {"settings": replace(w.settings, group_size=0)},
        "nothing to score",
    ),
    "no context": (lambda w: {"contexts_PC": w.contexts_PC[:0]}, "nothing to score"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_workload_that_does_not_fit_together_is_refused(workload: Workload, case: str) -> None:
    change, message = WRONG[case]
    with pytest.raises(WorkloadError, match=message):
        replace(workload, **change(workload))


def test_what_is_no_workload_file_is_refused_by_name(workload: Workload, tmp_path: Path) -> None:
    text, other, torn = tmp_path / "text.npz", tmp_path / "other.npz", tmp_path / "torn.npz"
    text.write_text("not a zip file")
    np.savez(other, contexts_PC=workload.contexts_PC)
    save_workload(torn, workload)
    torn.write_bytes(torn.read_bytes()[:400])
    for path in (text, other, torn, tmp_path / "missing.npz"):
        with pytest.raises(WorkloadError, match=f"{path.name}: not a workload: "):
            load_workload(path)
    with pytest.raises(WorkloadError, match="has no settings, completions_NT, support_ids_NTK, counts_MNT"):
        load_workload(other)


def test_a_file_whose_arrays_do_not_fit_its_settings_is_refused(workload: Workload, tmp_path: Path) -> None:
    path = tmp_path / "wrong.npz"
    save_workload(path, workload)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["counts_MNT"] = arrays["counts_MNT"][:1]
    np.savez(path, **arrays)
    with pytest.raises(WorkloadError, match=r"wrong.npz: .*counts_MNT is uint16 \(1, 12, 6\).* \(2, 12, 6\)"):
        load_workload(path)


# ---------------------------------------------------------------- sequences


def test_adaptive_candidates_are_the_first_of_the_dense_ones(workload: Workload) -> None:
    dense, adaptive = workload.candidates(5, None), workload.candidates(5, 0.5)
    np.testing.assert_array_equal(dense.ids, workload.support_ids_NTK[5].ravel())
    np.testing.assert_array_equal(adaptive.counts_T, workload.counts_MNT[1, 5])
    starts = np.cumsum(adaptive.counts_T) - adaptive.counts_T
    for row, (start, count) in enumerate(zip(starts, adaptive.counts_T, strict=True)):
        np.testing.assert_array_equal(adaptive.ids[start : start + count], workload.support_ids_NTK[5, row, :count])
    assert workload.mean_support_size(0.5, 1) == workload.counts_MNT[1, :G].mean()
    assert workload.mean_support_size(None, P) == K
    with pytest.raises(WorkloadError, match=r"mass 0.7 is not recorded; there are \[0.99, 0.5\]"):
        workload.candidates(5, 0.7)


def test_a_shared_context_is_its_groups_and_an_own_one_is_nobody_elses(workload: Workload) -> None:
    shared = sequences_of(workload, Play("shared", "dense", P, 0))
    alone = sequences_of(workload, Play("alone", "top_k", P, 0))
    assert [len({one.context_ids.tobytes() for one in shared[g * G : (g + 1) * G]}) for g in range(P)] == [1] * P
    for sequences, num_openings in ((shared, P), (alone, P * G)):
        assert len({one.context_ids[:FIRST_BLOCK].tobytes() for one in sequences}) == num_openings
        assert {len(one.context_ids) for one in sequences} == {C}
        for rollout, one in enumerate(sequences):
            np.testing.assert_array_equal(one.completion_ids, workload.completions_NT[rollout])
    for rollout, one in enumerate(alone):  # the group's context, turned: one token of it gave way
        group = workload.contexts_PC[rollout // G].tolist()
        assert len(set(one.context_ids.tolist()) - set(group)) == 1
    assert all(isinstance(one.support, Candidates) for one in shared)
    assert all(one.support == TeacherTopK(K) for one in alone)


def test_no_two_measurements_of_a_server_have_a_context_in_common(workload: Workload) -> None:
    plays = [trial_play(trial, num_contexts=P) for trial in range(NUM_TRIAL_PASSES)]
    rows = rows_of(MASSES)
    for contestant in ("stock", "transformers"):
        own = [row for row in rows if row.contestant == contestant]
        all_of_it = plays + [
            play_of(row, repetition, num_contexts=P, num_masses=len(MASSES)) for repetition in range(4) for row in own
        ]
        openings = [
            {one.context_ids[:FIRST_BLOCK].tobytes() for one in sequences_of(workload, play)} for play in all_of_it
        ]
        assert len(set().union(*openings)) == sum(map(len, openings))


def test_contestants_score_the_same_sequences_in_a_repetition(workload: Workload) -> None:
    rows = {(row.contestant, row.sharing, row.support): row for row in rows_of(MASSES)}
    for sharing in ("shared", "alone"):
        played = [
            sequences_of(workload, play_of(rows[key], 2, num_contexts=2, num_masses=len(MASSES)))
            for key in (("stock", sharing, "top_k"), ("vllm", sharing, "top_k"), ("transformers", sharing, "dense"))
        ]
        contexts = [[one.context_ids.tobytes() for one in sequences] for sequences in played]
        assert contexts[0] == contexts[1] == contexts[2]


def test_more_contexts_than_there_are_and_contexts_that_share_an_opening_are_refused(workload: Workload) -> None:
    with pytest.raises(WorkloadError, match="4 contexts asked for; the workload has 3"):
        sequences_of(workload, Play("shared", "dense", P + 1, 0))
    same = replace(workload, contexts_PC=np.full_like(workload.contexts_PC, 7))
    assert sequences_of(same, Play("shared", "dense", P, 0))  # the first token tells them apart
    flat = [np.full(C, 7), np.full(C, 7)]
    with pytest.raises(WorkloadError, match="rollout 1 shares the first 16 tokens"):
        check_first_blocks(flat, 1)
    with pytest.raises(WorkloadError, match="rollout 1 has another context than its group"):
        check_first_blocks([np.arange(C), np.arange(1, C + 1)], 2)


def test_rows_are_those_of_the_contestants_asked_for() -> None:
    assert {row.contestant for row in rows_of(MASSES)} == set(CONTESTANTS)
    assert {row.contestant for row in rows_of(MASSES, ["null", "vllm"])} == {"null", "vllm"}
    assert len(set(rows_of(MASSES))) == len(rows_of(MASSES))
    labels = [row.label(8, 100) for row in rows_of(MASSES) if row.contestant == "transformers"]
    assert labels == [
        "G = 8, the student's 100",
        "G = 1, the student's 100",
        "G = 8, the student's for 0.99",
        "G = 8, the student's for 0.5",
    ]
