"""`nvfp4 eval MODEL --text FILE`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvfp4_runtime.errors import ConfigError
from server.commands import flags

if TYPE_CHECKING:
    from nvfp4_runtime.config import Numerics

NUMERICS = ("auto", "w4a16", "w4a4", "w4a8")
_MODEL = "local model folder, or `default` (SmolLM2-135M in NVFP4), or `default-bf16` (its parent)"


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser("eval", help="measure perplexity, and the distance to a teacher")
    add = parser.add_argument
    add("model", type=flags.path, metavar="MODEL", help=_MODEL)
    add("--text", type=flags.path, required=True, metavar="FILE", help="UTF-8 text to predict")
    add(
        "--teacher",
        type=flags.path,
        metavar="MODEL",
        help="the model it was made from: gives KL divergence and top-1 agreement",
    )
    add("--numerics", default="auto", metavar="LIST", help=f"one row for each of these: {', '.join(NUMERICS)}")
    add("--windows", type=int, metavar="N", help="how many windows of the text (default: 16, or as many as it has)")
    add("--window", type=int, default=1024, metavar="TOKENS", help="tokens in a window (default: %(default)s)")
    add(
        "--kv-cache-dtype",
        type=flags.kv_dtype,
        default="auto",
        metavar=f"{{{','.join(flags.KV_DTYPES)}}}",
        help="how MODEL keeps keys and values; the teacher's are as its checkpoint declares",
    )
    add("--lm-head-dtype", choices=("auto", "bf16", "fp8", "nvfp4"), default="auto", help="quantise MODEL's plain head")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="type of MODEL's activations")
    add("--backend", default="auto", help="auto, cpu or reference: asking for one runs there or fails")
    add("--threads", type=int, help="compute threads (default: the machine's cores)")
    add("--worst", type=int, default=10, metavar="N", help="positions to show that differ most (default: %(default)s)")
    add("--two-pass", action="store_true", default=None, help="never load teacher and MODEL together (by size)")
    add(
        "--scratch",
        type=flags.path,
        metavar="DIR",
        help="where two passes keep the teacher's answers (default: the system's)",
    )
    add("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    numerics = parse_numerics(args.numerics)
    if args.worst < 0:
        raise ConfigError(f"expected a count of positions, found {args.worst}", "--worst")
    for flag, value in (("--two-pass", args.two_pass), ("--scratch", args.scratch)):
        if value is not None and args.teacher is None:
            raise ConfigError(f"{flag} is about a teacher's answers, and there is no --teacher; leave it out", flag)
    from nvfp4_runtime.evaluate.evaluate import evaluate
    from nvfp4_runtime.evaluate.report import render, to_json
    from nvfp4_runtime.evaluate.scorer import Side, find_model
    from nvfp4_runtime.evaluate.windows import cut, read_text
    from nvfp4_runtime.text.tokenizer import Tokenizer

    text = read_text(args.text)
    folder = find_model(args.model)
    tokenizer = Tokenizer.load(folder)
    windows = cut(tokenizer, text, args.window, args.windows, source=Path(args.text).name)
    shared = {"backend": args.backend, "threads": args.threads}
    teacher = None
    if args.teacher is not None:
        teacher = Side(find_model(args.teacher, "--teacher"), **shared)
        if cut(Tokenizer.load(teacher.folder), text, args.window, args.windows).ids != windows.ids:
            raise ConfigError(
                f"the tokenizers of {teacher.folder} and {folder} cut the text differently; KL compares answers to the "
                "same tokens: give the model that this one was made from",
                "--teacher",
            )
    students = [Side(folder, each, args.kv_cache_dtype, args.lm_head_dtype, args.dtype, **shared) for each in numerics]
    report = evaluate(
        students,
        windows,
        tokenizer,
        teacher,
        two_pass=args.two_pass,
        scratch=None if args.scratch is None else Path(args.scratch),
        worst=args.worst,
        progress=True,
    )
    print(to_json(report) if args.json else render(report))
    return 0


def parse_numerics(text: str) -> list[Numerics | Any]:
    """The names in a comma-separated list, each once; ConfigError for others."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in NUMERICS:
            raise ConfigError(f"unknown numerics {name!r}; expected some of {', '.join(NUMERICS)}", "--numerics")
    return list(dict.fromkeys(names))
