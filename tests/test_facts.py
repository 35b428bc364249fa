"""What the report tells of stages: a hash is cut, and no other text is."""

from llmq.report.facts import _plain


def test_only_a_hash_is_cut():
    long = "a" * 63 + "g"
    digest = "0123456789abcdef" * 4
    assert _plain({"sha256": digest}) == f"sha256 {digest[:12]}"
    assert _plain(digest, "weights_sha256") == digest[:12]
    assert _plain({"what": long, "of": digest}) == f"what {long}, of {digest}"
    assert _plain({"sha256": long, "lost": {"sha256": digest}}) == f"sha256 {long}, lost (sha256 {digest[:12]})"


def test_short_lists_of_a_stage_are_told_and_curves_are_not():
    notes = {"loss": [[1, 0.5], [2, 0.25]], "back": ["conv1", "conv2"], "drop": {"ci95": [0.1, 0.2]}, "none": []}
    assert _plain(notes) == "back ['conv1', 'conv2'], drop (ci95 [0.1, 0.2])"
