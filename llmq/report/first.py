"""The first screen of the page: the job, what it cost and gained, and how sure that is."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.judge.protocols import QUALITY, SIZE, SPEED
from llmq.report.numbers import ALIKE, is_alike, number, scaled, set_beside
from llmq.types import JsonObject

if TYPE_CHECKING:
    from llmq.report import Report

CODE = "lm_eval code"
"""What lm-eval's tasks bring besides data, hashed with the data."""
CARDS: Mapping[str, Sequence[str]] = {"Size": (SIZE,), "Quality": QUALITY, "Speed": SPEED}


@dataclass(frozen=True)
class Card:
    """One question and the answer for one stage: the figure, the same beside the base, a word, and the certainty."""

    title: str
    metric: str
    value: str
    unit: str
    beside: str
    word: str
    certainty: Sequence[str]


def model_of(report: "Report") -> str:
    """The name of the model, or of the target that was evaluated."""
    model = report.recipe.get("model") or report.recipe.get("target", "")
    if isinstance(model, Mapping):
        ((word, settings),) = model.items()
        settings = settings or {}
        return str(settings.get("weights") or " ".join(filter(None, (word, settings.get("architecture")))))
    return str(model)


def steps_of(report: "Report") -> list[tuple[str, str]]:
    """Each step with the settings that the recipe gives, such as `("quantize.bnb", "bits 4")`."""
    told = []
    for entry in report.recipe.get("steps", ()):
        ((word, settings),) = ((entry, {}),) if isinstance(entry, str) else entry.items()
        told.append((word, ", ".join(f"{key} {_short(value)}" for key, value in (settings or {}).items())))
    return told


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k} {_short(v)}" if not isinstance(v, Mapping) or v else str(k) for k, v in value.items())
    if isinstance(value, bool):
        return str(value).lower()  # as the recipe has it
    return ", ".join(map(_short, value)) if isinstance(value, list) else str(value)


def origin(report: "Report") -> str:
    """The recipe, the run, the data, the date, the machine and the time, in one line."""
    about = report.environment
    seconds = report.seconds or sum(s["seconds"] for s in report.stages)
    took = f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
    recipe = (report.foretold or {}).get("recipe")
    parts = (
        f"recipe {recipe}" if recipe else "",
        f"run {name}" if (name := str(about.get("run", "")).rpartition("/")[2]) else "",
        ", ".join(data_of(report)),
        str(about.get("ended", ""))[:16].replace("T", " "),
        machine_of(report),
        f"{'all' if report.seconds else 'the steps'} took {took}" if len(report.stages) > 1 or report.seconds else "",
    )
    return " · ".join(filter(None, parts))


def data_of(report: "Report") -> list[str]:
    """The data that was read, without the code of lm-eval's tasks."""
    return list(dict.fromkeys(n.removeprefix("data.") for n in report.environment["data_sha256"] if n != CODE))


def machine_of(report: "Report") -> str:
    """The processor, and the number of threads."""
    threads = report.environment.get("threads", "?")
    return f"{report.environment.get('processor', 'processor unknown')}, {threads} thread{'' if threads == 1 else 's'}"


def cards(report: "Report", stage: str) -> Iterator[Card]:
    """The cards of one stage: size, quality, speed; and the gate."""
    asked = [m for m in report.measurements if m["stage"] == stage and not report.told_by_step(m)]
    found = {m["metric"]: m for m in reversed(asked)}  # that of the first task
    compared = {(c["task"], c["metric"]): c for c in report.comparisons if c["stage"] == stage}
    for title, metrics in CARDS.items():
        metric = next((name for name in metrics if name in found), "")
        if metric:
            m, c = found[metric], compared.get((found[metric]["task"], metric))
            scale, unit = scaled(m["unit"])
            beside = set_beside(c, m["unit"]) if c else ""
            word, certainty = (c["verdict"], _certainty(m, c)) if c else ("", _alone(report, m))
            yield Card(title, metric.replace("_", " "), number(m["value"] * scale), unit, beside, word, [certainty])
    if report.gate:
        rules, verdict = report.gate["rules"], report.gate["verdict"]
        told = [f"{v['verdict']}: {v['rule']}" for v in rules]
        yield Card("Gate", f"{len(rules)} rule{'' if len(rules) == 1 else 's'}", verdict, "", "", verdict, told)


def _alone(report: "Report", m: JsonObject) -> str:
    """The samples behind a figure that is not compared, and the base where the figure is itself a distance from it."""
    if m["exact"]:
        return "counted, not sampled"
    base = report.measured[0]
    if m["metric"] == "frechet_distance" and (floor := _floor(report, m["stage"])):
        return f"n = {m['n']:,}; two sets of the base's own images: {floor}"
    of_base = {other["metric"] for other in report.measurements if other["stage"] == base}
    is_own = m["metric"] in of_base or m["stage"] == base or report.lacks_base
    against = "" if is_own else f", against what {base} answers"
    place = m["stage"], m["task"], m["metric"]
    reason = next((r["reason"] for r in report.refused if (r["stage"], r["task"], r["metric"]) == place), "")
    return f"n = {m['n']:,}{against}{f'; not compared: {reason}' if reason else ''}"


def _floor(report: "Report", stage: str) -> str:
    """The Fréchet distance of two sets of one origin, which a good copy does not exceed; empty if not measured."""
    floors = (m["value"] for m in report.measurements if (m["stage"], m["metric"]) == (stage, "frechet_floor"))
    return next(map(number, floors), "")


def _certainty(m: JsonObject, c: JsonObject) -> str:
    """The samples behind a figure, and the number that would settle an undecided one."""
    if m["exact"]:
        return "counted, not sampled"
    n = f"n = {c['n'] or m['n']:,}"  # of the pairs, where documents without a pair were left out
    if c["reason"]:
        return f"{n}; {c['reason']}"
    if c["verdict"] == "undecided" and c["ci95"] and not c["ci95"][0] <= 0 <= c["ci95"][1]:
        return f"{n}; the interval leaves out 0, and would not if all comparisons of the table were to hold at once"
    if c["verdict"] == "undecided" and c.get("needed"):
        return f"{n}; about {c['needed']:,} would settle it, if the difference stays"
    if is_alike(c):
        return f"{n}; {ALIKE}"
    return f"{n}; the interval of the paired difference leaves out 0" if c["verdict"] in ("better", "worse") else n
