"""Empty packages where SGLang imports three that a machine without a GPU lacks. For demo and tests, never for serving.

On CPU ranks SGLang computes a dense decoder-only model with plain torch, but its modules import ``triton``,
``torchvision`` and ``sgl_kernel``, which come with CUDA. Here each of them, and every module below, is found as a
package in which any name is there and nothing works: names can be imported, annotated with, derived from and used as
decorators; a kernel that is launched, and a function of ``sgl_kernel`` that is called, raise. Installed packages come
first.

``sglang_cpu_ops.pth`` calls :func:`install` when Python starts, because spawned schedulers of SGLang import these
packages before they load any plugin; and only where ``SGLANG_USE_CPU_ENGINE=1`` asks for SGLang's CPU engine.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import NoReturn, Union

PACKAGES = ("triton", "torchvision", "sgl_kernel")
_NEVER_CALLED = "sgl_kernel"  # has functions that compute; the others have what decorates or describes

# ``triton.runtime.driver.active``, which raises in Triton, too, where there is no GPU. Who asks for it is prepared.
_NO_DRIVER = "active"

# With torch's CUDA build, SGLang finds an NCCL library and opens it for CPU ranks, too, which fails for want of a GPU.
# Where there is no such file, it does without. SGLang writes the name into its log.
_NCCL_VARIABLE = "SGLANG_NCCL_SO_PATH"
_NO_NCCL = "no-nccl-on-cpu-ranks.so"


class Name:
    """What any name in such a package stands for, and whatever is made of it."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __getattr__(self, name: str) -> Name:
        if name.startswith("__"):
            raise AttributeError(name)  # else protocols of Python would seem to be there
        if name == _NO_DRIVER:
            message = f"{self.__name__}.{name}: there is no GPU for a driver of Triton's"
            raise RuntimeError(message)
        return Name(f"{self.__name__}.{name}")

    def __call__(self, *args: object, **kwargs: object) -> Name:  # noqa: ARG002
        """A thing made by a call; a decorated function keeps its name."""
        if self.__name__.partition(".")[0] == _NEVER_CALLED:
            message = f"{self.__name__} was called: {_NEVER_CALLED} is not installed, and CPU ranks do without it"
            raise NotImplementedError(message)
        return Name(getattr(args[0], "__qualname__", self.__name__) if args else self.__name__)

    def __getitem__(self, grid: object) -> Callable[..., NoReturn]:
        """A kernel on its grid, or one of a generic's types."""

        def launch(*args: object, **kwargs: object) -> NoReturn:
            message = f"{self.__name__} was launched: Triton is not installed, and CPU ranks do without it"
            raise NotImplementedError(message)

        return launch

    def __iter__(self) -> Iterator[Name]:
        return iter(())  # without this method, Python would iterate by __getitem__, for ever

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type, ...]:
        return ()  # a class derived from a name is a class derived from nothing

    def __instancecheck__(self, instance: object) -> bool:
        return False

    def __subclasscheck__(self, subclass: type) -> bool:
        return False

    def __or__(self, other: object) -> object:
        return Union[self, other]  # noqa: UP007  (an annotation, of which this method is the |)

    def __ror__(self, other: object) -> object:
        return Union[other, self]  # noqa: UP007

    def __repr__(self) -> str:
        return f"<{self.__name__}: an empty name of sglang_cpu_ops>"


class EmptyModule(types.ModuleType):
    """A module in which every name is there."""

    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Name:
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(f"{self.__name__}.{name}")


class EmptyPackages(MetaPathFinder, Loader):
    """Finds :data:`PACKAGES` and all modules below them."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: types.ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """How to make the module, if it is of one of the packages."""
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        spec = ModuleSpec(fullname, self, origin=__file__, is_package=True)
        spec.has_location = True  # so that the module has a __file__
        return spec

    def create_module(self, spec: ModuleSpec) -> EmptyModule:
        """The module."""
        return EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


def install() -> None:
    """Make the packages importable, and keep NCCL from CPU ranks. Idempotent."""
    os.environ.setdefault(_NCCL_VARIABLE, _NO_NCCL)
    if not any(isinstance(finder, EmptyPackages) for finder in sys.meta_path):
        sys.meta_path.append(EmptyPackages())  # behind those that find installed packages
