"""Before the first stage: everything that can be checked without running it. What would stop a later stage stops the
run now.

`--dry-run` checks the same; what is not on this machine yet (a data set or model of the Hub, a teacher to be converted)
it cannot check, and says so. Stages that are finished are not looked at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from . import hub
from .data.images import check_images
from .data.loading import load_run_captions, load_run_images
from .diffusion import make_scheduler
from .distill.memory_plan import wanted_proxies
from .distill.proxy_group import new_optimizer
from .distill.teacher import read_genotype, search_space_of, teacher_path
from .elastic.cost import data_shapes
from .elastic.flow_teacher import check_quantization, teacher_family
from .elastic.supernet import new_elastic
from .errors import EdgeDiTError
from .estimate import estimate, workload
from .export.formats import FORMATS
from .export.web.runtime import check_available
from .few_step.checks import (
    check_class_guidance,
    check_class_teacher,
    check_many_step,
    check_options,
    check_widths,
    teacher_guidance,
)
from .few_step.schedule import few_step_timesteps
from .files import atomic_write_json, hash_json, read_json
from .metrics.extractors import check_classifiable
from .metrics.networks import InceptionExtractor
from .models.transformer_elastic_dit import ElasticDiTTransformer2DModel
from .pipelines.loading import KINDS, TEXT_TO_IMAGE_VAES, VAES, encoder_folder, load_scheduler
from .publish.run import check_push
from .records import Named
from .run.config import RunConfig
from .run.cost import Machine
from .run.outputs import check_writable, class_name
from .run.sections import OptimisationConfig
from .run.stage import EDGEDIT, TEXT_TO_IMAGE, Stage
from .schema import read_record
from .search.device_tables import given_tables, table_names
from .search.latency_table import table_file
from .search_space import SearchSpace

# Stages that need the extractor.
JUDGING = {"search", "rank", "few-step", "evaluate", "evaluate-elastic", "evaluate-few-step"}
DECODED_IN_A_DRY_RUN = 20_000  # images at most; a real run decodes all of them


def preflight(config: RunConfig, stages: Sequence[Stage], processes: int = 1, dry_run: bool = False) -> list[str]:
    """Check what these stages of a run need, as far as they are not finished.

    Args:
        stages: rows of the tables. Those that the recipe makes needless are left out.
        processes: that will share a batch.
        dry_run: nothing may be written or fetched. What this machine lacks is noted, and large sets of images are not
            decoded.

    Returns:
        what could not be checked or is not here, in words.

    Raises:
        EdgeDiTError: the first thing that cannot work.
    """
    left, alone = [], len({stage.script for stage in stages}) == 1
    for stage in stages:
        asked = stage.needed(config) or alone  # what is run on its own needs no key to ask for it
        if asked and not config.folder(stage.folder, "stage.json").exists():
            check_writable(config.folder(stage.folder))
            left.append(stage.name)
    notes: list[str] = []
    if not alone:
        (partial(_noted, notes) if dry_run else _raised)(check_push, config)
    check_batches(config, left, processes)
    check_sampling(config, left)
    check = partial(_noted, notes) if dry_run else _raised
    check(check_tools, config, left)
    captioned = _captioned(config, [stage.name for stage in stages])
    if "few-step" in left:
        _check_few_step(config, captioned, notes, dry_run)
    if config.quantize.enabled and not alone:
        _check_quantize(config, bool(captioned), notes, dry_run)
    if "teacher" in left:
        _check_compression(config, left, processes, notes, dry_run)
        check(check_space, config.output_dir, _bytes_to_write(config, left, processes), "The run")
    if {"text", "elastic"} & set(left):
        _check_text_to_image(config, left, notes, dry_run)
    _check_pictures(config, left, bool(captioned), dry_run, notes)
    return notes


def _raised(check: Callable[..., None], *arguments: Any) -> None:
    check(*arguments)


def _noted(notes: list[str], check: Callable[..., None], *arguments: Any) -> None:
    try:
        check(*arguments)
    except EdgeDiTError as error:
        notes.append(f"Not ready here: {error}")


# -------------------------------------------------------------------- places


def check_space(path: str | os.PathLike, needed: float, what: str) -> None:
    """Raise if the disk of a folder has fewer free bytes than are needed."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        sizes = f"{needed / 1e9:.2f} GB below {path}, but its disk has {free / 1e9:.2f} GB left"
        raise EdgeDiTError(f"{what} will write {sizes}; free some or choose another output_dir.")


# -------------------------------------------------------------------- settings


def check_batches(config: RunConfig, stages: Sequence[str], processes: int) -> None:
    """Raise unless every batch can be divided between the processes and the micro-batches."""
    for stage in stages:
        section = stage.replace("-", "_")
        options: Any = getattr(config, section, None)
        if stage == "teacher" and config.teacher.path is not None:
            continue
        if isinstance(options, OptimisationConfig) and options.batch_size % (processes * options.gradient_accumulation):
            share = processes * options.gradient_accumulation
            raise EdgeDiTError(
                f"{section}.batch_size {options.batch_size} is not a multiple of processes × gradient_accumulation = "
                f"{share}; change one."
            )
        if stage == "text" and options.batch_size % processes:
            raise EdgeDiTError(
                f"text.batch_size {options.batch_size} is not a multiple of {processes} processes; change one."
            )


def check_sampling(config: RunConfig, stages: Sequence[str]) -> None:
    """Raise unless the schedulers make as many timesteps as are asked for."""
    asked = {
        **dict.fromkeys(("search", "rank"), ("search.sampling_steps", config.search.sampling_steps)),
        **dict.fromkeys(
            ("evaluate", "export", "evaluate-elastic", "elastic"), ("sampling.steps", config.sampling.steps)
        ),
    }
    for stage in (stage for stage in asked if stage in stages):
        scheduler = make_scheduler("flow_prediction") if "elastic" in stage else _scheduler(config)
        check_steps(*asked[stage], scheduler)


def check_steps(key: str, steps: int, scheduler: Any) -> None:
    """Raise unless a scheduler can take this number of steps."""
    most = scheduler.config.get("num_train_timesteps")
    if most is not None and steps > most:
        raise EdgeDiTError(
            f"{key} is {steps}, but the schedule of {type(scheduler).__name__} has {most} timesteps; take at most that "
            "many."
        )


def _scheduler(config: RunConfig) -> Any:
    """The scheduler that the run samples with: of a teacher that is brought along, or the recipe's."""
    folder = hub.here(teacher_path(config), "scheduler/scheduler_config.json")
    return make_scheduler(config.teacher.prediction_type) if folder is None else load_scheduler(folder / "scheduler")


def check_tools(config: RunConfig, stages: Sequence[str]) -> None:
    """Raise unless the libraries and files are here that the stages need beside the usual ones."""
    executorch = (
        [f"export.executorch {config.export.executorch}"]
        if config.export.executorch and {"export", "evaluate"} & set(stages)
        else []
    )
    executorch += (
        ["latency.runtime executorch"] if config.latency.runtime == "executorch" and "latency" in stages else []
    )
    missing = FORMATS["executorch"].missing
    if executorch and missing is not None:
        raise EdgeDiTError(f"{executorch[0]} needs {missing.name}, which is not installed: {missing.remedy}.")
    if config.export.web and "export" in stages:
        check_available()
    if "bank" in stages:
        new_optimizer(config.bank.optimizer, [torch.nn.Parameter(torch.zeros(1))], 1e-3)
    if config.evaluate.extractor == "inception" and JUDGING & set(stages):
        InceptionExtractor()


# -------------------------------------------------------------------- models


def check_weight_files(folder: Path) -> None:
    """Raise if a safetensors file of a pipeline folder is cut short or is none: only headers are read."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise EdgeDiTError(
                f"{path} cannot be read ({error}); it is damaged or no safetensors file, get it again."
            ) from None


def _check_given(
    key: str,
    path: str | None,
    kinds: Sequence[str],
    notes: list[str],
    dry_run: bool,
    fetch: Callable[..., Path] = hub.pipeline_folder,
) -> None:
    """A pipeline or model that the recipe names: of one of these classes, with whole files. Of the Hub it is fetched;
    what is not here in a dry run is noted.

    Args:
        fetch: brings a thing of this kind here by its name.
    """
    if path is None or path == "none":
        return
    if hub.is_name(path):
        try:
            if fetch is hub.pipeline_folder and not dry_run:  # before all the rest
                _check_class(key, path, fetch(path, described=True), kinds)
            folder = fetch(path, local_files_only=dry_run)
        except EdgeDiTError as error:
            if not dry_run:
                raise EdgeDiTError(f"{key} is {str(error).removeprefix(f'{key} is ')}") from None
            notes.append(f"Not checked: {key} {path}, which is not on this machine yet.")
            return
    else:
        folder = Path(path).expanduser()
    if not folder.exists():
        if not dry_run:
            raise EdgeDiTError(
                f"{key} is {path}, but there is no such folder; give a folder or a Hub id (organisation/name)."
            )
        notes.append(f"Not checked: {key} {path}, which is not here.")
        return
    _check_class(key, path, folder, kinds)
    check_weight_files(folder)


def _check_class(key: str, path: str, folder: Path, kinds: Sequence[str]) -> None:
    """Raise unless a folder holds a pipeline or model of one of these classes (empty: of any)."""
    if kinds:
        about = next((folder / name for name in ("model_index.json", "config.json") if (folder / name).is_file()), None)
        if about is None:
            raise EdgeDiTError(
                f"{key} is {path}, without model_index.json and config.json; give a folder that save_pretrained wrote, "
                "or convert it."
            )
        name = class_name(read_record(about, Named, "save_pretrained"))
        if name not in kinds:
            raise EdgeDiTError(f"{key} is {path}, which holds a {name}; it must be one of {', '.join(kinds)}.")


# -------------------------------------------------------------------- the two kinds of run


def _check_compression(
    config: RunConfig, stages: Sequence[str], processes: int, notes: list[str], dry_run: bool
) -> None:
    _check_given("teacher.path", config.teacher.path, ("EdgeDiTPipeline",), notes, dry_run)
    _check_given("data.vae", config.data.vae, VAES, notes, dry_run, hub.component_folder)
    work = workload(config)
    space = search_space_of(config, work.model)
    only = None if config.bank.only is None else [read_genotype(name, "bank.only") for name in config.bank.only]
    wanted = wanted_proxies(space, only)
    if config.student.genotype is not None:
        _check_genotype(config, space, wanted)
    if (tables := table_names(config.latency.table)) and "latency" in stages:
        absent = [name for name in tables if dry_run and hub.is_name(name) and not _is_here(name)]
        notes += [f"Not checked: latency.table {name}, which is not on this machine yet." for name in absent]
        if not absent:
            given_tables(config.latency, work.model, space, local_files_only=dry_run)
    if "evaluate" in stages:
        _check_card(config)


def _is_here(table: str) -> bool:
    try:
        return table_file(table, local_files_only=True).is_file()
    except EdgeDiTError:
        return False


def _bytes_to_write(config: RunConfig, stages: Sequence[str], processes: int) -> float:
    """Bytes of the results; the machine does not matter for them. Raises if proxies do not fit a memory budget."""
    return sum(
        row.disk for row in estimate(config, Machine("here", processes, 1.0, 1.0, 1.0, 1.0)) if row.stage in stages
    )


def _check_genotype(config: RunConfig, space: SearchSpace, wanted: Sequence[Any]) -> None:
    assert config.student.genotype is not None
    genotype = read_genotype(config.student.genotype, "student.genotype")
    space.code(genotype)  # raises unless it is of this teacher and these reduced sizes
    needed = {(layer.source, space.option_of(layer)) for layer in wanted_proxies(space, [genotype])}
    if missing := needed - {(layer.source, space.option_of(layer)) for layer in wanted}:
        name = config.student.genotype
        raise EdgeDiTError(
            f"student.genotype {name} needs {len(missing)} proxies that bank.only {config.bank.only} does not make; "
            "add it there."
        )


def _check_card(config: RunConfig) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(config.card.repo_id)
    except HFValidationError as error:
        raise EdgeDiTError(f"card.repo_id is {config.card.repo_id!r}: {' '.join(str(error).split())}") from None


def _check_text_to_image(config: RunConfig, stages: Sequence[str], notes: list[str], dry_run: bool) -> None:
    _check_given("data.vae", config.data.vae, TEXT_TO_IMAGE_VAES, notes, dry_run, hub.component_folder)
    for key in ("encoder", "encoder_2"):
        _check_given(f"text.{key}", getattr(config.text, key), (), notes, dry_run, encoder_folder)
    if config.knowledge.teacher is not None:  # before gigabytes are fetched
        (partial(_noted, notes) if dry_run else _raised)(check_quantization, config.knowledge.quantization)
    _check_given("knowledge.teacher", config.knowledge.teacher, (), notes, dry_run)
    if config.text.encoder == config.text.encoder_2 == "none":
        raise EdgeDiTError(
            "text.encoder and text.encoder_2 are both 'none'; captions need one, set the other to null or to an "
            "encoder."
        )
    if {"elastic", "evaluate-elastic"} & set(stages):
        _planned_elastic(config)


def _planned_elastic(config: RunConfig) -> ElasticDiTTransformer2DModel:
    """The supernet that the recipe will train, without weights."""
    dims = [config.text.hidden_size if path is None else 0 for path in (config.text.encoder, config.text.encoder_2)]
    shapes, _ = data_shapes(config, [])
    with FakeTensorMode():
        return new_elastic(config, shapes, dims)


def _captioned(config: RunConfig, stages: Sequence[str]) -> bool | None:
    """Whether these stages, of which few-step may be of either family, are of text to image; `None`: what is distilled
    is not on this machine.
    """
    own = {stage.name for stage in TEXT_TO_IMAGE} - {stage.name for stage in EDGEDIT}
    if list(stages) != ["few-step"]:
        return bool(own & set(stages))
    path = config.few_step.path
    folder = hub.here(path if path is not None else config.folder("student-tuned"), "model_index.json")
    if folder is not None:
        index = read_record(folder / "model_index.json", Named, "save_pretrained")
        return class_name(index) == "ElasticDiTPipeline"
    return config.folder("elastic").is_dir() if path is None else None


def _check_few_step(config: RunConfig, captioned: bool | None, notes: list[str], dry_run: bool) -> None:
    options, path = config.few_step, config.few_step.path
    kinds = KINDS if captioned is None else ("ElasticDiTPipeline",) if captioned else ("EdgeDiTPipeline",)
    _check_given("few_step.path", path, kinds, notes, dry_run)
    _check_given("few_step.teacher", options.teacher, () if captioned else kinds, notes, dry_run)
    _check_given("few_step.teacher_lora", options.teacher_lora, (), notes, dry_run, hub.component_folder)
    if captioned is None:
        return
    check_options(options, captioned)
    given = path if path is not None else config.folder("elastic" if captioned else "student-tuned")
    folder = Path(given)
    values: dict[str, Any] = {}
    if (found := hub.here(given, "transformer/config.json")) is not None:
        values = read_json(found / "transformer" / "config.json", "save_pretrained")
        check_many_step(given, read_json(found / "model_index.json", "save_pretrained"), values)
    elif path is None:
        values = dict(_planned_elastic(config).config) if captioned else workload(config).model
    if values:
        subnets = values.get("subnets") or {}
        check_widths(folder, options, sorted(subnets, key=lambda name: subnets[name]))
        prediction = "flow_prediction" if captioned else values["prediction_type"]
        few_step_timesteps(prediction, options.sampling_steps, options.shift, options.first_signal, options.timesteps)
        if not captioned:
            check_class_guidance(folder, options, values)
    if options.teacher is None or not options.knowledge_weight:
        return
    local = options.teacher if hub.is_name(options.teacher) else Path(options.teacher).expanduser()
    teacher = hub.here(local, "model_index.json") or Path(local)
    if not teacher.exists():
        return
    if captioned:
        teacher_family(teacher)
        teacher_guidance(options, read_json(teacher / "model_index.json", "save_pretrained"))
    elif values:
        theirs = read_json(teacher / "transformer" / "config.json", "save_pretrained")
        check_class_teacher(options.teacher, theirs, values)


def _check_quantize(config: RunConfig, captioned: bool, notes: list[str], dry_run: bool) -> None:
    """Of a whole run."""
    if captioned:
        raise EdgeDiTError(
            "quantize.enabled is true, but a run of text to image has no such stage; set it to false, and quantise "
            "what the run makes with edgedit train quantize."
        )
    if config.quantize.subnet is not None:
        raise EdgeDiTError(
            f"quantize.subnet is {config.quantize.subnet!r}, but the network of a run of classes has no sub-networks; "
            "set it to null."
        )
    _check_given("quantize.path", config.quantize.path, ("EdgeDiTPipeline",), notes, dry_run)


# -------------------------------------------------------------------- images


def _check_pictures(config: RunConfig, stages: Sequence[str], captioned: bool, dry_run: bool, notes: list[str]) -> None:
    """Open the images of every split that a stage reads, and decode each once; `images-checked.json` notes that they
    were.
    """
    splits = ["train"] if set(stages) & {"teacher", "bank", "tune", "sensitivity", "text", "elastic"} else []
    judged = JUDGING & set(stages)
    if (
        judged
        or "elastic" in stages
        and config.elastic.validation_samples
        or "text" in stages
        and config.data.validation_fraction
    ):
        splits = ["train", "validation"]
    if captioned and judged and config.data.source == "digits":
        splits.append("held_out")
    source = config.data.source
    if dry_run and source != "digits" and not Path(source).expanduser().exists():
        notes.append(f"Not checked: the images of {source}, which is not here.")
        return
    marker = config.folder("images-checked.json")
    known = read_record(marker, dict[str, str], "a run's start") if marker.is_file() else {}
    for split in splits:
        dataset = (load_run_captions if captioned else load_run_images)(config, split)
        if judged and split == "train" and config.evaluate.extractor == "classifier":
            images = (
                load_run_images(config)
                if captioned and dataset.label_names
                else dataset.parts[0]
                if captioned
                else dataset
            )
            check_classifiable(images, "labels" if images.num_classes else "rotation")
        if dry_run and len(dataset) > DECODED_IN_A_DRY_RUN:
            notes.append(
                f"Not checked: the {len(dataset):,} images of split {split}, which a run decodes before its first "
                "stage."
            )
            continue
        labels = None if dataset.labels is None else dataset.labels.tolist()
        key = hash_json([config.section("data"), config.seed, len(dataset), labels])
        if known.get(split) == key:
            continue
        check_images(dataset)
        known[split] = key
        if not dry_run:
            atomic_write_json(marker, known)
