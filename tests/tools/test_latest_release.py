"""``make test-release VERSION=latest``: which release it is, what changed there, and the verdict."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from integration.releases import matrix, names
from sglang_nsa_plugin.adapters.hooks import Call, Fields, Hook

ROOT = Path(matrix.__file__).resolve().parent.parent.parent
MODULE = "sglang.srt.layers.attention.dsa_backend"
BACKEND = f"{MODULE}.DeepseekSparseAttnBackend"
EQUAL = {
    "generation": "F",
    "adapter": "in-graph",
    "hook_targets": ["a"],
    "values_compared": 7,
    "values_different": 0,
    "roles": {"draft-extend": {"values_compared": 7, "values_different": 0}},
    "reason": "",
    "verdict": "equal",
}


def publish(folder: Path, version: str) -> None:
    """A wheel of this name and version, and nothing else."""
    info = f"sglang-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()},\n"
        for name, text in files.items()
    )
    with zipfile.ZipFile(folder / f"sglang-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(name, text)


def test_the_newest_release_is_pips_answer_without_pre_releases(tmp_path, monkeypatch):
    for version in ("0.5.9", "0.5.24", "0.6.0rc1"):
        publish(tmp_path, version)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert matrix.latest_release() == "0.5.24"


def test_make_takes_it():
    command = ["make", "-n", "test-release", "VERSION=latest"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "integration.releases.matrix latest" in said.replace("  ", " ")


def test_what_fits_and_has_no_more_is_not_listed():
    used = Call(f"{BACKEND}._compute_flashmla_metadata", ("self", "cache_seqlens", "seq_len_q"))
    assert names.changed([used]) == []


@pytest.mark.parametrize(
    ("row", "misfit"),
    [
        (Call(f"{BACKEND}._compute_flashmla_metadata", ("self", "lengths")), True),
        (Hook(f"{BACKEND}._apply_cuda_graph_metadata", ("self", "bs"), print, and_more=True), None),
        (Call(f"{BACKEND}.set_dsa_prefill_impl", ("self",)), False),
        (Call(f"{BACKEND}.gone", ("self",)), True),
        (Fields(f"{MODULE}.DSAMetadata", ("page_size", "gone")), True),
        (Fields(f"{MODULE}.DSAMetadata", ("page_size",)), False),
    ],
)
def test_what_changed_is_listed_with_the_names_of_both(row, misfit):
    """``misfit``: whether it does not fit; None where nothing is to be said."""
    found = names.changed([row])
    assert [each["misfit"] is not None for each in found] == ([] if misfit is None else [misfit])
    for each in found:
        first, ours, theirs = matrix.names_as_text([each])
        assert first == f"{row.target}: {'does not fit' if misfit else 'fits, has more'}"
        assert ours.split("uses")[1].strip()
        assert theirs.split("has")[1].strip()


def test_the_installed_release_fits():
    from sglang_nsa_plugin.adapters.install import adapter_for_installed

    listed = names.changed(names.table(adapter_for_installed()))
    assert [each["misfit"] for each in listed] == [None] * len(listed)


@pytest.mark.parametrize(
    ("changes", "misfit", "said"),
    [
        ({}, None, "equal, the plugin fills (in-graph); add it to TESTED in adapters/releases.py"),
        ({"verdict": "failed"}, None, "every value is equal, but tests failed, see above"),
        ({"verdict": "failed", "values_different": 3}, None, "3 values are different"),
        ({"verdict": "failed", "adapter": None, "reason": "why"}, None, "the plugin steps aside: why"),
        ({"verdict": "failed"}, "no x", "the plugin steps aside, 1 targets do not fit, see above"),
    ],
)
def test_the_last_line_is_one_verdict(changes, misfit, said, monkeypatch, capsys):
    """And the exit code; a release that is not listed as tested leaves no row in the results."""
    name = {"target": "t", "ours": ["a"], "theirs": ["a", "b"], "misfit": misfit}
    monkeypatch.setattr(matrix, "latest_release", lambda: "0.5.99")
    monkeypatch.setattr(matrix, "build_wheel", lambda: Path("wheel"))
    monkeypatch.setattr(matrix, "try_release", lambda *_: {**EQUAL, **changes})
    monkeypatch.setattr(matrix, "changed_names", lambda _: [name])
    monkeypatch.setattr(matrix.result_files, "merge", lambda *_, **__: pytest.fail("a row was written"))
    assert matrix.try_latest(keep=False) == (0 if not changes and misfit is None else 1)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "SGLang 0.5.99 is the newest release"
    assert printed[-1] == f"verdict: SGLang 0.5.99: {said}"


def test_a_release_that_does_not_even_import_has_a_verdict(monkeypatch, capsys):
    def fails(*_):
        raise subprocess.CalledProcessError(1, ["install_sglang"])

    monkeypatch.setattr(matrix, "latest_release", lambda: "0.5.99")
    monkeypatch.setattr(matrix, "build_wheel", lambda: Path("wheel"))
    monkeypatch.setattr(matrix, "try_release", fails)
    assert matrix.try_latest(keep=False) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("verdict: SGLang 0.5.99 could not be tried: Command '['install_sglang']'")
