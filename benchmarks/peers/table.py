"""Runs flow in (dicts, one per measured process), medians and ratios flow out, as a dict and as a markdown page."""

from dataclasses import dataclass
from statistics import median

FIGURES = (
    "first_s",
    "token_s",
    "encode_s",
    "load_s",
    "peak_bytes",
    "bandwidth",
    "others",
    "roofline",
)


@dataclass(frozen=True)
class Target:
    """Row of the targets. kind: the figure whose ratio (fastest of `peers` / ours) counts; "roofline": our share of the
    bandwidth; "throughput": tokens per second of `ours` over that of the peer."""

    text: str
    least: float
    kind: str
    ours: str
    peers: tuple[str, ...] = ()


def medians(runs: list[dict]) -> dict[str, dict]:
    """Name -> median of each figure over the rounds that worked, number of rounds, and the text of the last one."""
    found = {}
    for name in dict.fromkeys(run["name"] for run in runs if "error" not in run):
        mine = [run for run in runs if run["name"] == name and "error" not in run]
        values = {key: [run[key] for run in mine if run.get(key) is not None] for key in FIGURES}
        found[name] = (
            {key: median(v) for key, v in values.items() if v}
            | {key: mine[-1].get(key, "") for key in ("version", "settings")}
            | {"rounds": len(mine), "batch": mine[-1]["batch"]}
        )
        if "token_s" in found[name]:
            found[name]["tokens_per_s"] = found[name]["batch"] / found[name]["token_s"]
    return found


def missing(
    names: list[str], absent: dict[str, str], runs: list[dict], rows: dict
) -> dict[str, str]:
    """Name -> why it has no row: every configuration that was planned, and the peers that cannot take part."""
    errors = {run["name"]: run["error"] for run in runs if "error" in run}
    return {
        **absent,
        **{name: errors.get(name, "was not run") for name in names if name not in rows},
    }


def ratio(target: Target, rows: dict) -> float | None:
    """What the target asks for, None where a row of it is missing."""
    peers = [rows[name] for name in target.peers if name in rows]
    if target.ours not in rows or bool(target.peers) > bool(peers):
        return None
    ours = rows[target.ours]
    if target.kind == "roofline":
        return ours.get("roofline")
    if target.kind == "throughput":
        return ours["tokens_per_s"] / peers[0]["tokens_per_s"]
    return min(peer[target.kind] for peer in peers) / ours[target.kind]


def judged(targets, rows: dict) -> list[dict]:
    """One dict per target: ratio, "met" | "not met" | "not measured", and the peers that were missing."""
    found = []
    for target in targets:
        value = ratio(target, rows)
        verdict = "not measured" if value is None else "met" if value >= target.least else "not met"
        lacking = [name for name in (target.ours, *target.peers) if name not in rows]
        found.append(
            {
                "target": target.text,
                "at least": target.least,
                "measured": value,
                "verdict": verdict,
                "without": lacking,
            }
        )
    return found


def markdown(found: dict) -> str:
    """The page: machine, a row per configuration, what is missing, the targets."""
    lines = [
        f"# {found['model']}: {found['case']}",
        "",
        f"{found['date']}, {found['machine']}. Medians of the rounds; "
        "bandwidth is the mean of what was read before and after.",
        "",
        *_figures(found["rows"]),
        "",
    ]
    if found["missing"]:
        lines += [
            "| missing | why |",
            "|---|---|",
            *(f"| {n} | {_cell(why)} |" for n, why in found["missing"].items()),
            "",
        ]
    if found["targets"]:
        lines += ["| target | at least | measured | |", "|---|---|---|---|"]
    for row in found["targets"]:
        value = "-" if row["measured"] is None else f"{row['measured']:.2f}"
        note = f" (without {', '.join(row['without'])})" if row["without"] else ""
        lines.append(
            f"| {row['target']} | {row['at least']:g} | {value} | {row['verdict']}{note} |"
        )
    versions = dict.fromkeys(row["version"] for row in found["rows"].values())
    return "\n".join([*lines, "", "Versions: " + "; ".join(versions) + ".", ""])


COLUMNS = {
    "first token s": ("first_s", 1, 3),
    "per token ms": ("token_s", 1e3, 1),
    "tokens/s": ("tokens_per_s", 1, 1),
    "picture s": ("encode_s", 1, 3),
    "of roofline": ("roofline", 1, 2),
    "bandwidth GB/s": ("bandwidth", 1e-9, 1),
    "peak GB": ("peak_bytes", 1e-9, 2),
    "load s": ("load_s", 1, 1),
    "CPU of others": ("others", 1, 2),
    "rounds": ("rounds", 1, 0),
}


def _figures(rows: dict) -> list[str]:
    shown = {
        title: spec
        for title, spec in COLUMNS.items()
        if any(spec[0] in row for row in rows.values())
    }
    lines = [f"| configuration | {' | '.join(shown)} |", "|---" * (1 + len(shown)) + "|"]
    for name, row in rows.items():
        cells = [
            f"{row[key] * scale:.{places}f}" if key in row else "-"
            for key, scale, places in shown.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
