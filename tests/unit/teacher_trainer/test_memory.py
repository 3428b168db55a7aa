"""The queue against a plain list, the moving average against its formula, and both again after a restart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from teacher_trainer.memory import NegativeMemory
from teacher_trainer.settings import MemorySettings


def memory_of(size: int, momentum: float = 0.9, network: nn.Module | None = None) -> NegativeMemory:
    settings = MemorySettings(size=size, momentum=momentum)
    return NegativeMemory(network or nn.Linear(2, 3), settings, 3, torch.device("cpu"))


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


NOWHERE = torch.tensor([[0, 0]])


def as_set(negatives: Tensor | None) -> set[tuple[float, ...]]:
    return set() if negatives is None else {tuple(row) for row in negatives.tolist()}


class TestQueue:
    def test_first_in_first_out(self) -> None:
        """Steps of 4 views through a queue of 10, which they do not divide: what is in it are the last 10, normalised, and no zeros."""
        memory = memory_of(10)
        assert memory.negatives is None
        said: list[Tensor] = []
        for step in range(9):
            memory.keep(rows(4, step), NOWHERE)
            said += [row / row.norm() for row in rows(4, step)]
            assert memory.negatives is not None
            assert len(memory.negatives) == min(10, len(said))
            torch.testing.assert_close(memory.negatives.sum(dim=0), torch.stack(said[-10:]).sum(dim=0))
            torch.testing.assert_close(memory.negatives.norm(dim=1), torch.ones(len(memory.negatives)))

    def test_a_step_as_long_as_the_queue(self) -> None:
        memory = memory_of(4)
        memory.keep(rows(4, 0), NOWHERE)
        memory.keep(rows(4, 1), NOWHERE)
        other = memory_of(4)
        other.keep(rows(4, 1), NOWHERE)
        assert as_set(memory.negatives) == as_set(other.negatives)

    def test_no_gradient_goes_into_it(self) -> None:
        memory = memory_of(8)
        memory.keep(rows(4, 0).requires_grad_(), NOWHERE)
        assert memory.negatives is not None
        assert not memory.negatives.requires_grad

    def test_it_knows_of_which_image_each_row_is(self) -> None:
        """Steps of two images, both views of each, through a queue of 5; as a list: what was kept last in each place."""
        memory, places = memory_of(5), [(-1, -1)] * 5
        steps = [[(0, 1), (1, 0)], [(2, 7), (0, 1)], [(1, 1), (2, 7)], [(0, 0), (1, 0)]]
        for step, images in enumerate(steps):
            memory.keep(rows(4, step), torch.tensor(images * 2))
            for number, image in enumerate(images * 2):
                places[(4 * step + number) % 5] = image
            asked = [(0, 1), (2, 7), (7, 2), (1, 0)]
            filled = places[: min(5, 4 * step + 4)]
            assert memory.are_of(torch.tensor(asked)).tolist() == [[image == one for image in filled] for one in asked]


class TestAverage:
    def test_follows_by_the_formula(self) -> None:
        network = nn.Linear(2, 3)
        memory = memory_of(4, momentum=0.75, network=network)
        expected = {name: p.detach().double() for name, p in network.named_parameters()}
        for step in range(3):
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.add_(step + 1)
            memory.follow(network)
            expected = {name: 0.75 * expected[name] + 0.25 * p.detach().double() for name, p in network.named_parameters()}
        for name, parameter in memory.network.named_parameters():
            torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-6, atol=1e-6)
            assert not parameter.requires_grad

    def test_the_network_is_a_copy(self) -> None:
        network = nn.Linear(2, 3)
        memory = memory_of(4, network=network)
        before = {name: tensor.clone() for name, tensor in memory.network.state_dict().items()}
        nn.init.zeros_(network.weight)
        assert all(torch.equal(tensor, before[name]) for name, tensor in memory.network.state_dict().items())


def test_goes_on_where_it_was() -> None:
    first, network = memory_of(10), nn.Linear(2, 3)
    first.follow(network)
    first.keep(rows(7, 0), NOWHERE)
    second = memory_of(10)
    second.load_state_dict(first.state_dict())
    for memory in (first, second):
        memory.follow(network)
        memory.keep(rows(7, 1), NOWHERE)
    assert first.negatives is not None
    assert second.negatives is not None
    assert torch.equal(first.negatives, second.negatives)
    assert first.are_of(NOWHERE).all()
    assert second.are_of(NOWHERE).all()
    for own, other in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(own, other)
