"""What serving costs: the raw engine, this project's ways to it, and peers, with the same ONNX file, threads, crops and load."""
