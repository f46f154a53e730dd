"""Takes runs (dicts, one per measured process), returns medians and ratios, as a dict and as a markdown page."""

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
    """A row of the targets: `ours` should be at least `least` times as good as the fastest of `peers`.

    kind: the figure in seconds whose ratio (fastest of `peers` / ours) counts; "roofline": our share of the bandwidth,
    without peers; "throughput": tokens per second of `ours` divided by those of the first peer.
    """

    text: str
    least: float
    kind: str
    ours: str
    peers: tuple[str, ...] = ()


def medians(runs: list[dict]) -> dict[str, dict]:
    """Name -> median of each figure over the rounds that worked, number of rounds, and the text of the last one."""
    by_name = {}
    for run in runs:
        if "error" not in run:
            by_name.setdefault(run["name"], []).append(run)
    return {name: _median_row(rounds) for name, rounds in by_name.items()}


def _median_row(rounds: list[dict]) -> dict:
    last = rounds[-1]
    row = {}
    for key in FIGURES:
        values = [run[key] for run in rounds if run.get(key) is not None]
        if values:
            row[key] = median(values)
    for key in ("version", "settings"):
        row[key] = last.get(key, "")
    row |= {"rounds": len(rounds), "batch": last["batch"]}
    if "token_s" in row:
        row["tokens_per_s"] = row["batch"] / row["token_s"]
    return row


def missing(
    names: list[str], absent: dict[str, str], runs: list[dict], rows: dict
) -> dict[str, str]:
    """Name -> why it has no row: every configuration that was planned, and the peers that cannot take part."""
    errors = {run["name"]: run["error"] for run in runs if "error" in run}
    reasons = dict(absent)
    for name in names:
        if name not in rows:
            reasons[name] = errors.get(name, "was not run")
    return reasons


def ratio(target: Target, rows: dict) -> float | None:
    """The value that the target is about; None if our row or all rows of its peers are missing."""
    peers = [rows[name] for name in target.peers if name in rows]
    if target.ours not in rows or (target.peers and not peers):
        return None
    ours = rows[target.ours]
    if target.kind == "roofline":
        return ours.get("roofline")
    if target.kind == "throughput":
        return ours["tokens_per_s"] / peers[0]["tokens_per_s"]
    return min(peer[target.kind] for peer in peers) / ours[target.kind]


def judge(targets, rows: dict) -> list[dict]:
    """One dict per target: its value, "met" | "not met" | "not measured", and the rows that were missing."""
    judged = []
    for target in targets:
        value = ratio(target, rows)
        row = {
            "target": target.text,
            "at least": target.least,
            "measured": value,
            "verdict": _verdict(value, target.least),
            "without": [name for name in (target.ours, *target.peers) if name not in rows],
        }
        judged.append(row)
    return judged


def _verdict(value: float | None, least: float) -> str:
    if value is None:
        return "not measured"
    return "met" if value >= least else "not met"


def markdown(report: dict) -> str:
    """The page: machine, a row per configuration, what is missing, the targets."""
    lines = [
        f"# {report['model']}: {report['case']}",
        "",
        f"{report['date']}, {report['machine']}. Medians of the rounds; "
        "bandwidth is the mean of what was read before and after.",
        "",
        *_figure_table(report["rows"]),
        "",
    ]
    if report["missing"]:
        lines += ["| missing | why |", "|---|---|"]
        lines += [f"| {name} | {_cell(why)} |" for name, why in report["missing"].items()]
        lines.append("")
    if report["targets"]:
        lines += ["| target | at least | measured | |", "|---|---|---|---|"]
        lines += [_target_line(row) for row in report["targets"]]
    versions = dict.fromkeys(row["version"] for row in report["rows"].values())
    return "\n".join([*lines, "", "Versions: " + "; ".join(versions) + ".", ""])


def _target_line(row: dict) -> str:
    value = "-" if row["measured"] is None else f"{row['measured']:.2f}"
    note = f" (without {', '.join(row['without'])})" if row["without"] else ""
    return f"| {row['target']} | {row['at least']:g} | {value} | {row['verdict']}{note} |"


COLUMNS = {  # title -> (figure, factor, decimal places)
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


def _figure_table(rows: dict) -> list[str]:
    """A line per configuration, with the columns that at least one of them has."""
    keys = set().union(*rows.values())
    shown = {title: column for title, column in COLUMNS.items() if column[0] in keys}
    lines = [f"| configuration | {' | '.join(shown)} |", "|---" * (1 + len(shown)) + "|"]
    for name, row in rows.items():
        cells = [_figure(row, *column) for column in shown.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _figure(row: dict, key: str, factor: float, places: int) -> str:
    return f"{row[key] * factor:.{places}f}" if key in row else "-"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
