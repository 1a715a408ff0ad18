"""Binding expressions: Jinja2 in an immutable sandbox, compiled once, evaluated to a value and never to pasted text.

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


class ExpressionError(ValueError):
    """The source does not compile or does not evaluate; translated to BrokenWorkflow where the binding's name is known."""


def _make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    # Jinja's globals (range, dict, lipsum ...) would hide parameters of the same name and misspellings.
    environment.globals.clear()
    return environment


class Expression:
    """A compiled binding; `names` are the variables it reads."""

    def __init__(self, source: str) -> None:
        environment = _make_environment()
        try:
            tree = environment.parse(source)
            for node in tree.body:
                if not isinstance(node, nodes.Output):
                    raise ExpressionError(f"{source!r} holds a {{% %}} statement; only {{{{ expressions }}}} are allowed")
            self.source = source
            self.names = frozenset(meta.find_undeclared_variables(tree))
            single = _find_single_expression(tree)
            # Most bindings are one bare name, which a look-up answers far faster than a compiled template.
            self._name = single.name if isinstance(single, nodes.Name) else None
            self._expression = _compile_expression(environment, single) if single is not None else None
            self._template = environment.from_string(source) if single is None else None
        except TemplateError as error:
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
