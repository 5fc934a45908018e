"""A training script with RemoteDistillationTrainer, for tests that need it in processes of its own.

    python tests/with_trl/job.py STUDENT TEACHER_URL CONFIG PROMPTS

CONFIG, PROMPTS: JSON, DistillationConfig's arguments and a list. The main process writes what was logged of each step,
as JSON lines.
"""

from __future__ import annotations

import json
import sys

from datasets import Dataset
from transformers import TrainerCallback
from trl import DistillationConfig

from vopd_client.trl import RemoteDistillationTrainer


class WriteLogs(TrainerCallback):
    def on_log(self, args, state, control, logs, **others):
        if state.is_world_process_zero and "loss" in logs:
            sys.stdout.write(json.dumps({"step": state.global_step, **logs}) + "\n")
            sys.stdout.flush()


def main() -> None:
    student, teacher_url, config, prompts = sys.argv[1:]
    trainer = RemoteDistillationTrainer(
        student,
        args=DistillationConfig(**json.loads(config)),
        train_dataset=Dataset.from_dict({"prompt": json.loads(prompts)}),
        callbacks=[WriteLogs()],
        teacher_url=teacher_url,
        top_k=50,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
