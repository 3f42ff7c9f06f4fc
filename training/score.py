"""Score images against a reference: of a pipeline (ours, diffusers' or an export; a folder or a name on the Hub), of a
folder, or of an .npz file. It belongs to no run and needs no recipe.

    edgedit train score runs/demo/student-tuned --reference digits --extractor runs/demo/extractor --samples 2000 \
        --output scores/student

Several processes (--num_processes) share the work in fixed chunks of images, and a run that was stopped does the chunks
that are missing. Writes OUTPUT/result.json (figures, their standard errors, and the stamp that says what they were
measured with), telemetry.jsonl and, if asked for, samples.npz in ADM's format and the images in the layouts of judges
of text to image.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers.utils import logging as diffusers_logging
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from edgedit_hf.entry import tell
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.files import atomic_write_json, hash_json, sweep, versions
from edgedit_hf.metrics.clip import ClipScorer
from edgedit_hf.metrics.extractors import Extractor
from edgedit_hf.metrics.handover import LAYOUTS, check_layout, read_prompts, write_handover
from edgedit_hf.metrics.networks import open_extractor
from edgedit_hf.metrics.npz import read_npz, write_npz
from edgedit_hf.metrics.scoring import (
    Chunks,
    Generated,
    Given,
    Reference,
    Score,
    channels_of,
    check_fits,
    clip_scores,
    describe,
    figures,
    is_pipeline,
    open_images,
    open_reference,
)
from edgedit_hf.report.tables import metric_label
from edgedit_hf.run.comparison import first_difference
from edgedit_hf.run.launch import accelerator_of, run_script
from edgedit_hf.run.lock import FolderLock
from edgedit_hf.run.outputs import check_output
from edgedit_hf.run.state import on_main
from edgedit_hf.schema import Rule, check_option, read_record

LEAST = 2  # images: a covariance of fewer does not exist
MADE_BY = "edgedit train score (delete the folder, and run the command again)"


def whole(least: int) -> Any:
    def whole_number(text: str) -> int:
        value = int(text)
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be at least {least}")
        return value

    return whole_number


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="pipeline folder or name on the Hub, folder of images, or .npz with arr_0")
    parser.add_argument("--reference", required=True, help="ADM's .npz, folder of images, or `datasets` id")
    parser.add_argument(
        "--extractor",
        required=True,
        help="inception, the folder of a run's extractor, or a vision model of transformers (facebook/dinov2-small)",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for the result and what it is made of")
    parser.add_argument("--samples", type=whole(1), default=50_000, help="number of images (default 50,000)")
    parser.add_argument("--steps", type=whole(1), help="denoising steps (default the pipeline's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default the pipeline's)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of noise, bootstrap and subsets")
    parser.add_argument("--batch-size", type=whole(1), default=50, help="images that a pipeline makes at a time")
    parser.add_argument("--chunk", type=whole(1), default=500, help="images that are stored at a time")
    parser.add_argument(
        "--threads", type=whole(0), default=0, help="of PyTorch, all processes together (0: its choice)"
    )
    parser.add_argument("--resolution", type=whole(1), help="crop and resize images of folders to this side")
    parser.add_argument("--prompts", type=Path, help="text or .jsonl: a prompt a line, for text to image")
    parser.add_argument("--subnet", help="sub-network of an elastic pipeline")
    parser.add_argument("--clip", help="CLIP of transformers that CLIPScore is computed with")
    parser.add_argument("--handover", action="append", default=[], metavar="LAYOUT", help=f"also {', '.join(LAYOUTS)}")
    parser.add_argument("--npz", action="store_true", help="also write samples.npz in ADM's format")
    return parser.parse_args(arguments)


def open_source(
    args: argparse.Namespace, prompts: list[str] | None, extractor: Extractor, accelerator: Accelerator
) -> Generated | Given:
    if is_pipeline(args.model):
        sampled = {"seed": args.seed, "steps": args.steps, "guidance_scale": args.guidance}
        made = Generated(args.model, prompts, **sampled, batch_size=args.batch_size, subnet=args.subnet)
        made.to(accelerator.device)
        return made
    of_pipelines = {"--steps": args.steps, "--guidance": args.guidance, "--subnet": args.subnet}
    if idle := [option for option, value in of_pipelines.items() if value is not None]:
        raise EdgeDiTError(f"{args.model} holds images that are there already; leave {', '.join(idle)} out.")
    if Path(args.model).suffix == ".npz":
        images = read_npz(args.model, channels_of(extractor)).images
        if images is None:
            raise EdgeDiTError(f"{args.model} holds no images (arr_0); give the file of the samples.")
    else:
        images = open_images(args.model, args.resolution)
    if len(images) < args.samples:
        raise EdgeDiTError(f"{args.model} has {len(images)} images, but --samples is {args.samples}; ask for fewer.")
    check_fits(args.model, images, extractor, LEAST)
    # Image i is of prompt i, so with prompts the first ones are taken. Without, the first ones may be of one class.
    return Given(images.at_most(args.samples) if prompts is None else images.subset(range(args.samples)))


def take(folder: Path, asked: dict[str, Any]) -> None:
    """The folder for this process, if it is new, or was made with the same request."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "request.json"
    # What a kill in the first moment leaves is the lock, and what was written aside.
    foreign = sorted(name for name in os.listdir(folder) if name != FolderLock.NAME and not name.startswith("."))
    if not path.exists() and foreign:
        raise EdgeDiTError(
            f"{folder} holds {foreign[0]}, but no request.json of a score; it is left as it is. Give another --output."
        )
    FolderLock(folder).acquire()
    sweep(folder)
    before_it = read_record(path, dict[str, Any], MADE_BY) if path.exists() else None
    if before_it != asked and not any(folder.glob("chunks/samples-*")) and not (folder / "result.json").exists():
        # New, or ended before its first image, perhaps because what was asked for cannot be done: nothing is lost.
        shutil.rmtree(folder / "chunks", ignore_errors=True)
        atomic_write_json(path, asked)
    elif (difference := first_difference(before_it, asked)) is not None:
        name, before, now = difference
        raise EdgeDiTError(
            f"{folder} was made with {name} = {before!r}, but now {name} = {now!r} is asked for. Use the old value, "
            f"another --output, or delete {folder} to make it anew."
        )
    (folder / "chunks").mkdir(exist_ok=True)
    sweep(folder / "chunks")


def run(args: argparse.Namespace, accelerator: Accelerator) -> None:
    check_output(args.output, [args.model, args.reference, args.extractor, args.prompts, args.clip], foreign=None)
    if args.samples < LEAST:
        raise EdgeDiTError(f"--samples is {args.samples}; a covariance needs at least {LEAST} images.")
    check_option("guidance", args.guidance, Rule(minimum=0.0, maximum=1e30))
    listed = None if args.prompts is None else read_prompts(args.prompts)
    prompts = None if listed is None else [prompt.text for prompt in listed]
    for layout in args.handover:
        check_layout(layout, listed or [], args.samples)
    extractor = open_extractor(args.extractor, accelerator.device)
    reference = open_reference(args.reference, extractor, args.resolution)
    if reference.images is not None:
        check_fits(f"the reference {args.reference}", reference.images, extractor, LEAST)
    source = open_source(args, prompts, extractor, accelerator)
    clip = None if args.clip is None else ClipScorer(args.clip, accelerator.device)
    if clip is not None and prompts is None:
        raise EdgeDiTError("--clip compares images with their prompts; give them (--prompts).")
    keep = args.npz or bool(args.handover)
    stamp = {
        **{"extractor": extractor.name, "extractor_hash": extractor.hash, "count": args.samples, "rounding": "bytes"},
        **{"reference": reference.sha256, "reference_count": reference.count},
        "prompts": None if prompts is None else hash_json(prompts),
        **source.stamp(accelerator.mixed_precision),
    }
    asked = {"model": source.fingerprint, "chunk": args.chunk, "batch_size": args.batch_size, "seed": args.seed}
    asked |= {"npz": args.npz, "handover": sorted(set(args.handover)), "subnet": args.subnet, **stamp}
    asked["clip"] = None if clip is None else clip.hash
    on_main(lambda: take(args.output, json.loads(json.dumps(asked))), accelerator)
    if (args.output / "result.json").exists():
        on_main(lambda: show(args.output), accelerator)
        return

    chunks = Chunks(args.output / "chunks", "samples", args.samples, args.chunk)
    real = None
    if reference.images is not None:
        real = Chunks(args.output / "chunks", "reference", len(reference.images), args.chunk)
    started = time.monotonic()
    for part, index in share([part for part in (real, chunks) if part is not None], accelerator, args.output, started):
        rows = part.rows(index)
        if part is chunks:
            with accelerator.autocast():
                images = source.images(rows)
        else:
            images = reference.images.batch(rows)["images"]
        tensors = describe(images, extractor, keep=keep and part is chunks)
        if part is chunks and clip is not None:
            tensors["clip"] = clip_scores(clip, images, prompts, rows)
        part.write(index, tensors)
    accelerator.wait_for_everyone()
    on_main(lambda: publish(args, chunks, real, reference, extractor, listed, stamp, clip), accelerator)


def share(parts: list[Chunks], accelerator: Accelerator, folder: Path, started: float) -> Any:
    """The chunks of this process that are not there yet, in turns with the others'; the main one shows how far all
    are.
    """
    work = [(part, index) for part in parts for index in range(len(part))]
    main = accelerator.is_main_process
    interval = 0.5 if sys.stderr.isatty() else 10.0
    bar = tqdm(
        total=sum(part.count for part in parts), unit="image", disable=not main, mininterval=interval, desc="score"
    )

    def there() -> int:
        return sum(len(part.rows(index)) for part, index in work if part.path(index).exists())

    bar.update(there())
    bar.initial = bar.n
    try:
        for part, index in work[accelerator.process_index :: accelerator.num_processes]:
            if part.path(index).exists():
                continue
            yield part, index
            if main:
                bar.update(there() - bar.n)
                line = {
                    "chunk": part.path(index).stem,
                    "images": bar.n,
                    "seconds": round(time.monotonic() - started, 3),
                }
                with open(folder / "telemetry.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    finally:
        bar.close()


def publish(
    args: argparse.Namespace,
    chunks: Chunks,
    real: Chunks | None,
    reference: Reference,
    extractor: Any,
    listed: Any,
    stamp: dict[str, Any],
    clip: ClipScorer | None,
) -> None:
    """Figures from the chunks, and what else was asked for; then `result.json`."""
    found = figures(chunks, real, reference, extractor, seed=args.seed, clip=clip is not None)
    if args.npz:
        write_npz(args.output / "samples.npz", chunks.count, (part.numpy() for part in chunks.read("images")))
    for layout in args.handover:
        command = write_handover(args.output / layout, layout, listed, chunks.count, chunks.image)
        tell(f"{args.output / layout} is for: {command}")
    result = {"model": args.model, "subnet": args.subnet, "reference": args.reference, **found}
    result |= {"stamp": stamp, "versions": versions()}
    if clip is not None:
        result["clip"] = {"name": clip.name, "hash": clip.hash}
    atomic_write_json(args.output / "result.json", result)
    show(args.output)


def show(folder: Path) -> None:
    """Print a result; what it was made of is no longer needed."""
    shutil.rmtree(folder / "chunks", ignore_errors=True)
    found = read_record(folder / "result.json", Score, MADE_BY)
    for note in found["notes"]:
        tell(f"note: {note}")
    for key, value in found["metrics"].items():
        error = found["standard_errors"].get(key)
        print(f"{metric_label(key)}: {value:.5g}" + ("" if error is None else f" ± {error:.2g}"))


if __name__ == "__main__":

    def work() -> None:
        args = parse()
        for library in (diffusers_logging, transformers_logging):  # loading a model needs no bar of its own
            library.set_verbosity_error()
            library.disable_progress_bar()
        run(args, accelerator_of(args.threads))

    run_script(work)
