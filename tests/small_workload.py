"""A workload of bench-teacher that is small enough to look at."""

from __future__ import annotations

import numpy as np

from teacher_workload import (
    Workload,
    WorkloadSettings,
)

G, P, C, T, K = 4, 3, 40, 6, 5
MASSES = (0.99, 0.5)


def make_workload(seed: int = 0) -> Workload:
    rng = np.random.default_rng(seed)
    settings = WorkloadSettings("tiny", 1.0, seed, G, C, T, K, 64, MASSES)
    support_NTK = np.stack([[rng.choice(2000, K, replace=False) for _ in range(T)] for _ in range(P * G)])
    small_NT = rng.integers(1, K + 1, (P * G, T))
    return Workload(
        settings,
        rng.integers(0, 2000, (P, C)).astype(np.uint16),
        rng.integers(0, 2000, (P * G, T)).astype(np.uint16),
        support_NTK.astype(np.uint16),
        np.stack([np.full((P * G, T), K), small_NT]).astype(np.uint16),
    )
