"""An objective for training loops that are not ours: the teacher is asked in the middle of the student's forward.

Axes: B sequences, S input tokens, T completion tokens, K support size, H hidden size. Natural log, nats.

Our own trainer records the support while it samples. A loop that samples in its own way does not, so it is taken from
the hidden states of the very forward that the loss is computed from: the weights are still those that sampled, the
support is a function of the state alone, and it costs one more product with the output head instead of one more
forward. The price is that the teacher's answer is waited for between forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vopd_client.alignment import BoolArray, SupportOwner
from vopd_client.baselines import Baseline, Tail, choose_baseline
from vopd_client.batch import collate
from vopd_client.config import FULL_VOCABULARY_OBJECTIVES, OURS, SETTINGS_OF_THE_PAPER, Objective
from vopd_client.errors import ConfigError
from vopd_client.handshake import (
    check_capabilities,
    check_tokenizers,
    compare_end_tokens,
    end_token_swap,
    num_shared_ids,
)
from vopd_client.interruption import StopRequest
from vopd_client.linear_logprobs import HeadInDtype
from vopd_client.losses import LossOutput, compute_loss
from vopd_client.model_files import end_token_ids
from vopd_client.output_head import hidden_states, output_head
from vopd_client.render import Prompt
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.rollouts.recall import Recalled, recall
from vopd_client.scoring import Request, SentRollout, Waiter, send
from vopd_client.student import StudentForTraining
from vopd_client.teacher_head import TeacherHead
from vopd_client.teaching import Tell
from vopd_client.teaching_plan import ConnectedTeacher
from vopd_client.train_config import TrainConfig
from vopd_proto.arrays import IntArray
from vopd_proto.fingerprint import token_table


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What `vopd-client train` calls by the same names; see `TrainConfig`.

    Raises: ConfigError for a value or a combination that there is not.
    """

    objective: Objective
    top_k: int
    support_mass: float
    tail: Tail
    baseline: Baseline | None
    temperature: float

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise ConfigError(f"objective {self.objective!r}: there are {', '.join(get_args(Objective))}")
        if self.top_k < 1:
            raise ConfigError(f"top_k {self.top_k}: a support holds at least 1 id")
        if not 0 < self.support_mass <= 1:
            raise ConfigError(f"support_mass {self.support_mass:g} is not in (0, 1]")
        if self.tail not in get_args(Tail):
            raise ConfigError(f"tail {self.tail!r}: there are {', '.join(get_args(Tail))}")
        choose_baseline(self.objective, self.baseline)

    @classmethod
    def of(
        cls,
        objective: Objective,
        *,
        top_k: int,
        support_mass: float | None,
        tail: Tail | None,
        baseline: Baseline | None,
        temperature: float,
    ) -> LossSettings:
        """None: the default that belongs to the objective, as in `TrainConfig`."""
        defaults = {name: TrainConfig.model_fields[name].default for name in SETTINGS_OF_THE_PAPER}
        defaults |= {} if objective == OURS else SETTINGS_OF_THE_PAPER
        return cls(
            objective=objective,
            top_k=top_k,
            support_mass=defaults["support_mass"] if support_mass is None else support_mass,
            tail=defaults["tail"] if tail is None else tail,
            baseline=baseline,
            temperature=temperature,
        )


@dataclass(frozen=True, slots=True, eq=False)
class SampledCompletion:
    """What the student wrote, as token ids. in_loss_T is False at tokens that are not its own, such as a tool's."""

    prompt_ids: IntArray  # [C], C >= 1
    completion_ids: IntArray  # [T], T >= 1
    in_loss_T: BoolArray
    name: str  # for error messages


@dataclass(frozen=True, slots=True, eq=False)
class RemoteLossOutput:
    """entropy_sum: the student's own, over the valid tokens, in nats. waited_s: for the teacher."""

    loss: LossOutput
    num_valid_tokens: int
    entropy_sum: Tensor
    waited_s: float


class RemoteLoss:
    """The summed loss of a batch of completions, whose scores come from a remote teacher.

    student wraps the model that is trained and owns no weights of its own. Scores that do not come within the
    teacher's time-out raise; none is ever filled in.
    """

    def __init__(
        self,
        student: StudentForTraining,
        teacher: ConnectedTeacher,
        request: Request,
        settings: LossSettings,
        *,
        pad_id: int,
        tell: Tell,
    ) -> None:
        """Use `prepare`. tell hears why the teacher keeps us waiting, once a reason."""
        self.student = student
        self.teacher = teacher
        self._request = request
        self._settings = settings
        self._pad_id = pad_id
        self._tell = tell

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        tokenizer: Any,
        teacher: ConnectedTeacher,
        settings: LossSettings,
        *,
        max_new_tokens: int,
        tell: Tell,
    ) -> RemoteLoss:
        """Checks that student, teacher and settings go together, and says what people should know of it.

        model: a transformers causal LM, plain or with LoRA; left in evaluation mode.

        Raises: HandshakeError for another tokenizer, and for what the teacher cannot do. ConfigError for a model whose
            output layer is not known here.
        """
        tokens = token_table(tokenizer)
        check_tokenizers(
            tokens,
            teacher_fingerprint=teacher.info.fingerprint,
            fetch_teacher_tokens=lambda: teacher.tokenizer()[0],
        )
        student = StudentForTraining(model)
        student.temperature = settings.temperature
        student.num_shared_ids = num_shared_ids(
            student_vocab_size=student.vocab_size, teacher_vocab_size=teacher.info.vocab_size, num_ids=len(tokens)
        )
        request = plan_request(student, tokenizer, teacher, settings, max_new_tokens=max_new_tokens, tell=tell)
        if request.support == "vocabulary":
            tell("fetching the teacher's output head, unless it is in the cache")
            student.teacher_head = TeacherHead.load(
                teacher.head_file(),
                temperature=settings.temperature,
                device=next(model.parameters()).device,
                vocab_size=teacher.info.vocab_size,
            ).with_exchanged_ids(request.swap.pair)
        return cls(student, teacher, request, settings, pad_id=tokenizer.pad_token_id or 0, tell=tell)

    def __call__(self, completions: Sequence[SampledCompletion]) -> RemoteLossOutput:
        """Forward, scores, loss; to be called inside the forward of whatever wraps the model.

        Raises: KeyboardInterrupt and TeacherError while it waits; AlignmentError and NonFiniteError as `compute_loss`.
        """
        settings, names = self._settings, [completion.name for completion in completions]
        hidden_BSH = self._hidden_states(completions)
        recalled = self._recall(completions, hidden_BSH)
        rollouts = [rollout for rollout, _ in recalled]
        waiter = Waiter(StopRequest(), {"": self.teacher}, _only_changes(self._tell))
        sent = [self._send(rollout, name) for rollout, name in zip(rollouts, names, strict=True)]
        batch = collate(
            rollouts,
            [self._request.swap.from_teacher(waiter.scores(item)) for item in sent],
            prompt_names=names,
            pad_id=self._pad_id,
            num_shared_ids=self.student.num_shared_ids,
            support=self._request.support,
            max_support=settings.top_k,
            loss_masks=[completion.in_loss_T for completion in completions],
        ).to(hidden_BSH.device)
        outputs = self.student.outputs_at(
            hidden_BSH,
            batch.row_index_BT,
            batch.completion_ids_BT,
            batch.support_ids_BTK,
            batch.support_mask_BTK,
            batch.loss_mask_BT,
            batch.teacher_hidden_BTH,
            want_kl_gradient=settings.objective == "full-kl",
        )
        entropies_BT = pad_sequence([entropy_T for _, entropy_T in recalled], batch_first=True)
        return RemoteLossOutput(
            loss=compute_loss(settings.objective, outputs, batch, tail=settings.tail, baseline=settings.baseline),
            num_valid_tokens=batch.num_valid_tokens,
            entropy_sum=torch.where(batch.loss_mask_BT, entropies_BT, 0.0).sum(),
            waited_s=waiter.waited_s,
        )

    def _hidden_states(self, completions: Sequence[SampledCompletion]) -> Tensor:
        """Of prompts and completions, padded on the right as `collate` pads them, [B, S, H]."""
        sequences = [torch.from_numpy(np.concatenate([c.prompt_ids, c.completion_ids])) for c in completions]
        device = next(self.student.parameters()).device
        return hidden_states(
            self.student.causal_lm,
            pad_sequence(sequences, batch_first=True, padding_value=self._pad_id).to(device),
            pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True).to(device),
        )

    def _recall(self, completions: Sequence[SampledCompletion], hidden_BSH: Tensor) -> list[Recalled]:
        linear = output_head(self.student.causal_lm)
        head = HeadInDtype.of(linear.weight, linear.bias, hidden_BSH)
        recalled = []
        for index, completion in enumerate(completions):
            first_row = len(completion.prompt_ids) - 1  # the last of the prompt predicts completion token 0
            recalled.append(
                recall(
                    RolloutKey(0, index, 0),
                    completion.prompt_ids,
                    completion.completion_ids,
                    hidden_BSH[index, first_row : first_row + len(completion.completion_ids)],
                    head,
                    self.student.logits,
                    top_k=self._settings.top_k,
                    support_mass=self._settings.support_mass,
                )
            )
        return recalled

    def _send(self, rollout: Rollout, name: str) -> SentRollout:
        """The teacher reads what the student read."""
        prompt = Prompt(
            index=rollout.key.prompt_index,
            source=name,
            student_ids=rollout.prompt_ids,
            teacher_ids=rollout.prompt_ids,
            answer=None,
            verifier=None,
            kind=None,
            text="",
        )
        return send(rollout, prompt, request=self._request, teacher=self.teacher)


def plan_request(
    student: StudentForTraining,
    tokenizer: Any,
    teacher: ConnectedTeacher,
    settings: LossSettings,
    *,
    max_new_tokens: int,
    tell: Tell,
) -> Request:
    """What the teacher is asked about every completion; says where that is not what the settings say.

    Raises: HandshakeError for something the teacher cannot do.
    """
    whole = settings.objective in FULL_VOCABULARY_OBJECTIVES
    needs_support = settings.objective != "opd" and not whole
    plan = check_capabilities(
        teacher.info,
        support="student",
        top_k=settings.top_k,
        temperature=settings.temperature,
        objective=settings.objective if needs_support else "opd",
        max_prompt_tokens=1,  # at least; a longer one may be refused when it is sent
        max_new_tokens=max_new_tokens,
        needs_vocabulary=f"objective {settings.objective}" if whole else "",
    )
    if needs_support and plan.message:
        tell(f"support: {plan.message}")
    main_end_id = tokenizer.eos_token_id
    end_tokens = compare_end_tokens(
        sorted(end_token_ids(student.causal_lm, tokenizer), key=lambda index: (index != main_end_id, index)),
        teacher.info.end_ids,
        describe=lambda index: f"{tokenizer.convert_ids_to_tokens(index)} (id {index})",
    )
    if end_tokens.message:
        tell(f"end tokens: {end_tokens.message}; {'nothing to map' if end_tokens.swap is None else 'mapped'}")
    owner: SupportOwner = "vocabulary" if whole else "none"
    if needs_support:
        owner = "student" if plan.support == "candidates" else "teacher"
    return Request(owner, settings.top_k, end_token_swap(end_tokens, "map"), frozenset())


def _only_changes(tell: Tell) -> Callable[[str, str], None]:
    """Says why there is no answer when the reason changes, not five times a second while it lasts."""
    last = ""

    def tell_why(reason: str, _teacher: str) -> None:
        nonlocal last
        what = reason.partition(" retrying")[0].partition(" (")[0]  # the rest counts seconds
        if what and what != last:
            tell(reason)
        last = what

    return tell_why
