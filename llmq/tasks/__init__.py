"""Questions put to every stage."""
