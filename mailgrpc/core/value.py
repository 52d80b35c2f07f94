"""Values: classes whose objects never change, by the word of the type checker.

A frozen dataclass keeps that word at run time too, by a slow way to set each field: its objects take
three times as long to make. A dozen of them are made for every mail, so here mypy alone forbids it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def value(made: type[T]) -> type[T]:
    """A dataclass with slots, equal and hashed by its fields, which the type checker holds frozen."""
    return dataclass(slots=True, unsafe_hash=True)(made)
