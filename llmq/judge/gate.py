"""Verdicts on rules: by the 95 % interval, never by the point estimate.

Each rule is judged by an interval of its own. A gate passes where all of its rules pass, so several rules make a false
pass rarer, not likelier, and need no correction.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Literal

from llmq.errors import UserError, did_you_mean
from llmq.judge import results
from llmq.judge.protocols import HEADLINE, is_size, stored_otherwise, unlike, unpaired
from llmq.judge.results import Key
from llmq.rules import Rule, read_rule
from llmq.statistics import estimates, power
from llmq.statistics.compare import multiple, too_few
from llmq.statistics.estimates import FEWEST, Estimate
from llmq.statistics.pairing import count, pairs
from llmq.types import JsonObject, Measurement, in_points

Kind = Literal["ratio", "difference", "figure"]
Outcome = Literal["pass", "fail", "base-unhealthy", "undecided"]
EXIT_CODES: Mapping[str, int] = {"pass": 0, "fail": 1, "base-unhealthy": 1, "undecided": 3}
"""More samples can settle an undecided rule; none can settle a rule against a broken base, which therefore fails."""
AT_MOST_1 = ("map", "ssim")
"""How metrics without a unit begin that are 1 at most; others, such as a density or a BLEU, may be more."""
ORDER: Sequence[Outcome] = ("fail", "base-unhealthy", "undecided", "pass")


@dataclass(frozen=True)
class Ruling:
    """The verdict on one rule: the bounded ratio, difference or figure, with the interval.

    `n` counts the samples, or documents that share them, behind the verdict; `only_stage` and `only_base` those
    without a pair. `needed` is the number of samples that would settle the rule if the figure stays where it is; `fine`
    the number that would see `grain`, a percentage point or one part in a hundred.
    """

    rule: str
    stage: str
    task: str
    metric: str
    verdict: Outcome
    kind: Kind
    value: float
    ci95: tuple[float, float] | None
    bound: float
    unit: str
    points: bool
    n: int
    reason: str = ""
    needed: int | None = None
    grain: float | None = None
    fine: int | None = None
    only_stage: int = 0
    only_base: int = 0
    stored: str = ""
    """The dtypes of the stage and of the base, where they explain a part of a ratio of sizes."""


def judge(
    rules: Iterable[Rule], stage: str, found: Sequence[Measurement], base: Sequence[Measurement], stored: str = ""
) -> list[Ruling]:
    """The verdict on each rule. `found` and `base` are the same list where the base is set beside itself.

    `stored` names the dtypes of the two, where they differ. Raises `UserError` for a rule that names no figure, or
    several.
    """
    before = {(m.task, m.metric): m for m in base}
    broken = next(filter(None, (_unhealthy(m) for m in base if m.better == "lower")), "")
    verdicts = []
    for rule in rules:
        m = resolve(rule, found)
        verdict = _judge(rule, stage, m, before, found is base, broken)
        verdicts.append(replace(verdict, stored=stored) if rule.is_relative and is_size(m) else verdict)
    return verdicts


def of_run(target: str, texts: Iterable[str], stage: str | None = None) -> list[Ruling]:
    """The verdicts on one stage of a run, the last if unset, compared with the baseline of the run.

    Raises `UserError` for a folder that is no run, or an unknown stage.
    """
    rules = [read_rule(text) for text in texts]
    if not rules:  # which every model would pass
        raise UserError(f"no rule to judge {target!r} by; name one, such as 'perplexity <= 1.03x base'")
    folder = Path(target)
    if not (folder / "report.json").is_file():
        results.read(target)  # raises if the target is no result at all
        raise UserError(f"{target!r} is no run: a gate needs a folder with a report.json, its base among the stages")
    stages = results.run(folder)
    name = stage or list(stages)[-1]
    if name not in stages:
        raise UserError(f"run {target!r} has no measured stage {name!r}{did_you_mean(name, stages)}")
    base = next(iter(stages.values()))
    stored = stored_otherwise(stages[name].stored, base.stored)
    return judge(rules, name, stages[name].measurements, base.measurements, stored)


def overall(verdicts: Sequence[Ruling]) -> Outcome:
    """The worst of the verdicts, as all must pass."""
    return min((v.verdict for v in verdicts), key=ORDER.index, default="pass")


@dataclass(frozen=True)
class Gate:
    """The rulings on all rules of a gate."""

    rulings: Sequence[Ruling]

    @property
    def verdict(self) -> Outcome:
        """The worst of the verdicts, as all must pass."""
        return overall(self.rulings)

    @property
    def passed(self) -> bool:
        """True if every rule passed."""
        return self.verdict == "pass"

    def plain(self) -> JsonObject:
        """The rulings as JSON holds them."""
        return as_data(self.rulings)


def as_data(rulings: Sequence[Ruling]) -> JsonObject:
    """The rulings as JSON holds them."""
    outcome = overall(rulings)
    return {"verdict": outcome, "exit_code": EXIT_CODES[outcome], "rules": [asdict(r) for r in rulings]}


def resolve(rule: Rule, found: Iterable[Measurement]) -> Measurement:
    """The figure that a rule names. Raises `UserError` for a rule that bounds it from its better side."""
    m = named(rule.metric, found, f"rule {rule.text!r}")
    if rule.at_most != (m.better == "lower"):
        sign = "<=" if m.better == "lower" else ">="
        raise UserError(f"rule {rule.text!r} passes the worse models: {m.metric} is better {m.better}; write {sign}")
    return m


def named(word: str, found: Iterable[Measurement], asked: str) -> Measurement:
    """The figure of a name: by task and metric, by either, or by a part that only one of them has.

    Of several figures of one task the headline figure is meant: the size on disk, the perplexity a token, `acc`. Raises
    `UserError`, which begins with what `asked` for it.
    """
    known = {f"{m.task} {m.metric}": m for m in found}
    names = _candidates(word, known)
    leading = [name for name in names if known[name].metric in HEADLINE]
    if len(names) == 1 or len(leading) == 1:
        m = known[(names if len(names) == 1 else leading)[0]]
        if m.better == "unknown":
            raise UserError(f"{asked}: direction unknown: nothing states the better direction of {m.metric}")
        return m
    if names:
        raise UserError(f"{asked}: {word!r} can mean {', '.join(map(repr, names))}; name one")
    near = {*known, *(m.task for m in known.values()), *(m.metric for m in known.values())}
    raise UserError(f"{asked}: nothing measured is called {word!r}{did_you_mean(word, near)}")


def check(rules: Iterable[Rule], found: Sequence[Measurement], more: bool) -> None:
    """Raise `UserError` for a rule that names none or several of these figures; with `more` others will follow."""
    for rule in rules:
        if not more or _candidates(rule.metric, {f"{m.task} {m.metric}": m for m in found}):
            resolve(rule, found)


def _candidates(metric: str, known: Mapping[str, Measurement]) -> list[str]:
    word = metric.replace("/", " ").replace(":", " ").lower()
    whole = [name for name in known if name.lower() == word]
    either = [name for name, m in known.items() if word in (m.task.lower(), m.metric.lower())]
    return whole or either or [name for name in known if word in name.lower()]


def _judge(
    rule: Rule, stage: str, m: Measurement, before: Mapping[Key, Measurement], is_base: bool, broken: str
) -> Ruling:
    rule = _in_unit_of(rule, m)
    b = before.get((m.task, m.metric))
    kind: Kind = "figure" if not rule.is_relative else "difference" if rule.factor is None else "ratio"
    points = in_points(m.unit) or rule.unit == "pt"
    plain = Ruling(
        rule.text, stage, m.task, m.metric, "undecided", kind, m.value, None, rule.bound, m.unit, points, m.n
    )
    if rule.is_relative and b is None:
        return replace(plain, kind="figure", reason="the base was not asked this")
    if b and rule.is_relative:
        if kind == "ratio" and multiple(m.value, b.value) is None:
            told = f"the figure is {m.value:g} and the base's {b.value:g}, and no ratio of them means anything"
            return replace(plain, kind="figure", reason=told)
        if not is_base and (reason := unlike(m, b)):
            raise UserError(f"rule {rule.text!r}: {m.task} {m.metric} cannot be held against the base: {reason}")
        plain = replace(plain, value=m.value / b.value if kind == "ratio" else m.value - b.value)
        if sick := broken or _unhealthy(b):
            return replace(plain, verdict="base-unhealthy", reason=sick)
        if doubt := _doubtful(b):
            return replace(plain, n=_size(b), reason=doubt)
    if (is_base and rule.is_relative) or (m.exact and (kind == "figure" or (b and b.exact))):
        return _decide(plain, rule, _exact(plain))
    return _by_samples(plain, rule, m, b if rule.is_relative else None)


def _by_samples(plain: Ruling, rule: Rule, m: Measurement, b: Measurement | None) -> Ruling:
    """The verdict on a sampled figure, alone or beside the base."""
    if b and (reason := unpaired(m, b)):
        return replace(plain, reason=reason)
    both = pairs(m.samples, b.samples) if b and m.samples and b.samples else None
    if both:
        plain = replace(plain, n=both.n, only_stage=both.only_stage, only_base=both.only_base)
    else:
        plain = replace(plain, n=min(_size(m), _size(b)) if b else _size(m))
    if plain.n < FEWEST:
        return replace(plain, needed=FEWEST, reason=too_few(plain.n))
    if both:
        estimate = (estimates.ratio if plain.kind == "ratio" else estimates.difference)(both.stage, both.base)
    elif b:
        estimate = estimates.unpaired(m, b, as_ratio=plain.kind == "ratio")
    else:
        estimate = estimates.alone(m.samples) if m.samples else estimates.by_stderr(m)
    return _decide(plain, rule, estimate) if estimate else replace(plain, reason=_why_not(m, b))


def _exact(plain: Ruling) -> Estimate:
    return Estimate(plain.value, plain.value, plain.value, 0.0, plain.n)


def _decide(plain: Ruling, rule: Rule, e: Estimate) -> Ruling:
    worse, better = (e.high, e.low) if rule.at_most else (e.low, e.high)
    told = replace(plain, value=e.value, ci95=e.interval)
    if not (isfinite(e.low) and isfinite(e.high)):
        return replace(told, ci95=None, reason="the samples are too few for an interval", needed=None)
    if rule.allows(worse):
        return replace(told, verdict="pass")
    if not rule.allows(better):
        return replace(told, verdict="fail")
    grain = 0.01 if e.log or plain.points else 0.01 * abs(e.value or rule.bound)
    return replace(
        told,
        needed=e.needed(rule.bound),
        grain=grain or None,
        fine=power.needed(e.stderr, e.n, grain) if grain else None,
    )


def _why_not(m: Measurement, b: Measurement | None) -> str:
    if m.samples is None or (b is not None and b.samples is None):
        missing = m.stderr is None or (b is not None and b.stderr is None)
        return f"{'neither samples nor a standard error are' if missing else 'no scatter is'} known"
    if len(set(m.samples.values)) == 1:
        return f"all {len(m.samples.values)} samples are alike, so the scatter of other samples is unknown"
    return "these samples allow no interval"


def _unhealthy(base: Measurement) -> str:
    """The reason that a base is broken: it scores no better than chance. Empty for a sound base."""
    as_bad = base.chance is not None and _beyond(base.value, base)
    if not as_bad or _size(base) < FEWEST:
        return ""
    return f"the base's own {_beside_chance(base)}"


def _doubtful(base: Measurement) -> str:
    """The reason to doubt that a base is sound: its interval contains chance. Empty for a sound base."""
    e = (estimates.alone(base.samples) if base.samples else None) or estimates.by_stderr(base)
    if base.chance is None or not e or e.n < FEWEST or not _beyond(e.low if base.better == "higher" else e.high, base):
        return ""
    return f"so few samples cannot show that the base itself is sound: its {_beside_chance(base)}"


def _beyond(value: float, base: Measurement) -> bool:
    """True if a value is no better than blind guessing."""
    assert base.chance is not None
    return value <= base.chance if base.better == "higher" else base.better == "lower" and value >= base.chance


def _beside_chance(base: Measurement) -> str:
    guess = "guessing scores" if base.better == "higher" else "guessing evenly among its tokens scores"
    figure = f"{base.metric} of {base.value:.4g} ({base.n} samples)"
    return f"{figure} is not told from chance: {guess} {base.chance:.4g}"


def _size(m: Measurement) -> int:
    return count(m.samples) if m.samples else m.n


def _in_unit_of(rule: Rule, m: Measurement) -> Rule:
    """The rule with its bound in the unit of the figure. Raises `UserError` for a unit of another kind."""
    share = _is_share(m) or m.unit == "%"
    kinds = {"pt": share, "%": share, "": True}
    if not kinds.get(rule.unit, m.unit == "bytes"):
        raise UserError(f"rule {rule.text!r}: {m.task} {m.metric} is in {m.unit!r}, not in {rule.unit}")
    if share and m.unit != "%" and rule.unit == "" and (abs(rule.offset) >= 1 or (rule.number or 0) > 1):
        cure = f"{rule.number:g}%" if rule.number else f"{abs(rule.offset):g}pt"
        raise UserError(f"rule {rule.text!r}: {m.task} {m.metric} is a share, at most 1; write {cure}")
    if m.unit == "%" and rule.unit in ("pt", "%"):
        return replace(rule, offset=100 * rule.offset, number=None if rule.number is None else 100 * rule.number)
    return rule


def _is_share(m: Measurement) -> bool:
    return in_points(m.unit) or (m.unit == "" and m.metric.removeprefix("bicubic_").startswith(AT_MOST_1))
