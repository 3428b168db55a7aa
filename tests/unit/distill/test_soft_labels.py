"""What is decoded is what was encoded, within the error that the record states, at every temperature."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import StoreError, TeacherAnswerError
from distill.soft_labels import Encoding, Record, certified_tv, decode, encode, softmax

Logits = npt.NDArray[np.float32]

OTHER_TEMPERATURES = (0.3, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 20.0)
ROUNDING = 2e-6  # of a float32 softmax over a thousand classes


def read(records: list[Record], num_classes: int) -> Logits:
    return decode([record.encoding for record in records], [record.data for record in records], num_classes)


def true_softmax(logits_NK: Logits, temperature: float) -> npt.NDArray[np.float64]:
    scaled = logits_NK.astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def total_variation(one_NK: Logits, other_NK: Logits, temperature: float) -> npt.NDArray[np.float64]:
    return 0.5 * np.abs(true_softmax(one_NK, temperature) - true_softmax(other_NK, temperature)).sum(axis=1)


def sample_logits(kind: str, num: int, num_classes: int, seed: int) -> Logits:
    random = np.random.default_rng(seed)
    noise = random.normal(0, 1, (num, num_classes))
    if kind == "flat":
        return (1e-3 * noise).astype(np.float32)
    if kind == "equal":
        return np.full((num, num_classes), 3.25, dtype=np.float32)
    if kind == "peaked":
        noise[np.arange(num), random.integers(0, num_classes, num)] += 15
    if kind == "large":
        noise *= 1e4
    if kind == "huge":  # relative logits beyond fp16's 65,504
        noise *= 1e6
    if kind == "shifted":
        noise += 1e4
    if kind == "several":
        noise[:, random.permutation(num_classes)[:4]] += 9
    return noise.astype(np.float32)


KINDS = ("normal", "flat", "equal", "peaked", "large", "huge", "shifted", "several")


class TestRoundTrip:
    @settings(max_examples=60, deadline=None)
    @given(
        kind=st.sampled_from(KINDS),
        num_classes=st.sampled_from([2, 3, 10, 256, 257, 300]),
        temperatures=st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=1, max_size=3),
        max_tv=st.sampled_from([0.01, 0.05, 0.3]),
        seed=st.integers(0, 2**32),
    )
    def test_within_the_limit_and_exactly_as_stated(
        self, kind: str, num_classes: int, temperatures: list[float], max_tv: float, seed: int
    ) -> None:
        logits = sample_logits(kind, 5, num_classes, seed)
        records = encode(logits, temperatures, max_tv)
        decoded = read(records, num_classes)
        assert decoded.shape == logits.shape
        assert decoded.dtype == np.float32
        assert np.isfinite(decoded).all()
        worst = np.max([total_variation(logits, decoded, temperature) for temperature in temperatures], axis=0)
        stated = np.array([record.max_tv for record in records])
        assert (stated <= max_tv).all()
        np.testing.assert_allclose(worst, stated, atol=ROUNDING)
        errors = np.array([record.max_logit_error for record in records])
        for temperature in OTHER_TEMPERATURES:
            assert (total_variation(logits, decoded, temperature) <= certified_tv(errors, temperature) + ROUNDING).all()

    @pytest.mark.parametrize("num_classes", [40_000, 70_000])
    def test_class_ids_beyond_int16_and_fp16(self, num_classes: int) -> None:
        """Ids above 2,048 are not whole in fp16, above 32,767 wrap in int16, above 65,535 in uint16."""
        top = np.array([[2049, 32_769, num_classes - 1], [num_classes - 3, 4097, 33_001]])
        logits = np.full((2, num_classes), -20, dtype=np.float32)
        np.put_along_axis(logits, top, np.array([[3, 2, 1]], dtype=np.float32), axis=1)
        records = encode(logits, [1.0, 2.0], 0.01)
        assert all(record.encoding is Encoding.TOPK for record in records)
        decoded = read(records, num_classes)
        np.testing.assert_array_equal(np.argsort(-decoded, axis=1, kind="stable")[:, :3], top)
        assert max(total_variation(logits, decoded, 1.0)) <= 0.01

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_temperature_of_self_distillation(self, kind: str) -> None:
        """0.1 magnifies errors tenfold, but fp16 is ten times finer where the softmax still looks: no logits need more than it."""
        logits = sample_logits(kind, 20, 100, 3)
        decoded = read(encode(logits, [0.1], 0.001), 100)
        assert total_variation(logits, decoded, 0.1).max() <= 0.001 + ROUNDING

    def test_ids_at_the_borders_of_their_types(self) -> None:
        for num_classes in (255, 256, 257, 65_535, 65_536, 65_537):
            logits = np.zeros((1, num_classes), dtype=np.float32)
            logits[0, -1] = 30
            (record,) = encode(logits, [1.0], 0.01)
            assert record.encoding is Encoding.TOPK
            assert read([record], num_classes).argmax() == num_classes - 1
            assert len(record.data) == 1 * ((1 if num_classes <= 256 else 2 if num_classes <= 65_536 else 4) + 2) + 4

    def test_records_of_all_sizes_in_one_batch(self) -> None:
        logits = np.concatenate([sample_logits(kind, 2, 100, seed) for seed, kind in enumerate(KINDS)])
        order = np.random.default_rng(0).permutation(len(logits))
        records = encode(logits, [1.0], 0.02)
        assert len({(record.encoding, len(record.data)) for record in records}) >= 3
        shuffled = read([records[row] for row in order], 100)
        np.testing.assert_array_equal(shuffled, read(records, 100)[order])
        one_by_one = np.concatenate([read([record], 100) for record in records])
        np.testing.assert_array_equal(one_by_one, read(records, 100))

    def test_each_row_is_encoded_for_itself(self) -> None:
        logits = np.concatenate([sample_logits(kind, 2, 50, seed) for seed, kind in enumerate(KINDS)])
        together = encode(logits, [1.0, 4.0], 0.05)
        assert together == [encode(row[None], [1.0, 4.0], 0.05)[0] for row in logits]

    def test_nothing_in_nothing_out(self) -> None:
        assert encode(np.empty((0, 10), dtype=np.float32), [1.0], 0.02) == []
        assert decode([], [], 10).shape == (0, 10)


def candidates(logits_K: Logits) -> list[tuple[int, Encoding, Logits]]:
    """(bytes, encoding, what is read back) of every way to keep one label, written from the format's definition, class by class."""
    num_classes = len(logits_K)
    relative = [float(np.float32(x) - np.float32(max(logits_K))) for x in logits_K]
    order = sorted(range(num_classes), key=lambda k: -relative[k])
    id_bytes = 1 if num_classes <= 256 else 2
    found = [(2 * num_classes, Encoding.DENSE16, np.array([np.float16(x) for x in relative], dtype=np.float32))]
    for retained in (1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 128, 256):
        if retained >= num_classes:
            continue
        rest = [relative[k] for k in order[retained:]]
        tail = max(rest) + math.log(math.fsum(math.exp(x - max(rest)) for x in rest))
        back = np.full(num_classes, tail - math.log(num_classes - retained), dtype=np.float32)
        for k in order[:retained]:
            back[k] = np.float16(relative[k])
        found.append((retained * (id_bytes + 2) + 4, Encoding.TOPK, back))
    return found


class TestSmallest:
    @pytest.mark.parametrize("num_classes", [2, 7, 30, 300])
    @pytest.mark.parametrize("max_tv", [0.003, 0.02, 0.1])
    def test_brute_force(self, num_classes: int, max_tv: float) -> None:
        temperatures = (1.0, 2.0)
        logits = np.concatenate(
            [3 * sample_logits(kind, 3, num_classes, seed) for seed, kind in enumerate(("normal", "peaked", "several", "flat"))]
        )
        for row, record in zip(logits, encode(logits, temperatures, max_tv), strict=True):
            fitting = [
                (size, encoding)
                for size, encoding, back in candidates(row)
                if max(total_variation(row[None], back[None], temperature)[0] for temperature in temperatures) <= max_tv
            ]
            assert len(record.data) == min(size for size, _ in fitting)
            assert (len(record.data), record.encoding) in fitting

    def test_a_sure_label_of_a_thousand_classes_is_small(self) -> None:
        """8 bytes instead of 2000: one id, one logit, the mass of the rest."""
        logits = sample_logits("normal", 50, 1000, 0)
        logits[:, 17] += 20
        assert {len(record.data) for record in encode(logits, [1.0], 0.02)} == {8}

    def test_a_tighter_limit_never_makes_it_smaller(self) -> None:
        logits = 3 * sample_logits("normal", 20, 200, 1)
        sizes = np.array([[len(record.data) for record in encode(logits, [1.0], limit)] for limit in (0.2, 0.1, 0.05, 0.01, 0.002)])
        assert (np.diff(sizes, axis=0) >= 0).all()
        assert (sizes[0] < sizes[-1]).any()

    def test_never_larger_than_dense(self) -> None:
        for num_classes in (2, 3, 5, 11, 40):
            for record in encode(sample_logits("normal", 20, num_classes, 2), [1.0], 0.05):
                assert len(record.data) <= 2 * num_classes


class TestCertificate:
    @settings(max_examples=100, deadline=None)
    @given(
        seed=st.integers(0, 2**32),
        num_classes=st.integers(2, 40),
        delta=st.floats(1e-3, 20),
        temperature=st.floats(0.05, 50),
        worst=st.booleans(),
    )
    def test_is_never_exceeded(self, seed: int, num_classes: int, delta: float, temperature: float, worst: bool) -> None:
        random = np.random.default_rng(seed)
        logits = random.normal(0, 5, (4, num_classes))
        moved = delta * (random.choice([-1.0, 1.0], logits.shape) if worst else random.uniform(-1, 1, logits.shape))
        before, after = (true_softmax(x.astype(np.float64), temperature) for x in (logits, logits + moved))
        assert (0.5 * np.abs(before - after).sum(axis=1) <= certified_tv(np.full(4, delta), temperature) + 1e-9).all()

    def test_is_reached(self) -> None:
        """Two classes, one raised by delta and one lowered, at probability 1/2 midway: the bound is exact, it cannot be tightened."""
        delta, temperature = 0.8, 1.7
        # Move from the point where p / (1 - p) = e^(-delta / T) to e^(+delta / T).
        start, end = np.array([[-delta / 2, delta / 2]]), np.array([[delta / 2, -delta / 2]])
        tv = 0.5 * np.abs(true_softmax(start, temperature) - true_softmax(end, temperature)).sum()
        assert tv == pytest.approx(float(certified_tv(np.array([delta]), temperature)[0]))


class TestRefusals:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, value: float) -> None:
        logits = np.zeros((3, 4), dtype=np.float32)
        logits[1, 2] = value
        with pytest.raises(TeacherAnswerError, match="not finite"):
            encode(logits, [1.0], 0.02)

    def test_a_limit_that_fp16_cannot_keep(self) -> None:
        """Two logits apart by less than fp16 resolves at that distance from the largest, at a temperature that shows it."""
        logits = np.array([[0, -1000.2, -1000.4]], dtype=np.float32) * np.float32(1.0)
        with pytest.raises(StoreError, match=r"fp16 logits miss max_tv 1e-09 .* allow a larger store\.max_tv"):
            encode(logits, [2000.0], 1e-9)

    @pytest.mark.parametrize(
        ("encoding", "size"),
        [(Encoding.DENSE16, 19), (Encoding.DENSE16, 22), (Encoding.TOPK, 4), (Encoding.TOPK, 8), (Encoding.TOPK, 34), (2, 20)],
    )
    def test_records_of_other_shapes(self, encoding: int, size: int) -> None:
        """Ten classes: dense is 20 bytes; top-k is 7, 10, 13, ... up to nine classes in 31."""
        with pytest.raises(StoreError, match=f"encoding .* and {size} bytes is not one for 10 classes"):
            decode([encoding], [bytes(size)], 10)


class TestSoftmax:
    def test_by_hand(self) -> None:
        found = softmax(np.array([[0, math.log(3)]], dtype=np.float32), 1.0)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, [[0.25, 0.75]], atol=1e-7)
        # At T = 2 the odds are the square root of 3.
        np.testing.assert_allclose(softmax(np.array([[0, math.log(3)]], np.float32), 2.0), [[0.3660254, 0.6339746]], atol=1e-7)

    @pytest.mark.parametrize("shift", [0.0, 3e4, -3e4])
    @pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
    def test_stays_a_distribution(self, shift: float, temperature: float) -> None:
        found = softmax(sample_logits("large", 10, 300, 0) + np.float32(shift), temperature)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
