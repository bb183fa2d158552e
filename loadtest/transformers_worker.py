"""transformers' `generate` behind a pipe: one JSON command per line on stdin, one JSON answer per line on stdout.

    {"prompts": [[ids], ...], "max_tokens": n}  ->  {"first_seconds": s, "last_seconds": s}

All prompts of a command have one length, so the batch needs no padding. Greedy; EOS does not end it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="local Hugging Face folder")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Answers own the real stdout; whatever libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    import torch
    import transformers

    torch.set_num_threads(args.threads)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model.to(args.device).eval()
    greedy: Any = transformers.GenerationConfig  # Any: its constructor is untyped
    model.generation_config = greedy(do_sample=False, pad_token_id=0)
    _write(
        answers,
        {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "vocab_size": model.config.vocab_size,
        },
    )
    for line in sys.stdin:
        command = json.loads(line)
        _write(answers, _generate(model, command["prompts"], command["max_tokens"]))


def _generate(model: Any, prompts: list[list[int]], max_tokens: int) -> dict[str, float]:
    import torch
    import transformers

    clock = _Clock()
    start = time.perf_counter()
    ids = torch.tensor(prompts, device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        stopping_criteria=transformers.StoppingCriteriaList([clock]),
    )
    if output.shape[1] != ids.shape[1] + max_tokens:
        raise RuntimeError(f"asked for {max_tokens} tokens, generate made {output.shape[1] - ids.shape[1]}")
    return {"first_seconds": clock.times[0] - start, "last_seconds": clock.times[-1] - start}


class _Clock:
    """A stopping criterion that never stops; `generate` calls it after each step's token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        if input_ids.is_cuda:  # the step has only been launched; the answer's time is when it is done
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _write(answers: Any, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
