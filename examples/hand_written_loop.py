"""On-policy distillation by hand: sample, score over the wire, step. Copy it and change what you like.

vopd-server serve --model MODEL
python examples/hand_written_loop.py grpc://127.0.0.1:50051 MODEL
"""

import sys

import torch

import vopd_client as vopd

COUNTRIES = ("Spain", "Poland", "Peru", "Ghana", "Nepal", "Cuba", "Chad", "Kenya")
QUESTION = "Question: What is the capital of {}?\n"
# The teacher sees these before every question, and the student does not: that is what there is to learn.
SOLVED = "".join(QUESTION.format(x) + f"Answer: {y}.\n\n" for x, y in (("France", "Paris"), ("Japan", "Tokyo")))


def train(teacher_url: str, model: str, *, steps: int = 10, draws: int = 2, learning_rate: float = 5e-5) -> list[float]:
    """Prints and returns KL(student || teacher), in nats a token, of every step."""
    student = vopd.load_student(model)
    module, tokenizer = student.module, student.tokenizer
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=0.0)
    with vopd.RemoteTeacher.connect(teacher_url) as teacher:
        vopd.compare_tokenizers(student, teacher)  # equal ids must mean equal text
        module.num_shared_ids = min(student.vocab_size, teacher.info.vocab_size, teacher.info.num_ids)
        sampler = vopd.RolloutSampler(
            module.model, num_shared_ids=module.num_shared_ids, end_ids=student.end_ids, pad_id=student.pad_id,
            max_new_tokens=12, temperature=1.0, top_k=50, support_mass=0.9999, seed=0, batch_size=16,
        )  # fmt: skip
        asked = [QUESTION.format(country) for country in COUNTRIES]
        questions = [tokenizer(text, return_tensors="np").input_ids[0] for text in asked]
        contexts = [tokenizer(SOLVED + text, return_tensors="np").input_ids[0] for text in asked]
        kl_by_step = []
        for step in range(1, steps + 1):
            rollouts, answers = [], []
            keys = [vopd.RolloutKey(step, prompt, draw) for prompt in range(len(questions)) for draw in range(draws)]
            for rollout in sampler.sample([(key, questions[key.prompt_index]) for key in keys]):
                top_ids = vopd.Candidates(rollout.support_ids, rollout.support_counts_T)
                context_ids = contexts[rollout.key.prompt_index]
                answers.append(teacher.submit(vopd.SequenceToScore(context_ids, rollout.completion_ids, top_ids)))
                rollouts.append(rollout)  # the next one is sampled while the teacher scores this one
            batch = vopd.collate(
                rollouts, [answer.result() for answer in answers], pad_id=student.pad_id,
                num_shared_ids=module.num_shared_ids, prompt_names=[COUNTRIES[r.key.prompt_index] for r in rollouts],
            ).to(next(module.parameters()).device)  # fmt: skip
            loss = vopd.losses.compute_loss("vopd-rb", module(**batch.student_inputs), batch)
            (loss.loss_sum / batch.num_valid_tokens).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            kl_by_step.append(float(loss.sums["reverse_kl"]) / batch.num_valid_tokens)
            print(f"step {step}: KL to the teacher {kl_by_step[-1]:.3f} nats a token")
    return kl_by_step


if __name__ == "__main__":
    train(*sys.argv[1:3])
