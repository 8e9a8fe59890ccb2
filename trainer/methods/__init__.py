"""The methods: each a small declaration of how M_k and its maps come about.

Every module of ``trainer.methods.catalog`` holds a tuple ``METHODS``; to add a method, add a file.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from backcast.errors import ConfigError
from trainer.methods import catalog
from trainer.methods.base import Made, Method, make_version

DEFAULT_METHOD = "grown-direct"
"""What ``backcast train`` does without being told."""

__all__ = ["DEFAULT_METHOD", "Made", "Method", "make_version", "method", "methods"]


@cache
def methods() -> Mapping[str, Method]:
    """Return all methods by name, in the order of the table."""
    found = [
        method
        for module in iter_modules(catalog.__path__)
        for method in import_module(f"{catalog.__name__}.{module.name}").METHODS
    ]
    return {method.name: method for method in sorted(found, key=lambda method: method.place)}


def method(name: str) -> Method:
    """Return the method of this name; raise ConfigError, which lists them."""
    try:
        return methods()[name]
    except KeyError:
        known = ", ".join(methods())
        raise ConfigError(f"Method {name!r} is unknown; there are {known}.") from None
