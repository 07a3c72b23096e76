"""Values that ranks exchange, as bytes. Reading them makes objects of this package and plain ones, and calls nothing.

They lie in the store of a process group, which may be a file: who can write to it shall not run code here.
"""

from __future__ import annotations

import enum
import io
import pathlib
import pickle
from typing import Any

import pydantic

_PACKAGE = __name__.partition(".")[0]
_OTHERS = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (pydantic.ByteSize, pathlib.PosixPath, pathlib.PurePosixPath, set, frozenset, complex, bytearray)
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        if (found := _OTHERS.get((module, name))) is not None:
            return found
        if module.partition(".")[0] == _PACKAGE and "." not in name:
            found = super().find_class(module, name)
            # A class that this package defines; not a function, and nothing that a module of it has imported.
            if isinstance(found, type) and found.__module__ == module:
                return found
        message = f"{module}.{name} is not of this package"
        raise pickle.UnpicklingError(message)


class _Writer(pickle.Pickler):
    def reducer_override(self, value: object) -> Any:  # noqa: ANN401
        # Python 3.11.0 to 3.11.3 have a member looked up by getattr, which no reader may call.
        return (type(value), (value.value,)) if isinstance(value, enum.Enum) else NotImplemented


def dump(value: Any) -> bytes:  # noqa: ANN401
    """As bytes: numbers, texts, containers, and instances of this package's classes."""
    data = io.BytesIO()
    _Writer(data, protocol=4).dump(value)
    return data.getvalue()


def load(data: bytes) -> Any:  # noqa: ANN401
    """The value again.

    Raises:
        pickle.UnpicklingError: it refers to something else than :func:`dump` allows.
    """
    return _Reader(io.BytesIO(data)).load()
