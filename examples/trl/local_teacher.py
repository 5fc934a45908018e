"""On-policy distillation with TRL as it comes: the teacher is loaded beside the student.

python examples/trl/local_teacher.py STUDENT TEACHER PROMPTS.jsonl OUTPUT_DIR
"""

import sys

import torch
from datasets import load_dataset
from trl import DistillationConfig, DistillationTrainer

student, teacher, prompts, output_dir = sys.argv[1:]

trainer = DistillationTrainer(
    model=student,
    teacher_model=teacher,
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
