"""A training run from its settings to its report: what is opened, in which order, and how it ends."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import datetime
from functools import partial

from accelerate import Accelerator
from rich.console import Console
from transformers.utils import logging as transformers_logging

from vopd_client.ending import finish_run
from vopd_client.errors import (
    AlignmentError,
    DataError,
    EnvironmentReplyError,
    NonFiniteError,
    OutOfMemory,
    RolloutEngineError,
    RolloutEngineUnavailableError,
    TeacherError,
    TeacherUnavailableError,
)
from vopd_client.interruption import Interrupted, StopRequest, stop_on_signals
from vopd_client.preparation import check_objective, load_rows, prepare_run
from vopd_client.processes import from_main_process, make_accelerator, make_deterministic
from vopd_client.provenance import provenance_of, write_provenance
from vopd_client.rollout_engine import rollout_engine
from vopd_client.run_directory import RunDirectory, claim_run_directory, run_path
from vopd_client.teachers import Connect, connect_teacher, connected_teachers
from vopd_client.trackers import check_trackers
from vopd_client.tracking import RunLog, print_line
from vopd_client.train_config import TrainConfig
from vopd_client.trainer import Trainer

EXIT_DONE, EXIT_TEACHER_GONE, EXIT_INTERRUPTED = 0, 3, 130
# What ends a run with an error after its last complete step is saved.
SAVED_FIRST = (
    *(TeacherError, RolloutEngineError, EnvironmentReplyError),
    *(DataError, NonFiniteError, AlignmentError, OutOfMemory),
)
EXIT_ENGINE_GONE = EXIT_TEACHER_GONE  # for whoever starts runs it is the same: go on later


def run_training(
    config: TrainConfig,
    *,
    console: Console | None = None,
    connect: Connect = connect_teacher,
) -> int:
    """One training run, from its settings to its report. `connect` finds the teacher that settings name; with several
    teachers it is called once for each, with the settings of a run that has this one alone.

    Returns: the exit code. 0: done. 130: interrupted, after saving. 3: a teacher was gone for longer than
        teacher_timeout_s, or the rollout engine for longer than rollouts_timeout_s, after saving.
    Raises: VopdError for everything else; what was trained until then is saved where there is anything to save.
    """
    console = console or Console()
    stop = StopRequest()
    try:
        with stop_on_signals(stop):
            return _run(config, console, stop, connect)
    except Interrupted:
        console.print("stopped before training began; nothing to save")
        return EXIT_INTERRUPTED


def _run(config: TrainConfig, console: Console, stop: StopRequest, connect: Connect) -> int:
    if config.deterministic:
        make_deterministic()
    accelerator = make_accelerator(config)
    tell = partial(print_line, console if accelerator.is_main_process else Console(quiet=True))
    if not (console.is_terminal and accelerator.is_main_process):
        transformers_logging.disable_progress_bar()
    check_objective(config)
    check_trackers(config.trackers)
    with _directory(config, accelerator) as directory, ExitStack() as still_open:
        rows = load_rows(config)  # malformed rows are reported before anything is loaded
        with connected_teachers(config, connect, str(accelerator.device), tell) as teachers:
            engine = still_open.enter_context(rollout_engine(config, tell))
            run = prepare_run(config, accelerator, directory, rows, teachers, tell, engine)
            del rows  # of a stream, its beginning: it comes again
            if accelerator.is_main_process:
                directory.begin(config.model_dump(mode="json"), last_step=run.state.step)
                write_provenance(directory.provenance_file, provenance_of(run))
            with RunLog(
                directory,
                console,
                total_steps=config.steps,
                last_step=run.state.step,
                enabled=accelerator.is_main_process,
                trackers=config.trackers,
                tracker_project=config.tracker_project,
                settings=config.model_dump(mode="json"),
            ) as log:
                exit_code = _train_to_the_end(Trainer(run, log, stop), log, stop)
    accelerator.end_training()
    return exit_code


def _directory(config: TrainConfig, accelerator: Accelerator) -> AbstractContextManager[RunDirectory]:
    """The main process claims the directory; the others may use it once it has."""
    now = datetime.now()
    path = from_main_process(
        run_path(config.output_dir, config.name, objective=config.objective, resume=config.resume, now=now)
    )
    if not accelerator.is_main_process:
        return nullcontext(RunDirectory(path))
    return claim_run_directory(path, config.model_dump(mode="json"), resume=config.resume)


def _train_to_the_end(trainer: Trainer, log: RunLog, stop: StopRequest) -> int:
    """Trains; whatever ends it early, the last complete step is saved first."""
    with stop.postponed():
        try:
            trainer.train()
            finish_run(trainer.run, trainer.state, log.show)
            return EXIT_DONE
        except Interrupted:
            trainer.save_if_newer()
            log.tell(f"interrupted after step {trainer.state.step}; {trainer.how_to_go_on}")
            return EXIT_INTERRUPTED
        except TeacherUnavailableError as error:
            trainer.save_if_newer()
            log.tell(f"the teacher is gone: {error}\nstopped after step {trainer.state.step}; {trainer.how_to_go_on}")
            return EXIT_TEACHER_GONE
        except RolloutEngineUnavailableError as error:
            trainer.save_if_newer()
            log.tell(
                f"the rollout engine is gone: {error}\nstopped after step {trainer.state.step}; {trainer.how_to_go_on}"
            )
            return EXIT_ENGINE_GONE
        except SAVED_FIRST:
            trainer.save_if_newer()
            raise
