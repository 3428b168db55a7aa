"""Mixed crops: exact arithmetic, the distributions of the papers, partners on one cycle, a cache that forgets what is used up."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import validate
from distill.crops import CropKey, CropRecipe, random_generator
from distill.errors import ConfigError
from distill.mixing import Crop, CropCache, MixingRecipe, beta_share, cutmix, mix, mixup, partner_cycle

SIDE = 16
BLACK, WHITE = np.zeros((SIDE, SIDE, 3), dtype=np.uint8), np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)


def noise(seed: int) -> Crop:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def mixed_of(recipe: MixingRecipe, view: int, own: Crop = WHITE, partner: Crop = BLACK) -> Crop:
    return mix(own, partner, recipe, random_generator(CropKey(0, view, "a"), b"distill.mix"))


class TestMixup:
    @settings(max_examples=50)
    @given(share=st.floats(0, 1), seed=st.integers(0, 1000))
    def test_is_the_weighted_mean_rounded_half_up(self, share: float, seed: int) -> None:
        own, partner = noise(seed), noise(seed + 1)
        weight = np.floor(share * 256 + 0.5) / 256
        expected = np.floor(own.astype(np.float64) * weight + partner.astype(np.float64) * (1 - weight) + 0.5)
        mixed = mixup(own, partner, share)
        assert mixed.dtype == np.uint8
        np.testing.assert_array_equal(mixed, expected)

    def test_all_or_nothing_is_one_of_the_two(self) -> None:
        own, partner = noise(0), noise(1)
        np.testing.assert_array_equal(mixup(own, partner, 1.0), own)
        np.testing.assert_array_equal(mixup(own, partner, 0.0), partner)
        np.testing.assert_array_equal(mixup(WHITE, WHITE, 0.37), WHITE)

    @pytest.mark.parametrize(("alpha", "variance"), [(1.0, 1 / 12), (0.2, 1 / (4 * 1.4)), (0.6, 1 / (4 * 2.2))])
    def test_shares_are_beta_distributed(self, alpha: float, variance: float) -> None:
        recipe = MixingRecipe(kind="mixup", mixup_alpha=alpha)
        shares = np.array([mixed_of(recipe, view)[0, 0, 0] for view in range(2000)]) / 255
        assert abs(shares.mean() - 0.5) < 0.03
        assert abs(shares.var() / variance - 1) < 0.12


class TestBetaShare:
    """Against numpy's own, which may change; ours may not."""

    @pytest.mark.parametrize("alpha", [0.05, 0.3, 0.9, 1.0])
    def test_is_beta_distributed(self, alpha: float) -> None:
        count = 20_000
        generator = random_generator(CropKey(0, 0, "beta"), b"test")
        ours = np.sort([beta_share(alpha, generator) for _ in range(count)])
        assert abs(ours.mean() - 0.5) < 0.015
        assert ours.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
        theirs = np.sort(np.random.default_rng(0).beta(alpha, alpha, count))
        at = np.concatenate([ours, theirs])
        distance = np.abs(np.searchsorted(ours, at, "right") - np.searchsorted(theirs, at, "right")).max() / count
        assert distance < 1.95 * (2 / count) ** 0.5, "Kolmogorov-Smirnov, 0.1 %"

    def test_an_alpha_so_small_that_powers_vanish_is_one_crop_or_the_other(self) -> None:
        generator = random_generator(CropKey(0, 0, "beta"), b"test")
        shares = [beta_share(1e-6, generator) for _ in range(200)]
        assert all(share < 1e-9 or share > 1 - 1e-9 for share in shares)
        assert 60 < sum(share > 0.5 for share in shares) < 140

    def test_numbers_never_move(self) -> None:
        generator = random_generator(CropKey(0, 0, "a"), b"distill.mix")
        assert [round(beta_share(0.3, generator), 9) for _ in range(4)] == [0.860554572, 0.989822919, 0.96417629, 0.676148585]

    def test_only_uniform_doubles_are_used(self) -> None:
        class OnlyUniform:
            def random(self, size: int) -> np.ndarray:
                return np.full(size, 0.9)

        shown: Any = OnlyUniform()
        assert mix(WHITE, BLACK, MixingRecipe(kind="mixup", mixup_alpha=0.5), shown)[0, 0, 0] == 128


class TestCutmix:
    @settings(max_examples=50)
    @given(share=st.floats(0, 1), x=st.floats(0, 1, exclude_max=True), y=st.floats(0, 1, exclude_max=True))
    def test_is_a_rectangle_of_the_partner(self, share: float, x: float, y: float) -> None:
        """Yun et al. 2019, as their code cuts it: sides S sqrt(1 - share), cut at the edges."""
        own, partner = noise(3), noise(4)
        cut = int(SIDE * np.sqrt(1 - share))
        expected = own.copy()
        for row in range(SIDE):
            for column in range(SIDE):
                if abs_within(row, int(y * SIDE), cut // 2) and abs_within(column, int(x * SIDE), cut // 2):
                    expected[row, column] = partner[row, column]
        np.testing.assert_array_equal(cutmix(own, partner, share, x, y), expected)

    def test_shows_both_and_writes_to_neither(self) -> None:
        own, partner = noise(5), noise(6)
        before = own.copy(), partner.copy()
        shares = [(mixed_of(MixingRecipe(kind="cutmix"), view) == 255).mean() for view in range(500)]
        mixed_of(MixingRecipe(kind="cutmix"), 1, own, partner)
        np.testing.assert_array_equal(own, before[0])
        np.testing.assert_array_equal(partner, before[1])
        assert min(shares) < 0.3
        assert max(shares) > 0.95
        assert 0.5 < np.mean(shares) < 0.75  # half, and what the edges cut off


def abs_within(at: int, center: int, half: int) -> bool:
    return center - half <= at < center + half


class TestKinds:
    def test_both_is_each_of_them(self) -> None:
        """Of black and white, only Mixup makes grey."""
        recipe = MixingRecipe(kind="both", cutmix_share=0.25)
        grey = np.mean([not set(np.unique(mixed_of(recipe, view))) <= {0, 255} for view in range(1000)])
        assert abs(grey - 0.75) < 0.05

    def test_every_key_mixes_its_own_way_and_always_the_same(self) -> None:
        recipe = MixingRecipe(kind="both")
        first, again = ([mixed_of(recipe, view, noise(1), noise(2)).tobytes() for view in range(40)] for _ in range(2))
        assert first == again
        assert len(set(first)) > 30  # a rectangle may be empty

    @pytest.mark.parametrize(
        ("kind", "digest"), [("mixup", "0770ae0359be0382"), ("cutmix", "97402ae09088e825"), ("both", "89b3d4ec836de1b7")]
    )
    def test_pixels_never_move(self, kind: Any, digest: str) -> None:
        """Labels are kept for ever: other pixels under the same key would have another crop's label."""
        own = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
        generators = [random_generator(CropKey(3, view, "a"), b"distill.mix") for view in range(50)]
        crops = [mix(own, own[::-1].copy(), MixingRecipe(kind=kind), generator) for generator in generators]
        assert hashlib.sha256(np.stack(crops).tobytes()).hexdigest()[:16] == digest


class TestPartners:
    @pytest.mark.parametrize("num_images", [1, 2, 3, 10, 257])
    def test_are_one_cycle_through_all(self, num_images: int) -> None:
        partner_N = partner_cycle(num_images, random_generator(CropKey(0, 0, "shard"), b"distill.partner"))
        at, seen = 0, []
        for _ in range(num_images):
            at = int(partner_N[at])
            seen.append(at)
        assert sorted(seen) == list(range(num_images))
        assert at == 0

    def test_change_with_the_view_and_never_otherwise(self) -> None:
        cycles = [partner_cycle(50, random_generator(CropKey(0, view, "shard"), b"distill.partner")) for view in range(20)]
        assert len({cycle.tobytes() for cycle in cycles}) == 20
        assert np.mean([np.mean(one == other) for one, other in itertools.pairwise(cycles)]) < 0.1
        pinned = partner_cycle(8, random_generator(CropKey(3, 1, "part-000000"), b"distill.partner"))
        assert pinned.tolist() == [3, 7, 0, 1, 2, 6, 4, 5]


class TestRecipe:
    def test_without_mixing_labels_kept_before_there_was_any_are_found(self) -> None:
        plain = CropRecipe(image_size=28)
        assert plain.digest() == "0fa803fd67e71f701e81dcec444f0a286daff059a2ae71af271bfa86cfd2dff5"  # as of the version without mixing
        assert "mixing" not in plain.model_dump_json()
        assert CropRecipe.model_validate_json(plain.model_dump_json()) == plain

    def test_with_mixing_it_names_another_store(self) -> None:
        recipes = [
            CropRecipe(image_size=28, mixing=MixingRecipe(kind=kind, mixup_alpha=alpha))
            for kind in ("none", "mixup", "cutmix", "both")
            for alpha in (1.0,) + (() if kind == "none" else (0.3,))
        ]
        assert len({recipe.digest() for recipe in recipes}) == 7
        assert all(CropRecipe.model_validate_json(recipe.model_dump_json()) == recipe for recipe in recipes)

    @pytest.mark.parametrize("wrong", [{"kind": "mixip"}, {"mixup_alpha": 0}, {"mixup_alpha": 1.5}, {"cutmix_share": 1.5}, {"alpha": 1}])
    def test_what_is_wrong_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="mixing"):
            validate(CropRecipe, {"image_size": 28, "mixing": wrong}, origin="test")


class TestCropCache:
    def test_a_crop_is_gone_after_its_last_use(self) -> None:
        cache = CropCache(10 * BLACK.nbytes)
        cache.hold(3)
        cache.put(3, 0, 7, WHITE, uses=2)
        assert cache.num_bytes == WHITE.nbytes
        assert cache.take(3, 0, 8) is None
        assert cache.take(3, 0, 7) is WHITE
        assert cache.take(3, 0, 7) is WHITE
        assert cache.take(3, 0, 7) is None
        assert cache.num_bytes == 0

    def test_full_is_full_until_a_shard_is_dropped(self) -> None:
        cache = CropCache(2 * BLACK.nbytes)
        for shard in (0, 1):
            cache.hold(shard)
        for row in range(5):
            cache.put(0, row, 0, WHITE, uses=1)
        assert cache.num_bytes == 2 * WHITE.nbytes
        assert not cache.has_room()
        cache.drop(0)
        assert cache.num_bytes == 0
        cache.put(0, 9, 0, WHITE, uses=1)  # by a thread that was slow: its shard is held no longer
        cache.put(1, 9, 0, BLACK, uses=1)
        assert cache.take(0, 9, 0) is None
        assert cache.take(1, 9, 0) is BLACK
