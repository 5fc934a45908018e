"""The same run with a teacher at an address: an import and three arguments differ from local_teacher.py.

python examples/trl/remote_teacher.py STUDENT TEACHER_URL PROMPTS.jsonl OUTPUT_DIR
"""

import sys

import torch
from datasets import load_dataset
from trl import DistillationConfig

from vopd_client.trl import RemoteDistillationTrainer as DistillationTrainer

student, teacher, prompts, output_dir = sys.argv[1:]

trainer = DistillationTrainer(
    model=student,
    teacher_url=teacher,
    objective="vopd-rb",
    top_k=100,
    args=DistillationConfig(
        output_dir=output_dir,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_completion_length=16,
        learning_rate=1e-3,
        logging_steps=1,
        bf16=torch.cuda.is_available(),
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=prompts, split="train"),
)
trainer.train()
trainer.save_model()
