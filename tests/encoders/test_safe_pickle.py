"""Laws: what is honest comes back as it was; what is not is refused by name, and nothing is ever run."""

from __future__ import annotations

import builtins
import collections
import contextlib
import functools
import os
import pickle
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relicctl.encoders import safe_pickle
from relicctl.encoders.safe_pickle import GlobalName, OpaqueInstance, load_pickle
from relicctl.errors import UsageError

PROTOCOLS = [2, 3, 4, 5]


def loads(data: bytes, folder: Path):
    file = folder / "file.pkl"
    file.write_bytes(data)
    return load_pickle(file)


def refusal(data: bytes, folder: Path) -> str:
    with pytest.raises(UsageError) as error:
        loads(data, folder)
    return error.value.what


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def absent(monkeypatch):
    """A module with the classes of an experiment, there when the pickle is written."""
    module = types.ModuleType("experiment")

    class _State(NamedTuple):
        params: dict
        step: int

    class Plain:
        pass

    for kind in (_State, Plain):
        kind.__module__, kind.__qualname__ = "experiment", kind.__name__
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "experiment", module)
    return module


ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(1, 2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(6)[::2],
    np.array(2.5),
    np.zeros((0, 3), np.float16),
    np.arange(3, dtype=">f4"),
    np.array([True, False]),
    np.array([1 + 2j]),
    np.arange(200, dtype=np.uint8),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_scalars_and_arrays_come_back_as_they_were(protocol, tmp_path):
    twice = [1, 2]
    honest = {
        "plain": [None, True, False, 1, -(2**80), 1.5, "text é", b"\x00\xff", bytearray(b"a"), (), (1,), [[]], {}],
        "keys": {1: 2, "a": {"b": 3}},
        "sets": [{1, 2}, {3}],
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": collections.defaultdict(list, {"a": [1]}),
        "shared": [twice, twice],
    }
    if protocol < 5:  # bytearray is a call there
        honest["plain"] = [item for item in honest["plain"] if not isinstance(item, bytearray)]
    got = loads(pickle.dumps(honest, protocol), tmp_path)
    assert got == honest
    assert got["shared"][0] is got["shared"][1]
    assert list(got["ordered"]) == ["b", "a"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_come_back_as_they_were(protocol, tmp_path):
    same = ARRAYS[0]
    got = loads(pickle.dumps([*ARRAYS, np.float32(3), np.bool_(True), same, same], protocol), tmp_path)
    for array, back in zip([*ARRAYS, np.float32(3), np.bool_(True), same, same], got, strict=True):
        assert type(back) is type(array)
        assert (back.dtype, back.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(back, array)
    assert got[-1] is got[-2]


def test_numpy_1_named_its_modules_differently(tmp_path):
    data = pickle.dumps(ARRAYS[0], 2)
    assert b"cnumpy._core.multiarray\n" in data
    old = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    np.testing.assert_array_equal(loads(old, tmp_path), ARRAYS[0])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_instances_of_absent_classes_only_note_what_they_would_get(protocol, absent, tmp_path):
    plain = absent.Plain()
    plain.rate = 0.5
    data = pickle.dumps([absent._State({"w": ARRAYS[0]}, 7), plain], protocol)
    del sys.modules["experiment"]
    state, plain = loads(data, tmp_path)
    assert (state.type, state.args[1]) == (GlobalName("experiment", "_State"), 7)
    np.testing.assert_array_equal(state.args[0]["w"], ARRAYS[0])
    assert (type(plain), plain.type, plain.state) == (OpaqueInstance, GlobalName("experiment", "Plain"), {"rate": 0.5})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_dill_writes_arrays_and_named_tuples_in_its_own_way(protocol, absent, tmp_path):
    dill = pytest.importorskip("dill")
    data = dill.dumps([absent._State({"w": ARRAYS}, 7), {1, 2}, collections.defaultdict(list)], protocol)
    del sys.modules["experiment"]
    state, numbers, default = loads(data, tmp_path)
    assert state.type == GlobalName("experiment", "_State", ("params", "step"))
    assert (numbers, default) == ({1, 2}, {})
    for array, back in zip(ARRAYS, state.args[0]["w"], strict=True):
        np.testing.assert_array_equal(back, array)


def test_arrays_of_jax_before_and_since_its_own_array_class(tmp_path):
    function, arguments, state = ARRAYS[0].__reduce__()
    data = pickle.dumps(Calls(_stands_for_jax, function, arguments, state, {"weak_type": False}), 2)
    here = f"c{__name__}\n_stands_for_jax\n".encode()
    assert here in data
    for name in (b"cjax._src.array\n_reconstruct_array\n", b"cjax._src.device_array\nreconstruct_device_array\n"):
        np.testing.assert_array_equal(loads(data.replace(here, name), tmp_path), ARRAYS[0])


def _stands_for_jax(*arguments):
    raise AssertionError("a function of the pickle was run")


def _touch(path: str) -> None:
    Path(path).write_text("executed")


def hostile(mark: str) -> dict[str, tuple[object, str]]:
    return {
        "os.system": (Calls(os.system, f"touch {mark}"), f"{os.system.__module__}.system"),
        "eval": (Calls(eval, f"open({mark!r}, 'w')"), "builtins.eval"),
        "exec": (Calls(exec, f"open({mark!r}, 'w')"), "builtins.exec"),
        "getattr": (Calls(getattr, "text", "upper"), "builtins.getattr"),
        "import": (Calls(builtins.__import__, "os"), "builtins.__import__"),
        "partial": (Calls(functools.partial, _touch, mark), "functools.partial"),
        "Popen": (Calls(subprocess.Popen, ["touch", mark]), "subprocess.Popen"),
        "own function": (Calls(_touch, mark), f"{__name__}._touch"),
        "torch": (torch.zeros(2), "torch._utils._rebuild_tensor_v2"),
        "torch storage": (torch.FloatTensor([1.0]).untyped_storage(), "torch.storage._load_from_bytes"),
        "bare function": ({"harmless": os.system}, "system"),
        "in an array": (Calls(_stands_for_jax, eval, ("1",), (), None), "_stands_for_jax"),
        "numpy.load": (Calls(np.load, mark, None, True), "numpy.load"),
    }


@pytest.mark.parametrize("name", list(hostile("")))
@pytest.mark.parametrize("protocol", [0, *PROTOCOLS])
def test_functions_are_refused_by_name_and_not_run(name, protocol, tmp_path):
    mark = tmp_path / "mark"
    attack, refused = hostile(str(mark))[name]
    data = pickle.dumps({"experiment_state": [attack]}, protocol)
    what = refusal(data, tmp_path)
    assert refused in what
    assert not mark.exists()


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"(S'touch mark'\nios\nsystem\n.", "os.system"),  # INST
        (b"(cos\nsystem\nS'touch mark'\no.", "os.system"),  # OBJ
        (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85\x81.", "builtins.eval"),  # NEWOBJ
        (b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.", "builtins.eval"),
        (b"\x80\x02cdill._dill\n_load_type\nX\x04\x00\x00\x00eval\x85R.", "builtins.eval"),
        (b"\x80\x02cdill._dill\n_create_type\n.", "dill._dill._create_type"),
        (b"\x80\x02cdill._dill\n_eval_repr\nX\x01\x00\x00\x001\x85R.", "dill._dill._eval_repr"),
        (b"\x80\x02cbuiltins\nint\nX\x01\x00\x00\x001\x85R.", "builtins.int"),  # a name that may only stand there
        (b"\x80\x02cbuiltins\ndict\n)\x81.", "builtins.dict"),
        (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "collections.OrderedDict"),
        (b"\x80\x02cnumpy\nndarray\nK\x01\x85R.", "numpy.ndarray"),
        (b"\x80\x02cexperiment\nModel.os.system\n.", "Model.os.system"),
        (b"\x80\x02cexperiment\n\x1b[31mRed\n.", r"\x1b[31mRed"),  # escaped: it goes to a terminal
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "BINPERSID"),  # torch's storages are such
        (b"\x80\x02\x82\x01.", "EXT1"),
    ],
)
def test_hand_made_attacks_are_refused(data, named, tmp_path):
    assert named in refusal(data, tmp_path)


@pytest.mark.parametrize(
    "array", [np.array([{}], object), np.array(["text"]), np.zeros(2, "V3"), np.zeros(2, [("a", "f4")])]
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_only_arrays_of_numbers(array, protocol, tmp_path):
    assert "not of numbers" in refusal(pickle.dumps(array, protocol), tmp_path)


def test_keys_whose_hashing_could_be_made_slow_are_refused(tmp_path):
    for key in (2**61, ((),), b"a", 1.5):
        assert "keys" in refusal(pickle.dumps({key: 1}), tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04 a zip file",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02R.",
        b"\x80\x02t.",
        b"\x80\x02h\x07.",
        b"\x80\x02K\x01K\x02s.",
        b"\x80\x02]K\x01\x86b.",
        pickle.dumps(ARRAYS[0], 2)[:-40],
        pickle.dumps(ARRAYS[0], 5)[:60],
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"few.",  # claims 4 EiB
        b"\x80\x04\x96" + struct.pack("<Q", 2**40) + b"few.",
        b"\x80\x02T\xff\xff\xff\x7ffew.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"few.",
    ],
)
def test_what_is_truncated_or_no_pickle_is_said_to_be(data, tmp_path):
    assert "truncated, damaged or no pickle" in refusal(data, tmp_path)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.pkl", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            load_pickle(path)


def test_an_array_is_never_larger_than_its_bytes(tmp_path):
    honest = pickle.dumps(np.zeros((1, 3), np.float32), 2)
    one_row = b"K\x01K\x03\x86"
    assert one_row in honest
    for claim in (b"K\x02K\x03\x86", b"K\x01J\xff\xff\xff\xff\x86", b"K\x00\x8a\x09" + b"\xff" * 8 + b"\x00\x86"):
        assert "damaged" in refusal(honest.replace(one_row, claim), tmp_path)


def test_decoded_bytes_are_no_more_than_the_file_has(tmp_path):
    text = pickle.dumps("a" * 10_000, 2)[2:-1]
    again = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    assert text.endswith(b"q\x00")
    assert loads(b"\x80\x02" + text + again + b".", tmp_path) == b"a" * 10_000
    assert "decodes more bytes" in refusal(b"\x80\x02" + text + again * 50 + b".", tmp_path)


def test_steps_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_pickle, "MAX_STEPS", 10_000)
    assert "steps" in refusal(b"\x80\x04" + b"\x8f" * 20_000 + b".", tmp_path)
    members = b"".join(b"K" + bytes([i]) for i in range(100))
    again = b"c__builtin__\nset\nh\x00\x85R"  # 100 members for 4 opcodes
    assert "steps" in refusal(b"\x80\x02](" + members + b"eq\x00" + again * 200 + b".", tmp_path)


def test_a_memo_bomb_stays_a_handful_of_lists(tmp_path):
    level = b"](" + b"h\x00" * 50 + b"eq\x00"
    got = loads(b"\x80\x02]q\x00" + level * 40 + b".", tmp_path)  # 50^40 leaves, if it were copied
    assert len(got) == 50


@pytest.mark.parametrize(
    "level",
    [(b"]", b"a"), (b"", b"\x85"), (b"}X\x01\x00\x00\x00k", b"s"), (b"cexperiment\nState\n", b"\x85\x81")],
    ids=["list", "tuple", "dict", "instance"],
)
def test_deep_nesting_neither_recurses_nor_crashes(level, tmp_path):
    depth = 100_000
    opening, closing = level
    loads(b"\x80\x02" + opening * depth + b"N" + closing * depth + b".", tmp_path)


def test_deep_keys_are_refused_before_they_are_hashed(tmp_path):
    data = b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns."
    assert "keys" in refusal(data, tmp_path)


def test_a_shape_with_a_million_axes_is_refused_at_once(tmp_path):
    honest = pickle.dumps(np.zeros((1, 3), np.float32), 2)
    axes = b"(" + (b"\x8a\x08" + b"\xff" * 7 + b"\x7f") * 200_000 + b"t"
    assert "damaged" in refusal(honest.replace(b"K\x01K\x03\x86", axes), tmp_path)


HONEST = [pickle.dumps({"a": [ARRAYS[0], np.float32(1)], "b": (1, "x", {2})}, protocol) for protocol in PROTOCOLS]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_gives_anything_but_a_value_or_our_error(data, tmp_path):
    pickled = bytearray(data.draw(st.sampled_from(HONEST)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(pickled) - 1))
        pickled[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    with contextlib.suppress(UsageError):
        loads(bytes(pickled), tmp_path)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(opcodes=st.lists(st.sampled_from([bytes([code]) for code in range(256)] + [b"K\x01", b"h\x00", b"q\x00"])))
def test_no_row_of_opcodes_gives_anything_but_a_value_or_our_error(opcodes, tmp_path):
    with contextlib.suppress(UsageError):
        loads(b"\x80\x04" + b"".join(opcodes) + b".", tmp_path)
