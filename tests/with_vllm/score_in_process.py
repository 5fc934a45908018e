"""Scores a file of requests with VllmEngine, in a process whose environment chooses vLLM's model runner.

    python score_in_process.py MODEL_DIR REQUESTS.pickle ANSWERS.pickle ENGINE_ARGS_JSON

Both files hold what the test and this script share: a list of ScoreRequests to be scored at once, then once more;
(EngineInfo, two lists of Scores). They are pickled by and for the same test run.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
from pathlib import Path

from vopd_server.engines.vllm import VllmEngine
from vopd_server.types import EngineInfo, ScoreRequest, Scores


async def score_twice(engine: VllmEngine, requests: list[ScoreRequest]) -> tuple[EngineInfo, list[list[Scores]]]:
    try:
        await engine.start()
        rounds = [await asyncio.gather(*map(engine.score, requests)) for _ in range(2)]
        return engine.info, rounds
    finally:
        await engine.close()


def main(model: str, requests_path: str, answers_path: str, engine_args: str) -> None:
    requests = pickle.loads(Path(requests_path).read_bytes())
    engine = VllmEngine(model=model, dtype="float32", max_top_k=16, engine_args=json.loads(engine_args))
    Path(answers_path).write_bytes(pickle.dumps(asyncio.run(score_twice(engine, requests))))


if __name__ == "__main__":
    main(*sys.argv[1:])
