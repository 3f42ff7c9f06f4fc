"""Lowering to ONNX: fp32 and fp16 files, and weights of 8 and 4 bits."""
