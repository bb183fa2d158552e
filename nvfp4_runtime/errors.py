"""Every error the project raises on purpose, and whose problem it is.

NVFP4Error
  ConfigError             operator: asked for something impossible; start-up ends and names the flag
  CheckpointError         files: what is on disk is not what it should be
    MissingTensorError      a tensor the model needs is not there
    UnexpectedTensorError   a tensor nobody read and nobody excused
    TensorShapeError        shape or dtype differs from what the model's config implies
    InvalidScaleError       a scale is NaN, infinite or negative
    UnsupportedFormatError  a format, dialect or architecture we do not read
  KernelError             machine: no kernel can run it
    NoBackendError          every backend refused; the message lists the reasons
    NVFP4ShapeError         a shape the number format does not allow
  RequestError            client, HTTP 400
    InvalidParameterError   a parameter's value cannot be honoured
    PromptTooLongError      prompt (and asked-for tokens) exceed what the model or the cache can hold
    ModelNotFoundError      the named model is not served here (HTTP 404)
  CapacityError           us, for now: HTTP 429 or 503 with Retry-After
    QueueFullError
  DeadlineExceededError   a request took longer than it may: HTTP 504
  SlowReaderError         client: it does not take what it asked for
  EngineDeadError         us: HTTP 503, and /health says so
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def printable(text: str) -> str:
    """`text` with every character that could move a terminal's cursor, or colour it, written as Python would: \\x1b.

    Names and values out of files are a stranger's: line breaks and text direction marks are escaped as well.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class NVFP4Error(Exception):
    """Base of everything this project raises on purpose."""


class ConfigError(NVFP4Error):
    """The operator asked for something impossible; `flag` names what to change."""

    def __init__(self, message: str, flag: str | None = None) -> None:
        super().__init__(message)
        self.flag = flag


class CheckpointError(NVFP4Error):
    """What is on disk is not a checkpoint we can serve."""


class MissingTensorError(CheckpointError):
    """A tensor the model needs is in no file of the checkpoint."""

    def __init__(self, tensor: str, where: str, hint: str = "") -> None:
        super().__init__(f"tensor {tensor!r} is missing from {where}" + (f"; {hint}" if hint else ""))
        self.tensor = tensor
        self.where = where


class UnexpectedTensorError(CheckpointError):
    """Tensors that no part of the model read and nobody excused."""

    def __init__(self, tensors: Sequence[str], where: str) -> None:
        shown = ", ".join(repr(t) for t in list(tensors)[:8])
        more = f" and {len(tensors) - 8} more" if len(tensors) > 8 else ""
        super().__init__(
            f"{len(tensors)} tensor(s) in {where} were never read: {shown}{more}; the checkpoint does not match "
            "its config.json, or this model's class must excuse them by name"
        )
        self.tensors = tuple(tensors)
        self.where = where


class TensorShapeError(CheckpointError):
    """A tensor's shape or dtype is not what the config implies."""

    def __init__(self, tensor: str, file: str, expected: str, found: str) -> None:
        super().__init__(f"tensor {tensor!r} in {file}: expected {expected}, found {found}")
        self.tensor = tensor
        self.file = file
        self.expected = expected
        self.found = found


class InvalidScaleError(CheckpointError):
    """A scale holds NaN, an infinity or a negative value."""

    def __init__(self, tensor: str, file: str, found: str) -> None:
        super().__init__(
            f"scale {tensor!r} in {file} holds {found}; expected finite, non-negative values: "
            "quantise the layer again or fetch the file again"
        )
        self.tensor = tensor
        self.file = file
        self.found = found


class UnsupportedFormatError(CheckpointError):
    """The checkpoint is in a format, dialect or architecture we do not read."""


class KernelError(NVFP4Error):
    """This machine cannot run what was asked for."""


class NoBackendError(KernelError):
    """Every backend refused `spec`; the message lists each refusal."""

    def __init__(self, spec: object, refusals: Mapping[str, str]) -> None:
        reasons = "; ".join(f"{name}: {why}" for name, why in refusals.items()) or "no backend was given"
        super().__init__(f"no backend runs {spec}: {reasons}")
        self.spec = spec
        self.refusals = dict(refusals)


class NVFP4ShapeError(KernelError, ValueError):
    """A shape that NVFP4 does not allow, such as K not a multiple of 16."""


class RequestError(NVFP4Error):
    """The client asked for something we cannot do. `param` names the request field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidParameterError(RequestError):
    """A known parameter with a value that cannot be honoured."""


class PromptTooLongError(RequestError):
    """The request can never fit into the context or the cache."""

    def __init__(self, message: str, length: int, limit: int, param: str | None = "prompt") -> None:
        super().__init__(message, param)
        self.length = length
        self.limit = limit


class ModelNotFoundError(RequestError):
    """The named model is not served here."""

    def __init__(self, model: str) -> None:
        super().__init__(f"The model `{model}` does not exist.", "model")
        self.model = model


class CapacityError(NVFP4Error):
    """We cannot take this now; `retry_after_seconds` says when to try again."""

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class QueueFullError(CapacityError):
    """The waiting queue is at its bound."""


class DeadlineExceededError(NVFP4Error):
    """A request had not ended when its time was up."""


class SlowReaderError(NVFP4Error):
    """More of an answer waits for its reader than is kept."""


class EngineDeadError(NVFP4Error):
    """The engine process ended or stopped answering; nothing can be computed.

    `retry_after_seconds`: when to try again, where another engine is being started.
    """

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
