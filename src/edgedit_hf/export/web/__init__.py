"""`--format web`: the ONNX files of a pipeline with a page that samples them in a browser."""
