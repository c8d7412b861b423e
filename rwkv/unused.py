"""What a training process leaves out: packages, and torch 2's compiler, that others import only because they are installed."""

import contextlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from rwkv.compat import stack


class _Absent:
    """A finder that knows of packages only that they are not installed."""

    def __init__(self, packages: list[str]):
        self._packages = packages

    def find_spec(self, *_: Any) -> None:
        return None

    def find_distributions(self, context: Any) -> tuple:
        if context.name in self._packages:
            raise importlib.metadata.PackageNotFoundError(context.name)
        return ()


@contextlib.contextmanager
def absent(*packages: str) -> Iterator[None]:
    """For a while those of the packages that nobody has imported yet are as if they were not installed: what would use them goes without."""
    hidden = [name for name in packages if name not in sys.modules]
    finder: Any = _Absent(hidden)
    sys.meta_path.insert(0, finder)
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: whoever imports it is told that it is not there
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        sys.meta_path.remove(finder)


class _Compiler(ModuleType):
    """torch._dynamo with the names that are asked of it where nothing is compiled. Asked for any other it becomes the real one."""

    OptimizedModule = type(
        "OptimizedModule", (), {}
    )  # what torch.compile makes; Lightning asks of every model whether it is one
    __path__: Any = []  # it is a package

    @staticmethod
    def disable(function: Any, *_: Any, **__: Any) -> Any:
        """The function such that it is not compiled: as it is."""
        return function

    @staticmethod
    def graph_break(*_: Any, **__: Any) -> None:
        """Where what is compiled ends."""

    def __init__(self, real: Any):
        super().__init__(real.name)
        self.__spec__, self.__loader__, self.__package__, self.__file__ = real, real.loader, real.name, real.origin

    def __getattr__(self, name: str) -> Any:
        if name == "config":  # its settings stand by themselves; gradient checkpointing asks for one
            return importlib.import_module(f"{self.__name__}.config")
        if name.startswith("__"):
            raise AttributeError(name)
        _become_real(self)
        return getattr(self, name)


def _become_real(compiler: Any) -> None:
    compiler.__class__ = ModuleType
    compiler.__path__ = compiler.__spec__.submodule_search_locations
    compiler.__spec__.loader.exec_module(compiler)


class _CompilerFinder:
    """Finds the modules inside torch._dynamo, which becomes the real one where they need it."""

    def __init__(self, compiler: Any):
        self._compiler = compiler

    def find_spec(self, name: str, *others: Any) -> Any:
        package, _, inside = name.rpartition(".")
        if package != self._compiler.__name__ or type(self._compiler) is ModuleType:
            return None
        if inside != "config":
            _become_real(self._compiler)
        module = sys.modules.get(name)
        if module is None:
            return importlib.machinery.PathFinder.find_spec(name, self._compiler.__spec__.submodule_search_locations)
        # The package has imported it; Python, which was about to, would do so again.
        again = importlib.machinery.ModuleSpec(name, _Imported(module))  # type: ignore[arg-type]
        vars(module)["__spec__"] = again  # which Python takes in place of what it is given
        return again


class _Imported:
    """A loader of a module that is there."""

    def __init__(self, module: ModuleType):
        self._module, self._spec = module, module.__spec__

    def create_module(self, _: Any) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__spec__"] = self._spec


def leave_out_compiler() -> None:
    """Keep torch 2's compiler out of a process that compiles nothing: 80 MB and a second, beside triton's. torch's optimizers and its gradient
    checkpointing import it in order not to be compiled, Lightning for a class. Whoever compiles all the same still can."""
    if stack() == "cu117" or "torch._dynamo" in sys.modules:
        return
    import torch

    compiler: Any = _Compiler(importlib.util.find_spec("torch._dynamo"))
    finder: Any = _CompilerFinder(compiler)
    sys.meta_path.insert(0, finder)
    sys.modules[compiler.__name__] = torch._dynamo = compiler  # type: ignore[attr-defined]  # not in the stubs of 1.13.1
