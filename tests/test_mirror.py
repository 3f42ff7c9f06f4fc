"""The tests mirror the package: a test file has the name of a module, and a module with code has a test file."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
ROOMS = {"training": ROOT / "training", "benchmarks": ROOT / "benchmarks"}

# Tests of what no one module does.
ACROSS = {
    "test_imports.py": "the order of all modules",
    "test_mirror.py": "the order of the tests",
    "test_docstrings.py": "the docstrings of all modules",
    "test_packaging.py": "what is installed",
    "test_hub_server.py": "the Hub that other tests push to and pull from",
    "test_quiet.py": "what commands, recipes and loading print",
    "metrics/test_evaluate_modules.py": "the folders that `evaluate` loads",
    "docs/test_blocks.py": "every command and block of the pages",
    "docs/test_pages.py": "the pages",
    "examples/test_examples.py": "every example",
    "sweep/test_sweep.py": "bad values for every command, key and file",
    "commands/test_options.py": "options of every command that are out of range",
    "export/web/test_philox.py": "the noise that the page draws",
    "export/test_arm64.py": "an export's files on the instruction set of phones",
    "export/test_kinds.py": "every kind of layer through every lowering",
    "export/test_relatives.py": "DiT's relatives through every lowering",
    "training/test_bad_input.py": "bad input of every recipe",
    "training/test_finished.py": "finished stages of a whole run that are not what they were",
    "training/test_resume.py": "every recipe killed and run again",
    "training/test_stale_results.py": "every stage when what it reads has changed",
    "training/test_two_ranks.py": "every recipe on two ranks",
}
# Modules that are tested where they are used, and by which test: it names the module or its script.
ELSEWHERE = {
    "errors": "test_entry.py",
    "records": "test_schema.py",
    "commands/card": "report/test_card_kinds.py",
    "commands/push": "publish/test_push.py",
    "commands/export": "export/onnx/test_lower.py",
    "distill/denoiser": "training/test_resume.py",
    "export/sample_min": "export/test_contract.py",
    "export/wrappers": "export/test_contract.py",
    "export/denoisers": "export/test_components.py",
    "export/exported": "export/test_components.py",
    "export/job": "export/test_pipeline_formats.py",
    "export/coreml/form": "export/coreml/test_lower.py",
    "export/executorch/xnnpack_elastic": "export/executorch/test_xnnpack.py",
    "export/executorch/xnnpack_encoders": "export/executorch/test_xnnpack.py",
    "export/onnx/lowbit": "export/onnx/test_lower.py",
    "metrics/evaluate_frechet_distance/evaluate_frechet_distance": "metrics/test_evaluate_modules.py",
    "metrics/evaluate_frechet_distance/app": "metrics/test_adapters.py",
    "metrics/evaluate_inception_score/evaluate_inception_score": "metrics/test_evaluate_modules.py",
    "metrics/evaluate_inception_score/app": "metrics/test_adapters.py",
    "metrics/evaluate_kernel_distance/evaluate_kernel_distance": "metrics/test_evaluate_modules.py",
    "metrics/evaluate_kernel_distance/app": "metrics/test_adapters.py",
    "metrics/evaluate_precision_recall/evaluate_precision_recall": "metrics/test_evaluate_modules.py",
    "metrics/evaluate_precision_recall/app": "metrics/test_adapters.py",
    "models/stored_weights": "models/test_checkpoints_foreign.py",
    "optimum_register/register_edgedit": "test_imports.py",
    "quantization/inputs": "training/test_quantize.py",
    "quantization/quantize": "quantization/test_quantizer.py",
    "quantization/weights": "quantization/test_quantizer.py",
    "report/sensitivity": "training/test_sensitivity.py",
    "report/ranking": "training/test_rank_objectives.py",
    "search/judging": "training/test_rank_objectives.py",
    "run/cost": "test_estimate.py",
    "run/sections": "run/test_config.py",
    "runtimes/runners": "runtimes/test_timing.py",
    "report/card_facts": "report/test_card_kinds.py",
    "report/card_pictures": "report/test_card_kinds.py",
    "report/card_records": "report/test_card_kinds.py",
    "report/subject": "report/test_card_kinds.py",
    "training/evaluate_few_step": "training/test_text_to_image.py",
    "training/evaluate_elastic": "training/test_text_to_image.py",
    "training/export_student": "training/test_stale_results.py",
    "training/finetune": "training/test_resume.py",
    "training/measure_latency": "training/test_resume.py",
    "training/search_architecture": "training/test_resume.py",
    "training/select_student": "training/test_stale_results.py",
    "training/train_teacher": "training/test_stale_results.py",
    "benchmarks/diffusers_dit": "benchmarks/test_forward.py",
    "benchmarks/adm_evaluator": "metrics/test_distances_adm.py",
}


def module_folder(room: Path) -> Path:
    """Where the modules are that the tests of a room are about."""
    return ROOMS.get(room.parts[0] if room.parts else "", ROOT / "src" / "edgedit_hf" / room)


def modules(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} - {"__init__"}


def test_every_test_file_is_named_after_a_module():
    """`test_<module>.py`, or `test_<module>_<aspect>.py` for a module with much to test."""
    astray = []
    for path in sorted(TESTS.rglob("test_*.py")):
        place = path.relative_to(TESTS)
        words = path.stem.removeprefix("test_").split("_")
        names = {"_".join(words[:count]) for count in range(1, len(words) + 1)}
        if not names & modules(module_folder(place.parent)) and place.as_posix() not in ACROSS:
            astray.append(place.as_posix())
    assert astray == [], "name them after a module, or say in ACROSS what they are about"
    assert all((TESTS / place).is_file() for place in ACROSS)


def test_every_module_has_a_test_file():
    source, alone = ROOT / "src" / "edgedit_hf", []
    folders = {path.parent for path in source.rglob("*.py")} | set(ROOMS.values())
    for folder in sorted(folders):
        room = Path(folder.name) if folder in ROOMS.values() else folder.relative_to(source)
        for name in sorted(modules(folder)):
            if not [*(TESTS / room).glob(f"test_{name}.py"), *(TESTS / room).glob(f"test_{name}_*.py")]:
                alone.append((room / name).as_posix())
    assert sorted(set(alone) - set(ELSEWHERE)) == [], "give it a test file, or say in ELSEWHERE which one tests it"
    assert sorted(set(ELSEWHERE) - set(alone)) == [], "it has a test file of its own by now, or is gone"
    assert all((TESTS / test).is_file() for test in ELSEWHERE.values())
