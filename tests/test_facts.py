"""What the report tells of stages: a hash is cut, and no other text is."""

from llmq.report.facts import _plain


def test_only_a_hash_is_cut():
    long = "a" * 63 + "g"
    digest = "0123456789abcdef" * 4
    assert _plain({"sha256": digest}) == f"sha256 {digest[:12]}"
    assert _plain(digest, "weights_sha256") == digest[:12]
    assert _plain({"what": long, "of": digest}) == f"what {long}, of {digest}"
    assert _plain({"sha256": long, "lost": {"sha256": digest}}) == f"sha256 {long}, lost (sha256 {digest[:12]})"
