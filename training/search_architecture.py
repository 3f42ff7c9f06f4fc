"""Stage 4: search the front of Fréchet distance against latency by multi-objective Bayesian optimisation (GP
surrogates, qLogEHVI).

    edgedit train search --config training/recipes/digits.yaml

A genotype is judged by images of the student that the bank assembles for it, not yet tuned, and by the latency table.
search.mode exact judges what the integer programme over the bank's losses and that table names. Random search spends
the same budget for comparison. All state is JSON, written after every evaluation: killed at any point, it continues.
Writes <output_dir>/search: state.json, random.json, front.json.
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
from edgedit_hf.metrics.reference import load_extractor
from edgedit_hf.preflight import preflight
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.stage import SEARCH
from edgedit_hf.run.state import RunState
from edgedit_hf.search.ask_tell import summary
from edgedit_hf.search.blocks import programme_of
from edgedit_hf.search.campaign import Campaign, check_possible, most_evaluations
from edgedit_hf.search.device_tables import load_table
from edgedit_hf.search.objectives import search_objective
from edgedit_hf.search_space import model_cost, peak_live_values


def run(config: RunConfig, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    options = config.search
    pipeline = load_teacher(config).to(accelerator.device)
    teacher_config = dict(pipeline.transformer.config)
    bank = ProxyBank(config.folder("bank"), pipeline.transformer)
    table = load_table(config.folder("latency", "table.json"))
    table.check_config(teacher_config)
    cost = model_cost(teacher_config)
    teacher = {
        "path": config.teacher.path,
        "latency_ms": table.latency_ms(Genotype.of(teacher_config)),
        "parameters": cost.parameters,
        "flops": cost.flops,
    }
    shares = {"latency_ms": options.max_latency_ratio, "parameters": options.max_parameters_ratio}
    caps = {name: share * teacher[name] for name, share in shares.items() if share is not None}
    if options.max_memory_mb is not None:
        caps["memory"] = 1e6 * options.max_memory_mb
    programme = None if options.mode == "two-stage" else programme_of(bank, table)
    check_possible(options, bank.space, programme, caps)
    images = load_run_images(config)
    extractor = load_extractor(config, images, accelerator.device) if options.objective == "distance" else None
    state = RunState(
        config,
        SEARCH,
        most_evaluations(options),
        inputs={"data": images.fingerprint, "extractor": extractor and extractor.hash},
        log_every=1,
        unit="genotype",
    )
    if state.finished:
        return
    table.check_run(config.latency)
    quality = search_objective(config, bank, pipeline, images, extractor, accelerator)

    def judge(genotype: Genotype) -> tuple[float, float]:
        return quality.score(bank.assemble(genotype))

    campaign = Campaign(state.folder, bank.space, options, config.seed, programme, caps)
    state.continue_at(campaign.evaluated)
    for _ in state.steps():
        genotype = campaign.ask()
        if genotype is None:
            break  # the space holds fewer than the budget
        cost = model_cost({**teacher_config, "layers": genotype.to_layers()})
        costs = {"parameters": cost.parameters, "weights": cost.weights, "flops": cost.flops}
        costs["live_values"] = peak_live_values(teacher_config, genotype)
        state.log(**campaign.evaluate(genotype, judge, table.latency_ms(genotype), costs))
    atomic_write_json(state.folder / "front.json", {**summary(campaign.found, campaign.random), "teacher": teacher})
    state.finish()


if __name__ == "__main__":
    recipe_main(run, __doc__, dry_run=print_estimate, check=partial(preflight, stages=(SEARCH,)))
