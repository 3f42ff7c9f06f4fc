"""The proxies of a bank while they are made: what each step of the stage does, and the group that is on the device."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..genotype import LayerSpec
from ..models.transformer_edgedit import EdgeDiTBlock
from ..run.sections import BankConfig
from .closed_form import combine_blocks
from .memory_plan import Group, combined, depth_of, units_of
from .proxy_bank import ProxyBank
from .proxy_group import STARTS, Features, Proxy, ProxyGroup, held_out_losses, new_optimizer, start_blocks
from .teacher_features import FeatureSource


class GroupStep(NamedTuple):
    """What a step of the stage does."""

    group: int  # place in the rank's plan
    local: int  # steps since the group came to the device: what the step's batch is a function of
    done: int  # steps that the proxies on the device have had
    steps: int  # steps that they get in all
    starts: bool  # first the group comes to the device
    combines: bool  # its single reductions have had their steps: each "both" is put together from them
    ends: bool  # all its proxies have had their steps: this one only writes


def group_steps(singles: int, both: int) -> int:
    """Steps of a group: those of its single reductions, those of its "both", and one that writes the files."""
    return singles + both + 1


def group_step(step: int, singles: int, both: int) -> GroupStep:
    """Step `step` of the stage, where single reductions are trained for `singles` steps and then "both" for `both`."""
    group, local = divmod(step, group_steps(singles, both))
    done, steps = (local, singles) if local < singles else (local - singles, both)
    return GroupStep(group, local, done, steps, local == 0, local == singles, local == singles + both)


class BankGroup(ProxyGroup):
    """The group of a bank's proxies that is on the device; what becomes of it is a step of the recipe each.

    Args:
        bank: takes the files. source: features of its teacher. options: the recipe's.
    """

    def __init__(self, bank: ProxyBank, source: FeatureSource, options: BankConfig) -> None:
        super().__init__(self._new_proxy)
        self.bank, self.source, self.options = bank, source, options

    def _is_both(self, layer: LayerSpec) -> bool:
        return combined(self.bank.space, layer)

    def _new_proxy(self, layer: LayerSpec, block: EdgeDiTBlock | None) -> Proxy:
        block = self.bank.new_block(layer) if block is None else block
        block = block.to(self.source.device).requires_grad_(True)
        return Proxy(
            layer, block, new_optimizer(self.options.optimizer, block.parameters(), self.options.learning_rate)
        )

    def start(self, members: Group) -> None:
        """Put the group's single reductions on the device, and measure how all its proxies would start."""
        options, source = self.options, self.source
        for unit in units_of(self.bank.space, members.layers):
            depth = depth_of(unit)
            calibration = Features.cat([features.needed_by(unit) for features in source.calibration(depth)])
            test = [features.needed_by(unit) for features in source.held_out(depth)]
            for layer in unit:
                key = self.bank.key(layer)
                self.starts[key] = {}
                given = calibration.of(layer)[0], calibration.conditioning
                for name, block in start_blocks(source.teacher, layer, given, source.seed, key, options.init):
                    self.starts[key] |= held_out_losses({name: (layer, block)}, test, source.precision)
                    if name == STARTS[options.init] and not self._is_both(layer):
                        self.proxies[key] = self._new_proxy(layer, block)

    def judge(self, done: int, steps: int) -> None:
        """Add a point to the proxies' curves at a few places: held-out loss after `done` of `steps`."""
        if self.proxies and done in {0, steps // 16, steps // 4, steps}:
            test = self.source.held_out(self.depth)
            for key, loss in held_out_losses(self.blocks(), test, self.source.precision).items():
                self.proxies[key].curve.append([done, loss])

    def write(self) -> None:
        """Write the files of the proxies on the device, which have had all their steps."""
        for key, proxy in self.proxies.items():
            both = self._is_both(proxy.layer)
            record = describe_proxy(proxy, self.starts[key], both, self.source.seed, self.options.init)
            self.written[key] = self.bank.write_proxy(proxy.layer, proxy.block, record)

    def combine(self, members: Group) -> None:
        """Replace the trained single reductions on the device by each "both" that is put together from them."""
        space, singles = self.bank.space, {key: proxy.block for key, proxy in self.proxies.items()}
        self.clear()
        for layer in filter(self._is_both, members.layers):
            parts = [singles[self.bank.key(space.layer(layer.source, name))] for name in ("attention", "mlp")]
            self.proxies[self.bank.key(layer)] = self._new_proxy(layer, combine_blocks(*parts))

    def end(self) -> None:
        """Let go of the group, whose files are written."""
        self.clear()
        self.starts = {}


def describe_proxy(proxy: Proxy, starts: dict[str, float], both: bool, seed: int, init: str) -> dict[str, Any]:
    """What the bank's index says of a trained proxy, see [`ProxyBank.entries`]; `starts` are the losses of its
    untrained stand-ins.
    """
    (_, before), (steps, after) = proxy.curve[0], proxy.curve[-1]
    losses = {**starts, **({"combined": before} if both else {}), "after": after}
    record = {"loss_before": before, "loss_after": after, "losses": losses, "curve": proxy.curve}
    return {**record, "steps": steps, "seed": seed, "init": "combined" if both else init}


def describe_group(members: Group, peak: int) -> dict[str, Any]:
    """A group in `stage.json`."""
    layers = [members.layers[0].source[0], depth_of(members.layers) - 1]
    gigabytes = {"predicted_gb": round(members.predicted_bytes / 1e9, 3), "peak_gb": round(peak / 1e9, 3)}
    return {"teacher_layers": layers, "proxies": len(members.layers), **gigabytes}
