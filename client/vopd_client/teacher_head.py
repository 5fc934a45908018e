"""The teacher's output head on the student's side: from the hidden states that travelled to the whole distribution.

Axes: N rows, V vocabulary (rows of the teacher's head, padded ones included), H the teacher's hidden size.
Natural log, nats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vopd_client.errors import HandshakeError
from vopd_client.linear_logprobs import Logits


@dataclass(frozen=True, eq=False)
class TeacherHead:
    """What makes log-probabilities of hidden states, as the teacher itself does: in its own dtype, then in float32.

    logits: scale, soft cap and the temperature of the distillation; all V rows take part in the softmax.
    """

    weight_VH: Tensor
    bias_V: Tensor | None
    logits: Logits

    @classmethod
    def load(cls, path: Path, *, temperature: float, device: torch.device, vocab_size: int) -> TeacherHead:
        """Reads the file that the teacher sent, see GetHeadResponse in teacher.proto.

        Raises: HandshakeError for a file that is not such a head, naming what is wrong with it.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata: dict[str, str] = file.metadata() or {}
                names = set(file.keys())
                weight_VH = file.get_tensor("weight")
                bias_V = file.get_tensor("bias") if "bias" in names else None
            scale = float(metadata["logit_scale"])
            softcap = float(metadata["softcap"]) if "softcap" in metadata else None
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise HandshakeError(f"{path} is not the output head of a teacher: {error!r}") from error
        if weight_VH.ndim != 2 or len(weight_VH) != vocab_size:
            raise HandshakeError(
                f"the teacher's output head is {list(weight_VH.shape)}; it announced {vocab_size} ids that it can score"
            )
        if bias_V is not None and bias_V.shape != (vocab_size,):
            raise HandshakeError(f"the bias of the teacher's output head is {list(bias_V.shape)}, for {vocab_size} ids")
        return cls(weight_VH, bias_V, Logits(vocab_size, temperature, scale, softcap))

    def with_exchanged_ids(self, pair: tuple[int, int] | None) -> TeacherHead:
        """The head in the labels of a student whose end token has another id; see `handshake.IdSwap`."""
        if pair is None:
            return self
        order_V = torch.arange(len(self.weight_VH), device=self.weight_VH.device)
        order_V[list(pair)] = order_V[list(reversed(pair))]
        bias_V = None if self.bias_V is None else self.bias_V[order_V]
        return replace(self, weight_VH=self.weight_VH[order_V], bias_V=bias_V)

    def logprobs(self, hidden_NH: Tensor, *, num_ids: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """log q of the first `num_ids` ids, [N, num_ids], over the teacher's whole vocabulary.

        The product runs in the head's own dtype, as the teacher's does, so a bfloat16 teacher gives what it gives
        when it scores sampled tokens itself; the softmax in `dtype`.
        """
        logits_NV = self.logits_of(hidden_NH).to(dtype)
        log_z_N1 = torch.logsumexp(logits_NV, dim=-1, keepdim=True)
        return logits_NV[:, :num_ids].sub_(log_z_N1)

    def logits_of(self, hidden_NH: Tensor, *, out: Tensor | None = None) -> Tensor:
        """[N, V] float32: log q of every id, but for a constant a row. out: as in `Logits.of`."""
        return self.logits.of(hidden_NH.to(self.weight_VH.dtype), self.weight_VH, self.bias_V, out=out)
