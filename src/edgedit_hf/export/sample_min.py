#!/usr/bin/env python3
"""One image from an export, with numpy and the export's runtime alone: all that an app has to do, in the order in which
it has to do it.

    python sample_min.py [--seed N | --reference] [--label N | --token-ids FILE | --prompt TEXT] [--output image.png]
    [--check]

It stands beside contract.json, whose numbers it uses, and imports nothing but the standard library, numpy and the
runtime: onnxruntime, executorch (whose Python binding takes torch tensors only, so torch wraps and unwraps numpy arrays
there and does nothing else) or, on a Mac and not run, coremltools. --prompt needs the package `tokenizers` besides. The
noise of --seed is that of contract.json's `noise`, the same in every port of this loop; it is not that of the same seed
in torch. --reference starts from the noise in reference.safetensors; --check compares the files' SHA-256 with
contract.json's, repeats everything in that file and exits with 1 if an error is above contract.json's tolerance.

Exit codes: 0 done, 1 the check failed, 2 bad input (one line on stderr), 130 and 143 interrupted, 70 a fault of this
program (EDGEDIT_TRACEBACK=1 shows where).
"""

import argparse
import hashlib
import json
import os
import signal
import struct
import sys
import traceback
import zlib
from pathlib import Path

import numpy as np

# -------------------------------------------------------------------- files


def read_safetensors(path):
    """Tensors by name: 8 bytes with the header's length, the header (JSON), the data."""
    data = Path(path).read_bytes()
    types = {"F32": "<f4", "I64": "<i8", "I32": "<i4", "U8": "u1"}
    tensors = {}
    try:
        start = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            tensors[name] = np.frombuffer(data[start + first : start + last], types[entry["dtype"]]).reshape(
                entry["shape"]
            )
    except (struct.error, LookupError, ValueError, TypeError, AttributeError) as error:
        sys.exit(f"{path} is damaged ({type(error).__name__}: {error}); take the export again.")
    return tensors


TENSOR = {"name": str, "dtype": str, "shape": list}
TOKENIZER = {
    "file": (None, str),
    "rule": str,
    "max_tokens": int,
    "bos_token_id": (None, int),
    "eos_token_id": (None, int),
}
TOKENIZER |= {"pad_token_id": int, "vocabulary": int}
# what this program reads of contract.json: (None, x) may be null, [x] is a list of x, "*" stands for every name
CONTRACT = {
    "contract_version": int,
    "format": str,
    "split": bool,
    "files": {"*": {"sha256": str}},
    "artefacts": {
        "*": {"file": str, "precision": str, "tolerance": float, "inputs": [TENSOR], "outputs": [{"name": str}]}
    },
    "latents": {"multiply": [float], "add": [float]},
    "noise": {"generator": str, "transform": str},
    "schedule": {"init_noise_sigma": float, "steps": [{"timestep": float, "input_scale": float, "x": list, "m": list}]},
    "guidance": {"rows": int, "scale": float, "channels": (None, int)},
    "labels": (None, {"count": int, "null": (None, int)}),
    "text": (
        None,
        {
            "encoders": [
                {"artefact": (None, str), "tokens": int, "width": int, "open": bool, "tokenizer": (None, TOKENIZER)}
            ]
        },
    ),
    "reference": {"file": str, "tolerance": float, "image_psnr": float},
}


def misfit(value, form, name="contract.json"):
    """Where and how a value differs from its form, or `None`."""
    if isinstance(form, tuple):
        return None if value is None else misfit(value, form[1], name)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{name} is {value!r:.80}, not an object"
        pairs = [(key, form["*"]) for key in value] if "*" in form else form.items()
        missing = [key for key, _ in pairs if key not in value]
        if missing:
            return f"{name} lacks {missing[0]}"
        return next(filter(None, (misfit(value[key], part, f"{name}: {key}") for key, part in pairs)), None)
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{name} is {value!r:.80}, not a list"
        return next(filter(None, (misfit(part, form[0], f"{name}[{index}]") for index, part in enumerate(value))), None)
    right = isinstance(value, (int, float)) if form is float else isinstance(value, form)
    if not right or (isinstance(value, bool) and form is not bool) or (form is float and not np.isfinite(value)):
        return f"{name} is {value!r:.80}, not {form.__name__}"
    return None


def read_contract(folder):
    """contract.json of an export, whose files lie in that folder."""
    contract = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
    version = contract.get("contract_version") if isinstance(contract, dict) else None
    if type(version) is int and version not in (1, 2):
        sys.exit(
            f"contract.json has the version {version}, this program reads 1 and 2; use the sample_min.py that came "
            "with the export."
        )
    # the first version has no `noise`
    wrong = misfit(contract, {key: form for key, form in CONTRACT.items() if version != 1 or key != "noise"})
    tokenizers = (
        []
        if wrong or contract["text"] is None
        else [encoder["tokenizer"] for encoder in contract["text"]["encoders"] if encoder["tokenizer"]]
    )
    for name in (
        ()
        if wrong
        else [
            entry["file"]
            for entry in (*contract["artefacts"].values(), contract["reference"], *tokenizers)
            if entry["file"]
        ]
    ):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            wrong = f"contract.json names the file {name!r}, which is not in this folder"
    if wrong:
        sys.exit(f"{wrong}; the export is damaged, take it again.")
    return contract


MAKER = b"Software\0sample_min.py"  # by which an older image of this program is known, which a new one may replace


def check_image_path(path, inputs=()):
    """End unless an image may be written there: nothing of the user's is replaced, and nothing that is read."""
    path = Path(path)
    if not path.name or path.is_dir() or not path.parent.is_dir():
        sys.exit(f"--output is {str(path)!r}, which is no name of a file in a folder that is there.")
    if any(given and path.exists() and Path(given).exists() and os.path.samefile(path, given) for given in inputs):
        sys.exit(f"--output {path} is read by this program; choose another name.")
    if path.exists() and (not path.is_file() or MAKER not in path.read_bytes()[:200]):
        sys.exit(f"--output {path} exists and is no image of this program; it is left as it is. Choose another name.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        sys.exit(f"--output {path} cannot be written; choose a folder that you may write to.")


def check_hashes(folder, contract):
    """Print which files of the export differ from contract.json's SHA-256; whether none does. A name that leaves the
    folder is none of its files.
    """
    passed = True
    for name, facts in contract["files"].items():
        path = Path(folder, name)
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        digest = hashlib.sha256()
        if inside and path.is_file():
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        found = digest.hexdigest() if inside and path.is_file() else "no such file"
        if found != facts["sha256"]:
            passed = False
            print(f"FAIL  {name} has the SHA-256 {found}, contract.json says {facts['sha256']}")
    return passed


def write_png(path, image):
    """uint8 (H, W, channels) of 1 (grey), 3 (RGB) or 4 (RGBA) channels."""
    height, width, channels = image.shape
    if channels not in (1, 3, 4):
        sys.exit(f"An image of {channels} channels is no PNG; the array is what sample() returns.")
    rows = b"".join(b"\0" + row.tobytes() for row in image)
    size = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", size), (b"tEXt", MAKER), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks
    )
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + body)


# -------------------------------------------------------------------- noise


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four 32-bit words, each a
    uint64 array like those of the counter, from the counter's four words and the key's two.
    """
    (a, b, c, d), (key_0, key_1), low = counter, key, 0xFFFFFFFF
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57  # 64 bits: a high and a low word
        a, b, c, d = second >> 32 ^ b ^ key_0, second & low, first >> 32 ^ d ^ key_1, first & low
        key_0, key_1 = key_0 + 0x9E3779B9 & low, key_1 + 0xBB67AE85 & low
    return a, b, c, d


def standard_normal(seed, shape):
    """float32 standard normal noise of a seed, 0 … 2^63 - 1, as contract.json's `noise` says: block n of four words
    gives the values 4n … 4n + 3 of the array, row-major.
    """
    count = int(np.prod(shape))
    block = np.arange(-(-count // 4), dtype=np.uint64)
    zero = np.zeros_like(block)
    words = philox((block & 0xFFFFFFFF, block >> 32, zero, zero), (seed & 0xFFFFFFFF, seed >> 32))
    u = [(word.astype(np.float64) + 0.5) / 2**32 for word in words]  # never 0, never 1
    values = []
    for radius, turn in ((u[0], u[1]), (u[2], u[3])):  # Box and Muller
        radius, angle = np.sqrt(-2 * np.log(radius)), 2 * np.pi * turn
        values += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.stack(values, axis=1).ravel()[:count].astype(np.float32).reshape(shape)


def start_noise(contract, seed, shape):
    """The noise of a seed as the contract wants it; numpy's own for one of the first version."""
    if contract["contract_version"] == 1:
        return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    rule = contract["noise"]["generator"], contract["noise"]["transform"]
    if rule != ("philox4x32-10", "box-muller"):
        sys.exit(f"contract.json's noise is {' and '.join(rule)}, this program makes philox4x32-10 and box-muller.")
    return standard_normal(seed, shape)


# -------------------------------------------------------------------- the runtime


def open_file(path, kind, inputs, outputs):
    """A function from arrays to arrays, in the order of `inputs` and `outputs`."""
    if kind in ("onnx", "web"):  # a page's files are ONNX
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda arrays: session.run(outputs, dict(zip(inputs, arrays)))
    if kind == "executorch":
        import torch  # the binding takes nothing else; an app passes its own buffers
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(str(path))
        method = program.load_method("forward")
        return lambda arrays: [
            np.array(value.numpy()) for value in method.execute([torch.from_numpy(array) for array in arrays])
        ]
    import coremltools  # predicts on a Mac only: this branch has not been run

    model = coremltools.models.MLModel(str(path))

    def predict(arrays):
        found = model.predict(dict(zip(inputs, arrays)))
        return [found[name] for name in outputs]

    return predict


class Artefacts:
    """The files of an export, opened when first used. `artefacts(key, name=array, …)` → outputs by name, for any number
    of rows.

    opener: `key → function from arrays to arrays`. trace: a dictionary that gets inputs and outputs of every file's
    first run.
    """

    def __init__(self, contract, opener, trace=None):
        self.entries, self.opener, self.trace, self.open = contract["artefacts"], opener, trace, {}

    def __call__(self, key, **rows):
        entry = self.entries[key]
        times = rows.get("timestep")
        if times is not None and key == "denoiser" and entry["precision"] == "int8" and len(np.unique(times)) > 1:
            # A file with activation scales by timestep takes those of its first row for all.
            sys.exit(
                f"The rows of a denoiser's call have the timesteps {np.unique(times).tolist()}; in int8 they must "
                "share one."
            )
        if key not in self.open:
            self.open[key] = self.opener(key)
        arrays = [np.ascontiguousarray(rows[tensor["name"]], tensor["dtype"]) for tensor in entry["inputs"]]
        count, batch = len(arrays[0]), entry["inputs"][0]["shape"][0]
        batch = count if isinstance(batch, str) else batch  # a name stands for an open size
        parts = []
        for start in range(
            0, count, batch
        ):  # a fixed batch: as many runs as it takes, the last one filled up with copies of the last row
            chosen = np.minimum(np.arange(start, start + batch), count - 1)
            given = [array[chosen] for array in arrays]
            parts.append(self.open[key](given))
            if self.trace is not None and start == 0:
                for tensors, values, where in (
                    (entry["inputs"], given, "inputs"),
                    (entry["outputs"], parts[0], "outputs"),
                ):
                    for tensor, value in zip(tensors, values):
                        self.trace.setdefault(f"{key}.{where}.{tensor['name']}", value)
        return {tensor["name"]: np.concatenate(values)[:count] for tensor, values in zip(entry["outputs"], zip(*parts))}


# -------------------------------------------------------------------- text


def tokenize(folder, encoder, prompt):
    """The windows of token ids that a text encoder gets: several for a long prompt of a CLIP-type encoder, else one,
    which is cut.
    """
    rule = encoder["tokenizer"]
    try:
        from tokenizers import Tokenizer
    except ImportError:
        sys.exit("--prompt needs the package `tokenizers` (pip install tokenizers); or give --token-ids.")
    if rule["file"] is None:
        sys.exit("This export's tokenizer has no tokenizer.json; give --token-ids.")
    tokenizer = Tokenizer.from_file(str(Path(folder, rule["file"])))
    tokenizer.no_padding()
    if rule["rule"] == "cut":
        tokenizer.enable_truncation(rule["max_tokens"])
        return [tokenizer.encode(prompt).ids]
    tokenizer.no_truncation()
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    start, end = ([] if token is None else [token] for token in (rule["bos_token_id"], rule["eos_token_id"]))
    room = rule["max_tokens"] - len(start) - len(end)
    return [start + ids[i : i + room] + end for i in range(0, max(len(ids), 1), room)]


def encode_text(contract, artefacts, windows):
    """(states (1, T, E), mask (1, T)) of every text encoder. windows: for every encoder a list of lists of token ids,
    `None` for no text.
    """
    texts = []
    for encoder, rows in zip(contract["text"]["encoders"], windows):
        length, width = encoder["tokens"], encoder["width"]
        valid = np.zeros((0, width), np.float32)
        if encoder["artefact"] is not None and rows is not None:
            longest = max(length, *map(len, rows))
            ids = np.array([[*row, *[encoder["tokenizer"]["pad_token_id"]] * (longest - len(row))] for row in rows])
            mask = np.array([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])
            if (longest > length or sum(map(len, rows)) > length) and not encoder["open"]:
                sys.exit(
                    f"The prompt has {sum(map(len, rows))} tokens for {encoder['artefact']}; this export takes "
                    f"{length} at most."
                )
            states = artefacts(encoder["artefact"], input_ids=ids, attention_mask=mask)["last_hidden_state"]
            valid = states[mask > 0]  # the windows' tokens one after the other, without padding
        length = max(length, len(valid))
        texts.append((np.zeros((1, length, width), np.float32), np.zeros((1, length), np.float32)))
        texts[-1][0][0, : len(valid)], texts[-1][1][0, : len(valid)] = valid, 1
    return texts


# -------------------------------------------------------------------- sampling


def conditioning(contract, artefacts, label=None, windows=None):
    """The denoiser's (or conditioners') inputs that say what to draw. First row: that; second row, with guidance:
    nothing.
    """
    if contract["labels"] is not None:
        return {"class_labels": np.append(label, contract["labels"]["null"])[: contract["guidance"]["rows"]]}
    inputs = {}
    for index, (states, mask) in enumerate(encode_text(contract, artefacts, windows) if contract["text"] else ()):
        for name, value in ((f"text_{index}", states), (f"mask_{index}", mask)):
            inputs[name] = np.concatenate([value, np.zeros_like(value)])[: contract["guidance"]["rows"]]
    return inputs


def sample(contract, artefacts, noise, condition, record=None):
    """uint8 image (H, W, channels) from standard normal noise (1, C, H, W). record: a dictionary that gets what happens
    on the way.
    """
    record = {} if record is None else record
    guidance, steps = contract["guidance"], contract["schedule"]["steps"]
    rows, channels = guidance["rows"], noise.shape[1]
    inputs = [{"timestep": np.full(rows, step["timestep"]), **condition} for step in steps]
    if contract["split"]:  # once an image: afterwards the conditioners can be closed
        texts = artefacts("text_conditioner", **condition) if contract["text"] else {}
        inputs = [{**given, **artefacts("conditioner", **given), **texts} for given in inputs]
    x, m = [noise * contract["schedule"]["init_noise_sigma"]], []
    for index, step in enumerate(steps):
        scaled = np.repeat(x[index] * step["input_scale"], rows, axis=0)
        prediction = artefacts("denoiser", sample=scaled, **inputs[index])["prediction"][
            :, :channels
        ]  # a learned variance is left out
        if rows == 2:
            conditional, unconditional = prediction[:1], prediction[1:]
            prediction = unconditional + guidance["scale"] * (conditional - unconditional)
            if guidance["channels"] is not None:
                prediction[:, guidance["channels"] :] = conditional[:, guidance["channels"] :]
        m.append(prediction)
        x.append(sum(a * x[j] for j, a in step["x"]) + sum(b * m[j] for j, b in step["m"]))
        if index == 0:
            record["step.guided"], record["step.sample"] = m[0], x[1]
    record["loop.latents"] = image = x[-1]
    if "decoder" in contract["artefacts"]:
        scale = {name: np.float32(contract["latents"][name]).reshape(1, -1, 1, 1) for name in ("multiply", "add")}
        image = artefacts("decoder", latents=image * scale["multiply"] + scale["add"])["image"]
    record["loop.decoded"] = image
    image = np.round(np.clip(image / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
    record["loop.image"] = image = np.ascontiguousarray(image[0].transpose(1, 2, 0))
    return image


# -------------------------------------------------------------------- the reference


def reference_windows(contract, reference):
    """Token ids of the reference prompt, without padding."""
    encoders = contract["text"]["encoders"] if contract["text"] else []
    masks = [reference.get(f"mask_{index}") for index in range(len(encoders))]
    return [
        None if m is None else [r[v > 0].tolist() for r, v in zip(reference[f"ids_{i}"], m)]
        for i, m in enumerate(masks)
    ]


def check(contract, artefacts, reference):
    """Print the error of every file and of the loop; whether all are within the tolerance."""
    passed = []

    def compare(name, found, tolerance):
        expected = reference[name].astype(np.float64)
        error = float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-12))
        passed.append(error <= tolerance)  # NaN fails too
        print(f"{'ok  ' if passed[-1] else 'FAIL'}  {name:45s} relative error {error:.2e} (tolerance {tolerance:.0e})")

    for key, entry in contract["artefacts"].items():
        found = artefacts(
            key, **{tensor["name"]: reference[f"{key}.inputs.{tensor['name']}"] for tensor in entry["inputs"]}
        )
        for name, value in found.items():
            compare(f"{key}.outputs.{name}", value, entry["tolerance"])
    condition = conditioning(contract, artefacts, reference.get("label"), reference_windows(contract, reference))
    record: dict = {}
    image = sample(contract, artefacts, reference["noise"], condition, record)
    for name in ("step.guided", "step.sample", "loop.latents"):
        compare(name, record[name], contract["reference"]["tolerance"])
    squared = np.mean((image.astype(np.float64) - reference["loop.image"]) ** 2)
    psnr, wanted = float(10 * np.log10(255**2 / max(squared, 1e-10))), contract["reference"]["image_psnr"]
    passed.append(psnr >= wanted)
    print(f"{'ok  ' if passed[-1] else 'FAIL'}  {'loop.image':45s} PSNR {psnr:.1f} dB (wanted {wanted})")
    return all(passed)


def natural(text):
    """An option's whole number, 0 … 2^63 - 1."""
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{number} is not from 0 to 2^63 - 1")
    return number


def read_windows(path, encoders):
    """The windows of token ids in a JSON file."""
    windows = json.loads(Path(path).read_text(encoding="utf-8"))
    shaped = isinstance(windows, list) and len(windows) == len(encoders)
    for rows, encoder in zip(windows if shaped else (), encoders):
        vocabulary = encoder["tokenizer"]["vocabulary"] if encoder["tokenizer"] else 0
        shaped = shaped and (
            rows is None or (isinstance(rows, list) and rows and all(isinstance(row, list) and row for row in rows))
        )
        shaped = shaped and all(type(token) is int and 0 <= token < vocabulary for row in rows or () for token in row)
    if not shaped:
        sys.exit(
            f"--token-ids {path} must hold, for each of {len(encoders)} text encoders, a list of lists of its token "
            "ids, as [[[1, 5, 2]], [[7, 2]]]."
        )
    return windows


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description="One image from this export, with numpy and its runtime alone.")
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument("--seed", type=natural, default=0, help="of the noise, as contract.json's `noise` says")
    noise.add_argument(
        "--reference", action="store_true", help="the stored noise, and the stored label or prompt if none is given"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--label", type=int, help="class number")
    what.add_argument(
        "--token-ids", help="JSON file: for every text encoder its windows of token ids, as [[[1, 5, 2]], [[7, 2]]]"
    )
    what.add_argument("--prompt", help="text; needs the package tokenizers")
    parser.add_argument("--output", default="image.png")
    parser.add_argument("--check", action="store_true", help="compare with reference.safetensors instead")
    args = parser.parse_args()
    folder = Path(__file__).resolve().parent
    contract = read_contract(folder)
    if not args.check:
        check_image_path(args.output, [args.token_ids])

    def opener(key):
        entry = contract["artefacts"][key]
        names = [[tensor["name"] for tensor in entry[side]] for side in ("inputs", "outputs")]
        return open_file(folder / entry["file"], contract["format"], *names)

    artefacts, labels, text = Artefacts(contract, opener), contract["labels"], contract["text"]
    if args.check and not check_hashes(folder, contract):
        return 1
    reference = read_safetensors(folder / contract["reference"]["file"])
    if args.check:
        return 0 if check(contract, artefacts, reference) else 1
    label, windows = reference.get("label"), reference_windows(contract, reference)
    if args.label is not None:
        label = args.label
        if not 0 <= label < (labels["count"] if labels else 0):
            sys.exit(
                f"--label is {label}, but "
                + (f"the classes are 0 … {labels['count'] - 1}." if labels else "this model takes no labels.")
            )
    if text is None and (args.token_ids or args.prompt is not None):
        sys.exit("This model takes no text.")
    if args.token_ids:
        windows = read_windows(args.token_ids, text["encoders"])
    elif args.prompt is not None:
        windows = [
            tokenize(folder, encoder, args.prompt) if encoder["artefact"] else None for encoder in text["encoders"]
        ]
    start = reference["noise"]
    if not args.reference:
        start = start_noise(contract, args.seed, start.shape)
    write_png(args.output, sample(contract, artefacts, start, conditioning(contract, artefacts, label, windows)))
    print(args.output)
    return 0


def interrupt(number, frame):
    """SIGTERM ends the program as Ctrl-C does."""
    raise KeyboardInterrupt(number)


def run():
    """The command line, ended in at most one line on stderr; its exit code."""
    code, line = 0, None
    signal.signal(
        signal.SIGINT, interrupt
    )  # though it may have been ignored at the start, as for a job in a script's background
    signal.signal(signal.SIGTERM, interrupt)
    try:
        try:
            code = main()
        except SystemExit as stop:
            code, line = (2, stop.code) if isinstance(stop.code, str) else (stop.code or 0, None)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        code, line = 128 + (stop.args or (signal.SIGINT,))[0], "interrupted."
    except BrokenPipeError:  # the reader of the output has gone
        pass
    except json.JSONDecodeError as error:
        code, line = 2, f"contract.json, or the file of --token-ids, is not JSON ({error})."
    except (OSError, MemoryError, ImportError) as error:
        code, line = 2, f"{type(error).__name__}: {error}"
    except Exception as error:
        if os.environ.get("EDGEDIT_TRACEBACK", "") not in ("", "0"):
            traceback.print_exc()
        code, line = (
            70,
            f"this is a fault of the program or a damaged export (--check), not of your input: {type(error).__name__}: "
            f"{error}.",
        )
        line += " EDGEDIT_TRACEBACK=1 in the environment shows the traceback."
    if line is not None:
        print("sample_min.py: " + " ".join(line.split()), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # Python would complain when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


if __name__ == "__main__":
    sys.exit(run())
