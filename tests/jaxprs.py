"""Reads jaxprs and HLO: what a traced function calls, and what it does with its packed leaves."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr


def equations(function: Callable, *arguments: Any) -> list:
    """Every equation of the traced function, those of its calls, loops and branches included."""
    return list(_equations(jax.make_jaxpr(function)(*arguments).jaxpr))


def _equations(jaxpr: Jaxpr) -> Iterator:
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation):
            yield from _equations(inner)


def _inner(equation) -> Iterator[Jaxpr]:
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one


def users_of_packed(function: Callable, *arguments: Any) -> list[str]:
    """The primitives that read a uint32 argument, looked for inside calls that only pass it on."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    packed = [v for v in jaxpr.invars if getattr(v.aval, "dtype", None) == jnp.uint32]
    return [name for variable in packed for name in _users(jaxpr, variable)]


def _users(jaxpr: Jaxpr, variable) -> Iterator[str]:
    for equation in jaxpr.eqns:
        for position, operand in enumerate(equation.invars):
            if operand is not variable:
                continue
            inner = [j for j in _inner(equation) if len(j.invars) == len(equation.invars)]
            if not inner:
                yield equation.primitive.name
            for one in inner[:1]:
                yield from _users(one, one.invars[position])


def packed_results(compiled: jax.stages.Compiled, shape: tuple[int, ...]) -> list[str]:
    """Instructions of a program that make a uint32 array of `shape`: copies of a packed leaf.

    Parameters, and the tuples that loops and calls hand on, are names for a buffer that exists.
    """
    text = r"u32\[" + ",".join(map(str, shape)) + r"\]\S* ([\w-]+)\("
    names = re.findall(r"= " + text, compiled.as_text() or "")
    return [n for n in names if n not in ("parameter", "get-tuple-element", "bitcast", "constant")]
