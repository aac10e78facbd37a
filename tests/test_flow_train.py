"""Training, the model's folder and the commands: a tiny flow end to end, what resumes, what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.checkpoint.safetensors_io import open_weights
from jaxinfer.cli import compiled, main
from jaxinfer.errors import CheckpointError, ConfigError, InputError, JobError
from jaxinfer.flow import checkpoint, schedule
from jaxinfer.flow.adaptive import Tolerance
from jaxinfer.flow.data import Images
from jaxinfer.flow.guide import Guidance
from jaxinfer.flow.inpaint import inpainting_condition
from jaxinfer.flow.model import FlowModel
from jaxinfer.flow.network import Network
from jaxinfer.flow.objective import FlowMatching
from jaxinfer.flow.solve import euler
from jaxinfer.flow.types import Condition, Out
from jaxinfer.models import autoencoder as vae
from jaxinfer.models.dit import DitConfig
from jaxinfer.train import flow as recipes
from jaxinfer.train import loop

SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}


def halves(count: int = 96) -> Images:
    """4x4 images whose left (class 0) or right half is bright."""
    labels = np.arange(count, dtype=np.int32) % 2
    images = np.full((count, 4, 4, 1), -0.5, np.float32)
    for i, label in enumerate(labels):
        images[i, :, 2 * label : 2 * label + 2] = 0.5 + 0.1 * (i % 5)
    return Images(images, labels, ("left", "right"))


@pytest.fixture(autouse=True)
def no_cache_in_the_home(monkeypatch):
    monkeypatch.setattr(compiled, "use_cache", lambda: None)


@pytest.fixture(scope="module")
def data():
    return halves()


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A flow of pixels, 400 updates, in its folder."""
    folder = tmp_path_factory.mktemp("flow")
    network = recipes.network_for(data, None, **SIZES)
    recipe = recipes.flow_recipe(network, data, steps=400, batch=48, rate=1e-2, ema=0.95)
    state = loop.init_state(network.init(jax.random.key(0)), recipe, jax.random.key(1))
    state = loop.train(recipe, state, loop.LoopConfig(steps=400, log_every=100, save_seconds=None, curve=False), folder)
    model = FlowModel(network, state.ema, classes=data.classes)
    checkpoint.save(folder, model)
    return folder, model, recipe


@pytest.mark.slow
def test_it_learns_the_classes(trained):
    _, model, _ = trained
    labels = np.arange(16, dtype=np.int32) % 2
    found = np.asarray(model.sample(jax.random.key(3), Condition(labels=labels), 16, schedule.uniform(8)))
    assert found.shape == (16, 4, 4, 1) and np.abs(found).max() <= 1
    brighter = found[:, :, 2:].mean((1, 2, 3)) > found[:, :, :2].mean((1, 2, 3))
    assert (brighter == labels).mean() > 0.85
    two = model.sample(jax.random.key(3), Condition(labels=labels[:2]), 2, schedule.uniform(8))
    np.testing.assert_allclose(two, found[:2], atol=1e-5)  # a row's image does not depend on how many there are
    later = model.sample(jax.random.key(3), Condition(labels=labels[2:4]), 2, schedule.uniform(8), first=2)
    np.testing.assert_allclose(later, found[2:4], atol=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.02])
def test_a_short_run_hears_the_class(data, tmp_path, strength):
    """What lies between the classes' images is what their velocities at the source differ by. Planted bug: classes as
    weak as DiT's initial ones."""
    network = recipes.network_for(data, None, **SIZES)
    recipe = recipes.flow_recipe(network, data, steps=150, batch=48, rate=5e-3, ema=0.95)
    params = network.init(jax.random.key(0))
    params["conditioner"]["labels"] *= strength
    config = loop.LoopConfig(steps=150, log_every=50, save_seconds=None, curve=False)
    params = loop.train(recipe, loop.init_state(params, recipe, jax.random.key(1)), config, tmp_path).params
    x, t = jax.random.normal(jax.random.key(2), (32, 4, 4, 1)), jnp.zeros(32)
    left, right = (network(params, x, t, t, Condition(labels=jnp.full(32, i, jnp.int32))).v for i in (0, 1))
    apart = data.images[data.labels == 1].mean(0) - data.images[data.labels == 0].mean(0)
    share = float(((right - left).mean(0) * apart).sum() / (apart**2).sum())
    assert (share > 0.5) == (strength == 1.0)


def test_folder_round_trip(trained):
    folder, model, _ = trained
    back = checkpoint.load(folder)
    assert back.network == model.network and back.classes == ("left", "right")
    jax.tree.map(np.testing.assert_array_equal, back.params, jax.device_get(model.params))


def test_what_a_run_reads_is_a_function_of_the_step(trained, data):
    """Another process that gives the same command has the same batches and the same identity."""
    _, model, recipe = trained
    again = recipes.flow_recipe(model.network, data, steps=400, batch=48, rate=1e-2, ema=0.95)
    assert again.identity == recipe.identity and " at 0x" not in str(again.identity)
    jax.tree.map(np.testing.assert_array_equal, again.data(7), recipe.data(7))
    other = recipes.flow_recipe(model.network, data, steps=400, batch=48, rate=1e-2, ema=0.95, seed=1)
    assert other.identity != recipe.identity and (other.data(7)["labels"] != recipe.data(7)["labels"]).any()


@pytest.mark.slow
def test_training_goes_on_to_the_same_bits(trained, tmp_path):
    _, model, recipe = trained
    whole = None
    for folder, lengths in ((tmp_path / "a", (12,)), (tmp_path / "b", (7, 12))):
        for steps in lengths:
            state = loop.init_state(model.network.init(jax.random.key(5)), recipe, jax.random.key(6))
            config = loop.LoopConfig(steps=steps, curve=False, log_every=100)
            state = loop.train(recipe, state, config, folder)
        if whole is None:
            whole = state
        else:
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole.ema), jax.device_get(state.ema))


@pytest.mark.slow
def test_a_run_that_diverges_stops(data, tmp_path):
    """The step is named, and that no checkpoint was saved; tests/test_train_loop.py has the case with one."""
    network = recipes.network_for(data, None, **SIZES)

    @dataclasses.dataclass(frozen=True)
    class Bursts(FlowMatching):
        def __call__(self, apply, params, key, batch):
            loss, metrics = super().__call__(apply, params, key, batch)
            return loss * jnp.where(batch.cond.labels[0] >= 0, jnp.nan, 1.0), metrics

    bad = recipes.flow_recipe(network, data, steps=10, batch=32, objective=Bursts())
    state = loop.init_state(network.init(jax.random.key(0)), bad, jax.random.key(1))
    with pytest.raises(JobError, match="is nan at step 1; the last checkpoint is before it: none was saved"):
        loop.train(bad, state, loop.LoopConfig(steps=10, curve=False), tmp_path)


@pytest.mark.slow
def test_autoencoder_learns_and_is_scaled(data):
    config = vae.AutoencoderConfig(4, 4, 1, patch=2, latent_channels=2, hidden_size=16, num_layers=0)
    recipe = recipes.autoencoder_recipe(config, data.images, steps=200, batch=32, rate=1e-2)
    state = loop.init_state(vae.init(config, jax.random.key(0)), recipe, jax.random.key(1))
    update = jax.jit(loop.make_train_step(recipe))
    for step in range(200):
        state, metrics = update(state, recipe.data(step))
    assert metrics["pixel_error"] < 0.03  # the variance of a pixel is 0.3
    scaled = recipes.fit_scale(config, state.params, data.images)
    z = vae.encode(scaled, state.params, data.images, jax.random.key(2))
    np.testing.assert_allclose(jnp.std(z), 1.0, atol=0.15)
    np.testing.assert_allclose(vae.decode(scaled, state.params, z), data.images, atol=0.6)


def test_epochs():
    epochs = recipes.Epochs({"x": np.arange(10)}, 4, seed=0)
    first = np.concatenate([epochs(0)["x"], epochs(1)["x"]])
    assert len(set(first)) == 8 and (epochs(0)["x"] == epochs(0)["x"]).all()
    assert {tuple(epochs(i)["x"]) for i in range(6)} != {tuple(epochs(0)["x"])}
    with pytest.raises(ConfigError, match="a batch of 11 rows"):
        recipes.Epochs({"x": np.arange(10)}, 11, seed=0)


def oracle(data):
    """A network's stand-in that knows the velocity to what its condition image shows: the image itself."""

    class Shown:
        config = DitConfig(4, 4, 1, image_channels=2, patch=2, classes=2, **SIZES)
        shape = (4, 4, 1)

        def __call__(self, params, x, t, s, cond, *, seg=None, features=None):
            return Out((cond.image[..., :1] - x) / jnp.maximum(1 - t, 1e-3)[:, None, None, None], {})

        def check(self, cond, rows):
            return None

    return Shown()


def test_inpainting_pastes_what_is_known(data):
    model = FlowModel(oracle(data), {}, classes=data.classes, condition="inpaint")
    hole = np.zeros((4, 4, 4, 1), bool)
    hole[:, :, 2:] = True
    images, ts = jnp.asarray(data.images[:4]), schedule.uniform(4)
    painted = model.inpaint(jax.random.key(0), images, jnp.asarray(hole), None, ts, solver=euler)
    np.testing.assert_array_equal(painted[:, :, :2], data.images[:4, :, :2])
    np.testing.assert_allclose(painted[:, :, 2:], -1.0, atol=1e-2)  # this oracle paints what the hole was set to
    with pytest.raises(ConfigError, match="not trained to inpaint"):
        dataclasses.replace(model, condition="class").inpaint(jax.random.key(0), data.images[:4], hole, None, [0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["inpaint", "semantic"])
def test_objectives_with_an_image_beside(data, condition):
    """The loss on each condition, in latents: the frozen autoencoder encodes what a hole leaves."""
    config = vae.AutoencoderConfig(4, 4, 1, patch=2, latent_channels=2, hidden_size=8, num_layers=0)
    params = vae.init(config, jax.random.key(0))
    network = recipes.network_for(data, config, condition, patch=1, **SIZES)
    recipe = recipes.flow_recipe(
        network, data, steps=20, batch=32, autoencoder=config, autoencoder_params=params, condition=condition
    )
    assert (recipe.frozen is None) == (condition == "semantic")
    more = () if recipe.frozen is None else (recipe.frozen,)
    loss, _ = jax.jit(recipe.objective)(network.init(jax.random.key(0)), recipe.data(0), jax.random.key(1), *more)
    z, _ = recipes.latents(config, params, data.images)
    assert 0.5 * (1 + z.var()) < loss < 3 * (1 + z.var())  # a network of zeros: the variance of noise less data


def test_what_a_model_refuses(trained, tmp_path):
    folder, model, _ = trained
    cond = Condition(labels=np.array([0, 1], np.int32))
    key = jax.random.key(0)
    with pytest.raises(InputError, match="must increase"):
        model.sample(key, cond, 2, [0.0, 0.7, 0.3, 1.0])
    with pytest.raises(InputError, match="class 7 is unknown"):
        model.sample(key, Condition(labels=np.array([0, 7])), 2, [0.0, 1.0])
    with pytest.raises(InputError, match="class 'up' is unknown: the model's are left, right"):
        model.labels(["up"])
    with pytest.raises(ConfigError, match="needs a null condition.*drop_rate 0"):
        dataclasses.replace(model, drop_rate=0.0).sample(key, cond, 2, [0.0, 1.0], guidance=Guidance(2.0))
    with pytest.raises(InputError, match="an image is"):
        model.edit(np.zeros((2, 8, 8, 1), np.float32), cond, cond, [0.0, 1.0])
    with pytest.raises(ConfigError, match="refine 4 needs a key"):
        model.edit(np.zeros((2, *model.image_shape), np.float32), cond, cond, [0.0, 1.0], refine=4)
    with pytest.raises(ConfigError, match="condition 'sketch'"):
        recipes.image_channels("sketch", 1)
    with pytest.raises(InputError, match="the network's x is"):
        recipes.flow_recipe(Network(DitConfig(8, 8, 1, **SIZES)), halves(), steps=20, batch=8)
    with pytest.raises(CheckpointError, match=r"no flow\.json"):
        checkpoint.load(tmp_path)
    broken = jax.tree.map(lambda x: x, model.params)
    broken["final"]["out"] = broken["final"]["out"].at[0, 0].set(jnp.nan)
    checkpoint.save(tmp_path, dataclasses.replace(model, params=broken))
    with pytest.raises(CheckpointError, match="flow/final/out has values that are not finite"):
        checkpoint.load(tmp_path)
    assert "flow/final/out" in open_weights(folder / "flow.safetensors")


@pytest.mark.slow
def test_adaptive_agrees_with_many_steps(trained):
    pytest.importorskip("diffrax")
    _, model, _ = trained
    cond, key = Condition(labels=np.array([0, 1], np.int32)), jax.random.key(0)
    fine = model.sample(key, cond, 2, schedule.uniform(200))
    np.testing.assert_allclose(model.sample(key, cond, 2, [0.0, 1.0], solver=Tolerance()), fine, atol=5e-3)


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_sample_command(trained, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    folder, model, _ = trained
    command = ("sample", "--model", folder, "--output", tmp_path / "s", "--count", 6, "--steps", 2)
    code, out, _ = run(capsys, *command, "--guidance", 1.5)
    said = json.loads(out)
    assert code == 0 and said["evaluations"] == 4 and said["guided"]
    with np.load(said["npz"]) as found:
        assert found["images"].shape == (6, 4, 4, 1) and found["images"].dtype == np.uint8
        assert list(found["labels"]) == [0, 1] * 3
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    for more, words in (
        (("--classes", "up"), "class 'up' is unknown"),
        (("--schedule", "0,1,0.5"), "must increase"),
        (("--solver", "rk9"), "none of euler"),
        (("--guidance-interval", "x"), "START,END"),
    ):
        code, _, error = run(capsys, *command, *more)
        assert code == 2 and words in error and "Traceback" not in error


def test_edit_command(trained, capsys, tmp_path, data):
    pytest.importorskip("matplotlib")
    folder, model, _ = trained
    np.savez(tmp_path / "in.npz", images=data.images[:4], labels=data.labels[:4])
    command = ("edit", "--model", folder, "--input", tmp_path / "in.npz", "--output", tmp_path / "e", "--steps", 12)
    code, out, _ = run(capsys, *command, "--to", "right")
    assert code == 0
    with np.load(tmp_path / "e.npz") as found:
        images = found["images"] / 127.5 - 1
    right = images[:, :, 2:].mean((1, 2, 3)) > images[:, :, :2].mean((1, 2, 3))
    assert right.sum() >= 3  # two were of the left
    same = np.abs(images[1::2] - data.images[1:4:2]).mean()
    assert same < np.abs(images[::2] - data.images[:4:2]).mean()  # what was right already is changed less
    code, _, error = run(capsys, *command, "--to", "right", "--refine", 4)
    assert code == 0, error
    with np.load(tmp_path / "e.npz") as found:  # FlowOpt: nearer to what it was
        refined = found["images"] / 127.5 - 1
    assert np.abs(refined - data.images[:4]).mean() < np.abs(images - data.images[:4]).mean()
    for more, words in (
        ((), "give either --to, a class, or --mask"),
        (("--mask", "left", "--refine", 4), "--refine is of an edit to another class"),
        (("--mask", "left"), "not trained to inpaint"),
        (("--mask", "middle"), "none of left, right, top, bottom"),
        (("--to", "right", "--start", "1"), r"start must be in [0, 1)"),
        (("--to", "right", "--solver", "dopri5"), "fixed steps"),
    ):
        code, _, error = run(capsys, *command, *more)
        assert code == 2 and words in error


@pytest.mark.slow
def test_train_flow_command(capsys, tmp_path, data):
    """The whole command on a file of images: autoencoder, flow, pictures as it goes; given again it goes on."""
    pytest.importorskip("matplotlib")
    file = tmp_path / "set.npz"
    np.savez(file, images=np.repeat(np.repeat(data.images, 2, 1), 2, 2), labels=data.labels)
    command = (
        "train", "flow", "--data", file, "--output", tmp_path / "out", "--steps", 20, "--autoencoder-steps", 20,
        "--batch", 16, "--width", 16, "--layers", 1, "--heads", 2, "--snapshot-every", 10, "--condition", "inpaint",
    )  # fmt: skip
    code, _, error = run(capsys, *command)
    assert code == 0, error
    out = tmp_path / "out"
    assert (out / "flow" / "samples.png").is_file() and (out / "flow" / "curve.png").is_file()
    model = checkpoint.load(out)
    assert model.condition == "inpaint" and model.image_shape == (8, 8, 1) and model.autoencoder.scale != 1.0
    images = np.repeat(np.repeat(data.images[:2], 2, 1), 2, 2)
    hole = np.ones((2, 8, 8, 1), bool)
    one = inpainting_condition(model.encode, images, hole)
    np.testing.assert_array_equal(one, inpainting_condition(model.encode, -images, hole))
    code, _, _ = run(capsys, *command)
    assert code == 0
    np.savez(tmp_path / "in.npz", images=images, labels=data.labels[:2])
    edit = ("edit", "--model", out, "--input", tmp_path / "in.npz", "--mask", "top", "--output", out / "p")
    code, _, error = run(capsys, *edit)
    assert code == 0, error
    code, _, error = run(capsys, "train", "flow", "--data", "letters", "--output", out)
    assert code == 2 and "none of glyphs, digits" in error
