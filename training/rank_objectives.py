"""Optional study: which objective of a search foretells the quality after tuning? Nothing else in a run reads its
results.

    edgedit train rank --config training/recipes/digits.yaml

Genotypes in groups of similar latency, of each group that of the least and that of the greatest summed proxy loss and
others at random, are judged by every objective as they are assembled, tuned for an equal, short budget, and judged
again. Rank correlations say which objective, known before the tuning, orders them as they are after it. Needs teacher,
bank and latency table. Killed at any point, it continues. Writes <output_dir>/ranking: ranking.json, table.md,
plot.png, and a folder a genotype.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

from functools import partial

from accelerate import Accelerator

from edgedit_hf.data.loading import load_run_images, load_training_set
from edgedit_hf.distill.denoiser import train_denoiser
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.distill.teacher import check_fits_data, load_teacher
from edgedit_hf.estimate import print_estimate
from edgedit_hf.files import atomic_write_json, atomic_write_text
from edgedit_hf.metrics.reference import load_extractor
from edgedit_hf.preflight import preflight
from edgedit_hf.report.plots import ranking_plot
from edgedit_hf.report.ranking import ranking_table
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.stage import RANK
from edgedit_hf.run.state import STAGE_LABEL, RunState, on_main
from edgedit_hf.search.device_tables import load_table
from edgedit_hf.search.judging import ASSEMBLED, TUNED, EarlyLook, NetworkJudge, objectives_of, quality_of
from edgedit_hf.search.objectives import network_losses, student_quality, summed_proxy_loss
from edgedit_hf.search.ranking import choose_genotypes, rank_correlations
from edgedit_hf.search_space import model_cost


def run(config: RunConfig, accelerator: Accelerator) -> None:
    options, search, device = config.rank, config.search, accelerator.device
    dataset, vae = load_training_set(config, accelerator)
    pipeline = load_teacher(config).to(device)
    teacher = pipeline.transformer
    check_fits_data(teacher.config, dataset)
    bank = ProxyBank(config.folder("bank"), teacher)
    table = load_table(config.folder("latency", "table.json"))
    table.check_config(teacher.config)
    images = load_run_images(config)
    with accelerator.main_process_first():  # one process trains it
        extractor = load_extractor(config, images, device)
    state = RunState(
        config,
        RANK,
        options.genotypes,
        inputs={"data": images.fingerprint, "extractor": extractor.hash},
        accelerator=accelerator,
        unit="genotype",
    )
    if state.finished:
        return
    proxy_loss = partial(summed_proxy_loss, bank)
    chosen = choose_genotypes(bank.space, proxy_loss, table.latency_ms, options.genotypes, options.groups, config.seed)
    quality = student_quality(config, bank, pipeline, images, extractor, accelerator)
    losses = network_losses(config, teacher, vae, options.held_out, options.buckets, accelerator)
    judge, early = NetworkJudge(quality, losses), max(1, round(options.early * options.steps))
    rows = []
    for number, (genotype, group, kind) in enumerate(chosen, 1):
        label = STAGE_LABEL.set(f"[{number}/{len(chosen)}] ")
        cost = model_cost({**teacher.config, "layers": genotype.to_layers()})
        latency, loss = table.latency_ms(genotype), proxy_loss(genotype)
        tuning = RunState(
            config,
            RANK,
            options.steps,
            folder=f"ranking/{number:02d}-{genotype.hash}",
            seed=config.seed + 1,  # other batches and noise than the teacher saw
            inputs=state.inputs,
            also={"genotype": genotype.to_layers()},
            accelerator=accelerator,
            checkpoint_every=options.checkpoint_every,
            log_every=options.log_every,
        )
        if not tuning.finished:
            student = bank.assemble(genotype)
            on_main(partial(judge.write, tuning.folder / ASSEMBLED, student, also={"proxy_loss": loss}), accelerator)
            student = train_denoiser(
                student,
                dataset,
                options,
                tuning,
                accelerator,
                teacher if options.output_kd else None,
                options.output_kd,
                EarlyLook(judge, tuning, early),
                config.data.num_workers,
            )
            on_main(partial(judge.write, tuning.folder / TUNED, student, options.samples), accelerator)
            tuning.finish()
        STAGE_LABEL.reset(label)
        state.continue_at(number)
        if accelerator.is_main_process:
            rows.append(
                {
                    "code": list(bank.space.code(genotype)),
                    "hash": genotype.hash,
                    "group": group,
                    "kind": kind,
                    "parameters": cost.parameters,
                    "latency_ms": latency,
                    "objectives": objectives_of(tuning.folder, cost.parameters, latency),
                    "quality": quality_of(tuning.folder),
                }
            )
            tuned = {name: value for name, (value, _) in rows[-1]["quality"].items()}
            state.write_telemetry({"genotype": genotype.hash, "latency_ms": latency, **tuned})
    if accelerator.is_main_process:
        objectives = {name: [row["objectives"][name] for row in rows] for name in rows[0]["objectives"]}
        latencies, groups = [row["latency_ms"] for row in rows], [row["group"] for row in rows]
        ranking = {
            "seed": config.seed,
            "steps": options.steps,
            "batch_size": options.batch_size,
            "early_steps": early,
            "samples": options.samples,
            "search_samples": search.samples,
            "sampling_steps": search.sampling_steps,
            "guidance_scale": search.guidance_scale,
            "held_out": options.held_out,
            "edges": losses.edges,
            "extractor": extractor.name,
            "genotypes": rows,
            "correlations": {
                name: rank_correlations(
                    objectives, [row["quality"][name][0] for row in rows], latencies, groups, config.seed
                )
                for name in rows[0]["quality"]
            },
        }
        atomic_write_json(state.folder / "ranking.json", ranking)
        atomic_write_text(state.folder / "table.md", ranking_table(ranking))
        ranking_plot(state.folder / "plot.png", ranking)
        print((state.folder / "table.md").read_text(encoding="utf-8"))
    state.finish(genotypes=len(chosen))


if __name__ == "__main__":
    recipe_main(run, __doc__, dry_run=print_estimate, check=partial(preflight, stages=(RANK,)))
