"""What a part says of itself: its parameters and traits, and the error that names a broken promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from ..errors import LlamaInferError, ParameterError
from ..parameters import ENGINE_PARAMS
from ..parts import Param, Trait
from ..types import Value
from .cases import pools


class ConformanceError(LlamaInferError, AssertionError):
    """A part broke a promise. The message says which, in which case, and how to see it again."""


def conformance_error(kind: str, part: Any, promise: str, where: str, seed: int) -> ConformanceError:
    return ConformanceError(
        f"{kind} {_name(part)}: {promise}. Seen with {where}; check_{kind}(..., seed={seed}) shows it"
    )


def _name(part: Any) -> str:
    return str(getattr(part, "name", None) or getattr(part, "__name__", None) or type(part).__name__)


def declared_by(part: Any) -> Mapping[str, Param]:
    declared: Mapping[str, Param] = getattr(part, "params", {})
    return declared


def traits_of(part: Any) -> frozenset[str]:
    return frozenset(getattr(part, "traits", ()))


def check_declarations(kind: str, part: Any, seed: int, given: Mapping[str, Any]) -> dict[str, list[Value]]:
    """The part's parameters and traits themselves; returns the values to try."""

    def fail(promise: str, where: str) -> ConformanceError:
        return conformance_error(kind, part, promise, where, seed)

    unknown = traits_of(part) - set(get_args(Trait))
    if unknown:
        raise fail("unknown traits are claimed", ", ".join(sorted(unknown)))
    if "stateful" in traits_of(part) and not hasattr(part, "state"):
        raise fail("it claims to be stateful and has no state()", "its traits")
    for name, param in declared_by(part).items():
        if not isinstance(param, Param):
            raise fail("a parameter is declared by a Param", f"{name}={param!r}")
        for word, value in (("default", param.default), ("neutral value", param.neutral)):
            try:
                if value is not None:
                    param.validate(name, value)
            except ParameterError as error:
                raise fail(f"the {word} of {name} is refused", str(error)) from error
        for odd in _odd_values(param):
            _check_refusal(fail, name, param, odd)
    declared = {**ENGINE_PARAMS, **declared_by(part)} if kind == "stopping" else declared_by(part)
    return {
        name: values for name, values in pools(declared, given).items() if name in declared_by(part) or name in given
    }


def _odd_values(param: Param) -> list[Value]:
    """Values of the parameter's type, and not, that a request might bring."""
    odd: dict[type, list[Value]] = {
        float: [float("nan"), float("inf"), -float("inf"), -1.0, 1e300],
        int: [-1, 1 << 62, 0.5],
        str: ["", "\0"],
        tuple: [(None,), (float("nan"),), ("",), (-1,), ((),)],
        dict: [{None: None}, {"": float("nan")}, {-1: ()}],
    }
    return [*odd.get(param.type, []), None, object(), []]


def _check_refusal(fail: Callable[[str, str], ConformanceError], name: str, param: Param, value: Value) -> None:
    try:
        param.validate(name, value)
    except ParameterError:
        return
    except Exception as error:
        raise fail(f"a bad value of {name} is a ParameterError, not a {type(error).__name__}", f"{value!r}") from error
