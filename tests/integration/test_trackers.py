"""Trackers: those that are missing, those that fail, and the real Weights & Biases without a network."""

from __future__ import annotations

import importlib.util
import io
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import GeneralTracker
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training_runs import Runs
from vopd_client import trackers
from vopd_client.config import Tracker
from vopd_client.errors import ConfigError, RunDirectoryError
from vopd_client.run_directory import RunDirectory, read_rows
from vopd_client.trackers import PACKAGES, TrackedRun, Trackers, check_trackers, make_backend, scalars, told_settings
from vopd_client.tracking import RunLog
from vopd_client.train_config import TrainConfig
from vopd_settings import SettingsError, load_settings

ROW: dict[str, Any] = {
    "step": 1, "loss": 0.5, "kl_nats": 1.25, "grad_norm": 2.0, "tokens_per_s": 10.0, "step_s": 2.0, "rollout_s": 1.0,
    "update_s": 0.5, "teacher_wait_s": 0.5,
}  # fmt: skip
EVALUATION: dict[str, Any] = {
    "step": 2, "who": "student", "exact_match": 0.25, "exact_match_by_kind": {"odd": 0.5}, "num_prompts": 4,
    "kl_nats": None, "kl_by_kind": {}, "samples": [],
}  # fmt: skip


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Trackers are opened where accelerate knows which process it is in."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def log_of(run: RunDirectory, names: list[Tracker], **settings: Any) -> tuple[RunLog, io.StringIO]:
    text = io.StringIO()
    defaults: dict[str, Any] = {"total_steps": 10, "last_step": 0, "trackers": names}
    return RunLog(run, Console(file=text, width=500), **{**defaults, **settings}), text


# ---------------------------------------------------------------- settings


def load(*flags: str) -> TrainConfig:
    required = ("--student", "s", "--prompts", "p", "--teacher-url", "grpc://a:1")
    return load_settings(TrainConfig, [*required, *flags], prog="train", env_prefix="VOPD_CLIENT_")


def test_trackers_are_named_by_commas_or_one_by_one_and_each_once() -> None:
    assert load().trackers == ["tensorboard"]
    assert load("--trackers", "wandb,tensorboard", "--trackers", "wandb").trackers == ["wandb", "tensorboard"]
    assert load("--trackers", "none").trackers == ["none"]
    with pytest.raises(SettingsError, match="none stands alone, and not with wandb"):
        load("--trackers", "none,wandb")
    with pytest.raises(SettingsError, match="input should be 'tensorboard', 'wandb', 'mlflow'"):
        load("--trackers", "tensorbord")


def test_a_tracker_whose_package_is_missing_is_refused_with_the_command_that_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_trackers(["none"])
    check_trackers(["tensorboard", "wandb"])  # both are there
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in {"comet_ml", "aim"} else there(name))
    with pytest.raises(ConfigError, match=r"^trackers: comet_ml, aim not installed here: pip install comet-ml aim$"):
        check_trackers(["tensorboard", "comet_ml", "aim"])


@pytest.mark.parametrize("name", PACKAGES)
def test_accelerate_takes_what_each_tracker_is_made_with(name: Tracker, tmp_path: Path) -> None:
    run = TrackedRun(RunDirectory(tmp_path / "a-run"), "a-project", {}, 0)
    backend = make_backend(name, run, wandb_id="abc")
    assert isinstance(backend, GeneralTracker)
    assert backend.name == name


def test_settings_are_told_without_the_passwords_of_addresses_and_keys_stay_in_their_files(tmp_path: Path) -> None:
    settings = {
        "teacher_url": ["https://me:secret@teacher:443"],
        "rollouts_url": "http://me:secret@other/v1",
        "api_key_file": str(tmp_path / "key"),
        "lora_rank": 8,
        "chat_template_kwargs": {"reasoning_effort": "low"},
        "name": None,
    }
    assert told_settings(settings) == {
        "teacher_url": '["https://***@teacher:443"]',
        "rollouts_url": "http://***@other/v1",
        "api_key_file": str(tmp_path / "key"),
        "lora_rank": 8,
        "chat_template_kwargs": '{"reasoning_effort": "low"}',
        "name": None,
    }


# ---------------------------------------------------------------- one that fails


class Failing:
    """A tracker that works until its `fails_at`th call."""

    def __init__(self, fails_at: int) -> None:
        self.fails_at = fails_at
        self.calls: list[str] = []
        self.tracker = self

    def _call(self, what: str) -> None:
        self.calls.append(what)
        if len(self.calls) >= self.fails_at:
            raise ConnectionError("no route\nto host")

    def start(self) -> None:
        self._call("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._call("settings")

    def log(self, values: dict[str, float], step: int) -> None:
        self._call(f"log {step}")

    def finish(self) -> None:
        self._call("finish")


@pytest.mark.parametrize(
    ("fails_at", "what", "num_calls"), [(1, "start", 1), (2, "start", 2), (4, "log", 4), (6, "finish", 6)]
)
def test_a_tracker_that_fails_is_told_of_once_and_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, what: str, num_calls: int
) -> None:
    failing, real = Failing(fails_at), trackers.make_backend
    monkeypatch.setattr(
        trackers, "make_backend",
        lambda name, run, **rest: failing if name == "mlflow" else real(name, run, **rest),
    )  # fmt: skip
    run = RunDirectory(tmp_path)
    log, text = log_of(run, ["mlflow", "tensorboard"])
    with log:
        for step in (1, 2, 3):
            log.step({**ROW, "step": step})
    told = [line for line in text.getvalue().splitlines() if "tracker" in line]
    assert told == [f"tracker mlflow failed to {what}: no route to host; the run goes on without it, see metrics.jsonl"]
    assert len(failing.calls) == num_calls
    assert [row["step"] for row in read_rows(run.metrics_file)] == [1, 2, 3]
    assert list(run.tensorboard.iterdir())  # the other one is not touched


def test_other_processes_open_none(tmp_path: Path) -> None:
    log, _ = log_of(RunDirectory(tmp_path), ["tensorboard", "wandb"], enabled=False)
    with log:
        log.step(ROW)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_and_words_are_not_told() -> None:
    told: list[dict[str, float]] = []
    row = {
        "step": 3,
        "loss": float("nan"),
        "kl_nats": 1.0,
        "who": "student",
        "is_on": True,
        "by_kind": {"a": 2, "b": None},
    }
    assert scalars("train", {**row, "loss": 1}) == {"train/loss": 1, "train/kl_nats": 1.0, "train/by_kind/a": 2}
    opened = Trackers(["mlflow"], None, print)  # type: ignore[arg-type]
    opened._open["mlflow"] = type("Backend", (), {"log": lambda self, values, step: told.append(values)})()
    opened.log(scalars("train", row), 3)
    assert told == [{"train/kl_nats": 1.0, "train/by_kind/a": 2}]


# ---------------------------------------------------------------- Weights & Biases, offline


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Where every connection to the outside would arrive: W&B's server and every proxy are this socket."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        made: list[object] = []

        def accept() -> None:
            while True:
                try:
                    connection, address = server.accept()
                except OSError:
                    return
                connection.close()
                made.append(address)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        here = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, here)
        yield made
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.fixture
def offline(connections: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    wandb.teardown()  # what another test has read of the environment
    yield connections
    wandb.teardown()


def records(directory: Path) -> dict[str, list[Any]]:
    """What the offline runs in a run's directory hold, in the order in which they began, by W&B's own reader."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    found: dict[str, list[Any]] = {"history": [], "config": [], "run": []}
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        store = DataStore()
        store.open_for_scan(str(path))
        try:
            while (data := store.scan_data()) is not None:
                record = wandb_internal_pb2.Record()
                record.ParseFromString(data)
                match record.WhichOneof("record_type"):
                    case "history":
                        items = record.history.item
                        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                        found["history"].append(row)
                    case "config":
                        found["config"] += [{item.key: json.loads(item.value_json)} for item in record.config.update]
                    case "run":
                        found["run"].append((record.run.run_id, record.run.project, record.run.display_name))
        finally:
            store._fp.close()
    return found


def test_wandb_offline_holds_what_metrics_jsonl_holds_and_reaches_for_no_network(
    tmp_path: Path, offline: list[object]
) -> None:
    run = RunDirectory(tmp_path / "a-run")
    run.path.mkdir()
    (tmp_path / "key").write_text("id.the-secret-of-the-key")
    settings = {"lora_rank": 8, "api_key_file": str(tmp_path / "key"), "teacher_url": ["https://me:password@a:1"]}
    log, text = log_of(run, ["wandb"], tracker_project="a-project", settings=settings)
    with log:
        for step in (1, 2, 3):
            log.step({**ROW, "step": step, "loss": 1 / step, "kl_nats": float("nan") if step == 2 else 2.0 * step})
            if step == 2:
                log.evaluation(EVALUATION)
    assert "failed" not in text.getvalue()
    found = records(run.path)
    [(run_id, project, name)] = found["run"]
    assert (project, name) == ("a-project", "a-run")
    assert json.loads(run.wandb_file.read_text()) == {"run_id": run_id, "last_step": 3}
    history = {row["_step"]: {key: value for key, value in row.items() if key[0] != "_"} for row in found["history"]}
    expected = {
        row["step"]: {f"train/{key}": value for key, value in row.items() if key != "step" and value is not None}
        for row in read_rows(run.metrics_file)
    }
    expected[2] |= {
        "eval_student/exact_match": 0.25, "eval_student/exact_match_by_kind/odd": 0.5, "eval_student/num_prompts": 4,
    }  # fmt: skip
    assert history == expected
    assert {"lora_rank": 8} in found["config"]
    assert {"teacher_url": '["https://***@a:1"]'} in found["config"]
    for path in run.path.rglob("*"):
        assert path.is_dir() or not any(secret in path.read_bytes() for secret in (b"the-secret", b"me:password"))
    assert offline == []


def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_no_step_is_told_twice(
    tmp_path: Path, offline: list[object]
) -> None:
    run = RunDirectory(tmp_path)
    log, _ = log_of(run, ["wandb"])
    with log:
        for step in (1, 2, 3):
            log.step({**ROW, "step": step, "loss": 1.0})
    for first, last in ((2, 3), (3, 5)):  # a start that is cut off before it comes to anything new, and another
        log, text = log_of(run, ["wandb"], last_step=first - 1)
        with log:
            for step in range(first, last + 1):
                log.step({**ROW, "step": step, "loss": 7.0})
        assert "failed" not in text.getvalue()
    found = records(run.path)
    assert len(found["run"]) == 3
    assert len(set(found["run"])) == 1
    told = [(row["_step"], row["train/loss"]) for row in found["history"]]
    assert told == [(1, 1), (2, 1), (3, 1), (4, 7), (5, 7)]
    assert offline == []


def test_a_damaged_note_of_the_wandb_run_is_refused_and_not_forgotten(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.wandb_file.write_text("{")
    log, _ = log_of(run, ["wandb"])
    with pytest.raises(RunDirectoryError, match=r"wandb_run\.json is damaged"):
        log.__enter__()


@pytest.mark.usefixtures("fresh_process_state", "no_report")
def test_a_whole_run_that_went_on_is_one_wandb_run_with_the_numbers_of_metrics_jsonl(
    runs: Runs, offline: list[object]
) -> None:
    settings = {"trackers": ["wandb", "tensorboard"], "eval_prompts": str(runs.models / "prompts.jsonl")}
    settings |= {"schedule": "constant", "tracker_project": "a-project"}
    assert runs.train(**settings, steps=2) == 0
    assert runs.train(**settings, steps=4, resume=True) == 0
    directory = runs.directory()
    found = records(directory.path)
    assert {(project, name) for _, project, name in found["run"]} == {("a-project", "run")}
    assert len(found["run"]) == 2
    assert len({run_id for run_id, *_ in found["run"]}) == 1
    told: dict[int, dict[str, Any]] = {}
    for row in found["history"]:
        told.setdefault(row["_step"], {}).update({key: value for key, value in row.items() if key[0] != "_"})
    expected: dict[int, dict[str, float]] = {}
    for row in read_rows(directory.metrics_file):
        expected.setdefault(row["step"], {}).update(scalars("train", row))
    for row in read_rows(directory.evals_file):
        expected.setdefault(row["step"], {}).update(scalars(f"eval_{row['who']}", row))
    assert told == expected
    assert sorted(told) == [0, 1, 2, 3, 4]
    events = EventAccumulator(str(directory.tensorboard)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert (
        "| tracker_project | a-project |"
        in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    )
    assert offline == []
