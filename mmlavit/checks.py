"""Checks of constructor arguments: the error names argument, value and remedy."""
from typing import Optional, Sequence, Tuple


def require(ok: bool, name: str, value, expected: str) -> None:
    """Raises ValueError unless ``ok``."""
    if not ok:
        raise ValueError(f'LaViT: {name}={value!r}: expected {expected}')


def require_number(name: str,
                   value: float,
                   least: float,
                   below: float = float('inf')) -> None:
    """Raises unless ``value`` is a number, ``least <= value < below``."""
    expected = f'a number of at least {least}' + (
        '' if below == float('inf') else f' and below {below}')
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f'LaViT: {name}={value!r}: expected {expected}')
    require(least <= value < below, name, value, expected)


def require_int(name: str,
                value: int,
                least: int,
                most: Optional[int] = None) -> None:
    """Raises unless ``value`` is an integer, ``least <= value <= most``."""
    expected = f'an integer of at least {least}' + (
        '' if most is None else f' and at most {most}')
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f'LaViT: {name}={value!r}: expected {expected}')
    require(value >= least and (most is None or value <= most), name, value,
            expected)


def require_ints(name: str,
                 values: Sequence[int],
                 least: int,
                 most: Optional[int] = None) -> Tuple[int, ...]:
    """The values as a tuple; raises unless they are all such integers."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(
            f'LaViT: {name}={values!r}: expected a sequence of integers')
    for value in values:
        require_int(name, value, least, most)
    return tuple(values)
