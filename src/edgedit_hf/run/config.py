"""The one YAML that every stage reads: its schema, defaults, comments, overrides and checks. No torch.

A run is described by one file with a section a stage. Each recipe in training/ reads the same file and uses its own
section, so `train_teacher.py` and `compress.py` never disagree. Unknown keys and values of a wrong type are errors.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..export.formats import MEASURED
from ..menu_space import MenuSpace
from ..schema import fill, key, shorten
from .sections import (
    LICENSE,
    REPO_ID,
    SEED,
    THREADS,
    BankConfig,
    CardConfig,
    DataConfig,
    ElasticConfig,
    EvaluateConfig,
    ExportConfig,
    FewStepConfig,
    HubConfig,
    KnowledgeConfig,
    LatencyConfig,
    QuantizeConfig,
    RankConfig,
    SamplingConfig,
    SearchConfig,
    SensitivityConfig,
    StudentConfig,
    TeacherConfig,
    TextConfig,
    TuneConfig,
)


@dataclass
class RunConfig:
    """A whole run."""

    output_dir: str = key("runs/edgedit", "folder of the run; every stage has a folder in it", path=True)
    seed: int = key(0, "seed of everything", minimum=0, maximum=SEED)
    threads: int = key(
        2, "threads of PyTorch on the CPU, a process; 0 leaves PyTorch's choice", minimum=0, maximum=THREADS
    )
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    card: CardConfig = field(default_factory=CardConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    text: TextConfig = field(default_factory=TextConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    knowledge: KnowledgeConfig = field(default_factory=KnowledgeConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    few_step: FewStepConfig = field(default_factory=FewStepConfig)

    def section(self, *names: str) -> dict[str, Any]:
        """Plain values of some sections, e.g. for a stage's `run.json`."""
        return {name: dataclasses.asdict(getattr(self, name)) for name in names}

    def folder(self, *names: str) -> Path:
        """A path inside the run's folder."""
        return Path(self.output_dir, *names)


# -------------------------------------------------------------------- reading


RENAMED = {"evaluate.sampling_steps": "sampling.steps", "evaluate.guidance_scale": "sampling.guidance_scale"}
"""Keys of earlier versions, and what they are called now."""

RECIPE_BYTES = 2**18  # a recipe with every key and its comment has 15,000
NODES, DEPTH = 10_000, 20  # of a recipe, once its aliases are written out


@functools.cache
def _loader() -> type:
    """PyYAML's safe loader without surprises: bounded, no key twice, and dates stay the text that they are."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.depth = 0
            self.sizes: dict[int, int] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            # An alias is counted with all that it stands for: ten of ten of ten … are few bytes, but fill the memory
            # when they are read.
            event, mark = self.peek_event(), self.peek_event().start_mark
            self.depth += 1
            node = super().compose_node(parent, index) if self.depth <= DEPTH else None
            self.depth -= 1
            if node is None:
                raise yaml.MarkedYAMLError(f"it is nested more than {DEPTH} deep", problem_mark=mark)
            if id(node) not in self.sizes:
                if isinstance(event, yaml.AliasEvent):
                    raise yaml.MarkedYAMLError("it holds itself", problem_mark=mark)
                parts = node.value if isinstance(node, yaml.CollectionNode) else ()
                parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
                self.sizes[id(node)] = 1 + sum(self.sizes[id(part)] for part in parts)
            if self.sizes[id(node)] > NODES:
                raise yaml.MarkedYAMLError(f"it holds more than {NODES} values, aliases written out", problem_mark=mark)
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            seen: set[Any] = set()
            for name, _ in node.value:
                if isinstance(name, yaml.ScalarNode) and name.value != "<<":
                    if name.value in seen:
                        raise yaml.MarkedYAMLError(
                            f"the key {shorten(name.value)} stands there twice", problem_mark=name.start_mark
                        )
                    seen.add(name.value)
            return super().construct_mapping(node, deep)

    return Loader


def _parse(text: str) -> Any:
    """The plain values of YAML; whatever is wrong with it is a `ValueError` of one line."""
    import yaml

    if len(text) > RECIPE_BYTES:
        raise ValueError(f"it has {len(text)} characters, more than {RECIPE_BYTES}")
    loader = None
    try:
        loader = _loader()(text)
        return loader.get_single_data()
    except RecursionError:
        raise ValueError(f"it is nested more than {DEPTH} deep") from None
    except Exception as error:  # a constructor lets through whatever int() and its like raise
        said = (
            " ".join(str(error).split())
            if isinstance(error, yaml.YAMLError)
            else f"a value in it cannot be read: {error}"
        )
        raise ValueError(said[:500]) from None
    finally:
        if loader is not None:
            loader.dispose()


def _read_recipe(path: Path) -> Any:
    remedy = "`edgedit recipes copy DIR` gives the shipped ones"
    try:
        if not path.is_file() and not path.is_dir() and path.exists() and not str(path).startswith("/dev/fd/"):
            raise EdgeDiTError(f"The recipe {path} is no file; {remedy}.")
        with open(path, "rb") as file:
            content = file.read(RECIPE_BYTES + 1)
    except OSError as error:
        raise EdgeDiTError(
            f"The recipe {shorten(str(path))[1:-1]} cannot be read ({error.strerror}); {remedy}."
        ) from None
    except ValueError as error:
        raise EdgeDiTError(f"The recipe {shorten(str(path))} cannot be read ({error}); {remedy}.") from None
    if len(content) > RECIPE_BYTES:
        raise EdgeDiTError(f"The recipe {path} has more than {RECIPE_BYTES} bytes; {remedy}.")
    try:
        return _parse(content.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise EdgeDiTError(f"The recipe {path} is not YAML: {error}") from None


def refuse_renamed(values: Any, source: str, remedy: str = "Rename it.") -> None:
    """Raise if nested values, of a recipe or of a run's record, hold a key that is called something else now."""
    for old, new in RENAMED.items():
        section, _, entry = old.partition(".")
        if isinstance(values, dict) and isinstance(values.get(section), dict) and entry in values[section]:
            raise EdgeDiTError(f"{source}: the key {old} is called {new} now. {remedy}")


def _set(config: RunConfig, values: Any, source: str) -> None:
    refuse_renamed(values, source)
    fill(config, values, source)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply `section.key=value` overrides (values are YAML).

    Raises:
        EdgeDiTError: the file is missing or not YAML; a key is unknown (the nearest is named) or its value does not
            fit.
    """
    path = Path(path)
    values = _read_recipe(path)
    config = RunConfig()
    _set(config, {} if values is None else values, str(path))
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise EdgeDiTError(
                f"--override {shorten(text)} has no '='; write section.key=value, e.g. teacher.steps=100."
            )
        try:
            nested: Any = _parse(value)
        except ValueError as error:
            raise EdgeDiTError(f"--override {shorten(text)}: the value is not YAML: {error}") from None
        for part in reversed(name.strip().split(".")):
            nested = {part: nested}
        _set(config, nested, "--override")
    _check(config, str(path))
    return config


def _check(config: RunConfig, source: str) -> None:
    teacher, search = config.teacher, config.search
    if teacher.hidden_size % teacher.num_heads:
        raise EdgeDiTError(
            f"{source}: teacher.hidden_size {teacher.hidden_size} is not a multiple of teacher.num_heads "
            f"{teacher.num_heads}; change one."
        )
    if teacher.hidden_size % 4:
        raise EdgeDiTError(
            f"{source}: teacher.hidden_size {teacher.hidden_size} is not a multiple of 4, as its position embedding "
            "needs."
        )
    if teacher.learn_sigma and teacher.prediction_type != "epsilon":
        raise EdgeDiTError(
            f"{source}: teacher.learn_sigma needs teacher.prediction_type epsilon, not {teacher.prediction_type}: "
            "flow matching has no variance to learn."
        )
    if config.data.buckets is not None and config.data.resolution is not None:
        raise EdgeDiTError(
            f"{source}: data.buckets and data.resolution {config.data.resolution} exclude each other; set one to null."
        )
    if config.text.hidden_size % config.text.num_heads:
        raise EdgeDiTError(
            f"{source}: text.hidden_size {config.text.hidden_size} is not a multiple of text.num_heads "
            f"{config.text.num_heads}; change one."
        )
    for text in config.elastic.subnets or ():
        name, _, width = text.partition("=")
        try:  # the name becomes one of files
            usable = re.fullmatch(r"\w[\w.-]{0,63}", name.strip()) and name.strip() != "full" and 0 < float(width) < 1
        except ValueError:
            usable = False
        if not usable:
            raise EdgeDiTError(
                f"{source}: elastic.subnets holds {shorten(text)}; it may hold name=width with a width between 0 and "
                "1, e.g. small=0.5 (names of letters, digits, '_', '-' and '.')."
            )
    if config.elastic.subnets is not None and len(config.elastic.widths() or ()) != len(config.elastic.subnets) + 1:
        raise EdgeDiTError(
            f"{source}: elastic.subnets {config.elastic.subnets} holds a name twice; give every sub-network its own."
        )
    if search.initial > search.evaluations:
        raise EdgeDiTError(
            f"{source}: search.initial {search.initial} exceeds search.evaluations {search.evaluations}."
        )
    for name in ("max_latency_ratio", "max_parameters_ratio", "max_memory_mb"):
        if search.mode != "joint" and (cap := getattr(search, name)) is not None:
            raise EdgeDiTError(
                f"{source}: search.{name} is {cap}, but search.mode is {search.mode}; only joint keeps a search below "
                f"it. Set it to null, and bound what is chosen with student.{name}."
            )
    if config.rank.genotypes < 2 * config.rank.groups:
        raise EdgeDiTError(
            f"{source}: rank.genotypes {config.rank.genotypes} leaves some of rank.groups {config.rank.groups} fewer "
            f"than two; take at least {2 * config.rank.groups}, or fewer groups."
        )
    latency = config.latency
    several = latency.table if isinstance(latency.table, list) else []
    if latency.weights is not None and len(latency.weights) != len(several):
        raise EdgeDiTError(
            f"{source}: latency.weights holds {len(latency.weights)} numbers, latency.table {len(several)} tables; "
            "give a weight for each of several tables, or null."
        )
    measured = MEASURED[latency.runtime].measured
    if latency.precision not in measured:
        runtimes = " or ".join(name for name, target in MEASURED.items() if latency.precision in target.measured)
        raise EdgeDiTError(
            f"{source}: latency.precision {latency.precision} needs latency.runtime {runtimes}; {latency.runtime} has "
            f"{' and '.join(measured)}."
        )
    bank = config.bank
    menu: Any = bank.menu
    if menu is not None and teacher.path is None:  # of a given teacher the search space says it
        try:
            MenuSpace(teacher.num_layers, teacher.hidden_size, teacher.num_heads, menu=menu)
        except EdgeDiTError as error:
            raise EdgeDiTError(f"{source}: section bank: {error}") from None
    elif teacher.path is None:
        if int(teacher.hidden_size * bank.reduced_mlp_ratio) < 1:
            raise EdgeDiTError(
                f"{source}: bank.reduced_mlp_ratio {bank.reduced_mlp_ratio} leaves an MLP of teacher.hidden_size "
                f"{teacher.hidden_size} no neuron; it must be at least {1 / teacher.hidden_size:.3g}."
            )
        if bank.reduced_attention_dim is not None and bank.reduced_attention_dim % teacher.num_heads:
            raise EdgeDiTError(
                f"{source}: bank.reduced_attention_dim {bank.reduced_attention_dim} is not a multiple of "
                f"teacher.num_heads {teacher.num_heads}; change one."
            )
    for name in ("card.repo_id", "hub.push_to", "hub.base_model"):
        given = operator.attrgetter(name)(config)
        if given is not None and not re.fullmatch(REPO_ID, given):
            raise EdgeDiTError(
                f"{source}: {name} is {shorten(given)}; it must be organisation/name, of letters, digits, '-', '_' and "
                "'.'."
            )
    if not re.fullmatch(LICENSE, config.card.license):
        raise EdgeDiTError(
            f"{source}: card.license is {shorten(config.card.license)}; it must be an identifier of the Hub such as "
            "apache-2.0."
        )
    for names, why in _unread(config):
        for name, value in _changed(config, names):
            raise EdgeDiTError(f"{source}: {name} is {shorten(value)}, but {why}, so nothing reads it; leave it out.")


def _unread(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys that a neighbour of theirs makes meaningless, and why."""
    if config.data.source == "digits":
        names = ("data.split", "data.image_column", "data.caption_column")
        yield names, "data.source is 'digits', which has one split and no columns (folders and `datasets` ids do)"
        yield ("data.background",), "data.source is 'digits', which has no transparent images"
        if config.data.label_column != "":
            yield ("data.label_column",), "data.source is 'digits', whose labels are no column ('' ignores them)"
    if config.knowledge.teacher is None:
        yield ("knowledge",), "knowledge.teacher is null"
    if config.elastic.balance == "none":
        yield ("elastic.balance_limit",), "elastic.balance is 'none' (gradient_norm has a limit)"
    if config.quantize.scheme == "palette":
        yield ("quantize.group_size",), "quantize.scheme is 'palette' (groups are those of affine)"
    else:
        yield ("quantize.rows_per_palette",), "quantize.scheme is 'affine' (palettes are those of palette)"


def unused(config: RunConfig) -> list[str]:
    """What a recipe sets for stages that its own choice replaces, a sentence a choice. Recipes keep such values for the
    next run.
    """
    found = []
    training = tuple(f"teacher.{entry.name}" for entry in dataclasses.fields(TeacherConfig) if entry.name != "path")
    text = tuple(
        f"text.{entry.name}" for entry in dataclasses.fields(TextConfig) if not entry.name.startswith("encoder")
    )
    for chosen, names in (
        ("teacher.path", training if config.teacher.path is not None else ()),
        (
            "student.genotype",
            ("search", *("student.max_" + name for name in STUDENT_BOUNDS))
            if config.student.genotype is not None
            else (),
        ),
        (
            "bank.menu",
            ("bank.reduced_mlp_ratio", "bank.reduced_attention_dim", "bank.both_steps")
            if config.bank.menu is not None
            else (),
        ),
        (
            "latency.table",
            tuple(f"latency.{name}" for name in ("runtime", "precision", "repeats"))
            if config.latency.table is not None
            else (),
        ),
        ("text.encoder and text.encoder_2", text if None not in (config.text.encoder, config.text.encoder_2) else ()),
        (
            "evaluate.extractor inception",
            ("evaluate.extractor_steps",) if config.evaluate.extractor == "inception" else (),
        ),
    ):
        if ignored := [name for name, _ in _changed(config, names)]:
            found.append(f"{chosen} makes {', '.join(ignored)} of no use")
    return found


STUDENT_BOUNDS = ("latency_ms", "latency_ratio", "parameters_ratio", "flops_ratio", "bytes_mb", "memory_mb")


def _changed(config: RunConfig, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Names and values of those keys (or all of those sections) that differ from their defaults."""
    for name in names:
        section, _, entry = name.partition(".")
        values, defaults = getattr(config, section), getattr(RunConfig(), section)
        for found in [entry] if entry else [entry.name for entry in dataclasses.fields(values)]:
            if getattr(values, found) != getattr(defaults, found):
                yield f"{section}.{found}", getattr(values, found)


# -------------------------------------------------------------------- writing


def commented_yaml(overrides: Sequence[str] = ()) -> str:
    """A recipe with every key, its default (or the given `section.key=value`) and a comment saying what it does."""
    import yaml

    config = RunConfig()
    for text in overrides:
        name, _, value = text.partition("=")
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        _set(config, nested, shorten(text)[1:-1])

    def plain(value: Any) -> str:
        return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")

    lines: list[str] = []
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if not dataclasses.is_dataclass(value):
            lines.append(f"{entry.name}: {plain(value)}  # {entry.metadata['doc']}")
            continue
        lines += ["", f"{entry.name}:  # {' '.join((type(value).__doc__ or '').split())}"]
        for setting in dataclasses.fields(value):
            lines.append(f"  {setting.name}: {plain(getattr(value, setting.name))}  # {setting.metadata['doc']}")
    return "\n".join(lines) + "\n"
