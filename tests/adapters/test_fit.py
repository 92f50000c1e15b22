"""``verify`` finds out from SGLang's source whether the adapter fits; SGLang is not imported."""

from __future__ import annotations

import json
import sys

import pytest
from isolated import run, run_fresh

from sglang_nsa_plugin.adapters import hooks, in_graph
from sglang_nsa_plugin.adapters.eager_names import DSA, names_of_generation
from sglang_nsa_plugin.cli import environment, source_stubs
from sglang_nsa_plugin.options import ROLES_VARIABLE

of_graphs = pytest.mark.skipif(
    not in_graph.is_generation(), reason="this SGLang does not capture DSA's draft-extend in graphs"
)
IMPORTED = """
import json
from sglang_nsa_plugin.adapters import hooks
from sglang_nsa_plugin.adapters.install import adapter_for_installed, why_role_misfits
from sglang_nsa_plugin.state import ROLES
adapter = adapter_for_installed()
misfits = hooks.misfits(adapter.common.requirements)
roles = {role: why_role_misfits(adapter, role) for role in ROLES}
print(json.dumps({"name": adapter.name, "misfits": misfits, "broken": None, "roles": roles}))
"""
FROM_STUBS = """
import json, sys
from sglang_nsa_plugin.cli import environment
answer = environment.adapter_fit()
print(json.dumps([answer, [name for name in sys.modules if name.startswith("sglang.")]]))
"""


def test_the_source_says_what_the_import_says():
    imported = json.loads(run(IMPORTED).stdout.splitlines()[-1])
    from_stubs, left = json.loads(run_fresh(FROM_STUBS).stdout)
    assert from_stubs == imported
    assert from_stubs["misfits"] == []
    assert left == []


def test_modules_that_are_loaded_stay():
    import sglang

    before = {name: module for name, module in sys.modules.items() if name.startswith("sglang.")}
    environment.adapter_fit()
    after = {name: module for name, module in sys.modules.items() if name.startswith("sglang.")}
    assert sys.modules["sglang"] is sglang
    assert after == before


@pytest.mark.parametrize(
    ("there", "instead", "misfit"),
    [
        (
            "def _compute_flashmla_metadata(",
            "def _compute_flashmla_metadata_renamed(",
            "._compute_flashmla_metadata is missing",
        ),
        (
            "def _compute_flashmla_metadata(self, cache_seqlens",
            "def _compute_flashmla_metadata(self, lengths",
            "._compute_flashmla_metadata takes (self, lengths, seq_len_q), expected "
            "(self, cache_seqlens, seq_len_q)",
        ),
        ("    cu_seqlens_k: torch.Tensor", "    cu_k: torch.Tensor", " has no field cu_seqlens_k"),
        pytest.param(
            "        self.bs = bs",
            "        self.size = bs",
            "EAGLEDraftExtendCudaGraphRunner sets no attribute bs",
            marks=of_graphs,
        ),
        pytest.param(
            "self.decode_cuda_graph_metadata: Dict =",
            "self.graph_metadata: Dict =",
            "DeepseekSparseAttnBackend sets no attribute decode_cuda_graph_metadata",
            marks=of_graphs,
        ),
    ],
)
def test_what_changed_is_named(there, instead, misfit, monkeypatch):
    read = source_stubs._Loader.get_data

    def changed(loader: source_stubs._Loader, path: str) -> bytes:
        return read(loader, path).replace(there.encode(), instead.encode())

    monkeypatch.setattr(source_stubs._Loader, "get_data", changed)
    misfits = environment.adapter_fit()["misfits"]
    assert any(misfit in found for found in misfits), misfits


@of_graphs
def test_a_role_that_alone_does_not_fit_is_named(monkeypatch):
    """Only draft-decode's fill calls SGLang's fill of one of its backends."""
    read = source_stubs._Loader.get_data

    def changed(loader: source_stubs._Loader, path: str) -> bytes:
        old = b"class DeepseekSparseAttnMultiStepBackend"
        return read(loader, path).replace(old, b"class DeepseekSparseAttnStepsBackend")

    monkeypatch.setattr(source_stubs._Loader, "get_data", changed)
    fit = environment.adapter_fit()
    assert fit["misfits"] == []
    assert (
        fit["roles"]
        .pop("draft-decode")
        .startswith(
            "this SGLang does not fit the fill of draft-decode: sglang.srt.layers.attention.dsa_backend."
            "DeepseekSparseAttnMultiStepBackend.__init__ is missing"
        )
    )
    assert fit["roles"] == {"draft-extend": None, "verify": None}


def test_a_release_says_which_roles_it_leaves_to_sglang(monkeypatch):
    """0.5.13 and 0.5.14 fill the others where they are named."""
    roles = environment.adapter_fit()["roles"]
    assert roles["draft-extend"] is None
    for role in ("draft-decode", "verify"):
        if in_graph.is_generation():
            assert roles[role] is None
        else:
            why = (
                "before SGLang 0.5.15, " if names_of_generation() is DSA else "with this SGLang release "
            )
            assert roles[role].startswith(why)
    monkeypatch.setenv(ROLES_VARIABLE, "draft-extend,verify")
    is_filled = in_graph.is_generation() or names_of_generation() is DSA
    assert (environment.adapter_fit()["roles"]["verify"] is None) == is_filled


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (b"<<<<<<< HEAD\n", "line 1: invalid syntax"),
        (b"def f(:\n", "line 1: "),
        (b"a = 1\n\x00\n", "null bytes"),
        (b"a = '\xff'\n", "codec can't decode"),
    ],
    ids=["merge conflict", "syntax", "null bytes", "not UTF-8"],
)
def test_source_that_cannot_be_read_is_broken(source, said, monkeypatch):
    """In every file of the attention layers; SGLang is not imported, so nothing else shows it."""
    read = source_stubs._Loader.get_data

    def damaged(loader: source_stubs._Loader, path: str) -> bytes:
        return source if path.endswith("a_backend.py") else read(loader, path)

    monkeypatch.setattr(source_stubs._Loader, "get_data", damaged)
    fit = environment.adapter_fit()
    assert (fit["name"], fit["misfits"]) == (None, [])
    assert said in fit["broken"]


def test_the_hooks_of_the_plugin_itself_are_left_alone():
    """Asking installs nothing."""
    takeover, registered = in_graph.ADAPTER.takeovers["draft-extend"], dict(hooks._before)
    request = takeover.request
    environment.adapter_fit()
    assert takeover.request is request
    assert hooks._before == registered
