"""Reaching the teachers that the settings name: one, which may have a name, or several that have one each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from vopd_client.scoring import about_teacher
from vopd_client.teacher import RemoteTeacher
from vopd_client.teaching import Tell, needs_vocabulary
from vopd_client.teaching_plan import ConnectedTeacher, Teachers
from vopd_client.train_config import TrainConfig

Connect = Callable[[TrainConfig, str | None], ConnectedTeacher]

MIN_WINDOW, MAX_WINDOW = 64, 4000  # sequences in flight, where no setting says it


def settings_of_each(config: TrainConfig) -> dict[str, TrainConfig]:
    """The settings of the run for each teacher, as if it were the only one, by its name, in the order of names.

    A teacher without a name is called "".
    """
    if not config.teacher:
        return {"": config}
    key_files = {name: Path(path) for name, (path,) in config.teacher_key_file.items()}
    return {
        name: config.model_copy(
            update={
                "teacher": {},
                "teacher_key_file": {},
                "teacher_url": urls,
                "api_key_file": key_files.get(name, config.api_key_file),
            }
        )
        for name, urls in sorted(config.teacher.items())
    }


@contextmanager
def connected_teachers(config: TrainConfig, connect: Connect, device: str, tell: Tell) -> Iterator[Teachers]:
    """All teachers of the run, one after the other; closed in the end, and when one of them cannot be had.

    Raises: what `connect` raises, saying which teacher it is about.
    """
    with ExitStack() as stack:
        teachers = {}
        for name, settings in settings_of_each(config).items():
            where = settings.teacher_model or ", ".join(settings.teacher_url)
            tell(f"connecting to {f'teacher {name}' if name else 'the teacher'}: {where}")
            with about_teacher(name):
                teachers[name] = stack.enter_context(closing(connect(settings, device)))
        yield teachers


def connect_teacher(config: TrainConfig, device: str | None) -> ConnectedTeacher:
    """The teacher behind the addresses, or the one that is loaded into this process, on `device` (None: the best)."""
    if config.teacher_model is not None:
        from vopd_client.local_teacher import LocalTeacher  # brings the engine, which a remote teacher does not need

        return LocalTeacher.load(
            config.teacher_model,
            device=device,
            deterministic=config.deterministic,
            temperature=config.temperature,
            allow_full_vocab=bool(needs_vocabulary(config)),
        )
    return RemoteTeacher.connect(
        config.teacher_url,
        api_key_file=config.api_key_file,
        plaintext=config.plaintext,
        tls_ca_file=config.tls_ca_file,
        timeout_s=config.teacher_timeout_s,
        window=config.teacher_window or default_window(config),
        float_type=config.score_float_type,
        temperature=config.temperature,
    )


def default_window(config: TrainConfig) -> int:
    """Room for everything that one process has in flight, so that no request waits for another's answer."""
    in_flight = config.prompts_per_step * config.rollouts_per_prompt * (1 + config.max_staleness)
    return min(max(in_flight, MIN_WINDOW), MAX_WINDOW)
