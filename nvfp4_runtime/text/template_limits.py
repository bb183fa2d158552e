"""A Jinja environment for templates that nobody has read: a sandbox in which they also end, and stay small.

The sandbox keeps a template from files and from Python. It does not keep it from looping, or from making a string of
many gigabytes in one operation. Here every turn of a loop and every call of a macro is counted, and now and then timed,
by a call that is put into the template's syntax tree (no thread, no tracing); what is written or captured is charged to
a budget; and operations whose result can be far larger than what went in are measured first.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

MAX_RENDER_SECONDS = 2.0  # of this thread's processor time: a busy machine is not the template's fault
MAX_TURNS = 4_000_000
MAX_WRITTEN_CHARS = 64 << 20  # captured text counts each time it is written
MAX_VALUE_CHARS = 16 << 20
MAX_ITEMS = 1 << 20
MAX_NUMBER_BITS = 4096
_TURNS_PER_LOOK = 64
_SLOW_FILTERS = ("wordwrap", "urlize", "striptags", "pprint")  # minutes for a long text, and of no use in a chat
_LARGE = re.compile(r"\d{6,}|\*")


@dataclass
class Budget:
    """What is left to one rendering."""

    turns: int = MAX_TURNS
    chars: int = MAX_WRITTEN_CHARS
    until: float = field(default_factory=lambda: time.thread_time() + MAX_RENDER_SECONDS)

    def turn(self) -> None:
        self.turns -= 1
        if self.turns % _TURNS_PER_LOOK == 0:
            self.look()

    def look(self) -> None:
        if self.turns < 0 or time.thread_time() > self.until:
            raise jinja2.TemplateRuntimeError(f"it took longer than {MAX_RENDER_SECONDS:g} seconds")

    def write(self, num_chars: int) -> None:
        self.chars -= num_chars
        if self.chars < 0:
            raise jinja2.TemplateRuntimeError(f"it wrote more than {MAX_WRITTEN_CHARS} characters")


_rendering = threading.local()


@contextmanager
def limited() -> Iterator[Budget]:
    """Within it this thread renders one template; limits are those of the moment it is entered."""
    budget = _rendering.budget = Budget(MAX_TURNS, MAX_WRITTEN_CHARS)
    try:
        yield budget
    finally:
        del _rendering.budget


def too_large(what: str) -> SecurityError:
    return SecurityError(f"{what} is too large for a chat template")


def measure(value: object) -> None:
    """Raise for a value whose text would be enormous: lists in lists that are one list many times over, for example."""
    left, waiting = MAX_ITEMS, [value]
    while waiting:
        left -= 1
        if left < 0:
            raise too_large("a value")
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += one.keys()
            waiting += one.values()
        elif isinstance(one, list | tuple | set):
            waiting += one


# All of them take the context, and so are none that the compiler computes beforehand and writes into its code.
@jinja2.pass_context
def _turn(context: jinja2.runtime.Context, value: object) -> str:
    _rendering.budget.turn()
    return ""


@jinja2.pass_context
def _write(context: jinja2.runtime.Context, value: object) -> object:
    budget = _rendering.budget
    if type(value) is str:
        budget.chars -= len(value)
        if budget.chars < 0:
            budget.write(0)
        return value
    if isinstance(value, list | tuple | dict | set):
        measure(value)
    if isinstance(value, jinja2.Undefined):
        return value
    text = str(value)
    budget.write(len(text))
    return text


@jinja2.pass_context
def _concat(context: jinja2.runtime.Context, *values: object) -> str:
    for value in values:
        if not isinstance(value, str):
            measure(value)
    texts = [str(value) for value in values]
    if sum(map(len, texts)) > MAX_VALUE_CHARS:
        raise too_large("a text")
    return "".join(texts)


class _Limiter(NodeTransformer):
    """Puts the calls of the above into a template."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        return self._counted(node)

    def visit_Macro(self, node: jinja2.nodes.Macro) -> jinja2.nodes.Node:
        return self._counted(node)

    def visit_CallBlock(self, node: jinja2.nodes.CallBlock) -> jinja2.nodes.Node:
        return self._counted(node)

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        first, *rest = node.nodes
        return _filtered(first, "_concat", rest, node.lineno)

    def visit_Add(self, node: jinja2.nodes.Add) -> jinja2.nodes.Node:
        return self._operation(node, "_add")

    def visit_Mul(self, node: jinja2.nodes.Mul) -> jinja2.nodes.Node:
        return self._operation(node, "_multiply")

    def visit_Pow(self, node: jinja2.nodes.Pow) -> jinja2.nodes.Node:
        return self._operation(node, "_power")

    def visit_Mod(self, node: jinja2.nodes.Mod) -> jinja2.nodes.Node:
        return self._operation(node, "_remainder")

    def visit_Output(self, node: jinja2.nodes.Output) -> jinja2.nodes.Node:
        self.generic_visit(node)
        plain = (jinja2.nodes.TemplateData, jinja2.nodes.Const)
        node.nodes = [n if isinstance(n, plain) else _filtered(n, "_write", [], node.lineno) for n in node.nodes]
        return node

    def _operation(self, node: jinja2.nodes.BinExpr, name: str) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(node.left, name, [node.right], node.lineno)

    def _counted(self, node: Any) -> jinja2.nodes.Node:
        self.generic_visit(node)
        turn = _filtered(jinja2.nodes.Const(None, lineno=node.lineno), "_turn", [], node.lineno)
        node.body.insert(0, jinja2.nodes.ExprStmt(turn, lineno=node.lineno))
        return node  # type: ignore[no-any-return]  # For, Macro and CallBlock have a body, which Node does not declare


def _filtered(node: jinja2.nodes.Expr, name: str, args: list[jinja2.nodes.Expr], line: int) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, args, [], None, None, lineno=line)


class LimitedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Compile with `compiled`, render within `limited`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})  # or the compiler would compute those of constants itself

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        del self.globals["lipsum"]
        for name in _SLOW_FILTERS:
            del self.filters[name]
        for name in ("center", "indent", "batch", "slice", "format", "replace", "join"):
            self.filters[name] = _measured(name, self.filters[name])
        self.filters |= {"_turn": _turn, "_write": _write, "_concat": _concat}
        self.filters |= {"_add": _add, "_multiply": _multiply, "_power": _power, "_remainder": _remainder}

    def compiled(self, tree: jinja2.nodes.Template) -> jinja2.Template:
        _Limiter().visit(tree)
        tree.set_environment(self)
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def measured(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__)
            _check_numbers((*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return measured

    def call(self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_text_method(owner, __obj.__name__, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)


@jinja2.pass_context
def _add(context: jinja2.runtime.Context, left: Any, right: Any) -> Any:
    if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        _check_size(left, len(left) + len(right))
    return left + right


@jinja2.pass_context
def _multiply(context: jinja2.runtime.Context, left: Any, right: Any) -> Any:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | list | tuple) and isinstance(other, int):
            _check_size(one, len(one) * other)
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    return left * right


@jinja2.pass_context
def _power(context: jinja2.runtime.Context, left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right))
    return left**right


@jinja2.pass_context
def _remainder(context: jinja2.runtime.Context, left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _check_format(left)
    return left % right


def _check_bits(size: int) -> None:
    if size > MAX_NUMBER_BITS:
        raise too_large("a number")


def _check_size(value: str | list[Any] | tuple[Any, ...], size: int) -> None:
    if size > (MAX_VALUE_CHARS if isinstance(value, str) else MAX_ITEMS):
        raise too_large("a text" if isinstance(value, str) else "a list")


def _check_format(text: str) -> None:
    if _LARGE.search(text):
        raise too_large("a width in a format")


def _check_numbers(values: Any) -> None:
    if any(isinstance(value, int) and abs(value) > MAX_ITEMS for value in values):
        raise too_large("a number")


def _check_text_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Methods of strings whose result may be much longer than what they are given."""
    _check_numbers((*args, *kwargs.values()))
    if name == "translate":
        raise SecurityError("str.translate is not available to chat templates")
    elif name == "replace" and len(args) >= 2:
        _check_replace(text, args[0], args[1])
    elif name == "join" and args:
        _check_join(args[0], text)
    elif name == "expandtabs":
        _check_size(text, len(text) + text.count("\t") * int(next(iter((*args, *kwargs.values())), 8)))


def _check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        _check_size(text, len(text) + text.count(old) * len(new))


def _check_join(values: Any, separator: str) -> None:
    if isinstance(values, list | tuple):
        measure(values)
        texts = sum(len(value) for value in values if isinstance(value, str))
        _check_size(separator, texts + len(values) * len(separator))


def _measured(name: str, wrapped: Callable[..., Any]) -> Callable[..., Any]:
    """The filter `name`, looked at before it runs."""
    # jinja hands some filters its environment first, which it tells by a mark on the function
    passed = 1 if hasattr(wrapped, "jinja_pass_arg") else 0

    def measured(*args: Any, **kwargs: Any) -> Any:
        value, *rest = args[passed:]
        _check_numbers((*rest, *kwargs.values()))
        if name == "format":
            _check_format(str(value))
        elif name == "replace" and len(rest) >= 2:
            _check_replace(str(value), rest[0], rest[1])
        elif name == "join":
            separator = str(rest[0]) if rest else str(kwargs.get("d", ""))
            value = list(value)
            _check_join(value, separator)
        return wrapped(*args[:passed], value, *rest, **kwargs)

    if passed:
        measured.jinja_pass_arg = wrapped.jinja_pass_arg  # type: ignore[attr-defined]
    return measured
