"""Who is compared: models that we serve, with flags, and servers that run already."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from loadtest.server_process import nvfp4_program

EVALUATED = ("--numerics", "--kv-cache-dtype", "--lm-head-dtype", "--dtype", "--backend", "--threads")
SIMULATED = "--simulate"


@dataclass(frozen=True)
class Candidate:
    """A model folder to serve with `flags`, or a server at `url`.

    model  a folder; of a foreign server, the name that requests give, "": the first that it lists
    """

    label: str
    model: str = ""
    flags: tuple[str, ...] = ()
    url: str | None = None

    @property
    def serve_arguments(self) -> list[str]:
        return [*self.flags] if SIMULATED in self.flags else [self.model, *self.flags]

    @property
    def eval_flags(self) -> list[str]:
        """Those of the flags that change answers, as `nvfp4 eval` takes them."""
        found = []
        for i, flag in enumerate(self.flags):
            name, has_value, value = flag.partition("=")
            if name in EVALUATED:
                found += [name, value if has_value else self.flags[i + 1]]
        return found


def parse_model(text: str) -> Candidate:
    """ "LABEL=DIR FLAGS", the flags as `nvfp4 serve` takes them. ValueError says what is wrong with it."""
    label, _, rest = text.partition("=")
    parts = shlex.split(rest)
    if not label.strip() or not parts:
        raise ValueError(f'expected LABEL=DIR or "LABEL=DIR FLAGS", found {text!r}')
    if parts[0].startswith("-"):
        if SIMULATED not in parts:
            raise ValueError(f"{text!r} names no model folder before its flags")
        return Candidate(label, "simulated", tuple(parts))
    folder = resolve(parts[0])
    if not folder.is_dir():
        raise ValueError(f"{label}: there is no folder {folder}; give one, or default, or default-bf16")
    return Candidate(label, str(folder), tuple(parts[1:]))


def resolve(name: str) -> Path:
    """A folder; `default` and `default-bf16` as `nvfp4 prepare` makes them."""
    if name not in ("default", "default-bf16"):
        return Path(name).expanduser()
    made = subprocess.run([nvfp4_program(), "prepare"], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        raise ValueError(f"the default model cannot be made: {made.stderr.strip().splitlines()[-1:]}")
    folder = Path(made.stdout.strip().splitlines()[-1])
    return folder if name == "default" else folder.with_name(folder.name.replace("NVFP4", "BF16"))


def visits(labels: list[str], passes: int) -> list[str]:
    """A B C, C B A, A B C ...: what drifts with time meets all of them alike."""
    return [label for turn in range(passes) for label in (labels if turn % 2 == 0 else labels[::-1])]
