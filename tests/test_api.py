"""The functions for callers from Python, and what importing them costs."""

from __future__ import annotations

import copy
import importlib.metadata
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CPU, EDGE, GUARD, Case, Guarded, Layout, expect, place
from torch._subclasses import FakeTensorMode

import sglang_nsa_plugin
from sglang_nsa_plugin import (
    BoundFill,
    FillArgs,
    bind,
    dispatch,
    fill,
    fill_draft_extend_metadata_cuda,
    fill_draft_extend_metadata_cuda_adaptive,
)
from sglang_nsa_plugin.kernels import library

CASE = Case(
    seq_lens=[9, 30, 1],
    extend_lens=[3, 2, 4],
    rows=11,
    row_count=True,
    ctx_dims=2,
    width=40,
    pages=5,
    page_size=8,
)


# Fills


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
def test_bind_and_call(backend: str) -> None:
    guarded = Guarded(CASE)
    untouched = {name: memory.clone() for name, memory in guarded.memory.items()}
    bound = bind(guarded.args, backend)
    guarded.compare(untouched)
    assert isinstance(bound, BoundFill)
    assert bound.backend == ("cpu" if backend == "auto" else backend)
    assert bound.args is guarded.args
    for _ in range(3):
        guarded.check(lambda _: bound())
        guarded.poison()


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
def test_fill(backend: str) -> None:
    guarded = Guarded(CASE)
    expected = guarded.expected()
    bound = fill(guarded.args, backend)
    guarded.compare(expected)
    assert bound.backend == ("cpu" if backend == "auto" else backend)


def test_a_bound_fill_keeps_its_tensors(tmp_path: Path) -> None:
    guarded = Guarded(CASE)
    expected = expect(guarded.args)
    bound = bind(guarded.args, "cpu")
    del guarded
    scribble = [torch.full((4096,), -1, dtype=torch.int32) for _ in range(64)]
    bound()
    for name, tensor in bound.args.outputs().items():
        assert tensor.tolist() == expected[name].tolist(), name
    assert all((block == -1).all() for block in scribble)


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        pickle.dumps,
        lambda bound: copy.deepcopy([bound]),
        lambda bound: torch.save(bound, io.BytesIO()),
        lambda bound: pickle.dumps(bound, protocol=0),
    ],
    ids=["copy", "deepcopy", "pickle", "deepcopy of a list", "torch.save", "pickle 0"],
)
def test_a_bound_fill_is_not_copied(backend: str, duplicate: Callable) -> None:
    """A copy would fill the tensors of the original, or its own, as the implementation has it."""
    bound = BoundFill(Guarded(CASE).args, backend, kernel(backend))
    with pytest.raises(TypeError, match=r"a BoundFill cannot be copied or pickled.*call bind\(\)"):
        duplicate(bound)


def kernel(backend: str) -> Callable[[], None]:
    args = Guarded(CASE).args
    return importlib.import_module(f"sglang_nsa_plugin.kernels.{backend}").bind(args)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_what_the_error_advises_for_a_copy(backend: str) -> None:
    original = Guarded(CASE)
    before = {name: memory.clone() for name, memory in original.memory.items()}
    bound = bind(original.args, backend)
    for args in (copy.deepcopy(bound.args), pickle.loads(pickle.dumps(bound.args))):
        expected = expect(args)
        bind(args, backend)()
        for name, tensor in args.outputs().items():
            assert tensor.tolist() == expected[name].tolist(), name
    original.compare(before)


@pytest.mark.parametrize("function", [bind, fill])
@pytest.mark.parametrize(
    ("value", "got"), [([], "list"), ({}, "dict"), (None, "NoneType"), (FillArgs, "type")]
)
def test_what_is_no_fill_args(function: Callable, value: object, got: str) -> None:
    with pytest.raises(TypeError, match=f"^args: must be a FillArgs, got {got}$"):
        function(value)


@pytest.mark.parametrize("function", [bind, fill])
def test_backends_that_are_refused(function: Callable) -> None:
    args = Guarded(CASE).args
    with pytest.raises(ValueError, match=r"^backend: must be one of auto, cuda"):
        function(args, "fast")
    with pytest.raises(dispatch.BackendUnavailableError, match="'cuda' was asked for by name"):
        function(args, "cuda")


def test_the_binding_refuses_a_pool_beyond_int32() -> None:
    """Kernels keep its rows in 32 bits; eager serving binds arguments that are not validated."""
    args = Guarded(CASE).args
    pool = torch.zeros(1, 48, dtype=torch.int32).expand(2**31, 48)
    vast = FillArgs.unvalidated(**{**vars(args), "req_to_token": pool})
    with pytest.raises(
        ValueError, match=r"req_to_token: rows must be fewer than 2\*\*31, got 2147483648"
    ):
        bind(vast, "cpu")


# fill_draft_extend_metadata_cuda, on CPU tensors


def with_switch(use_adaptive: bool) -> Callable[..., torch.Tensor]:
    def function(*args: object) -> torch.Tensor:
        return fill_draft_extend_metadata_cuda(*args, use_adaptive=use_adaptive)

    return function


FUNCTIONS = [
    pytest.param(fill_draft_extend_metadata_cuda, id="default"),
    pytest.param(with_switch(True), id="use_adaptive"),
    pytest.param(with_switch(False), id="not adaptive"),
    pytest.param(fill_draft_extend_metadata_cuda_adaptive, id="_adaptive"),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("lengths", "extend_lens", "rows"),
    [
        ([9, 30, 1], [3, 2, 4], 9),
        ([9, 30, 1], [3, 2, 4], 30),
        ([9, 30, 1], [3, 2, 4], 4),
        ([9, 30, 1], [3, 2, 4], 0),
        ([9, -30, 2**31 - 1], [0, -1, 2], 5),
        ([64], [6], 6),
        ([], [], 0),
        ([], [], 3),
    ],
)
def test_ragged_lengths(
    function: Callable, dtype: torch.dtype, lengths: list[int], extend_lens: list[int], rows: int
) -> None:
    layout = {"seqlens_expanded": Layout(step=2), "seq_lens": Layout(step=3)}
    dtypes = {"seq_lens": dtype, "extend_lens": dtype}
    case = Case(
        seq_lens=lengths,
        extend_lens=extend_lens,
        rows=rows,
        row_count=True,
        dtypes=dtypes,
        layouts=layout,
    )
    guarded = Guarded(case)
    args = guarded.args
    expected = guarded.expected()
    in_use = function(
        args.extend_lens,
        args.seq_lens,
        case.index_topk,
        args.seqlens_expanded,
        args.nsa_cache_seqlens,
    )
    for name in ("seq_lens", "extend_lens", "seqlens_expanded", "nsa_cache_seqlens"):
        assert torch.equal(guarded.memory[name], expected[name]), name
    assert (in_use.dtype, in_use.shape, in_use.device) == (torch.int32, (), CPU)
    assert int(in_use) == min(sum(max(q, 0) for q in extend_lens), rows)


@pytest.fixture
def lengths() -> list:
    """Arguments that are right, in the order of the function."""
    rows = [torch.full((9,), GUARD, dtype=torch.int32) for _ in range(2)]
    return [torch.tensor([3, 2, 4]), torch.tensor([9, 30, 1]), 2048, *rows]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, [3, 2, 4], TypeError, "extend_seq_lens: must be a torch.Tensor, got list"),
        (0, 3, TypeError, "extend_seq_lens: must be a torch.Tensor, got int"),
        (1, [9, 30, 1], TypeError, "seq_lens: must be a torch.Tensor, got list"),
        (2, 2048.0, TypeError, "nsa_index_topk: must be an int, got float"),
        (2, torch.tensor(8), TypeError, "nsa_index_topk: must be an int, got Tensor"),
        (2, 0, ValueError, "nsa_index_topk: must lie in 1 .. 2147483647, got 0"),
        (3, None, TypeError, "out_seqlens_expanded: must be a torch.Tensor, got NoneType"),
        (4, [0] * 9, TypeError, "out_nsa_cache_seqlens: must be a torch.Tensor, got list"),
        (
            0,
            torch.ones(3),
            TypeError,
            "extend_seq_lens: dtype must be int32 or int64, got float32",
        ),
        (
            0,
            torch.ones(2, dtype=torch.int32),
            ValueError,
            "extend_seq_lens: shape must be (3,) for bs=3, rows=9, got (2,)",
        ),
        (
            1,
            torch.ones(3, 1, dtype=torch.int32),
            ValueError,
            "seq_lens: must have 1 dimension, got shape (3, 1)",
        ),
        (
            3,
            torch.ones(9, dtype=torch.int64),
            TypeError,
            "out_seqlens_expanded: dtype must be int32, got int64",
        ),
        (
            4,
            torch.ones(8, dtype=torch.int32),
            ValueError,
            "out_nsa_cache_seqlens: shape must be (9,) for bs=3, rows=9, got (8,)",
        ),
    ],
)
def test_bad_lengths(
    function: Callable, lengths: list, position: int, value: object, error: type, message: str
) -> None:
    lengths[position] = value
    with pytest.raises(error) as caught:
        function(*lengths)
    assert str(caught.value) == message
    written = [t for t in lengths[3:] if isinstance(t, torch.Tensor) and (t != GUARD).any()]
    assert not [t for t in written if t is not value]


@pytest.mark.parametrize("position", [0, 1, 3, 4])
def test_fake_lengths(lengths: list, position: int) -> None:
    name = ["extend_seq_lens", "seq_lens", "", "out_seqlens_expanded", "out_nsa_cache_seqlens"][position]
    with FakeTensorMode() as mode:
        lengths[position] = mode.from_tensor(lengths[position])
    with pytest.raises(TypeError, match=f"^{name}: must be a tensor with memory of its own, got a Fake"):
        fill_draft_extend_metadata_cuda(*lengths)


def test_meta_lengths(lengths: list) -> None:
    lengths[1] = lengths[1].to("meta")
    with pytest.raises(ValueError, match=r"^seq_lens: must be a CPU or CUDA tensor, got one on meta"):
        fill_draft_extend_metadata_cuda(*lengths)


def test_numpy_integers_as_the_top_k(lengths: list) -> None:
    lengths[2] = np.int64(5)
    fill_draft_extend_metadata_cuda(*lengths)
    assert lengths[4].tolist() == [min(length, 5) for length in lengths[3].tolist()]


def test_one_tensor_for_both_outputs(lengths: list) -> None:
    lengths[4] = lengths[3]
    with pytest.raises(ValueError, match=r"^out_seqlens_expanded: must not overlap out_nsa_cache_seq"):
        fill_draft_extend_metadata_cuda(*lengths)


def test_an_output_over_an_input() -> None:
    memory, extend_lens = place(torch.tensor([3, 2, 4]).numpy(), torch.int32, CPU, Layout())
    out = memory[EDGE : EDGE + 9]
    with pytest.raises(ValueError, match=r"^out_seqlens_expanded: must not overlap extend_seq_lens"):
        fill_draft_extend_metadata_cuda(extend_lens, torch.tensor([9, 30, 1]), 20, out, out.clone())


# The package


def run_python(code: str, folder: Path) -> None:
    """In a process of its own, away from the source tree."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_tested_library_is_the_installed_one() -> None:
    """The Python may be that of the source tree; a library is never taken from there."""
    source = Path(__file__).resolve().parent.parent / "sglang_nsa_plugin"
    assert library.load() is not None
    assert not library.LIBRARY.resolve().is_relative_to(source)


def test_importing_the_package_imports_no_torch_and_no_sglang(tmp_path: Path) -> None:
    run_python(
        "import sys, sglang_nsa_plugin\n"
        "assert sglang_nsa_plugin.__version__\n"
        "heavy = {'torch', 'sglang', 'triton', 'tvm_ffi', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy",
        tmp_path,
    )


def test_importing_the_functions_starts_no_cuda_and_no_sglang(tmp_path: Path) -> None:
    run_python(
        "import sys\n"
        "from sglang_nsa_plugin import FillArgs, bind, fill, fill_draft_extend_metadata_cuda\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'sglang', 'tvm_ffi', 'sglang_nsa_plugin.kernels.triton'} & set(sys.modules)\n"
        "assert not heavy, heavy",
        tmp_path,
    )


def test_a_fill_on_the_cpu_starts_no_cuda(tmp_path: Path) -> None:
    run_python(
        "import torch\n"
        "from sglang_nsa_plugin import fill, self_test\n"
        "assert fill(self_test.small_case(torch.device('cpu'), True)).backend == 'cpu'\n"
        "assert not torch.cuda.is_initialized()",
        tmp_path,
    )


def test_public_names() -> None:
    for name in sglang_nsa_plugin.__all__:
        assert getattr(sglang_nsa_plugin, name) is not None, name
    assert sglang_nsa_plugin.FillArgs is FillArgs
    assert sglang_nsa_plugin.__version__ == importlib.metadata.version("sglang-nsa-plugin")
    with pytest.raises(AttributeError, match="'sglang_nsa_plugin' has no attribute 'fil'"):
        sglang_nsa_plugin.fil  # noqa: B018
