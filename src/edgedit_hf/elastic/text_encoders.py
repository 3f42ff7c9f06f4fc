"""The two small text encoders of a run that brings none: tokenizers, what is trained, its losses, what was learned."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ..data.captions import CaptionedDataset
from ..data.digits import STYLES, TEMPLATES, style_words, write_caption
from ..diffusion import draws
from ..run.sections import TextConfig

IMAGE_SIDE = 32  # the image encoder looks at images of at most this size
T5_TOKENS = 128  # tokens of a caption that the T5-type encoder is trained on
JUDGED = 1000  # validation images that captions are retrieved for
MASK_STREAM, NOISE_STREAM = 2, 3  # of the random numbers that choose masked words, and of the noise on images
IMAGE_NOISE = 0.4  # its standard deviation: the image encoder, which is thrown away, must not learn the images by heart

# -------------------------------------------------------------------- tokenizers


def train_tokenizer(
    captions: Sequence[str], vocabulary_size: int, kind: str, max_length: int
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of lower-cased text: it knows every string, and has few tokens for what the captions
    say.

    Args:
        kind: "clip" (begin and end token around a prompt) or "t5" (end token after it, and a mask token).
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    # CLIPTextModel takes an end token with the number 2 for one of an old, wrong config.
    special = (
        ["<pad>", "<|startoftext|>", "<unk>", "<|endoftext|>"]
        if kind == "clip"
        else ["<pad>", "</s>", "<unk>", "<mask>"]
    )
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(captions)), trainer)
    around = "<|startoftext|> $A <|endoftext|>" if kind == "clip" else "$A </s>"
    ends = [token for token in special if token in around]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(token, special.index(token)) for token in ends]
    )
    names = (
        {"bos_token": special[1], "eos_token": special[3]}
        if kind == "clip"
        else {"eos_token": special[1], "mask_token": special[3]}
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        **names,
        model_max_length=max_length,
        padding_side="right",
    )


def tokenize(
    tokenizer: PreTrainedTokenizerFast, captions: Sequence[str], max_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers and attention mask, each `[N, T]` int64."""
    tokens = tokenizer(list(captions), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


# -------------------------------------------------------------------- what is trained


def new_text_encoders(
    options: TextConfig, captions: Sequence[str]
) -> tuple[CLIPTextModel | None, T5EncoderModel | None, dict[str, PreTrainedTokenizerFast]]:
    """The untrained encoders that the recipe names none for, and their tokenizers, "clip" and "t5", trained on the
    captions.
    """
    clip, t5, tokenizers = None, None, {}
    width, layers, heads = options.hidden_size, options.num_layers, options.num_heads
    if options.encoder is None:
        tokenizers["clip"] = train_tokenizer(captions, options.vocabulary_size, "clip", options.max_tokens)
        special = {
            f"{name}_token_id": getattr(tokenizers["clip"], f"{name}_token_id") for name in ("pad", "bos", "eos")
        }
        sizes = {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }
        positions = {
            "vocab_size": len(tokenizers["clip"]),
            "max_position_embeddings": options.max_tokens,
            "projection_dim": width,
        }
        clip = CLIPTextModel(CLIPTextConfig(**sizes, **positions, **special))
    if options.encoder_2 is None:
        tokenizers["t5"] = train_tokenizer(captions, options.vocabulary_size, "t5", T5_TOKENS)
        sizes = {"d_model": width, "d_kv": width // heads, "d_ff": 2 * width, "num_layers": layers, "num_heads": heads}
        kind = {
            "feed_forward_proj": "gated-silu",
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "eos_token_id": tokenizers["t5"].eos_token_id,
        }
        t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizers["t5"]), **sizes, **kind))
    return clip, t5, tokenizers


class ImageEncoder(nn.Module):
    """A few convolutions from `[B, C, H, W]` of any size to `[B, D]`; only the text encoder's training needs it."""

    def __init__(self, channels: int, side: int, width: int) -> None:
        super().__init__()
        self.side = 8
        while 2 * self.side <= min(side, IMAGE_SIDE):
            self.side *= 2
        layers: list[nn.Module] = [nn.Conv2d(channels, 32, 3, padding=1), nn.GELU()]
        inner, rest = 32, self.side
        while rest > 4:
            layers += [nn.Conv2d(inner, 64, 3, stride=2, padding=1), nn.GroupNorm(8, 64), nn.GELU()]
            inner, rest = 64, rest // 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, width))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[-2:] != (self.side, self.side):
            images = F.adaptive_avg_pool2d(images, self.side)
        return self.layers(images)


class Learners(nn.Module):
    """Both text encoders (or the one that is trained) and the heads that their training needs."""

    def __init__(self, clip: CLIPTextModel | None, t5: T5EncoderModel | None, channels: int, side: int) -> None:
        super().__init__()
        if clip is not None:
            width = clip.config.hidden_size
            self.clip, self.project, self.image = (
                clip,
                nn.Linear(width, width, bias=False),
                ImageEncoder(channels, side, width),
            )
        if t5 is not None:
            self.t5, self.guess = t5, nn.Linear(t5.config.d_model, t5.config.vocab_size)

    def embed_captions(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Unit vectors `[B, D]` of captions."""
        return F.normalize(self.project(self.clip(input_ids=ids, attention_mask=mask).pooler_output), dim=-1)

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors `[B, D]` of images."""
        return F.normalize(self.image(images), dim=-1)

    def guess_tokens(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits `[B, T, vocabulary]`."""
        return self.guess(self.t5(input_ids=ids, attention_mask=mask).last_hidden_state)

    def forward(
        self, images, clip_tokens, t5_tokens
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        pair = (
            (self.embed_captions(*clip_tokens), self.embed_images(images)) if clip_tokens is not None else (None, None)
        )
        return *pair, self.guess_tokens(*t5_tokens) if t5_tokens is not None else None


def contrastive_loss(text: torch.Tensor, image: torch.Tensor, same: torch.Tensor, temperature: float) -> torch.Tensor:
    """Symmetric cross-entropy of matching captions and images (CLIP, arXiv:2103.00020), equal captions sharing the
    target.

    Args:
        text, image: unit vectors `[B, D]`.
        same: `[B, B]` bool, whether two rows have the same caption.
    """
    logits = image @ text.T / temperature
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def gather_rows(rows: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """The rows of all ranks in their order; gradients flow to this rank's."""
    if accelerator.num_processes == 1:
        return rows
    parts = list(accelerator.gather(rows.detach()).chunk(accelerator.num_processes))
    parts[accelerator.process_index] = rows
    return torch.cat(parts)


def choose_masked(
    ids: torch.Tensor, mask: torch.Tensor, eos: int, share: float, seed: int, step: int, rows: Sequence[int]
) -> torch.Tensor:
    """Which tokens to mask, `[B, T]` bool: a share of each caption's own, at least one; a function of (seed, step,
    row).
    """
    noise = draws(seed, step, rows, ids.shape[1:], MASK_STREAM).noise
    noise = noise.masked_fill((mask == 0) | (ids == eos), torch.inf)
    threshold = NormalDist().inv_cdf(min(max(share, 1e-9), 1 - 1e-9))
    return (noise < threshold) | (noise == noise.amin(1, keepdim=True)) & noise.isfinite()


def masked_loss(logits: torch.Tensor, ids: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the masked tokens: mean over a caption's, then over captions (so that ranks with equal rows may
    be averaged).
    """
    loss = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * masked
    return (loss.sum(1) / masked.sum(1).clamp_min(1)).mean()


# -------------------------------------------------------------------- what was learned


@torch.inference_mode()
def judge_clip(
    model: Learners, tokenizer: PreTrainedTokenizerFast, dataset: CaptionedDataset, max_tokens: int
) -> dict[str, float]:
    """Does a caption find its image? Shares of right answers.

    `retrieval_top1`, `retrieval_top5`: an image's own caption among those of all images of one bucket. Of the digits
    also zero-shot answers from the image alone: `digit` (of ten), and for each style which of its two words fits, where
    one does (of two).
    """
    device = model.project.weight.device

    def embed(captions: Sequence[str]) -> torch.Tensor:
        ids, mask = tokenize(tokenizer, captions, max_tokens)
        return torch.cat(
            [model.embed_captions(*(part.to(device) for part in pair)) for pair in zip(ids.split(256), mask.split(256))]
        )

    rows = dataset.rows_of(int(dataset.bucket_of.mode().values))[:JUDGED]
    images = torch.cat([dataset.batch(part)["images"] for part in rows.split(256)])
    vectors = torch.cat([model.embed_images(part.to(device)) for part in images.split(256)])
    captions = [dataset.captions[row] for row in rows]
    unique = sorted(set(captions))
    own = torch.tensor([unique.index(caption) for caption in captions], device=device)
    best = (vectors @ embed(unique).T).topk(min(5, len(unique))).indices
    facts = {f"retrieval_top{k}": float((best[:, :k] == own[:, None]).any(1).float().mean()) for k in (1, 5)}
    facts["images"], facts["captions"] = len(rows), len(unique)
    if dataset.labels is None:
        return facts
    digits = dataset.labels[rows]

    def concept(digit: int, words: dict[str, str]) -> torch.Tensor:
        said = [
            write_caption(digit, words, template, numeral)
            for template in range(len(TEMPLATES))
            for numeral in (False, True)
        ]
        return F.normalize(embed(said).mean(0), dim=0)

    guessed = (vectors @ torch.stack([concept(digit, {}) for digit in range(10)]).T).argmax(1).cpu()
    facts["digit"] = float((guessed == digits).float().mean())
    fitting = style_words(images, digits)
    for style, words in STYLES.items():
        pairs = torch.stack([torch.stack([concept(digit, {style: word}) for word in words]) for digit in range(10)])
        nearer = torch.einsum("nd,nwd->nw", vectors, pairs[digits.to(device)]).argmax(1).tolist()
        right = [words[nearer[i]] == found[style] for i, found in enumerate(fitting) if found[style]]
        facts[style] = sum(right) / max(1, len(right))
    return facts


@torch.inference_mode()
def judge_t5(
    model: Learners, tokenizer: PreTrainedTokenizerFast, dataset: CaptionedDataset, options: TextConfig, seed: int
) -> dict[str, float]:
    """`masked_tokens`: the share of masked tokens of captions that was guessed rightly."""
    device = model.guess.weight.device
    captions = dataset.captions[:JUDGED]
    ids, mask = tokenize(tokenizer, captions, T5_TOKENS)
    masked = choose_masked(ids, mask, tokenizer.eos_token_id, options.mask_share, seed, 0, range(len(ids)))
    parts = zip(ids.masked_fill(masked, tokenizer.mask_token_id).split(256), mask.split(256))
    guessed = torch.cat(
        [model.guess_tokens(part.to(device), there.to(device)).argmax(-1).cpu() for part, there in parts]
    )
    return {"masked_tokens": float((guessed == ids)[masked].float().mean())}
