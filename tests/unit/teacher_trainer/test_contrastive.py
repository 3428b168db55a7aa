"""NT-Xent against a slow double loop in float64: loss, gradient, accuracy, entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from distill.config import validate
from distill.errors import ConfigError
from distill.models.projection_head import unit_length
from teacher_trainer.contrastive import BatchParts, nt_xent
from teacher_trainer.settings import PretrainSettings


def slow_loss(
    first_BD: Tensor, second_BD: Tensor, contrastive_temperature: float, memory: Sequence[Tensor] = ()
) -> tuple[Tensor, float, float]:
    """(loss, accuracy, entropy) from the definition, view by view: -log of the partner's share among all other views and the memory."""
    views = [row / row.norm() for row in (*first_BD, *second_BD)]
    batch = len(first_BD)
    anchors, views = views, [*views, *memory]
    total = torch.zeros((), dtype=torch.float64)
    found, entropy = 0, 0.0
    for i, view in enumerate(anchors):
        partner = (i + batch) % (2 * batch)
        others = [j for j in range(len(views)) if j != i]
        similarities = {j: torch.dot(view, views[j]) / contrastive_temperature for j in others}
        denominator = sum((torch.exp(s) for s in similarities.values()), start=torch.zeros((), dtype=torch.float64))
        total = total - torch.log(torch.exp(similarities[partner]) / denominator)
        found += max(others, key=lambda j: similarities[j].item()) == partner
        shares = [(torch.exp(s) / denominator).item() for s in similarities.values()]
        entropy -= sum(p * math.log(p) for p in shares)
    return total / batch, found / (2 * batch), entropy / (2 * batch)


def embeddings(batch: int, dim: int, seed: int, likeness: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    second = likeness * first + torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    return 7 * first, second  # lengths must not matter


CASES = [(2, 3, 1.0), (5, 4, 0.5), (16, 8, 0.1), (9, 2, 0.07)]


class TestAgainstTheLoop:
    @pytest.mark.parametrize(("batch", "dim", "temperature"), CASES)
    def test_loss_accuracy_entropy(self, batch: int, dim: int, temperature: float) -> None:
        first, second = embeddings(batch, dim, seed=batch)
        outcome = nt_xent(first, second, temperature)
        loss, accuracy, entropy = slow_loss(first, second, temperature)
        torch.testing.assert_close(outcome.loss, loss, rtol=1e-10, atol=1e-10)
        assert outcome.accuracy.item() == pytest.approx(accuracy)
        assert outcome.entropy.item() == pytest.approx(entropy, rel=1e-9)

    @pytest.mark.parametrize(("batch", "dim", "temperature"), CASES)
    def test_gradient(self, batch: int, dim: int, temperature: float) -> None:
        mine = [x.requires_grad_() for x in embeddings(batch, dim, seed=batch)]
        theirs = [x.requires_grad_() for x in embeddings(batch, dim, seed=batch)]
        nt_xent(mine[0], mine[1], temperature).loss.backward()
        slow_loss(theirs[0], theirs[1], temperature)[0].backward()
        for x, y in zip(mine, theirs, strict=True):
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-12)

    def test_float32_is_near(self) -> None:
        first, second = embeddings(32, 16, seed=0)
        single = nt_xent(first.float(), second.float(), 0.1).loss
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), slow_loss(first, second, 0.1)[0], rtol=1e-5, atol=1e-5)


class TestMemory:
    @pytest.mark.parametrize(("rows", "temperature"), [(1, 1.0), (7, 0.5), (40, 0.1)])
    def test_more_negatives_against_the_loop(self, rows: int, temperature: float) -> None:
        mine = [x.requires_grad_() for x in embeddings(6, 5, seed=rows)]
        theirs = [x.requires_grad_() for x in embeddings(6, 5, seed=rows)]
        memory_MD = unit_length(torch.randn(rows, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
        outcome = nt_xent(mine[0], mine[1], temperature, memory_MD=memory_MD)
        loss, accuracy, entropy = slow_loss(theirs[0], theirs[1], temperature, list(memory_MD))
        torch.testing.assert_close(outcome.loss, loss, rtol=1e-10, atol=1e-10)
        assert (outcome.accuracy.item(), outcome.entropy.item()) == pytest.approx((accuracy, entropy), rel=1e-7)
        outcome.loss.backward()
        loss.backward()
        for x, y in zip(mine, theirs, strict=True):
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-12)

    def test_own_views_in_the_memory_are_no_negatives(self) -> None:
        """The loss of each image is that of a loop in which its own rows are not there."""
        first, second = embeddings(3, 5, seed=3)
        memory_MD = unit_length(torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
        own_BM = torch.tensor([[True, False, True, False], [False] * 4, [False, True, False, False]])
        views, total = unit_length(torch.cat([first, second])), torch.zeros((), dtype=torch.float64)
        for view in range(6):
            others = [views[other] for other in range(6) if other != view] + list(memory_MD[~own_BM[view % 3]])
            similarities = torch.stack([views[view] @ other for other in others]) / 0.5
            total += torch.logsumexp(similarities, 0) - views[view] @ views[(view + 3) % 6] / 0.5
        outcome = nt_xent(first, second, 0.5, memory_MD=memory_MD, own_BM=own_BM)
        torch.testing.assert_close(outcome.loss, total / 3, rtol=1e-10, atol=1e-10)
        assert torch.isfinite(outcome.entropy)

    def test_one_image_against_the_memory(self) -> None:
        """Partner at cosine 1, one memory row at 0, and the view itself left out: loss 2 log(1 + 1/e)."""
        first = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        outcome = nt_xent(first, first, 1.0, memory_MD=torch.tensor([[0.0, 1.0]], dtype=torch.float64))
        assert outcome.loss.item() == pytest.approx(2 * math.log(1 + 1 / math.e))


class TestByHand:
    def test_two_images_at_right_angles(self) -> None:
        """Each view: partner at cosine 1, two others at 0. Loss of a view: log(e + 2) - 1; the sum of both views' means is twice that."""
        corners = torch.eye(2, dtype=torch.float64)
        outcome = nt_xent(corners, corners, 1.0)
        assert outcome.loss.item() == pytest.approx(2 * (math.log(math.e + 2) - 1))
        assert outcome.accuracy.item() == 1

    def test_all_alike_is_chance(self) -> None:
        """Nothing to tell the 2B - 1 other views apart by: loss 2 log(2B - 1), entropy log(2B - 1)."""
        alike = torch.ones(4, 3, dtype=torch.float64)
        outcome = nt_xent(alike, alike, 0.5)
        assert outcome.loss.item() == pytest.approx(2 * math.log(7))
        assert outcome.entropy.item() == pytest.approx(math.log(7))

    def test_a_swapped_pair_is_never_found(self) -> None:
        corners = torch.eye(2, dtype=torch.float64)
        assert nt_xent(corners, corners.flip(0), 1.0).accuracy.item() == 0

    def test_a_view_is_not_its_own_neighbour(self) -> None:
        """At a low temperature a leak of self-similarity would make the loss huge."""
        first, second = embeddings(8, 16, seed=3, likeness=20)
        assert nt_xent(first, second, 0.01).loss.item() < 1e-3

    def test_symmetric_in_the_views(self) -> None:
        first, second = embeddings(6, 4, seed=1)
        torch.testing.assert_close(nt_xent(first, second, 0.3).loss, nt_xent(second, first, 0.3).loss)

    def test_only_the_loss_has_a_gradient(self) -> None:
        first, second = (x.requires_grad_() for x in embeddings(3, 4, seed=1))
        outcome = nt_xent(first, second, 0.3)
        assert (outcome.loss.requires_grad, outcome.accuracy.requires_grad, outcome.entropy.requires_grad) == (True, False, False)


class TestParts:
    def test_rows_of_a_worker(self) -> None:
        parts = BatchParts((3, 0, 4), rank=2)
        assert (parts.num_images, parts.num_before) == (7, 3)

    def test_alone_nothing_is_gathered(self) -> None:
        rows = torch.ones(3, 2, requires_grad=True)
        assert BatchParts((3,), 0).gather(rows) is rows


@pytest.mark.parametrize("batch", [0, 1])
def test_a_batch_without_negatives_is_refused(batch: int) -> None:
    with pytest.raises(ConfigError, match=rf"global_batch: .*no negatives; give at least 2 \(given: {batch}\)"):
        validate(PretrainSettings, {"global_batch": batch}, "the run file")
    with pytest.raises(ConfigError, match=r"no negatives; make pretrain\.global_batch larger"):
        nt_xent(torch.ones(batch, 3), torch.ones(batch, 3), 0.5)


def test_a_queue_shorter_than_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory\.size 100 is less than the 128 views of one step"):
        validate(PretrainSettings, {"global_batch": 64, "memory": {"size": 100}}, "the run file")
