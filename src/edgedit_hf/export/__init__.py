"""Export of pipelines: lowering (`onnx`), the gates (`verify`), and the component that loads an artefact back
(`runtime`).
"""
