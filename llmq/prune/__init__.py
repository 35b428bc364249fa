"""Steps that remove weights."""
