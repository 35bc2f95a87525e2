"""The blocks of a model: what stands in lists of layers of one class."""

from torch import nn


def blocks(module: nn.Module) -> list[str]:
    """Names of the layers that stand in lists (`nn.ModuleList`) of two or more of one class, outermost lists only.

    Examples:
        >>> blocks(nn.ModuleList([nn.ModuleList(nn.Linear(2, 2) for _ in range(2)), nn.Tanh()]))
        ['0.0', '0.1']
    """
    lists = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part) > 1}
    lists = {name: part for name, part in lists.items() if len({type(block) for block in part}) == 1}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [f"{name}.{place}".lstrip(".") for name in outer for place in range(len(lists[name]))]
