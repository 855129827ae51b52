"""Checks of constructor arguments: the error names argument, value and remedy."""
from numbers import Integral, Real
from typing import Optional, Sequence, Tuple


def require(ok: bool, name: str, value, expected: str) -> None:
    """Raises ValueError unless ``ok``."""
    if not ok:
        raise ValueError(f'LaViT: {name}={value!r}: expected {expected}')


def require_type(ok: bool, name: str, value, expected: str) -> None:
    """Raises TypeError unless ``ok``."""
    if not ok:
        raise TypeError(f'LaViT: {name}={value!r}: expected {expected}')


def require_number(name: str,
                   value: float,
                   least: float,
                   below: float = float('inf')) -> float:
    """The number; raises unless ``least <= value < below``."""
    expected = f'a number of at least {least}' + (
        '' if below == float('inf') else f' and below {below}')
    require_type(
        isinstance(value, Real) and not isinstance(value, bool), name, value,
        expected)
    require(least <= value < below, name, value, expected)  # and no NaN
    return value


def require_int(name: str,
                value: int,
                least: int,
                most: Optional[int] = None) -> int:
    """The integer, NumPy's too; raises unless ``least <= value <= most``."""
    expected = f'an integer of at least {least}' + (
        '' if most is None else f' and at most {most}')
    require_type(
        isinstance(value, Integral) and not isinstance(value, bool), name,
        value, expected)
    require(value >= least and (most is None or value <= most), name, value,
            expected)
    return int(value)


def require_ints(name: str,
                 values: Sequence[int],
                 least: int,
                 most: Optional[int] = None) -> Tuple[int, ...]:
    """The values as a tuple; raises unless they are all such integers."""
    require_type(
        isinstance(values, (list, tuple, range)), name, values,
        'a sequence of integers')
    return tuple(require_int(name, value, least, most) for value in values)


def require_bool(name: str, value: bool) -> bool:
    """The value; raises unless it is True or False."""
    require_type(isinstance(value, bool), name, value, 'True or False')
    return value


def require_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """The value; raises unless it is one of the names."""
    require_type(isinstance(value, str), name, value, f'one of {choices}')
    require(value in choices, name, value, f'one of {choices}')
    return value


def require_keys(name: str, value: dict, needed: Sequence[str],
                 known: Sequence[str]) -> None:
    """Raises unless ``value`` is a dict with the needed and only known keys."""
    require_type(
        isinstance(value, dict), name, value,
        f'a dict with keys among {sorted(known)}')
    missing = sorted(set(needed) - value.keys())
    unknown = sorted(value.keys() - set(known), key=str)
    require(
        not missing and not unknown, name, value,
        f'a dict with the keys {sorted(known)}; missing: {missing}, '
        f'unknown: {unknown}')
