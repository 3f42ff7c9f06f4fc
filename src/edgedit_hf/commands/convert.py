"""`edgedit convert`: a foreign DiT, SiT or MDT checkpoint as an EdgeDiT pipeline folder."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the `edgedit` parser."""
    parser = subparsers.add_parser(
        "convert", help="make a pipeline folder of a DiT, SiT or MDT checkpoint, or of a diffusers DiT"
    )
    parser.add_argument(
        "source",
        metavar="IN",
        help="weights file (.pt, .safetensors, …) of DiT, SiT or MDT; a diffusers DiT folder or Hub id",
    )
    parser.add_argument("output", metavar="OUT", help="pipeline folder to write")
    parser.add_argument(
        "--family", choices=("dit", "sit", "mdt"), help="what a weights file is, if its name does not say"
    )
    parser.add_argument("--teacher-lora", metavar="PATH", help="LoRA adapter that is fused first")
    parser.add_argument("--vae", metavar="PATH_OR_ID", help="AutoencoderKL or AutoencoderTiny that decodes its latents")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="the resolution you expect, e.g. 256 or 512")
    parser.add_argument(
        "--allow-resize",
        action="store_true",
        help="make the model run at --image-size though it learned another resolution",
    )
    parser.add_argument("--num-classes", type=int, metavar="N", help="the number of classes you expect")
    parser.add_argument(
        "--heads", type=int, metavar="N", help="attention heads, for widths that the papers do not have"
    )
    parser.add_argument("--decoder-layers", type=int, metavar="N", help="decoder layers of a first-version MDT")
    parser.add_argument(
        "--numerics",
        choices=("original", "diffusers"),
        default="original",
        help="compute what the training code computes (default), or exactly what diffusers' DiT class computes",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="variant of a diffusers folder's weights, e.g. fp16; default: the plain ones, or the only variant",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an older pipeline folder at OUT")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Convert, write, and say what it is."""
    from ..errors import EdgeDiTError
    from ..files import atomic_folder
    from ..run.outputs import check_output
    from ..schema import Rule, check_option

    check_option("image-size", args.image_size, Rule(minimum=8, maximum=4096))
    check_option("num-classes", args.num_classes, Rule(minimum=0, maximum=1_000_000))
    check_option("heads", args.heads, Rule(minimum=1, maximum=1024))
    check_option("decoder-layers", args.decoder_layers, Rule(minimum=1, maximum=1024))
    factor = 8  # of the autoencoders that these models were trained with
    check_output(args.output, [args.source, args.teacher_lora, args.vae], overwrite=args.overwrite)
    if args.image_size is not None and args.image_size % factor:
        raise EdgeDiTError(
            f"--image-size is {args.image_size}; it must be a multiple of {factor}, the VAE's downsampling factor."
        )
    from ..pipelines.loading import load_original_pipeline
    from ..search_space import model_cost

    pipeline = load_original_pipeline(
        args.source,
        vae=args.vae,
        family=args.family,
        lora=args.teacher_lora,
        sample_size=None if args.image_size is None else args.image_size // factor,
        allow_resize=args.allow_resize,
        num_classes=args.num_classes,
        num_attention_heads=args.heads,
        decoder_layers=args.decoder_layers,
        numerics=args.numerics,
        variant=args.variant,
    )
    with atomic_folder(args.output) as folder:
        pipeline.save_pretrained(folder)
    config = pipeline.transformer.config
    cost = model_cost(config)
    print(
        f"{args.output}: {config.num_layers} layers of width {config.hidden_size}, {cost.parameters / 1e6:,.2f} M "
        f"parameters, {cost.flops / 1e9:,.2f} GFLOPs, {config.num_classes} classes, sample size {config.sample_size}, "
        f"{config.prediction_type}, {type(pipeline.scheduler).__name__}, "
        f"{'no VAE' if pipeline.vae is None else type(pipeline.vae).__name__}"
    )
