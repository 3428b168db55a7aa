"""The teacher, served: Triton or ONNX Runtime behind one protocol, and the REST gateway before it."""
