"""Steps that train a model, and that fold what was trained into it."""
