"""Pickles read as data: nothing that a pickle names is imported, looked up or called.

A pickle is a program for a small stack machine, and Python's own machine lets it call whatever it names. This one
knows plain containers and numpy arrays, and rebuilds these itself. A class that it does not know becomes an
``OpaqueInstance``, which only notes what the class would have been given. Every other name is refused.

An opcode costs one step, and steps are limited; bytes decoded from text are limited to the file's size; arrays are
views of bytes that lie in the file; keys are text or small integers, whose hashing is cheap. So a hostile file can
ask for little more time and memory than an honest one of its size, and no structure is walked recursively.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import re
import sys
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import numpy as np

from relicctl.errors import UsageError

MAX_STEPS = 2_000_000  # a ResNet-200 with optimiser state takes about a tenth
MAX_DIMS = 32
FILE_FIX = "Give an undamaged pickle of numpy arrays in plain containers."


@dataclass(frozen=True)
class GlobalName:
    """A class or function that the pickle names; ``fields`` where it also says those of a named tuple."""

    module: str
    name: str
    fields: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ascii(f"{self.module}.{self.name}")[1:-1][:100]


@dataclass(eq=False)
class OpaqueInstance:
    """Stands for an instance of a class that was not loaded: what its ``__new__`` and ``__setstate__`` would get."""

    type: GlobalName
    args: tuple[Any, ...]
    state: Any = None


@dataclass(eq=False)
class _PendingObject:
    """An array or dtype between its REDUCE and its BUILD."""

    finish: Callable[[Any], Any]
    value: Any = None


class _UnsafePickleError(Exception):
    """The pickle wants something that is not admitted; the message is a clause about it."""


def load_pickle(path: Path) -> Any:
    """Read a pickle (of ``pickle`` or ``dill``): containers, scalars, numpy arrays and ``OpaqueInstance``s.

    JAX's arrays come as numpy's; ordered and default dictionaries, and Haiku's, as plain ones. Arrays may be
    read-only and have a foreign byte order. UsageError if the file cannot be read, is no whole pickle, or names
    what is not admitted: the name is in the message.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _StackMachine(data).run()
    except OSError as reason:
        raise UsageError(f"{path} cannot be read ({reason.strerror}).", FILE_FIX) from None
    except _UnsafePickleError as reason:
        what = f"{path} is refused: {reason}."
        raise UsageError(what, "Nothing in it was run; give a file that holds only arrays and containers.") from None
    except MemoryError:
        raise UsageError(f"{path} does not fit into memory.", "Read it on a machine with more memory.") from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError):  # what malformed opcodes lead to
        raise UsageError(f"{path} is truncated, damaged or no pickle.", FILE_FIX) from None


class _StackMachine:
    """The stack machine. ``data``: the whole file; it is read once, from its start."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.steps = 0
        self.text_bytes = len(data)  # how many more bytes may be decoded from text
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for opcode, argument, _ in pickletools.genops(cast(IO[bytes], self.data)):  # checks lengths against the file
            self.count_steps(1)
            if opcode.name == "STOP":
                break
            self.apply_opcode(opcode.name, argument)
        return self.stack.pop()

    def count_steps(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise _UnsafePickleError(f"it takes more than {MAX_STEPS:,} steps to read")

    def apply_opcode(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case _ if opcode in _LITERALS:
                stack.append(argument)
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET" | "EMPTY_TUPLE":
                stack.append({"LIST": list, "DICT": dict, "SET": set, "TUPLE": tuple}[opcode[6:]]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(opcode[5:]))]
                stack.append(tuple(reversed(items)))
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE" | "LIST":
                items = self.pop_to_mark()
                stack.append(tuple(items) if opcode == "TUPLE" else items)
            case "DICT":
                items = self.pop_to_mark()
                stack.append({})
                self.update(items)
            case "FROZENSET":
                stack.append(frozenset(map(_check_key, self.pop_to_mark())))
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if opcode == "APPEND" else self.pop_to_mark()
                _check_type(stack[-1], list).extend(items)
            case "ADDITEMS":
                items = self.pop_to_mark()
                _check_type(stack[-1], set).update(map(_check_key, items))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.update([key, value])
            case "SETITEMS":
                self.update(self.pop_to_mark())
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.pop_to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self.memo[len(self.memo) if opcode == "MEMOIZE" else argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                known = self.memo[argument]
                finished = isinstance(known, _PendingObject) and known.value is not None
                stack.append(known.value if finished else known)
            case _:
                self.apply_object_opcode(opcode, argument)

    def apply_object_opcode(self, opcode: str, argument: Any) -> None:
        """Apply an opcode that names a class or function, calls it, or fills the object that it made."""
        stack = self.stack
        match opcode:
            case "GLOBAL":
                stack.append(_resolve_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_resolve_global(module, name))
            case "INST":
                stack.append(self.resolve_call(_resolve_global(*argument.split(" ", 1)), tuple(self.pop_to_mark())))
            case "OBJ":
                name, *arguments = self.pop_to_mark()
                stack.append(self.resolve_call(name, tuple(arguments)))
            case "REDUCE":
                arguments, name = stack.pop(), stack.pop()
                stack.append(self.resolve_call(name, arguments))
            case "NEWOBJ":
                arguments, name = stack.pop(), stack.pop()
                stack.append(OpaqueInstance(_check_foreign(name), _check_type(arguments, tuple)))
            case "BUILD":
                state, target = stack.pop(), stack[-1]
                if isinstance(target, _PendingObject):
                    stack[-1] = target.value = target.finish(state)
                else:
                    _check_type(target, OpaqueInstance).state = state
            case _:
                raise _UnsafePickleError(f"it uses the opcode {opcode}, which arrays and containers do not need")

    def pop_to_mark(self) -> list[Any]:
        """Pop what lies above the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def update(self, items: list[Any]) -> None:
        """``items``: key, value, key, value, ..."""
        target = _check_type(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_check_key(key)] = value

    def resolve_call(self, name: GlobalName, arguments: tuple[Any, ...]) -> Any:
        """Return what the call would, for the few that are known; other classes become an ``OpaqueInstance``."""
        arguments = _check_type(arguments, tuple)
        match (_check_type(name, GlobalName).module, name.name), arguments:
            case ("_codecs", "encode"), (str(text), "latin1" | "latin-1"):
                self.text_bytes -= len(text)
                if self.text_bytes < 0:
                    raise _UnsafePickleError("it decodes more bytes than it has")
                return text.encode("latin-1")
            case ("builtins", "bytes"), ():
                return b""
            case ("builtins", "set" | "frozenset"), (list(items),):
                self.count_steps(len(items))
                return set(map(_check_key, items))
            case ("collections", "OrderedDict"), ():
                return {}
            case ("collections", "defaultdict"), () | (GlobalName(),):
                return {}
            case ("haiku._src.data_structures", "FlatMapping" | "FlatMap" | "frozendict"), (dict(mapping),):
                return mapping
            case ("numpy.core.multiarray", "_reconstruct"), (GlobalName("numpy", "ndarray"), *_):
                return _PendingObject(_build_array)
            case ("numpy.core.multiarray", "scalar"), (np.dtype() as dtype, bytes(data)):
                return _build_view(data, dtype, (), "C")[()]
            case ("numpy.core.numeric", "_frombuffer"), (data, dtype, shape, order):
                return _build_view(data, dtype, shape, order)
            case ("numpy", "dtype"), (str(code), *_):
                return _PendingObject(lambda state: _build_dtype(code, state))
            case _, (GlobalName() as function, _, tuple(state), _) if (name.module, name.name) in _ARRAY_WRAPPERS:
                if function.name != "_reconstruct":
                    _raise_unsafe(function)
                return _build_array(state)
            case ("dill._dill", "_load_type"), (str(builtin),):
                return _resolve_global("builtins", builtin)
            case ("dill._dill", "_create_namedtuple"), (str(class_name), tuple(fields), str(module), *_):
                self.count_steps(len(fields))
                found = _check_foreign(_resolve_global(module, class_name))
                return GlobalName(found.module, found.name, tuple(_check_type(field, str) for field in fields))
        return OpaqueInstance(_check_foreign(name), arguments)


# the opcodes that push their argument, as it stands in the file
_LITERALS = {
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.arg and not opcode.stack_before and opcode.stack_after not in ([], [pickletools.anyobject])
}

# functions that take numpy's (function, arguments, state, something of theirs) and return the array
_ARRAY_WRAPPERS = {
    ("dill._dill", "_create_array"),
    ("jax._src.array", "_reconstruct_array"),
    ("jax._src.device_array", "reconstruct_device_array"),
}
_KNOWN_GLOBALS = {
    *_ARRAY_WRAPPERS,
    ("_codecs", "encode"),
    *(("numpy", name) for name in ("dtype", "ndarray")),
    *(("numpy.core.multiarray", name) for name in ("_reconstruct", "scalar")),
    ("numpy.core.numeric", "_frombuffer"),
    *(("haiku._src.data_structures", name) for name in ("FlatMapping", "FlatMap", "frozendict")),
    *(("collections", name) for name in ("OrderedDict", "defaultdict")),
    *(("builtins", name) for name in ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "set", "str")),
    *(("dill._dill", name) for name in ("_load_type", "_create_namedtuple")),
}

# Packages whose classes get no stand-in. It would be harmless, but a file that names them is not what it should be.
_FORBIDDEN_PACKAGES = sys.stdlib_module_names | {"numpy", "torch", "dill", "cloudpickle"}


def _resolve_global(module: Any, name: Any) -> GlobalName:
    """Return the name, if it is known or looks like a class (capitalised) of a package outside the standard library."""
    if len(_check_type(module, str)) + len(_check_type(name, str)) > 500:
        raise ValueError
    module = IMPORT_MAPPING.get(module, module)  # protocols up to 2 write Python 2's names
    found = GlobalName(module.replace("numpy._core.", "numpy.core."), name)  # since numpy 2, and before
    return found if (found.module, found.name) in _KNOWN_GLOBALS else _check_foreign(found)


def _check_foreign(name: Any) -> GlobalName:
    package = _check_type(name, GlobalName).module.partition(".")[0]
    is_class = re.fullmatch(r"(\w+\.)*_*[A-Z]\w*", name.name)
    if package in _FORBIDDEN_PACKAGES or not is_class or (name.module, name.name) in _KNOWN_GLOBALS:
        _raise_unsafe(name)
    return cast(GlobalName, name)


def _raise_unsafe(name: GlobalName) -> NoReturn:
    raise _UnsafePickleError(f"it asks for {name}, which arrays and containers do not need")


def _check_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError
    return value


def _check_key(value: Any) -> str | int:
    if not (isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**31)):
        raise _UnsafePickleError("it has keys or set members that are neither text nor small integers")
    return value


def _build_array(state: Any) -> np.ndarray:
    _, shape, dtype, fortran, data = _check_type(state, tuple)
    return _build_view(data, dtype, shape, "F" if fortran else "C")


def _build_view(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """Return the array whose elements are ``data``, not copied. ValueError or TypeError if they do not match."""
    if not isinstance(dtype, np.dtype) or type(data) not in (bytes, bytearray):
        raise TypeError
    if len(_check_type(shape, tuple)) > MAX_DIMS or not all(0 <= _check_type(n, int) <= sys.maxsize for n in shape):
        raise ValueError
    if order not in ("C", "F") or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError
    return np.ndarray(shape, dtype, buffer=data, order=order)


def _build_dtype(code: str, state: Any) -> np.dtype:
    """Build a dtype of numbers or booleans; objects, text, records and types of other packages are refused."""
    if not re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16", code):
        raise _UnsafePickleError(f"it has an array of type {code[:20]!a}, not of numbers")
    _, order, *compound = _check_type(state, tuple)[:5]
    if order not in ("<", ">", "|", "=") or compound != [None, None, None]:
        raise ValueError
    return np.dtype(code).newbyteorder(order)
