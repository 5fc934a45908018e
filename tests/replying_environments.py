"""Environments for training runs in tests, and a tiny model that ends its turns often enough to be replied to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from tiny_model import write_tiny_model
from vopd_client.environment import Conversation


class Echo:
    """Replies to the first two turns of every trajectory, whatever was said."""

    def reply(self, conversation: Conversation) -> list[dict[str, str]]:
        if conversation.turn > 2:
            return []
        return [{"role": "user", "content": f"{conversation.turn}: {len(conversation.text)} of {conversation.answer}?"}]


class Rewarding(Echo):
    """Gives more for longer turns."""

    def reward(self, conversation: Conversation) -> float:
        return sum(len(message["content"]) for message in conversation.messages if message["role"] == "assistant") / 100


class Failing(Echo):
    """Cannot reply to the trajectories of step 3."""

    def reply(self, conversation: Conversation) -> list[dict[str, str]]:
        if conversation.trajectory.startswith("step 3,"):
            raise ConnectionError("the sandbox is gone")
        return super().reply(conversation)


def write_rows(path: Path, number: int) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"say {index}:"}], "answer": str(index), "verifier": "contains"}
        for index in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@torch.no_grad()
def write_talkative_model(directory: Path, *, seed: int, end_probability: float = 0.15) -> Path:
    """A tiny model that ends its turn at any token with about this probability."""
    write_tiny_model(directory, seed=seed, tie_word_embeddings=False)
    model = LlamaForCausalLM.from_pretrained(directory)
    end_id = model.config.eos_token_id
    torch.manual_seed(seed)
    hidden_NH = model.model(torch.randint(256, (16, 64))).last_hidden_state.flatten(0, 1)
    mean_H = hidden_NH.mean(0)
    log_z_N = model.lm_head(hidden_NH).logsumexp(-1)
    wanted = log_z_N.mean() + torch.tensor(end_probability / (1 - end_probability)).log()
    model.lm_head.weight[end_id] = mean_H * wanted / mean_H.square().sum()
    model.save_pretrained(directory)
    return directory
