"""Result files of lm-eval of another shape: one line that names the file and the place."""

import json

import pytest

from llmq.errors import UserError
from llmq.judge import results

GOOD = {"results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": "N/A"}}, "versions": {"t": 1}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"results": None}, "'results' is None"),
        ({"results": []}, r"'results' is \[\]"),
        ({"results": {"t": None}}, "'results.t' is None"),
        ({"results": {"t": {"acc,none": "0.5"}}}, "'results.t.acc,none' is '0.5', and should be a finite number"),
        ({"results": {"t": {"acc,none": float("nan")}}}, "'results.t.acc,none' is nan"),
        ({"results": {"t": {"acc,none": 10**400}}}, "'results.t.acc,none' is 1000"),
        ({"results": {"t": {"acc,none": 0.5, "n": 10**400}}, "config": {"limit": 10**400}}, "lack an entry"),
        ({"versions": []}, "'versions' is"),
        ({"n-samples": {"t": 3}}, "'n-samples.t' is 3"),
    ],
)
def test_another_shape_is_one_line_with_file_and_place(tmp_path, changes, says):
    file = tmp_path / "results_1.json"
    file.write_text(json.dumps({**GOOD, "lm_eval_version": "0.4.13", **changes}))
    with pytest.raises(UserError, match=says) as caught:
        results.read(str(file))
    assert "results_1.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_document_with_an_endless_number_is_one_line(tmp_path):
    (tmp_path / "results_1.json").write_text(json.dumps({**GOOD, "lm_eval_version": "0.4.13"}))
    (tmp_path / "samples_t_1.jsonl").write_text(json.dumps({"doc_id": float("inf"), "acc": 1.0}) + "\n")
    with pytest.raises(UserError, match="lack an entry of today's lm-eval"):
        results.read(str(tmp_path / "results_1.json"))


def test_the_plain_shape_is_read(tmp_path):
    file = tmp_path / "results_1.json"
    file.write_text(json.dumps({**GOOD, "lm_eval_version": "0.4.13"}))
    ((m,),) = [r.measurements for r in results.read(str(file))]
    assert (m.task, m.metric, m.value, m.better, m.stderr) == ("t", "acc", 0.5, "higher", None)
