"""`nvfp4 distill TEACHER OUT --data TEXT`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvfp4_runtime.errors import ConfigError
from server.commands import flags

if TYPE_CHECKING:
    from nvfp4_runtime.distill.run import Distilled

# distill/'s own lists; a test compares
LOSSES = ("kl", "ce", "mse")
MODES = ("full", "blockwise", "scales")
TRAIN = ("all", "layers")
BLOCK_SCALES = ("frozen", "max")
DTYPES = ("bfloat16", "float32")
# What recovers the default model without a text at hand: docs/qad.md says what it costs and gains
PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "synthesize": 512,
        "act": "w4a16",
        "train": "layers",
        "tokens": 196_608,
        "batch_tokens": 1024,
        "micro_tokens": 1024,
        "lr": 1.5e-4,
        "warmup": 6,
        "held_rows": 6,
        "eval_every": 24,
    }
}
_ABOUT = """\
The student starts from --student, or from AWQ on the beginning of the text, and learns the teacher's distribution
(forward KL over the whole vocabulary, every token) with its weights and activations rounded as they will be served.
Interrupted, it leaves OUT.training; the same command goes on from there. torchrun starts it on several devices."""


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "distill",
        help="train an NVFP4 model to answer as its plain parent does",
        epilog=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("teacher", type=flags.path, nargs="?", metavar="TEACHER", help="plain Hugging Face folder, or `default`")
    add("out", type=flags.path, nargs="?", metavar="OUT", help="folder to make; must not exist, or be empty")
    add("--preset", choices=sorted(PRESETS), action=_Preset, help="TEACHER, OUT and flags; flags after it replace them")
    add("--data", type=flags.path, metavar="TEXT", help=".jsonl, plain text, or hf:NAME[:SPLIT[:COLUMN]]")
    add("--synthesize", type=flags.whole, metavar="N", help="train on N completions of the teacher; --data: prompts")
    add("--held", type=flags.path, metavar="TEXT", help="text to choose the best step by (default: a part of --data)")
    add("--held-rows", type=flags.whole, default=16, metavar="N", help="rows of it (default: %(default)s)")
    add("--student", type=flags.path, metavar="DIR", help="NVFP4 folder to start from, in ModelOpt's layout")
    add("--act", choices=("w4a4", "w4a16"), default="w4a4", help="arithmetic to train for (default: %(default)s)")
    add("--loss", choices=LOSSES, default="kl", help="kl: distillation; ce: QAT; mse: on logits (default: kl)")
    add("--mode", choices=MODES, default="full", help="what is in memory and what learns (default: %(default)s)")
    add("--train", choices=TRAIN, default="all", help="layers: leave embedding and head alone (default: %(default)s)")
    add("--block-scales", choices=BLOCK_SCALES, default="frozen", help="max: anew at each step (default: frozen)")
    add("--seq", type=flags.whole, default=512, metavar="TOKENS", help="tokens in a row (default: %(default)s)")
    add("--tokens", type=flags.whole, default=1_000_000, metavar="N", help="to train on (default: %(default)s)")
    add("--batch-tokens", type=flags.whole, default=4096, metavar="N", help="per step (default: %(default)s)")
    add("--micro-tokens", type=flags.whole, default=2048, metavar="N", help="at a time (default: %(default)s)")
    add("--lr", type=float, default=1e-5, help="highest learning rate (default: %(default)s)")
    add("--stop", type=flags.whole, metavar="STEP", help="end after this step of the schedule")
    add("--warmup", type=flags.whole, default=10, metavar="STEPS", help="to reach it (default: %(default)s)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default: %(default)s)")
    add("--seed", type=flags.whole, default=0, help="order of the rows (default: %(default)s)")
    add("--eval-every", type=flags.whole, default=25, metavar="STEPS", help="(default: %(default)s)")
    add("--save-minutes", type=float, default=10.0, metavar="M", help="between checkpoints (default: %(default)s)")
    add("--grad-checkpointing", action="store_true", help="compute twice, keep less in memory")
    add("--dtype", choices=DTYPES, default="bfloat16", help="what is computed in (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--threads", type=flags.whole, metavar="N", help="CPU threads")
    parser.set_defaults(run=run, log_level="info")


class _Preset(argparse.Action):
    """Sets the flags that the default model was recovered with; what is given after it replaces them."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        namespace.preset = values
        if given := [name for name in PRESETS[values] if getattr(namespace, name) != parser.get_default(name)]:
            raise argparse.ArgumentError(
                self, f"expected before --{given[0].replace('_', '-')}, which it would replace"
            )
        for name, value in PRESETS[values].items():
            setattr(namespace, name, value)


def run(args: argparse.Namespace) -> int:
    if args.preset == "default":
        from nvfp4_runtime.quantize.default_model import distilled_folder

        if args.out is None and args.teacher in (None, "default"):
            args.out = str(distilled_folder())
        args.teacher = args.teacher or "default"
    if args.teacher is None or args.out is None:
        raise ConfigError("expected TEACHER and OUT, or --preset default (see nvfp4 distill --help)")
    from nvfp4_runtime.distill.run import distill
    from nvfp4_runtime.distill.trainer import Interrupted, Schedule
    from nvfp4_runtime.distill.wishes import Wishes

    schedule = Schedule(
        loss=args.loss,
        stop=args.stop,
        lr=args.lr,
        warmup=args.warmup,
        clip=args.clip,
        seed=args.seed,
        eval_every=args.eval_every,
        save_minutes=args.save_minutes,
        checkpointing=args.grad_checkpointing,
    )
    wishes = Wishes(
        data=args.data,
        synthesize=args.synthesize,
        held=args.held,
        student=None if args.student is None else Path(args.student),
        act=args.act,
        mode=args.mode,
        train=args.train,
        block_scales=args.block_scales,
        seq=args.seq,
        tokens=args.tokens,
        batch_tokens=args.batch_tokens,
        micro_tokens=args.micro_tokens,
        held_rows=args.held_rows,
        schedule=schedule,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
    )
    try:
        done = distill(args.teacher, args.out, wishes)
    except Interrupted as stopped:
        print(f"nvfp4: {stopped}")
        return 130
    print(f"{done.out}: {_summary(done)}")
    print(f"  log and held-out figures: {done.work}")
    return 0


def _summary(done: Distilled) -> str:
    if done.result is None:
        before, after = (sum(getattr(b, name) for b in done.blocks) / len(done.blocks) for name in ("before", "after"))
        return f"{len(done.blocks)} blocks; mean held-out error of a block {before:.4f} -> {after:.4f}"
    first, best = done.result.first, done.result.best
    closed = f"{1 - best['kl'] / first['kl']:.1%} of the start's closed" if best["kl"] < first["kl"] else "not closer"
    return (
        f"best at step {done.result.best_step} of {done.result.steps}, {done.result.tokens:,} tokens\n"
        f"  held-out KL {first['kl']:.4f} -> {best['kl']:.4f} ({closed})\n"
        f"  same top token {first['top1']:.4f} -> {best['top1']:.4f}, CE {first['ce']:.4f} -> {best['ce']:.4f}"
    )
