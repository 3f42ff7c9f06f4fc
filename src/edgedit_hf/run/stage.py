"""The stages of a run, one row each, in order. Whatever else knows about stages asks these two tables. No torch.

A new stage is one row and one script.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..hub import is_name
from .config import RunConfig
from .sections import OptimisationConfig, QuantizeConfig


class Input(NamedTuple):
    """What a stage reads that somebody else made.

    Args:
        name: in the stage's record.
        at: the file, or the pipeline's folder, in the run whose hash is recorded; without it the script, which opens
            the thing, gives its hash.
    """

    name: str
    at: str = ""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: what `edgedit train`, progress and messages call it.
        script: its recipe in training/.
        folder: of its results, in the run.
        label: what it does, in words.
        sections: what its results depend on in the recipe: sections ("tune"), keys of others ("export.executorch"),
            `seed` and `threads`.
        inputs: what else they depend on.
        more: further folders that it writes as its own, each on its own.
        brought: the key that names results of this kind, which are then used in the place of its own.
        unless: the key that makes it needless. only: the key that asks for it.
        does: the function of the script that is this stage, where the script is more than one.
    """

    name: str
    script: str
    folder: str
    label: str
    sections: tuple[str, ...]
    inputs: tuple[Input, ...] = ()
    more: tuple[str, ...] = ()
    brought: str = ""
    unless: str = ""
    only: str = ""
    does: str = "run"

    @property
    def folders(self) -> tuple[str, ...]:
        """All folders that it writes in the run."""
        return (self.folder, *self.more)

    @property
    def made_by(self) -> str:
        """What messages call it, e.g. "… is written by stage bank (training/distill_proxies.py), run that first"."""
        return f"stage {self.name} (training/{self.script})"

    def values(self, config: RunConfig) -> dict[str, Any]:
        """The plain values of its sections, nested as in a recipe. The seed has a place of its own in a record."""
        found: dict[str, Any] = {}
        for name in self.sections:
            section, _, key = name.partition(".")
            if key:
                found.setdefault(section, {})[key] = operator.attrgetter(name)(config)
            elif section == "threads":
                found[section] = config.threads
            elif section != "seed":
                found |= config.section(section)
        return found

    def needed(self, config: RunConfig) -> bool:
        """Whether a run of this recipe goes through it."""
        asked = not self.only or bool(operator.attrgetter(self.only)(config))
        return asked and (not self.unless or operator.attrgetter(self.unless)(config) is None)

    def place(self, config: RunConfig, folder: str | None = None) -> Path | str:
        """Where its results are, or those that the recipe brings along: a folder, or a name on the Hub."""
        path = operator.attrgetter(self.brought)(config) if self.brought else None
        if path is None:
            return config.folder(folder or self.folder)
        return path if is_name(path) else Path(path).expanduser()


IMAGES, EXTRACTOR = Input("data"), Input("extractor")
THE_TEACHER = Input("teacher", "teacher")
# of stages that judge a bank's students
JUDGED = (Input("bank", "bank/index.json"), Input("latency", "latency/table.json"), THE_TEACHER, IMAGES, EXTRACTOR)
OWN_OF_QUANTIZE = [
    f"quantize.{entry.name}"
    for entry in dataclasses.fields(QuantizeConfig)
    if entry.name not in {"dropout", *(inherited.name for inherited in dataclasses.fields(OptimisationConfig))}
]  # what its first part depends on: the keys of the loop may change without making that anew

# -------------------------------------------------------------------- class-conditional (the three from FEW_STEP on: of
# either family)

TEACHER = Stage(
    "teacher",
    "train_teacher.py",
    "teacher",
    "train the network that is compressed",
    sections=("seed", "data", "teacher", "sampling"),
    inputs=(IMAGES,),
    brought="teacher.path",
)
BANK = Stage(
    "bank",
    "distill_proxies.py",
    "bank",
    "distil every smaller stand-in of every layer",
    sections=("seed", "data", "bank"),
    inputs=(THE_TEACHER, IMAGES),
)
LATENCY = Stage(
    "latency",
    "measure_latency.py",
    "latency",
    "measure every block shape in the runtime that will ship",
    sections=("latency", "bank.menu", "bank.reduced_mlp_ratio", "bank.reduced_attention_dim"),
    inputs=(Input("table"),),
    unless="student.genotype",
)
SEARCH = Stage(
    "search",
    "search_architecture.py",
    "search",
    "search the front of quality against latency",
    sections=("seed", "search", "evaluate.extractor", "evaluate.extractor_steps"),
    inputs=JUDGED,
    unless="student.genotype",
)
STUDENT = Stage(
    "student",
    "select_student.py",
    "student",
    "choose a point of the front and assemble its student",
    sections=("student",),
    inputs=(
        Input("front", "search/front.json"),
        Input("genotype"),
        Input("bank", "bank/index.json"),
        THE_TEACHER,
    ),
)
TUNE = Stage(
    "tune",
    "finetune.py",
    "student-tuned",
    "fine-tune the student, and what it is compared with",
    sections=("seed", "data", "tune"),
    inputs=(Input("student", "student"), Input("bank", "bank/index.json"), THE_TEACHER, IMAGES),
    more=("student-random-proxies", "teacher-more-steps"),
)
FEW_STEP = Stage(
    "few-step",
    "distill_few_step.py",
    "few-step",
    "distil the net to a few steps without guidance",
    sections=("seed", "data", "few_step", "evaluate.extractor", "evaluate.extractor_steps"),
    inputs=(Input("pipeline"), IMAGES, EXTRACTOR, Input("knowledge"), Input("text")),
    only="few_step.enabled",
)
QUANTIZE = Stage(
    "quantize",
    "quantize.py",
    "quantized-untuned",
    "give every layer of a pipeline a low-bit form",
    sections=("seed", *OWN_OF_QUANTIZE),
    inputs=(Input("pipeline"), Input("prompts")),
    only="quantize.enabled",
    does="quantize",
)
SELF_DISTIL = Stage(
    "self-distil",
    "quantize.py",
    "quantized",
    "tune what is not quantised to the unquantised network's output",
    sections=("seed", "quantize"),
    inputs=(Input("untuned", "quantized-untuned/stage.json"),),
    only="quantize.enabled",
    does="self_distil",
)
EXPORT = Stage(
    "export",
    "export_student.py",
    "exported",
    "lower the student for its runtimes, verify and time it",
    sections=("seed", "export", "evaluate.latency_batch_size"),
    inputs=(Input("student-tuned", "student-tuned"), Input("few-step", "few-step")),  # one: see shipped()
)
EVALUATE = Stage(
    "evaluate",
    "evaluate_models.py",
    "evaluate",
    "judge every model of the run alike",
    sections=(
        *("seed", "evaluate", "sampling", "latency.threads"),
        *("tune.teacher_more_steps", "tune.random_proxies", "export.dtypes", "export.executorch"),
    ),
    inputs=(
        *(
            Input(folder, folder)
            for folder in (
                "teacher",
                "teacher-more-steps",
                "student",
                "student-random-proxies",
                "student-tuned",
                "few-step",
                "quantized",
                "exported/onnx-fp32",
                "exported/onnx-int8",
                "exported/executorch-fp32",
                "exported/executorch-int8",
                "exported/executorch-int4",
            )
        ),
        IMAGES,
        EXTRACTOR,
        Input("few-step-source"),  # of few_step.path: see given_source()
    ),
)
SENSITIVITY = Stage(
    "sensitivity",
    "sensitivity.py",
    "sensitivity",
    "measure what every single change of a layer costs",
    sections=("seed", "data", "sensitivity"),
    inputs=(THE_TEACHER, IMAGES),
)
RANK = Stage(
    "rank",
    "rank_objectives.py",
    "ranking",
    "tune some genotypes alike and ask which objective foretells it",
    sections=(
        *("seed", "data", "rank", "search.samples", "search.sampling_steps", "search.guidance_scale"),
        *("evaluate.extractor", "evaluate.extractor_steps"),
    ),
    inputs=JUDGED,
)

# -------------------------------------------------------------------- text to image

TEXT = Stage(
    "text",
    "train_text_encoders.py",
    "text",
    "train two small text encoders on the captions",
    sections=("seed", "data", "text"),
    inputs=(IMAGES,),
)
ELASTIC = Stage(
    "elastic",
    "train_elastic.py",
    "elastic",
    "train the supernet, all widths in one set of weights",
    sections=("seed", "data", "elastic", "knowledge", "sampling"),
    inputs=(IMAGES, Input("text"), Input("teacher")),
)
EVALUATE_ELASTIC = Stage(
    "evaluate-elastic",
    "evaluate_elastic.py",
    "evaluate",
    "judge every sub-network alike",
    sections=("seed", "data", "evaluate", "sampling", "threads"),
    inputs=(Input("elastic", "elastic/stage.json"), Input("weights", "elastic"), IMAGES, EXTRACTOR),
)

EVALUATE_FEW_STEP = Stage(
    "evaluate-few-step",
    "evaluate_few_step.py",
    "evaluate-few-step",
    "judge every sub-network of the few-step net alike",
    sections=("seed", "data", "evaluate", "sampling", "threads", "few_step.path", "few_step.subnet"),
    inputs=(
        Input("pipeline"),
        Input("few-step", "few-step"),
        Input("captions", "evaluate/captions.json"),
        IMAGES,
        EXTRACTOR,
    ),
    only="few_step.enabled",
)

EDGEDIT = (TEACHER, BANK, LATENCY, SEARCH, STUDENT, TUNE, FEW_STEP, QUANTIZE, SELF_DISTIL, EXPORT, EVALUATE)
TEXT_TO_IMAGE = (TEXT, ELASTIC, EVALUATE_ELASTIC, FEW_STEP, EVALUATE_FEW_STEP)
OPTIONAL = (SENSITIVITY, RANK)
"""Stages that no driver runs: each is started on its own."""

STAGES = tuple(dict.fromkeys(EDGEDIT + TEXT_TO_IMAGE + OPTIONAL))
DRIVERS = {"compress": ("compress.py", EDGEDIT), "text-to-image": ("text_to_image.py", TEXT_TO_IMAGE)}
"""What runs a whole table: its name for `edgedit train`, its script, and the table."""


def shipped(config: RunConfig) -> Stage:
    """The stage whose pipeline a run of classes exports, judges its exports against, and writes the card of."""
    return FEW_STEP if FEW_STEP.needed(config) else TUNE


def given_source(config: RunConfig) -> str | None:
    """The pipeline that a few-step student is distilled from, where that is not the run's own student or supernet."""
    path = config.few_step.path
    own = {config.folder(stage.folder).resolve() for stage in (TUNE, ELASTIC)}
    return None if path is None or (not is_name(path) and Path(path).expanduser().resolve() in own) else path


def maker_of(at: str, table: Sequence[Stage] = STAGES) -> Stage:
    """The stage that writes a file or folder of a run."""
    return next(stage for stage in table if Path(at).parts[0] in stage.folders)
