"""What is refused before anything is loaded, and that what is allowed passes."""

import json

import pytest
import torch

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.few_step.checks import (
    check_class_guidance,
    check_class_teacher,
    check_distilled_from,
    check_many_step,
    check_options,
    check_widths,
    teacher_guidance,
)
from edgedit_hf.files import weights_hash
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.sections import FewStepConfig

NAMES = ["tiny", "small", "full"]


@pytest.mark.parametrize(
    ("elastic", "values", "said"),
    [
        (False, {"matching_weight": 0.0, "knowledge_weight": 0.0}, "are both 0: nothing to learn from"),
        (True, {"schedule": "alternate"}, "student_every is 1: the critic would never learn"),
        (True, {"matching_weight": 0.0, "student_every": 2}, "student_every is 2, but few_step.matching_weight is 0"),
        (True, {"matching_weight": 0.0, "critic_merge": 0.9}, "critic_merge is 0.9, but few_step.matching_weight is 0"),
        (True, {"knowledge_weight": 0.0, "teacher": "t"}, "teacher is t, but few_step.knowledge_weight is 0"),
        (False, {"knowledge_weight": 0.0, "feature_weight": 0.5}, "feature_weight is 0.5, but few_step.knowledge_wei"),
        (False, {"real_guidance": 0.5}, "real_guidance is 0.5, which is between none and 1"),
        (True, {"teacher_lora": "lora"}, "teacher_lora is lora, but few_step.teacher is null"),
        (False, {"teacher": "t", "teacher_lora": "lora"}, "teacher_lora lora is for teachers of text to image"),
        (False, {"decoupled": True}, r"decoupled is true, but the real score has no guidance .*\(.*None\)"),
        (True, {"decoupled": True, "real_guidance": 1.0}, r"no guidance \(few_step.real_guidance 1.0\)"),
        (False, {"quantization": "4bit", "teacher": "t"}, "quantization is 4bit, .* conditioned on classes"),
        (True, {"quantization": "8bit"}, "quantization is 8bit, .* few_step.teacher is null"),
        (False, {"subnet": "tiny"}, "subnet is 'tiny', .* has no sub-networks"),
    ],
)
def test_keys_that_contradict_one_another(elastic, values, said):
    with pytest.raises(EdgeDiTError, match=said):
        check_options(FewStepConfig(**values), elastic)


@pytest.mark.parametrize(
    ("elastic", "values"),
    [
        (False, {}),
        (True, {}),
        (False, {"matching_weight": 0.0, "schedule": "alternate"}),  # there is no critic
        (False, {"decoupled": True, "real_guidance": 1.5}),
        (True, {"decoupled": True}),  # the pipeline's own guidance
        (True, {"subnet": "tiny", "teacher": "t", "teacher_lora": "lora"}),
    ],
)
def test_keys_that_go_together(elastic, values):
    check_options(FewStepConfig(**values), elastic)


def test_what_is_no_real_score():
    check_many_step("here", {"few_step_timesteps": None}, {"guidance_embeds": False})
    for pipeline, transformer, said in (
        ({"few_step_timesteps": [601, 300], "default_steps": 2}, {}, "here was distilled for 2 steps already"),
        ({}, {"guidance_embeds": True}, "guidance distilled into it"),
        ({}, {"quantization_config": {"bits": 4}}, "here is quantised"),
    ):
        with pytest.raises(EdgeDiTError, match=said):
            check_many_step("here", pipeline, transformer)


def test_widths():
    check_widths("here", FewStepConfig(), NAMES)
    check_widths("here", FewStepConfig(subnet="small", feature_weight=0.5), NAMES)
    check_widths("here", FewStepConfig(feature_weight=0.5), [])
    with pytest.raises(EdgeDiTError, match="subnet is 'huge', but here has tiny, small, full"):
        check_widths("here", FewStepConfig(subnet="huge"), NAMES)
    with pytest.raises(EdgeDiTError, match="feature_weight is 0.5, but the 3 widths.*set it to 0, or distil one"):
        check_widths("here", FewStepConfig(feature_weight=0.5), NAMES)


def test_nets_of_classes():
    student = {"prediction_type": "epsilon", "in_channels": 4, "num_classes": 0, "sample_size": 32}
    check_class_teacher("there", dict(student), student)
    with pytest.raises(EdgeDiTError, match="few_step.teacher there has in_channels 3, the net that is distilled 4"):
        check_class_teacher("there", {**student, "in_channels": 3}, student)
    with pytest.raises(EdgeDiTError, match="has sample_size None"):
        check_class_teacher("there", {k: v for k, v in student.items() if k != "sample_size"}, student)
    check_class_guidance("here", FewStepConfig(), student)
    for name in ("real_guidance", "knowledge_guidance"):
        with pytest.raises(EdgeDiTError, match=f"{name} is 2, but here has no classes"):
            check_class_guidance("here", FewStepConfig(**{name: 2.0}), student)


def test_the_guidance_of_a_teacher_is_its_own_or_the_recipes_and_never_the_students():
    ours = {"default_guidance_scale": 2.5}
    assert teacher_guidance(FewStepConfig(teacher="t"), ours) == 2.5
    assert teacher_guidance(FewStepConfig(teacher="t", knowledge_guidance=1.0), ours) == 1.0
    assert teacher_guidance(FewStepConfig(teacher="t", teacher_lora="l", knowledge_guidance=1.0), {}) == 1.0
    for options, config, said in (
        (FewStepConfig(teacher="t"), {}, "few_step.teacher t does not say with which guidance"),
        (FewStepConfig(teacher="t", teacher_lora="l"), ours, "few_step.teacher t with its LoRA does not say"),
    ):
        with pytest.raises(EdgeDiTError, match=said):
            teacher_guidance(options, config)


def test_a_student_is_compared_with_what_it_was_distilled_from(make_transformer, tmp_path):
    config, net, other = RunConfig(output_dir=str(tmp_path)), make_transformer(), make_transformer(seed=1)
    assert check_distilled_from(config, "given", net) == weights_hash(net.state_dict())  # of no record
    record = {"inputs": {"pipeline": weights_hash(net.state_dict())}, "config": {}, "versions": {}}
    (tmp_path / "few-step").mkdir()
    (tmp_path / "few-step" / "stage.json").write_text(json.dumps({**record, "seed": 0, "steps": 6, "seconds": 1.0}))
    check_distilled_from(config, "given", net)
    said = rf"few-step was distilled from a net with the weights {weights_hash(net.state_dict())}, but given holds"
    with pytest.raises(EdgeDiTError, match=said + r" .*\(few_step.path\), or delete .*distill_few_step.py\) again"):
        check_distilled_from(config, "given", other)
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] += 1
    with pytest.raises(EdgeDiTError, match=said):
        check_distilled_from(config, "given", net)
