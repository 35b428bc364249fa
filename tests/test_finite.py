"""No figure, no sample and no JSON of llmq holds a number that is not finite."""

import json

import pytest
import yaml
from helpers import CPU, base_of
from pydantic import ValidationError
from run_folders import size, write_run

from llmq import plugin
from llmq.artifact import Stage
from llmq.errors import LlmqError, UserError
from llmq.files import tagged, to_json, write_json
from llmq.harness.results import files
from llmq.judge import results
from llmq.pipeline import question, take_times
from llmq.report import Report
from llmq.types import Measurement, Samples, Task

INF, NAN = float("inf"), float("nan")


def measured(value=1.0, stderr=0.1, samples=None):
    return Measurement("psnr_task", "psnr", value, "dB", "higher", 3, stderr, "c", samples)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: measured(NAN), "psnr_task: the figure of psnr is nan"),
        (lambda: measured(-INF), "psnr_task: the figure of psnr is -inf"),
        (lambda: measured(stderr=INF), "the standard error of psnr is inf"),
        (lambda: measured(samples=Samples((30.0, INF, 20.0))), "the score of sample 1 of psnr is inf"),
        (lambda: measured(samples=Samples((30.0, 2.0), (1.0, NAN))), "the weight of sample 1 of psnr is nan"),
    ],
)
def test_a_measurement_is_finite_or_an_error_that_names_task_and_metric(made, says):
    with pytest.raises(LlmqError, match=says) as told:
        made()
    assert told.value.exit_code == 4


def test_a_task_that_yields_no_number_is_a_failure_in_one_line(tiny_llama, tmp_path):
    class Broken(Task):
        def score(self, loaded):
            yield measured(1.0)
            yield measured(sum([1.0, NAN]))

    base = base_of(tiny_llama)
    stage = question(Stage("0-base", base), [Broken()], tmp_path, "cpu", base, cache=False)
    (failure,) = stage.failures
    assert failure.error.startswith("psnr_task: the figure of psnr is nan")
    assert [m.value for m in stage.measurements] == [1.0]
    assert "NaN" not in (tmp_path / "0-base" / "measurements.json").read_text()


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_json_names_the_place_of_a_number_that_is_not_finite_and_writes_nothing(tmp_path, value):
    data = {"a": [1.0, {"b": (2.0, value)}]}
    with pytest.raises(LlmqError, match=r"a\.1\.b\.1 is (-?inf|nan)"):
        to_json(data)
    with pytest.raises(LlmqError, match=r"x\.json: "):
        write_json(tmp_path / "x.json", data)
    assert not (tmp_path / "x.json").exists()


def test_a_models_endless_settings_are_written_as_transformers_reads_them(tmp_path):
    from transformers import BambaConfig

    write_json(tmp_path / "config.json", tagged({**BambaConfig().to_dict(), "time_step_limit": [0.0, INF]}))
    assert "NaN" not in (tmp_path / "config.json").read_text()
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)
    assert list(BambaConfig.from_pretrained(tmp_path).time_step_limit) == [0.0, INF]


@pytest.mark.parametrize("number", [".inf", ".nan"])
def test_a_setting_is_a_finite_number(number):
    with pytest.raises(ValidationError, match="finite number"):
        plugin.build({"adapt.lora": {"data": "pydoc", "learning_rate": yaml.safe_load(number)}})


def test_an_older_run_that_kept_no_number_is_one_line(tmp_path):
    folder = write_run(tmp_path / "run", {"0-base": [size(1)]})
    file = folder / "0-base" / "measurements.json"
    data = json.loads(file.read_text())
    data["measurements"][0]["value"] = NAN
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"measurements.json': size: the figure of bytes_on_disk is nan"):
        results.run(folder)


def test_files_say_their_schema_version_and_what_is_exact(tiny_llama, tmp_path):
    stage = question(
        Stage("0-base", base_of(tiny_llama)), [plugin.build({"size": {}}, "tasks")], tmp_path, "cpu", None, cache=False
    )
    data = json.loads((tmp_path / "0-base" / "measurements.json").read_text())
    assert data["schema_version"] == 2
    assert all(m["exact"] for m in data["measurements"])
    assert all(m.exact for m in stage.measurements)
    report = Report.of({}, {}, [stage], "0-base")
    assert report.schema_version == 2
    assert all(m["exact"] for m in report.measurements)
    assert take_times({"0-base": stage}, [], tmp_path, CPU.device) == {"0-base": stage}


@pytest.mark.parametrize("where", ["measurements.json", "report.json alone"])
def test_a_standard_error_of_0_meant_exact_in_older_runs_where_one_thing_was_counted(tmp_path, where):
    """Before schema version 2: size had n = 1, a standard error of 0 and no samples; answers had samples."""
    five = Measurement("arc", "acc", 1.0, "share", "higher", 5, 0.0, "c", Samples((1.0,) * 5))
    bare = Measurement("arc", "f1", 1.0, "share", "higher", 5, 0.0, "c")
    folder = write_run(tmp_path / "run", {"0-base": [size(3), five, bare]})
    for file in (folder / "report.json", folder / "0-base" / "measurements.json"):
        data = json.loads(file.read_text())
        data.pop("schema_version", None)
        for entry in data["measurements"]:
            del entry["exact"]
        file.write_text(json.dumps(data))
    if where != "measurements.json":
        (folder / "0-base" / "measurements.json").unlink()
    figures = results.run(folder)["0-base"].figures
    assert {name[1]: m.exact for name, m in figures.items()} == {"bytes_on_disk": True, "acc": False, "f1": False}


def test_lm_evals_files_hold_no_number_that_is_not_finite():
    """Of one question lm-eval's standard error is NaN; the likelihood of what cannot be said is -inf."""
    sample = {
        "doc_id": 0, "doc": {}, "target": "a", "arguments": [("q", "a")], "resps": [[(-INF, False)]],
        "filtered_resps": [(-INF, False)], "doc_hash": "d", "prompt_hash": "p", "target_hash": "t", "acc": 1.0,
    }  # fmt: skip
    results = {
        "results": {"arc": {"alias": "arc", "acc,none": 1.0, "acc_stderr,none": NAN}},
        "samples": {"arc": [sample]},
        "configs": {"arc": {"task": "arc", "output_type": "multiple_choice"}},
        "versions": {"arc": 1},
        "config": {"model": "hf", "limit": None},
    }
    written = files(results, "lm_eval", "some-model")
    assert len(written) == 2
    for attachment in written:
        for line in attachment.text.splitlines() if attachment.file.endswith("jsonl") else [attachment.text]:
            json.loads(line, parse_constant=pytest.fail)
    (told,) = (a.text for a in written if a.file.endswith("json"))
    assert json.loads(told)["results"]["arc"]["acc_stderr,none"] == "N/A"
    assert any('"-inf"' in a.text for a in written)
