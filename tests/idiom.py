#!/usr/bin/env python3
"""Lists places where Python is packed and not written. `.ci/run` calls it on every file.

Exit code 1 if there are any. Each is a place to look at; the list should be empty. It reads the
syntax tree only:

    statement   an expression used for its side effect: `x() if c else None`, `f(), g()`
    choice      a call or an argument list chosen inside the call: `(f if c else g)()`
    loop        a `for` over `x if c else ()` or a one-element list: an `if` or an assignment
    binding     `for y in [f(x)]` inside a comprehension: an assignment in disguise
    packed      one assignment of three or more unrelated values: `a, b, c = f(), g(), 1`
    arithmetic  a comparison or a truth value used as a number: `4 * (x == y)`
    import      several modules on one line
    line        more than 100 characters
"""

import ast
import sys


def find(tree, lines):
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            value = node.value
            plain = isinstance(value, (ast.Call, ast.Await, ast.Yield, ast.YieldFrom))
            doc = isinstance(value, ast.Constant)
            if not plain and not doc:
                yield node, "statement"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.IfExp):
            yield node, "choice"
        if isinstance(node, ast.For):
            single = isinstance(node.iter, (ast.List, ast.Tuple)) and len(node.iter.elts) == 1
            if isinstance(node.iter, ast.IfExp) or single:
                yield node, "loop"
        if isinstance(node, ast.comprehension):
            if isinstance(node.iter, (ast.List, ast.Tuple)) and len(node.iter.elts) == 1:
                yield node.target, "binding"
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            if isinstance(node.targets[0], ast.Tuple) and len(node.value.elts) > 2:
                yield node, "packed"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for side in (node.left, node.right):
                truth = isinstance(side, ast.Compare)
                truth = truth or isinstance(side, ast.UnaryOp) and isinstance(side.op, ast.Not)
                called = isinstance(side, ast.Call) and getattr(side.func, "id", "") == "bool"
                if truth or called:
                    yield node, "arithmetic"
        if isinstance(node, ast.Import) and len(node.names) > 1:
            yield node, "import"
    for number, line in enumerate(lines, 1):
        if len(line) > 100:
            yield number, "line"


def main():
    total = 0
    for path in sys.argv[1:]:
        text = open(path, encoding="utf-8").read()
        lines = text.splitlines()
        found = {(getattr(at, "lineno", at), kind) for at, kind in find(ast.parse(text), lines)}
        for number, kind in sorted(found):
            print(f"{path}:{number}: {kind}: {lines[number - 1].strip()[:90]}")
        total += len(found)
    print(f"{total} places", file=sys.stderr)
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
