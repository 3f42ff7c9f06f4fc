"""The table of text embeddings: each row its caption, continued after a kill, refused where it is of others."""

import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from edgedit_hf.data.text_table import TextTable, encoders_hash, text_table
from edgedit_hf.errors import EdgeDiTError


class Texts:
    """A pipeline's text part: a real tiny T5 encoder, no first one, and a count of the prompts that were encoded."""

    def __init__(self, seed: int = 0) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

        words = Tokenizer(
            models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "cat": 3, "dog": 4, "black": 5}, unk_token="<unk>")
        )
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer_2 = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
        torch.manual_seed(seed)
        config = T5Config(vocab_size=6, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0)
        self.text_encoder_2 = T5EncoderModel(config).eval()
        self.text_encoder = self.tokenizer = None
        self.config = {"max_sequence_length": 16}
        self.encoded: list[str] = []

    def encode_prompt(self, prompt, max_sequence_length=16):
        self.encoded += prompt
        found = self.tokenizer_2(
            prompt, padding=True, truncation=True, max_length=max_sequence_length, return_tensors="pt"
        )
        states = self.text_encoder_2(input_ids=found.input_ids, attention_mask=found.attention_mask).last_hidden_state
        return [None, states], [None, found.attention_mask.bool()]


CAPTIONS = ["a cat", "a black dog", "a cat", "cat", "a black black cat dog", "dog"]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("edgedit_hf.data.text_table.TEXT_SHARD", 2)


@pytest.mark.parametrize("in_memory", [True, False])
def test_text_table_gives_each_row_its_caption(small_shards, monkeypatch, tmp_path, in_memory):
    monkeypatch.setattr("edgedit_hf.data.text_table.IN_MEMORY_BYTES", 1 << 20 if in_memory else 0)
    texts = Texts()
    table = text_table(texts, CAPTIONS, tmp_path / "texts", batch_size=2)
    assert len(table) == 6 and table.dims == [0, 8] and table.lengths == [0, 5]
    assert Counter(texts.encoded)["a cat"] == 1  # equal captions are encoded once (the first, also to find the widths)
    embeds, masks = table.batch(torch.tensor([4, 0, 2, 3]))
    assert embeds[0] is None and masks[0] is None
    assert (
        embeds[1].shape == (4, 5, 8) and embeds[1].dtype == torch.float32 and masks[1].sum(1).tolist() == [5, 2, 2, 1]
    )
    for row, caption in enumerate(["a black black cat dog", "a cat", "a cat", "cat"]):
        (_, states), _ = texts.encode_prompt([caption])
        torch.testing.assert_close(embeds[1][row][masks[1][row]], states[0])
    assert embeds[1][1, 2:].abs().max() == 0
    assert TextTable(tmp_path / "texts", CAPTIONS).fingerprint == table.fingerprint


def test_text_table_of_an_encoder_without_masks(tmp_path):
    texts = Texts()
    encode = texts.encode_prompt
    texts.encode_prompt = lambda prompts, **options: (encode(prompts, **options)[0], [None, None])
    table = text_table(texts, ["a cat", "black dog"], tmp_path / "texts")
    _, masks = table.batch([0, 1])
    assert table.lengths == [0, 2] and masks[1].all()


def test_text_table_continues_where_it_was_killed(small_shards, tmp_path):
    text_table(Texts(), CAPTIONS, tmp_path / "whole", batch_size=2)
    text_table(Texts(), CAPTIONS, tmp_path / "killed", batch_size=2)
    shutil.rmtree(tmp_path / "killed" / "shard-00001")
    (tmp_path / "killed" / ".shard-00001.tmp-1").mkdir()
    with pytest.raises(EdgeDiTError, match="1 of 3 parts are missing"):
        TextTable(tmp_path / "killed", CAPTIONS)
    texts = Texts()
    text_table(texts, CAPTIONS, tmp_path / "killed", batch_size=2)
    assert sorted(texts.encoded) == sorted(set(CAPTIONS))[2:4]
    files = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
        for folder in tmp_path.iterdir()
    ]
    assert files[0] == files[1]


def test_text_table_of_others_is_refused(tmp_path):
    texts = Texts()
    table = text_table(texts, CAPTIONS, tmp_path / "texts")
    with pytest.raises(EdgeDiTError, match="made with the captions .* but this run has"):
        text_table(texts, [*CAPTIONS, "black"], tmp_path / "texts")
    with pytest.raises(EdgeDiTError, match="made with the encoders .* but this run has"):
        text_table(Texts(seed=1), CAPTIONS, tmp_path / "texts")
    with pytest.raises(EdgeDiTError, match="made with the encoders"):
        text_table(texts, CAPTIONS, tmp_path / "texts", max_sequence_length=2)
    with pytest.raises(EdgeDiTError, match="made of other captions"):
        TextTable(tmp_path / "texts", ["black"])
    with pytest.raises(EdgeDiTError, match="no captions"):
        text_table(texts, [], tmp_path / "other")
    # Rows in another order share the cache, but not the fingerprint.
    assert text_table(texts, CAPTIONS[::-1], tmp_path / "texts").fingerprint != table.fingerprint


def test_a_damaged_text_table(tmp_path):
    text_table(Texts(), CAPTIONS, tmp_path / "texts")
    file = tmp_path / "texts" / "shard-00000" / "text.safetensors"
    file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(EdgeDiTError, match=r"shard-00000/text.safetensors is damaged .* delete"):
        text_table(Texts(), CAPTIONS, tmp_path / "texts")
    (tmp_path / "texts" / "index.json").write_text("{}")
    with pytest.raises(EdgeDiTError, match="does not describe a text cache"):
        text_table(Texts(), CAPTIONS, tmp_path / "texts")


def test_embeddings_that_are_nan(tmp_path):
    texts = Texts()
    with torch.no_grad():
        texts.text_encoder_2.encoder.final_layer_norm.weight.fill_(torch.nan)
    with pytest.raises(EdgeDiTError, match="encoder 2 .* NaN"):
        text_table(texts, CAPTIONS, tmp_path / "texts")


def test_the_hash_of_encoders_sees_weights_and_vocabulary_but_not_use():
    texts = Texts()
    before = encoders_hash(texts)
    texts.encode_prompt(["a cat", "a black dog"])  # sets padding and truncation in the tokenizer
    assert encoders_hash(texts) == before
    assert encoders_hash(texts, 16) == before != encoders_hash(texts, 8)
    assert (
        encoders_hash(SimpleNamespace(config={}, text_encoder=texts.text_encoder_2, tokenizer=texts.tokenizer_2))
        != before
    )
    texts.tokenizer_2.add_tokens(["bird"])
    assert encoders_hash(texts) != before
