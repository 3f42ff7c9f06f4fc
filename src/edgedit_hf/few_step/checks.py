"""What a few-step run refuses: from its recipe and the configs of what it names alone, before weights are read; and
what its student may be compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..elastic.flow_teacher import check_quantization
from ..errors import EdgeDiTError
from ..files import weights_hash
from ..records import StageRecord
from ..run.config import RunConfig
from ..run.sections import FewStepConfig
from ..run.stage import FEW_STEP
from ..schema import read_record


def check_options(options: FewStepConfig, elastic: bool) -> None:
    """Raise if keys of the section contradict one another, or would be ignored by this family."""
    if not options.matching_weight and not options.knowledge_weight:
        raise EdgeDiTError("few_step.matching_weight and few_step.knowledge_weight are both 0: nothing to learn from.")
    if options.matching_weight and options.schedule == "alternate" and options.student_every == 1:
        raise EdgeDiTError(
            "few_step.schedule is alternate and few_step.student_every is 1: the critic would never learn; make it 2 "
            "or more, or take the schedule every."
        )
    if not options.matching_weight:
        unused = {"student_every": options.student_every != 1, "critic_merge": options.critic_merge != 0}
        _refuse_unused(options, unused, "few_step.matching_weight is 0, so that there is no critic")
    if not options.knowledge_weight:
        names = ("feature_weight", "teacher", "teacher_lora")
        unused = {name: bool(getattr(options, name)) for name in names}
        _refuse_unused(options, unused, "few_step.knowledge_weight is 0, so that no teacher is asked")
    if options.real_guidance is not None and 0 < options.real_guidance < 1:
        raise EdgeDiTError(
            f"few_step.real_guidance is {options.real_guidance:g}, which is between none and 1, where guidance begins; "
            "give 1 (none), or more."
        )
    if options.teacher_lora is not None and options.teacher is None:
        raise EdgeDiTError(
            f"few_step.teacher_lora is {options.teacher_lora}, but few_step.teacher is null: give the pipeline that it "
            "belongs to."
        )
    guidance = options.real_guidance if options.real_guidance is not None or elastic else 1.0
    if options.decoupled and guidance is not None and guidance <= 1:
        raise EdgeDiTError(
            f"few_step.decoupled is true, but the real score has no guidance (few_step.real_guidance "
            f"{options.real_guidance}) that could be taken apart; give one above 1, or leave decoupled out."
        )
    if options.quantization != "none":
        if elastic and options.teacher is not None:
            check_quantization(options.quantization, "few_step.quantization")
        else:
            whose = "few_step.teacher is null" if elastic else "the net is conditioned on classes"
            raise EdgeDiTError(
                f"few_step.quantization is {options.quantization}, which is for a given teacher of text to image, but "
                f"{whose}; leave it out."
            )
    if elastic:
        return
    if options.subnet is not None:
        raise EdgeDiTError(
            f"few_step.subnet is {options.subnet!r}, but a net that is conditioned on classes has no sub-networks; "
            "leave it out."
        )
    if options.teacher_lora is not None:
        raise EdgeDiTError(
            f"few_step.teacher_lora {options.teacher_lora} is for teachers of text to image; fuse it into this one "
            "first: edgedit convert TEACHER OUT --teacher-lora ADAPTER."
        )


def _refuse_unused(options: FewStepConfig, unused: Mapping[str, bool], why: str) -> None:
    for name in (name for name, given in unused.items() if given):
        raise EdgeDiTError(f"few_step.{name} is {getattr(options, name)}, but {why}; leave it out.")


def check_distilled_from(config: RunConfig, path: Any, transformer: Any) -> str:
    """The hash of the net that a run's few-step student is compared with.

    Raises:
        EdgeDiTError: it is not the one that the student was distilled from.
    """
    folder, found = config.folder(FEW_STEP.folder), weights_hash(transformer.state_dict())
    if not (folder / "stage.json").is_file():
        return found
    made_from = read_record(folder / "stage.json", StageRecord, FEW_STEP.made_by)["inputs"].get("pipeline", found)
    if made_from != found:
        raise EdgeDiTError(
            f"{folder} was distilled from a net with the weights {made_from}, but {path} holds {found}: name what it "
            f"was distilled from (few_step.path), or delete {folder} and run {FEW_STEP.made_by} again."
        )
    return found


def check_many_step(path: Any, pipeline: Mapping[str, Any], transformer: Mapping[str, Any]) -> None:
    """Raise unless a pipeline can be distilled, so be a real score.

    Args:
        path: of it, for the message. pipeline, transformer: their configs.
    """
    if pipeline.get("few_step_timesteps"):
        raise EdgeDiTError(
            f"{path} was distilled for {pipeline.get('default_steps')} steps already, and is no real score: give the "
            "many-step pipeline that it was made from (few_step.path)."
        )
    if transformer.get("guidance_embeds"):
        raise EdgeDiTError(
            f"{path} has guidance distilled into it (guidance_embeds), and is no real score: give one without."
        )
    if transformer.get("quantization_config"):
        raise EdgeDiTError(f"{path} is quantised; distil first, then quantise.")


def check_widths(path: Any, options: FewStepConfig, names: Sequence[str]) -> None:
    """Raise unless the sub-networks of the net in `path` can be distilled as the recipe says."""
    if options.subnet is not None and options.subnet not in names:
        raise EdgeDiTError(
            f"few_step.subnet is {options.subnet!r}, but {path} has {', '.join(names) or 'no sub-networks'}."
        )
    widths = 1 if options.subnet is not None else len(names)
    if options.knowledge_weight and options.feature_weight and widths > 1:
        raise EdgeDiTError(
            f"few_step.feature_weight is {options.feature_weight:g}, but the {widths} widths of the net have tokens of "
            "different sizes; set it to 0, or distil one width (few_step.subnet)."
        )


def check_class_guidance(path: Any, options: FewStepConfig, transformer: Mapping[str, Any]) -> None:
    """Raise if a net without classes is to guide."""
    for name in ("real_guidance", "knowledge_guidance"):
        if not transformer["num_classes"] and (getattr(options, name) or 1) > 1:
            raise EdgeDiTError(
                f"few_step.{name} is {getattr(options, name):g}, but {path} has no classes that it could guide to; "
                "leave it out."
            )


def teacher_guidance(options: FewStepConfig, pipeline: Mapping[str, Any]) -> float:
    """The guidance of a given teacher: the recipe's, or its own default.

    Args:
        pipeline: its config.

    Raises:
        EdgeDiTError: neither says one, as pipelines that are not ours do not.
    """
    found = options.knowledge_guidance
    if found is None and options.teacher_lora is None:  # which makes another net of it
        found = pipeline.get("default_guidance_scale")
    if found is None:
        raise EdgeDiTError(
            f"few_step.teacher {options.teacher} {'with its LoRA ' * (options.teacher_lora is not None)}does not say "
            "with which guidance it samples, and few_step.knowledge_guidance is null: set it (1 for one that was "
            "distilled to need none)."
        )
    return float(found)


def check_class_teacher(path: Any, theirs: Mapping[str, Any], student: Mapping[str, Any]) -> None:
    """Raise unless the transformer of a given teacher sees what the student sees; both by their configs."""
    for name in ("prediction_type", "in_channels", "num_classes", "sample_size"):
        if theirs.get(name) != student[name]:
            raise EdgeDiTError(
                f"few_step.teacher {path} has {name} {theirs.get(name)!r}, the net that is distilled "
                f"{student[name]!r}; they must agree."
            )
