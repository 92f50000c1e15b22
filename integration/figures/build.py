"""Writes README's figures and its table of releases from the committed result files.

    python -m integration.figures.build [--check]

What stands between marks in README.md is made here; --check only says whether it is up to date, and the
picture that integration/figures/plot.py draws.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from integration.figures import bench_figures, gpu_figures, serve_figures
from integration.releases.install_sglang import release_key
from integration.releases.matrix import GENERATIONS

ROOT = Path(__file__).resolve().parent.parent.parent
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "host-time.svg"
RESULTS = ROOT / "integration" / "results"
RELEASES = ("<!-- releases: made by integration/figures/build.py -->", "<!-- end of releases -->")
FIGURES = ("<!-- figures: made by integration/figures/build.py -->", "<!-- end of figures -->")
SHOWN_CASE = {"decode_impl": "flashmla_sparse", "requests": 8, "length": 32_768}
KINDS = {"bf16": "bfloat16", "fp8": "FP8"}  # servers of the slice paired
FULL_STEP_MS = (5, 18)  # one speculative step of DeepSeek-V3.2 at full size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    current = README.read_text()
    wanted = with_figures(current)
    if check:
        stale = {
            "README.md differs: run this script": current != wanted,
            "docs/host-time.svg shows other figures: run integration/figures/plot.py": depicted()
            != pictured(),
        }
        print("\n".join(what for what, is_so in stale.items() if is_so) or "README.md is up to date")
        return int(any(stale.values()))
    README.write_text(wanted)
    return 0


def with_figures(readme: str) -> str:
    """The text with its table and its figures made anew."""
    return between(between(readme, RELEASES, releases()), FIGURES, figures())


def between(text: str, marks: tuple[str, str], made: str) -> str:
    begin, end = marks
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{made}\n{end}{after}"


def releases() -> str:
    """One row a release: compared on the CPU, in real CUDA graphs or steps on a GPU, in servers."""
    matrix = json.loads((RESULTS / "releases.json").read_text())
    by_age = sorted(matrix["parts"], key=release_key)
    rows = [release(version, matrix["parts"][version]) for version in by_age]
    return (
        "| SGLang | generation | adapter | hooks | values compared without a GPU | on a GPU | servers, identical "
        "token ids | host µs of one plan | launches |\n|---|---|---|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\nGenerations of SGLang's code: {generations()}. *Host µs* and *launches*: what SGLang's own call costs before a draft-extend forward of 8 requests "
        "of 32k tokens, and ours; from `sglang-nsa-plugin bench` on an H200, both in one run. All values "
        f"compared were equal. From `integration/results/` (`releases.json`: {matrix['date'][:10]}, "
        f"{commits('compared', matrix)}; `gpu-test-VERSION.json`, `bench-h200-VERSION.json`, `serve-VERSION.json`, each with its commit: "
        f"`gpu-test` of the releases but 0.5.17, and each `bench` there, is of an earlier kernel).\n\n{gpus()}"
    )


def gpus() -> str:
    """One row for each GPU and driver that a result file names, with the releases of those files."""
    found: dict[str, set[str]] = {}
    for path in (*RESULTS.glob("gpu-test-*.json"), *RESULTS.glob("serve-*.json")):
        run = json.loads(path.read_text())
        for gpu in parts_by_gpus(run):
            found.setdefault(gpu, set()).add(run["versions"]["sglang"])
    rows = [
        f"| {gpu.replace(', ', ' | ')} | {', '.join(sorted(tested, key=release_key))} |"
        for gpu, tested in sorted(found.items())
    ]
    return "| GPU | driver | SGLang releases tried on it |\n|---|---|---|\n" + "\n".join(rows)


def parts_by_gpus(run: dict[str, Any]) -> dict[str, list[str]]:
    """The parts of a result file by the GPU and driver that they were run on."""
    found: dict[str, list[str]] = {}
    for name, part in run["parts"].items():
        for gpu in dict.fromkeys(part.get("of", run)["gpus"]):
            found.setdefault(gpu, []).append(name)
    return found


def generations() -> str:
    return "; ".join(f"{name}, {what}, from {first}" for name, (first, what) in GENERATIONS.items())


def release(version: str, row: dict[str, Any]) -> str:
    gpu, serve = parts(f"gpu-test-{version}.json"), parts(f"serve-{version}.json")
    tokens = serve.get("tokens_one_at_a_time")
    shown = shown_case(version)
    cells = [
        version,
        row["generation"],
        row["adapter"],
        f"{len(row['hook_targets'])}",
        f"{row['values_compared']:,}" if row["verdict"] == "equal" else "different",
        f"{sum(gpu['demo']['compared'].values()):,} values" if "demo" in gpu else "-",
        f"{tokens['same_ids']} of {tokens['prompts']} prompts" if tokens else "-",
        f"{shown['host_us']['sglang']:.0f} → {shown['host_us']['ours']:.0f}" if shown else "-",
        f"{shown['launches']['sglang']} → {shown['launches']['ours']}" if shown else "-",
    ]
    return f"| {' | '.join(cells)} |"


def shown_case(version: str) -> dict[str, Any] | None:
    """The timed case that stands for a release; None where it was not timed."""
    timed = parts(f"bench-h200-{version}.json") or parts(f"gpu-test-{version}.json")
    cases = timed.get("bench", {}).get("cases", [])
    whole = (case for case in cases if "ours" in case["host_us"])  # others time kernels alone
    return next((case for case in whole if SHOWN_CASE.items() <= case.items()), None)


def pictured() -> dict[str, dict[str, float]]:
    """Release → host microseconds of SGLang's own planning and of ours: what PICTURE has to show."""
    versions = sorted(
        (path.stem.removeprefix("gpu-test-") for path in RESULTS.glob("gpu-test-*.json")),
        key=release_key,
    )
    cases = {version: shown_case(version) for version in versions}
    return {
        version: {name: case["host_us"][name] for name in ("sglang", "ours")}
        for version, case in cases.items()
        if case is not None
    }


def depicted() -> Any:
    """What it shows, as integration/figures/plot.py wrote it into its description."""
    described = ElementTree.parse(PICTURE).find(".//{http://purl.org/dc/elements/1.1/}description")
    return None if described is None else json.loads(described.text or "null")


def parts(name: str) -> dict[str, Any]:
    """The parts of a result file; none where there is no such file."""
    path = RESULTS / name
    return dict(json.loads(path.read_text())["parts"]) if path.is_file() else {}


def figures() -> str:
    serve = json.loads((RESULTS / "serve-0.5.17.json").read_text())
    gpu = json.loads((RESULTS / "gpu-test-0.5.17.json").read_text())
    loads = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("shadow-load-*.json"))]
    return "\n\n".join(
        [
            served(serve["parts"]),
            full_size(serve["parts"]),
            *one_fill(),
            tokens(serve["parts"]),
            *serve_figures.figures(serve["parts"]),
            fence(json.loads((RESULTS / "fence-0.5.17.json").read_text())),
            *gpu_figures.figures(gpu["parts"], serve["parts"], loads),
            source(serve, gpu),
        ]
    )


def served(parts: dict[str, Any]) -> str:
    ours, theirs = (parts["host_time"][arm] for arm in ("plugin", "sglang"))
    rows = [
        ("host time of the fill before a draft-extend replay, median", "fill_us", "median", "µs"),
        ("the same, 90th percentile", "fill_us", "p90", "µs"),
        (
            "the same, greatest: SGLang compiles its kernel anew for a new batch size",
            "fill_us",
            "max",
            "µs",
        ),
        ("all host time between the call and the replay, median", "before_replay_us", "median", "µs"),
    ]
    lines = [f"| {text} | {theirs[k][s]:,.0f} {u} | {ours[k][s]:,.0f} {u} |" for text, k, s, u in rows]
    return (
        "Two servers on one GPU, a 2-layer model with one MTP layer, EAGLE with 3 steps and 4 draft "
        "tokens, bfloat16 where nothing else is said:\n\n| | SGLang | with the plugin |\n|---|---|---|\n"
        + "\n".join([*lines, *(line for kind in KINDS for line in paired(parts, kind))])
        + f"\n\nThe host times are of commit {parts['host_time']['of']['commit'][:7]}. "
        + " ".join(whole_step(parts, kind) for kind in KINDS)
    )


def paired(parts: dict[str, Any], kind: str) -> list[str]:
    step, many = (
        parts[f"paired-{kind}.{name}"]["plugin_over_sglang"] for name in ("step_time", "throughput")
    )
    return [
        f"| time of a speculative step, 1 request, {KINDS[kind]}, {ratio(step)} | 1 | {step['median']:.2f} |",
        f"| throughput, 16 requests at once, {KINDS[kind]}, {ratio(many)} | 1 | {many['median']:.2f} |",
    ]


def whole_step(parts: dict[str, Any], kind: str) -> str:
    """Where the time of a step goes, with one request."""
    spent = parts[f"paired-{kind}.step_time"]["us_of_a_step"]
    ours, theirs = spent["plugin"], spent["sglang"]
    return (
        f"Of a step of the pairs, {KINDS[kind]}, 1 request, the fill is {ours['fill']:.0f} of "
        f"{ours['step']:,.0f} µs with the plugin and {theirs['fill']:.0f} of {theirs['step']:,.0f} with SGLang, "
        f"what else the host does before the replay {ours['before_replay_without_fill']:.0f} and "
        f"{theirs['before_replay_without_fill']:.0f}, and everything else {ours['rest_of_step']:,.0f} and "
        f"{theirs['rest_of_step']:,.0f}."
    )


def ratio(of: dict[str, Any]) -> str:
    return f"median of {len(of['each'])} pairs ({of['min']:.2f} to {of['max']:.2f})"


def below_one(of: dict[str, Any]) -> str:
    return f"{sum(each < 1 for each in of['each'])} of {len(of['each'])}"


def full_size(parts: dict[str, Any]) -> str:
    ours, theirs = (
        parts["host_time"][arm]["before_replay_us"]["median"] for arm in ("plugin", "sglang")
    )
    saved = (theirs - ours) / 1000
    return (
        f"The host time saved is {saved:.2f} ms a step and rank. On DeepSeek-V3.2 at full size a step takes "
        f"{FULL_STEP_MS[0]} to {FULL_STEP_MS[1]} ms, so that is {share_of_step(saved)} of a step at "
        "most, and less where the GPU is the slower side and the host's time is hidden behind it. "
        f"{more_where_eager()} The "
        "last four rows are of a tiny model, whose steps differ from pair to pair by more than the gain, in "
        "what neither server does differently: they neither show the gain nor rule it out."
    )


def share_of_step(saved_ms: float) -> str:
    least, most = (100 * saved_ms / step for step in reversed(FULL_STEP_MS))
    return f"{least:.0f} to {most:.0f} %"


def more_where_eager() -> str:
    """From the newest release that plans eagerly and was timed."""
    matrix = json.loads((RESULTS / "releases.json").read_text())["parts"]
    timed = {
        version: case
        for version, row in matrix.items()
        if row["adapter"] == "eager" and (case := shown_case(version)) is not None
    }
    version = max(timed, key=release_key)
    theirs, ours = (timed[version]["host_us"][who] / 1000 for who in ("sglang", "ours"))
    return (
        f"It is more where SGLang plans each step eagerly, up to 0.5.14: with {version} planning {SHOWN_CASE['requests']} "
        f"requests of {SHOWN_CASE['length']:,} tokens took {theirs:.2f} ms of the host's time and with the plugin "
        f"{ours:.2f} ms, {share_of_step(theirs - ours)} of such a step at most; and with models whose steps are shorter."
    )


def one_fill() -> list[str]:
    """From the newest `make bench` on an H200; none while there is none."""
    newest = bench_figures.newest(RESULTS)
    return [] if newest is None else [bench_figures.figures(newest)]


def tokens(parts: dict[str, Any]) -> str:
    found, record = parts["tokens_one_at_a_time"], parts["record"]["record"]
    within = [row for row in found["each"] if row["deterministic"]]
    same = sum(row["same_drafts"] for row in within)
    long, drafts = found["long_prompts"], found["tokens_per_step"]
    return (
        f"Tokens at temperature 0: {found['same_ids']} of {found['prompts']} prompts of 5 to 6,000 tokens gave "
        f"identical token ids, and {same} of the {len(within)} that stay within the 2,048 tokens that sparse "
        "attention keeps had the same drafts accepted in each step count. Beyond 2,048 SGLang's top-k keeps "
        f"no fixed order and some prompts get other tokens each time: the {long['kept']} longer prompts are "
        f"those of {long['drawn']} drawn that SGLang without the plugin answered {long['answered_alike']} "
        f"times alike. Tokens per step: {drafts['plugin']:.2f} with the plugin, {drafts['sglang']:.2f} without. "
        f"{record['replays']:,} replays, all in the graph, {sum(record['fallbacks'].values())} fallbacks."
    )


def fence(run: dict[str, Any]) -> str:
    part = run["parts"]["fence"]
    step, many = (part[name]["coarse_over_plugin"] for name in ("step_time", "throughput"))
    return (
        "The event that frees `req_to_token` for the scheduler is recorded in the graph, behind the fill. "
        f"Waiting for the whole forward instead gave {step['median']:.2f} times the step time, "
        f"{ratio(step)}, and {many['median']:.2f} times the throughput, {ratio(many)}: the whole forward was "
        f"the faster one in {below_one(step)} pairs of steps and behind in {below_one(many)} of throughput. These are "
        "single turns on a shared host, not yet the medians of four that pairs are made of now. `tests/gpu/test_gpu_in_graph.py` shows that the read is covered and that "
        "the scheduler goes on before the forward ends. From `integration/results/fence-0.5.17.json`, "
        f"{run['date'][:10]}, commit {run['commit'][:7]}, an earlier kernel."
    )


def source(serve: dict[str, Any], gpu: dict[str, Any]) -> str:
    versions = serve["versions"]
    return (
        f"From `integration/results/serve-0.5.17.json`: {hosts(serve)}, {commits('served', serve)}, until "
        f"{serve['date'][:10]}; and `gpu-test-0.5.17.json`: {hosts(gpu)}, {commits('tested', gpu)}, until "
        f"{gpu['date'][:10]}; both with SGLang {versions['sglang']} and torch {versions['torch']}. Each part of a "
        "file says which GPU and commit it is of."
    )


def hosts(run: dict[str, Any]) -> str:
    """The GPU of most parts, and which parts are of others."""
    by_gpus = parts_by_gpus(run)
    most, *others = sorted(by_gpus, key=lambda gpu: -len(by_gpus[gpu]))
    said = most.replace(", ", ", driver ")
    for gpu in others:
        setups = dict.fromkeys(part.partition(".")[0] for part in by_gpus[gpu])
        said += f" ({', '.join(setups)}: {gpu.replace(', ', ', driver ')})"
    return said


def commits(what: str, run: dict[str, Any]) -> str:
    """The commits that the parts of a result file are of."""
    found = {part.get("of", run)["commit"][:7] for part in run["parts"].values()}
    return f"{what} at commit{'s' * (len(found) > 1)} {', '.join(sorted(found))}"


if __name__ == "__main__":
    raise SystemExit(main())
