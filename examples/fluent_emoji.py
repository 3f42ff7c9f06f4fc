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
        parser.error(f"{output} is there already; delete it, or name another --output")
    groups: dict[str, list[Path]] = {}
    for file in sorted(assets.glob("*/metadata.json")):
        try:
            group = json.loads(file.read_text(encoding="utf-8"))["group"]
            name = re.sub(r"\W+", "-", group).strip("-").lower()[:60]  # "Food & Drink": food-drink
        except (OSError, ValueError, LookupError, TypeError) as error:
            parser.error(f"{file} names no group ({error!r}); fetch it again")
        if not name:
            parser.error(f"{file} names the group {group!r}; fetch it again")
        if group != LEFT_OUT and (render := render_of(file.parent)) is not None:
            groups.setdefault(name, []).append(render)
    if len(groups) < 2:
        parser.error(
            f"{assets} has {len(groups)} groups of emoji; clone microsoft/fluentui-emoji, give its folder assets"
        )

    aside = output.with_name(f".{output.name}.part")
    shutil.rmtree(aside, ignore_errors=True)  # of a copy that was interrupted
    for name, renders in groups.items():
        (aside / name).mkdir(parents=True)
        for render in renders:
            shutil.copyfile(render, aside / name / f"{render.relative_to(assets).parts[0]}.png")
    aside.rename(output)
    counts = {path.name: len(list(path.iterdir())) for path in sorted(output.iterdir())}
    print(f"{output}: {sum(counts.values())} pictures, " + ", ".join(f"{name} {n}" for name, n in counts.items()))
    assert sum(counts.values()) == sum(map(len, groups.values())), "a picture was lost"
