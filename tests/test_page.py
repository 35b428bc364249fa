"""The page: its first screen, its forest plot, what it folds; and in a browser its width, contrast and requests."""

import html as markup
import io
import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from run_folders import FACTS, accuracy, perplexity, size, speed, write_run

from llmq import cli
from llmq.errors import UserError
from llmq.judge import gate
from llmq.report import Report, charts, distributions, drawing, first, forest, html, numbers, rows, samples, screen
from llmq.report.numbers import set_beside
from llmq.statistics.compare import compare
from llmq.statistics.figures import mean
from llmq.types import Measurement, Samples

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def gain(decibels: float) -> Measurement:
    return Measurement("super_resolution", "psnr_gain", decibels, "dB", "higher", 40, 0.1, "PSNR less bicubic's")


def agreement(share: float) -> Measurement:
    return Measurement("accuracy", "top1_agreement", share, "share", "higher", 96, 0.05, "against the base")


def write_answers(stage, right):
    """The answers to questions of two choices as lm-eval writes them; the first choice is right."""
    (stage / "lm_eval").mkdir(parents=True)
    rows = [
        {
            "doc_id": str(i),
            "arguments": {f"gen_args_{k}": {"arg_0": f"Question <{i}>?", "arg_1": f" choice {k}"} for k in (0, 1)},
            "filtered_resps": [["-1.0", "False"], ["-2.0" if answer else "-0.5", "False"]],
            "filter": "none",
            "acc": str(float(answer)),
        }
        for i, answer in enumerate(right)
    ]
    lines = "\n".join(map(json.dumps, rows))
    (stage / "lm_eval/samples_arc_easy_2026-11-27T09-37-43.705910.jsonl").write_text(lines)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    random = np.random.default_rng(0)
    losses, right = random.normal(2.4, 0.3, 64), random.random(96) < 0.6
    worse = losses + random.normal(0.1, 0.05, 64)
    folder = tmp_path_factory.mktemp("page") / "a <b>run</b> of words"
    write_run(
        folder,
        {
            "0-base": [size(269.1), perplexity(losses), accuracy(right), speed([14.0 + x / 10 for x in range(10)])],
            "1-quantize.bnb": [size(111.9), perplexity(worse), accuracy(~right), speed([18.0] * 10)],
        },
    )
    write_answers(folder / "0-base", right)
    write_answers(folder / "1-quantize.bnb", ~right)
    told = json.loads((folder / "report.json").read_text())
    steps = [{"quantize.bnb": {"bits": 4, "modules": {"lm_head": "skip"}}}]
    told["recipe"] = {"model": {"causal_lm": {"weights": "org/" + "long-name-" * 12}}, "steps": steps, "evaluate": []}
    about = {"run": str(folder), "ended": "2026-11-27T03:10:00+0000", "processor": "A processor", "threads": 2}
    told["environment"] = {**FACTS, **about, "dtype": None, "data_sha256": {"data.pydoc": "ab" * 32}}
    told["stages"][1]["notes"]["training"] = {"loss": [[i, 2.5 - 0.02 * i] for i in range(20)]}
    told["exhibits"] = [
        {"stage": stage, "task": "rock", "title": f"scene {views}", "input": "a scan", "output": "", "reference": "",
         "file": f"{stage}.png", **({"panels": list(views)} if views else {})}
        for views in ("", "ab")
        for stage in ("0-base", "1-quantize.bnb")
    ]  # fmt: skip
    for stage in ("0-base", "1-quantize.bnb"):
        Image.new("L", (32, 16)).save(folder / f"{stage}.png")
    (folder / "report.json").write_text(json.dumps(told))
    return folder


def test_the_first_screen_names_the_job_and_answers_for_size_quality_and_speed(run):
    report = Report.read(run)
    page = html.draw(report, run)
    assert first.steps_of(report) == [("quantize.bnb", "bits 4, modules lm_head skip")]
    assert first.origin(report).endswith("· pydoc · 2026-11-27 03:10 · A processor, 2 threads · the steps took 0 s")
    made = list(first.cards(report, "1-quantize.bnb"))
    assert [(card.title, card.word) for card in made[:2]] == [("Size", "better"), ("Quality", "worse")]
    assert re.fullmatch(r"1\.\d\d× \[1\.\d\d, 1\.\d\d\]", made[1].beside)
    assert made[0].certainty == ["counted, not sampled"]
    assert made[1].certainty[0].startswith("n = 64; the interval")
    assert "None" not in page
    assert "<b>run</b>" not in page


def test_a_useless_result_is_said_first(tmp_path):
    write_run(tmp_path / "run", {"0-base": [gain(1.2)], "1-quantize.int8": [gain(-1.84), agreement(0.53)]})
    assert rows.summary(Report.read(tmp_path / "run"))[:2] == [
        "BAD: 1-quantize.int8: its images are 1.84 dB below plain bicubic interpolation",
        "BAD: 1-quantize.int8: it gives another class than the base to 47% of 96 images",
    ]


def test_a_base_that_was_not_trained_is_no_alarm_and_no_measure(tmp_path):
    untrained, trained = (accuracy([right] * 96, "accuracy", "top1", None) for right in (0, 1))
    stages = {"0-base": [gain(-9.0), untrained], "1-adapt.train": [gain(2.0), trained, agreement(0.0)]}
    assert not rows.alarms(Report.read(write_run(tmp_path / "run", stages)))


def test_a_card_sets_the_figure_of_one_task_beside_that_task_s_own(tmp_path):
    losses = np.random.default_rng(0).normal(2.4, 0.3, 16)
    other = [replace(perplexity(losses + x), task="perplexity (wikitext)") for x in (0.0, 0.5)]
    folder = write_run(
        tmp_path / "run",
        {"0-base": [perplexity(losses), other[0]],
         "1-rtn": [perplexity(losses, convention="64-token windows"), other[1]]},
    )  # fmt: skip
    (card,) = first.cards(Report.read(folder), "1-rtn")  # the first task's windows differ: it is not compared
    assert (card.value, card.beside, card.word) == (rows.number(perplexity(losses).value), "", "")
    assert card.certainty[0].startswith("n = 16; not compared: ")


def test_a_card_counts_the_pairs_and_not_the_documents_without_one(tmp_path):
    losses = np.random.default_rng(0).normal(2.4, 0.3, 16)
    base, stage = perplexity(losses), perplexity(losses + 0.3)
    ids = [replace(m, samples=replace(m.samples, ids=tuple(f"{i + first}" for i in range(16))))
           for m, first in ((base, 0), (stage, 4))]  # fmt: skip
    (card,) = first.cards(Report.read(write_run(tmp_path / "run", {"0-base": ids[:1], "1-rtn": ids[1:]})), "1-rtn")
    assert card.certainty[0].startswith("n = 12;")


@pytest.mark.parametrize(("method", "needed"), [("gptq", "optimum and gptqmodel"), ("none", "")])
def test_the_lines_that_open_packed_weights_name_what_they_need(tmp_path, method, needed):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    lines = html._opened_by({"model": {"models.causal_lm": {}}, "weights": "."}, tmp_path)
    assert lines.startswith(f"# needs {needed}\n" if needed else "from transformers import")


@pytest.mark.parametrize("width", [60, 80, 160])
def test_no_name_is_cut_on_a_narrow_terminal(run, width):
    told = io.StringIO()
    screen.show(
        Report.read(run), Console(file=told, width=width, highlight=False, force_terminal=True, color_system=None)
    )
    lines = [line.split() for line in told.getvalue().splitlines()]
    for name in ("token_perplexity", "decode_tokens_per_second", "arc_easy"):
        assert any(name in words for words in lines), name
    assert max(map(len, told.getvalue().splitlines())) <= width


def test_answers_that_are_all_the_same_are_said_to_be_so_and_no_interval_is_called_the_same(tmp_path):
    right = np.random.default_rng(0).random(48) < 0.8
    report = Report.read(write_run(tmp_path / "run", {"0-base": [accuracy(right)], "1-lora": [accuracy(right)]}))
    (line,) = rows.summary(report)
    assert re.fullmatch(r"1-lora: acc 0 pt \[-[\d.]+, \+[\d.]+\] \(the same on every sample\)", line)
    assert next(first.cards(report, "1-lora")).certainty == ["n = 48; the same on every sample"]


def test_a_figure_that_the_base_failed_to_give_is_no_distance_from_it(tmp_path):
    losses = np.random.default_rng(0).normal(2.4, 0.3, 16)
    folder = write_run(tmp_path / "run", {"0-base": [size(10.0)], "1-rtn": [size(5.0), perplexity(losses)]})
    failures = [{"stage": "0-base", "task": "perplexity", "asked": "score", "error": "no memory"}]
    report = replace(Report.read(folder), failures=failures)
    assert rows.summary(report)[-1].endswith("per token; the base has no such figure")
    assert list(first.cards(report, "1-rtn"))[1].certainty == ["n = 16"]


def test_a_model_that_was_destroyed_is_told_in_few_digits(tmp_path):
    losses = np.random.default_rng(0).normal(2.4, 0.3, 16)
    folder = write_run(tmp_path / "run", {"0-base": [perplexity(losses)], "1-rtn": [perplexity(losses + 60)]})
    bad, line = rows.summary(Report.read(folder))
    assert re.fullmatch(r"BAD: 1-rtn: perplexity token perplexity 1\.\d\de\+27, of the base 10\.\d\d", bad)
    assert len(line) < 120


def test_a_bad_figure_is_told_of_its_own_task(tmp_path):
    right = np.random.default_rng(0).random(96) < 0.9
    kept = accuracy(right, task="hellaswag")
    folder = write_run(tmp_path / "run", {"0-base": [accuracy(right), kept], "1-prune": [accuracy(~right), kept]})
    assert rows.summary(Report.read(folder))[0] == (
        f"BAD: 1-prune: arc_easy acc {np.mean(~right):.3f}, of the base {np.mean(right):.3f}"
    )


def test_lines_of_the_forest_name_the_task_where_several_take_a_metric(tmp_path):
    right = np.random.default_rng(0).random(96) < 0.9
    two = [[accuracy(r), accuracy(r, task="hellaswag"), perplexity(2 + r)] for r in (right, ~right)]
    folder = write_run(tmp_path / "run", {"0-base": two[0], "1-prune": two[1]})
    report = Report.read(folder)
    lines = [line.metric for plot in forest.draw(report.measurements, report.comparisons) for line in plot.lines]
    assert sorted(lines) == ["arc_easy acc", "hellaswag acc", "token_perplexity"]


def of_any_sign(values) -> Measurement:
    samples = Samples(tuple(map(float, values)))
    return Measurement(
        "rock", "euler_number", float(np.mean(values)), "per mm³", "lower", len(values), 1.0, "4-connected", samples
    )


@pytest.mark.parametrize(("base", "stage"), [(-50.0, 30.0), (-50.0, -60.0), (50.0, -30.0)])
def test_figures_of_any_sign_have_no_ratio(tmp_path, base, stage):
    noise = np.random.default_rng(0).normal(0, 1, 40)
    moved = noise + np.random.default_rng(1).normal(0, 0.1, 40)
    folder = write_run(tmp_path / "run", {"0-base": [of_any_sign(base + noise)], "1-x": [of_any_sign(stage + moved)]})
    report = Report.read(folder)
    assert report.comparisons[0]["ratio"] is None
    (row,) = rows.rows(report)
    assert row.cells[1].beside.startswith(f"{stage - base:+.2f}"[:5])
    assert "×" not in str(row.cells[1])
    (found,) = gate.of_run(str(folder), ["euler_number <= 1.0x base"])
    assert (found.verdict, found.kind, found.value) == ("undecided", "figure", pytest.approx(stage, abs=1))
    assert "no ratio of them" in found.reason


@pytest.mark.parametrize(
    ("ratio", "ends", "told"),
    [
        (1.3, (1.26, 1.34), "1.30× [1.26, 1.34]"),
        (1.0004, (1.0002, 1.0006), "1.0004× [1.0002, 1.0006]"),
        (0.999, (0.9985, 0.9996), "0.9990× [0.9985, 0.9996]"),
        (1.0, (0.99, 1.004), "1.00× [0.99, 1.00]"),  # the interval holds 1
        (0.0012, (0.0012, 0.0012), "0.0012×"),
        (0.996, (0.996, 0.996), "0.996×"),
        (1.0, (1.0, 1.0), "1.00×"),
        (0.0, None, "0.00×"),
        (1.4e27, None, "1.40e+27×"),
    ],
)
def test_a_ratio_is_told_from_1_and_from_0(ratio, ends, told):
    assert numbers.times(ratio, ends, "×") == told


def test_what_a_merge_lost_is_no_agreement_with_the_base(tmp_path):
    losses = np.random.default_rng(0).normal(2.4, 0.3, 16)
    lost = replace(agreement(0.974), task="adapt.merge")
    folder = write_run(tmp_path / "run", {"0-base": [perplexity(losses)], "1-merge": [lost, perplexity(losses + 0.1)]})
    report = Report.read(folder)
    report.stages[1]["step"] = "adapt.merge"
    assert "top1 agreement 0.974 share, by adapt.merge" in rows.summary(report)[0]
    assert [card.metric for card in first.cards(report, "1-merge")] == ["token perplexity"]


def distance(metric: str, value: float) -> Measurement:
    return Measurement("frechet", metric, value, "squared feature distance", "lower", 300, 1.0, "against the base")


def test_images_far_from_the_base_s_and_answers_that_are_lost_are_bad(tmp_path):
    right = np.random.default_rng(0).random(96) < 0.9
    away = [distance("frechet_distance", 283.0), distance("frechet_floor", 57.0), accuracy(~right)]
    near = [distance("frechet_distance", 39.0), distance("frechet_floor", 25.0), accuracy(right)]
    folder = write_run(tmp_path / "run", {"0-base": [accuracy(right)], "1-prune": away, "2-distill": near})
    told = rows.summary(Report.read(folder))
    assert told[:2] == [
        "BAD: 1-prune: its images have a Fréchet distance of 283.0 from the base's, two sets of the base's own 57.00",
        f"BAD: 1-prune: arc_easy acc {np.mean(~right):.3f}, of the base {np.mean(right):.3f}",
    ]
    assert "frechet distance 39.00 squared feature distance against the base" in told[3]
    assert re.search(r"acc [-+][\d.]+ pt", told[2])  # no ratio of a share


@pytest.mark.parametrize(
    ("unit", "told"),
    [
        ("dB", "+0.500 dB"),
        ("share", "+50.00 pt"),
        ("share of images", "+50.00 pt"),
        ("probability", "+50.00 pt"),
        ("", "+0.500"),
        ("tokens/s", "1.50×"),
    ],
)
def test_a_ratio_only_where_it_means_something(unit, told):
    base = Measurement("task", "metric", 1.0, unit, "higher", 1, None, "")
    assert set_beside(asdict(compare(replace(base, value=1.5), base)), unit) == told


def test_sizes_within_a_header_are_the_same():
    alike = asdict(compare(size(100.00005), size(100.0)))
    assert set_beside(alike, "bytes") == "1.00×"
    assert compare(size(100.00005), size(100.0)).verdict == "same"
    assert compare(size(100.2), size(100.0)).verdict == "worse"
    assert compare(size(99.8), size(100.0)).verdict == "better"


def test_rows_that_say_the_same_or_matter_to_few_are_folded(run):
    folded = {row.metric: row.folded for row in rows.rows(Report.read(run))}
    assert not folded["bytes_on_disk"]
    assert not folded["token_perplexity"]
    assert "nonzeros" in rows.FOLDED


def test_the_forest_has_a_line_for_every_interval_at_its_place(run):
    report = Report.read(run)
    plots = forest.draw(report.measurements, report.comparisons)
    assert [plot.title for plot in plots] == ["Ratio to the base", "Difference from the base, pt"]
    lines = [line for plot in plots for line in plot.lines]
    assert all(0 <= line.low <= line.at <= line.high <= 100 for line in lines)
    assert all(0 <= plot.zero <= 100 for plot in plots)
    (worse,) = (line for line in lines if line.metric == "token_perplexity")
    assert (worse.verdict, worse.stage) == ("worse", "1-quantize.bnb")
    assert worse.low > plots[0].zero
    folded = forest.draw(report.measurements, report.comparisons, {"token_perplexity"})
    assert not any(line.metric == "token_perplexity" for plot in folded for line in plot.lines)


def test_answers_that_flipped_are_counted_and_shown(run):
    report = Report.read(run)
    (flips,) = samples.flips(report, run, samples.scored(report, run))
    right = np.array(samples.scored(report, run)["0-base"]["arc_easy", "acc"].samples.values) == 1
    assert (flips.both, flips.lost, flips.gained, flips.neither) == (0, right.sum(), (~right).sum(), 0)
    assert [example.lost for example in flips.examples].count(True) == samples.EXAMPLES
    lost = next(example for example in flips.examples if example.lost)
    assert (lost.question, lost.base, lost.stage) == (f"Question <{right.argmax()}>?", "choice 0", "choice 1")
    page = html.draw(report, run)
    assert "Question &lt;" in page
    assert "Question <" not in page


def test_damaged_answers_are_one_line(tmp_path):
    random = np.random.default_rng(0)
    folder = write_run(tmp_path / "run", {"0-base": [accuracy(random.random(20) < 0.5)], "1-x": [accuracy([1] * 20)]})
    for stage in ("0-base", "1-x"):
        (folder / stage / "lm_eval").mkdir()
        (folder / stage / "lm_eval/samples_arc_easy_2026.jsonl").write_text('{"doc_id": 1}\n[]\n')
    report = Report.read(folder)
    with pytest.raises(UserError, match="is no whole"):
        list(samples.flips(report, folder, samples.scored(report, folder)))


def test_the_samples_of_a_figure_are_drawn_as_the_figure_counts_them(run):
    report = Report.read(run)
    known = samples.scored(report, run)
    pictures = distributions.draw(report, known)
    assert list(pictures) == ["token_perplexity, each sample of perplexity"]  # right and wrong answers are flips
    assert "less 0-base," in pictures["token_perplexity, each sample of perplexity"]
    without_base = distributions.draw(report, {**known, "0-base": {}})
    assert "in pairs" not in without_base["token_perplexity, each sample of perplexity"]
    drawn = distributions.values(known["0-base"]["perplexity", "token_perplexity"].samples)
    assert np.exp(np.log(drawn).mean()) == pytest.approx(next(
        m["value"] for m in report.measurements if m["metric"] == "token_perplexity"
    ))  # fmt: skip


def slices(metric, values, convention="x4"):
    return mean("rock", metric, values, "share", "unknown" if "porosity" in metric else "higher", convention)


def test_bicubic_is_a_column_with_a_verdict(tmp_path):
    random = np.random.default_rng(0)
    truth, high = random.uniform(0.1, 0.3, 20), random.uniform(0.8, 0.9, 20)

    def stage(better):
        return [
            slices("pore_iou", high + better), slices("bicubic_pore_iou", high, "x4; a = -0.5"),
            slices("porosity", truth + 0.01), slices("bicubic_porosity", truth + 0.05), slices("true_porosity", truth),
        ]  # fmt: skip

    folder = write_run(tmp_path / "run", {"1-adapt.train": stage(0.09), "2-quantize.int8": stage(0.08)})
    report = Report.read(folder)
    assert report.columns == ["1-adapt.train", "2-quantize.int8", "bicubic"]
    found = {row.metric: row for row in rows.rows(report)}
    assert list(found) == ["pore_iou", "porosity", "true_porosity"]
    assert found["pore_iou"].cells[2].beside.startswith("-9.00 pt")
    assert found["pore_iou"].cells[2].verdict in ("worse", "undecided")
    assert not any(c["metric"].startswith(("bicubic", "true")) for c in report.comparisons)
    pictures = distributions.draw(report, samples.scored(report, folder))
    assert "Porosity of each slice beside the true one" in pictures
    assert "bicubic" in html.draw(report, folder)


def test_one_file_with_no_request_and_little_script(run):
    page = html.draw(Report.read(run), run)
    assert len(page) < 2e6
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\((?!['\"]?(data:|#))", page)
    assert page[page.index("<script>") :].count("\n") <= 80
    assert "llmq replay '" in markup.unescape(page)


def test_runs_side_by_side_make_a_page(run, tmp_path):
    file = tmp_path / "compared.html"
    cli.compare([str(run)], html=file)
    page = file.read_text()
    assert "2 results, beside 0-base" in page
    assert page.count('<li class="') == 3
    assert "Ratio to 0-base" in page
    assert len(re.findall(r"<td>±[\d.]+</td>", page)) == page.count("<b>")  # one a sampled figure
    assert "token_<wbr>perplexity" in page


def light(colour: str) -> float:
    """The relative luminance of WCAG 2.1."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_colours_of_charts_stand_out_in_both_themes(run):
    page = html.draw(Report.read(run), run)
    cards = set(re.findall(r"--card: (#[0-9a-f]{6})", page))
    assert len(cards) == 2
    for ground in cards:
        for colour in (drawing.BASE, *drawing.STAGES):
            bright, dark = sorted((light(colour), light(ground)), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 3, (colour, ground)


def test_no_name_in_the_page_comes_twice_but_of_equal_marks(run):
    page = html.draw(Report.read(run), run)
    names = re.findall(r'<(?!path|clipPath)[a-z]+ [^>]*?\bid="([^"]+)"', page)
    assert len(names) == len(set(names))


# A part that the keyboard reaches has a name, in the order of the text; a picture has a text; no heading skips a level.
PROBE = """
const told = []
document.querySelectorAll("iframe").forEach(frame => {
  const page = frame.contentDocument, inside = frame.contentWindow
  const sliders = page.querySelectorAll(".slider").length
  page.querySelectorAll("thead button").forEach(button => button.click())
  page.querySelectorAll("details").forEach(more => { more.open = true })
  if (sliders !== 3) told.push(`${frame.id}: ${sliders} sliders`)
  const over = page.documentElement.scrollWidth - page.documentElement.clientWidth
  if (over > 0) told.push(`${frame.id}: ${over} pixels too wide`)
  page.querySelectorAll("[tabindex], button, input, summary").forEach(part => {
    const name = part.ariaLabel || part.textContent.trim() || part.labels?.[0]?.textContent
    if (!name || part.tabIndex !== 0) told.push(`${frame.id}: no name, or out of order: ${part.outerHTML.slice(0, 60)}`)
  })
  page.querySelectorAll("img:not([alt]), img[alt=''], [role=img]:not([aria-label]), [role=img][aria-label='']").forEach(
    picture => told.push(`${frame.id}: no text: ${picture.outerHTML.slice(0, 60)}`))
  const levels = [...page.querySelectorAll("h1, h2, h3, h4")].map(head => Number(head.tagName[1]))
  if (levels[0] !== 1 || levels.some((level, i) => i && level > levels[i - 1] + 1)) told.push(`${frame.id}: ${levels}`)
  inside.performance.getEntriesByType("resource").forEach(e => told.push(`${frame.id}: asked for ${e.name}`))
  const light = text => {
    const linear = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
    const [r, g, b] = text.match(/[\\d.]+/g).map(c => linear(Number(c) / 255))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  page.querySelectorAll("main *").forEach(element => {
    if (element.matches("style, title")) return
    if (![...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) return
    const clear = part => inside.getComputedStyle(part).backgroundColor === "rgba(0, 0, 0, 0)"
    let ground = element
    while (ground && clear(ground)) ground = ground.parentElement
    const paper = inside.getComputedStyle(ground || page.body).backgroundColor
    const style = inside.getComputedStyle(element), ink = element.closest("svg") ? style.fill : style.color
    const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x)
    const contrast = (a + 0.05) / (b + 0.05)
    if (contrast < 4.5) told.push(`${frame.id}: contrast ${contrast.toFixed(2)} of ${element.textContent.slice(0, 30)}`)
  })
})
document.getElementById("told").textContent = JSON.stringify(told.concat(errors))
"""


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
def test_in_a_browser_nothing_overflows_errs_is_too_faint_or_has_no_name(run, tmp_path):
    page = html.draw(Report.read(run), run)
    frames = ""
    for theme in ("light", "dark"):
        themed = page.replace('<html lang="en">', f'<html lang="en" data-theme="{theme}">')
        watched = themed.replace("<script>", "<script>onerror = console.error = e => parent.errors.push(e);", 1)
        for width in (390, 768, 1280, 1920):
            frames += (
                f'<iframe id="{theme} {width}" width="{width}" height="900" srcdoc="{markup.escape(watched)}"></iframe>'
            )
    file = tmp_path / "frames.html"
    probe = f'<pre id="told"></pre><script>onload = () => {{ {PROBE} }}</script>'
    file.write_text(f"<!doctype html><meta charset=utf-8><script>var errors = []</script>{frames}{probe}")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = [BROWSER, *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert json.loads(markup.unescape(re.search('<pre id="told">(.*?)</pre>', dom)[1])) == []


def test_a_chart_sets_figures_of_one_task_side_by_side(run):
    told = json.loads((run / "report.json").read_text())
    mine = next(m for m in told["measurements"] if m["metric"] == "token_perplexity" and m["stage"] == "0-base")
    told["measurements"] += [{**mine, "task": "perplexity-2", "stage": stage} for stage in ("0-base", "2-adapt.lora")]
    told["measurements"] += [{**m, "stage": "2-adapt.lora"} for m in told["measurements"] if m["task"] == "size"][:1]
    told["stages"].append({**told["stages"][-1], "name": "2-adapt.lora"})
    drawn = charts.draw(Report(**told))["Size against quality"]
    assert "1-quantize.bnb" in drawn
    assert "2-adapt.lora" not in drawn  # it has the perplexity of another text alone


def test_the_numbers_of_points_that_lie_together_are_one_text(run):
    told = json.loads((run / "report.json").read_text())
    sizes = [m for m in told["measurements"] if m["metric"] in ("bytes_on_disk", "token_perplexity")]
    for stage in ("2-export.gguf", "3-adapt.lora"):
        told["stages"].append({**told["stages"][-1], "name": stage})
        far = 1 + 5 * (stage[0] == "3")
        told["measurements"] += [
            {**m, "stage": stage, "value": far * m["value"]} for m in sizes if m["stage"] == "1-quantize.bnb"
        ]
    texts = re.findall("<!-- (.*?) -->", charts.draw(Report(**told))["Size against quality"])
    texts += re.findall(">([^<>]+)</text>", charts.draw(Report(**told))["Size against quality"])
    assert {"0", "1, 2", "3"} <= set(texts)
