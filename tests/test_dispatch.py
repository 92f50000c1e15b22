"""Which implementation is chosen, and the words in which the others are refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm_ffi
from cases import CPU, expect
from packaging.requirements import Requirement
from triton.errors import TritonError

from sglang_nsa_plugin import FillArgs, dispatch, self_test
from sglang_nsa_plugin.kernels import compiled, cpu, kpool_compiled, kpool_torch, library
from sglang_nsa_plugin.kernels import torch as reference
from sglang_nsa_plugin.kpool_args import OUTPUTS as KPOOL_OUTPUTS
from sglang_nsa_plugin.kpool_args import KPoolArgs

SOURCES = Path(__file__).resolve().parent.parent
BY_NAME = (
    "the metadata backend {!r} was asked for by name and cannot run: {}. Use 'auto' to let another "
    "implementation step in, or 'off' for SGLang's own fill"
)


@pytest.fixture(autouse=True)
def _decide_anew() -> Iterator[None]:
    """Choices are kept for the life of a process; here each test makes its own."""
    cached = (
        dispatch._choose,
        dispatch.why_unavailable,
        dispatch.why_kpool_unavailable,
        library.load,
        compiled.binder,
        compiled.kpool_binder,
    )
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def refused_by_name(name: str) -> str:
    with pytest.raises(dispatch.BackendUnavailableError) as caught:
        dispatch.choose(name, CPU)
    return str(caught.value)


# Choosing


def test_auto_takes_the_first_candidate() -> None:
    choice = dispatch.choose("auto", CPU)
    assert choice.name == "cpu"
    assert choice.bind is cpu.bind
    assert choice.reason == "first choice, cpu self-test passed"
    assert choice.refused == {}


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_by_name(name: str) -> None:
    choice = dispatch.choose(name, CPU)
    assert (choice.name, choice.reason, choice.refused) == (name, "asked for by name", {})
    args = self_test.small_case(CPU, ragged=True)
    assert_filled_as_expected(args, choice.bind(args))


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_names_that_need_a_gpu(name: str) -> None:
    assert refused_by_name(name) == BY_NAME.format(name, "it does not run on cpu tensors")


@pytest.mark.parametrize("name", ["off", "CUDA", "", "cuda "])
def test_unknown_names(name: str) -> None:
    wanted = f"^backend: must be one of auto, cuda, cpu, triton, torch, got {name!r}$"
    with pytest.raises(ValueError, match=wanted):
        dispatch.choose(name, CPU)


def test_unknown_devices() -> None:
    with pytest.raises(ValueError, match=r"^device: a fill runs on cuda or cpu tensors, got meta"):
        dispatch.choose("auto", torch.device("meta"))


def test_a_choice_is_made_once() -> None:
    assert dispatch.choose("auto", CPU) is dispatch.choose("auto", CPU)


@pytest.mark.gpu
def test_auto_takes_the_cuda_kernel_on_a_gpu() -> None:
    choice = dispatch.choose("auto", torch.device("cuda", 0))
    assert (choice.name, choice.refused) == ("cuda", {}), choice.reason


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton", "torch"])
def test_by_name_on_a_gpu(name: str) -> None:
    assert dispatch.choose(name, torch.device("cuda", 0)).name == name


@pytest.mark.gpu
def test_the_cpu_twin_does_not_run_on_a_gpu() -> None:
    with pytest.raises(dispatch.BackendUnavailableError, match="does not run on cuda tensors"):
        dispatch.choose("cpu", torch.device("cuda", 0))


# Refusing


def test_a_candidate_that_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "why_unavailable", lambda: "the moon is in the wrong phase")
    choice = dispatch.choose("auto", CPU)
    assert choice.name == "torch"
    assert choice.refused == {"cpu": "the moon is in the wrong phase"}
    assert choice.reason == "after refusing cpu (the moon is in the wrong phase)"
    assert refused_by_name("cpu") == BY_NAME.format("cpu", "the moon is in the wrong phase")


def test_a_candidate_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang_nsa_plugin.kernels.cpu", None)
    choice = dispatch.choose("auto", CPU)
    assert choice.name == "torch"
    assert choice.refused["cpu"].startswith("it cannot be imported: import of sglang_nsa_plugin")


def raise_in_bind(error: Exception) -> Callable[[FillArgs], Callable[[], None]]:
    def bind(args: FillArgs) -> Callable[[], None]:
        raise error

    return bind


def raise_in_fill(error: Exception) -> Callable[[FillArgs], Callable[[], None]]:
    def bind(args: FillArgs) -> Callable[[], None]:
        def fill() -> None:
            raise error

        return fill

    return bind


@pytest.mark.parametrize("bind", [raise_in_bind, raise_in_fill])
@pytest.mark.parametrize(
    "error",
    [
        "no kernel image is available for execution on the device",
        "CUDA driver version is insufficient for CUDA runtime version",
    ],
)
def test_a_candidate_that_raises(monkeypatch: pytest.MonkeyPatch, bind: Callable, error: str) -> None:
    """What CUDA says on a GPU that the library has no code for, and with a driver that is too old."""
    monkeypatch.setattr(cpu, "bind", bind(RuntimeError(error)))
    choice = dispatch.choose("auto", CPU)
    assert choice.name == "torch"
    assert choice.refused == {"cpu": f"its self-test failed: {error}"}
    assert refused_by_name("cpu") == BY_NAME.format("cpu", f"its self-test failed: {error}")


@pytest.mark.parametrize(
    "error", [TritonError("out of registers"), subprocess.CalledProcessError(1, "gcc")]
)
def test_triton_that_cannot_compile(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Neither error is a RuntimeError."""
    monkeypatch.setitem(dispatch.CANDIDATES, "cpu", ("triton", "torch"))
    monkeypatch.setattr("sglang_nsa_plugin.kernels.triton.bind", raise_in_fill(error))
    choice = dispatch.choose("auto", CPU)
    assert choice.name == "torch"
    assert choice.refused == {"triton": f"its self-test failed: {error}"}


def test_an_error_of_the_program_is_not_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "bind", raise_in_bind(AttributeError("a typing error")))
    with pytest.raises(AttributeError, match="a typing error"):
        dispatch.choose("auto", CPU)


def off_by_one(name: str) -> Callable[[FillArgs], Callable[[], None]]:
    def bind(args: FillArgs) -> Callable[[], None]:
        def fill() -> None:
            reference.fill(args)
            if name in args.outputs():
                args.outputs()[name].flatten()[-1] += 1

        return fill

    return bind


def test_the_self_test_fills_every_output() -> None:
    names = self_test.small_case(CPU, ragged=True).outputs()
    assert list(names) == [
        "cache_seqlens",
        "cu_seqlens_k",
        "seqlens_expanded",
        "nsa_cache_seqlens",
        "nsa_cu_seqlens_k",
        "ctx_lens",
        "page_table_1",
        "real_page_table",
        "row_count",
    ]


@pytest.mark.parametrize("name", list(self_test.small_case(CPU, ragged=True).outputs()))
def test_a_candidate_with_one_wrong_value(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Also where that value lies in a cell that no fill writes."""
    monkeypatch.setattr(cpu, "bind", off_by_one(name))
    choice = dispatch.choose("auto", CPU)
    wanted = f"its self-test filled {name} with other values than the torch reference"
    assert choice.name == "torch"
    assert choice.refused == {"cpu": wanted}


def test_a_candidate_that_leaves_the_offset_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(args: FillArgs) -> Callable[[], None]:
        return reference.bind(replace(args, length_offset=0))

    monkeypatch.setattr(cpu, "bind", bind)
    wanted = "its self-test filled cache_seqlens with other values than the torch reference"
    assert dispatch.choose("auto", CPU).refused == {"cpu": wanted}


def test_nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.CANDIDATES, "cpu", ("cpu",))
    monkeypatch.setattr(cpu, "why_unavailable", lambda: "gone")
    with pytest.raises(
        dispatch.BackendUnavailableError,
        match=r"^no implementation can run on cpu: cpu \(gone\)$",
    ):
        dispatch.choose("auto", CPU)


# The compiled library


def test_a_missing_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = tmp_path / "nsa_metadata.so"
    monkeypatch.setattr(library, "LIBRARY", missing)
    why = (
        f"the compiled library {missing} is missing; install the wheel, or build it with `pip install .`"
    )
    choice = dispatch.choose("auto", CPU)
    assert (choice.name, choice.refused) == ("torch", {"cpu": why})
    assert refused_by_name("cpu") == BY_NAME.format("cpu", why)


OURS = library.LIBRARY.read_bytes()
E_MACHINE, AARCH64 = 0x12, b"\xb7\x00"


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (b"no library", "file too short"),
        (b"no library" * 20, "invalid ELF header"),
        (OURS[:E_MACHINE] + AARCH64 + OURS[E_MACHINE + 2 :], "cannot open shared object file"),
        (
            OURS.replace(b"TVMFFIGetTypeInfo", b"TVMFFIOfTomorrow?"),
            "undefined symbol: TVMFFIOfTomorrow?",
        ),
    ],
    ids=["text", "longer text", "another processor", "another TVM FFI"],
)
def test_a_library_that_does_not_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: bytes, said: str
) -> None:
    path = tmp_path / "nsa_metadata.so"
    path.write_bytes(broken)
    monkeypatch.setattr(library, "LIBRARY", path)
    why = dispatch.choose("auto", CPU).refused["cpu"]
    assert why.startswith(f"the compiled library {path} does not load with apache-tvm-ffi ")
    assert said in why
    assert why.endswith("; reinstall sglang-nsa-plugin")


@pytest.mark.parametrize("kept", [64, 4096, len(OURS) // 2, len(OURS) - 1])
def test_a_truncated_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: int) -> None:
    """Loading it would end the process with a bus error."""
    path = tmp_path / "nsa_metadata.so"
    path.write_bytes(OURS[:kept])
    monkeypatch.setattr(library, "LIBRARY", path)
    missing = len(OURS) - kept
    assert dispatch.choose("auto", CPU).refused["cpu"] == (
        f"the compiled library {path} is truncated, its last {missing} bytes are missing; reinstall "
        "sglang-nsa-plugin"
    )


@pytest.fixture
def clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the sources, in which the package believes itself to be."""
    for name in ("csrc", "sglang_nsa_plugin"):
        shutil.copytree(SOURCES / name, tmp_path / name)
    monkeypatch.setattr(library, "ROOT", tmp_path)
    monkeypatch.setattr(library, "PACKER", tmp_path / "sglang_nsa_plugin" / "kernels" / "compiled.py")
    return tmp_path


def refused_for(changed: Path) -> None:
    wanted = (
        rf"^the compiled library {re.escape(str(library.LIBRARY))} was built from other sources than "
        rf"this Python: it has version \w+ of {changed.name}, {re.escape(str(changed))} is version \w+; "
    )
    why = dispatch.choose("auto", CPU).refused["cpu"]
    assert re.match(wanted, why), why
    in_clone = (library.ROOT / "csrc").is_dir()
    advice = f"run `pip install .` in {library.ROOT}" if in_clone else "reinstall sglang-nsa-plugin"
    assert why.endswith(f"; {advice}")


def test_a_library_of_these_sources(clone: Path) -> None:
    assert dispatch.choose("auto", CPU).name == "cpu"


def test_a_library_of_another_packer(clone: Path) -> None:
    append_line(library.PACKER)
    refused_for(library.PACKER)


def test_an_installed_library_of_another_packer(clone: Path) -> None:
    """Where there is no csrc/ beside the package."""
    shutil.rmtree(clone / "csrc")
    assert dispatch.choose("auto", CPU).name == "cpu"
    append_line(library.PACKER)
    dispatch._choose.cache_clear()
    dispatch.why_unavailable.cache_clear()
    library.load.cache_clear()
    refused_for(library.PACKER)


@pytest.mark.parametrize("name", sorted(file.name for file in (SOURCES / "csrc").iterdir()))
def test_a_library_of_another_csrc(clone: Path, name: str) -> None:
    append_line(clone / "csrc" / name)
    refused_for(clone / "csrc")


def test_a_library_without_a_new_file_of_csrc(clone: Path) -> None:
    (clone / "csrc" / "another.h").touch()
    refused_for(clone / "csrc")


def test_what_is_no_source_does_not_count(clone: Path) -> None:
    (clone / "csrc" / "notes.txt").touch()
    assert dispatch.choose("auto", CPU).name == "cpu"


def test_a_library_that_does_not_know_its_sources() -> None:
    assert library._built_from(library.load(), "id_of_tomorrow") == "unknown"


def append_line(file: Path) -> None:
    file.write_text(file.read_text() + "\n")


def test_tvm_ffi_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    why = dispatch.choose("auto", CPU).refused["cpu"]
    assert why.startswith("apache-tvm-ffi cannot be imported (")
    assert why.endswith("); install apache-tvm-ffi>=0.1.5,!=0.1.8.post0,<0.2")


class LosesErrors:
    """A library under a TVM FFI that returns from calls with tensors as if they had gone well."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getitem__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                return self._module[name](*arguments)
            except Exception:
                if any(isinstance(argument, torch.Tensor) for argument in arguments):
                    return None
                raise

        return call


def test_tvm_ffi_that_loses_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As 0.1.8.post0 does: a launch that fails would pass for done."""
    loaded = library.load()
    library.load.cache_clear()
    monkeypatch.setattr(tvm_ffi, "load_module", lambda path: LosesErrors(loaded))
    choice = dispatch.choose("auto", CPU)
    why = (
        f"apache-tvm-ffi {tvm_ffi.__version__} loses the errors of compiled libraries, so a fill that "
        "fails would pass for done; install apache-tvm-ffi>=0.1.5,!=0.1.8.post0,<0.2"
    )
    assert (choice.name, choice.refused) == ("torch", {"cpu": why})
    assert refused_by_name("cpu") == BY_NAME.format("cpu", why)
    with pytest.raises(library.LibraryUnavailableError, match="loses the errors"):
        library.load()  # which the shadow check loads, too


def test_the_dependency_excludes_what_the_library_refuses() -> None:
    assert f'dependencies = ["{library.TVM_FFI}", ' in (SOURCES / "pyproject.toml").read_text()
    specifier = Requirement(library.TVM_FFI).specifier
    assert [v for v in ("0.1.5", "0.1.8", "0.1.8.post0", "0.1.8.post2", "0.2.0") if v in specifier] == [
        "0.1.5",
        "0.1.8",
        "0.1.8.post2",
    ]


# The case that proves


@pytest.mark.parametrize("ragged", [False, True])
def test_the_small_case_has_the_edges_that_matter(ragged: bool) -> None:
    args = self_test.small_case(CPU, ragged)
    assert args.length_offset > 0
    lengths = (args.seq_lens + args.length_offset).tolist()
    pool = args.req_to_token.shape[0]
    rows = args.extend_lens.tolist() if ragged else [args.extend_lens] * args.bs
    live = [(length, q) for length, q in zip(lengths, rows, strict=True) if q]
    assert any(0 < length < q for length, q in live)
    assert 0 in lengths
    assert any(length > args.index_topk for length, _ in live)
    assert any(length > args.page_table_1.shape[1] for length, _ in live)
    assert any(not 0 <= index < pool for index in args.req_pool_indices.tolist())
    assert (sum(rows) < args.rows) == ragged


@pytest.mark.parametrize("ragged", [False, True])
def test_the_reference_fills_the_small_case_as_expected(ragged: bool) -> None:
    """Every candidate is held to the reference; here the reference is held to the contract."""
    args = self_test.small_case(CPU, ragged)
    assert_filled_as_expected(args, reference.bind(args))


def assert_filled_as_expected(args: FillArgs, run: Callable[[], None]) -> None:
    expected = expect(args)
    run()
    for name, tensor in args.outputs().items():
        assert tensor.tolist() == expected[name].tolist(), name


def test_the_self_test_fills_few_and_many_requests_uniform_and_ragged() -> None:
    filled: list[FillArgs] = []

    def bind(args: FillArgs) -> Callable[[], None]:
        filled.append(args)
        return reference.bind(args)

    assert self_test.why_failed(bind, CPU, ()) is None
    assert [args.bs for args in filled] == [4, 4, 300, 300]  # the most that one block takes is 256
    assert [isinstance(args.extend_lens, torch.Tensor) for args in filled] == [False, True] * 2
    assert [args.mqa_schedule is None for args in filled] == [False, True] * 2
    assert [args.mqa_remainder_last for args in filled[::2]] == [False, True]
    assert {args.seq_lens.dtype for args in filled} == {torch.int64}
    assert {args.req_to_token.dtype for args in filled} == {torch.int32}
    assert {args.extend_lens.dtype for args in filled[1::2]} == {torch.int32}


def test_a_long_error_is_cut_off() -> None:
    why_not = self_test.why_failed(raise_in_bind(RuntimeError("x " * 400)), CPU, ())
    assert why_not is not None
    assert why_not.endswith("x [...]")
    assert len(why_not) <= len("its self-test failed: ") + 300


def test_every_refusal_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.CANDIDATES, "cpu", ("cpu", "triton"))
    for name in ("cpu", "triton"):
        module = f"sglang_nsa_plugin.kernels.{name}"
        monkeypatch.setattr(f"{module}.why_unavailable", lambda: "gone", raising=False)
    with pytest.raises(dispatch.BackendUnavailableError, match=r": cpu \(gone\); triton \(gone\)$"):
        dispatch.choose("auto", CPU)


def test_each_gpu_has_a_choice_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_choose", lambda *arguments: arguments)
    assert dispatch.choose("auto", torch.device("cuda", 1)) == ("auto", "cuda", 1, False)


# The k-pooling fill


def broken_kpool(name: str) -> Callable[[KPoolArgs], Callable[[], None]]:
    """The reference, with one wrong number in one tensor."""

    def bind(args: KPoolArgs) -> Callable[[], None]:
        def fill() -> None:
            kpool_torch.fill(args)
            args.outputs()[name].flatten()[-1:].add_(1)

        return fill

    return bind


def test_a_choice_has_a_kpool_fill_where_one_is_asked_for() -> None:
    assert dispatch.choose("auto", CPU).bind_kpool is None
    choice = dispatch.choose("auto", CPU, with_kpool=True)
    assert (choice.name, choice.bind_kpool) == ("cpu", kpool_compiled.bind)
    assert dispatch.choose("torch", CPU, with_kpool=True).bind_kpool is kpool_torch.bind


def test_triton_has_no_kpool_fill() -> None:
    for device in (CPU, torch.device("cuda", 0)):
        assert dispatch.why_kpool_unavailable("triton", device) == "it has no k-pooling fill"


@pytest.mark.parametrize("name", KPOOL_OUTPUTS)
def test_a_kpool_fill_with_a_wrong_number_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kpool_compiled, "bind", broken_kpool(name))
    assert dispatch.choose("auto", CPU).name == "cpu"
    choice = dispatch.choose("auto", CPU, with_kpool=True)
    assert choice.name == "torch"
    assert choice.refused["cpu"].startswith(f"of its k-pooling fill, its self-test filled {name} with")
    with pytest.raises(dispatch.BackendUnavailableError, match="of its k-pooling fill, its self-test"):
        dispatch.choose("cpu", CPU, with_kpool=True)


def test_a_kpool_fill_that_cannot_run_is_refused() -> None:
    def bind(args: KPoolArgs) -> Callable[[], None]:
        raise RuntimeError("no kernel image")

    why_not = self_test.why_kpool_failed(bind, CPU)
    assert why_not == "of its k-pooling fill, its self-test failed: no kernel image"


def test_the_kpool_self_test_fills_every_output() -> None:
    assert set(self_test.small_kpool_case(CPU, draft_tokens=5).outputs()) == set(KPOOL_OUTPUTS)
