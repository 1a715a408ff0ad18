"""Binding expressions: Jinja2 in an immutable sandbox, compiled once, evaluated to a value and never to pasted text.

An author may be a stranger with an admin's key: no calls, no powers, no filter whose result outgrows its input, none that runs long.
`{{ expr }}` alone gives the expression's own value (a prompt stays the string it is, whatever it looks like: Jinja's native
environment would turn "[1,2]" into a list). Text around expressions gives a string. Undefined names are errors.
"""

from collections.abc import Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, Undefined, meta, nodes
from jinja2.environment import TemplateExpression
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What an author's arithmetic or attribute access can raise besides Jinja's own errors. NameError because Jinja folds
# constants and writes an infinite one into its generated code as `inf`.
EVALUATION_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, NameError, TypeError, ValueError)

# Deeply nested source exhausts Jinja's parser, or Python's.
COMPILATION_ERRORS = (TemplateError, RecursionError, SyntaxError, MemoryError)
LONGEST = 1000
# Parts inside one another: Jinja takes time that grows with the cube of it, twenty seconds for 300.
DEEPEST = 20
_ALLOWED = (
    *(nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.Getattr, nodes.Getitem, nodes.Slice),
    *(nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.Filter, nodes.Test),
    *(nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Neg, nodes.Pos, nodes.Concat),
    *(nodes.And, nodes.Or, nodes.Not, nodes.Compare, nodes.Operand, nodes.CondExpr),
)
FILTERS = (
    "abs",
    "capitalize",
    "d",
    "default",
    "first",
    "float",
    "int",
    "last",
    "length",
    "lower",
    "max",
    "min",
    "string",
    "title",
    "trim",
    "upper",
)


class ExpressionError(ValueError):
    """The source does not compile or does not evaluate; translated to BrokenWorkflow where the binding's name is known."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Multiplies and takes remainders of numbers alone: `"x" * 10**9` and `"%999999999d" % 1` would fill the memory."""

    intercepted_binops = frozenset({"*", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise TypeError(f"{operator} takes numbers")
        return super().call_binop(context, operator, left, right)


def _round(value: float, digits: int = 0) -> float:
    return round(value, max(0, min(int(digits), 15)))


def _make_environment() -> _Sandbox:
    environment = _Sandbox(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    # Jinja's globals (range, dict, lipsum ...) would hide parameters of the same name and misspellings.
    environment.globals.clear()
    environment.filters = {**{name: environment.filters[name] for name in FILTERS}, "round": _round}
    return environment


class Expression:
    """A compiled binding; `names` are the variables it reads."""

    def __init__(self, source: str) -> None:
        if len(source) > LONGEST:
            raise ExpressionError(f"{source[:50]!r}… has {len(source)} characters; an expression has at most {LONGEST}")
        environment = _make_environment()
        try:
            tree = environment.parse(source)
            _refuse_more_than_expressions(source, tree)
            self.source = source
            self.names = frozenset(meta.find_undeclared_variables(tree))
            single = _find_single_expression(tree)
            # Most bindings are one bare name, which a look-up answers far faster than a compiled template.
            self._name = single.name if isinstance(single, nodes.Name) else None
            self._expression = _compile_expression(environment, single) if single is not None else None
            self._template = environment.from_string(source) if single is None else None
        except COMPILATION_ERRORS as error:
            raise ExpressionError(f"{source!r} does not compile: {error}") from error

    def evaluate(self, context: Mapping[str, Any]) -> Any:
        """The value of a single expression as it is, or the rendered string. Raises ExpressionError."""
        try:
            if self._name is not None:
                return context[self._name]
            if self._template is not None:
                return self._template.render(context)
            assert self._expression is not None
            value = self._expression(context)
            # A StrictUndefined that reached the top has not been touched yet: touching it raises its own message.
            return str(value) if isinstance(value, Undefined) else value
        except EVALUATION_ERRORS as error:
            raise ExpressionError(f"{self.source!r} does not evaluate: {error}") from error


def is_expression(value: object) -> bool:
    return isinstance(value, str) and ("{{" in value or "{%" in value)


def _refuse_more_than_expressions(source: str, tree: nodes.Template) -> None:
    for node in tree.body:
        if not isinstance(node, nodes.Output):
            raise ExpressionError(f"{source!r} holds a {{% %}} statement; only {{{{ expressions }}}} are allowed")
    layer: list[nodes.Node] = list(tree.body)
    for _ in range(DEEPEST):
        for found in layer:
            _require_allowed(source, found)
        layer = [part for whole in layer for part in whole.iter_child_nodes()]
    if layer:
        raise ExpressionError(f"{source!r} has more than {DEEPEST} parts inside one another")


def _require_allowed(source: str, found: nodes.Node) -> None:
    if not isinstance(found, _ALLOWED):
        what = {"Call": "a call", "Pow": "a power"}.get(type(found).__name__, f"a {type(found).__name__}")
        raise ExpressionError(f"{source!r} holds {what}, which is not allowed; there are filters: {', '.join([*FILTERS, 'round'])}")


def _find_single_expression(tree: nodes.Template) -> nodes.Expr | None:
    if len(tree.body) != 1 or not isinstance(tree.body[0], nodes.Output):
        return None
    parts = tree.body[0].nodes
    return parts[0] if len(parts) == 1 and not isinstance(parts[0], nodes.TemplateData) else None


def _compile_expression(environment: ImmutableSandboxedEnvironment, expression: nodes.Expr) -> TemplateExpression:
    # What Environment.compile_expression does, but from the parsed tree: "{{-  x }}" and "{{ a }}{{ b }}" need no guessing.
    body: list[nodes.Node] = [nodes.Assign(nodes.Name("result", "store", lineno=1), expression, lineno=1)]
    template = environment.from_string(nodes.Template(body, lineno=1))
    return TemplateExpression(template, undefined_to_none=False)
