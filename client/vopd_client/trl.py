"""TRL's `DistillationTrainer` with a teacher at an address and our objectives; the rest stays TRL's.

    from vopd_client.trl import RemoteDistillationTrainer as DistillationTrainer

    trainer = DistillationTrainer(
        model=..., args=..., train_dataset=...,
        teacher_url="grpc://teacher:50051", objective="vopd-rb", top_k=100,  # instead of teacher_model
    )

TRL samples, accumulates, evaluates, logs and saves as ever. In its place for the loss every process sends the
completions of a microbatch to the teacher in the middle of the student's forward, see `remote_loss`; the summed loss is
divided by TRL's own count of completion tokens over the whole optimizer step. docs/trl.md has the limits.
"""

from __future__ import annotations

import logging
import textwrap
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vopd_client.baselines import Baseline, Tail
from vopd_client.config import OURS, Objective
from vopd_client.errors import ConfigError, DataError
from vopd_client.losses import mean_metrics
from vopd_client.remote_loss import LossSettings, RemoteLoss, RemoteLossOutput, SampledCompletion
from vopd_client.scoring import Traffic
from vopd_client.shaping import DIFFERENTIATED_OBJECTIVES
from vopd_client.teacher import RemoteTeacher
from vopd_client.teacher.codec import FloatTypeName

try:
    from trl import DistillationConfig, DistillationTrainer
except ImportError as error:
    raise ImportError(f"vopd_client.trl needs TRL: pip install 'trl>=1.16' ({error})") from error

logger = logging.getLogger(__name__)

# Settings of the sampling, and the values at which completions are draws from the student's own distribution.
NEUTRAL_SAMPLING: dict[str, tuple[object, ...]] = {
    "do_sample": (True,),
    "top_p": (1.0, None),
    "top_k": (0, None),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0, None),
    "num_beams": (1, None),
}


class RemoteDistillationTrainer(DistillationTrainer):  # type: ignore[misc]  # TRL has no types for mypy
    """TRL's trainer, but for where the teacher is and what is minimised.

    Positional arguments are those of `trl.DistillationTrainer`. `teacher_model` stays None; what `beta` selects there,
    `objective` selects here.

    Args:
        teacher_url: grpc://host:port or http://host:port, over TLS grpcs:// or https://; a list: replicas of one.
        objective: what is minimised, see docs/method.md.
        top_k: ids in the support of a position, at most. (`args.top_k` is a setting of the sampling.)
        support_mass, tail, baseline: as in `vopd-client train`; None: the objective's defaults.
        api_key_file, plaintext, tls_ca_file: how to reach a teacher that wants a key, or a TLS certificate.
        teacher_timeout_s: seconds without any progress of the teacher after which training ends with an error.
        score_float_type: type of the scores on the wire, float32, float16 or bfloat16.

    Raises: ConfigError for what cannot be honoured; HandshakeError for a teacher with another tokenizer, or one that
        cannot score this; TeacherUnavailableError when there is none. All before the first step.
    """

    # For TRL's model cards.
    _tag_names = ["trl", "distillation", "vopd"]  # noqa: RUF012
    _name = "vOPD"
    _paper = {  # noqa: RUF012
        "title": "KL for a KL: On-Policy Distillation with Control Variate Baseline",
        "id": "2605.07865",
        "citation": textwrap.dedent("""\
            @misc{oh2026klforakl,
                title  = {{KL for a KL: On-Policy Distillation with Control Variate Baseline}},
                author = {Oh and Song and Choi and Choi and Jo},
                year   = 2026,
                eprint = {2605.07865},
                archivePrefix = {arXiv},
            }"""),
    }

    def __init__(
        self,
        model: Any,
        teacher_model: None = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        *,
        teacher_url: str | list[str],
        objective: Objective = OURS,
        top_k: int = 100,
        support_mass: float | None = None,
        tail: Tail | None = None,
        baseline: Baseline | None = None,
        api_key_file: Path | str | None = None,
        plaintext: bool = False,
        tls_ca_file: Path | str | None = None,
        teacher_timeout_s: float = 600.0,
        score_float_type: FloatTypeName = "float32",
    ) -> None:
        check_arguments(args, teacher_model)
        temperature = DistillationConfig.temperature if args is None else args.temperature
        settings = LossSettings.of(
            objective, top_k=top_k, support_mass=support_mass, tail=tail, baseline=baseline, temperature=temperature
        )
        teacher = RemoteTeacher.connect(  # before a model is loaded: a mistake here costs no waiting
            teacher_url,
            api_key_file=None if api_key_file is None else Path(api_key_file),
            plaintext=plaintext,
            tls_ca_file=None if tls_ca_file is None else Path(tls_ca_file),
            timeout_s=teacher_timeout_s,
            float_type=score_float_type,
            temperature=temperature,
        )
        weakref.finalize(self, teacher.close)  # TRL's trainers have no end; at exit, too
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
        )
        self._check_set_up()
        self._loss = RemoteLoss.prepare(
            self.model,
            self._tokenizer,
            teacher,
            settings,
            max_new_tokens=self.max_completion_length or 1,  # None: no limit, which cannot be checked
            tell=self._tell,
        )
        self._sample_shared_ids_only()
        for warning in sampling_warnings(self.generation_kwargs, objective):
            self._tell(warning)
        self._traffic = Traffic(teacher)
        self._latest: dict[str, Tensor] = {}  # of this process's last microbatch
        self._totals: dict[str, dict[str, float]] = {"train": {}, "eval": {}}  # of all processes, since the last log

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's, which calls `_compute_loss` inside the wrapped forward; the metrics' sums are exchanged after it."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        names = sorted(self._latest)
        sums = self.accelerator.reduce(torch.stack([self._latest[name] for name in names]), "sum").tolist()
        totals = self._totals[self._mode]
        for name, value in zip(names, sums, strict=True):
            totals[name] = totals.get(name, 0.0) + value
        return result

    def _compute_loss(
        self, unwrapped_student: Any, inputs: Mapping[str, Tensor], num_items_in_batch: Tensor | float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, sum of entropies and number of tokens of one microbatch, as TRL's own method returns them."""
        assert unwrapped_student is self._loss.student.model, "the student was replaced by another module"
        names = f"completion {{}} of a microbatch of step {self.state.global_step + 1}"
        output = self._loss(sampled_completions(inputs, names))
        num_valid_tokens = output.entropy_sum.new_tensor(output.num_valid_tokens)
        self._latest = self._sums(output, num_valid_tokens)
        divisor = num_valid_tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return output.loss.loss_sum / divisor, output.entropy_sum, num_valid_tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with means over all completion tokens since the last time, under `vopd/`."""
        totals = self._totals[self._mode]
        if num_valid_tokens := totals.pop("num_valid_tokens", 0.0):
            metrics: dict[str, float | None] = {
                "teacher_wait_s": totals.pop("teacher_wait_s") / self.accelerator.num_processes,
                "teacher_bytes_per_token": totals.pop("teacher_bytes") / num_valid_tokens,
                **mean_metrics(totals, int(num_valid_tokens)),
            }
            for name, value in metrics.items():
                self._metrics[self._mode][f"vopd/{name}"] = [] if value is None else [value]  # TRL: of no values None
            totals.clear()
        super().log(logs, start_time)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _sums(self, output: RemoteLossOutput, num_valid_tokens: Tensor) -> dict[str, Tensor]:
        """What this process adds to the metrics, float32 scalars."""
        own = {"teacher_wait_s": output.waited_s, "teacher_bytes": float(self._traffic.since_last_look())}
        return {
            **{name: value.float() for name, value in output.loss.sums.items()},
            **{name: num_valid_tokens.new_tensor(value, dtype=torch.float32) for name, value in own.items()},
            "num_valid_tokens": num_valid_tokens.float(),
        }

    def _tell(self, message: str) -> None:
        if self.accelerator.is_main_process:
            logger.warning(message)

    def _check_set_up(self) -> None:
        """Raises: ConfigError for what TRL offers and this trainer does not."""
        if self._is_vlm:
            raise ConfigError("the student reads images; the teacher reads token ids only")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                "FSDP and DeepSpeed may shard the student, whose output layer is used outside its own forward here: "
                "use plain data parallelism"
            )
        sampled_at = self.generation_kwargs["temperature"]
        if sampled_at != self.temperature:
            raise ConfigError(
                f"generation_kwargs samples at temperature {sampled_at}; the loss is at {self.temperature}"
            )

    def _sample_shared_ids_only(self) -> None:
        """Rows of a padded output layer mean no token: both sides' probabilities leave them out."""
        student = self._loss.student
        padding = range(student.num_shared_ids, student.vocab_size)
        if padding:
            suppressed = sorted({*(self.generation_kwargs.get("suppress_tokens") or ()), *padding})
            self.generation_kwargs["suppress_tokens"] = self.generation_config.suppress_tokens = suppressed


def check_arguments(args: Any, teacher_model: object) -> None:
    """Raises: ConfigError for a second teacher, or another divergence than the objective's."""
    local = {"teacher_model": teacher_model}
    for name in ("teacher_model_name_or_path", "teacher_model_revision", "teacher_model_init_kwargs"):
        local[f"args.{name}"] = getattr(args, name, None)
    given = [name for name, value in local.items() if value is not None]
    if given:
        raise ConfigError(f"{' and '.join(given)} as well as teacher_url: the teacher is either here or there")
    if args is not None and args.beta != DistillationConfig.beta:
        raise ConfigError(
            f"args.beta {args.beta:g} selects another divergence: every objective here minimises the reverse KL, beta 1"
        )


def sampling_warnings(generation_kwargs: Mapping[str, Any], objective: Objective) -> list[str]:
    """Settings under which completions are no draws from the student's distribution, and what that means."""
    others = [
        f"{name} {generation_kwargs[name]}"
        for name, neutral in NEUTRAL_SAMPLING.items()
        if generation_kwargs.get(name, neutral[0]) not in neutral
    ]
    if not others or objective in DIFFERENTIATED_OBJECTIVES:
        return []
    return [f"{', '.join(others)}: completions are not drawn from the whole of the student's distribution, so that "
            f"the sampled terms of {objective} are biased"]  # fmt: skip


def sampled_completions(inputs: Mapping[str, Tensor], name: str) -> list[SampledCompletion]:
    """TRL's microbatch (prompts padded on the left, completions on the right) without its padding.

    name: with {} for the row. Raises: DataError for a prompt without a token.
    """
    arrays = {
        key: inputs[key].cpu().numpy() for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    }
    own_BT = inputs["tool_mask"].cpu().numpy() if "tool_mask" in inputs else arrays["completion_mask"]
    completions = []
    for row, own_T in enumerate(own_BT):
        is_prompt_C, is_completion_T = arrays["prompt_mask"][row] == 1, arrays["completion_mask"][row] == 1
        if not is_prompt_C.any():
            raise DataError(f"{name.format(row)} has an empty prompt: nothing predicts its first token")
        completions.append(
            SampledCompletion(
                prompt_ids=arrays["prompt_ids"][row][is_prompt_C],
                completion_ids=arrays["completion_ids"][row][is_completion_T],
                in_loss_T=own_T[is_completion_T] == 1,
                name=name.format(row),
            )
        )
    return completions
