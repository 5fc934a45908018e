"""The pair of models whose variance is measured, loaded and checked against each other as a training run does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vopd_client.command_config import VarianceConfig
from vopd_client.errors import ConfigError
from vopd_client.prompts import Prompt, PromptRow
from vopd_client.schedule import prompts_of_step
from vopd_client.scoring import Request
from vopd_client.student import LoadedStudent, load_student
from vopd_client.teaching import Tell, compare_tokenizers, plan_teaching, render
from vopd_client.teaching_plan import ConnectedTeacher, fit_to_teachers
from vopd_client.train_config import TrainConfig
from vopd_client.types import TeacherInfo
from vopd_client.variance_report import Owner

MAX_COMPLETED_SIZE = 1000  # K' of a teacher without hidden states, at most: some kilobytes a position


@dataclass(frozen=True)
class Pair:
    """A student and a teacher that go together, and what is asked of the teacher.

    settings: of a training run of theirs.
    """

    settings: TrainConfig
    student: LoadedStudent
    teacher: ConnectedTeacher
    prompts: list[Prompt]
    request: Request

    @property
    def completed(self) -> tuple[Owner, int] | None:
        """Whose support of how many ids the teacher's distribution is completed from; None: it is exact."""
        match self.request.support:
            case "student" | "teacher" as owner:
                return owner, self.request.top_k
            case _:
                return None


def training_settings(config: VarianceConfig) -> TrainConfig:
    """The run whose gradient is looked at, with the teacher's whole distribution; see `settings_for`."""
    shared = TrainConfig.model_fields.keys() & VarianceConfig.model_fields.keys()
    return TrainConfig(
        **{name: getattr(config, name) for name in shared},
        objective="vopd-full",
        top_k=1,  # no support is asked for
        support_mass=1.0,
        eval_kl="support",
    )


def settings_for(settings: TrainConfig, info: TeacherInfo, largest_size: int) -> TrainConfig:
    """The same, but for a teacher that gives no hidden states: then as large a support as may be.

    Raises: ConfigError when that support is smaller than the largest that is to be measured.
    """
    if "hidden_states" in info.supports:
        return settings
    size = min(info.max_support_size, MAX_COMPLETED_SIZE)
    if largest_size > size:
        raise ConfigError(
            f"support_sizes: K = {largest_size} > K' = {size}, the most ids of a position that teacher {info.model_id} "
            f"is asked for, since it gives no hidden states (its max_support_size is {info.max_support_size})"
        )
    return settings.model_copy(update={"objective": "vopd", "top_k": size})


def choose_rows(rows: Sequence[PromptRow], *, max_prompts: int, seed: int) -> list[PromptRow]:
    """The rows that a training run with this seed begins with."""
    return [rows[position] for position in prompts_of_step(seed, 1, len(rows), min(len(rows), max_prompts))]


def prepare_pair(
    config: VarianceConfig, settings: TrainConfig, rows: Sequence[PromptRow], teacher: ConnectedTeacher, tell: Tell
) -> Pair:
    """Loads the student and checks that teacher, student and prompts go together.

    Raises: ConfigError, DataError, HandshakeError.
    """
    largest = config.support_sizes[-1]
    settings = settings_for(settings, teacher.info, largest)
    student = load_student(settings.student, trust_remote_code=settings.trust_remote_code, device=settings.device)
    compare_tokenizers(student, teacher)
    teachers = {"": teacher}
    prompts = render(rows, settings, student, teachers, max_new_tokens=settings.max_new_tokens)
    plans = plan_teaching(settings, student, teachers, prompts, tell)
    plan = fit_to_teachers(student, plans, temperature=settings.temperature, head_cache=settings.head_cache, tell=tell)[
        ""
    ]
    module = student.module.eval()
    plan.fit(module)
    if largest > module.num_shared_ids:
        raise ConfigError(
            f"support_sizes: K = {largest} > {module.num_shared_ids}, the number of ids that both models have"
        )
    info = teacher.info
    tell(f"teacher: {info.model_id} ({info.engine} {info.engine_version}, {info.dtype})")
    tell(f"student: {settings.student}; {module.num_shared_ids} ids shared with the teacher")
    return Pair(settings, student, teacher, prompts, plan.request)
