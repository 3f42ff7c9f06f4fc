"""Export of pipelines: lowering (`onnx`, `executorch`, `coreml`), the gates (`verify`), what an app author ports by
(`contract`), and the components that load an artefact back (`components`).
"""
