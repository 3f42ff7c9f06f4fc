"""Stage text: what the encoders learn, what it writes and how it is read, kills, ranks, and encoders that do not
fit.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from edgedit_hf.elastic.supernet import load_text
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.pipelines.loading import load_text_encoder
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.sections import TextConfig
from edgedit_hf.training import train_text_encoders

TINY = (
    *"text.vocabulary_size=450 text.hidden_size=32 text.num_layers=1 text.num_heads=2 text.steps=90 "
    "text.batch_size=64".split(),
    *"text.learning_rate=5e-3 text.warmup_steps=5 text.checkpoint_every=10 text.log_every=10".split(),
)


@pytest.fixture(scope="module")
def trained(recipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    recipes.printed_here("train_text_encoders", folder, *TINY)
    return folder


# -------------------------------------------------------------------- what it makes


@pytest.mark.slow
def test_the_encoders_learned_what_captions_mean(trained):
    learned = json.loads((trained / "text" / "stage.json").read_text())["learned"]
    for split in ("validation", "held_out"):
        facts = learned[split]
        assert facts["digit"] > 0.7, facts  # from the image alone, of ten
        assert min(facts[style] for style in ("stroke", "width", "slant")) > 0.58, facts  # of two
        assert facts["retrieval_top5"] > 5 * 5 / facts["captions"], facts
        assert facts["masked_tokens"] > 0.2, facts  # of some 50 words that occur
    losses = [json.loads(line) for line in (trained / "text" / "telemetry.jsonl").read_text().splitlines()]
    assert losses[-1]["contrast"] < 0.8 * losses[0]["contrast"] and losses[-1]["guess"] < 0.6 * losses[0]["guess"]


@pytest.mark.slow
@pytest.mark.demos
def test_the_encoders_of_the_demo_learn_it_well(recipes, tmp_path):
    recipes.run("train_text_encoders", tmp_path)
    done = json.loads((tmp_path / "text" / "stage.json").read_text())
    for facts in done["learned"].values():
        assert (
            facts["digit"] > 0.85
            and min(facts[style] for style in ("stroke", "width", "slant")) > 0.8
            and facts["masked_tokens"] > 0.6
        ), facts


def test_they_are_read_back_and_encode_prompts(trained):
    text_encoder, tokenizer, text_encoder_2, tokenizer_2 = load_text(RunConfig(output_dir=str(trained)))
    assert type(text_encoder).__name__ == "CLIPTextModel" and type(text_encoder_2).__name__ == "T5EncoderModel"
    assert not any(p.requires_grad for p in text_encoder.parameters()) and not text_encoder.training
    for words in (tokenizer, tokenizer_2):
        assert len(words) <= 450
        ids = words("A thick SEVEN, ünknown €").input_ids
        assert words.decode(ids, skip_special_tokens=True).strip() == "a thick seven, ünknown €"
        assert ids[-1] == words.eos_token_id and words.pad_token_id == 0
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id == text_encoder.config.bos_token_id
    assert text_encoder.config.eos_token_id == tokenizer.eos_token_id != 2 and tokenizer.model_max_length == 32
    # Texts of the captions are made of whole words.
    assert len(tokenizer("a thick seven").input_ids) == 5 and len(tokenizer_2("slanted to the left").input_ids) == 5
    padded = tokenizer(
        ["a thick seven", "the digit 7, thin and slanted to the right"], padding=True, return_tensors="pt"
    )
    alone = tokenizer("a thick seven", return_tensors="pt")
    for kind, output in (("last_hidden_state", slice(0, 5)), ("pooler_output", slice(None))):
        both, one = text_encoder(**padded)[kind][0], text_encoder(**alone)[kind][0]
        torch.testing.assert_close(both[output], one, atol=1e-5, rtol=1e-4)


def test_an_encoder_brought_along_is_used_as_it_is(trained, tmp_path, capsys):
    given = RunConfig(
        output_dir=str(tmp_path), text=TextConfig(encoder=str(trained / "text" / "text_encoder"), encoder_2="none")
    )
    text_encoder, tokenizer, *second = load_text(given)
    assert second == [None, None] and len(tokenizer) == text_encoder.config.vocab_size
    (folder := tmp_path / "both").mkdir()
    for part in ("text_encoder", "tokenizer"):  # weights and tokenizer in one folder, as single encoders of the Hub
        shutil.copytree(trained / "text" / part, folder, dirs_exist_ok=True)
    assert load_text_encoder(folder)[1].get_vocab() == tokenizer.get_vocab()
    capsys.readouterr()
    train_text_encoders.run(given, Accelerator(cpu=True))
    assert "used as they are" in capsys.readouterr().out and not (tmp_path / "text").exists()


def test_only_the_missing_encoder_is_trained(trained, tmp_path):
    text = TextConfig(encoder=str(trained / "text" / "text_encoder"), hidden_size=8, num_heads=2, steps=2, batch_size=8)
    train_text_encoders.run(RunConfig(output_dir=str(tmp_path), text=text), Accelerator(cpu=True))
    assert {path.name for path in (tmp_path / "text").iterdir() if path.is_dir()} == {"text_encoder_2", "tokenizer_2"}
    assert set(json.loads((tmp_path / "text" / "stage.json").read_text())["learned"]["validation"]) == {"masked_tokens"}


# -------------------------------------------------------------------- kills and ranks


@pytest.mark.slow
@pytest.mark.kills
def test_killed_and_rerun_equals_uninterrupted(recipes, trained, result_files, tmp_path):
    seconds = json.loads((trained / "text" / "stage.json").read_text())["seconds"]
    delays = recipes.run_with_kills("train_text_encoders", tmp_path, tmp_path / "text" / "run.json", seconds, *TINY)
    expected = result_files(trained / "text", ".safetensors") | result_files(trained / "text" / "tokenizer", ".json")
    found = result_files(tmp_path / "text", ".safetensors") | result_files(tmp_path / "text" / "tokenizer", ".json")
    assert len(expected) == 4 and found == expected, f"killed after {delays} s"
    steps = [json.loads(line)["step"] for line in (tmp_path / "text" / "telemetry.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_equal_one(recipes, tmp_path):
    few = (*TINY, "text.steps=8")
    recipes.run("train_text_encoders", tmp_path / "one", *few)
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    recipes.run("train_text_encoders", tmp_path / "two", *few, launcher=launcher)
    for part in ("text_encoder", "text_encoder_2"):
        one, two = (load_file(tmp_path / run / "text" / part / "model.safetensors") for run in ("one", "two"))
        for name in one:
            # Adam divides by tiny second moments in its first steps, which magnifies the rounding of sums in another
            # order.
            torch.testing.assert_close(two[name], one[name], rtol=2e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
    facts = [
        json.loads((tmp_path / run / "text" / "telemetry.jsonl").read_text().splitlines()[-1]) for run in ("one", "two")
    ]
    assert facts[0]["contrast"] == pytest.approx(facts[1]["contrast"], rel=1e-2)


# -------------------------------------------------------------------- bad input


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_tokenizer_with_more_tokens_than_its_encoder_embeds(trained, tmp_path):
    text = shutil.copytree(trained / "text", tmp_path / "text")
    tokenizer = load_text_encoder(text / "text_encoder")[1]
    tokenizer.add_tokens(["two", "more"])
    tokenizer.save_pretrained(text / "tokenizer")
    with pytest.raises(
        EdgeDiTError, match=r"tokenizer has \d+ tokens, but the text encoder .* embeds only \d+; give the tokenizer"
    ):
        load_text_encoder(text / "text_encoder")


def test_encoders_that_cannot_be_loaded(trained, tmp_path):
    with pytest.raises(EdgeDiTError, match="folder does not exist"):
        load_text_encoder("./nowhere")
    with pytest.raises(EdgeDiTError, match="no/such-encoder: it is neither a local path nor a Hub id"):
        load_text_encoder("no/such-encoder")
    with pytest.raises(EdgeDiTError, match="stage text .*train_text_encoders.py"):
        load_text(RunConfig(output_dir=str(tmp_path)))
    with pytest.raises(EdgeDiTError, match="both 'none'"):
        load_text(RunConfig(text=TextConfig(encoder="none", encoder_2="none")))
    alone = shutil.copytree(trained / "text" / "text_encoder_2", tmp_path / "alone")
    with pytest.raises(EdgeDiTError, match="alone has no tokenizer beside it"):
        load_text_encoder(alone)
    change_json(alone / "config.json", model_type="bert")
    with pytest.raises(EdgeDiTError, match="is a 'bert'; it must be one of clip"):
        load_text_encoder(alone)
    deeper = shutil.copytree(trained / "text", tmp_path / "deeper") / "text_encoder"
    change_json(deeper / "config.json", num_hidden_layers=2)
    with pytest.raises(EdgeDiTError, match="lack 16 that its config asks for"):
        load_text_encoder(deeper)
    (deeper / "model.safetensors").write_bytes(b"short")
    with pytest.raises(EdgeDiTError, match="cannot be loaded"):
        load_text_encoder(deeper)


def test_bad_recipes(fail, tmp_path):
    assert "text.hidden_size 30" in fail("train_text_encoders", tmp_path / "run", "text.hidden_size=30")
    assert "exclude each other" in fail(
        "train_text_encoders", tmp_path / "run", "data.resolution=8", "data.buckets=[8x8]"
    )
    assert "all have one size" in fail("train_text_encoders", tmp_path / "run", "data.buckets=[8x8]")
    assert not (tmp_path / "run").exists()
