"""results.json of benchmarks/gpu.py as Markdown tables: table_of(results)."""

NOT_RUN = "Not run on a GPU."
PHASES = ("read", "sample", "attack", "measure", "update", "step")


def table(head: list[str], rows: list[list[str]]) -> str:
    """As study.tables.table, whose module imports too much for the command's first process."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def table_of(results: dict | None) -> str:
    """What ran where, then a table per subject, then what failed or was left out."""
    if results is None:
        return NOT_RUN
    parts = results["parts"]
    sections = [heading(results), *missing(parts)]
    for make in (step_table, decode_table, numbers_table, ratio_table, check_table):
        sections.append(make(parts))
    return "\n\n".join(filter(None, sections)) + "\n"


def heading(results: dict) -> str:
    """Device, versions, commit, and seconds per part."""
    machines = [part["machine"] for part in results["parts"].values() if "machine" in part]
    machine = machines[0] if machines else {"device": "unknown device", "versions": {}}
    text = machine["device"]
    if "memory GiB" in machine:
        text += f", {machine['memory GiB']:.0f} GiB"
    else:
        text = f"{NOT_RUN} These are figures of a rehearsal on a {text}"
    text += "; " * bool(results["toy"]) + "toy sizes" * results["toy"]
    versions = [f"{name} {version}" for name, version in machine["versions"].items() if version]
    seconds = [f"{name} {part['seconds']:.0f} s" for name, part in results["parts"].items()]
    commit = f"commit {results['commit']:.16}, sources {results['checksum of sources']}"
    return f"{text}. {', '.join(versions)}. {commit}. Parts: {', '.join(seconds)}."


def jobs_of(parts: dict) -> dict[str, dict]:
    """The jobs of all parts by name."""
    found = {}
    for part in parts.values():
        found |= {name: job for name, job in part.items() if isinstance(job, dict)}
    return found


def number(value: object, form: str = ".3g") -> str:
    return format(value, form) if isinstance(value, int | float) else ""


def step_table(parts: dict) -> str:
    """Seconds per phase and memory of a step, ours and the others'."""
    rows, jobs = [], jobs_of(parts)
    models = {"3B": "3B", "7B": "7B, LoRA", "Qwen3-VL-4B": "Qwen3-VL-4B, LoRA", "baseline": "3B"}
    for job, model in models.items():
        for name, found in jobs.get(job, {}).items():
            if not isinstance(found, dict) or "seconds/step" not in found:
                continue
            tokens, _, arm = name.partition(" image tokens, ")
            arm += ", first step" if found.get("steps") == 1 else ""
            row = [model, tokens, arm, found.get("setting", "")]
            row += [number(found.get(f"seconds/{phase}")) for phase in PHASES]
            row += [number(found.get("peak GiB"), ".1f"), number(found.get("planned GiB"), ".1f")]
            rows.append(row)
    head = ["model", "image tokens", "arm", "at a time", *PHASES, "peak, GiB", "plan, GiB"]
    return f"Seconds of a step:\n\n{table(head, rows)}" if rows else ""


def decode_table(parts: dict) -> str:
    """Decoding, prompt pass, scoring and PGD step by attention."""
    names = ["prompt pass", "token, static", "token, graph", "token, transformers' generate"]
    names += ["score", "PGD step of one prompt"]
    rows = []
    for attention, found in jobs_of(parts).get("decode", {}).items():
        if isinstance(found, dict) and "score" in found:
            row = [number(1000 * found[name]) if name in found else "" for name in names]
            rows.append([attention, *row])
    return f"Milliseconds, 3B in bfloat16:\n\n{table(['attention', *names], rows)}" if rows else ""


def numbers_table(parts: dict) -> str:
    """Largest differences of one step's numbers."""
    rows, names = [], []
    for name, found in jobs_of(parts).get("numbers", {}).items():
        if isinstance(found, dict) and "log-probs" in found:
            names = list(found)
            rows.append([name, *(number(x, ".0e") for x in found.values())])
    text = "Largest differences of a step of the demo in float32 (attacked images: share of pixels)"
    return f"{text}:\n\n{table(['compared', *names], rows)}" if rows else ""


def ratio_table(parts: dict) -> str:
    rows, names = [], []
    for name, found in jobs_of(parts).get("numbers", {}).items():
        if name.startswith("|ratio - 1|, "):
            names = list(found)
            precision = name.removeprefix("|ratio - 1|, ")
            rows.append([precision, *(number(x, ".1e") for x in found.values())])
    text = "abs(ratio - 1) of scored and sampled probabilities"
    return f"{text}:\n\n{table(['precision', *names], rows)}" if rows else ""


def check_table(parts: dict) -> str:
    """What holds and what does not: tests, the demo's learning, resume, processes."""
    jobs, rows = jobs_of(parts), []
    if outcomes := jobs.get("tests", {}).get("outcomes"):
        passed = sum(outcome == "passed" for outcome in outcomes.values())
        rows.append(["tests/test_device.py", f"{passed} of {len(outcomes)} passed"])
    demo = jobs.get("demo", {})
    if found := demo.get("against the CPU"):
        text = "the same learning" if found.get("the same learning") else "NOT the same learning"
        here = ", ".join(f"{x:.3f}" for x in found["accuracy, blocks"])
        there = ", ".join(f"{sum(x) / len(x):.3f}" for x in found["accuracy on CPUs, blocks"])
        text += f": accuracy {here}; on CPUs {there}; limit {found['limit']:.3f}"
        rows.append([f"demo, {len(demo['curves']['accuracy'])} steps", text])
    for name, found in jobs.get("resume", {}).items():
        if isinstance(found, dict) and "equal parameters" in found:
            equal = found["equal parameters"] and all(found["equal metrics of steps"])
            apart = f"parameters {found['parameters apart']:.1e} apart"
            rows.append([name, "equal bit for bit" if equal else f"not equal, {apart}"])
    for name, value in jobs.get("processes", {}).items():
        if name != "error":
            rows.append([f"two processes: {name}", number(value, ".1e") or str(value)])
    return table(["check", "found"], rows) if rows else ""


def missing(parts: dict) -> list[str]:
    """Lines on what failed, was left out or skipped."""
    lines = []

    def look(place: list[str], found: dict) -> None:
        for name, value in found.items():
            if name in ("error", "left out", "skipped"):
                lines.append(f"- {', '.join(place)}: {name}: {value}")
            elif isinstance(value, dict):
                look([*place, name], value)

    absent = {}
    for name, part in parts.items():
        look([f"part {name}"], part)
        absent |= dict.fromkeys(part.get("machine", {}).get("not installed", []))
    if absent:
        lines.append(f"- not installed: {', '.join(absent)}")
    return ["Failed, left out or skipped:", "\n".join(lines)] if lines else []
