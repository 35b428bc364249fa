"""The parts that image models share."""
