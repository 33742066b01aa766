"""The head that is fitted before the first step: against scikit-learn, in runs whole and killed, and what is refused."""

import dataclasses
import shutil

import chex
import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from configs import photos
from tests import tiny
from tests.evaluators import small
from vit_jax import fit_head, predictor
from vit_jax.data.host.decode import ImageError
from vit_jax.errors import UserError
from vit_jax.run import experiment as experiments
from vit_jax.run import progress, start
from vit_jax.settings import Settings
from vit_jax.train import train_and_evaluate

pytestmark = pytest.mark.usefixtures("each_step_once")
L2 = (1e-3, 1e-1, 10.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The workdir of a model that has learnt next to nothing."""
    workdir = tmp_path_factory.mktemp("base")
    train_and_evaluate(two_blocks(total_steps=1, eval_every=1), workdir)
    return workdir


def two_blocks(**overrides):
    c = tiny.config(**overrides)
    c.model.transformer.num_layers = 2
    return c


def config(base, **overrides):
    """Two views: digits are not mirrored, so that the second is a crop. Of both blocks, as there are no six."""
    c = two_blocks(pretrained=str(base), **{"total_steps": 0, "warmup_steps": 0} | overrides)
    c.head_fit.views, c.head_fit.layers = 2, 6
    c.head_fit.l2 = (1e-3, 1e-1)
    return c


@pytest.fixture(scope="module")
def quick(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quick")
    train_and_evaluate(config(base), workdir)
    return workdir


def two_views(classes=5, n=150, d=12):
    """(features (2, n, d) of different scales, labels) of clusters that overlap."""
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=n)
    x = rng.normal(size=(classes, d))[labels] + 2 * rng.normal(size=(2, n, d))
    return (3 + x * np.geomspace(0.01, 100, d)).astype(np.float32), labels


def cross_entropy(logits, labels):
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels])


@pytest.mark.parametrize("d", [12, 320])
def test_the_head_is_scikit_learns_logistic_regression_of_all_views(d):
    """Of less numbers in a row than there are rows, and of more."""
    x, labels = two_views(d=d)
    head = fit_head.fit(x, labels, np.eye(5, dtype=np.float32)[labels], L2)
    rows, twice = x.reshape(-1, d).astype(np.float64), np.tile(labels, 2)
    scaled = (rows - rows.mean(axis=0)) / (rows.std(axis=0) + 1e-5)
    peers = {value: LogisticRegression(C=1 / (300 * value), solver="newton-cg", tol=1e-10, max_iter=500) for value in L2}
    peer = peers[head.l2].fit(scaled, twice)
    logits = rows @ head.kernel + head.bias
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, peer.predict_proba(scaled), atol=1e-4)
    ours, theirs = cross_entropy(logits, twice), cross_entropy(peer.decision_function(scaled), twice)
    assert ours == pytest.approx(theirs, abs=1e-5)

    # The strength is that with which the others tell the held-out fifth of each class best
    rest = ~fit_head._held_out(labels)
    assert [np.sum(~rest & (labels == i)) for i in range(5)] == [round(0.2 * np.sum(labels == i)) for i in range(5)]
    losses = {
        value: cross_entropy(
            fitted.fit(scaled[np.tile(rest, 2)], twice[np.tile(rest, 2)]).decision_function(scaled[:150][~rest]), labels[~rest]
        )
        for value, fitted in peers.items()
    }
    assert head.l2 == min(losses, key=losses.get) < max(L2)


def test_a_sigmoid_head_without_a_bias_is_a_regression_for_each_class():
    x, labels = two_views()
    x -= x.mean(axis=(0, 1))
    targets = np.eye(5, dtype=np.float32)[labels]
    head = fit_head.fit(x, labels, targets, (0.1,), loss="sigmoid", with_bias=False)
    rows, scale = x.reshape(-1, 12).astype(np.float64), x.reshape(-1, 12).std(axis=0, dtype=np.float64) + 1e-5
    for i in range(5):
        peer = LogisticRegression(C=1 / (300 * 0.1), solver="newton-cg", tol=1e-10, fit_intercept=False)
        expected = peer.fit(rows / scale, np.tile(labels == i, 2)).decision_function(rows / scale)
        np.testing.assert_allclose(rows @ head.kernel[:, i], expected, atol=3e-4)
    assert not head.bias.any()


def test_a_quick_run_leaves_a_model_with_scikit_learns_head(base, quick):
    loaded = predictor.load(quick)
    assert loaded.description.step == 0 and loaded.description.class_names == tuple("0123456789")
    accuracy = tiny.metrics(quick, "accuracy_test")[0]
    assert loaded.description.metrics["accuracy_test"] == accuracy

    # The features of both views, by hand
    e = experiments.build(Settings.from_config(config(base)))
    view, params = fit_head.make_view(e), dict(np.load(base / "model.npz"))
    before, after = params, tiny.arrays(quick)
    assert after["head/kernel"].shape == (2 * 16, 10) and loaded.description.model["head_layers"] == 2
    for name in before.keys() - {"head/kernel", "head/bias"}:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    tree = predictor.load(base).params
    apply = jax.jit(lambda x: e.task.head_inputs(tree, {"image": x}))
    views = [fit_head.View(e.train_source, i) for i in range(2)]
    seen = [[view(source[i], exif_rotated=False) for i in range(100)] for source in views]
    x = np.concatenate([apply(np.stack([example["image"] for example in examples])) for examples in seen]).astype(np.float64)
    labels = np.array([example["label"] for examples in seen for example in examples])
    assert not np.array_equal(x[:100], x[100:]) and np.array_equal(labels[:100], labels[100:])
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-5
    asked, truth = small.images_and_labels(e.test_source)
    tests = (np.asarray(apply(127.5 * (asked + 1))) - mean) / std
    logits = np.asarray(loaded([np.uint8(np.rint(127.5 * (image + 1))) for image in asked])["logits"])
    peers = [
        LogisticRegression(C=1 / (200 * l2), tol=1e-10, solver="newton-cg").fit((x - mean) / std, labels) for l2 in (1e-3, 0.1)
    ]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert min(np.abs(peer.predict_proba(tests) - probabilities).max() for peer in peers) < 1e-3
    assert accuracy == np.mean(logits.argmax(axis=1) == truth)

    # What is no file any more is left out where bad images are skipped
    class Gone(type(e.train_source)):
        def __getitem__(self, index):
            raise ImageError("a.jpg cannot be read: this is a named pipe")

    gone = Gone("digits", "train")
    with pytest.raises(ImageError, match="named pipe"):
        fit_head.View(gone, 0)[3]
    skipping = dataclasses.replace(e, settings=dataclasses.replace(e.settings, bad_images="skip"))
    example = fit_head.make_view(skipping)(fit_head.View(gone, 1, skip=True)[3], exif_rotated=False)
    assert not example["decoded"] and not example["image"].any() and example.keys() == seen[0][0].keys()


def test_images_far_larger_than_the_checkpoint_has_seen_are_warned_of(base, caplog):
    for crop, said in ((32, 0), (40, 1)):
        c = config(base)
        c.pp.crop = crop
        settings = Settings.from_config(c)
        caplog.clear()
        progress.log_setup(experiments.build(settings, origin=start.find_origin(settings)))
        assert caplog.text.count("40x40 pixels are 25 times as many as the checkpoint was trained on") == said
        assert caplog.text.count("--config.pp.crop=8 is its own size") == said


def test_a_run_that_is_killed_while_it_fits_comes_to_the_same_bits(base, quick, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fit_head, "fit", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_and_evaluate(config(base), tmp_path)
    assert not (tmp_path / "model.npz").exists()
    train_and_evaluate(config(base), tmp_path)
    chex.assert_trees_all_equal(tiny.arrays(tmp_path), tiny.arrays(quick))

    # What is complete is not fitted again, and a model that is lost comes back from the checkpoint
    monkeypatch.setattr(fit_head, "fitted", None)
    (tmp_path / "model.npz").unlink()
    train_and_evaluate(config(base), tmp_path)
    chex.assert_trees_all_equal(tiny.arrays(tmp_path), tiny.arrays(quick))


def test_fine_tuning_starts_from_the_fitted_head_and_is_continued_exactly(base, quick, tmp_path):
    c = config(base, total_steps=4, eval_every=4, checkpoint_every=2, keep=2, accum_steps=1)
    train_and_evaluate(c, tmp_path / "run")
    scores = tiny.metrics(tmp_path / "run", "accuracy_test")
    assert scores[0] == tiny.metrics(quick, "accuracy_test")[0] and set(scores) == {0, 4}
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    (tmp_path / "again" / "model.npz").unlink()
    train_and_evaluate(c, tmp_path / "again")
    chex.assert_trees_all_equal(tiny.arrays(tmp_path / "again"), tiny.arrays(tmp_path / "run"))


def test_fine_tuning_that_makes_it_worse_ends_with_the_fitted_head(base, quick, tmp_path):
    c = config(base, total_steps=2, eval_every=1, base_lr=30.0, keep_best="accuracy_test", end_with_best=True)
    train_and_evaluate(c, tmp_path)
    scores = tiny.metrics(tmp_path, "accuracy_test")
    assert scores[1] < scores[0] == scores[2] == tiny.metrics(quick, "accuracy_test")[0]
    chex.assert_trees_all_equal(tiny.arrays(tmp_path), tiny.arrays(quick))
    assert predictor.load(tmp_path).description.metrics["accuracy_test"] == scores[0]


def test_what_cannot_be_fitted_is_refused(base, tmp_path):
    frozen = config(base, freeze=("head/.*",))
    with pytest.raises(UserError, match="the head is not trained"):
        train_and_evaluate(frozen, tmp_path / "frozen")
    nothing = config(base)
    nothing.pretrained, nothing.pretrained_dir = None, ""
    with pytest.raises(UserError, match="features of a trained model: name it by --config.pretrained"):
        train_and_evaluate(nothing, tmp_path / "nothing")
    no_strength = config(base)
    no_strength.head_fit.l2 = (0.0, 1.0)
    with pytest.raises(UserError, match="positive numbers"):
        train_and_evaluate(no_strength, tmp_path / "l2")
    (tmp_path / "my,photos").mkdir()
    assert photos.get_config(f"{tmp_path}/my,photos,quick").dataset == f"{tmp_path}/my,photos"
    with pytest.raises(UserError, match="'quik' is not known: use photos:.*,quick or .*,quick,finetune"):
        photos.get_config(f"{tmp_path},quik")


def test_a_class_with_one_image_is_learnt_from_all_the_same():
    x, labels = two_views()
    labels[labels == 4] = 3
    labels[7] = 4
    assert not fit_head._held_out(labels)[7]
    head = fit_head.fit(x, labels, np.eye(5, dtype=np.float32)[labels], (1e-3,))
    assert (x[0, 7] @ head.kernel + head.bias).argmax() == 4
