"""Arrays of seconds, and methods that remember those that they gave: many plans ask for the same again."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_S = TypeVar("_S")
_P = ParamSpec("_P")
_T = TypeVar("_T")


def remembered(method: Callable[Concatenate[_S, _P], _T]) -> Callable[Concatenate[_S, _P], _T]:
    """Keeps a method's results on its instance, by the arguments, which are hashable."""
    name = f"_{method.__name__}_by_arguments"

    @functools.wraps(method)
    def recalled(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        known: dict[object, _T] = vars(self).setdefault(name, {})
        key = (args, *kwargs.items())
        if key not in known:
            known[key] = method(self, *args, **kwargs)
        return known[key]

    return recalled
