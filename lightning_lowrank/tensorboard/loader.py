"""Entry point that TensorBoard imports at its start; small, because an error here would stop TensorBoard."""

from typing import Any

from tensorboard.plugins.base_plugin import TBLoader

PLUGIN = "lowrank"


class LowRankLoader(TBLoader):  # type: ignore[misc]
    """Loads the tab, or leaves TensorBoard without it: TensorBoard catches what `load` raises."""

    def fix_flags(self, flags: Any) -> None:
        """Have every sample kept, unless the user has said how many: TensorBoard would keep 10 or 100 of them, without
        a word.
        """
        if isinstance(getattr(flags, "samples_per_plugin", None), dict):
            flags.samples_per_plugin.setdefault(PLUGIN, 0)

    def load(self, context: Any) -> Any:
        """The tab."""
        from lightning_lowrank.tensorboard.plugin import LowRankPlugin

        return LowRankPlugin(context)
