"""Wrong versions of the kernel's arithmetic, each of which the tests of the CPU twin must notice.

``python tests/mutation/kernel_mutants.py [NAME ...]`` copies the repository, applies one mutant at a
time to the copy's csrc, builds the CPU twin (a C++ compiler and CMake are enough) and runs its tests of
values, random batches and comparisons. It prints which mutants were killed. The exit code is 1 when one
survived that is not in SURVIVORS, when one of SURVIVORS was killed, or when one no longer applies.

The CUDA kernels include the same headers, so what is checked here is the arithmetic of both.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("csrc", "sglang_nsa_plugin", "tests", "pyproject.toml")
TESTS = ("tests/test_values.py", "tests/test_fuzz.py", "tests/test_shadow.py", "tests/test_kpool.py")
# test_sglangs_own_kernel interprets Triton, which takes longer than all others together.
PYTEST = (
    "-q",
    "-x",
    "-k",
    "(cpu:cpu or test_shadow or (test_kpool and cpu)) and not sglangs_own_kernel",
    "--fuzz-batches",
    "2000",
)
TIME_LIMIT_S = 120  # a mutant may never end
# Mutants that no test can notice, and why.
SURVIVORS = {
    "the closed form starts over topk": "equivalent: level is 0 then, and each of the n rows counts topk",
}


class Mutant(NamedTuple):
    """One change of csrc: ``pattern``, a regular expression, must match exactly once in all its files,
    or in the one that is named.

    A blank in the pattern matches any white space, so that a formatter does not break it.
    """

    name: str
    pattern: str
    replacement: str
    file: str | None = None


class NotApplicableError(RuntimeError):
    """The pattern of a mutant matches nothing in csrc, or more than one place."""


MUTANTS = (
    # The lengths of a request and of its rows
    Mutant("the offset does not count", r"static_cast<uint32_t>\(word\) \+ offset", "static_cast<uint32_t>(word)"),
    Mutant("the offset counts twice", r"static_cast<uint32_t>\(word\) \+ offset", "static_cast<uint32_t>(word) + 2 * offset"),
    Mutant("a sum with the offset saturates", r"static_cast<int32_t>\(static_cast<uint32_t>\(word\) \+ offset\)", "static_cast<int32_t>(minimum(int64_t{word} + offset, INT32_MAX))"),
    Mutant("q may be negative", r"clamp\(load\(fill\.extend_lens, r\), 0,", "clamp(load(fill.extend_lens, r), -1,"),
    Mutant("q is cut off at 2^31 - 2", r"(clamp\(load\(fill\.extend_lens, r\), 0, INT32_MAX)\)", r"\1 - 1)"),
    Mutant("the high word of an int64 is ignored", r"vector\.is_int64 \? .*? : low >> 31", "low >> 31"),
    Mutant("an int32 is not sign-extended", r"(vector\.is_int64 \? .*? :) low >> 31", r"\1 0"),
    Mutant("the first row is one too short", r"(request\.length - request\.\w+) \+ 1;", r"\1;"),
    Mutant("the expanded length may be negative", r"tokens > (\w+) \? tokens - \1 : 0", r"tokens - \1"),
    Mutant("a negative length counts", r"length < 0 \? 0 : static_cast<uint32_t>\(length\)", "static_cast<uint32_t>(length)"),
    Mutant("a row is followed by one more", r"(request\.\w+) - 1 - j\b", r"\1 - j", file="fill.h"),
    # Sums over rows and requests
    Mutant("the closed form starts below -n", r"clamp\(request\.first, -n, topk\)", "minimum(request.first, topk)"),
    Mutant("the closed form starts over topk", r"clamp\(request\.first, -n, topk\)", "maximum(request.first, -n)"),
    Mutant("rows rise one too early", r"maximum\(-first, 0\)", "maximum(-first - 1, 0)"),
    Mutant("rows reach topk one too early", r"clamp\(topk - first, rising, n\)", "clamp(topk - first - 1, rising, n)"),
    Mutant("rows reach topk after the last one", r"clamp\(topk - first, rising, n\)", "maximum(topk - first, rising)"),
    Mutant("the ramp is one step too high", r"\(rising \+ level - 1\) / 2", "(rising + level) / 2"),
    Mutant("level rows count as topk - 1", r"\(n - level\) \* topk", "(n - level) * (topk - 1)"),
    Mutant("rows are not cut off", r"minimum\((static_cast<int64_t>\(a\.row\) \+ b\.row), rows\)", r"\1"),
    Mutant("row sums do not add up", r"a\.clamped \+ b\.clamped", "b.clamped"),
    Mutant("sums of lengths saturate", r"a\.lengths \+ b\.lengths", "static_cast<uint32_t>(minimum(int64_t{a.lengths} + b.lengths, INT32_MAX))"),
    Mutant("lengths over topk are kept", r"minimum\(expanded, fill\.index_topk\)", "expanded"),
    Mutant("running sums begin at the row", r"(store\(fill\.nsa_cu_seqlens_k, row) \+ 1,", r"\1,", file="fill.h"),
    Mutant("rows after the last add to the sums", r"(store_row\(fill, row, 0, before\.clamped)\)", r"\1 + 1)"),
    # Divisions
    Mutant("the multiplier is rounded down", r"\(\(uint64_t\{1\} << shift\) \+ value - 1\) / value", "(uint64_t{1} << shift) / value"),
    Mutant("the shift of a divisor is one less", r"(while \(\(int64_t\{1\} << .*?\) <) value\)", r"\1 value / 2)"),
    Mutant("a division rounds down that rounds up", r"divide\(x - is_any, by\) \+ is_any", "divide(x, by)"),
    # Page tables
    Mutant("a started page is not live", r"divide_up\((length < 0 \? 0 : length, table\.page_size)\)", r"divide(\1)"),
    Mutant("live columns are not bounded", r"below < table\.columns \? below : table\.columns", "below"),
    Mutant("the last column is never live", r"below < table\.columns \? below : table\.columns", "below < table.columns ? below : table.columns - 1"),
    Mutant("outside the pool is row 0", r"(index < fill\.req_to_token\.rows \? index :) -1", r"\1 0", file="fill.h"),
    Mutant("the request after the pool is read", r"index < fill\.req_to_token\.rows", "index <= fill.req_to_token.rows", file="fill.h"),
    Mutant("a negative slot is rounded to 0", r"token < 0 \? -1 : 0;", "0;"),
    Mutant("a page begins one token late", r"return column \* table\.page_size\.value;", "return column * table.page_size.value + (table.page_size.value > 1);"),
    # DeepGEMM's schedule
    Mutant("a started segment does not count", r"\(length \+ kSegment - 1\) / kSegment", "length / kSegment"),
    Mutant("no row is too long for a schedule", r"expanded_length < schedule\.longest \? expanded_length : schedule\.longest", "expanded_length"),
    Mutant("the longest row is twice as long", r"INT32_MAX / maximum\(rows, 1\) \* kSegment", "INT32_MAX / maximum(rows, 1) * 2 * kSegment"),
    Mutant("the first processors take too little", r"p < longer \? p : longer", "p < longer ? p : longer - 1"),
    Mutant("the last processors begin too early", r"p > shorter \? p - shorter : 0", "p >= shorter ? p - shorter + 1 : 0"),
    # By request
    Mutant("a fill by request counts by rows", r"return fill\.ctx_lens_by_request\.data != nullptr;", "return false && fill.ctx_lens_by_request.data;"),
    Mutant("a context length is that of its row", r"(store_context\(fill, r, row - before\.row,) request\.length\)", r"\1 request.length - (before.row + request.rows - 1 - row))"),
    Mutant("columns of context lengths lie side by side", r"r \* out\.row_stride \+ j \* out\.column_stride", "r * out.row_stride + j"),
    Mutant("a request has its segments once", r"return static_cast<uint32_t>\(rows\) \* segments_of", "return segments_of"),
    Mutant("an item has the segments of its first row", r"q - 1 - \(row \+ rows - 1\) % q", "q - 1 - row % q"),
    Mutant("a segment is not divided by the rows that share it", r"\(start - before\) / static_cast<uint32_t>\(rows\)", "(start - before)"),
    # A k-pooling fill
    Mutant("a forward starts one token late", r"add\(length, 0u - fill\.rows_per_request\.value\)", "add(length, 1u - fill.rows_per_request.value)"),
    Mutant("tokens after the last k-pool are not kept", r"(fill\.index_topk\)) \+ \(seen - whole\)", r"\1"),
    Mutant("the tail counts in the top-k", r"\(whole < fill\.index_topk \? whole : fill\.index_topk\) \+ \(seen - whole\)", "(seen < fill.index_topk ? seen : fill.index_topk)"),
    Mutant("a start before 0 is rounded down", r"return -static_cast<int32_t>\(divide\(0u - static_cast<uint32_t>\(x\), by\)\);", "return ~static_cast<int32_t>(divide(static_cast<uint32_t>(~x), by));"),
    Mutant("row j has one token less", r"(add\(start_of\(fill, length\), j) \+ 1\)", r"\1)"),
    Mutant("a row without k-pools has no segment", r"(maximum\(kpools_of_row\(fill, length, j\),) 1\)", r"\1 0)"),
    Mutant("pages after req_to_token are live", r"return below < fill\.pages \? below : fill\.pages;", "return below;"),
    Mutant("a started page of the index is not live", r"divide_up\((length < 0 \? 0 : length, fill\.tokens_per_page)\)", r"divide(\1)"),
    Mutant("index pages are numbered by their own size", r"fill\.server_page_size\);", "fill.page_size);"),
    Mutant("a page of the index has page_size tokens", r"int64_t\{column\} \* fill\.tokens_per_page\.value", "int64_t{column} * fill.page_size.value"),
    Mutant("a page before 0 is not page 0", r"column < 0 \? 0 : column;", "column;"),
    Mutant("a location is cut to int32", r"live_column\) \* page_size \+ cell", "live_column) * static_cast<int32_t>(page_size) + cell"),
    Mutant("a request's index is cut to int32", r"= load\(fill\.req_pool_indices, r\); store", "= static_cast<int32_t>(load(fill.req_pool_indices, r)); store"),
    Mutant("outside the pool is row 0 of k-pools", r"(index < fill\.req_to_token\.rows \? index :) -1", r"\1 0", file="kpool.h"),
    Mutant("running sums of k-pooling begin at the row", r"(store\(fill\.nsa_cu_seqlens_k, row) \+ 1,", r"\1,", file="kpool.h"),
    Mutant("write_locs has no stride of columns", r"p \* fill\.write_locs\.column_stride", "p"),
    Mutant("the last row of a request has no pages", r"(row < \(r \+ 1\) \* n);", r"\1 - 1;"),
    # The comparison of the shadow check
    Mutant("a row belongs to the request after", r"all\.lengths\[row \* all\.requests / pair\.rows\]", "all.lengths[minimum((row + 1) * all.requests / pair.rows, all.requests - 1)]"),
    Mutant("all columns are compared", r"if \(pair\.page_size == 0\) return pair\.columns;", "return pair.columns;"),
    Mutant("a started page is not compared", r"ceil_div\(length_of_row\(all, pair, row\), pair\.page_size\)", "length_of_row(all, pair, row) / pair.page_size"),
    Mutant("the pair of a difference is forgotten", r"\(pair << [^)]*\) \|", "(pair & 0) |"),
    Mutant("a comparison goes on after a difference", r"return all\.report\[kDifferent\] != 0;", "return all.report[kDifferent] < 0;"),
)  # fmt: skip


def mutate(csrc: Path, mutant: Mutant) -> tuple[Path, str]:
    """The file that the mutant changes, and its new text.

    Raises:
        NotApplicableError: the pattern does not match exactly once.
    """
    pattern = re.compile(mutant.pattern.replace(" ", r"\s+"))
    sources = {
        path: path.read_text()
        for path in sorted(csrc.iterdir())
        if path.suffix in (".h", ".cc") and mutant.file in (None, path.name)
    }
    places = [path for path, text in sources.items() for _ in pattern.finditer(text)]
    if len(places) != 1:
        found = ", ".join(path.name for path in places) or "nowhere"
        raise NotApplicableError(f"{mutant.name}: the pattern must match once in csrc, found: {found}")
    return places[0], pattern.sub(mutant.replacement, sources[places[0]])


def build(copy: Path) -> str | None:
    """Builds the CPU twin of the copy; the compiler's words where that fails."""
    configure = ["cmake", "-S", "csrc", "-B", "build", "-DNSA_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Debug"]
    for command in (
        [*configure, f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", "build"],
    ):
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return done.stdout + done.stderr
    return None


def killer(copy: Path) -> str | None:
    """The first test that fails with the library of the copy, or None."""
    paths = [copy / "tests" / "mutation", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        "NSA_MUTANT_LIBRARY": str(copy / "build" / "nsa_metadata.so"),
        "PYTHONPATH": os.pathsep.join(map(str, filter(None, paths))),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "mutant_library", *PYTEST, *TESTS]
    try:
        done = subprocess.run(
            command,
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {TIME_LIMIT_S} s"
    if done.returncode == 0:
        return None
    failed = re.search(r"^FAILED (?:.*?::)?(\S+)", done.stdout, re.MULTILINE)
    if failed is None and done.returncode > 0:
        raise RuntimeError(f"pytest could not run:\n{done.stdout}{done.stderr}")
    return failed[1] if failed else f"signal {-done.returncode}"


def run(copy: Path, mutant: Mutant) -> str | None:
    """What killed the mutant, or None where it survived. The copy is as before."""
    path, changed = mutate(copy / "csrc", mutant)
    original = path.read_text()
    path.write_text(changed)
    try:
        error = build(copy)
        if error is not None:
            raise RuntimeError(f"{mutant.name}: does not compile:\n{error}")
        return killer(copy)
    finally:
        path.write_text(original)


def main(names: list[str]) -> int:
    """Runs the mutants of these names, or all of them."""
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        raise SystemExit(f"no mutant has the name {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    surprises = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        error = build(copy) or killer(copy)
        if error is not None:
            raise SystemExit(f"the tests fail without a mutant: {error}")
        for mutant in chosen:
            killed_by = run(copy, mutant)
            known = SURVIVORS.get(mutant.name)
            surprises += (killed_by is None) != (known is not None)
            outcome = f"killed by {killed_by}" if killed_by else f"SURVIVED ({known or 'unexpected'})"
            print(f"{mutant.name}: {outcome}", flush=True)
    print(f"{len(chosen)} mutants, {surprises} with another outcome than expected")
    return 1 if surprises else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
