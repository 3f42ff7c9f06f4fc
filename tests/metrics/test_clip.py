"""CLIPScore on a tiny CLIP: against the model's own logits, and torchmetrics' arithmetic."""

from types import SimpleNamespace

import pytest
import torch
import vision

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.metrics.clip import ClipScorer
from edgedit_hf.metrics.networks import Preprocessing

PROMPTS = ["a cat", "two dogs", "a prompt of more tokens than the text model takes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return vision.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1


def encoded(folder, images):
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(
        PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    return {"pixel_values": Preprocessing(folder)(images), **{k: tokens[k] for k in ("input_ids", "attention_mask")}}


def test_scores_are_cosines_of_the_model(folder, images):
    from transformers import CLIPModel

    scorer, model = ClipScorer(folder), CLIPModel.from_pretrained(folder).eval()
    found = scorer.scores(images, PROMPTS, batch_size=2)
    with torch.no_grad():
        given = model(**encoded(folder, images))
    cosines = (given.logits_per_image / model.logit_scale.exp()).diagonal()
    torch.testing.assert_close(found, 100 * cosines.clamp(min=0).detach(), rtol=1e-4, atol=1e-4)
    assert found.shape == (3,) and found.max() > 0


def test_torchmetrics_gives_the_same_where_it_is_given_embeddings(folder, images):
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update
    from transformers import CLIPModel

    model, both = CLIPModel.from_pretrained(folder).eval(), encoded(folder, images)
    plain = SimpleNamespace(  # with outputs as they were before transformers 5
        config=model.config,
        to=lambda device: plain,
        get_image_features=lambda pixels: model.get_image_features(pixels).pooler_output,
        get_text_features=lambda ids, mask: model.get_text_features(ids, mask).pooler_output,
    )
    with torch.no_grad():
        scores, count = _clip_score_update(list(images), PROMPTS, plain, lambda **asked: both)
    assert count == 3
    torch.testing.assert_close(ClipScorer(folder).scores(images, PROMPTS), scores.clamp(min=0), rtol=1e-4, atol=1e-4)


def test_siglip_sees_prompts_filled_up_whatever_stands_beside_them(images, tmp_path):
    from transformers import AutoTokenizer, SiglipModel

    scorer, model = ClipScorer(vision.siglip(tmp_path)), SiglipModel.from_pretrained(tmp_path).eval()
    whole = {"padding": "max_length", "truncation": True, "max_length": 16}
    tokens = AutoTokenizer.from_pretrained(tmp_path)(PROMPTS, **whole, return_tensors="pt")
    with torch.no_grad():
        given = model(input_ids=tokens["input_ids"], pixel_values=Preprocessing(tmp_path)(images))
    cosines = ((given.logits_per_image - model.logit_bias) / model.logit_scale.exp()).diagonal()
    wanted = 100 * cosines.detach()
    assert wanted.min() > 0
    torch.testing.assert_close(scorer.scores(images, PROMPTS), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scorer.scores(images, PROMPTS, batch_size=1), wanted, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused(folder, images, tmp_path):
    with pytest.raises(EdgeDiTError, match="There are 3 images and 2 prompts"):
        ClipScorer(folder).scores(images, PROMPTS[:2])
    with pytest.raises(EdgeDiTError, match="is a Dinov2Model, which embeds no texts; CLIPScore needs a CLIP"):
        ClipScorer(vision.dinov2(tmp_path))
