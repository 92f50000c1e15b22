"""docs/releases.md: the tested releases of SGLang and the GPUs on which they ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from integration.figures import servers
from integration.figures.committed import (
    RESULTS,
    SHOWN_CASE,
    commits,
    dates,
    host_us_of_a_step,
    load,
    paragraph,
    parts,
    parts_by_gpus,
    shown_case,
    table,
)
from integration.releases.install_sglang import release_key
from integration.releases.matrix import GENERATIONS, ROLES, said_of

COLUMNS = (
    "SGLang",
    "generation",
    "adapter",
    "hooks",
    "values compared without a GPU",
    "values compared on a GPU",
    "prompts with identical token ids",
    "host µs of a step in a server: SGLang → plugin",
    "host µs of draft-extend in bench: SGLang → plugin",
    "its launches: SGLang → plugin",
)

# Servers that are compared as they are: in other parts of a file one of the two is made to differ.
COMPARED = (
    "tokens_one_at_a_time",
    *servers.SETUPS,
    *("kpool", "kpool-checked", "decode", "decode-checked", "decode-fp8"),
)
SERVED_COLUMNS = (
    "SGLang",
    "kinds of servers",
    "prompts asked of both",
    "with other tokens",
    "minutes of load",
    "requests of SGLang and plugin",
    "failed",
)
TESTED_COLUMNS = (
    "SGLang",
    "tests passed",
    "failed",
    "skipped",
    "sanitizers",
    "demo",
    "SGLang's kit",
    "commits",
)


def page() -> str:
    matrix = load("releases.json")
    versions = sorted(matrix["parts"], key=release_key)
    rows = [_row(version, matrix["parts"][version]) for version in versions]
    return (
        "\n\n".join(
            [
                "# Tested releases of SGLang",
                paragraph(
                    "Made by `python -m integration.figures.build` from the files in `integration/results/`; "
                    "do not edit."
                ),
                table(COLUMNS, rows),
                paragraph(
                    "`make test-releases` compares every value with SGLang's own fill, for each release in an "
                    f"environment of its own, without a GPU ({dates(matrix)}; commits {commits(matrix)}). "
                    "The next column is of the demo in `make gpu-test`; the two after it are of the greedy prompts "
                    "in `make serve-test`, and of the metadata of all three graphs there. The last two are of "
                    "`sglang-nsa-plugin bench` on an H200, which times the call before a draft-extend forward of "
                    f"{SHOWN_CASE['requests']} requests of {SHOWN_CASE['length']:,} tokens. All compared values "
                    "were equal. A dash: not run. GPU figures of releases before 0.5.17 are of an earlier version of the "
                    "kernel, except those of servers of 0.5.14. The servers of 0.5.14 and of 0.5.18 to 0.5.22 ran "
                    "beside others on one GPU, which lengthens their host times. With 0.5.14 SGLang filled "
                    "draft-decode and verify, which is in the time with the plugin. Each result file names its GPU "
                    "and commit."
                ),
                "## Roles",
                paragraph(
                    "The values of each role that were compared without a GPU, all equal; or why the plugin leaves "
                    "the role to SGLang in that release, in its own words."
                ),
                table(
                    ("SGLang", *(roles := _tried_roles(matrix["parts"].values()))),
                    [_roles(version, matrix["parts"][version], roles) for version in versions],
                ),
                "## Servers",
                paragraph(
                    "Each row counts pairs of servers, one with the plugin and one without, that answered the same "
                    "prompts in slices of `make serve-test` on a GPU. Under load, 48 clients used each of the two. A "
                    "dash: not run. Left out are servers "
                    "that were made to differ on purpose, and 16 prompts at once in `core`, which are only reported: "
                    "there some prompts get other tokens each time, also from SGLang alone."
                ),
                table(SERVED_COLUMNS, [row for version in versions if (row := _served(version))]),
                _two_ranks(versions),
                "## GPU tests",
                paragraph(
                    "`make gpu-test`, over the release's own torch and native parts. Skipped are tests of what the release "
                    "does not have, and those that need two GPUs. *SGLang's kit*: SGLang's own test of DSA metadata, "
                    "while the plugin fills (`python3 -m integration.gpu.gpu_test --only sglang_kit`)."
                ),
                table(TESTED_COLUMNS, [row for version in versions if (row := _gpu_tested(version))]),
                "## Generations",
                table(
                    ("generation", "first release", "how SGLang plans draft-extend"),
                    [(name, first, what) for name, (first, what) in GENERATIONS.items()],
                ),
                "## GPUs",
                _gpus(),
            ]
        )
        + "\n"
    )


def _two_ranks(versions: list[str]) -> str:
    needed = {"tp2.record", "dp2.record", "switch-tp2.load"}
    with_two = [version for version in versions if needed <= parts(f"serve-{version}.json").keys()]
    return paragraph(
        f"Two GPUs, tensor parallel and with data-parallel attention, every role filled: {' and '.join(with_two)}. "
        "Both ranks decided alike and ran the same number of replays. With tensor parallelism both also followed the switch in "
        "service."
    )


def _row(version: str, row: dict[str, Any]) -> tuple[str, ...]:
    gpu, serve = parts(f"gpu-test-{version}.json"), parts(f"serve-{version}.json")
    tokens = serve.get("tokens_one_at_a_time")
    case = shown_case(version)
    return (
        version,
        row["generation"],
        row["adapter"],
        f"{len(row['hook_targets'])}",
        f"{row['values_compared']:,}" if row["verdict"] == "equal" else "different",
        f"{sum(gpu['demo']['compared'].values()):,}" if "demo" in gpu else "-",
        f"{tokens['same_ids']} of {tokens['prompts']}" if tokens else "-",
        _host_us_of_a_step(serve),
        f"{case['host_us']['sglang']:.0f} → {case['host_us']['ours']:.0f}" if case else "-",
        f"{case['launches']['sglang']} → {case['launches']['ours']}" if case else "-",
    )


def _host_us_of_a_step(serve: dict[str, Any]) -> str:
    us = host_us_of_a_step(serve)
    return "-" if us is None else f"{us['sglang']:.0f} → {us['plugin']:.0f}"


def _served(version: str) -> tuple[str, ...] | None:
    """What the two servers of each pair were asked; None for a release that no GPU has served."""
    found = parts(f"serve-{version}.json")
    compared = {
        name: list(servers.comparisons(part))
        for name, part in found.items()
        if name.partition(".")[0] in COMPARED
    }
    rows = [row for part in compared.values() for row in part]
    if not rows:
        return None
    loads = [part for name, part in found.items() if name.startswith("load") and "requests" in part]
    answered = (sum(load["requests"][arm]["answered"] for load in loads) for arm in ("sglang", "plugin"))
    return (
        version,
        str(len({name.partition(".")[0] for name, part in compared.items() if part})),
        f"{sum(row['prompts'] for row in rows):,}",
        str(sum(row["different"] for row in rows)),
        f"{sum(load['seconds'] for load in loads) / 60:.0f}" if loads else "-",
        " and ".join(f"{count:,}" for count in answered) if loads else "-",
        str(sum(len(errors) for load in loads for errors in load["errors"].values())) if loads else "-",
    )


def _gpu_tested(version: str) -> tuple[str, ...] | None:
    """What ``make gpu-test`` found; None for a release with which its tests did not run."""
    found = parts(f"gpu-test-{version}.json")
    if "tests" not in found:
        return None
    shown = {
        name: found[name] for name in ("tests", "sanitizers", "demo", "sglang_kit") if name in found
    }
    verdicts = {name: "passed" if part["passed"] else "failed" for name, part in shown.items()}
    counts = Counter(shown["tests"]["counts"])
    return (
        version,
        *(
            f"{count:,}"
            for count in (counts["passed"], counts["failed"] + counts["error"], counts["skipped"])
        ),
        *(verdicts.get(name, "-") for name in ("sanitizers", "demo", "sglang_kit")),
        commits({"parts": shown}),
    )


def _tried_roles(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Those that some release was tried with."""
    tried = {role for row in rows for role in row.get("roles", {})}
    return [role for role in ROLES if role in tried]


def _roles(version: str, row: dict[str, Any], roles: Iterable[str] = ROLES) -> tuple[str, ...]:
    parts_of = row.get("roles", {})
    return (version, *(said_of(parts_of[role]) if role in parts_of else "-" for role in roles))


def _gpus() -> str:
    """One row for each GPU and driver that a result file names, with the releases of those files."""
    found: dict[str, set[str]] = {}
    for path in (*RESULTS.glob("gpu-test-*.json"), *RESULTS.glob("serve-*.json")):
        run = load(path.name)
        for gpu in parts_by_gpus(run):
            found.setdefault(gpu, set()).add(run["versions"]["sglang"])
    rows = [
        (*gpu.split(", "), ", ".join(sorted(releases, key=release_key)))
        for gpu, releases in sorted(found.items())
    ]
    return table(("GPU", "driver", "SGLang releases tried on it"), rows)
