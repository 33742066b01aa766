"""Mixed batches against timm's, given its draws; areas, sums and how often each kind of mixing is taken."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vit_jax.data.device import mix
from vit_jax.errors import UserError

SIZE = 17, 30
SMOOTHING = 0.1
LABELS = np.array([3, 0, 3, 1, 4])


@functools.cache
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Five images and their smoothed targets of six classes."""
    images = np.random.default_rng(0).normal(size=(5, *SIZE, 3)).astype(np.float32)
    return images, np.asarray(mix.smooth(jnp.array(LABELS), 6, SMOOTHING))


@functools.cache
def mixed(number: int = 300, **options) -> tuple[np.ndarray, np.ndarray]:
    """The batch mixed with `number` keys: images (number, 5, h, w, 3) and targets (number, 5, 6)."""
    mixer = jax.jit(jax.vmap(mix.make_mix(**options), in_axes=(None, None, 0)))
    return tuple(np.asarray(x) for x in mixer(*batch(), jax.random.split(jax.random.key(0), number)))


def shares(targets: np.ndarray) -> np.ndarray:
    """The λ of each batch, from the targets of its first example, of classes 3 and 4."""
    return (targets[:, 0, 3] - SMOOTHING / 6) / (1 - SMOOTHING)


@functools.cache
def timm_mixup():
    pytest.importorskip("torch")
    from tests.models.torch_peer import without_torchvision

    with without_torchvision():
        return pytest.importorskip("timm.data.mixup")


def timms(monkeypatch, images: np.ndarray, lam: float, box=None) -> tuple[np.ndarray, np.ndarray]:
    """timm's Mixup in batch mode for these draws. It wants an even batch: the middle one of five is mixed with itself."""
    import torch

    theirs = timm_mixup()
    mixup = theirs.Mixup(label_smoothing=SMOOTHING, num_classes=6)
    monkeypatch.setattr(mixup, "_params_per_batch", lambda: (lam, box is not None))
    monkeypatch.setattr(theirs, "rand_bbox", lambda *args, **kwargs: box)
    both = np.insert(images, 2, images[2], axis=0).transpose(0, 3, 1, 2)
    x, targets = mixup(torch.tensor(both), torch.tensor(np.insert(LABELS, 2, LABELS[2])))
    return tuple(np.delete(y, 2, axis=0) for y in (x.numpy().transpose(0, 2, 3, 1), targets.numpy()))


def test_smoothed_targets_are_torchs():
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    theirs = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(LABELS), label_smoothing=SMOOTHING)
    ours = -np.sum(batch()[1] * np.asarray(jax.nn.log_softmax(logits)), axis=1).mean()
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    np.testing.assert_array_equal(mix.smooth(jnp.array(LABELS), 6), np.eye(6)[LABELS])


def test_mixup_is_timms_for_the_same_share(monkeypatch):
    images, targets = mixed(mixup=0.8, cutmix=0.0)
    chex.assert_type([images, targets], np.float32)
    for i in range(10):
        expected = timms(monkeypatch, batch()[0], float(shares(targets)[i]))
        np.testing.assert_allclose(images[i], expected[0], rtol=0, atol=2e-6)  # the share is read off rounded targets
        np.testing.assert_allclose(targets[i], expected[1], rtol=0, atol=1e-6)


def test_cutmix_is_timms_for_the_same_box(monkeypatch):
    images, targets = mixed(mixup=0.0, cutmix=1.0)
    for i in range(10):
        inside = (images[i, 0] != batch()[0][0]).all(-1)
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        box = (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) if inside.any() else (0, 0, 0, 0)
        expected = timms(monkeypatch, batch()[0], 0.5, box)  # timm corrects the share to the area of the box
        np.testing.assert_array_equal(images[i], expected[0])
        np.testing.assert_allclose(targets[i], expected[1], rtol=0, atol=1e-6)


def test_the_box_is_timms_for_the_same_draws(monkeypatch):
    rng = np.random.default_rng(0)
    box = jax.jit(mix.box, static_argnums=0)
    for lam, y, x in zip(rng.uniform(size=50), rng.integers(SIZE[0], size=50), rng.integers(SIZE[1], size=50), strict=True):
        places = iter((y, x))
        monkeypatch.setattr(np.random, "randint", lambda *args, places=places, **kwargs: next(places))
        top, bottom, left, right = timm_mixup().rand_bbox(SIZE, lam)
        expected = np.zeros(SIZE, bool)
        expected[top:bottom, left:right] = True
        np.testing.assert_array_equal(box(SIZE, lam, (y, x)), expected)


def test_targets_sum_to_one_and_match_the_mixed_area():
    images, targets = mixed(mixup=0.0, cutmix=1.0)
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
    kept = (images[:, 0] == batch()[0][0]).all(-1)
    np.testing.assert_array_equal(images[:, 0], np.where(kept[..., None], batch()[0][0], batch()[0][4]))
    np.testing.assert_allclose(shares(targets), kept.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(mixed(mixup=0.2, cutmix=0.0)[1].sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 0.8])
def test_shares_follow_the_beta_distribution(alpha):
    assert stats.kstest(shares(mixed(mixup=alpha, cutmix=0.0)[1]), stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_one_share_holds_for_the_whole_batch():
    images, targets = mixed(mixup=0.8, cutmix=0.0)
    lam = shares(targets)[:, None, None, None, None]
    expected = lam * batch()[0] + (1 - lam) * batch()[0][::-1]
    np.testing.assert_allclose(images, expected, rtol=0, atol=2e-6)


def test_probabilities_are_those_asked_for():
    switch_prob, mix_prob = 0.25, 0.6
    images, targets = mixed(mixup=0.8, cutmix=1.0, switch_prob=switch_prob, mix_prob=mix_prob)
    untouched = (images == batch()[0]).all((1, 2, 3, 4))
    cut = ((images[:, 0] == batch()[0][0]) | (images[:, 0] == batch()[0][4])).all((1, 2, 3)) & ~untouched
    np.testing.assert_array_equal(targets[untouched], np.broadcast_to(batch()[1], targets[untouched].shape))
    # Four standard deviations; a box of no pixel, at a share near one, is rare but leaves the images untouched too.
    bound = 4 * (0.25 / 300) ** 0.5
    assert abs(untouched.mean() - (1 - mix_prob)) <= bound
    assert abs(cut.mean() - switch_prob * mix_prob) <= bound


def test_a_batch_of_one_stays_as_it_is():
    image, target = batch()[0][:1], batch()[1][:1]
    again = jax.jit(mix.make_mix(mixup=0.8, cutmix=0.0))(image, target, jax.random.key(0))
    np.testing.assert_allclose(again[0], image, rtol=0, atol=1e-6)
    np.testing.assert_allclose(again[1], target, rtol=0, atol=1e-6)


def test_what_makes_no_sense_is_refused():
    for wrong in ({"mixup": -1}, {"cutmix": -0.1}, {"mix_prob": 1.1}, {"switch_prob": -0.5}, {"mixup": float("nan")}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            mix.make_mix(**{"mixup": 0.8, "cutmix": 1.0, **wrong})
    with pytest.raises(UserError, match="mix nothing"):
        mix.make_mix(mixup=0, cutmix=0)
    with pytest.raises(UserError, match="label_smoothing"):
        mix.smooth(jnp.array(LABELS), 6, 1.5)
