"""Do student, teachers and settings go together? What is asked of each teacher, and what people should know first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vopd_client.alignment import SupportOwner
from vopd_client.chat_templates import chat_options
from vopd_client.config import FULL_VOCABULARY_OBJECTIVES
from vopd_client.environment import environment_of
from vopd_client.errors import ConfigError
from vopd_client.handshake import (
    ScoringPlan,
    check_capabilities,
    check_tokenizers,
    compare_end_tokens,
    end_token_swap,
)
from vopd_client.prompts import Prompt, PromptRow, render_prompts
from vopd_client.scoring import Request, about_teacher
from vopd_client.shaping import reward_floor
from vopd_client.student import LoadedStudent
from vopd_client.teaching_plan import ConnectedTeacher, Teachers, TeachingPlan
from vopd_client.train_config import TrainConfig
from vopd_client.types import SupportKind, TeacherInfo
from vopd_proto.fingerprint import token_table

Tell = Callable[[str], None]

MAX_TEACHER_TOKENS = 64  # eval_teacher auto: longer answers take too many requests that wait for one another
_SUPPORT_OWNERS: dict[SupportKind, SupportOwner] = {
    "candidates": "student",
    "teacher_top_k": "teacher",
    "sampled": "none",
    "hidden_states": "vocabulary",
}


def compare_tokenizers(student: LoadedStudent, teacher: ConnectedTeacher) -> None:
    """Raises HandshakeError that names the first differing tokens."""
    check_tokenizers(
        token_table(student.tokenizer),
        teacher_fingerprint=teacher.info.fingerprint,
        fetch_teacher_tokens=lambda: teacher.tokenizer()[0],
    )


def render(
    rows: Sequence[PromptRow],
    config: TrainConfig,
    student: LoadedStudent,
    teachers: Teachers,
    *,
    max_new_tokens: int,
) -> list[Prompt]:
    """Both sides of every row as token ids, with room left for the longest completion; the teacher's as it reads."""
    environment = environment_of(config)
    prompts: dict[int, Prompt] = {}
    for name, teacher in teachers.items():
        info = teacher.info
        with about_teacher(name):
            rendered = render_prompts(
                [row for row in rows if (row.teacher or "") == name],
                tokenizer=student.tokenizer,
                teacher_chat_template=info.chat_template,
                max_prompt_tokens=config.max_prompt_tokens,
                max_new_tokens=max_new_tokens,
                student_max_length=student.max_length,
                teacher_max_length=info.max_context_length,
                teacher_begin_id=info.begin_id,
                teacher_end_id=info.end_ids[0] if info.end_ids else None,
                chat_options=chat_options(config, environment.tools if environment else ()),
            )
        prompts |= {prompt.index: prompt for prompt in rendered}
    return [prompts[row.index] for row in rows]


def longest_completion(config: TrainConfig) -> int:
    """Tokens of a completion in training or evaluation, at most."""
    return max(config.max_new_tokens, config.eval_max_new_tokens or 0)


def needs_vocabulary(config: TrainConfig) -> str:
    """The setting that cannot do without the teacher's whole distribution; empty: there is none."""
    if config.objective in FULL_VOCABULARY_OBJECTIVES:
        return f"objective {config.objective}"
    return "eval_kl vocabulary" if config.eval_kl == "vocabulary" else ""


def plan_teaching(
    config: TrainConfig, student: LoadedStudent, teachers: Teachers, prompts: Sequence[Prompt], tell: Tell
) -> dict[str, TeachingPlan]:
    """What each teacher is asked in training and in evaluation; says where that is not what the settings say.

    prompts: all that teachers are going to see, at least one of each teacher's; of a stream those it begins with.

    Raises: HandshakeError for something that a teacher cannot do.
    """
    can_measure = config.eval_prompts is not None and all(
        "hidden_states" in teacher.info.supports for teacher in teachers.values()
    )  # one mean over all prompts is of one measure
    measures_vocabulary = config.eval_kl == "vocabulary" or (config.eval_kl == "auto" and can_measure)
    plans = {}
    for name, teacher in teachers.items():
        own = [prompt for prompt in prompts if prompt.teacher == name]
        tell_of = (lambda message, name=name: tell(f"teacher {name}: {message}")) if name else tell
        with about_teacher(name):
            training, evaluation = plan_requests(
                config, student, teacher, own, tell_of, measures_vocabulary=measures_vocabulary
            )
        plans[name] = TeachingPlan(name, teacher, training, evaluation)
    return plans


def plan_requests(
    config: TrainConfig,
    student: LoadedStudent,
    teacher: ConnectedTeacher,
    prompts: Sequence[Prompt],
    tell: Tell,
    *,
    measures_vocabulary: bool = False,
) -> tuple[Request, Request]:
    """What one teacher is asked in training and in evaluation; says where that is not what the settings say.

    measures_vocabulary: evaluations take the KL over the whole vocabulary.

    Raises: HandshakeError for something the teacher cannot do.
    """
    trains_on_vocabulary = config.objective in FULL_VOCABULARY_OBJECTIVES
    needs_support = config.objective != "opd" and not trains_on_vocabulary
    plan: ScoringPlan = check_capabilities(
        teacher.info,
        support=config.support,
        top_k=config.top_k,
        temperature=config.temperature,
        objective=config.objective if needs_support else "opd",
        max_prompt_tokens=max((len(prompt.teacher_ids) for prompt in prompts), default=1),
        max_new_tokens=longest_completion(config),
        deterministic=config.deterministic,
        needs_vocabulary=needs_vocabulary(config),
    )
    main_end_id = student.tokenizer.eos_token_id
    end_tokens = compare_end_tokens(
        sorted(student.end_ids, key=lambda index: (index != main_end_id, index)),
        teacher.info.end_ids,
        describe=lambda index: f"{student.tokenizer.convert_ids_to_tokens(index)} (id {index})",
    )
    if end_tokens.message:
        nothing_to_map = config.end_token == "map" and end_tokens.swap is None
        how = "nothing to map" if nothing_to_map else f"end_token is {config.end_token}"
        tell(f"end tokens: {end_tokens.message}; {how}")
    if plan.message:
        tell(f"support: {plan.message}")
    swap = end_token_swap(end_tokens, config.end_token)
    drop_end_ids = end_tokens.unknown_to_teacher if config.end_token == "drop" else frozenset[int]()

    def request(support: SupportKind) -> Request:
        return Request(_SUPPORT_OWNERS[support], config.top_k, swap, drop_end_ids)

    training: SupportKind = "hidden_states" if trains_on_vocabulary else plan.support if needs_support else "sampled"
    return request(training), request("hidden_states" if measures_vocabulary else plan.support)


def introduce(
    config: TrainConfig,
    student: LoadedStudent,
    plans: Mapping[str, TeachingPlan],
    prompts: Sequence[Prompt],
    eval_prompts: Sequence[Prompt],
) -> list[str]:
    """Who teaches whom what: a line for each teacher and two more."""
    module = student.module
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    num_trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    supports = {
        "student": f"student's top {config.top_k}",
        "teacher": f"teacher's top {config.top_k}",
        "none": "none",
        "vocabulary": "the whole vocabulary",
    }
    asked_for = ", ".join(dict.fromkeys(supports[plan.request.support] for plan in plans.values()))
    return [
        *(_introduce_teacher(config, plan, prompts, eval_prompts) for plan in plans.values()),
        f"student: {config.student}, {num_parameters:,} parameters, {num_trained:,} of them trained; "
        f"{module.num_shared_ids} ids shared with the teacher{'s' if len(plans) > 1 else ''}",
        f"objective: {config.objective}, support: {asked_for}; {_how_many(config, len(prompts))}, "
        f"{len(eval_prompts)} held out; {config.steps} steps of {config.prompts_per_step} prompts x "
        f"{config.rollouts_per_prompt} rollouts",
    ]


def _how_many(config: TrainConfig, num_prompts: int) -> str:
    return f"a stream that begins with {num_prompts} prompts" if config.stream_prompts else f"{num_prompts} prompts"


def _introduce_teacher(
    config: TrainConfig, plan: TeachingPlan, prompts: Sequence[Prompt], eval_prompts: Sequence[Prompt]
) -> str:
    info = plan.teacher.info
    who = f"{info.model_id} ({info.engine} {info.engine_version}, {info.dtype}, revision {info.model_revision})"
    if not plan.name:
        return f"teacher: {who}"
    own, held_out = (sum(prompt.teacher == plan.name for prompt in some) for some in (prompts, eval_prompts))
    return f"teacher {plan.name}: {who}; {_how_many(config, own)}, {held_out} held out"


def bias_warnings(config: TrainConfig) -> list[str]:
    """Settings under which the gradient is not the unbiased one, and by what."""
    warnings = []
    if config.reward_clip_lambda is not None:
        warnings.append(
            f"reward_clip_lambda {config.reward_clip_lambda:g} is biased: rewards end at "
            f"{reward_floor(config.reward_clip_lambda):.2f} nats (reward_clipped_fraction says how many would be lower)"
        )
    if config.advantage_clip is not None:
        warnings.append(
            f"advantage_clip {config.advantage_clip:g} is biased (advantage_clipped_fraction says how much)"
        )
    if config.cut_completions == "mask":
        warnings.append(
            "cut_completions mask is biased: completions of max_new_tokens are not learned from "
            "(cut_masked_fraction says how many)"
        )
    if config.objective == "topk-kl":
        warnings.append("topk-kl is biased: mass outside the support is not seen (left_out_mass_mean says how much)")
    if config.lora_dropout > 0:
        warnings.append(
            f"lora_dropout {config.lora_dropout:g}: the student that learns is not quite the one that sampled "
            "(logprob_mismatch_nats says by how much)"
        )
    if config.score_float_type != "float32":
        relative = 2.0**-8 if config.score_float_type == "bfloat16" else 2.0**-11
        warnings.append(
            f"score_float_type {config.score_float_type}: a score of -10 nats is rounded by up to {10 * relative:.3f}"
        )
    return [f"warning: {warning}" for warning in warnings]


def measures_teacher(config: TrainConfig, info: TeacherInfo) -> bool:
    """Whether the teacher's own exact match is measured in evaluations.

    Raises: ConfigError when it is asked for, and this teacher cannot say what it would write itself.
    """
    can = "teacher_top_k" in info.supports
    if config.eval_teacher == "yes" and not can:
        raise ConfigError(f"eval_teacher yes: teacher {info.model_id} has no top-k of its own to write with")
    length = config.eval_max_new_tokens or config.max_new_tokens
    return config.eval_teacher == "yes" or (config.eval_teacher == "auto" and can and length <= MAX_TEACHER_TOKENS)
