"""What the Hub's `validate-yaml` says of the metadata of a card, as far as it is documented: its errors refuse a
commit, its warnings do not.

The licences are the ones that the Hub itself lists in its refusal (July 2026), the tasks those of huggingface.js.
"""

import re

import yaml

LICENSES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other""".split()
RELATIONS = ("adapter", "merge", "quantized", "finetune")
TASKS = """biology text-classification token-classification table-question-answering question-answering
zero-shot-classification translation summarization feature-extraction text-generation text2text-generation fill-mask
sentence-similarity text-to-speech text-to-audio automatic-speech-recognition audio-to-audio audio-classification
audio-text-to-text voice-activity-detection depth-estimation image-classification object-detection image-segmentation
text-to-image image-to-text image-to-image image-to-video unconditional-image-generation video-classification
reinforcement-learning robotics tabular-classification tabular-regression text-ranking time-series-forecasting
text-to-video image-text-to-text visual-question-answering document-question-answering
zero-shot-image-classification graph-ml mask-generation zero-shot-object-detection text-to-3d image-to-3d
image-feature-extraction video-text-to-text keypoint-detection visual-document-retrieval any-to-any other""".split()
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HEADER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


def metadata(card: str) -> dict | None:
    """The YAML block at the head of a card; None where there is none. ValueError where it is not a mapping."""
    found = HEADER.match(card.removeprefix("\ufeff"))
    if found is None:
        return None
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise ValueError(f"Invalid YAML: {error}") from error
    if data is not None and not isinstance(data, dict):
        raise ValueError("Metadata should be an object")
    return data


def check(card: str, kind: str = "model") -> tuple[list[str], list[str]]:
    """The errors and the warnings of a card."""
    try:
        data = metadata(card)
    except ValueError as error:
        return [str(error)], []
    if not data:
        link = f"https://huggingface.co/docs/hub/{kind}s-cards#model-card-metadata"
        return [], [f"empty or missing yaml metadata in repo card ({link})"]
    errors, warnings = [], []
    licenses = data.get("license", [])
    for value in licenses if isinstance(licenses, list) else [licenses]:
        if value not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(LICENSES)}, array]')
    name = data.get("license_name")
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"[a-z0-9.-]+", name)):
        errors.append(f'"license_name" with value "{name}" fails to match the required pattern: /^[a-z0-9-.]+$/')
    if data.get("license") == "other" and name is None:
        warnings.append('"license_name" is recommended with license: other')
    bases = data.get("base_model", [])
    for value in bases if isinstance(bases, list) else [bases]:
        if not (isinstance(value, str) and MODEL_ID.fullmatch(value)):
            errors.append(f'"base_model" with value "{value}" is not valid. Use a model id from https://hf.co/models.')
    if data.get("base_model_relation", "quantized") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    for key in ("pipeline_tag", "library_name", "thumbnail"):
        if not isinstance(data.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    task = data.get("pipeline_tag", "other")
    if isinstance(task, str) and task not in TASKS:
        warnings.append(f'The pipeline tag "{task}" is not in the official list: {", ".join(TASKS)}')
    for key in ("tags", "datasets", "language", "metrics"):
        values = data.get(key, [])
        listed = values if isinstance(values, list) else [values]
        if key == "tags" and not isinstance(values, list):
            errors.append('"tags" must be an array')
        errors += [f'"{key}[{i}]" must be a string' for i, value in enumerate(listed) if not isinstance(value, str)]
    errors += _widget(data.get("widget", [])) + _model_index(data.get("model-index", []))
    return errors, warnings


def _widget(examples) -> list[str]:
    if not isinstance(examples, list):
        return ['"widget" must be an array']
    return [f'"widget[{i}]" must be of type object' for i, example in enumerate(examples) if type(example) is not dict]


def _model_index(index) -> list[str]:
    """`model-index`: a list of models with a name and results; a result has a task, a dataset and metrics."""
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []

    def need(there, place: str, *keys: str) -> bool:
        if not isinstance(there, dict):
            errors.append(f'"{place}" must be of type object')
            return False
        errors.extend(f'"{place}.{key}" is required' for key in keys if there.get(key) is None)
        return True

    for m, model in enumerate(index):
        place = f"model-index[{m}]"
        if not need(model, place, "name", "results"):
            continue
        for r, result in enumerate(model.get("results") or []):
            where = f"{place}.results[{r}]"
            if not need(result, where, "task", "dataset", "metrics"):
                continue
            need(result.get("task") or {}, f"{where}.task", "type")
            need(result.get("dataset") or {}, f"{where}.dataset", "type", "name")
            for i, metric in enumerate(result.get("metrics") or []):
                need(metric, f"{where}.metrics[{i}]", "type", "value")
    return errors
