"""Text embeddings of captions, encoded once and kept in shards on disk."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..errors import EdgeDiTError
from ..files import atomic_folder, atomic_write_json, hash_json, sweep, weights_hash
from ..records import TextIndex
from ..run.lock import FolderLock
from ..schema import read_record
from .datasets import IN_MEMORY_BYTES

TEXT_FORMAT = 1


TEXT_SHARD = 1024  # captions in a file: what a killed [`text_table`] loses at most


class TextTable:
    """The encoded captions that [`text_table`] wrote, by row of the set. Of each only the tokens its mask keeps are
    stored.

    Attributes:
        dims: width of every encoder's tokens; 0 where there is no encoder.
        lengths: tokens of the longest caption, an encoder; what shorter ones are padded to.
        fingerprint: of the captions and the encoders.
    """

    def __init__(self, folder: str | os.PathLike, captions: Sequence[str]) -> None:
        self.folder = Path(folder)
        index = _read_text_index(self.folder)
        unique = sorted(set(captions))
        if index["captions"] != hash_json(unique):
            raise EdgeDiTError(
                f"The text cache {str(self.folder)!r} was made of other captions; delete it and run the command again."
            )
        self.dims: list[int] = index["dims"]
        self.fingerprint: str = hash_json([index["captions"], index["encoders"], list(captions)])
        number = {caption: place for place, caption in enumerate(unique)}
        self._number = np.asarray([number[caption] for caption in captions], dtype=np.int64)
        self._files: dict[int, Any] = {}
        shards = range(-(-len(unique) // TEXT_SHARD))
        missing = [shard for shard in shards if not _text_shard(self.folder, shard).is_file()]
        if missing:
            raise EdgeDiTError(
                f"The text cache {str(self.folder)!r} is unfinished: {len(missing)} of {len(shards)} parts are "
                "missing. Run the command again."
            )
        for shard in shards:
            self._check(shard, min(TEXT_SHARD, len(unique) - shard * TEXT_SHARD))
        # Of every encoder and shard, where each caption's tokens begin and end: [captions + 1].
        self._ends = [
            [self._file(shard).get_tensor(f"ends_{i}") for shard in shards] if dim else []
            for i, dim in enumerate(self.dims)
        ]
        self.lengths = [max((int(ends.diff().max()) for ends in parts), default=0) for parts in self._ends]

    def _check(self, shard: int, captions: int) -> None:
        """Raise unless a part holds the tokens of so many captions, of the widths that the index says."""
        file, path = self._file(shard), _text_shard(self.folder, shard)
        names = file.keys()
        for encoder, dim in enumerate(self.dims):
            if not dim:
                continue
            tokens, ends = f"tokens_{encoder}", f"ends_{encoder}"
            shapes = [file.get_slice(name).get_shape() if name in names else None for name in (tokens, ends)]
            right = (
                shapes[0] is not None and len(shapes[0]) == 2 and shapes[0][1] == dim and shapes[1] == [captions + 1]
            )
            if right:
                places = file.get_tensor(ends)
                right = (
                    not places.is_floating_point()
                    and bool((places.diff() >= 0).all())
                    and [int(places[0]), int(places[-1])] == [0, shapes[0][0]]
                )
            if not right:
                raise EdgeDiTError(
                    f"{path} is damaged: its tokens and their places of encoder {encoder + 1} have the shapes "
                    f"{shapes}, {captions} captions of width {dim} are wanted; delete {str(path.parent)!r} and run the "
                    "command again, it makes that part anew."
                )

    def __len__(self) -> int:
        return len(self._number)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}  # open files do not travel to other processes

    def _file(self, shard: int) -> Any:
        if shard not in self._files:
            path = _text_shard(self.folder, shard)
            try:
                self._files[shard] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise EdgeDiTError(
                    f"{path} is damaged ({error}); delete {str(path.parent)!r} and run the command again, it makes "
                    "that part anew."
                ) from error
        return self._files[shard]

    @functools.cached_property
    def _memory(self) -> list[list[torch.Tensor]] | None:
        size = sum(4 * dim * int(ends[-1]) for dim, parts in zip(self.dims, self._ends) for ends in parts)
        if size > IN_MEMORY_BYTES:
            return None
        return [
            [self._file(shard).get_tensor(f"tokens_{i}").float() for shard in range(len(parts))]
            for i, parts in enumerate(self._ends)
        ]

    def _tokens(self, encoder: int, number: int) -> torch.Tensor:
        shard, place = divmod(number, TEXT_SHARD)
        start, end = self._ends[encoder][shard][place : place + 2].tolist()
        if self._memory is not None:
            return self._memory[encoder][shard][start:end]
        return self._file(shard).get_slice(f"tokens_{encoder}")[start:end].float()

    def batch(self, rows: Sequence[int] | torch.Tensor) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        """Of every encoder the tokens `[n, T_i, D_i]` float32 (0 where the mask is) and their mask `[n, T_i]` bool;
        None, None without one.
        """
        numbers = self._number[np.asarray(rows, dtype=np.int64)]
        embeds: list[torch.Tensor | None] = []
        masks: list[torch.Tensor | None] = []
        for encoder, (dim, length) in enumerate(zip(self.dims, self.lengths)):
            if not dim:
                embeds.append(None)
                masks.append(None)
                continue
            tokens = torch.zeros(len(numbers), length, dim)
            mask = torch.zeros(len(numbers), length, dtype=torch.bool)
            for row, number in enumerate(numbers.tolist()):
                found = self._tokens(encoder, number)
                tokens[row, : len(found)] = found
                mask[row, : len(found)] = True
            embeds.append(tokens)
            masks.append(mask)
        return embeds, masks


def _text_shard(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}" / "text.safetensors"


def _read_text_index(folder: Path) -> dict:
    index = read_record(folder / "index.json", TextIndex, "text_table", "a text cache")
    if index["format"] != TEXT_FORMAT:
        raise EdgeDiTError(
            f"{folder / 'index.json'} does not describe a text cache of format {TEXT_FORMAT}, but of "
            f"{index['format']}; choose another folder."
        )
    return index


def encoders_hash(pipeline: Any, max_sequence_length: int | None = None) -> str:
    """Hash of what a pipeline's text encoders make of a prompt: weights, tokenizers, the length that prompts are cut
    to.
    """
    content: list[Any] = [max_sequence_length or pipeline.config.get("max_sequence_length")]
    for suffix in ("", "_2"):
        encoder, tokenizer = (getattr(pipeline, f"{part}{suffix}", None) for part in ("text_encoder", "tokenizer"))
        if encoder is not None:
            rules = json.loads(tokenizer.backend_tokenizer.to_str())
            rules = {
                name: rule for name, rule in rules.items() if name not in ("truncation", "padding")
            }  # set by every call
            facts = [
                type(encoder).__name__,
                weights_hash(encoder.state_dict()),
                str(encoder.dtype),
                tokenizer.model_max_length,
            ]
            content.append(
                [
                    suffix,
                    *facts,
                    hash_json(rules),
                    {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
                ]
            )
    return hash_json(content)


@torch.inference_mode()
def text_table(
    pipeline: Any,
    captions: Sequence[str],
    folder: str | os.PathLike,
    batch_size: int = 64,
    max_sequence_length: int | None = None,
    progress: bool = True,
) -> TextTable:
    """Encode every distinct caption once and keep the tokens in `folder` (safetensors parts and `index.json`).

    Killed at any moment and called again with the same arguments, it continues with the first missing part; a finished
    cache is only opened. One process writes a folder.

    Args:
        pipeline: what has `encode_prompt(prompts, max_sequence_length=…)`, giving embeddings `[B, T_i, D_i]` and masks
            `[B, T_i]` (or None) an encoder, and the `text_encoder` and `tokenizer` (`…_2`) that it uses.
        captions: of the rows.
        folder: of the cache; one of other captions or encoders is an error.
        batch_size: captions encoded at a time.
    """
    folder = Path(folder)
    unique = sorted(set(captions))
    if not unique:
        raise EdgeDiTError("There are no captions to encode; give a set with some.")
    options = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    made_from = {"captions": hash_json(unique), "encoders": encoders_hash(pipeline, max_sequence_length)}

    def encode(texts: list[str]) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
        embeds, masks = pipeline.encode_prompt(texts, **options)
        masks = [
            tokens.new_ones(tokens.shape[:2]) if mask is None and tokens is not None else mask
            for tokens, mask in zip(embeds, masks)
        ]
        return [None if tokens is None else (tokens.cpu(), mask.bool().cpu()) for tokens, mask in zip(embeds, masks)]

    if (folder / "index.json").exists():
        index = _read_text_index(folder)
        for name, value in made_from.items():
            if index[name] != value:
                raise EdgeDiTError(
                    f"The text cache {str(folder)!r} was made with the {name} {index[name]}, but this run has the "
                    f"{name} {value}; choose another folder or delete this one."
                )
    else:
        dims = [0 if part is None else part[0].shape[-1] for part in encode(unique[:1])]
        index = {"format": TEXT_FORMAT, **made_from, "dims": dims}
        atomic_write_json(folder / "index.json", index)
    shards = range(-(-len(unique) // TEXT_SHARD))
    if all(_text_shard(folder, shard).is_file() for shard in shards):
        return TextTable(folder, captions)
    with (
        FolderLock(folder),
        tqdm(total=len(unique), desc="Encoding captions", unit="caption", disable=None if progress else True) as bar,
    ):
        sweep(folder)
        for shard in shards:
            texts = unique[shard * TEXT_SHARD : (shard + 1) * TEXT_SHARD]
            if not _text_shard(folder, shard).is_file():
                _write_text_shard(
                    folder,
                    shard,
                    [encode(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)],
                )
            bar.update(len(texts))
    return TextTable(folder, captions)


def _write_text_shard(folder: Path, shard: int, batches: list[list[tuple[torch.Tensor, torch.Tensor] | None]]) -> None:
    content = {}
    for encoder, parts in enumerate(zip(*batches)):
        if parts[0] is None:
            continue
        tokens = torch.cat([embeds[mask] for embeds, mask in parts])
        if not torch.isfinite(tokens).all():
            raise EdgeDiTError(
                f"Text encoder {encoder + 1} ({tokens.dtype}) gives embeddings that are NaN or infinite; use it in "
                "float32."
            )
        counts = torch.cat([mask.sum(1) for _, mask in parts])
        content[f"tokens_{encoder}"] = tokens.contiguous()
        content[f"ends_{encoder}"] = F.pad(counts.cumsum(0), (1, 0))
    with atomic_folder(folder / f"shard-{shard:05d}") as aside:
        save_file(content, aside / "text.safetensors")
