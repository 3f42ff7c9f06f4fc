"""Whether generated digits show what their captions say."""

from edgedit_hf.data.captions import load_captioned
from edgedit_hf.data.images import load_images
from edgedit_hf.metrics.extractors import train_independent_classifier
from edgedit_hf.metrics.prompt_following import agreement, judged_captions


def test_agreement_counts_what_captions_say():
    classifier = train_independent_classifier(load_images("digits"))
    real = load_captioned("digits", "validation")
    images = real.batch(range(len(real)))["images"]
    shares = agreement(images, real.captions, classifier)
    assert shares.pop("class_agreement") > 0.95 and set(shares.values()) == {
        1.0
    }  # captions were written from these very images
    shuffled = agreement(images.roll(7, 0), real.captions, classifier)
    assert 0.03 < shuffled["class_agreement"] < 0.2 and all(0.1 < shuffled[style] < 0.6 for style in shares)
    captions = judged_captions(real, 2 * len(real))
    assert sorted(captions) == sorted(2 * real.captions)
