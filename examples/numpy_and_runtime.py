"""numpy and the runtime alone: sample an ONNX export in 30 lines, without torch, diffusers or this package.

    python examples/own_data.py
    python examples/numpy_and_runtime.py [--export runs/example/exported/onnx-int8] [--output image.npy]

All that an app has to know stands in the export's contract.json, as numbers: what the files take, the sampler as
coefficients, guidance. The complete loop (text, VAEs, seeds, every runtime) is sample_min.py beside that file.
"""

import argparse
import json
import struct
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()  # eight bytes with the length of a JSON header, the header, the numbers
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    kinds = {"F32": "<f4", "I64": "<i8", "I32": "<i4", "U8": "u1"}
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = (start + offset for offset in entry["data_offsets"])
            found[name] = np.frombuffer(data[first:last], kinds[entry["dtype"]]).reshape(entry["shape"])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, default=Path("runs/example/exported/onnx-int8"))
    parser.add_argument("--output", type=Path, default=Path("image.npy"))
    export, output = vars(parser.parse_args()).values()
    contract = json.loads((export / "contract.json").read_text())
    assert list(contract["artefacts"]) == ["denoiser"], "this loop is for a network on pixels, not split in two"
    entry, guidance = contract["artefacts"]["denoiser"], contract["guidance"]
    session = onnxruntime.InferenceSession(export / entry["file"], providers=["CPUExecutionProvider"])
    kinds = {tensor["name"]: tensor["dtype"] for tensor in entry["inputs"]}
    reference = read_safetensors(export / contract["reference"]["file"])

    # Row 0 asks for the label, row 1 (with guidance) for nothing.
    labels = np.append(reference["label"], contract["labels"]["null"])[: guidance["rows"]]
    x, m = [reference["noise"] * contract["schedule"]["init_noise_sigma"]], []
    for step in contract["schedule"]["steps"]:
        rows = np.repeat(x[-1] * step["input_scale"], guidance["rows"], axis=0)
        given = {"sample": rows, "timestep": np.full(len(rows), step["timestep"]), "class_labels": labels}
        (prediction,) = session.run(["prediction"], {name: given[name].astype(kind) for name, kind in kinds.items()})
        conditional, other = prediction[:1], prediction[-1:]
        m.append(other + guidance["scale"] * (conditional - other) if guidance["rows"] == 2 else conditional)
        # The sampler: the next x is a weighted sum of the x and predictions so far.
        x.append(sum(a * x[j] for j, a in step["x"]) + sum(b * m[j] for j, b in step["m"]))
    image = np.round(np.clip(x[-1] / 2 + 0.5, 0, 1) * 255).astype(np.uint8)[0].transpose(1, 2, 0)
    np.save(output, image)
    error = np.abs(image.astype(int) - reference["loop.image"]).max()
    print(f"{output}: {image.shape}, at most {error} of 255 from the picture of the export's own reference")
    assert error <= 8 and "torch" not in sys.modules
