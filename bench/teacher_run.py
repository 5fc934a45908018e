"""A whole run of `make bench-teacher`: servers up, stock asked its best way, rows played, answers compared."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from teacher_agreement import MOST_MEAN_NATS, Agreement, agreement
from teacher_clients import OurClient, Pass, StockClient
from teacher_measure import Figures, idle_cores, measured
from teacher_plan import Row, play_of, trial_play
from teacher_servers import CONTESTANTS, Contestant, Server, launch_of, running_server
from teacher_workload import Play, Workload, sequences_of
from vopd_client.types import SequenceScores

VLLM_PYTHON = Path(".venv-vllm/bin/python")
IDLE_S = 3.0  # how long it is watched what servers do that nobody asks
SETTLE_S = 1.5  # vLLM's worker spins for most of a second before it sleeps
MOST_IDLE_CORES = 0.05


class DisagreementError(RuntimeError):
    """Contestants that score the same tokens differently: their speed says nothing."""


@dataclass
class Bench:
    """Everything that is up, and what was found so far. figures, scores: by row, of every repetition and the last."""

    workload: Workload
    num_contexts: int
    rows: list[Row]
    console: Console
    servers: dict[Contestant, Server] = field(default_factory=dict)
    clients: dict[Contestant, OurClient | StockClient] = field(default_factory=dict)
    idle: dict[Contestant, float] = field(default_factory=dict)
    stock_trials: dict[int, float] = field(default_factory=dict)  # tokens/s by sequences a request
    figures: dict[Row, list[Figures]] = field(default_factory=dict)
    scores: dict[Row, list[SequenceScores]] = field(default_factory=dict)

    def label(self, row: Row) -> str:
        return row.label(self.workload.settings.group_size, self.workload.settings.k)

    def support_size(self, row: Row) -> float:
        """Ids a position, on average."""
        mass = row.support if isinstance(row.support, float) else None
        return self.workload.mean_support_size(mass, self.num_contexts)

    def play(self, contestant: Contestant, play: Play, times: int = 1) -> tuple[Figures, Pass]:
        sequences = sequences_of(self.workload, play)
        return measured(self.servers[contestant].pid, lambda: self.clients[contestant].play(sequences), times)


def start(bench: Bench, stack: ExitStack, *, model: str, scratch: Path, only: Collection[Contestant]) -> None:
    """All servers, one after the other, and a client each. Raises: ServerError."""
    settings = bench.workload.settings
    launches = {
        name: launch_of(name, model=model, k=settings.k, vllm_python=VLLM_PYTHON)
        for name in CONTESTANTS
        if name in only
    }
    for name, launch in launches.items():
        with bench.console.status(f"starting the {name} server"):
            server = stack.enter_context(running_server(name, launch, scratch / f"{name}.log", os.environ))
        bench.console.print(f"{name} is ready after {server.start_s:.0f} s")
        bench.servers[name] = server
    for name, server in bench.servers.items():
        client: OurClient | StockClient
        if name == "stock":
            client = StockClient(server.url, k=settings.k, concurrency=settings.concurrency)
        else:
            client = OurClient(server.url, window=settings.concurrency)
        stack.callback(client.close)
        bench.clients[name] = client


def try_stock(bench: Bench) -> None:
    """Finds how stock vLLM is asked best: all sequences in one request, a request a context, or a sequence each."""
    client = bench.clients["stock"]
    assert isinstance(client, StockClient)
    group_size = bench.workload.settings.group_size
    ways = list(dict.fromkeys((1, group_size, group_size * bench.num_contexts)))
    bench.play("stock", trial_play(0, num_contexts=1))  # a warm-up: the first way shall not pay for it
    for trial, per_request in enumerate(ways, start=1):
        client.sequences_per_request = per_request
        figures, _ = bench.play("stock", trial_play(trial, num_contexts=bench.num_contexts))
        bench.stock_trials[per_request] = round(figures.scored_tokens_per_s, 2)
        bench.console.print(f"stock, {per_request} sequences a request: {figures.scored_tokens_per_s:.1f} tokens/s")
    client.sequences_per_request = max(bench.stock_trials, key=bench.stock_trials.__getitem__)


def watch_idle(bench: Bench) -> None:
    """Servers run side by side: one that is busy while nobody asks it would slow the others."""
    time.sleep(SETTLE_S)
    found = idle_cores([server.pid for server in bench.servers.values()], IDLE_S)
    bench.idle = {name: round(cores, 3) for name, cores in zip(bench.servers, found, strict=True)}
    for name, cores in bench.idle.items():
        if cores > MOST_IDLE_CORES:
            bench.console.print(f"[bold red]{name} keeps {cores:.2f} cores busy while nobody asks it")


def play_rows(bench: Bench, repetition: int, name: str) -> None:
    """One repetition, every contestant in turn. Number 0 is the warm-up, which does not count."""
    num_masses = len(bench.workload.settings.masses)
    previous: Contestant | None = None
    for row in bench.rows:
        if row.contestant != previous:
            time.sleep(SETTLE_S)
        previous = row.contestant
        play = play_of(row, repetition, num_contexts=bench.num_contexts, num_masses=num_masses)
        figures, last = bench.play(row.contestant, play, row.times)
        said = f"{figures.scored_tokens_per_s:.1f} tokens/s, {figures.seconds:.3g} s a pass"
        bench.console.print(f"{name}: {row.contestant}, {bench.label(row)}: {said}")
        if repetition:
            bench.figures.setdefault(row, []).append(figures)
            bench.scores[row] = last.scores


def compare(bench: Bench, repetitions: int) -> list[Agreement]:
    """Every two engines that scored the same sequences, in the last repetition; adaptive answers with dense ones.

    Raises: DisagreementError.
    """
    dense = [row for row in bench.scores if row.contestant != "null" and not row.is_adaptive]
    found = []
    for place, row in enumerate(dense):
        for other in dense[:place]:
            if row.slot == other.slot:
                contexts = "shared" if row.sharing == "shared" else "own"
                who = f"{row.contestant} and {other.contestant}, {contexts} contexts"
                found.append(agreement(who, bench.scores[row], bench.scores[other]))
    num_masses = len(bench.workload.settings.masses)
    for row in bench.scores:
        if row.contestant == "transformers" and row.is_adaptive:
            adaptive = play_of(row, repetitions, num_contexts=bench.num_contexts, num_masses=num_masses)
            again = Play("shared", "dense", bench.num_contexts, adaptive.number)
            _, last = bench.play("transformers", again)
            found.append(agreement(f"transformers, mass {row.support} and all", bench.scores[row], last.scores))
    wrong = [one for one in found if not one.holds]
    if wrong:
        facts = "; ".join(
            f"{one.who}: {one.sampled_mean_nats:.3g} nats on sampled tokens, {one.support_mean_nats:.3g} on supports"
            for one in wrong
        )
        raise DisagreementError(f"differences above {MOST_MEAN_NATS} nats on average, so no speed is reported: {facts}")
    return found
