"""Text from the teacher itself: completions sampled by our own engine, where its training data is not at hand."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvfp4_runtime.distill import state
from nvfp4_runtime.distill.data import is_chat, lines
from nvfp4_runtime.errors import ConfigError, InvalidParameterError
from nvfp4_runtime.llm import LLM
from nvfp4_runtime.sampling.params import SamplingParams
from nvfp4_runtime.text.chat_template import ChatTemplate, render_to_ids
from nvfp4_runtime.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, Any]]  # a user's words, or messages

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
    prompts: Sequence[Prompt] = (),
    max_tokens: int = 512,
    seed: int = 0,
    **options: Any,
) -> Path:
    """`count` completions of the model in `folder`, temperature 1, as a .jsonl file of {"prompt", "completion"}.

    prompts  what is asked, in turn: a user's words, in the chat template where there is one, or a chat up to one; none:
             TOPICS
    A file that an earlier run left unfinished is gone on with. Raises ConfigError, and what loading raises.
    """
    if count < 1:
        raise ConfigError(f"expected at least 1 completion, found {count}", "--synthesize")
    done = _lines(out)
    if len(done) >= count:
        return out
    tokenizer, template = Tokenizer.load(folder), ChatTemplate.load(folder)
    asked: list[Prompt] = list(prompts) or [ask.format(topic) for ask in ASKS for topic in TOPICS]
    llm = LLM(folder, max_num_seqs=BATCH, seed=seed, **options)
    while len(done) < count:
        numbers = range(len(done), min(count, len(done) + BATCH))
        rendered = [_render(asked[n % len(asked)], tokenizer, template) for n in numbers]
        text, ids = max(rendered, key=lambda each: len(each[1]))
        if (room := llm.info.max_model_len - len(ids)) < 1:
            raise ConfigError(
                f"a prompt has {len(ids)} tokens, and the teacher holds {llm.info.max_model_len}: {text[:80]!r}...; "
                "expected room for an answer",
                "--data",
            )
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
    return [line for line in lines(path.read_text(encoding="utf-8")) if line] if path.exists() else []


def _render(asked: Prompt, tokenizer: Tokenizer, template: ChatTemplate | None) -> tuple[str, list[int]]:
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    try:
        if template is not None:
            return render_to_ids(template, tokenizer, messages)
        if isinstance(asked, str):
            return asked, tokenizer.encode(asked)
    except (InvalidParameterError, UnicodeError, TypeError) as error:
        raise ConfigError(f"the prompt {str(asked)[:80]!r} cannot be tokenised: {error}", "--data") from error
    raise ConfigError("prompts are chats, and the teacher has no chat template for them; give plain prompts", "--data")


def read_prompts(source: str) -> list[Prompt]:
    """Prompts from a file: a line each; of a .jsonl file a line's "prompt", or its "messages" up to the user's last."""
    path = Path(source)
    try:
        given = [(i, line) for i, line in enumerate(lines(path.read_text(encoding="utf-8")), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prompts {source} cannot be read: {error}", "--data") from error
    chats = path.suffix == ".jsonl"
    found: list[Prompt] = [_prompt(line, f"{source}:{i}") if chats else line for i, line in given]
    if not found:
        raise ConfigError(f"{source} holds no prompt; expected one a line", "--data")
    return found


def _prompt(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}", "--data") from error
    found = record.get("prompt") if isinstance(record, dict) else record
    if isinstance(found, str) and found:
        return found
    messages = record.get("messages") if isinstance(record, dict) else None
    if is_chat(messages):
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if users:
            return messages[: users[-1] + 1]
    raise ConfigError(
        f'{where}: expected {{"prompt": ...}}, or {{"messages": [{{"role": "user", "content": ...}}, ...]}}',
        "--data",
    )
