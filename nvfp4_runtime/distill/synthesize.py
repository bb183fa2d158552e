"""Text from the teacher itself: completions sampled by our own engine, where its training data is not at hand."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvfp4_runtime.distill import state
from nvfp4_runtime.distill.data import lines
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.llm import LLM
from nvfp4_runtime.sampling.params import SamplingParams
from nvfp4_runtime.text.chat_template import ChatTemplate, render_to_ids
from nvfp4_runtime.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BATCH = 32  # requests at a time; a killed run loses at most these
# Asked in the teacher's chat template when no prompts are given, in turn; the seed makes each answer another.
TOPICS = (
    "the history of a city of your choice", "how bread is made", "a famous scientist and her work", "the water cycle",
    "why empires fall", "a short story about a lighthouse", "how computers store numbers", "the rules of football",
    "a letter to an old friend", "the causes of a war of your choice", "how birds migrate", "the life of a composer",
    "what a good essay looks like", "a river and the towns along it", "how vaccines work", "a dialogue of two farmers",
    "the invention of printing", "how to learn a language", "a ship's journey", "the planets of the solar system",
    "an album or a film and how it was received", "a castle and who lived in it", "how a law is made", "a storm at sea",
)  # fmt: skip
ASKS = ("Write a few paragraphs about {}.", "Explain {} in detail.", "Write an encyclopaedia article on {}.")


def synthesize(
    folder: Path,
    count: int,
    out: Path,
    *,
    prompts: Sequence[str] = (),
    max_tokens: int = 512,
    seed: int = 0,
    **options: Any,
) -> Path:
    """`count` completions of the model in `folder`, temperature 1, as a .jsonl file of {"prompt", "completion"}.

    prompts  what is asked, in turn, in the chat template where there is one; none: TOPICS
    A file that an earlier run left unfinished is gone on with. Raises ConfigError, and what loading raises.
    """
    if count < 1:
        raise ConfigError(f"expected at least 1 completion, found {count}", "--synthesize")
    done = _lines(out)
    if len(done) >= count:
        return out
    tokenizer, template = Tokenizer.load(folder), ChatTemplate.load(folder)
    asked = list(prompts) or [ask.format(topic) for ask in ASKS for topic in TOPICS]
    llm = LLM(folder, max_num_seqs=BATCH, seed=seed, **options)
    while len(done) < count:
        numbers = range(len(done), min(count, len(done) + BATCH))
        texts = [asked[n % len(asked)] for n in numbers]
        rendered = [_render(text, tokenizer, template) for text in texts]
        room = llm.info.max_model_len - max(len(ids) for _, ids in rendered)
        length = min(max_tokens, room)
        params = [SamplingParams(temperature=1.0, max_tokens=length, seed=seed * 1_000_003 + n) for n in numbers]
        answers = llm.generate([ids for _, ids in rendered], params)
        done += [
            json.dumps({"prompt": text, "completion": answer.text}, ensure_ascii=False)
            for (text, _), answer in zip(rendered, answers, strict=True)
        ]
        state.write_text(out, "\n".join(done) + "\n")
        logger.info("%d of %d completions", len(done), count)
    return out


def _lines(path: Path) -> list[str]:
    return lines(path.read_text(encoding="utf-8")) if path.exists() else []


def _render(text: str, tokenizer: Tokenizer, template: ChatTemplate | None) -> tuple[str, list[int]]:
    if template is None:
        return text, tokenizer.encode(text)
    return render_to_ids(template, tokenizer, [{"role": "user", "content": text}])


def read_prompts(source: str) -> list[str]:
    """Prompts from a file: a line each, or the "prompt" (or first message) of each line of a .jsonl file."""
    path = Path(source)
    try:
        given = [line for line in lines(path.read_text(encoding="utf-8")) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prompts {source} cannot be read: {error}", "--data") from error
    found = [_prompt(line, f"{source}:{i}") for i, line in enumerate(given, 1)] if path.suffix == ".jsonl" else given
    if not found:
        raise ConfigError(f"{source} holds no prompt; expected one a line", "--data")
    return found


def _prompt(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}", "--data") from error
    found = record.get("prompt") if isinstance(record, dict) else record
    if found is None and record.get("messages"):
        found = record["messages"][0].get("content")
    if not isinstance(found, str):
        raise ConfigError(f'{where}: expected {{"prompt": ...}} or {{"messages": [...]}}', "--data")
    return found
