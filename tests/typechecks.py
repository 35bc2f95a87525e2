"""Shapes and types of every call are checked in tests, and only there.

By beartype, and by jaxtyping where an annotation has a shape. jaxtyping's own hook wraps every function, those that are
made anew at each call of another among them, which made trainings under curvature twelve times as long.
"""

import ast
from collections.abc import Iterator

from jaxtyping import _import_hook, install_import_hook


class Checks(_import_hook.JaxtypingTransformer):
    """Puts a check of types on each function of a module or class, and one of shapes where it names any."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if any(isinstance(parent, ast.FunctionDef) for parent in self._parents):
            return node
        has_shapes = any(map(_is_shape, _parts_of_annotations(node)))
        super().visit_FunctionDef(node)
        if not has_shapes:
            both = node.decorator_list[-1]  # jaxtyped(typechecker=...)
            node.decorator_list[-1] = both.keywords[0].value
        return node


def _parts_of_annotations(node: ast.FunctionDef) -> Iterator[ast.AST]:
    given = node.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    for annotation in (node.returns, *(argument.annotation for argument in arguments if argument)):
        yield from ast.walk(annotation) if annotation else ()


def _is_shape(part: ast.AST) -> bool:
    """Whether it is as `Float[Tensor, "rows columns"]`."""
    last = part.slice.elts[-1] if isinstance(part, ast.Subscript) and isinstance(part.slice, ast.Tuple) else None
    return isinstance(last, ast.Constant) and isinstance(last.value, str)


def check_types(package: str) -> None:
    """From here on, whenever a module of the package is imported."""
    _import_hook.JaxtypingTransformer = Checks
    install_import_hook(package, "beartype.beartype")
