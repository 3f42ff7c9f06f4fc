"""Microsoft's Fluent emoji (MIT) as training/recipes/emoji.yaml takes them: a folder of pictures, a sub-folder a group.

    git clone --depth 1 https://github.com/microsoft/fluentui-emoji
    python examples/fluent_emoji.py [--assets fluentui-emoji/assets] [--output fluent-emoji]

Of every emoji its render in 3D, of those with skin tones the default one; flags, which are few, are left out. What is
transparent, the recipe puts on white: edgedit train compress --config training/recipes/emoji.yaml
"""

import argparse
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

LEFT_OUT = "Flags"


def render_of(emoji: Path) -> Path | None:
    """Its 3D render; `None` where it has none."""
    found = sorted([*emoji.glob("3D/*_3d.png"), *emoji.glob("Default/3D/*_3d_default.png")])
    return found[0] if found else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("fluentui-emoji/assets"))
    parser.add_argument("--output", type=Path, default=Path("fluent-emoji"))
    assets, output = vars(parser.parse_args()).values()
    if output.exists():
        sys.exit(f"{output} is there already; delete it, or name another --output.")
    counts: Counter[str] = Counter()
    for file in sorted(assets.glob("*/metadata.json")):
        group, render = json.loads(file.read_text(encoding="utf-8"))["group"], render_of(file.parent)
        if group == LEFT_OUT or render is None:
            continue
        named = output / re.sub(r"\W+", "-", group).lower()  # "Food & Drink": food-drink
        named.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(render, named / f"{file.parent.name}.png")
        counts[named.name] += 1
    if not counts:
        sys.exit(f"{assets} has no emoji; clone microsoft/fluentui-emoji, and give its folder assets.")
    print(f"{output}: {sum(counts.values())} pictures,", ", ".join(f"{name} {n}" for name, n in sorted(counts.items())))
    assert len(counts) >= 2, "classes are told apart, so there must be two at least"
