"""Pure maths on tensors and matrices."""
