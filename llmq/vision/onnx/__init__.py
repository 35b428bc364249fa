"""Image models as ONNX files: written from a graph, and opened by ONNX Runtime."""
