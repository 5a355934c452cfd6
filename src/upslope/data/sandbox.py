"""Chat templates under limits: they come out of model folders, and are programs of strangers.

Jinja's sandbox keeps them from the machine; what is here keeps them from running or growing without end. What a
template does is paid for in units out of a budget: every block that is run (a turn of a loop, a branch, a macro), every
text that is written, every value with all that is in it, before it is made where that could be much. Filters and
methods that no chat template needs and that could multiply a text are left out. So the same template with the same
conversation always ends the same way; the clock is there for what units do not see.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import TemplateRuntimeError
from jinja2.sandbox import ImmutableSandboxedEnvironment

UNITS, UNITS_PER_CHARACTER = 40_000_000, 40
SECONDS = 10.0
BLOCK, CALL, PART = 8, 200, 40
"""Units of a block, of a call, of a part of a value. A unit is some ten nanoseconds or a few bytes."""
MAX_SOURCE, MAX_BITS = 250_000, 65_536
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, SyntaxError)
FAULTS = (*FAULTS, TemplateError, TypeError, ValueError)
"""All that a template can raise: RecursionError is a RuntimeError, and Python's compiler has limits of its own."""
_FILTERS = """abs attr capitalize count d default dictsort e escape filesizeformat first float forceescape format
groupby indent int items join last length list lower map max min reject rejectattr replace reverse round safe select
selectattr sort string title tojson trim truncate unique upper urlencode wordcount"""
_MULTIPLYING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "translate", "format_map", "to_bytes"})
_SLOW = frozenset({"encode", "decode", "hex"})
"""Methods that are left out: they make much of little, or take long for it."""
_WIDTHS = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*?(?:\*|\d{4})|\{[^{}]*(?:\{|:[^{}]*\d{4})")
_BUDGET: ContextVar[_Budget] = ContextVar("what the template that is being rendered may still use")


@dataclass(slots=True)
class _Budget:
    units: float
    until: float


@contextmanager
def budget(characters: int = 0, seconds: float = SECONDS) -> Iterator[None]:
    """Within it templates may use what a conversation of so many characters needs, with much to spare.

    Budgets within a budget have units of their own, and share its time.
    """
    around, until = _BUDGET.get(None), time.monotonic() + seconds
    until = until if around is None else min(until, around.until)
    token = _BUDGET.set(_Budget(UNITS + UNITS_PER_CHARACTER * characters, until))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def spend(units: float, _budget: Callable[[], Any] = _BUDGET.get, _now: Callable[[], float] = time.monotonic) -> bool:
    """Take from the budget; True, or TemplateRuntimeError where it is used up."""
    left = _budget()
    left.units -= units
    if left.units < 0 or _now() > left.until:
        raise TemplateRuntimeError("it runs or writes without end (more steps or text than any conversation needs)")
    return True


def _size(value: Any) -> int:
    return len(value) if type(value) is str or isinstance(value, Collection) else 0


def _kept(value: Any) -> Any:
    """A value that was made of others, its own size paid for."""
    spend(1 + _size(value))
    if type(value) is int and value.bit_length() > MAX_BITS:
        raise TemplateRuntimeError("it makes a number without end")
    return value


def _weighed(value: Any, factor: float = 1, indent: float = 0) -> Any:
    """A value, paid for with all that is in it as often as it is in it: what writing or comparing it goes through."""
    stack = [(value, 1)]
    while stack:
        one, depth = stack.pop()
        spend(factor * (PART + _size(one)) + indent * depth)
        if isinstance(one, Mapping):
            stack += [(part, depth + 1) for pair in one.items() for part in pair]
        elif isinstance(one, Collection) and not isinstance(one, str | bytes | range):
            stack += [(part, depth + 1) for part in one]
    return value


def _text(value: Any) -> str:
    """What stands in the output for a value, paid for before it is written."""
    return _kept(value) if isinstance(value, str) else str(_weighed(value))


def _format(text: Any) -> None:
    """Pay for the widths in a format; those of four digits, or out of the arguments, are refused."""
    if _WIDTHS.search(str(text).replace("{{", "").replace("}}", "")):
        raise TemplateRuntimeError("it formats to a width without end")
    spend(_size(text) + 1000 * (str(text).count("%") + str(text).count(":")))


def _replace(text: Any, old: Any = "", new: Any = "", *count: Any) -> None:
    spend(len(str(text)) + (str(text).count(str(old)) + 1) * len(str(new)))


def _listed(items: Any) -> Any:
    """The items that will be joined, as many as there are."""
    return _weighed(items if isinstance(items, Collection) else list(items))


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        value, others = args[skipped], [*args[skipped + 1 :], *kwargs.values()]
        others += [part for one in others if isinstance(one, tuple) for part in one]
        given = sum(abs(one) if isinstance(one, int) else _size(one) for one in others)
        spend(_size(value) * (16 if name == "list" else 1))
        if name == "replace":
            _replace(value, *others)
        elif name == "format":
            _format(value)
        elif name == "join":
            args = (*args[:skipped], value := _listed(value), *args[skipped + 1 :])
            spend(given * len(value))
        elif name in ("tojson", "indent"):
            _weighed(value, indent=given * (str(value).count("\n") + 1 if name == "indent" else 1))
        elif name == "round":
            spend(given**2)
        elif name == "trim":
            spend(_size(value) * given / 16)
        elif name == "map":  # an argument would be in the result as often as there are items
            _weighed(others, factor=_size(value) or 1000)
        return _kept(function(*args, **kwargs))

    return paid


def _written(name: str, visit: Callable[..., None]) -> Callable[..., None]:
    """A compiler's method whose expression goes through a function of the environment."""

    def visited(self: CodeGenerator, node: Any, frame: Frame) -> None:
        stored = getattr(node, "ctx", "load") != "load"
        self.write("" if stored else f"environment.{name}(")
        visit(self, node, frame)
        self.write("" if stored else ")")

    return visited


class _Code(CodeGenerator):
    """Jinja's compiler, with what a template has to pay where it stands."""

    visit_List = _written("weighed", CodeGenerator.visit_List)
    visit_Tuple = _written("weighed", CodeGenerator.visit_Tuple)
    visit_Dict = _written("weighed", CodeGenerator.visit_Dict)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        visit = CodeGenerator.visit_Getitem
        (_written("kept", visit) if isinstance(node.arg, nodes.Slice) else visit)(self, node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        _written("concat", CodeGenerator.visit_Tuple)(self, nodes.Tuple(node.nodes, "load"), frame)

    def blockvisit(self, nodes: Any, frame: Frame) -> None:
        self.writeline(f"environment.spend({BLOCK})")
        super().blockvisit(nodes, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        if node.test is not None:  # asked of every item, before the body
            node.test = nodes.And(nodes.EnvironmentAttribute("turn"), node.test)
        super().visit_For(node, frame)

    def _output_const_repr(self, group: Any) -> str:
        return f"environment.kept({super()._output_const_repr(group)})"


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    spend, kept, weighed = staticmethod(spend), staticmethod(_kept), staticmethod(_weighed)
    concat = staticmethod(lambda values: _kept("".join(map(_text, values))))
    turn = property(lambda self: spend(BLOCK))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        refused = attr in _MULTIPLYING | _SLOW and isinstance(obj, str | bytes | int)
        return super().is_safe_attribute(obj, attr, value) and not refused

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _format(left)
            _weighed(right)
        elif operator == "+" and not isinstance(right, str):
            _weighed(right)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            spend(0 if bits <= MAX_BITS or operator == "%" else UNITS * bits)
        elif operator == "*":
            text, times = (right, left) if isinstance(left, int) else (left, right)
            _weighed(text, factor=max(0, times) if isinstance(times, int) else 1)
        return _kept(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        function = getattr(__obj, "__wrapped__", __obj)  # str.format comes wrapped
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        spend(CALL + _size(owner) + sum(map(_size, args)))
        if isinstance(owner, str | bytes):
            spend(len(owner) * sum(map(_size, args)) / 16)  # strip and rfind go through all for each
            if name == "replace":
                _replace(owner, *args, *kwargs.values())
            elif name == "format":
                _format(owner)
            elif name == "join" and args:
                args = (_listed(args[0]), *args[1:])
                spend(len(owner) * len(args[0]))
            elif name in ("split", "rsplit", "splitlines"):
                spend(64 * (owner.count(args[0]) if args and args[0] else len(owner) / 4))
        made = super().call(__context, __obj, *args, **kwargs)
        return _weighed(made) if isinstance(made, dict) else _kept(made)


@lru_cache(maxsize=64)
def compiled(source: str) -> Template:
    """A chat template as transformers understands it, to be rendered within a `budget`. Raises one of FAULTS."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if len(source) > MAX_SOURCE:
        raise TemplateError(f"it has {len(source)} characters, more than the {MAX_SOURCE} that are read")
    theirs = _compile_jinja_template("").environment
    ours = _Environment(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(extension) for extension in theirs.extensions.values()],
        finalize=_text,
    )
    ours.filters = {name: _filter(name, theirs.filters[name]) for name in _FILTERS.split()}
    ours.globals = {name: value for name, value in theirs.globals.items() if name != "lipsum"}
    ours.globals["namespace"] = type("namespace", (theirs.globals["namespace"],), {"__repr__": object.__repr__})
    tree = ours.parse(source)
    for macro in tree.find_all((nodes.Macro, nodes.CallBlock)):
        for name in macro.find_all(nodes.Name):
            if name.name in ("varargs", "kwargs"):
                raise TemplateSyntaxError(f"{name.name} of a macro are not available here", name.lineno)
    return ours.from_string(tree)


def line_of(error: BaseException, template: Template | None) -> int | None:
    """The line of the template at which an error happened, where it can be told."""
    line, step = getattr(error, "lineno", None) if isinstance(error, TemplateError) else None, error.__traceback__
    while step is not None and template is not None:
        if step.tb_frame.f_globals.get("environment") is template.environment:
            line = template.get_corresponding_lineno(step.tb_lineno)
        step = step.tb_next
    return line
