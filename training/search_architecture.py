"""Stage 4: search the front of Fréchet distance against latency by multi-objective Bayesian optimisation (GP
surrogates, qLogEHVI).

    edgedit train search --config training/recipes/digits.yaml

A genotype is judged by images of the student that the bank assembles for it, not yet tuned, and by the latency table.
Random search spends the same budget for comparison. All state is JSON, written after every evaluation: killed at any
point, it continues. Writes <output_dir>/search: state.json, random.json, front.json.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

from functools import partial

from accelerate import Accelerator

from edgedit_hf.data.loading import load_run_images
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.distill.teacher import load_teacher
from edgedit_hf.estimate import print_estimate
from edgedit_hf.files import atomic_write_json
from edgedit_hf.genotype import Genotype
from edgedit_hf.metrics.reference import load_extractor, real_features
from edgedit_hf.preflight import preflight
from edgedit_hf.records import SearchState
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.stage import SEARCH
from edgedit_hf.run.state import RunState
from edgedit_hf.schema import read_record
from edgedit_hf.search.ask_tell import AskTellSearch, RandomSearch, summary
from edgedit_hf.search.bayes import BayesSearch
from edgedit_hf.search.latency_table import LatencyTable
from edgedit_hf.search.objectives import StudentQuality
from edgedit_hf.search_space import SearchSpace, model_cost


def run(config: RunConfig, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    options = config.search
    pipeline = load_teacher(config).to(accelerator.device)
    teacher_config = dict(pipeline.transformer.config)
    bank = ProxyBank(config.folder("bank"), pipeline.transformer)
    table = LatencyTable.from_json(config.folder("latency", "table.json"))
    table.check_config(teacher_config)
    images = load_run_images(config)
    extractor = load_extractor(config, images, accelerator.device)
    state = RunState(
        config,
        SEARCH,
        total_steps=options.evaluations + (options.evaluations - options.initial if options.random_baseline else 0),
        inputs={"data": images.fingerprint, "extractor": extractor.hash},
        log_every=1,
        unit="genotype",
    )
    if state.finished:
        return
    quality = StudentQuality(
        bank,
        pipeline,
        extractor,
        real_features(extractor, images),
        samples=options.samples,
        steps=options.sampling_steps,
        guidance_scale=options.guidance_scale,
        seed=config.seed,
        batch_size=min(options.samples, config.evaluate.batch_size),
        autocast=accelerator.autocast,
    )

    def evaluate(genotype: Genotype) -> tuple[tuple[float, float], dict]:
        cost = model_cost({**teacher_config, "layers": genotype.to_layers()})
        return (quality(genotype), table.latency_ms(genotype)), {"parameters": cost.parameters, "flops": cost.flops}

    names = ("merge.json", "state.json", "random.json")
    told = {
        name: len(read_record(state.folder / name, SearchState, "this stage")["told"])
        if (state.folder / name).exists()
        else 0
        for name in names
    }
    state.continue_at(told["merge.json"] + told["state.json"] + max(0, told["random.json"] - options.initial))
    progress = state.steps()

    def evaluate_all(search: AskTellSearch, name: str) -> AskTellSearch:
        """Spend a search's budget, continuing what its file holds."""
        search = search.resume(state.folder / name)
        while not search.finished:
            for genotype in search.pending or search.ask(options.batch):
                next(progress)
                objectives, extra = evaluate(genotype)
                search.tell(genotype, objectives, extra)
                search.save(state.folder / name)
                volume = {} if search.reference is None else {"hypervolume": search.hypervolume()}
                state.log(distance=objectives[0], latency_ms=objectives[1], **volume)
        return search

    def bayes(space: SearchSpace, evaluations: int, name: str, reference=None) -> AskTellSearch:
        initial = min(options.initial, evaluations)
        return evaluate_all(
            BayesSearch(space, evaluations, config.seed, initial, reference, acquisition=options.acquisition), name
        )

    if options.mode == "joint":
        found = bayes(bank.space, options.evaluations, "state.json")
    else:
        # The paper: first which pairs merge, then, around the knee point of that front, the option of every layer.
        merges = bayes(bank.space.stage("merge"), options.evaluations // 2, "merge.json")
        around = bank.space.stage("options", choose_merges(merges))
        refined = bayes(around, options.evaluations - len(merges.told), "state.json", merges.reference)
        found = joined(bank.space, [merges, refined], config.seed)
    random = evaluate_all(RandomSearch.sharing_initial(found), "random.json") if options.random_baseline else None
    next(progress, None)  # shows and writes the last evaluation
    progress.close()
    whole = Genotype.of(teacher_config)
    cost = model_cost(teacher_config)
    teacher = {
        "path": config.teacher.path,
        "latency_ms": table.latency_ms(whole),
        "parameters": cost.parameters,
        "flops": cost.flops,
    }
    atomic_write_json(state.folder / "front.json", {**summary(found, random), "teacher": teacher})
    state.finish()


def choose_merges(search: AskTellSearch) -> Genotype:
    """The genotype of the merge stage's knee point."""
    from edgedit_hf.search.pareto import knee_point

    front = search.front()
    return search.space.from_code(front[knee_point([(e["distance"], e["latency_ms"]) for e in front])]["code"])


def joined(space: SearchSpace, searches: list[AskTellSearch], seed: int) -> AskTellSearch:
    """Both stages' evaluations as one search over the joint space, for the front and the trace."""
    told = {tuple(point["code"]): point for search in searches for point in search.told}
    whole = RandomSearch(space, len(told), seed, searches[0].num_initial, searches[0].reference)
    for code, point in told.items():
        extra = {k: v for k, v in point.items() if k not in ("code", "distance", "latency_ms")}
        whole.tell(space.from_code(code), (point["distance"], point["latency_ms"]), extra)
    return whole


if __name__ == "__main__":
    recipe_main(run, __doc__, dry_run=print_estimate, check=partial(preflight, stages=(SEARCH,)))
