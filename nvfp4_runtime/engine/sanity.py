"""A prompt through the whole model before the first request: does what comes out make sense?

Sound for a model that was never trained, too. What is asked for: logits that are numbers and differ from each other;
and the same logits whether tokens come all at once or one by one, which takes two different paths through attention,
cache and batching.
"""

from __future__ import annotations

from torch import Tensor

from nvfp4_runtime.engine.messages import EngineInfo, Submit
from nvfp4_runtime.engine.request import Request
from nvfp4_runtime.engine.runner import ModelRunner
from nvfp4_runtime.engine.scheduler import Schedule, Scheduled
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.self_test import FLAG
from nvfp4_runtime.sampling.params import SamplingParams

NUM_TOKENS = 6
# Of a row's spread: rounding to BF16 in every layer costs some 1 %, an expert chosen by a hair or not some 10 %,
# a wrong mask or slot 100 %.
MOST_DIFFERENCE = 0.3


def check_sanity(runner: ModelRunner, info: EngineInfo) -> None:
    """Raises KernelError saying what makes no sense. Writes to block 1 of the cache, which nobody has yet."""
    count = min(NUM_TOKENS, info.max_model_len, info.block_size, info.max_num_batched_tokens)
    tokens = [(7919 * (i + 1)) % info.vocab_size for i in range(count)]
    request = Request(Submit("sanity", tokens, SamplingParams(max_tokens=1), 0.0), 0, (), count + 1)
    request.block_ids = [1]

    def logits(start: int, stop: int) -> Tensor:
        step = Schedule((Scheduled(request, start, stop - start),))
        return runner.logits(step, [range(stop - start)]).float().cpu().clone()

    at_once = logits(0, count)
    if not bool(at_once.isfinite().all()):
        raise _nonsense("its logits are not all finite numbers")
    spread = at_once.std(dim=1)
    if not bool((spread > 0).all()):
        raise _nonsense("every token is as likely as any other")
    if count > 2:
        logits(0, count - 2)  # recurrent states stand where the next token finds them
    for i in range(count - 2, count) if count > 2 else ():
        alone = logits(i, i + 1)
        difference = float((alone[0] - at_once[i]).square().mean().sqrt() / spread[i])
        if not difference <= MOST_DIFFERENCE:
            raise _nonsense(
                f"decoding token {i} gives logits {difference:.2f} standard deviations from what prefill gives"
            )


def _nonsense(what: str) -> KernelError:
    return KernelError(
        f"self-test: a prompt of {NUM_TOKENS} tokens shows that the model does not work: {what}; "
        f"check the checkpoint with nvfp4 inspect, try --backend reference, or {FLAG} to start all the same"
    )
