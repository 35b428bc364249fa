"""Language models foretold from their configuration: tensors, memory and work, without a weight."""
