"""Where metrics go beside metrics.jsonl: accelerate's trackers, opened by the main process alone.

metrics.jsonl is the truth. A tracker that fails is told of once and left out from there on: no step waits for it, and
none is lost. A run that goes on after a crash takes some steps again:

- TensorBoard shows the second time (`purge_step` hides the first);
- Weights & Biases goes on in the same run, whose id is kept in the run's directory, and keeps the first time: its
  steps never go back, so what it has been told of is not told again;
- for the others each start is a run of its own, of the same name, that begins with the first step it takes.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from vopd_client.config import Tracker
from vopd_client.errors import ConfigError, RunDirectoryError
from vopd_client.run_directory import RunDirectory, write_atomically

PACKAGES: Mapping[Tracker, str] = {  # what pip calls them; they are imported by accelerate's name for the tracker
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "comet_ml": "comet-ml",
    "aim": "aim",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
    "trackio": "trackio",
}
_PASSWORD_IN_URL = re.compile(r"(?<=//)[^/@\s]+@")


def check_trackers(names: Sequence[Tracker]) -> None:
    """Raises: ConfigError, with the command that installs it, for a tracker whose package is not there."""
    missing = [name for name in names if name != "none" and importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(PACKAGES[name] for name in missing)
        raise ConfigError(f"trackers: {', '.join(missing)} not installed here: pip install {packages}")


class _Backend(Protocol):
    """What is used of accelerate's GeneralTracker."""

    @property
    def tracker(self) -> Any: ...

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True)
class TrackedRun:
    """What trackers are told of a run. last_step: the last complete one before this start."""

    directory: RunDirectory
    project: str
    settings: Mapping[str, Any]
    last_step: int

    @property
    def name(self) -> str:
        return self.directory.path.resolve().name


@dataclass
class Trackers:
    """Those that work. tell: hears of one that does not."""

    names: Sequence[Tracker]
    run: TrackedRun
    tell: Callable[[str], None]
    _open: dict[Tracker, _Backend] = field(default_factory=dict)
    _wandb: WandbRun | None = None

    def open(self) -> None:
        for name in self.names:
            if name != "none":
                self._try(name, "start", partial(self._start, name))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Scalars of one step; what is not finite is left out."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for name, backend in list(self._open.items()):
            if name == "wandb" and self._wandb is not None and not self._wandb.takes(step):
                continue
            self._try(name, "log", partial(backend.log, dict(finite), step=step))
        if self._wandb is not None and "wandb" in self._open:
            self._wandb.told(step)

    def close(self) -> None:
        for name, backend in list(self._open.items()):
            self._try(name, "finish", backend.finish)
        self._open.clear()

    def _start(self, name: Tracker) -> None:
        if name == "wandb":
            self._wandb = WandbRun.of(self.run.directory)
        backend = make_backend(name, self.run, wandb_id=self._wandb.run_id if self._wandb else "")
        backend.start()
        settings = told_settings(self.run.settings)
        if name == "tensorboard":  # its own form makes another directory at every start
            rows = "".join(f"| {setting} | {value} |\n" for setting, value in settings.items())
            backend.tracker.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}", self.run.last_step)
        else:
            backend.store_init_configuration(settings)
        if name == "comet_ml":
            backend.tracker.set_name(self.run.name)
        self._open[name] = backend

    def _try(self, name: Tracker, what: str, do: Callable[[], object]) -> None:
        try:
            do()
        except RunDirectoryError:
            raise
        except Exception as error:  # noqa: BLE001  (each has errors of its own, and none may end a run)
            self._open.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            self.tell(f"tracker {name} failed to {what}: {reason}; the run goes on without it, see metrics.jsonl")


def make_backend(name: Tracker, run: TrackedRun, *, wandb_id: str) -> _Backend:
    """Accelerate's tracker of this name, not started yet; each calls the run's name by another name."""
    from accelerate import tracking

    directory = run.directory
    backend: _Backend
    match name:
        case "tensorboard":
            # what it knows of steps that are taken again is hidden by purge_step
            backend = tracking.TensorBoardTracker(
                directory.tensorboard.name, str(directory.path), purge_step=run.last_step + 1
            )
        case "wandb":
            import wandb

            backend = tracking.WandBTracker(
                run.project,
                name=run.name,
                id=wandb_id,
                resume="allow",
                dir=str(directory.path),
                settings=wandb.Settings(console="off"),  # the progress bar is drawn over one line
            )
        case "mlflow":
            backend = tracking.MLflowTracker(run.project, run_name=run.name)
        case "comet_ml":
            backend = tracking.CometMLTracker(run.project)  # named once it is there
        case "aim":
            backend = tracking.AimTracker(run.name, str(directory.path.parent), experiment=run.project)
        case "clearml":
            backend = tracking.ClearMLTracker(run.project, task_name=run.name)
        case "dvclive":
            backend = tracking.DVCLiveTracker(dir=str(directory.path / "dvclive"))
        case "swanlab":
            backend = tracking.SwanLabTracker(run.project, experiment_name=run.name, logdir=str(directory.path))
        case "trackio":
            backend = tracking.TrackioTracker(run.project, name=run.name)
        case "none":
            raise AssertionError("none is not opened")
    return backend


def told_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as every tracker takes them: lists and mappings as JSON, and no password that an address holds.

    Of keys the settings hold the files' names only.
    """

    def flat(value: Any) -> Any:
        if isinstance(value, list | dict):
            value = json.dumps(value)
        return _PASSWORD_IN_URL.sub("***@", value) if isinstance(value, str) else value

    return {name: flat(value) for name, value in settings.items()}


def scalars(group: str, row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row as `group/name`, those of its mappings as `group/name/kind`."""
    found: dict[str, float] = {}
    for name, value in row.items():
        parts = value if isinstance(value, dict) else {"": value}
        for kind, number in parts.items():
            if name != "step" and isinstance(number, int | float) and not isinstance(number, bool):
                found["/".join(part for part in (group, name, kind) if part)] = number
    return found


@dataclass
class WandbRun:
    """The run of Weights & Biases that a run directory belongs to, and the last step that it was told of."""

    directory: RunDirectory
    run_id: str
    last_step: int
    began_at: int  # last_step when this process began

    @classmethod
    def of(cls, directory: RunDirectory) -> WandbRun:
        """The one that is there, else a new one. Raises: RunDirectoryError for a file that is damaged."""
        path = directory.wandb_file
        if not path.exists():
            return cls(directory, secrets.token_hex(4), -1, -1)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return cls(directory, str(stored["run_id"]), int(stored["last_step"]), int(stored["last_step"]))
        except (ValueError, KeyError, TypeError) as error:
            raise RunDirectoryError(f"{path} is damaged: {error!r}; without it another W&B run begins") from error

    def takes(self, step: int) -> bool:
        """Whether this step is new to the run."""
        return step > self.began_at

    def told(self, step: int) -> None:
        """Writes down that it knows of this step."""
        if step > self.last_step:
            self.last_step = step
            text = json.dumps({"run_id": self.run_id, "last_step": step}) + "\n"
            try:
                write_atomically(self.directory.wandb_file, text)
            except OSError as error:
                raise RunDirectoryError(f"cannot write to {self.directory.wandb_file}: {error.strerror}") from error
