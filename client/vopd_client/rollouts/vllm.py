"""Rollouts from vLLM, in this process's own engine or on a server: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from vopd_client.rollouts.base import Rollout, RolloutRequest
from vopd_client.rollouts.vllm_facts import EngineFacts
from vopd_client.rollouts.vllm_recording import Generation, rollout_of
from vopd_client.rollouts.vllm_request import DrawSettings, Generate, sampling_parameters


class RolloutEngine(Protocol):
    """vLLM, wherever it runs. `control` is how its weights are updated, see `weight_sync`."""

    @property
    def facts(self) -> EngineFacts: ...

    def generate(
        self, wanted: Sequence[Generate], *, while_waiting: Callable[[], None]
    ) -> Iterator[tuple[int, Generation]]:
        """Yields (index, what was generated) as soon as each is complete. Closing the iterator aborts the rest.

        while_waiting: called again and again; what it raises ends the wait.

        Raises: RolloutEngineError when the engine fails; RolloutEngineUnavailableError when it is gone.
        """
        ...

    def close(self) -> None: ...


class VllmSampler:
    """Implements `Sampler`. The weights are those that were pushed last; `weight_version` is their label.

    A draw is a function of the run's seed, its key and the logits. The logits' last bits depend on what else the
    engine computes at the time, so two runs do not give the same rollouts bit by bit.

    Args: support_mass: see `cut_support`.
    """

    def __init__(self, engine: RolloutEngine, settings: DrawSettings, *, support_mass: float) -> None:
        self._engine = engine
        self._settings = settings
        self._support_mass = support_mass
        self.weight_version = ""
        self.while_waiting: Callable[[], None] = lambda: None

    def sample(self, requests: Sequence[RolloutRequest], *, limits: Sequence[int] | None = None) -> Iterator[Rollout]:
        """Yields one rollout a request, each as soon as it ends, so in no particular order.

        Raises: NonFiniteError when the model's logits are NaN or infinite, RolloutEngineError and
            RolloutEngineUnavailableError when the engine fails or is gone, and what `while_waiting` raises.
        """
        settings = self._settings
        max_tokens = [settings.max_new_tokens] * len(requests) if limits is None else list(limits)
        wanted = [
            Generate(index, prompt_ids, sampling_parameters(settings, key, max_tokens=limit))
            for index, ((key, prompt_ids), limit) in enumerate(zip(requests, max_tokens, strict=True))
        ]
        generations = self._engine.generate(wanted, while_waiting=self.while_waiting)
        for index, generation in generations:
            key, prompt_ids = requests[index]
            yield rollout_of(
                generation,
                key,
                prompt_ids,
                end_ids=settings.end_ids,
                num_shared_ids=settings.num_shared_ids,
                max_tokens=max_tokens[index],
                support_mass=self._support_mass,
                weight_version=self.weight_version,
            )
