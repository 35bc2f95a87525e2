"""What is reached from a module is put back, whatever it is, and nothing else is touched."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.testing import assert_close

from lightning_lowrank.loss.snapshot import Snapshot


class Holder:
    """An object of the user's."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def test_putting_back_does_not_invalidate_a_graph_that_holds_the_tensor() -> None:
    weight, held = torch.ones(3, requires_grad=True), torch.arange(3.0)
    loss = (weight * held).sum()
    snapshot = Snapshot(root=Holder(held=held))
    with snapshot.guard():
        held.data.add_(1)  # behind the back of autograd
    snapshot.restore()

    loss.backward()
    assert_close(weight.grad, torch.arange(3.0))


def test_a_write_through_a_view_is_undone() -> None:
    held = torch.zeros(4, 4)
    snapshot = Snapshot(root=Holder(held=held))
    with snapshot.guard():
        held.T[1].copy_(torch.ones(4))
        torch.add(held, 1, out=held)
        torch._foreach_add_([held, torch.zeros(2)], 1.0)
    snapshot.restore()

    assert_close(held, torch.zeros(4, 4))


def test_what_only_others_hold_stays_written() -> None:
    others = torch.zeros(2)
    snapshot = Snapshot(root=Holder(held=torch.zeros(2)))
    with snapshot.guard():
        others.add_(1)
    snapshot.restore()

    assert_close(others, torch.ones(2))


class Slotted:
    """An object without a dictionary."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


def test_attributes_in_slots_are_put_back() -> None:
    thing = Slotted()
    snapshot = Snapshot(root=Holder(thing=thing))
    thing.count = 3
    snapshot.restore()

    assert thing.count == 0


def test_variables_from_around_a_function_are_put_back() -> None:
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return count

    snapshot = Snapshot(root=Holder(step=step))
    step()
    snapshot.restore()

    assert count == 0


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


ODD: dict[str, Any] = {
    "inference": inference(),
    "sparse": torch.eye(3).to_sparse(),
    "without data": torch.ones(3, device="meta"),
    "not initialised": nn.LazyLinear(3),
    "large": list(range(1_000_001)),
    "a type": int,
    "a function": len,
    "an error": ValueError("odd"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_attributes_do_no_harm(name: str) -> None:
    holder = Holder(odd=ODD[name], again=[])
    holder.again.append(holder)
    snapshot = Snapshot(root=holder)
    holder.odd = None
    with snapshot.guard():
        torch.ones(2).add_(1)
    snapshot.restore()

    assert holder.odd is ODD[name]


def test_the_order_of_entries_is_put_back() -> None:
    entries = {"a": 1, "b": 2}
    snapshot = Snapshot(root=entries)
    entries["a"] = entries.pop("a")
    snapshot.restore()

    assert list(entries) == ["a", "b"]


class Stubborn(list[int]):
    """Cannot be emptied."""

    def clear(self) -> None:
        raise RuntimeError("stubborn")


def test_the_rest_is_put_back_if_a_part_cannot_be() -> None:
    first, stubborn, last = [1], Stubborn([1]), [1]
    snapshot = Snapshot(root=[first, stubborn, last])
    for values in (first, stubborn, last):
        values.append(2)

    with pytest.raises(RuntimeError, match="stubborn"):
        snapshot.restore()
    assert (first, last) == ([1], [1])


def test_a_parameter_is_put_back_with_its_data_gradient_and_flag() -> None:
    held = torch.zeros(2, requires_grad=True)
    snapshot = Snapshot(root=Holder(held=held))
    held.requires_grad_(False)
    held.data = torch.zeros(3)
    held.grad = torch.zeros(3)
    snapshot.restore()

    assert held.shape == (2,) and held.grad is None and held.requires_grad


@pytest.mark.filterwarnings("ignore")  # torch says that it would be faster compiled
def test_operators_that_take_functions_are_let_through() -> None:
    query = torch.ones(1, 1, 8, 4)
    snapshot = Snapshot(root=Holder(query=query))
    with snapshot.guard(), torch.compiler.set_stance("force_eager"):
        found = flex_attention(query, query, query)
    snapshot.restore()

    assert_close(found, query)
