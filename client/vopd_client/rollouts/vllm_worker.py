"""Methods that vLLM's workers get for a trainer.

    --worker-extension-cls vopd_client.rollouts.vllm_worker.StudentWorker

They run inside vLLM's own processes, which need no more of this package than its base: no torch is imported here
that vLLM has not imported before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class StudentWorker:
    """Mixed into vLLM's worker, whose attributes it uses; its methods are called by name, through collective_rpc."""

    vllm_config: Any
    model_runner: Any
    device: Any

    def vopd_facts(self) -> dict[str, Any]:
        """What a trainer must know before it samples here; see `EngineFacts`."""
        import vllm

        model = self.vllm_config.model_config
        transfer = self.vllm_config.weight_transfer_config
        return {
            "vllm_version": vllm.__version__,
            "model": str(model.model),
            "architecture": str((model.hf_config.architectures or [""])[0]),
            "vocab_size": int(model.get_vocab_size()),
            "hidden_size": int(model.get_hidden_size()),
            "num_layers": int(model.hf_text_config.num_hidden_layers),
            "max_model_len": int(model.max_model_len),
            "max_logprobs": int(model.max_logprobs),
            "logprobs_mode": str(model.logprobs_mode),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(self.device.type),
            "weight_transfer": "" if transfer is None else str(transfer.backend),
            "world_size": int(self.vllm_config.parallel_config.world_size_across_dp),
        }

    def vopd_can_read(self, path: str) -> dict[str, bool]:
        """Whether this worker sees a file of the trainer's."""
        return {"can_read": Path(path).is_file()}

    def vopd_reload(self, path: str) -> dict[str, int]:
        """Takes the weights of a directory of safetensors files. The model's name stays what it was.

        Raises: FileNotFoundError before anything is changed: half a reload leaves vLLM without weights, and the next
            request would end it.
        """
        if not any(Path(path).glob("*.safetensors")):
            raise FileNotFoundError(f"no safetensors files in {path}")
        model_config = self.vllm_config.model_config
        name = model_config.model, model_config.revision, model_config.model_weights
        try:
            self.reload_weights(weights_path=path)  # type: ignore[attr-defined]
        finally:
            model_config.model, model_config.revision, model_config.model_weights = name
        return {"packed_again": self.vopd_pack_again()}

    def vopd_pack_again(self) -> int:
        """Packs output layers for the CPU again, and says how many there are.

        On a CPU the output layer multiplies by a packed copy of its weight. With tied embeddings a reload loads no
        weight of that layer's own, so vLLM leaves the copy as it was: logits would go on coming from the old one.
        Linear layers have their weights to themselves, and vLLM packs them again when these are loaded.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        packed = [
            module
            for module in self.model_runner.get_model().modules()
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear")
        ]
        for module in packed:
            module.quant_method.process_weights_after_loading(module)
        return len(packed)
