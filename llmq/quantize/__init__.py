"""Steps that store weights in fewer bits."""
